"""A file is either the old one or the new one, and a stranger's file can't run code."""

import os
import random
import re
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import Opener

import checkpoint
import densenet
from checkpoint import CheckpointError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'latest.pth'
    checkpoint.save(path, {'value': torch.ones(3)}, args={'depth': 40})
    before = path.read_bytes()

    def full(_):
        raise OSError('disk full')

    monkeypatch.setattr(os, 'fsync', full)
    for keep in (0, 1):
        with pytest.raises(OSError, match='disk full'):
            checkpoint.save(path, {'value': torch.zeros(3)}, keep=keep)
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


def test_the_files_before_are_kept(tmp_path):
    path = tmp_path / 'run[1] of 2' / 'latest.pth'
    path.parent.mkdir()

    def saved():
        return [checkpoint.load(version)['value'] for version in checkpoint.versions(path)]

    for value in range(5):
        checkpoint.save(path, {'value': value}, keep=2)
    assert saved() == [4, 3, 2]
    checkpoint.save(path, {'value': 5}, keep=1)
    assert saved() == [5, 4]
    checkpoint.save(path, {'value': 6})
    assert saved() == [6] and os.listdir(path.parent) == ['latest.pth']
    for value in range(5):
        checkpoint.save(path, {'value': value}, keep=5)
    others = {'latest.pth.20261122', 'latest.pth.bak', 'latest.pth.01', 'best.pth.1'}
    for name in others:  # somebody's own
        shutil.copy(path, path.parent / name)
    for i in (1, 2):
        Path(f'{path}.{i}').unlink()
    checkpoint.save(path, {'value': 'new'}, keep=2)
    assert saved() == ['new', 4, 1]
    assert others == {version.name for version in path.parent.iterdir()} - {
        'latest.pth', 'latest.pth.1', 'latest.pth.2'}


@pytest.mark.parametrize('links', [True, False])
def test_killed_at_any_system_call_there_is_a_whole_checkpoint(tmp_path, links):
    path, values, calls = tmp_path / 'latest.pth', set(), 0
    for value in range(3):
        checkpoint.save(path, {'value': value}, keep=2)
    while True:
        calls += 1
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(path, calls, links)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        newest, saved, complaints = checkpoint.load_newest(path)
        values.add(saved['value'])
        assert newest == str(path) and complaints == []  # its name is never without a file
        assert all(checkpoint.load(version) for version in checkpoint.versions(path))
        assert len(checkpoint.versions(path)) > 1
        if code == 0:
            break
        assert code == 9
    assert calls > 8 and values == {2, 'new'}
    assert {version.name for version in tmp_path.iterdir() if version.name[0] != '.'} == {
        'latest.pth', 'latest.pth.1', 'latest.pth.2'}


def save_until_killed(path, calls, links):
    """Save, but end at the `calls`th call that changes a directory or writes to the disk."""
    made = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal made
            made += 1
            if made == calls:
                os._exit(9)
            return function(*args, **kwargs)
        return call

    def no_links(*_):
        raise OSError(1, 'Operation not permitted')

    os.link = counted(os.link) if links else no_links
    shutil.copyfile = counted(shutil.copyfile)
    for name in ('replace', 'fsync', 'unlink'):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save(path, {'value': 'new'}, keep=2)
    os._exit(0)


@pytest.mark.parametrize('way', ['cut', 'changed', 'longer'])
def test_no_damage_goes_unnoticed(tmp_path, way):
    path, rng = tmp_path / 'latest.pth', random.Random(way)
    checkpoint.save(path, {'model': {'weight': torch.randn(1000)}})
    whole = path.read_bytes()
    assert zipfile.ZipFile(path).testzip() is None  # as it is, others can read it
    assert torch.load(path, weights_only=True)['model']['weight'].shape == (1000,)
    for i in range(200):
        content = bytearray(whole)
        place = len(content) - 1 - i if i < 100 else rng.randrange(len(content))  # and the seal
        if way == 'cut':
            del content[place:]
        elif way == 'changed':
            content[place] ^= rng.randrange(1, 256)
        else:
            content += rng.randbytes(1 + i)
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f'^{path} is (damaged|not a checkpoint).*$'):
            checkpoint.load(path)


def test_the_newest_one_that_is_sound(tmp_path):
    path = tmp_path / 'latest.pth'
    for value in range(4):
        checkpoint.save(path, {'value': value}, keep=3)
    assert checkpoint.load_newest(path)[1:] == ({'value': 3}, [])
    path.unlink()
    (tmp_path / 'latest.pth.1').write_bytes(b'')
    found, saved, complaints = checkpoint.load_newest(path)
    assert (found, saved) == (f'{path}.2', {'value': 1})
    assert [complaint.split()[0] for complaint in complaints] == [str(path), f'{path}.1']
    for i in (2, 3):
        (tmp_path / f'latest.pth.{i}').write_bytes(b'')
    with pytest.raises(CheckpointError, match='latest.pth is not there.* the 3 before it sound'):
        checkpoint.load_newest(path)


def test_what_is_no_checkpoint_is_refused(tmp_path):
    files = {
        'text': b'epoch,loss,error\n', 'empty': b'', 'zeros': bytes(1000),
    }
    for name, content in files.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=f'{name} is not a checkpoint'):
            checkpoint.load(path)
    checkpoint.save(tmp_path / 'whole', {'model': {'weight': torch.zeros(10**6)}})
    with zipfile.ZipFile(tmp_path / 'whole') as whole, \
            zipfile.ZipFile(tmp_path / 'bomb', 'w', zipfile.ZIP_DEFLATED) as bomb:
        for record in whole.namelist():
            bomb.writestr(record, whole.read(record))
    assert (tmp_path / 'bomb').stat().st_size < 10**5
    assert torch.load(tmp_path / 'bomb', weights_only=True)['model']['weight'].numel() == 10**6
    with pytest.raises(CheckpointError, match='bomb is not a checkpoint'):
        checkpoint.load(tmp_path / 'bomb')
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
