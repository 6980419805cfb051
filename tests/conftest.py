"""Fixtures and helpers of several files of tests.

They import what is slow to import themselves: pytest-xdist's main process, which runs no test,
reads this file before it starts the others.
"""

import csv
import gc
import importlib
import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'
SMALL = ['--depth', '10', '--growth-rate', '4', '--batch-size', '4', '--print-freq', '3',
         '--device', 'cpu', '--no-plot']


def pytest_collection_modifyitems(items):
    import torch
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('cuda'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


def pytest_collection_finish():
    """Keep the garbage collector from searching all that is imported: a second each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def no_gpu(request, monkeypatch):
    """Only tests marked `cuda` see a GPU, if there is one; so do the processes of forked.py."""
    if not request.node.get_closest_marker('cuda'):
        monkeypatch.setattr('torch.cuda.is_available', lambda: False)
        monkeypatch.setattr('torch.cuda.device_count', lambda: 0)


@pytest.fixture(scope='session', autouse=True)
def compiled_kernels():
    """Compiles them before the tests that count lines on stderr: compiling prints one."""
    from fused_dense_block import library
    for dtype in library.TYPES:
        library.unavailable_reason(dtype)


@pytest.fixture(scope='session')
def folder(tmp_path_factory):
    """36 images to train on and 8 to test: 9 steps an epoch in batches of 4."""
    root = tmp_path_factory.mktemp('folder')
    return write_images(root, {f'{split}/{label}': n for split, n in (('train', 9), ('val', 2))
                               for label in 'abcd'}, (8, 8))


@pytest.fixture
def small(folder):
    """Flags of the smallest run."""
    return ['--dataset', 'folder', '--data', str(folder), *SMALL]


@pytest.fixture(scope='session')
def recipe(folder):
    """Flags of a run with everything random (augmentation, dropout), and micro-batches."""
    return ['--dataset', 'folder', '--data', str(folder), *SMALL, '--epochs', '4', '--lr', '0.05',
            '--drop-rate', '0.2', '--grad-accum', '2', '--lr-schedule', 'cosine']


@pytest.fixture(scope='session')
def uninterrupted(recipe, tmp_path_factory):
    import train
    run = tmp_path_factory.mktemp('uninterrupted')
    train.main([*recipe, '--save', str(run)])
    return run


@pytest.fixture(scope='session')
def cifar10_jpeg():
    """The archive of CIFAR-10 as JPEG files: train/<class>/*.jpg and test/<class>/*.jpg."""
    archive = SHARED / 'cifar10-jpeg.tar.xz'
    if not archive.exists():
        pytest.skip(f'needs {archive.name}, all of CIFAR-10 as JPEG files')
    return archive


@pytest.fixture
def no_figures(monkeypatch):
    """Evaluations draw none, for which they would take seconds."""
    monkeypatch.setattr('plot.save_reports', lambda directory: [])


def parse_flags(argv):
    """All flags of a command line that resumes nothing."""
    from training import flags
    return flags.complete(flags.parse(list(argv)))


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def fails(capsys, *argv, script=None, lines=1):
    """The error line of a command, of train.py or another script, that fails with exit code 2."""
    script = script or importlib.import_module('train')
    call = getattr(script, 'cli', script.main)
    with pytest.raises(SystemExit) as exit_:
        call(list(map(str, argv)))
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith(f'{script.__name__}.py: error: ') and len(errors) <= lines, errors
    return errors[-1]


def raise_no_network(*_, **__):
    raise OSError('no network')


def assert_same_run(one, other, rows=3 * 4):
    """The same weights, optimizer, counters and random state to the bit; the same CSV rows."""
    from attic.torture import check_same_run
    check_same_run(one, other)
    assert len(read_csv(one / 'train.csv')) == rows


class Opener:
    """Unpickling this without weights_only makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cache_densenet121(home, model, content=None):
    """Put a model's weights (or `content`) into the cache of TORCH_HOME `home`, as DenseNet-121's.
    """
    import torch
    import torchvision
    folder = home / 'hub' / 'checkpoints'
    folder.mkdir(parents=True, exist_ok=True)
    file = torchvision.models.DenseNet121_Weights.DEFAULT.url.rpartition('/')[2]
    if content is None:
        torch.save(model.state_dict(), folder / file)
    else:
        (folder / file).write_bytes(content)


def write_images(root, counts, size=(32, 32), mode='RGB', ending='png', seed=0):
    """A folder of random images: `counts` maps 'train/class' to how many."""
    import numpy as np
    from PIL import Image
    rng = np.random.RandomState(seed)
    shape = (size[1], size[0]) + ((3,) if mode == 'RGB' else ())
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.randint(0, 256, shape).astype(np.uint8), mode)
            image.save(root / folder / f'{i}.{ending}')
    return root
