"""A file is either the old one or the new one, and a stranger's file can't run code."""

import os
import re

import pytest
import torch
import torchvision

import checkpoint
import densenet
from checkpoint import CheckpointError


class Opener:
    """Unpickled by a careless reader, this makes a directory."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'latest.pth'
    checkpoint.save(path, {'value': torch.ones(3)}, args={'depth': 40})
    before = path.read_bytes()

    def half_a_write(_, file):
        file.write(b'half of it')
        raise OSError('disk full')

    monkeypatch.setattr(torch, 'save', half_a_write)
    with pytest.raises(OSError, match='disk full'):
        checkpoint.save(path, {'value': torch.zeros(3)})
    assert path.read_bytes() == before and os.listdir(tmp_path) == ['latest.pth']
    assert checkpoint.load(path)['args'] == {'depth': 40}


def test_a_new_file_has_its_name_only_once_it_is_whole(tmp_path):
    path = tmp_path / 'latest.pth'
    path.write_bytes(b'old')
    with checkpoint.replacing(path) as file:
        file.write(b'new')
        file.flush()
        assert path.read_bytes() == b'old'
    assert path.read_bytes() == b'new'


def test_what_is_no_checkpoint_is_refused(tmp_path):
    whole = tmp_path / 'whole.pth'
    checkpoint.save(whole, {'model': {'weight': torch.randn(100)}})
    files = {
        'text': b'epoch,loss,error\n', 'empty': b'', 'cut': whole.read_bytes()[:-200],
        'zeros': bytes(1000),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f'{name} is not a checkpoint'):
            checkpoint.load(path)
    with pytest.raises(CheckpointError, match='nowhere.pth is not there'):
        checkpoint.load(tmp_path / 'nowhere.pth')
    torch.save([1, 2], tmp_path / 'list')
    with pytest.raises(CheckpointError, match='holds a list'):
        checkpoint.load(tmp_path / 'list')


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({'model': Opener(tmp_path / 'harm')}, tmp_path / 'bad.pth')
    with pytest.raises(CheckpointError, match='bad.pth'):
        checkpoint.load(tmp_path / 'bad.pth')
    assert not (tmp_path / 'harm').exists()
    torch.load(tmp_path / 'bad.pth', weights_only=False)  # the same file does harm elsewhere
    assert (tmp_path / 'harm').exists()


@pytest.mark.parametrize('theirs, difference', [
    (lambda: densenet.densenet_cifar(40, 12), 'it has features.denseblock1.denselayer4'),
    (lambda: densenet.densenet_cifar(16, 12), 'it has no features.denseblock1.denselayer3'),
    (lambda: densenet.densenet_cifar(22, 8), 'features.conv0.weight is [16, 3, 3, 3] there and '
                                             '[24, 3, 3, 3] here'),
    (lambda: densenet.densenet_cifar(22, 12, num_classes=100), 'classifier.weight is [100, 69]'),
    (lambda: torchvision.models.resnet18(), 'it has no features.conv0.weight'),
])
def test_weights_of_another_architecture_name_the_first_difference(theirs, difference):
    model = densenet.densenet_cifar(22, 12)
    with pytest.raises(CheckpointError, match=re.escape(difference)) as caught:
        checkpoint.load_weights(model, theirs().state_dict(), 'x.pth')
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('weights', [None, {'weight': 3}, 'text'])
def test_what_holds_no_weights(weights):
    with pytest.raises(CheckpointError, match='x.pth holds no weights'):
        checkpoint.load_weights(densenet.densenet_cifar(10, 4), weights, 'x.pth')
