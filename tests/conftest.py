import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / 'shared' / 'data'


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker('cuda'):
                item.add_marker(pytest.mark.skip(reason='needs a CUDA device'))


@pytest.fixture(scope='session')
def cifar10_jpeg():
    """The archive of CIFAR-10 as JPEG files: train/<class>/*.jpg and test/<class>/*.jpg."""
    archive = SHARED / 'cifar10-jpeg.tar.xz'
    if not archive.exists():
        pytest.skip(f'needs {archive.name}, all of CIFAR-10 as JPEG files')
    return archive


@pytest.fixture(scope='session')
def photographs(cifar10_jpeg, tmp_path_factory):
    """A folder with the first 64 training images of CIFAR-10 (JPEG copy), in train/ and val/."""
    root = tmp_path_factory.mktemp('photographs')
    with tarfile.open(cifar10_jpeg) as tar:
        found = 0
        for member in tar:
            if member.isfile() and member.name.startswith('train/'):
                found += 1
                # Two labels for one class of birds and planes: they can only be learned by heart.
                for split in ('train', 'val'):
                    path = root / split / f'label{found % 4}' / f'{found}.jpg'
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(tar.extractfile(member).read())
            if found == 64:
                return root


class Opener:
    """Unpickled by a careless reader, this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def cache_densenet121(home, model, content=None):
    """Put a model's weights where, with TORCH_HOME `home`, torchvision's for DenseNet-121 lie.

    Or, instead of weights, some bytes.
    """
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
    rng = np.random.RandomState(seed)
    shape = (size[1], size[0]) + ((3,) if mode == 'RGB' else ())
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.randint(0, 256, shape).astype(np.uint8), mode)
            image.save(root / folder / f'{i}.{ending}')
    return root
