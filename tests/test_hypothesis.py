"""Random flags of train.py and arguments of DenseNet give a result or a one-line error.

    EXAMPLES=1000 python -m pytest tests/test_hypothesis.py      # a longer search
"""

import argparse
import contextlib
import io
import math
import os
import tempfile

import pytest
import torch
from conftest import raise_no_network, write_images
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import densenet
import train
from training import flags

EXAMPLES = int(os.environ.get('EXAMPLES', 100))
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck),
                    derandomize='EXAMPLES' not in os.environ)
# Typing mistakes; no slash, because a word may become the name of a directory.
WORDS = st.one_of(st.sampled_from(['', ' ', 'yes', 'nan', '-inf', '１２', '1_0', '0x10', '%s', 'π',
                                   '\udcff', 'x' * 300, '--']),
                  st.text(st.characters(exclude_characters='/\0'), max_size=8).filter(
                      lambda word: word.strip('.') and not word.startswith('-')))
WHOLE = st.sampled_from([-1, 0, 1, 2, 3, 4, 7, 10, 2**32, 10**10, 10**400]).map(str)
NUMBERS = st.sampled_from('-1 0 1e-300 1e-9 0.05 0.5 0.999 1 2 1e30 1e308 1e400 NaN'.split())


@pytest.fixture(scope='module')
def few(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('few'), {
        'train/a': 6, 'train/b': 6, 'val/a': 1, 'val/b': 1}, (8, 8))


@st.composite
def flag_and_values(draw):
    """A flag of train.py, by one of its names, with valid or invalid values."""
    action = draw(st.sampled_from([
        action for action in flags.make_parser()._actions
        if action.dest not in ('data', 'compile')]))  # compiling takes minutes
    flag = draw(st.sampled_from(action.option_strings))
    if action.nargs == 0 or isinstance(action, argparse.BooleanOptionalAction):
        return [flag]
    number = WHOLE if action.type and 'whole' in kind_of(action.type) else NUMBERS
    choices = [str(c) for c in action.choices or () if 'densenet' not in str(c)] or ['densenet121']
    value = st.one_of(number, WORDS, st.sampled_from(choices))
    if action.type:  # mostly numbers, so that some flags get beyond the parser
        value = st.one_of(number, number, number, value)
    most = 3 if action.nargs == '+' else 1
    return [flag, *draw(st.lists(value, min_size=0 if action.nargs == '?' else 1, max_size=most))]


def kind_of(parse):
    try:
        parse('?')
    except argparse.ArgumentTypeError as error:
        return str(error)
    except ValueError:  # of int
        return 'whole'


@settings(SETTINGS, max_examples=EXAMPLES)
@given(drawn=st.lists(flag_and_values(), max_size=3))
def test_a_command_is_a_run_or_one_line(few, drawn):
    argv = ['--dataset', 'folder', '--data', str(few), '--growth-rate', '4', '--batch-size', '4',
            '--device', 'cpu', '--no-plot', '--workers', '0', '--block-config', '1', '1', '1']
    argv += [word for words in drawn for word in words]
    printed, errors, here = io.StringIO(), io.StringIO(), os.getcwd()
    code = None
    with tempfile.TemporaryDirectory() as directory, pytest.MonkeyPatch.context() as patch:
        patch.setattr(flags, 'with_network', one_epoch(flags.with_network))
        patch.setattr(torch.hub, 'download_url_to_file', raise_no_network)
        patch.setattr('urllib.request.urlopen', raise_no_network)
        os.chdir(directory)
        try:
            with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
                train.cli(argv)
        except SystemExit as exit_:
            code = exit_.code
        finally:
            os.chdir(here)
            torch.use_deterministic_algorithms(False)
    lines = [line for line in errors.getvalue().splitlines() if 'Downloading' not in line]
    if code == 2:
        assert len(lines) == 1 and lines[0].startswith('train.py: error: '), lines
        assert len(lines[0]) < 2000
    else:
        assert code in (None, 0) and lines == []
        assert printed.getvalue()


def one_epoch(with_network):
    def with_network_and_one_epoch(args, *others):
        return argparse.Namespace(**{**vars(with_network(args, *others)), 'epochs': 1})
    return with_network_and_one_epoch


# Some of these are out of range.
ARGUMENTS = st.fixed_dictionaries({}, optional={
    'growth_rate': st.integers(0, 8), 'num_init_features': st.integers(0, 9),
    'bn_size': st.integers(0, 4), 'num_classes': st.integers(0, 12),
    'block_config': st.lists(st.integers(0, 3), max_size=5),
    'drop_rate': st.floats(-0.1, 1.1) | st.just(math.nan), 'compression': st.floats(-0.1, 1.1),
    'in_channels': st.integers(0, 4), 'memory_efficient': st.booleans(),
    'bottleneck': st.booleans(), 'small_inputs': st.booleans()})


@settings(SETTINGS, max_examples=2 * EXAMPLES)
@given(arguments=ARGUMENTS,
       build=st.sampled_from([densenet.DenseNet, densenet.densenet_cifar, densenet.densenet121]))
def test_arguments_are_a_working_model_or_a_value_error(arguments, build):
    arguments = {'growth_rate': 4, 'block_config': (1, 2), 'num_classes': 3, **arguments}
    if build is densenet.densenet_cifar:
        arguments['depth'] = sum(arguments.pop('block_config'))
    try:
        model = build(**arguments)
    except ValueError as error:
        assert '\n' not in str(error)
        return
    config = model.config
    images = torch.randn(2, config['in_channels'], model.min_size, model.min_size)
    with torch.no_grad():
        logits = model.eval()(images)
    assert logits.shape == (2, config['num_classes']) and logits.isfinite().all()
    densenet.DenseNet(**config).load_state_dict(model.state_dict())
