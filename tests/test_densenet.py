"""The model against the paper and torchvision's, and under PyTorch's tools for modules."""

import ast
import copy
import inspect
import io
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

import densenet
from densenet import DenseNet, densenet_cifar

CIFAR_PARAMETERS = [  # (depth, growth rate, BC, parameters): the paper's table 2, Wide-DenseNet
    (40, 12, False, 1_019_722), (100, 12, False, 6_979_642), (100, 24, False, 27_249_082),
    (100, 12, True, 769_162), (250, 24, True, 15_324_406), (190, 40, True, 25_624_430),
    (40, 36, True, 1_542_682), (40, 48, True, 2_733_130), (40, 60, True, 4_261_690),
]
IMAGENET_PARAMETERS = {
    'densenet121': 7_978_856, 'densenet169': 14_149_480, 'densenet201': 20_013_928,
    'densenet161': 28_681_000, 'densenet264': 33_337_704, 'densenet232_k48': 55_570_984,
    'densenet264_k48': 72_686_632,
}
IN_TORCHVISION = ['densenet121', 'densenet169', 'densenet201', 'densenet161']


def count(model):
    return sum(p.numel() for p in model.parameters())


def small_net(**kwargs):
    torch.manual_seed(0)
    settings = dict(growth_rate=4, block_config=(2, 3), num_init_features=8, num_classes=5,
                    small_inputs=True)
    return DenseNet(**{**settings, **kwargs})


def images(n=4, size=12, dtype=torch.float32, channels=3):
    return torch.randn(n, channels, size, size, dtype=dtype,
                       generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize('depth, growth_rate, bc, parameters', CIFAR_PARAMETERS)
def test_parameter_counts_of_the_cifar_family(depth, growth_rate, bc, parameters):
    with torch.device('meta'):
        model = densenet_cifar(depth, growth_rate, bottleneck=bc, compression=0.5 if bc else 1.0)
    assert count(model) == parameters
    weighted = [m for m in model.modules() if isinstance(m, (torch.nn.Conv2d, torch.nn.Linear))]
    assert len(weighted) == depth


@pytest.mark.parametrize('name', IMAGENET_PARAMETERS)
def test_parameter_counts_of_the_imagenet_family(name):
    with torch.device('meta'):
        assert count(getattr(densenet, name)()) == IMAGENET_PARAMETERS[name]


def pre_2018(state_dict):
    """The spelling of torchvision's first weights, which lacked the batch counters too."""
    return {re.sub(r'(denselayer\d+\.(?:norm|conv))([12])\.', r'\1.\2.', key): value
            for key, value in state_dict.items() if not key.endswith('num_batches_tracked')}


@pytest.mark.parametrize('name', IN_TORCHVISION)
def test_same_logits_as_torchvision_with_the_same_weights(name):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models, name)(num_classes=10)
    for module in theirs.modules():  # so that every weight and buffer of the norms matters
        if isinstance(module, torch.nn.BatchNorm2d):
            for value in (module.weight, module.bias, module.running_mean, module.running_var):
                torch.nn.init.uniform_(value, 0.5, 1.5)
    with torch.device('meta'):  # nothing to initialize
        ours, old = (getattr(densenet, name)(num_classes=10) for _ in range(2))
        back = getattr(torchvision.models, name)(num_classes=10)
    theirs.double().eval()
    ours.load_state_dict(theirs.state_dict(), assign=True)
    back.load_state_dict(ours.state_dict(), assign=True)
    old.load_state_dict(pre_2018(theirs.state_dict()), assign=True)
    x = images(2, 64, torch.float64)
    with torch.no_grad():
        truth = theirs(x)
        for model in (ours, back, old):
            torch.testing.assert_close(model.eval()(x), truth, rtol=1e-12,
                                       atol=1e-12 * truth.abs().max().item())


def sgd_steps(model, steps=2):
    """Loss gradients of the first step, and running statistics after all of them, in float64."""
    model.double().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    gradients = None
    for step in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(images(4, 64, torch.float64) + step), torch.arange(4)).backward()
        gradients = gradients or {k: p.grad.clone() for k, p in model.named_parameters()}
        optimizer.step()
    return gradients, dict(model.named_buffers())


