"""fuse refuses, or falls back with a reason, if the fused block would compute something else."""

import copy
import gc
import io
import itertools
import json
import pickle
import re
import threading
import weakref
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from conftest import read_csv
from torch import nn
from torch.utils._pytree import tree_map

import densenet
import fused_dense_block
import train
from densenet import DenseNet, densenet_cifar
from fused_dense_block import cpu, fuse, selfcheck, unfuse
from training import checkpoint, networks


def small_net(**settings):
    torch.manual_seed(0)
    return DenseNet(**{**dict(growth_rate=4, block_config=(2, 2), num_init_features=8,
                              num_classes=5, small_inputs=True), **settings})


def images(dtype=torch.float32, size=8):
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1), dtype=dtype)


def fused_parts(model):
    return {name: module for name, module in model.named_modules() if hasattr(module, '_fused')}


# ---- a changed densenet.py ---------------------------------------------------------------------

@pytest.fixture
def doubled(monkeypatch):
    """An edited `DenseLayer.forward`."""
    forward = densenet.DenseLayer.forward
    monkeypatch.setattr(densenet.DenseLayer, 'forward',
                        lambda self, features: 2 * forward(self, features))


def test_an_edited_layer_is_refused_by_name(doubled):
    model = small_net()
    before = {name: type(module) for name, module in model.named_modules()}
    complaint = (r'^not fused: features.denseblock1.denselayer1 computes something else .* outputs '
                 r'have a relative difference of 0.5')
    with pytest.raises(ValueError, match=complaint):
        fuse(model)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_train_py_trains_an_edited_file_unfused(doubled, small, tmp_path, monkeypatch, capsys):
    argv = [*small, '--epochs', '1', '--save']
    train.main([*argv, str(tmp_path / 'run')])
    warning, = capsys.readouterr().err.splitlines()
    assert re.match(r'train.py: warning: not fused: features.denseblock1.denselayer1 computes .*: '
                    r'it runs layer by layer, which is slower$', warning)
    record = json.loads((tmp_path / 'run/args.json').read_text())
    assert record['not_fused'] in warning
    monkeypatch.setattr(networks, 'fuse', lambda *_, **__: None)  # as the file says, certainly
    train.main([*argv, str(tmp_path / 'plain')])
    ours, theirs = (checkpoint.load(tmp_path / name / 'latest.pth') for name in ('run', 'plain'))
    torch.testing.assert_close(ours['model'], theirs['model'], rtol=0, atol=0)
    assert read_csv(tmp_path / 'run/test.csv') == read_csv(tmp_path / 'plain/test.csv')


def test_train_py_fuses_an_unedited_file(small, tmp_path, capsys):
    train.main([*small, '--epochs', '1', '--save', str(tmp_path / 'run')])
    assert json.loads((tmp_path / 'run/args.json').read_text())['not_fused'] is None
    assert 'fused' not in capsys.readouterr().err


