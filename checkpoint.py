"""Checkpoints: what training changes, written so that a file is either the old one or the new one.

    state = TrainState(model, optimizer, scaler, interval=torch.zeros(4, device=device))
    save('work/x/latest.pth', state.state_dict(), keep=1, args=vars(args))
    path, saved, complaints = load_newest('work/x/latest.pth')  # or else latest.pth.1, and so on
    state.load_state_dict(saved)

A checkpoint holds tensors and plain values alone, so that reading one can't run code:
`torch.load(path, weights_only=True)['model']` is the model's state dict. It is a zip archive, as
torch writes it, whose comment is the SHA-256 of all that comes before: no damage goes unnoticed.
"""

import argparse
import contextlib
import hashlib
import io
import math
import os
import re
import shutil
import struct
import warnings
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch

SEAL = b'sha256 '  # before the checksum, 64 digits, in the archive's comment
SEAL_LENGTH = len(SEAL) + 64


class CheckpointError(Exception):
    """A checkpoint that is missing, broken or of another model, said in one line."""


@dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    An interval is what comes after the last row of train.csv. Its sums are on the device, so that
    no step has to wait for them. Where several processes train together, each has sums and a random
    state of its own; all else is the same in all of them.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    # float32 [4]: loss, errors, steps before the first that was not finite, and its `culprit`
    interval: torch.Tensor
    interval_steps: int = 0
    interval_images: int = 0
    epoch_sums: tuple = (0.0, 0.0, 0)  # loss, errors, images of the intervals of this epoch
    epoch: int = 1                     # counted from 1
    step: int = 0                      # steps of this epoch that are done
    last_error: float = math.nan  # percent, of the last epoch's evaluation
    best_error: float = math.inf
    best_epoch: int = 0
    # Of all training that led here: seconds of training, testing and saving, up to the last save,
    # and the most bytes that were allocated on the GPU, rank 0's.
    seconds: float = 0.0
    peak_memory: int = 0

    # Without an annotation, so not a field: the plain values among them.
    _plain = ('interval_steps', 'interval_images', 'epoch_sums', 'epoch', 'step', 'last_error',
              'best_error', 'best_epoch')
    _used = ('seconds', 'peak_memory')  # which older checkpoints lack

    def begin_epoch(self, epoch):
        self.epoch, self.step, self.epoch_sums = epoch, 0, (0.0, 0.0, 0)
        self.begin_interval()

    def begin_interval(self):
        self.interval.zero_()
        self.interval_steps = self.interval_images = 0

    def count_step(self, num_images):
        self.interval_steps += 1
        self.interval_images += num_images
        self.step += 1

    @contextlib.contextmanager
    def rehearsal(self):
        """A context whose steps leave no trace; every tensor keeps its place in memory."""
        def tensors():
            optimizer = [value for values in self.optimizer.state.values()
                         for value in values.values() if torch.is_tensor(value)]
            return [*self.model.state_dict().values(), self.interval, *optimizer]

        before = {tensor.data_ptr(): tensor.clone() for tensor in tensors()}
        scaler, random_state = self.scaler.state_dict(), self._random_state()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor in tensors():
                    if tensor.data_ptr() in before:
                        tensor.copy_(before[tensor.data_ptr()])
                    else:  # made by SGD, Adam or RMSprop in its first step: that starts from zeros
                        tensor.zero_()
            self.scaler.load_state_dict(scaler)
            self._set_random_state(random_state)

    def _random_state(self):
        return {'cpu': torch.get_rng_state(),
                'cuda': torch.cuda.get_rng_state() if self.interval.is_cuda else None}

    def _set_random_state(self, state):
        torch.set_rng_state(state['cpu'])
        if self.interval.is_cuda and state['cuda'] is not None:
            torch.cuda.set_rng_state(state['cuda'])

    def own_state(self):
        """What is this process's alone."""
        return {'interval': self.interval.cpu(), 'rng': self._random_state()}

    def state_dict(self, own_states=None):
        """What a checkpoint holds; `own_states` are all processes', in the order of ranks."""
        return {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(), 'processes': own_states or [self.own_state()],
            **{name: getattr(self, name) for name in (*self._plain, *self._used)},
        }

    def load_state_dict(self, saved, source='the checkpoint', rank=0, world_size=1):
        """Go on from a checkpoint, random state included, as one of some processes.

        They may be more or fewer than before: then rank 0 takes over all sums, and a process that
        is new keeps the random state it has.

        Raises:
            CheckpointError: it is of another model, or lacks something; names the first difference.
        """
        load_weights(self.model, saved.get('model'), source)
        if 'optimizer' not in saved:
            raise CheckpointError(f'{source} holds weights alone: --pretrained {source} starts '
                                  f'training from them')
        try:
            # The momenta are the checkpoint's; decay and the like are this run's. The learning rate
            # is that of the last step, until the next one sets it.
            pairs = zip(self.optimizer.param_groups, saved['optimizer']['param_groups'])
            groups = [{**group, 'params': saved_group['params'],
                       'lr': _with_value(group['lr'], float(saved_group['lr']))}
                      for group, saved_group in pairs]
            self.optimizer.load_state_dict({**saved['optimizer'], 'param_groups': groups})
            self.scaler.load_state_dict(saved['scaler'])
            for name in self._plain:
                setattr(self, name, type(getattr(self, name))(saved[name]))
            for name in self._used:
                setattr(self, name, type(getattr(self, name))(saved.get(name, 0)))
            self._check_values()
            processes = saved['processes']
            if rank < len(processes):
                self._set_random_state(processes[rank]['rng'])
            sums = torch.stack([process['interval'] for process in processes])
            if len(processes) == world_size:
                self.interval.copy_(sums[rank])
            else:
                loss, errors, *_ = sums.sum(0) if rank == 0 else sums.new_zeros(4)
                self.interval.copy_(torch.stack([loss, errors, *sums[:, 2:].amin(0)]))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError,
                RuntimeError) as error:
            raise CheckpointError(f'{source} cannot be resumed from: '
                                  f'{type(error).__name__}: {_one_line(error)}') from error

    def _check_values(self):
        """Raises ValueError for what no run can have saved."""
        if not (1 <= self.epoch <= 10**9 and self.step >= 0 and self.interval_steps >= 0
                and len(self.epoch_sums) == 3 and sum(self.epoch_sums) >= 0
                and 0 <= self.seconds < 1e12 and self.peak_memory >= 0):
            raise ValueError(f'epoch {self.epoch}, step {self.step}, sums {self.epoch_sums}, '
                             f'{self.seconds} seconds, {self.peak_memory} bytes')
        for parameter, values in self.optimizer.state.items():
            for name, value in values.items():
                if torch.is_tensor(value) and value.shape not in (parameter.shape, torch.Size()):
                    raise ValueError(f'a {name} of another shape')
                if isinstance(value, str):
                    raise ValueError(f'a {name} that is no number')


