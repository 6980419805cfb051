"""Weights from other libraries' and repositories' files: the same logits, or one clear line."""

import argparse
import functools
import os
import pathlib
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SHARED
from torch import nn
from torch.optim.swa_utils import AveragedModel

import densenet
import train
from training import lua_torch, weights
from training.console import UserError

NARROW = dict(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)
DAMAGED = 'is not a checkpoint, or a damaged one'
SMALL = dict(NARROW, small_inputs=True)


def randomized(model, seed=0):
    """In eval mode, with no norm or bias at its initial value."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1:
            tensor.uniform_(0.5, 1.5, generator=generator)
    return model.eval()


def load(state, tmp_path, part='', reset=False, save=torch.save, name='theirs.pth', **config):
    """A DenseNet with the weights in a file that holds `state`."""
    save(state, tmp_path / name)
    model = densenet.DenseNet(**(config or NARROW)).eval()
    source = f'{tmp_path / name}{part and ":"}{part}'
    weights.load_pretrained(model, argparse.Namespace(
        pretrained=source, arch=None, reset_classifier=reset, evaluate=False))
    return model


def says(state, tmp_path, **options):
    """The one line of the error that such a file ends with."""
    with pytest.raises(UserError) as error:
        load(state, tmp_path, **options)
    assert '\n' not in str(error.value) and len(str(error.value)) < 600
    return str(error.value)


# Before PyTorch 1.6, files were no zip archives
save_legacy = functools.partial(torch.save, _use_new_zipfile_serialization=False)


def assert_same_weights(model, other):
    theirs = other.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs[key]), key


def assert_same_logits(model, other, channels=3, tolerance=0):
    images = torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        ours, theirs = model(images), other(images)
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    assert ours.std() > 0


# ---- other libraries -----------------------------------------------------------------------------

def test_timm(tmp_path, capsys):
    timm = pytest.importorskip('timm', reason='needs timm')
    theirs = randomized(timm.models.densenet.DenseNet(growth_rate=4, block_config=(2, 2),
                                                      num_classes=5))
    assert_same_logits(load(theirs.state_dict(), tmp_path), theirs)
    assert capsys.readouterr().out == ''  # nothing was changed or left out
    deep = timm.create_model('densenetblur121d', num_classes=5).state_dict()
    assert 'features.conv0.weight is [32, 3, 3, 3] in the file and [8, 3, 7, 7] here' in says(
        deep, tmp_path)


def test_torchxrayvision(tmp_path, capsys):
    xrv = pytest.importorskip('torchxrayvision', reason='needs torchxrayvision')
    theirs = randomized(xrv.models.DenseNet(growth_rate=4, block_config=(2, 2), num_classes=5,
                                            num_init_features=8, in_channels=1, weights=None))
    state = {**theirs.state_dict(), 'op_threshs': torch.rand(5)}
    theirs.op_threshs, theirs.apply_sigmoid = None, False
    assert_same_logits(load(state, tmp_path, **NARROW, in_channels=1), theirs, channels=1)
    assert capsys.readouterr().out.endswith('theirs.pth: not used: op_threshs\n')


def test_monai(tmp_path):
    networks = pytest.importorskip('monai.networks.nets', reason='needs monai')
    theirs = randomized(networks.DenseNet(2, 3, 5, 8, 4, (2, 2)))
    assert_same_logits(load(theirs.state_dict(), tmp_path), theirs)
    solid = networks.DenseNet(3, 3, 5, 8, 4, (2, 2)).state_dict()
    assert 'features.conv0.weight is [8, 3, 7, 7, 7] in the file' in says(solid, tmp_path)


def test_encoder_of_segmentation_models(tmp_path, capsys):
    smp = pytest.importorskip('segmentation_models_pytorch', reason='needs it')
    theirs = randomized(smp.Unet('densenet121', encoder_weights=None))
    state = theirs.state_dict()
    assert 'classifier.weight is not in the file: --reset-classifier' in says(
        state, tmp_path, growth_rate=32)
    ours = load(state, tmp_path, reset=True, growth_rate=32)
    assert capsys.readouterr().out.endswith('not used: decoder, segmentation_head\n')
    assert_same_logits(ours.features, theirs.encoder.features)


class VeitsDenseNet(nn.Module):
    """andreasveit/densenet-pytorch and, with `bamos`, bamos/densenet.pytorch, in short."""

    def __init__(self, bamos=False, bottleneck=True, k=4, layers=(2, 2, 2), width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.num_blocks, self.bamos = len(layers), bamos
        for block, count in enumerate(layers, start=1):
            inner = nn.ModuleList()
            for _ in range(count):
                layer = nn.Module()
                layer.bn1 = nn.BatchNorm2d(width)
                if bottleneck:
                    layer.conv1 = nn.Conv2d(width, 4 * k, 1, bias=False)
                    layer.bn2 = nn.BatchNorm2d(4 * k)
                    layer.conv2 = nn.Conv2d(4 * k, k, 3, padding=1, bias=False)
                else:
                    layer.conv1 = nn.Conv2d(width, k, 3, padding=1, bias=False)
                inner.append(layer)
                width += k
            setattr(self, f'dense{block}' if bamos else f'block{block}',
                    inner if bamos else nn.ModuleDict({'layer': inner}))
            if block < len(layers):
                transition = nn.Module()
                transition.bn1 = nn.BatchNorm2d(width)
                transition.conv1 = nn.Conv2d(width, width // 2, 1, bias=False)
                setattr(self, f'trans{block}', transition)
                width //= 2
        self.bn1, self.fc = nn.BatchNorm2d(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.conv1(x)
        for block in range(1, self.num_blocks + 1):
            for layer in (self.get_submodule(f'dense{block}') if self.bamos else
                          self.get_submodule(f'block{block}')['layer']):
                out = layer.conv1(layer.bn1(x).relu())
                if hasattr(layer, 'conv2'):
                    out = layer.conv2(layer.bn2(out).relu())
                x = torch.cat([x, out], 1)
            if block < self.num_blocks:
                transition = self.get_submodule(f'trans{block}')
                x = nn.functional.avg_pool2d(transition.conv1(transition.bn1(x).relu()), 2)
        return self.fc(self.bn1(x).relu().mean((2, 3)))


@pytest.mark.parametrize('bamos', [False, True])
@pytest.mark.parametrize('bottleneck', [False, True])
def test_andreasveits_and_bamos_layouts(tmp_path, bamos, bottleneck, capsys):
    theirs = randomized(VeitsDenseNet(bamos, bottleneck))
    state = {f'module.{key}': tensor for key, tensor in theirs.state_dict().items()}
    ours = load({'epoch': 300, 'state_dict': state, 'best_prec1': 94.2}, tmp_path,
                **dict(SMALL, block_config=(2, 2, 2), bottleneck=bottleneck))
    assert_same_logits(ours, theirs, tolerance=1e-5)
    assert capsys.readouterr().out.endswith('theirs.pth: keys renamed to torchvision\'s\n')


@pytest.fixture
def cifar10():
    """The folder of the original CIFAR-10, on whose 10,000 test images a test takes minutes."""
    data = pathlib.Path(os.environ.get('CIFAR10', ROOT / 'work/data'))
    if not (data / 'cifar-10-batches-bin').is_dir():
        pytest.skip('needs cifar-10-batches-bin in work/data or in $CIFAR10; takes minutes')
    return str(data)


def test_third_party_weights_have_their_published_error(cifar10, tmp_path, capsys):
    """5.46% for the network of deeplearning-wisc/dice on the original test images of CIFAR-10."""
    file = SHARED / 'dice-densenet-bc-100-12-cifar10.pth.tar'
    if not file.exists():
        pytest.skip(f'needs {file.name}')
    train.main(['--evaluate', '--pretrained', str(file), '--data', cifar10, '--device', 'cpu',
                '--mean', '.4914', '.4822', '.4465', '--std', '.2023', '.1994', '.2010',
                '--save', str(tmp_path)])
    assert 'test loss 0.2215, error 5.46%' in capsys.readouterr().out  # 546 of 10,000


def test_our_weights_have_the_error_in_the_readme(cifar10, tmp_path, capsys):
    text = ' '.join((ROOT / 'README.md').read_text().split())
    said, = re.findall(r'its best weights have ([\d.]+)% on the original test images', text)
    train.main(['--evaluate', '--resume', str(ROOT / 'work/densenet-bc-100-12/best.pth'),
                '--dataset', 'cifar10', '--data', cifar10, '--device', 'cpu',
                '--save', str(tmp_path)])
    found = re.search(r'^test loss .*, error ([\d.]+)%', capsys.readouterr().out, re.MULTILINE)[1]
    # Another CPU rounds differently: then the answer to an image or two of 10,000 may differ.
    assert abs(float(found) - float(said)) < 0.05


# ---- wrappers, prefixes and heads ----------------------------------------------------------------

def prefixed(prefix, state):
    return {f'{prefix}{key}': tensor for key, tensor in state.items()}


def renamed(state, *pairs):
    for old, new in pairs:
        state = {key.replace(old, new): tensor for key, tensor in state.items()}
    return state


class Config(dict):
    """A dict subclass with attributes, as libraries pickle their hyperparameters."""

    def __init__(self, **values):
        super().__init__(values)
        self.frozen = True


WRAPPED = {
    'net': lambda model: {'net': model.state_dict(), 'acc': 94.2, 'epoch': 7},
    'model_state_dict': lambda model: {
        'model_state_dict': model.state_dict(), 'loss': np.array([0.3]),
        'optimizer_state_dict': {'state': {0: {'exp_avg': torch.rand(8, 3, 7, 7)}}}},
    'numpy scalar': lambda model: {
        'state_dict': model.state_dict(), 'best_prec1': np.float64(94.2), 'lr': np.float32(0.1)},
    'lightning': lambda model: {
        'state_dict': {**prefixed('model.', model.state_dict()), 'loss.weight': torch.ones(5),
                       'metric.confusion': torch.ones(5, 5)},
        'hyper_parameters': Config(lr=0.1, path=pathlib.Path('x')), 'callbacks': {},
        'args': argparse.Namespace(lr=0.1, type=int)},
    'CheXNet': lambda model: {'state_dict': renamed(
        prefixed('module.densenet121.', model.state_dict()), ('norm1', 'norm.1'),
        ('norm2', 'norm.2'), ('conv1', 'conv.1'), ('conv2', 'conv.2'),
        ('classifier', 'classifier.0'))},
    'average': lambda model: AveragedModel(model).state_dict(),
    'compiled': lambda model: renamed(prefixed('module._orig_mod.', model.state_dict()),
                                      ('features.', 'features._orig_mod.')),
    'cadene': lambda model: renamed(model.state_dict(), ('classifier', 'last_linear')),
    'sequential': lambda model: nn.Sequential(
        model.features, nn.ReLU(), nn.Flatten(), nn.Sequential(nn.Dropout(), model.classifier)
    ).state_dict(),
    'half': lambda model: {key: tensor.half() for key, tensor in model.state_dict().items()},
    'before 0.4.1': lambda model: {key: tensor for key, tensor in model.state_dict().items()
                                   if 'num_batches' not in key},
}


@pytest.mark.parametrize('case', WRAPPED)
def test_wrappers_and_prefixes(tmp_path, case):
    theirs = randomized(torchvision.models.DenseNet(**NARROW))
    if case == 'half':
        theirs.half().float()
    for save in (torch.save, save_legacy):
        assert_same_weights(load(WRAPPED[case](theirs), tmp_path, save=save), theirs)


def test_loss_functions_beside_weights_are_left_out(tmp_path):
    theirs = randomized(torchvision.models.DenseNet(**NARROW))
    state = {'criterion': nn.CrossEntropyLoss(torch.ones(5)), 'state_dict': theirs.state_dict()}
    assert_same_weights(load(state, tmp_path), theirs)


def test_bare_features_need_a_new_classifier(tmp_path):
    theirs = randomized(torchvision.models.DenseNet(**NARROW))
    bare = theirs.features.state_dict()
    fastai = {'model': {**prefixed('0.0.', bare), '1.2.weight': torch.ones(32),
                        '1.4.weight': torch.ones(7, 32), '1.8.weight': torch.ones(5, 7)}}
    normed = nn.Sequential(nn.BatchNorm1d(16), nn.Linear(16, 5)).state_dict()  # more than a layer
    for state in (bare, fastai, {**prefixed('features.', bare), **prefixed('classifier.', normed)}):
        assert 'classifier.weight is not in the file: --reset-classifier' in says(state, tmp_path)
        assert_same_weights(load(state, tmp_path, reset=True).features, theirs.features)


def test_averaged_weights_come_first_and_others_by_name(tmp_path, capsys):
    model = randomized(torchvision.models.DenseNet(**NARROW))
    ema = randomized(torchvision.models.DenseNet(**NARROW), seed=1)
    both = [
        {'state_dict': model.state_dict(), 'state_dict_ema': ema.state_dict()},     # timm
        {'state_dict': model.state_dict(), 'ema_state_dict': ema.state_dict()},
        {'model': model.state_dict(), 'model_ema': AveragedModel(ema).state_dict()},  # torchvision
        {'state_dict': {**prefixed('net.', model.state_dict()),                     # Lightning
                        **prefixed('net_ema.', ema.state_dict())}}]
    parts = ['state_dict', 'state_dict', 'model', 'state_dict.net']
    for state, part in zip(both, parts):
        assert_same_weights(load(state, tmp_path), ema)
        assert f'not {tmp_path}/theirs.pth:{part}\n' in capsys.readouterr().out
        assert_same_weights(load(state, tmp_path, part=part), model)
    assert 'has no best, but state_dict, state_dict_ema' in says(both[0], tmp_path, part='best')
    twins = {'teacher': ema.state_dict(), 'student': model.state_dict()}
    file = tmp_path / 'theirs.pth'
    assert f'choose {file}:teacher, {file}:student' in says(twins, tmp_path)
    assert_same_weights(load(twins, tmp_path, part='student'), model)
    shadow = {key: value for key, value in ema.state_dict().items() if 'running' not in key}
    assert 'norm0.running_mean is not in the file' in says(
        {'model': model.state_dict(), 'ema': shadow}, tmp_path)
    assert f'takes ema, not {file}:model\n' in capsys.readouterr().out


def test_first_convolution_for_other_channels(tmp_path, capsys):
    """As in timm: c equal channels give the same result as before."""
    three = randomized(densenet.DenseNet(**SMALL))
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        truth = three(grey.expand(-1, 3, -1, -1))
        one = load(three.state_dict(), tmp_path, **SMALL, in_channels=1)
        again = load(one.state_dict(), tmp_path, **SMALL)
        four = load(three.state_dict(), tmp_path, **SMALL, in_channels=4)
        torch.testing.assert_close(one(grey), truth, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(again(grey.expand(-1, 3, -1, -1)), truth, rtol=1e-4, atol=1e-4)
    adapt = pytest.importorskip('timm.models', reason='needs timm').adapt_input_conv
    torch.testing.assert_close(four.features.conv0.weight,
                               adapt(4, three.features.conv0.weight))
    assert 'first convolution adapted from 3 to 4 channels' in capsys.readouterr().out


# ---- weights that do not fit, and other files ----------------------------------------------------

def test_the_first_difference_is_named(tmp_path):
    state = densenet.DenseNet(**NARROW).state_dict()
    error = says(state, tmp_path, growth_rate=32)
    assert 'features.conv0.weight is [8, 3, 7, 7] in the file and [64, 3, 7, 7] here' in error
    assert 'its network is --block-config 2 2 --growth-rate 4 --init-features 8' in error
    plain = dict(SMALL, bottleneck=False, compression=0.75)
    assert '--compression 0.75 --no-bottleneck' in says(
        densenet.DenseNet(**plain).state_dict(), tmp_path, **SMALL)
    assert ('classifier.weight is [5, 16] in the file and [7, 16] here: --reset-classifier'
            in says(state, tmp_path, **dict(NARROW, num_classes=7)))
    assert 'has ImageNet\'s 7x7 stem' in says(state, tmp_path, **SMALL)
    assert '--image-size 64 or less' in says(densenet.DenseNet(**SMALL).state_dict(), tmp_path)
    extra = {**state, 'features.denseblock1.denselayer1.se.weight': torch.ones(2)}
    assert 'features.denseblock1.denselayer1.se.weight is only in the file' in says(extra, tmp_path)
    del state['features.norm5.bias']
    assert 'features.norm5.bias is not in the file' in says(state, tmp_path)
    resnet = torchvision.models.resnet18().state_dict()
    assert 'unknown layout: [\'conv1.weight\', ' in says(resnet, tmp_path)
    assert 'holds no weights: it holds [\'epoch\']' in says({'epoch': 3}, tmp_path)
    assert 'holds no weights: it holds int' in says(3, tmp_path)


def write_bytes(content, path):
    path.write_bytes(content)


@pytest.mark.filterwarnings('ignore')  # TorchScript is deprecated
def test_models_and_programs_are_named(tmp_path):
    model = densenet.DenseNet(**NARROW).eval()
    for state in (model, {'model': nn.DataParallel(model)}):
        for save in (torch.save, save_legacy):
            error = says(state, tmp_path, save=save)
            assert 'holds a whole model or module (' in error and 'state_dict()' in error
    assert '(densenet.DenseNet)' in says(model, tmp_path)
    script = torch.jit.trace(model, torch.randn(1, 3, 32, 32))
    assert 'is a TorchScript program' in says(script, tmp_path, save=torch.jit.save)
    with zipfile.ZipFile(tmp_path / 'exported.pt2', 'w') as archive:  # by torch.export
        archive.writestr('model/models/model.json', '{}')
    with pytest.raises(UserError, match='a zip file that torch.save did not write: .*model.json'):
        weights.read(tmp_path / 'exported.pt2')


@pytest.mark.parametrize('content, words', [
    (b'<!DOCTYPE html><html>', 'a web page: the download failed'),
    (b'version https://git-lfs.github.com/spec/v1\noid', 'a Git LFS pointer'),
    (b'\x89HDF\r\n\x1a\n' + bytes(99), 'an HDF5 file'), (b'\x1f\x8b\x08', 'unpack it first'),
    (b'4\n1\n3\nV 1\n', 'an ASCII file of Lua Torch'), (b'\0\0\0\4\0\0\0\1', 'big-endian'),
    (b'', DAMAGED), (b'nothing', DAMAGED), (bytes(8) + b'{', '.safetensors'),
    (pickle.dumps({'a': 1}), DAMAGED)])
def test_other_files_are_named(tmp_path, content, words):
    assert words in says(content, tmp_path, save=write_bytes)


def test_missing_and_damaged_files(tmp_path):
    with pytest.raises(UserError, match='gone.pth is not there'):
        weights.read(tmp_path / 'gone.pth')
    with pytest.raises(UserError, match='is not a checkpoint, but a folder'):
        weights.read(tmp_path)
    state = densenet.DenseNet(**NARROW).state_dict()
    torch.save(state, tmp_path / 'whole.pth')
    content = bytearray((tmp_path / 'whole.pth').read_bytes())
    assert DAMAGED in says(content[:len(content) // 2], tmp_path, save=write_bytes)
    content[content.index(state['classifier.weight'].numpy().tobytes())] ^= 1
    assert 'the CRC of' in says(content, tmp_path, save=write_bytes)


class Call:
    """Pickled as a call of a function."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def test_malicious_files_run_no_code_and_take_no_memory(tmp_path):
    def zipped(content, path):
        torch.save(content, tmp_path / 'plain.pth')
        with zipfile.ZipFile(tmp_path / 'plain.pth') as plain, \
                zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
            for name in plain.namelist():
                archive.writestr(name, plain.read(name))

    nested = {}
    for _ in range(100):  # each twice in the next: 2^100 ways to the last
        nested = {'a': nested, 'b': nested}
    errors = [says({'state_dict': Call(os.mkdir, str(tmp_path / 'harm'))}, tmp_path),
              says({'state_dict': Call(exec, f'import os; os.mkdir({str(tmp_path / "harm")!r})')},
                   tmp_path),
              says(torch.zeros(10**7), tmp_path, save=zipped), says(nested, tmp_path),
              says({'x': Call(bytearray, 10**10)}, tmp_path)]
    for error, words in zip(errors, ('posix.mkdir', 'holds no weights', 'would take 0.04 GB',
                                     'holds no weights', 'bytearray')):
        assert words in error
    assert not (tmp_path / 'harm').exists()
    model = randomized(torchvision.models.DenseNet(**NARROW))
    state = {'state_dict': model.state_dict(), 'x': Call(print, 'ran')}
    assert_same_weights(load(state, tmp_path), model)  # beside weights, it is left out