def test_a_class_that_is_edited_later_runs_layer_by_layer(monkeypatch):
    model, x = fuse(small_net().double()), images(torch.float64)
    pickled = pickle.dumps(model)
    model(x)
    assert model.features.denseblock1.path == 'eager'
    forward = densenet.DenseLayer.forward
    monkeypatch.setattr(densenet.DenseLayer, 'forward',
                        lambda self, features: 2 * forward(self, features))
    plain = small_net().double()
    truth = plain(x)
    for twin in (unfuse(copy.deepcopy(model)), model, pickle.loads(pickled)):
        for norm in (m for m in twin.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.reset_running_stats()
        torch.testing.assert_close(twin(x), truth)
    for block in (model.features.denseblock2, twin.features.denseblock2):
        assert block.path == 'layers'
        assert block.reason.startswith('denselayer1 computes something else than the fused layers')


class ScaledLayer(densenet.DenseLayer):
    scale = _scale = 1.0

    def forward(self, features):
        return self.scale * self._scale * super().forward(features)


def test_an_attribute_that_changes_the_function_later_is_noticed():
    model, x = small_net().double(), images(torch.float64)
    layer = model.features.denseblock1.denselayer2
    layer.__class__ = ScaledLayer
    fuse(model)
    model(x)
    assert model.features.denseblock1.path == 'eager'
    layer.scale = 3.0
    logits = model(x)
    assert model.features.denseblock1.path == 'layers'
    assert model.features.denseblock1.reason.startswith('denselayer2 computes something else')
    torch.testing.assert_close(unfuse(model)(x), logits)


class Dropped(densenet.DenseLayer):  # stochastic depth
    def forward(self, features):
        y = super().forward(features)
        return torch.zeros_like(y) if self.training and torch.rand(()) < 0.01 else y


class DroppedByNumPy(densenet.DenseLayer):
    def forward(self, features):
        y = super().forward(features)
        return torch.zeros_like(y) if self.training and np.random.rand() < 0.01 else y


class Clamped(densenet.DenseLayer):
    def forward(self, features):
        self.relu1.forward = torch.nn.functional.relu6
        y = super().forward(features)
        del self.relu1.forward
        return y


class Scaled(densenet.DenseLayer):
    def forward(self, features):
        return self.gain * super().forward(features)


class Unused(densenet.DenseLayer):
    def forward(self, features):
        return super().forward(features)


class Shifted(densenet.DenseLayer):
    def forward(self, features):
        return super().forward(features) + self.shift


class Counting(densenet.DenseLayer):
    calls = 0

    def forward(self, features):
        self.calls += 1
        return super().forward(features)


class Narrow(densenet.DenseBlock):
    def forward(self, x):
        return super().forward(x)[:, 1:]


def set_class(cls, **tensors):
    def change(model):
        layer = model.features.denseblock1.denselayer2
        layer.__class__ = cls
        for name, value in tensors.items():
            if isinstance(value, nn.Parameter):
                setattr(layer, name, value)
            else:
                layer.register_buffer(name, value)
    return change


EDITS = {  # of a layer, by the message
    'draws random numbers in its forward': set_class(Dropped),
    'draws random numbers in its (forward)': set_class(DroppedByNumPy),
    'sets the attribute relu1|outputs have a relative': set_class(Clamped),
    'denselayer2.gain is not part of a norm': set_class(Scaled, gain=nn.Parameter(torch.ones(()))),
    'denselayer2.idle is not part of a norm': set_class(Unused, idle=nn.Parameter(torch.ones(3))),
    'denselayer2.shift is not part of a norm': set_class(Shifted, shift=torch.zeros(())),
    'sets the attribute calls': set_class(Counting),
    'has the attribute maps, a list': lambda model: setattr(
        model.features.denseblock1.denselayer2, 'maps', []),
    'has the attribute config, a SimpleNamespace': lambda model: setattr(
        model.features.denseblock1.denselayer2, 'config', SimpleNamespace(scale=1.0)),
    'denselayer2.norm1.bias is None': lambda model: setattr(
        model.features.denseblock1.denselayer2.norm1, 'bias', None),
    'has a norm in two places': lambda model: setattr(
        model.features.denseblock1.denselayer2, 'norm2',
        model.features.denseblock1.denselayer1.norm2),
    ' does not return one tensor of shape': lambda model: setattr(
        model.features.denseblock1, '__class__', Narrow),
}


@pytest.mark.parametrize('complaint', EDITS)
def test_edited_layers_are_refused(complaint):
    model = small_net()
    EDITS[complaint](model)
    state = torch.get_rng_state(), str(np.random.get_state())
    with pytest.raises(ValueError, match=f'not fused: features.denseblock1.*({complaint})'):
        fuse(model)
    assert torch.equal(torch.get_rng_state(), state[0]) and str(np.random.get_state()) == state[1]
    assert not fused_parts(model)


@pytest.mark.parametrize('change', [
    lambda block: setattr(block.denselayer2, '_scale', 3.0),
    lambda block: setattr(ScaledLayer, 'scale', 3.0),
    lambda block: setattr(block.denselayer2.conv2, '_conv_forward', lambda x, w, b: 3 * x[:, :4])])
def test_private_class_and_shadowing_attributes_are_noticed(change):
    model, x = small_net().double(), images(torch.float64)
    block = model.features.denseblock1
    block.denselayer2.__class__ = ScaledLayer
    fuse(model)
    model(x)
    assert block.path == 'eager'
    try:
        change(block)
        logits = model(x)
        assert block.path == 'layers', block.reason
        torch.testing.assert_close(unfuse(model)(x), logits)
    finally:
        ScaledLayer.scale = 1.0


def test_scores_kept_on_convolutions_do_not_matter():
    model, x = small_net().double(), images(torch.float64)
    fuse(model)
    for _ in range(2):
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.saliency = module.weight.detach().abs()
        model(x)
        assert model.features.denseblock1.path == 'eager'


def test_maps_that_are_too_small_raise_torchs_error():
    if cpu.unavailable_reason():
        pytest.skip(f'no kernels here: {cpu.unavailable_reason()}')
    model = fuse(torchvision.models.DenseNet(4, (1, 1, 1, 1), 8, num_classes=5))
    model.to(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match='too small'):
        model(images(size=28).to(memory_format=torch.channels_last))


def test_strided_parameters_and_statistics_are_read_as_they_are():
    if cpu.unavailable_reason():
        pytest.skip(f'no kernels here: {cpu.unavailable_reason()}')
    model, x = small_net(), images().to(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        wide = torch.randn(2 * norm.num_features)
        norm.bias = nn.Parameter(wide[::2])
        norm.running_mean = torch.randn(2 * norm.num_features)[::2]
    for training in (True, False):
        model.train(training)
        plain = copy.deepcopy(model)
        for norm, other in zip(model.modules(), plain.modules()):  # copies may be dense
            if isinstance(norm, nn.BatchNorm2d):
                other.bias, other.running_mean = norm.bias, norm.running_mean.clone()
        with torch.no_grad():
            torch.testing.assert_close(fuse(model)(x), plain(x), rtol=1e-4, atol=1e-4)
        assert model.features.denseblock1.path == 'kernels'


def test_weights_on_another_device_are_an_error_and_no_crash():
    with torch.device('meta'):
        model = small_net()
    fuse(model).to(memory_format=torch.channels_last)
    with pytest.raises((RuntimeError, NotImplementedError)):
        model(images().to(memory_format=torch.channels_last))
    assert model.features.denseblock1.reason in ('weights on another device', None)


def test_a_forward_that_keeps_its_maps_is_refused(monkeypatch):
    forward = densenet.DenseLayer.forward

    def keep(self, features):
        self.maps = forward(self, features)
        return self.maps

    monkeypatch.setattr(densenet.DenseLayer, 'forward', keep)
    with pytest.raises(ValueError, match='denselayer1 sets the attribute maps in its forward'):
        fuse(small_net())


# ---- changed modules ---------------------------------------------------------------------------

class Attention(nn.Conv2d):
    def __init__(self):
        super().__init__(8, 8, 1)

    def forward(self, x):
        return x * super().forward(x).sigmoid()


def conv_first(transition):
    norm, relu, conv, pool = transition
    for name in ('norm', 'relu', 'conv', 'pool'):
        del transition._modules[name]
    transition._modules.update(norm=norm, conv=conv, relu=relu, pool=pool)


CHANGES = {
    'a module more': lambda transition: transition.add_module('att', Attention()),
    'dropout at the end': lambda transition: transition.append(nn.Dropout(0.5)),
    'another order': conv_first,
    'no pool': lambda transition: transition._modules.pop('pool'),
    'max-pool': lambda transition: setattr(transition, 'pool', nn.MaxPool2d(2)),
}


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('when', ['before fuse', 'after fuse', 'never fused'])
@pytest.mark.parametrize('training', [False, True])
def test_a_changed_transition_does_what_torchvisions_does(change, when, training):
    torch.manual_seed(0)
    settings = dict(growth_rate=4, block_config=(2, 2), num_init_features=8, num_classes=5)
    theirs, ours = torchvision.models.DenseNet(**settings), DenseNet(**settings)
    ours.load_state_dict(theirs.state_dict())
    if when == 'after fuse':
        fuse(ours)
    for model in (theirs, ours):
        CHANGES[change](model.features.transition1)
    ours.load_state_dict(theirs.state_dict())
    if when == 'before fuse':
        fuse(ours)
    seen = []
    for model in (theirs, ours):
        torch.manual_seed(2)
        logits = model.double().train(training)(images(torch.float64, 40))
        logits.square().sum().backward()
        seen.append([logits, *(parameter.grad for parameter in model.parameters())])
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-9, atol=1e-11)
    assert all(gradient is not None for gradient in seen[1])


def test_a_norm_without_a_counter_trains_as_without_fuse():
    plain, model = small_net().double(), fuse(small_net().double())
    for net in (plain, model):
        net.features.denseblock1.denselayer1.norm2.num_batches_tracked = None
    torch.testing.assert_close(model(images(torch.float64)), plain(images(torch.float64)))
    assert 'num_batches_tracked is None' in model.features.denseblock1.reason


def test_a_replica_of_data_parallel_runs_layer_by_layer():
    model, x = fuse(small_net().eval()), images()
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            replica._modules[name] = replicas[child]
        for name, parameter in module._parameters.items():
            setattr(replica, name, None if parameter is None else parameter.detach().clone())
    torch.testing.assert_close(replicas[model](x), model(x))
    assert 'nn.DataParallel' in replicas[model.features.denseblock1].reason


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype,
                                                   strides=inner.stride())

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, Wrapper) else x,
                                (args, kwargs or {}))
        return tree_map(lambda y: Wrapper(y) if isinstance(y, torch.Tensor) else y,
                        func(*args, **kwargs))