def _with_value(number, value):
    """The value as what the number is: a tensor on its device, or a float."""
    return torch.full_like(number, value) if torch.is_tensor(number) else value


def save(path, state, keep=0, **extra):
    """Write `state` and what else is given; complete and on the disk before it takes its name.

    The last `keep` files that had that name stay, as path.1 (the newest), path.2 and so on. At
    every moment the newest one that is there is whole, as far as the disk can tell.
    """
    path, archive = Path(path), io.BytesIO()
    torch.save({**state, **extra, 'sealed': True}, archive)
    # The archive ends with the length of its comment, 0, as two bytes.
    content = archive.getbuffer()[:-2], struct.pack('<H', SEAL_LENGTH), SEAL
    before = _temporary(f'{path}.1')
    before.unlink(missing_ok=True)
    if keep and path.is_file():
        try:
            os.link(path, before)  # a second name: the first one is in use until the last moment
        except OSError:  # a file system without links
            shutil.copyfile(path, before)
    try:
        with replacing(path) as file:
            for part in (*content, _checksum(*content)):
                file.write(part)
        _shift(path, before, keep)
    finally:
        before.unlink(missing_ok=True)


def _shift(path, before, keep):
    """Let `before` be path.1, what was that be path.2, and so on, until there are `keep`."""
    older = versions(path)[1:]
    for i, version in enumerate(older, start=1):  # if one in between was taken away
        os.replace(version, f'{path}.{i}')
    older = versions(path)[1:]
    if before.exists():
        for i, version in reversed(list(enumerate(older[:keep - 1], start=2))):
            os.replace(version, f'{path}.{i}')
        os.replace(before, f'{path}.1')
    for version in older[keep:]:
        version.unlink()


def versions(path):
    """The checkpoints of that name, whether or not it is there, and then path.1, path.2, ..."""
    path = Path(path)
    older = [version for version in path.parent.glob('*') if version.stem == path.name
             and re.fullmatch(r'\.[1-9]\d{0,2}', version.suffix)]  # and not those of other people
    return [path, *sorted(older, key=lambda version: int(version.suffix[1:]))]


