"""Load files of `torch.save` without running code, and without more memory than their size.

    saved, names = torch_files.load('latest.pth')
    saved, names = torch_files.load('run.pth.tar', skip_unknown=True)
"""

import argparse
import contextlib
import os
import pickletools
import re
import textwrap
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict

import torch

from training.console import UserError


def load(path, skip_unknown=False):
    """Load a file of `torch.save` onto the CPU.

    Args:
        skip_unknown: load objects of other classes as placeholders. Files of weights often contain
            some: Lightning's hyperparameters, NumPy's numbers, loss functions. By default, such a
            file is an error, as in torch.load with weights_only=True.

    Returns:
        The content, and the names of the classes and functions that the pickle refers to.

    Raises:
        UserError: no such file, not a file of `torch.save`, damaged, or loading it would run code.
    """
    names = []
    try:
        names = check_file(path)
        allowed = [argparse.Namespace]  # timm's flags
        if skip_unknown:
            allowed = [(_SkippedNumPy if name.startswith('numpy.') else _Skipped, name)
                       for name in names]
        with torch.serialization.safe_globals(allowed), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # about the version of the pickle protocol
            return torch.load(path, map_location='cpu', weights_only=True), names
    except (UserError, MemoryError):
        raise
    except Exception as error:  # torch raises any exception for a file of another format
        raise_if_pickled_model(path, names)
        # torch.load puts the reason between advice to trust the file and a link
        found = re.search(
            r'Weights only load failed.*?(?:Unpickler error:|\n(?=Trying))(.*?)(?:\n\nCheck|$)',
            str(error), re.DOTALL)
        text = textwrap.shorten(found[1] if found else str(error), 200)
        reason = text or type(error).__name__
        raise UserError(f'{path} is not a checkpoint, or a damaged one: {reason}') from error


class _Skipped:
    """Placeholder for a class that torch.load does not allow; instances are empty OrderedDicts.

    The unpickler sets items and attributes of an OrderedDict, which most classes need.
    """

    def __new__(cls, *args):
        return OrderedDict()


class _SkippedNumPy:
    """Placeholder for NumPy's types, whose state is a tuple."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def raise_if_pickled_model(path, names):
    if any(name.startswith('torch.nn.modules.') for name in names):
        name = next(name for name in names
                    if not re.match(r'torch\.(_utils|\w+Storage)|collections', name))
        raise UserError(f'{path} holds a whole model or module ({name}), and loading it can run '
                        f'code: where it was made, save only the model\'s state_dict()')


def check_file(path):
    """Check, before torch.load reads a file, that it needs no more memory than its size.

    Returns:
        The names of the classes and functions that its pickle refers to, in order.

    Raises:
        UserError: it is missing, not a regular file, damaged, compressed, or not written by
            `torch.save`.
    """
    check_is_file(path)
    if zipfile.is_zipfile(path):
        check_archive(path)
    names = pickled_names(path)
    if 'builtins.bytearray' in names:  # allowed by torch, and may take any amount of memory
        raise UserError(f'{path} holds a bytearray: save only its state_dict')
    return names


def check_is_file(path):
    if not os.path.exists(path):
        raise UserError(f'{path} is not there')
    if os.path.isfile(os.path.join(path, 'best.pth')):
        raise UserError(f'{path} is a folder: name a file in it, such as '
                        f'{os.path.join(path, "best.pth")}')
    if not os.path.isfile(path):  # reading a pipe may never end
        raise UserError(f'{path} is not a checkpoint, but a folder or a device')


def check_archive(path):
    """Raises UserError if the zip file is damaged or was not written by `torch.save`."""
    with zipfile.ZipFile(path) as archive:
        names = [name.rpartition('/')[2] for name in archive.namelist()]
        if 'constants.pkl' in names:
            raise UserError(f'{path} is a TorchScript program, which can run code: save its '
                            f'state_dict()')
        size = sum(info.file_size for info in archive.infolist())
        if size > os.path.getsize(path):
            raise UserError(f'{path} is compressed, and would take {size / 1e9:.3g} GB: torch.save '
                            f'does not compress')
        if 'data.pkl' not in names:
            raise UserError(f'{path} is a zip file that torch.save did not write: it holds '
                            f'{textwrap.shorten(str(archive.namelist()), 200)}')
        record = archive.testzip()  # torch.load does not check the CRCs
        if record:
            raise UserError(f'{path} is damaged: the CRC of {record} is wrong')


def pickled_names(path):
    """The names of the classes and functions that a file of `torch.save` refers to, in order."""
    with contextlib.ExitStack() as stack:
        if zipfile.is_zipfile(path):
            archive = stack.enter_context(zipfile.ZipFile(path))
            record = next(name for name in archive.namelist() if name.endswith('data.pkl'))
            pickles = [stack.enter_context(archive.open(record))]
        else:  # before PyTorch 1.6: a magic number, a version, the system, and the content
            pickles = 4 * [stack.enter_context(open(path, 'rb'))]
        names = (tuple(argument.split(' ', 1)) for file in pickles
                 for opcode, argument, _ in pickletools.genops(file) if opcode.name == 'GLOBAL')
        # Pickles of protocol 2 have Python 2's names.
        return [*dict.fromkeys('.'.join(NAME_MAPPING.get(
            (module, name), (IMPORT_MAPPING.get(module, module), name))) for module, name in names)]