@pytest.mark.parametrize('wrap', ['input', 'weight'])
def test_tensors_of_other_classes_run_layer_by_layer(wrap):
    plain, model = small_net().eval(), fuse(small_net().eval())
    x, results = images(size=16).contiguous(memory_format=torch.channels_last), []
    for net in (plain, model):
        block = net.features.denseblock1
        maps = net.features.conv0(x)
        with torch.no_grad():
            block(maps)
            if wrap == 'weight':
                conv = block.denselayer1.conv1
                conv.weight = nn.Parameter(Wrapper(conv.weight.detach()), requires_grad=False)
            results.append(block(Wrapper(maps) if wrap == 'input' else maps).inner)
    torch.testing.assert_close(*results)
    without_kernels = wrap == 'weight' and cpu.unavailable_reason()  # then layers are the way
    assert block.reason == (without_kernels or 'a tensor of the class Wrapper')


def test_what_fuse_has_verified_is_not_verified_again(monkeypatch):
    model = fuse(small_net())
    monkeypatch.setattr(selfcheck, 'verify', None)
    model(images())
    with torch.no_grad():
        model.eval()(images())
    assert {part.reason for part in fused_parts(model).values()} <= {
        None, 'the input is not in channels_last', cpu.unavailable_reason()}


def test_a_copy_of_a_compiled_block_has_its_own_weights():
    model = fuse(small_net().eval())
    model.features.denseblock1.compile(backend='eager')
    twin, x = copy.deepcopy(model), images()
    with torch.no_grad():
        for parameter in twin.features.denseblock1.parameters():
            parameter.mul_(2)
        truth = unfuse(copy.deepcopy(twin))(x)
        torch.testing.assert_close(twin(x), truth, rtol=1e-4, atol=1e-4)
        assert (truth - model(x)).abs().max() > 0.01
    pickle.dumps(model)


