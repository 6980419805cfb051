"""Checkpoints are written atomically, and loading one can't run code."""

import functools
import os
import random
import re
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import Opener

import densenet
from training import checkpoint
from training.console import UserError


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / 'latest.pth'
    checkpoint.save(path, {'value': torch.ones(3), 'args': {'depth': 40}})
    before = path.read_bytes()

    def full(_):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    for keep_previous in (False, True):
        with pytest.raises(OSError, match='No space left') as caught:
            checkpoint.save(path, {'value': torch.zeros(3)}, keep_previous)
        assert caught.value.filename == str(path)
        assert path.read_bytes() == before and os.listdir(tmp_path) == ['latest.pth']
    assert checkpoint.load(path)['args'] == {'depth': 40}


def test_the_previous_file_is_kept(tmp_path):
    path = tmp_path / 'run[1] of 2' / 'latest.pth'
    path.parent.mkdir()

    def saved():
        return {file.name: checkpoint.load(file)['value'] for file in path.parent.iterdir()}

    for value in range(4):
        checkpoint.save(path, {'value': value}, keep_previous=True)
    assert saved() == {'latest.pth': 3, 'latest.pth.1': 2}
    checkpoint.save(path, {'value': 4})
    assert saved() == {'latest.pth': 4, 'latest.pth.1': 2}
    path.unlink()  # as a run leaves it that is killed between two renames
    checkpoint.save(path, {'value': 5}, keep_previous=True)
    assert saved() == {'latest.pth': 5, 'latest.pth.1': 2}


def test_a_complete_checkpoint_survives_a_kill_at_any_system_call(tmp_path):
    path, found, calls, code = tmp_path / 'latest.pth', [], 0, None
    while code != 0:
        for file in tmp_path.iterdir():
            file.unlink()
        for value in ('before', 'old'):
            checkpoint.save(path, {'value': value}, keep_previous=True)
        calls += 1
        child = os.fork()
        if child == 0:
            try:
                save_until_killed(path, calls)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, 9)
        newest, saved = checkpoint.load_newest(path)
        found.append((newest, saved['value']))
        for file in tmp_path.glob('latest.pth*'):  # both files, if they are there, are complete
            checkpoint.load(file)
        checkpoint.save(path, {'value': 'resumed'}, keep_previous=True)
        assert checkpoint.load(path)['value'] == 'resumed'
        assert checkpoint.load(f'{path}.1')['value'] == saved['value']
    # Opening, writing and flushing; the first rename; the second one, and the directory's flush.
    path = str(path)
    assert found == [(path, 'old')] * 4 + [(f'{path}.1', 'old')] + [(path, 'new')] * (calls - 5)
    assert calls == 7


def save_until_killed(path, calls):
    """Save, but end before the `calls`th call that changes a directory or writes to the disk."""
    made = 0

    def counted(function):
        def call(*args, **kwargs):
            nonlocal made
            made += 1
            if made == calls:
                os._exit(9)
            return function(*args, **kwargs)
        return call

    checkpoint.open = counted(open)
    checkpoint.torch.save = counted(torch.save)
    for name in ('replace', 'fsync', 'unlink'):
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save(path, {'value': 'new'}, keep_previous=True)
    os._exit(0)


@pytest.mark.parametrize('way', ['cut', 'changed', 'longer'])
def test_damage_is_always_noticed(tmp_path, way):
    path, rng = tmp_path / 'latest.pth', random.Random(way)
    content = {'model': {'weight': torch.randn(300), 'bias': torch.randn(3)}, 'epoch': 3,
               'args': {'name': 'x' * 20, 'lr': 0.1}}
    checkpoint.save(path, content)
    whole, refused, tries = path.read_bytes(), 0, 400
    assert zipfile.ZipFile(path).testzip() is None  # as it is, others can read it
    assert torch.load(path, weights_only=True)['model']['weight'].shape == (300,)
    ends = len(whole) - 1, len(whole) - 2, 0, 1
    for i in range(tries):
        damaged = bytearray(whole)
        place = ends[i] if i < len(ends) else rng.randrange(len(damaged))
        if way == 'cut':
            del damaged[place:]
        elif way == 'changed':
            damaged[place] ^= rng.randrange(1, 256)
        else:
            damaged += rng.randbytes(1 + i)
        path.write_bytes(damaged)
        try:
            found = checkpoint.load(path)
        except UserError as error:
            known = 'damaged|not a checkpoint|compressed|a zip file'
            assert re.match(f'{path} is ({known}).*$', str(error))
            refused += 1
        else:  # a byte in an unused part of the file
            assert way != 'cut'
            plain = {**found, 'model': None}
            assert plain == {**content, 'model': None}
            torch.testing.assert_close(found['model'], content['model'], rtol=0, atol=0)
    assert refused > {'cut': tries - 1, 'changed': tries / 2, 'longer': -1}[way]