def set_aside_damaged(path):
    """Rename what `load_newest` found damaged, lest it be kept instead of what is sound."""
    for version in versions(path):
        try:
            load(version)
            return
        except CheckpointError:
            with contextlib.suppress(FileNotFoundError):
                os.replace(version, f'{version}.damaged')


def _checksum(*parts):
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def load(path):
    """The dictionary that a checkpoint holds, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, or not a checkpoint, or a damaged one, or one that would
            run code.
    """
    try:
        content = Path(path).read_bytes()
    except FileNotFoundError as error:
        raise CheckpointError(f'{path} is not there: --resume and --pretrained take the path of a '
                              f'checkpoint, such as work/cifar10.base/latest.pth') from error
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
    sealed = content[-SEAL_LENGTH:-64] == SEAL
    if sealed and content[-64:] != _checksum(memoryview(content)[:-64]):
        raise CheckpointError(f'{path} is damaged: its checksum is not that of what it holds')
    try:
        if zipfile.is_zipfile(io.BytesIO(content)):
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(record.file_size for record in archive.infolist()) > len(content):
                    raise ValueError('records that are compressed')  # torch writes none: a bomb
        with warnings.catch_warnings(), \
                torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its flags so
            warnings.simplefilter('ignore')  # of a pickle's age: what is wrong is said below
            saved = torch.load(io.BytesIO(content), map_location='cpu', weights_only=True)
    except Exception as error:  # whatever a file that is no checkpoint makes the reader stumble on
        if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
            raise  # that is not the file's fault
        raise CheckpointError(f'{path} is not a checkpoint, or a broken one '
                              f'({type(error).__name__})') from error
    if not isinstance(saved, dict):
        raise CheckpointError(f'{path} is not a checkpoint: it holds a {type(saved).__name__}')
    if saved.pop('sealed', False) and not sealed:
        raise CheckpointError(f'{path} is damaged: its checksum is not where it should be')
    return saved


def load_newest(path):
    """The newest of `versions` that is sound: its path, what it holds, and complaints of the rest.

    Raises:
        CheckpointError: there is none; says what is wrong with the first, as `load` does.
    """
    complaints, first = [], None
    for version in versions(path):
        try:
            return str(version), load(version), complaints
        except CheckpointError as error:
            first = first or error
            complaints.append(str(error) if version.exists() else f'{version} is not there')
    others = len(complaints) - 1
    raise CheckpointError(f'{first}' + f'; nor is any of the {others} before it sound'
                          * (others > 0)) from first


def load_weights_file(path):
    """The state dict in a file: our checkpoint, or one of torchvision or timm, bare or not.

    Raises:
        CheckpointError: as `load`; or it is a .safetensors file, and the package is not there.
    """
    if Path(path).suffix == '.safetensors':  # as timm's weights come
        try:
            from safetensors.torch import load_file

            return load_file(path)
        except Exception as error:  # not installed, no such file, a broken one
            raise CheckpointError(f'{path} cannot be read: {_one_line(error)}') from error
    saved = load(path)
    return next((saved[key] for key in ('model', 'state_dict') if key in saved), saved)


def load_weights(model, weights, source):
    """Load a state dict into `model`.

    Raises:
        CheckpointError: the two don't fit; names the first difference.
    """
    if not isinstance(weights, dict) or not all(torch.is_tensor(w) for w in weights.values()):
        raise CheckpointError(f'{source} holds no weights of a model')
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f'{source} is of another architecture: '
                              f'{_first_difference(str(error))}') from error


def _first_difference(message):
    """The first of the complaints in the message of nn.Module.load_state_dict."""
    size = re.search(r'size mismatch for (\S+): .* shape torch.Size\((.*?)\) from checkpoint, .* '
                     r'torch.Size\((.*?)\)', message)
    missing = re.search(r'Missing key\(s\) in state_dict: "(.*?)"', message)
    unexpected = re.search(r'Unexpected key\(s\) in state_dict: "(.*?)"', message)
    if missing:
        return f'it has no {missing[1]}'
    if unexpected:
        return f'it has {unexpected[1]}, and this model has not'
    if size:
        return f'{size[1]} is {size[2]} there and {size[3]} here'
    return _one_line(message)


def _one_line(text):
    return ' '.join(str(text).split())


def _temporary(path):
    """The name of a file that is not complete yet; `runlog.claim` takes out what is left of one."""
    return Path(path).with_name(f'.{Path(path).name}.tmp')


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is whole; an error changes nothing."""
    path, temporary = Path(path), _temporary(path)
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno:  # a write names no file
            error.filename = str(path)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the rename itself
    os.close(directory)