# ---- Lua Torch -----------------------------------------------------------------------------------

class LuaWriter:
    """Writes objects by the rules of torch7's File.lua; memory of each is shared by index."""

    def __init__(self):
        self.content, self.indices, self.kept = b'', {}, []

    def pack(self, code, *values):
        self.content += struct.pack(f'<{code}', *values)

    def string(self, text):
        self.pack(f'i{len(text)}s', len(text), text.encode())

    def write(self, value):
        if value is None:
            self.pack('i', 0)
        elif isinstance(value, bool):
            self.pack('ii', 5, value)
        elif isinstance(value, (int, float)):
            self.pack('id', 1, value)
        elif isinstance(value, str):
            self.pack('i', 2)
            self.string(value)
        else:
            kind = {Lua: 4, Function: 8}.get(type(value), 3)
            is_new = id(value) not in self.indices
            self.pack('ii', kind, self.indices.setdefault(id(value), len(self.indices) + 1))
            self.kept.append(value)  # so that its id stays its own
            if is_new:
                self.contents(value)
        return self.content

    def contents(self, value):
        if isinstance(value, Function):
            self.string('bytecode')
            self.write({1: {'name': 'self', 'value': value}})
        elif isinstance(value, Lua):
            if value.version:
                self.string(value.version)
            self.string(value.name)
            if value.name.endswith('Storage'):
                self.pack('q', len(value.fields))
                self.content += value.fields.tobytes()
            elif value.name.endswith('Tensor'):
                storage, offset, size, stride = value.fields
                self.pack(f'i{2 * len(size) + 1}q', len(size), *size, *stride, offset + 1)
                self.write(storage)
            else:
                self.write(value.fields)
        else:
            table = dict(enumerate(value, 1)) if isinstance(value, list) else value
            self.pack('i', len(table))
            for key, item in table.items():
                self.write(key)
                self.write(item)