def test_damaged_tensor_values_are_noticed(tmp_path):
    path = tmp_path / 'latest.pth'
    weight = torch.randn(1000)
    checkpoint.save(path, {'model': {'weight': weight}})
    content = bytearray(path.read_bytes())
    place = content.index(weight.numpy().tobytes()) + 2000
    content[place] ^= 1
    path.write_bytes(content)
    assert not torch.equal(torch.load(path, weights_only=True)['model']['weight'], weight)
    with pytest.raises(UserError, match=f'{path} is damaged: the CRC of .*/data/0 is wrong'):
        checkpoint.load(path)


def test_load_newest_returns_the_newest_complete_checkpoint(tmp_path):
    path = tmp_path / 'latest.pth'
    for value in range(2):
        checkpoint.save(path, {'value': value}, keep_previous=True)
    assert checkpoint.load_newest(path) == (str(path), {'value': 1})
    path.write_bytes(b'damaged')
    assert checkpoint.load_newest(path) == (f'{path}.1', {'value': 0})
    path.unlink()
    assert checkpoint.load_newest(path) == (f'{path}.1', {'value': 0})
    (tmp_path / 'latest.pth.1').write_bytes(b'')
    with pytest.raises(UserError, match='latest.pth is not there'):
        checkpoint.load_newest(path)


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    for name, content in (('text', b'epoch,loss,error\n'), ('empty', b''), ('zeros', bytes(1000))):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(UserError, match=f'{name} is not a checkpoint'):
            checkpoint.load(path)
    with pytest.raises(UserError, match='nowhere.pth is not there'):
        checkpoint.load(tmp_path / 'nowhere.pth')
    os.mkfifo(tmp_path / 'pipe')
    for path in tmp_path, tmp_path / 'pipe', Path('/dev/zero'):
        with pytest.raises(UserError, match='is not a checkpoint, but a folder or a device'):
            checkpoint.load(path)
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/best.pth').touch()
    with pytest.raises(UserError, match='is a folder: name a file in it, such as .*/run/best.pth$'):
        checkpoint.load(tmp_path / 'run')
    with zipfile.ZipFile(tmp_path / 'zipped.pth', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('x/data.pkl', bytes(10**7))
    with pytest.raises(UserError, match='is compressed, and would take 0.01 GB'):
        checkpoint.load(tmp_path / 'zipped.pth')
    torch.save([1, 2], tmp_path / 'list')
    with pytest.raises(UserError, match='holds a list'):
        checkpoint.load(tmp_path / 'list')


def test_code_in_a_checkpoint_does_not_run(tmp_path):
    torch.save({'model': Opener(tmp_path / 'harm')}, tmp_path / 'bad.pth')
    with pytest.raises(UserError, match='bad.pth'):
        checkpoint.load(tmp_path / 'bad.pth')
    assert not (tmp_path / 'harm').exists()
    torch.load(tmp_path / 'bad.pth', weights_only=False)  # the same file does harm elsewhere
    assert (tmp_path / 'harm').exists()


@pytest.mark.parametrize('theirs, difference', [
    (lambda: densenet.densenet_cifar(40, 12), 'Unexpected key(s) in state_dict: "features.'
                                          'denseblock1.denselayer4'),
    (lambda: densenet.densenet_cifar(16, 12), 'Missing key(s) in state_dict: "features.'
                                          'denseblock1.denselayer3'),
    (lambda: densenet.densenet_cifar(22, 8), 'size mismatch for features.conv0.weight: copying '
                                         'a param with shape torch.Size([16, 3, 3, 3]) from'),
    (lambda: densenet.densenet_cifar(22, 12, num_classes=100), 'size mismatch for '
     'classifier.weight: copying a param with shape torch.Size([100, 69]) from checkpoint'),
    (lambda: torchvision.models.resnet18(), 'Missing key(s) in state_dict: "features.conv0.'),
])
def test_weights_of_another_architecture_name_the_first_differences(theirs, difference):
    ours = functools.partial(densenet.densenet_cifar, 22, 12)
    with pytest.raises(UserError, match=re.escape(difference)) as caught:
        checkpoint.check_network(ours, theirs().state_dict(), 'x.pth')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 350


@pytest.mark.parametrize('weights', [None, {'weight': 3}, 'text'])
def test_checkpoints_without_weights_are_refused(weights):
    with pytest.raises(UserError, match='x.pth does not fit the model: '):
        checkpoint.check_network(lambda: densenet.densenet_cifar(10, 4), weights, 'x.pth')