def test_other_threads_may_draw_random_numbers():
    drawn, ended = [], threading.Event()

    def augment():
        while not ended.wait(0.001):
            drawn.append(torch.rand(2).tolist())

    thread = threading.Thread(target=augment)
    thread.start()
    try:
        while len(drawn) < 10:
            fuse(small_net())
    finally:
        ended.set()
        thread.join()
    assert len(drawn) == len({*map(tuple, drawn)})  # the generator was not set back


@pytest.mark.parametrize('kernels', [True, False])
@pytest.mark.parametrize('change', ['relu_', 'zero_'])
def test_changing_the_output_of_a_block_in_place_is_an_error(kernels, change):
    """Backward needs the output: the gradients would be wrong."""
    block = fuse(small_net(), kernels=kernels).features.denseblock1
    x = torch.randn(2, 8, 8, 8).to(memory_format=torch.channels_last).requires_grad_()
    with pytest.raises(RuntimeError, match='in-?place'):
        getattr(block(x), change)().sum().backward()
    assert block.path in ('kernels', 'eager')


def test_what_autograd_saves_may_change_its_layout():
    gradients = []
    for net in (small_net(), fuse(small_net())):
        net.to(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.contiguous, lambda x: x):
            net(images()).square().sum().backward()
        gradients.append([parameter.grad for parameter in net.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_a_deleted_model_is_freed():
    for _ in range(2):  # the first time, what is imported may keep frames
        gc.collect()
        gc.disable()
        model = fuse(small_net())
        model(images()).sum().backward()
        model.eval()
        with torch.no_grad():
            model(images())
        weight = weakref.ref(model.features.denseblock1.denselayer1.conv1.weight)
        del model
        gc.enable()
    assert weight() is None


def test_a_convolution_that_is_patched_later_is_noticed(monkeypatch):
    model, plain, x = fuse(small_net().eval()), small_net().eval(), images()
    with torch.no_grad():
        model(x)
        conv = nn.Conv2d._conv_forward
        monkeypatch.setattr(nn.Conv2d, '_conv_forward', lambda *args: 2 * conv(*args))
        torch.testing.assert_close(model(x), plain(x))


def test_gradients_that_are_only_rounding_errors_do_not_matter():
    fuse(small_net(growth_rate=1, block_config=(3, 3), num_init_features=1, bn_size=1))


def test_torchscript_is_refused():
    with pytest.raises(ValueError, match='TorchScript'):
        fuse(torch.jit.trace(small_net().eval(), images()))


def test_modules_without_dense_blocks_are_refused():
    for model, complaint in ((nn.Sequential(nn.Conv2d(3, 3, 1)), 'this Sequential has no dense'),
                             (nn.ModuleDict({'denselayer1': nn.Conv2d(3, 3, 1)}),
                              'denselayer1 has the children  instead of norm1, relu1, conv1')):
        with pytest.raises(ValueError, match=f'^not fused: {complaint}'):
            fuse(model)


# ---- the check leaves nothing behind -----------------------------------------------------------

@pytest.mark.parametrize('context', [
    nullcontext, torch.no_grad, torch.inference_mode,
    lambda: torch.autocast('cpu', torch.bfloat16)])
def test_fuse_changes_nothing_but_classes(context):
    model = small_net(drop_rate=0.2)
    model(images()).sum().backward()
    model.features.denseblock1.denselayer1.norm1.eval()
    model.features.denseblock2.requires_grad_(False)
    calls = []
    model.features.denseblock1.denselayer2.register_forward_hook(lambda *_: calls.append(1))
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    before = copy.deepcopy((model.state_dict(), [p.grad for p in parameters],
                            [m.training for m in model.modules()]))
    torch.manual_seed(5)
    with context():
        fuse(model)
    random = torch.rand(3)
    torch.manual_seed(5)
    torch.testing.assert_close(random, torch.rand(3), rtol=0, atol=0)
    torch.testing.assert_close((model.state_dict(), [p.grad for p in parameters],
                                [m.training for m in model.modules()]), before, rtol=0, atol=0)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True)) and not calls
    assert isinstance(model.features.denseblock1, densenet.DenseBlock)
    model.features.denseblock2.requires_grad_(True)
    model(images()).sum().backward()
    optimizer.step()
    assert not torch.equal(model.features.denseblock2.denselayer1.conv1.weight,
                           before[0]['features.denseblock2.denselayer1.conv1.weight'])
    assert len(calls) == 1