class Lua:
    """A Torch object: a module with its fields, a storage (an array), or a tensor (its parts)."""

    def __init__(self, name, fields, version='V 1'):
        self.name, self.fields, self.version = name, fields, version


class Function:
    pass


def lua_model(model, element='Float', dtype='f4', custom=False, running_std=False, version='V 1'):
    """The official code's modules for one of ours, in the order of its models/densenet.lua."""
    tensors = [t for t in model.state_dict().values() if t.dim()]
    array = torch.cat([t.flatten() for t in tensors]).numpy().astype(dtype)
    storage = Lua(f'torch.{element}Storage', array, version)
    offsets = dict(zip(map(torch.Tensor.data_ptr, tensors), np.cumsum(
        [0] + [t.numel() for t in tensors]).tolist()))

    def tensor(values, own=None):
        if own is None:
            own, offset = storage, offsets[values.data_ptr()]
        else:
            own, offset = Lua(f'torch.{element}Storage', own, version), 0
        return Lua(f'torch.{element}Tensor', (own, offset, values.shape, values.stride()), version)

    def module(ours):
        name = type(ours).__name__.replace('Conv2d', 'cudnn.SpatialConvolution').replace(
            'BatchNorm2d', 'cudnn.SpatialBatchNormalization').replace('Linear', 'nn.Linear')
        fields = {'train': True, 'forward': Function(), 'output': Lua(
            f'torch.{element}Tensor', (None, 0, (), ()), version), 'gradInput': None,
            'weight': tensor(ours.weight)}
        if ours.bias is not None:
            fields['bias'] = tensor(ours.bias)
        if isinstance(ours, nn.BatchNorm2d):
            fields.update(eps=ours.eps, running_mean=tensor(ours.running_mean))
            if running_std:
                std = (ours.running_var + ours.eps).rsqrt().numpy().astype(dtype)
                fields['running_std'] = tensor(ours.running_var, std)
            else:
                fields['running_var'] = tensor(ours.running_var)
        return Lua(name, fields, version)

    def container(modules, name='nn.Sequential', **fields):
        return Lua(name, {'modules': modules, **fields}, version)

    def layer(ours):
        relu = Lua('cudnn.ReLU', {'inplace': True}, version)
        parts = [module(part) for part in ours.children() if not isinstance(part, nn.ReLU)]
        nets = container([parts[0], relu]), container(parts[1:])
        if custom:  # optMemory 3 and 4
            return container([*nets], 'nn.DenseConnectLayerCustom', net1=nets[0], net2=nets[1])
        return container([Lua('nn.Identity', {}, version), container([*nets])], 'nn.Concat')

    modules = []
    for part in model.features:
        if isinstance(part, densenet.DenseBlock):
            modules += map(layer, part.values())
        elif isinstance(part, densenet.Transition):
            modules += [module(part.norm), module(part.conv)]
        elif isinstance(part, (nn.Conv2d, nn.BatchNorm2d)):
            modules.append(module(part))
    return container([*modules, module(model.classifier)])