def test_trains_as_torchvision_does():
    theirs, ours = torchvision.models.densenet121(), densenet.densenet121()
    ours.load_state_dict(theirs.state_dict())
    (their_grads, their_buffers), (our_grads, our_buffers) = sgd_steps(theirs), sgd_steps(ours)
    torch.testing.assert_close(our_grads, their_grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(our_buffers, their_buffers, rtol=1e-9, atol=1e-12)


def kinds(model):
    """(name, kind) of each module; torchvision's own classes begin with an underscore."""
    return [(name, 'Sequential' if isinstance(module, torch.nn.Sequential)
             else type(module).__name__.lstrip('_')) for name, module in model.named_modules()]


def pair(training=False, efficient=False):
    """torchvision's DenseNet, of few layers, and ours with the same weights."""
    settings = dict(growth_rate=4, block_config=(2, 3, 2), num_init_features=8, num_classes=5)
    torch.manual_seed(0)
    theirs = torchvision.models.DenseNet(**settings)
    ours = DenseNet(**settings, memory_efficient=efficient)
    ours.load_state_dict(theirs.state_dict())
    for module in theirs.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False  # their own hooks would fail
    return theirs.train(training), ours.train(training)


@pytest.mark.parametrize('name', IN_TORCHVISION)
def test_modules_are_those_of_torchvision(name):
    with torch.device('meta'):
        assert kinds(getattr(densenet, name)()) == kinds(getattr(torchvision.models, name)())


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('grad', [False, True])
def test_the_order_within_the_stem_makes_no_difference(training, grad):
    features = pair(training)[1].features.double()
    for value in (features.norm0.weight, features.norm0.bias):
        torch.nn.init.normal_(value)
    plain, x = copy.deepcopy(features), images(9, 40, torch.float64)  # in parts of 4 images
    results = []
    for model, forward in ((features, type(features).forward),
                           (plain, torch.nn.Sequential.forward)):
        with torch.set_grad_enabled(grad):
            maps = forward(model, x)
        results.append([maps])
        if grad:
            results[-1] += torch.autograd.grad(maps.square().sum(), list(model.parameters()))
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(features.norm0.running_var, plain.norm0.running_var)


@pytest.mark.parametrize('name', ['conv0', 'norm0', 'relu0', 'pool0'])
def test_a_hook_in_the_stem_sees_what_it_sees_in_torchvision(name):
    seen = []
    for model in pair():
        model.features.get_submodule(name).register_forward_hook(
            lambda module, inputs, output: seen.append((inputs[0].shape, output.clone())))
        with torch.no_grad():
            model(images(2, 32))
    torch.testing.assert_close(*seen, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('efficient', [False, True])
def test_fx_and_feature_extraction_as_with_torchvision(training, efficient):
    theirs, ours = pair(training, efficient)
    assert get_graph_node_names(ours) == get_graph_node_names(theirs)
    x, nodes = images(4, 32), ['features.denseblock1.denselayer2.relu2', 'features.denseblock2.cat',
                               'features.transition1.conv', 'features.denseblock3.cat', 'flatten']
    extracted = [create_feature_extractor(model, nodes, suppress_diff_warning=True)(x)
                 for model in (ours, theirs)]
    torch.testing.assert_close(*extracted, rtol=1e-5, atol=1e-5)
    traced = torch.fx.symbolic_trace(ours)
    torch.testing.assert_close(traced(x), theirs(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('efficient', [False, True])
def test_hooks_on_relus_change_gradients_as_in_torchvision(training, efficient):
    gradients = []
    for model in pair(training, efficient):
        for module in model.modules():
            if isinstance(module, torch.nn.ReLU):  # guided backpropagation
                module.register_full_backward_hook(lambda m, into, out: (into[0].clamp(min=0),))
        x = images(4, 32).requires_grad_()
        model(x)[:, 0].sum().backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[0].abs().max().item())


def test_the_stem_can_be_replaced_for_grey_images():
    theirs, ours = pair(training=True)
    conv0 = torch.nn.Conv2d(1, 8, 7, stride=2, padding=3, bias=False)
    theirs.features.conv0 = ours.features.conv0 = conv0
    x = images(4, 32, channels=1)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)


def test_layers_and_transitions_can_replace_torchvisions():
    theirs, ours = pair()
    x = images(2, 8, channels=16)
    layers = [model.features.denseblock1.denselayer2 for model in (theirs, ours)]
    for features in (x[:, :12], [x[:, :12]], [x[:, :8], x[:, 8:12]]):
        torch.testing.assert_close(layers[1](features), layers[0](features))
    seen = []
    for model in (theirs, ours):  # as encoders of segmentation_models_pytorch do it
        maps = [x]
        for module in model.features.transition1:
            maps.append(module(maps[-1]))
        seen.append(maps)
    torch.testing.assert_close(*seen)


@pytest.mark.parametrize('prefix', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_loads_weights_saved_under_ddp_or_compile(prefix):
    model, other = small_net(), small_net()
    torch.nn.init.ones_(other.classifier.weight)
    saved = {prefix + key: value for key, value in model.state_dict().items()}
    other.load_state_dict(saved)
    assert all(key.startswith(prefix) for key in saved)  # the caller's own is left as it was
    torch.testing.assert_close(other.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_the_arguments_are_torchvisions():
    """In the same order, with the same defaults; the four others are keywords."""
    theirs, ours = (inspect.signature(cls).parameters.values()
                    for cls in (torchvision.models.DenseNet, densenet.DenseNet))
    ours = [(argument.name, argument.default, argument.kind) for argument in ours]
    known = [(argument.name, argument.default, argument.kind) for argument in theirs]
    assert ours[:len(known)] == known and len(ours) == len(known) + 4
    assert {kind for *_, kind in ours[len(known):]} == {inspect.Parameter.KEYWORD_ONLY}
    given = 8, (2, 3), 12, 2, 0.1, 5
    shapes = [{name: value.shape for name, value in cls(*given).state_dict().items()}
              for cls in (torchvision.models.DenseNet, densenet.DenseNet)]
    assert shapes[0] == shapes[1]


def test_loads_as_a_part_of_another_model():
    outer = torch.nn.ModuleDict({'backbone': small_net()})
    old = pre_2018(outer.state_dict())
    assert set(old) != set(outer.state_dict())
    outer.load_state_dict(old)
    with pytest.raises(RuntimeError, match='Unexpected key.*backbone.nonsense'):
        outer.load_state_dict({**old, 'backbone.nonsense': torch.zeros(1)})


# ---- as the paper has it ---------------------------------------------------------------------

def test_initialisation_is_that_of_the_official_code():
    torch.manual_seed(0)
    model = densenet_cifar(40, 24)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            k = module.kernel_size[0]
            std = math.sqrt(2 / (k * k * module.out_channels))
            n = module.weight.numel()
            # A sample's standard deviation is within 5 / sqrt(2n) of the true one, its mean
            # within 5 / sqrt(n), except by a chance of less than one in a million.
            assert abs(module.weight.std() / std - 1) < 5 / math.sqrt(2 * n), name
            assert abs(module.weight.mean()) < 5 * std / math.sqrt(n), name
        elif isinstance(module, torch.nn.BatchNorm2d):
            assert (module.weight == 1).all() and (module.bias == 0).all()
    assert (model.classifier.bias == 0).all()


@pytest.mark.parametrize('kwargs', [{}, {'bottleneck': False}, {'memory_efficient': True}])
def test_dropout_follows_every_convolution_but_the_first(kwargs, monkeypatch):
    model = small_net(drop_rate=0.25, **kwargs).train()
    convolved, dropped = [], []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, i, out, name=name: convolved.append((name, out)))
    dropout = F.dropout
    monkeypatch.setattr(F, 'dropout', lambda x, p, training: (dropped.append((x, p, training)),
                                                              dropout(x, p, training))[1])
    model(images())
    followed = [name for name, out in convolved if any(out is x for x, _, _ in dropped)]
    assert followed == [name for name, _ in convolved if name != 'features.conv0']
    assert {(p, training) for _, p, training in dropped} == {(0.25, True)}


@pytest.mark.parametrize('bottleneck, compression, width', [
    (True, 0.5, 48), (True, 1.0, 16), (False, 0.5, 16), (False, 1.0, 16)])
def test_stem_width(bottleneck, compression, width):
    model = densenet_cifar(22, 24, bottleneck=bottleneck, compression=compression)
    assert model.features.conv0.out_channels == width


def test_features_are_what_the_classifier_pools():
    model, x = small_net().eval(), images()
    feature_map = model.features(x)
    assert feature_map.shape == (4, model.classifier.in_features, 6, 6)
    logits = F.linear(feature_map.clamp(min=0).mean((2, 3)), *model.classifier.parameters())
    torch.testing.assert_close(model(x), logits)


# ---- arguments and inputs --------------------------------------------------------------------

@pytest.mark.parametrize('depth, bottleneck, nearest', [
    (99, True, '94 and 100'), (41, True, '40 and 46'), (5, True, 'nearest 10'),
    (41, False, '40 and 43'), (0, False, 'nearest 7'), (-3, True, 'nearest 10')])
def test_impossible_depths_name_the_nearest(depth, bottleneck, nearest):
    with pytest.raises(ValueError, match=nearest):
        densenet_cifar(depth, bottleneck=bottleneck)


@pytest.mark.parametrize('kwargs', [
    {'growth_rate': 0}, {'block_config': ()}, {'block_config': (2, 0)},
    {'num_init_features': -1}, {'bn_size': 0}, {'drop_rate': 1.0}, {'drop_rate': -0.1},
    {'drop_rate': math.nan}, {'num_classes': 0}, {'compression': 0.0}, {'compression': 1.5},
    {'compression': 0.01}, {'in_channels': 0}])
def test_arguments_out_of_range(kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        small_net(**kwargs)


@pytest.mark.parametrize('make', [
    lambda: small_net(), lambda: small_net(small_inputs=False), densenet.densenet121,
    lambda: small_net(block_config=(1, 1, 1, 1, 1), small_inputs=False)])
def test_smallest_images(make):
    model = make().eval()
    assert model(images(1, model.min_size)).shape[0] == 1
    with pytest.raises(ValueError, match=f'at least {model.min_size}'):
        model(images(1, model.min_size - 1))
    if len(model.features) == 12:  # torchvision's own limit, found by its pooling
        theirs = torchvision.models.densenet121().eval()
        theirs(images(1, model.min_size))
        with pytest.raises(RuntimeError, match='too small'):
            theirs(images(1, model.min_size - 1))


@pytest.mark.parametrize('shape, complaint', [
    ((3, 32, 32), 'expected images .N, C, H, W. .* not .3, 32, 32.'),
    ((1, 1, 32, 32), 'to have 3 channels, but got 1 channels'),
    ((1, 32, 32, 3), 'to have 3 channels, but got 32 channels')])
def test_images_of_another_shape(shape, complaint):
    model = small_net(block_config=(1, 1), small_inputs=True)
    with pytest.raises((ValueError, RuntimeError), match=complaint):
        model(torch.zeros(shape))


@pytest.mark.parametrize('channels, classes, size', [(1, 2, (9, 14)), (5, 17, (8, 8))])
def test_any_channels_classes_and_sizes(channels, classes, size):
    model = small_net(in_channels=channels, num_classes=classes)
    assert model(torch.randn(3, channels, *size)).shape == (3, classes)


# ---- PyTorch's tools for modules --------------------------------------------------------------

def test_needs_nothing_but_torch():
    tree = ast.parse(Path(densenet.__file__).read_text())
    imported = {name.split('.')[0] for node in ast.walk(tree)
                if isinstance(node, (ast.Import, ast.ImportFrom))
                for name in ([node.module] if isinstance(node, ast.ImportFrom)
                             else [alias.name for alias in node.names])}
    assert imported <= {'torch', *sys.stdlib_module_names}


@pytest.mark.parametrize('efficient', [False, True])
def test_compiled_gives_the_same_gradients_and_statistics(efficient):
    torch._dynamo.reset()
    model = small_net(memory_efficient=efficient).train()
    compiled = copy.deepcopy(model)
    compiled.compile(backend='aot_eager', fullgraph=True)  # Inductor would take minutes
    for net in (model, compiled):
        net(images()).square().sum().backward()
    torch.testing.assert_close([p.grad for p in compiled.parameters()],
                               [p.grad for p in model.parameters()], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.state_dict(), model.state_dict())


def test_exports_with_a_free_batch_size():
    model, x = small_net().eval(), images(3)
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim('n')},))
    torch.testing.assert_close(exported.module()(images(7)), model(images(7)))


def test_traces_without_freezing_the_size():
    model = small_net().eval()
    traced = torch.jit.trace(model, images(2, 12))
    torch.testing.assert_close(traced(images(3, 20)), model(images(3, 20)))


def test_autocast_runs_in_bf16_and_stays_close():
    model, x = small_net().eval(), images()
    with torch.autocast('cpu', torch.bfloat16):
        logits = model(x)
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits.float(), model(x), rtol=0.05, atol=0.05)