def test_unfuse_gives_the_plain_model_back():
    model = small_net()
    before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
    fuse(model)(images())
    assert len(fused_parts(model)) == 3
    assert unfuse(model) is model and not fused_parts(model)
    assert {name: (type(module), set(vars(module)))
            for name, module in model.named_modules()} == before


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_fuse_takes_any_precision_default_type_and_the_meta_device(dtype):
    torch.set_default_dtype(torch.float64)
    try:
        assert fused_parts(fuse(small_net().to(dtype)))
        with torch.device('meta'):
            model = small_net()
        assert fused_parts(fuse(model)) and model.classifier.weight.is_meta
    finally:
        torch.set_default_dtype(torch.float32)


def test_weights_that_are_not_finite_do_not_matter():
    model = small_net()
    for parameter in model.parameters():
        nn.init.constant_(parameter, torch.nan)
    assert fused_parts(fuse(model))


# ---- the table of paths -------------------------------------------------------------------------

def table():
    """The rows of the table in the docstring of the package."""
    lines = fused_dense_block.__doc__.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split()[:2] == ['device', 'layout'])
    rows = itertools.takewhile(str.strip, lines[start + 1:])
    return [re.split(r'  +', row.strip()) for row in rows]


def test_the_table_equals_the_one_in_the_docs():
    page = (Path(train.__file__).parent / 'attic/speed.md').read_text()
    for row in table():
        assert '| ' + ' | '.join(row) + ' |' in page