LUA = {
    'official': {}, 'memory efficient': dict(custom=True), 'cuda': dict(element='Cuda'),
    'double': dict(element='Double', dtype='f8'), 'half': dict(element='Half', dtype='f2'),
    'cuda half': dict(element='CudaHalf', dtype='f2'),
    'before versions': dict(running_std=True, version=''),
}


@pytest.mark.parametrize('case', LUA)
@pytest.mark.parametrize('config', [NARROW, dict(SMALL, bottleneck=False)])
def test_lua_torch(tmp_path, case, config):
    theirs = randomized(densenet.DenseNet(**config))
    if 'half' in case:
        theirs.half().float()
    root = lua_model(theirs, **LUA[case])
    for content in (root, {'model': root, 'epoch': 90}):
        ours = load(LuaWriter().write(content), tmp_path, save=write_bytes, **config)
        assert_same_logits(ours, theirs, tolerance=1e-5 if 'versions' in case else 0)


def test_lua_torch_says_what_is_wrong(tmp_path):
    def error(content, **options):
        return says(content, tmp_path, save=write_bytes, **options)

    content = LuaWriter().write(lua_model(densenet.DenseNet(**NARROW)))
    assert 'it has 11 layers and 11 norms, and this one 121 layers and 121 norms' in error(
        content, growth_rate=32)
    assert '--reset-classifier' in error(content, **dict(NARROW, num_classes=7))
    assert 'it holds no model, but epoch, optimFile' in error(
        LuaWriter().write({'epoch': 1, 'optimFile': 'x'}))
    for end in (20, len(content) // 3, len(content) - 5):
        assert 'can\'t be read as a model of Lua Torch' in error(content[:end])
    # Claims of 8 TB, of a tensor beyond its storage, and of one number 2^40 times
    storage = Lua('torch.FloatStorage', np.zeros(4, 'f4'))
    claims = struct.pack('<iii3si18sq', 4, 1, 3, b'V 1', 18, b'torch.FloatStorage', 2**41)
    for fields in ((storage, 0, (5,), (1,)), (storage, 2**40, (2,), (1,)),
                   (storage, 0, (2**40,), (0,))):
        weight = Lua('torch.FloatTensor', fields)
        assert 'can\'t be read' in error(LuaWriter().write(
            Lua('nn.Sequential', {'modules': [Lua('nn.Linear', {'weight': weight})]})))
    assert 'can\'t be read' in error(claims)
    loop = Lua('nn.Sequential', {})
    loop.fields['modules'] = [loop]
    (tmp_path / 'loop.t7').write_bytes(LuaWriter().write(loop))
    assert lua_torch.load_modules(tmp_path / 'loop.t7') == []


def test_the_averages_of_our_own_run_are_taken(tmp_path):
    model, other = densenet.densenet_cifar(10, 4), densenet.densenet_cifar(10, 4)
    torch.save({'model': other.state_dict(), 'trained_model': model.state_dict()},
               tmp_path / 'best.pth')
    found, *_ = weights.read_weights(tmp_path / 'best.pth', '', model)
    assert torch.equal(found['classifier.weight'], other.classifier.weight)