def test_channels_last_changes_only_the_layout():
    model, x = small_net().eval(), images()
    truth = model(x)
    model.to(memory_format=torch.channels_last)
    feature_map = model.features(x)
    assert feature_map.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(model(x), truth)


def test_copies_and_pickles():
    model, x = small_net(memory_efficient=True).eval(), images()
    twin = copy.deepcopy(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = small_net()
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for other in (twin, loaded.eval()):
        torch.testing.assert_close(other(x), model(x), rtol=0, atol=0)


def test_per_sample_gradients_by_torch_func():
    model, x, y = small_net().double().eval(), images(3, dtype=torch.float64), torch.arange(3)
    weights = dict(model.named_parameters())

    def loss(weights, image, label):
        logits = torch.func.functional_call(model, weights, (image[None],))
        return F.cross_entropy(logits, label[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weights, x, y)
    F.cross_entropy(model(x), y).backward()
    torch.testing.assert_close({k: g.mean(0) for k, g in each.items()},
                               {k: p.grad for k, p in model.named_parameters()})


def test_gradients_agree_with_finite_differences():
    model = small_net(memory_efficient=True).double().train()
    assert torch.autograd.gradcheck(model, images(2, 4, torch.float64).requires_grad_(),
                                    atol=1e-6)


@pytest.mark.parametrize('efficient', [False, True])
def test_hooks_on_inner_modules_see_gradients(efficient):  # Grad-CAM and its like
    model, seen = small_net(memory_efficient=efficient).train(), []
    for name, module in model.named_modules():
        if isinstance(module, (torch.nn.BatchNorm2d, torch.nn.Conv2d)):
            module.register_full_backward_hook(lambda m, i, o, name=name: seen.append(name))
    model(images()).sum().backward()
    assert {name for name in seen} >= {'features.norm5', 'features.denseblock2.denselayer3.conv2'}


def train_twice(model, dtype=torch.float64):
    """Outputs, gradients and buffers of two training passes, from the same random state."""
    model.to(dtype).train()
    torch.manual_seed(3)
    x = images(4, 12, dtype).to(model.classifier.weight.device).requires_grad_()
    outputs = [model(x), model(2 * x)]
    sum(output.square().sum() for output in outputs).backward()
    return outputs, [x.grad] + [p.grad for p in model.parameters()], dict(model.named_buffers())


@pytest.mark.cuda
@pytest.mark.parametrize('efficient', [False, True])
def test_cuda_agrees_with_the_cpu(efficient):
    cpu = small_net(memory_efficient=efficient, drop_rate=0.0)
    gpu = copy.deepcopy(cpu).cuda().to(memory_format=torch.channels_last)
    torch.testing.assert_close(train_twice(gpu), train_twice(cpu), rtol=1e-9, atol=1e-9,
                               check_device=False)