LAYOUTS = {'channels_last': torch.channels_last, 'contiguous': torch.contiguous_format}
MODES = 'training', 'evaluation', 'evaluation with gradients'


# The meta device stands for all others: it computes nothing but shapes. It has no autocast.
DTYPES = {'cpu': [torch.float32, torch.bfloat16, torch.float64, torch.float16],
          'meta': [torch.float32, torch.float64]}


@pytest.mark.parametrize('device', DTYPES)
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('efficient', [False, True])
def test_each_path_of_the_table(device, layout, efficient):
    if device == 'cpu' and cpu.unavailable_reason():
        pytest.skip(f'no kernels here: {cpu.unavailable_reason()}')
    model = fuse(small_net(memory_efficient=efficient)).to(device, memory_format=LAYOUTS[layout])
    for dtype, mode in itertools.product(DTYPES[device], MODES):
        row = next(row for row in table() if row[0] in (device, 'other')
                   and row[1] in (layout, 'any')
                   and {str(dtype).removeprefix('torch.'), 'any'} & set(row[2].split(', ')))
        expected = row[3 + MODES.index(mode)]
        if expected.endswith('*'):
            expected = 'eager' if efficient else 'layers'
        low = dtype in (torch.bfloat16, torch.float16)
        weights = torch.float32 if low else dtype
        model.to(weights).train(mode == 'training')
        x = images(weights).to(device, memory_format=LAYOUTS[layout])
        with torch.set_grad_enabled(mode != 'evaluation'), \
                torch.autocast('cpu', dtype, enabled=low):
            model(x)
        for part in fused_parts(model).values():
            is_transition = isinstance(part, densenet.Transition)
            unfused = 'pooled first' if is_transition else 'layers'
            found = mode, dtype, is_transition, part.path, part.reason
            assert part.path == (unfused if expected == 'layers' else expected), found
            fastest = part.path == 'kernels' or (device == 'meta' and part.path == 'eager')
            assert (part.reason is None) == fastest, found


def test_the_stem_is_fused_in_evaluation_on_a_cpu():
    model, x = small_net(small_inputs=False), images(size=40)
    fuse(model.eval())
    with torch.no_grad():
        model(x)
    assert (model.features.path, model.features.reason) == (
        'eager', cpu.unavailable_reason() or 'the images and the weights are not in channels_last')
    model(x)
    assert model.features.path == 'layers' and 'without gradients' in model.features.reason


def test_reasons_name_what_turns_the_kernels_off(monkeypatch):
    model = fuse(small_net(), kernels=False).to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    model(x)
    assert model.features.denseblock1.reason == 'fused with kernels=False'
    monkeypatch.setenv('DENSENET_CPU_KERNELS', '0')
    fuse(model)(x)
    assert (model.features.denseblock1.path, model.features.denseblock1.reason) == (
        'eager', 'DENSENET_CPU_KERNELS=0')


def test_a_model_fused_elsewhere_is_verified_with_the_kernels_when_it_meets_them(monkeypatch):
    if cpu.unavailable_reason():
        pytest.skip(f'no kernels here: {cpu.unavailable_reason()}')
    model = small_net().to(memory_format=torch.channels_last)
    x = images().to(memory_format=torch.channels_last)
    monkeypatch.setenv('DENSENET_CPU_KERNELS', '0')
    fuse(model)(x)
    monkeypatch.delenv('DENSENET_CPU_KERNELS')
    statistics = cpu.statistics
    monkeypatch.setattr(cpu, 'statistics', lambda x: [2 * value for value in statistics(x)])
    model(x)
    block = model.features.denseblock1
    assert block.path == 'layers' and 'by the CPU kernels in torch.float32' in block.reason
    with pytest.raises(ValueError, match=r'denseblock1 has other outputs by the CPU kernels .* '
                                         r'fuse\(model, kernels=False\) does without'):
        fuse(unfuse(model))
    monkeypatch.undo()
    fuse(model)(x)
    assert block.path == 'kernels'


# ---- as torchvision's constructors -------------------------------------------------------------

class Weights:
    """Stands for a member of torchvision's enum, without its download."""

    def __init__(self, state_dict):
        self.state_dict, self.options = state_dict, None

    def get_state_dict(self, **options):
        self.options = options
        return self.state_dict


def test_constructors_take_torchvisions_weights():
    theirs = torchvision.models.densenet121().eval()
    member = Weights(theirs.state_dict())
    ours = [densenet.densenet121(weights=member, progress=False),
            densenet.densenet121(weights=theirs.state_dict()), densenet.densenet121(weights=None)]
    assert member.options == dict(progress=False, check_hash=True, weights_only=True)
    x = images(size=64)
    with torch.no_grad():
        for model, equal in zip(ours, (True, True, False)):
            assert torch.allclose(model.eval()(x), theirs(x), rtol=1e-4, atol=1e-4) == equal
    with pytest.raises(ValueError, match=r'torchvision.models.get_weight'):
        densenet.densenet121(weights='DenseNet121_Weights.IMAGENET1K_V1')


def test_copies_keep_the_verified_signature(monkeypatch):
    model = fuse(densenet_cifar(10, 4))
    twin = copy.deepcopy(model)
    monkeypatch.setattr('fused_dense_block.selfcheck.verify', None)  # not called again
    twin.train()(images())
    assert twin.features.denseblock1.path != 'layers'
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    monkeypatch.undo()
    loaded = torch.load(file, weights_only=False)
    loaded.train()(images())
    assert loaded.features.denseblock1.path != 'layers'
