"""Fused dense blocks against plain ones, in float64; when they run layer by layer, and why."""

import copy
import io
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint_sequential

from densenet import DenseBlock, DenseNet, Transition, densenet_cifar
from fused_dense_block import eager, fuse, unfuse

LAYOUTS = {'nchw': torch.contiguous_format, 'channels_last': torch.channels_last}


# The ways to train: whether fused, and memory_efficient.
WAYS = {'plain': (False, False), 'checkpointed': (False, True), 'fused': (True, False),
        'efficient': (True, True)}


def fuse_eager(model):
    return fuse(model, kernels=False)


def path_of(module):
    return getattr(module, 'path', 'plain')


def make_block(way='fused', *, bottleneck=True, drop_rate=0.0, momentum=0.1):
    """Four layers whose norms have weights of both signs, and a zero."""
    torch.manual_seed(0)
    fused, efficient = WAYS[way]
    block = DenseBlock(4, 6, 4, 2, drop_rate, bottleneck, efficient).double().train()
    for name, module in block.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-3
            module.momentum = momentum if momentum is None or 'norm1' in name else 0.3
            nn.init.uniform_(module.weight, -1, 1)
            nn.init.normal_(module.bias)
            nn.init.zeros_(module.weight[:1])
    return fuse_eager(block) if fused else block


def block_input(layout='nchw'):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, 5, 7, dtype=torch.float64, generator=generator) + 3
    return x.to(memory_format=LAYOUTS[layout])


def steps(block, x, count=2):
    """Outputs, input and parameter gradients of some SGD steps, and the state after them."""
    torch.manual_seed(2)
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    seen = []
    for step in range(count):
        x_here = (x * (step + 1)).requires_grad_()
        optimizer.zero_grad()
        output = block(x_here)
        weights = torch.linspace(-1, 1, output.shape[1], dtype=x.dtype, device=x.device)
        weights = weights[:, None, None]
        (output.square() + weights * output).mean().backward()
        seen.append([output.detach(), x_here.grad, *(p.grad for p in block.parameters())])
        optimizer.step()
    return seen, block.state_dict()


@pytest.mark.parametrize('way', ['fused', 'efficient', 'checkpointed'])
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('bottleneck, drop_rate, momentum', [
    (True, 0.0, 0.1), (True, 0.2, None), (False, 0.0, None), (False, 0.2, 0.1)])
def test_equals_plain(bottleneck, drop_rate, momentum, layout, way):
    settings = dict(bottleneck=bottleneck, drop_rate=drop_rate, momentum=momentum)
    plain, block = make_block('plain', **settings), make_block(way, **settings)
    truth, results = steps(plain, block_input(layout)), steps(block, block_input(layout))
    assert path_of(block) == ('eager' if WAYS[way][0] else 'plain')
    torch.testing.assert_close(results, truth, rtol=1e-9, atol=1e-11)
    output = results[0][0][0]
    assert output.is_contiguous(memory_format=LAYOUTS[layout])
    counters = [value for name, value in results[1].items() if name.endswith('tracked')]
    assert counters and all(counter == 2 for counter in counters)  # recomputed or not
    assert block.denselayer1.norm1.momentum == momentum


def test_checkpointing_computes_again_in_backward():
    block, calls = make_block('checkpointed'), []
    block.denselayer3.norm1.register_forward_hook(lambda *_: calls.append(1))
    output = block(block_input())
    assert len(calls) == 1
    output.sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize('way', ['fused', 'efficient'])
@pytest.mark.parametrize('bottleneck', [True, False])
def test_gradients_by_finite_differences(bottleneck, way):
    block = make_block(way, bottleneck=bottleneck, drop_rate=0.2)
    names, parameters = zip(*block.named_parameters())

    def function(x, *values):
        torch.manual_seed(3)  # the same dropout each time
        output = torch.func.functional_call(block, dict(zip(names, values)), x)
        assert block.path == 'eager'
        return output

    x = block_input()[:2, :, :2, :2].clone().requires_grad_()
    inputs = (x, *(parameter.detach().requires_grad_() for parameter in parameters))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize('way', ['fused', 'efficient'])
@pytest.mark.parametrize('part', ['block', 'transition'])
def test_second_derivatives_are_an_error_that_names_unfuse(way, part):
    def penalty_gradients(module):
        x = block_input().requires_grad_()
        gradient, = torch.autograd.grad(module(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), [x, *module.parameters()],
                                   allow_unused=True)

    make = (lambda way: make_block(way)) if part == 'block' else (lambda way: make_transition())
    module = make(way)
    with pytest.raises(RuntimeError, match='fused_dense_block.unfuse'):
        penalty_gradients(module)
    plain = make_block('plain') if part == 'block' else unfuse(make_transition())
    torch.testing.assert_close(penalty_gradients(unfuse(module)), penalty_gradients(plain),
                               rtol=1e-9, atol=1e-9)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, DenseBlock)]


def paths(model):
    return {path_of(block) for block in blocks_of(model)}


def net(way, depth=22, **kwargs):
    torch.manual_seed(0)
    fused, efficient = WAYS[way]
    model = densenet_cifar(depth, 12, memory_efficient=efficient, **kwargs).train()
    return fuse_eager(model) if fused else model


def batch(n=4, size=16, dtype=torch.float32):
    generator = torch.Generator().manual_seed(5)
    return (torch.randn(n, 3, size, size, dtype=dtype, generator=generator),
            torch.arange(n) % 10)


@pytest.mark.parametrize('way', ['fused', 'efficient', 'checkpointed'])
def test_ten_sgd_steps_end_with_the_same_weights(way):
    finals = []
    for model in (net('plain', 40), net(way, 40)):
        model.double()
        images, labels = batch(dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True,
                                    weight_decay=1e-4)
        for step in range(10):
            optimizer.zero_grad()
            F.cross_entropy(model(images.roll(step, 3)), labels).backward()
            optimizer.step()
        finals.append(model.state_dict())
    assert paths(model) == {'eager' if WAYS[way][0] else 'plain'}
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('way', ['fused', 'efficient'])
@pytest.mark.parametrize('device, dtype', [
    ('cpu', torch.bfloat16),
    pytest.param('cuda', torch.bfloat16, marks=pytest.mark.cuda),
    pytest.param('cuda', torch.float16, marks=pytest.mark.cuda)])
def test_low_precision_gradients_are_as_close_to_float64_as_the_plain_ones(way, device, dtype):
    def gradients(model, images, autocast):
        model.to(device, memory_format=torch.channels_last)
        with torch.autocast(device, dtype, enabled=autocast):
            logits = model(images.to(device))
        F.cross_entropy(logits, labels.to(device)).backward()
        return torch.cat([p.grad.flatten().double().cpu() for p in model.parameters()])

    images, labels = batch(16)
    truth = gradients(net('plain').double(), images.double(), False)
    error = {}
    for name in ('plain', way):
        model = net(name)
        error[name] = (gradients(model, images, True) - truth).norm() / truth.norm()
    assert paths(model) == {'eager'}
    assert 0 < error[way] <= 1.1 * error['plain']


@pytest.mark.parametrize('way', ['fused', 'efficient'])
def test_fp16_gradients_of_large_numbers_are_as_close_to_float64_as_the_plain_ones(way):
    def gradients(name, autocast):
        block = make_block(name)
        x = (300 * torch.randn(4, 6, 8, 8, generator=torch.Generator().manual_seed(1))).half()
        x = (x if autocast else x.double()).requires_grad_()
        with torch.autocast('cpu', torch.float16, enabled=autocast):
            output = (block.float() if autocast else block)(x)
        grad = 300 * torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
        output.backward(grad.half().to(output.dtype))
        assert path_of(block) == ('eager' if WAYS[name][0] else 'plain')
        return torch.cat([value.grad.double().flatten() for value in (x, *block.parameters())])

    truth = gradients('plain', False)
    errors = {name: (gradients(name, True) - truth).norm() for name in ('plain', way)}
    assert 0 < errors[way] <= 1.1 * errors['plain']  # so both are finite


@pytest.mark.parametrize('way', ['fused', 'efficient'])
def test_backward_within_autocast_stays_in_the_precision_of_forward(way):
    gradients = []
    for enabled in (False, True):
        block, x = make_block(way).float(), block_input().float()
        output = block(x)
        with torch.autocast('cpu', torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(output.square().sum(), list(block.parameters())))
    torch.testing.assert_close(*gradients)


def test_a_mean_far_from_zero_costs_no_more_digits_than_in_the_plain_block():
    x = block_input().float() + 100
    exact = make_block('plain')(x.double())
    errors = [(make_block(way).float()(x).double() - exact).norm() for way in ('fused', 'plain')]
    assert errors[0] < 2 * errors[1]


# ---- which way -------------------------------------------------------------------------------

@pytest.mark.parametrize('efficient', [False, True])
def test_training_on_the_cpu_is_fused_in_all_modes_of_autograd(efficient):
    model = fuse_eager(densenet_cifar(10, 4, memory_efficient=efficient))
    assert paths(model) == {None}
    images, _ = batch()
    for context in (torch.enable_grad(), torch.no_grad(), torch.inference_mode(),
                    torch.autocast('cpu', torch.bfloat16)):
        with context:
            model.train()(images)
            assert paths(model) == {'eager'}, [block.reason for block in blocks_of(model)]
    for p in list(model.parameters())[::3]:
        p.requires_grad = False
    model.to(memory_format=torch.channels_last)(images).sum().backward()
    assert paths(model) == {'eager'}


def replace_norm(block):
    block.denselayer2.norm1 = nn.GroupNorm(2, 10).double()


def replace_layer(block):
    layer = nn.Sequential(nn.Identity())
    layer.forward = lambda features: features[0][:, :4]
    block.denselayer2 = layer


def replace_conv(block):
    block.denselayer2.conv1 = nn.Sequential(block.denselayer2.conv1)


def dilate(block):
    block.denselayer2.conv2.dilation = block.denselayer2.conv2.padding = (2, 2)


def patch_forward(block):
    conv = block.denselayer3.conv1
    conv.forward = lambda x: 2 * F.conv2d(x, conv.weight)


def add_bias(block):
    block.denselayer2.conv1.bias = nn.Parameter(torch.ones(8, dtype=torch.float64))


def stop_dropout_of_one_layer(block):
    block.denselayer2.training = False


def group_conv(block):
    conv = nn.Conv2d(8, 4, 3, padding=1, groups=2, bias=False).double()
    nn.init.ones_(conv.weight)
    block.denselayer3.conv2 = conv


def backward_pre_hook(block):
    block.denselayer1.conv2.register_full_backward_pre_hook(lambda module, out: (3 * out[0],))


TRANSFORM = 'torch.func or forward-mode differentiation'
CHANGES = {  # after fuse, by the reason that the block then gives
    'denselayer2.norm1 is a GroupNorm': replace_norm,
    'denselayer2 has the children 0 instead of norm1, relu1, conv1': replace_layer,
    'denselayer2.conv1 is a Sequential': replace_conv,
    'denselayer3.relu2 is a LeakyReLU':
        lambda block: setattr(block.denselayer3, 'relu2', nn.LeakyReLU()),
    'denselayer2.conv2.dilation is not (1, 1)': dilate,
    'denselayer2.conv1.bias is not None': add_bias,
    'denselayer3.conv2.groups is not 1': group_conv,
    "denselayer1.conv2.padding_mode is not zeros":
        lambda block: setattr(block.denselayer1.conv2, 'padding_mode', 'circular'),
    'denselayer3.conv1 has hooks or a forward of its own': patch_forward,
    'denselayer2.conv2 is a ParametrizedConv2d':
        lambda block: parametrizations.weight_norm(block.denselayer2.conv2),
    'denselayer2.conv1 has hooks or a forward of its own':
        lambda block: block.denselayer2.conv1.register_forward_hook(
            lambda module, inputs, output: 2 * output),
    'denselayer2.norm2 has hooks or a forward of its own':
        lambda block: block.denselayer2.norm2.register_full_backward_hook(
            lambda module, into, out: (2 * into[0],)),
    'denselayer1.conv2 has hooks or a forward of its own': backward_pre_hook,
    'denselayer2 has hooks or a forward of its own':
        lambda block: block.denselayer2.register_forward_pre_hook(
            lambda module, inputs: ([inputs[0][0] * 2, *inputs[0][1:]],)),
    'denselayer2.norm2.training is not True': lambda block: block.denselayer2.norm2.eval(),
    'denselayer2.training is not True': stop_dropout_of_one_layer,
    'denselayer4.norm1.affine is not True': lambda block: setattr(
        block.denselayer4, 'norm1', nn.BatchNorm2d(18, affine=False).double()),
    'denselayer4.norm2.track_running_stats is not True': lambda block: setattr(
        block.denselayer4, 'norm2', nn.BatchNorm2d(8, track_running_stats=False).double()),
}


@pytest.mark.parametrize('reason', CHANGES)
@pytest.mark.parametrize('way', ['fused', 'efficient'])
def test_changed_blocks_fall_back_and_are_right(reason, way):
    changed, plain = make_block(way, drop_rate=0.2), make_block('plain', drop_rate=0.2)
    CHANGES[reason](changed)
    CHANGES[reason](plain)
    torch.testing.assert_close(steps(changed, block_input()), steps(plain, block_input()),
                               rtol=1e-9, atol=1e-11)
    assert (changed.path, changed.reason) == ('layers', reason)


def test_global_hooks_and_transforms_use_the_plain_path():
    block, x = make_block(), block_input()
    called = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    block(x)
    handle.remove()
    assert (block.path, block.reason) == ('layers', 'global module hooks')
    assert len(called) > 16

    torch.func.replace_all_batch_norm_modules_(block)  # it can't have running statistics
    value, tangent = torch.func.jvp(block, (x,), (torch.ones_like(x),))
    assert (block.path, block.reason) == ('layers', TRANSFORM)
    step = 1e-6
    difference = (block(x + step) - block(x - step)) / (2 * step)
    torch.testing.assert_close(tangent, difference, rtol=1e-4, atol=1e-6)

    with torch.autograd.forward_ad.dual_level():
        output = block(torch.autograd.forward_ad.make_dual(x, torch.ones_like(x)))
        assert block.reason == TRANSFORM
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(output).tangent, tangent)


def test_layers_may_differ_in_eps_and_dropout():
    blocks = [make_block('plain', drop_rate=0.2), make_block('fused', drop_rate=0.2)]
    for block in blocks:
        block.denselayer2.norm1.eps = 0.1
        block.denselayer3.drop_rate = 0.4
        block.denselayer4.drop_rate = 0.0
    truth, results = (steps(block, block_input()) for block in blocks)
    assert blocks[1].path == 'eager'
    torch.testing.assert_close(results, truth, rtol=1e-9, atol=1e-11)


def test_other_precisions_use_the_plain_path():
    block, x = make_block().bfloat16(), block_input().bfloat16()
    block(x)
    assert block.path == 'layers' and 'torch.bfloat16' in block.reason
    block.float()
    with torch.autocast('cpu', torch.bfloat16):
        assert block(x.float()).dtype == torch.float32  # the concatenation keeps the wider one
    assert block.path == 'layers'


def test_a_single_value_per_channel_raises_the_norms_error():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        make_block()(block_input()[:1, :, :1, :1])


def test_a_wrong_number_of_channels_raises_the_norms_error():
    block = make_block()
    with pytest.raises(RuntimeError, match='running_mean should contain 5 elements'):
        block(block_input()[:, :5])
    assert block.reason == 'an input of 5 channels instead of 6'


def test_a_convolution_that_changes_the_size_raises_the_plain_error():
    block = make_block()
    block.denselayer4.conv2 = nn.Conv2d(8, 4, 2, padding=1, bias=False).double()
    with pytest.raises(RuntimeError, match='Sizes of tensors must match'):
        block(block_input())
    assert block.path == 'layers'
    assert block.reason == 'denselayer4.conv2 is not a 3x3 convolution with padding 1'


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    results = []
    for way in ('plain', 'fused'):
        block = make_block(way)
        for p in itertools.chain(block.denselayer1.parameters(), [block.denselayer3.conv1.weight]):
            p.requires_grad = False
        block(block_input()).square().sum().backward()
        assert block.denselayer3.conv1.weight.grad is None
        results.append([p.grad for p in block.parameters() if p.requires_grad])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


def test_training_without_grad_counts_the_batch_and_keeps_nothing():
    blocks = [make_block('plain'), make_block('fused')]
    for block in blocks:
        with torch.no_grad():
            assert block(block_input()).grad_fn is None
    torch.testing.assert_close(blocks[1].state_dict(), blocks[0].state_dict())


@pytest.mark.parametrize('way', ['fused', 'efficient'])
def test_batched_gradients_are_an_error(way):
    x = block_input().requires_grad_()
    for module in (make_block(way), make_transition()):
        output = module(x)
        assert module.path == 'eager'
        grads = torch.randn(3, *output.shape, dtype=x.dtype)
        with pytest.raises(RuntimeError, match='vmap|Batching rule not implemented'):
            torch.autograd.grad(output, x, grads, is_grads_batched=True)


@pytest.mark.parametrize('way', ['fused', 'efficient'])
def test_inside_torchs_checkpoint_the_statistics_equal_the_plain_ones(way):
    buffers = []
    for name in ('plain', way):
        model, (images, _) = net(name, 10).double(), batch(dtype=torch.float64)
        checkpoint_sequential(model.features, 2, images, use_reentrant=False).sum().backward()
        buffers.append(dict(model.named_buffers()))
    torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-11)


def test_each_norm_averages_over_its_own_batches():
    buffers = []
    for way in ('plain', 'fused'):
        block = make_block(way, momentum=None)
        block.denselayer2.eval()
        block(block_input())
        block.train()(block_input() + 1)
        buffers.append(dict(block.named_buffers()))
    assert block.path == 'eager'
    torch.testing.assert_close(*buffers, rtol=1e-9, atol=1e-11)


def test_changing_the_dropout_rate_before_backward_has_no_effect():
    gradients = []
    for way in ('plain', 'fused'):
        block = make_block(way, drop_rate=0.3)
        torch.manual_seed(6)
        output = block(block_input())
        for layer in block.values():
            layer.drop_rate = 0.0
        gradients.append(torch.autograd.grad(output.sum(), list(block.parameters())))
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-9)


def test_a_forward_that_fails_counts_nothing(monkeypatch):
    block, calls, norm_relu_conv = make_block(), [], eager.norm_relu_conv
    before = copy.deepcopy(block.state_dict())

    def fail_at_the_last(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise RuntimeError('out of memory')
        return norm_relu_conv(*args, **kwargs)

    monkeypatch.setattr(eager, 'norm_relu_conv', fail_at_the_last)
    with pytest.raises(RuntimeError, match='out of memory'):
        block(block_input())
    for name, value in block.state_dict().items():
        if 'norm1' in name or name.endswith('tracked'):
            torch.testing.assert_close(value, before[name], rtol=0, atol=0)


# ---- transitions -----------------------------------------------------------------------------

def make_transition(fused=True, drop_rate=0.0):
    """A transition; it is fused within a network only, so beside a block."""
    torch.manual_seed(0)
    transition = Transition(6, 3, drop_rate).double()
    nn.init.uniform_(transition.norm.weight, -1, 1)
    nn.init.normal_(transition.norm.bias)
    if fused:
        fuse_eager(nn.Sequential(make_block('plain'), transition))
    return transition


@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('size', [(4, 6), (5, 7)])
def test_a_transition_equals_its_modules_in_their_order(size, layout):
    x = block_input(layout)[..., :size[0], :size[1]]
    modules = nn.Sequential(*make_transition(False))
    truth = steps(modules, x)
    transition = make_transition()
    results, state = steps(transition, x)
    assert transition.path == 'eager'
    torch.testing.assert_close(results, truth[0], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close([*state.values()], [*truth[1].values()], rtol=1e-9, atol=1e-11)
    transition.eval()
    torch.testing.assert_close(transition(x), modules.eval()(x), rtol=1e-9, atol=1e-11)
    assert transition.path == 'pooled first' and 'gradients' in transition.reason


def test_gradients_of_a_transition_by_finite_differences():
    transition = make_transition()
    names, parameters = zip(*transition.named_parameters())

    def function(x, *values):
        output = torch.func.functional_call(transition, dict(zip(names, values)), x)
        assert transition.path == 'eager'
        return output

    inputs = (block_input()[:2, :, :4, :4].clone().requires_grad_(),
              *(parameter.detach().requires_grad_() for parameter in parameters))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize('name', ['conv', 'pool'])
def test_hooks_in_a_transition_see_the_same_as_in_torchvision(name):
    transition, x, seen = make_transition(), block_input(), []
    getattr(transition, name).register_forward_hook(lambda module, inputs, _: seen.append(inputs))
    transition(x)
    assert transition.path == 'layers'
    truth = F.relu(nn.functional.batch_norm(x, None, None, transition.norm.weight,
                                            transition.norm.bias, training=True))
    if name == 'pool':
        truth = transition.conv(truth)
    torch.testing.assert_close(seen, [(truth,)], rtol=1e-12, atol=1e-12)


def test_dropout_of_a_transition_is_between_convolution_and_pooling():
    transition = make_transition(drop_rate=0.4)
    x = torch.randn(2, 6, 4, 6, dtype=torch.float64)
    torch.manual_seed(7)
    truth = F.avg_pool2d(F.dropout(transition.conv(F.relu(transition.norm(x))), 0.4), 2)
    torch.manual_seed(7)
    torch.testing.assert_close(transition(x), truth, rtol=1e-13, atol=1e-14)
    assert transition.reason == 'dropout between convolution and pooling'


# ---- PyTorch's tools for modules --------------------------------------------------------------

@pytest.mark.parametrize('way', ['fused', 'efficient'])
def test_compiled_training_equals_fused(way):
    torch._dynamo.reset()
    block = make_block(way)
    compiled = copy.deepcopy(block)
    compiled.compile(backend='aot_eager', fullgraph=True)
    truth, results = steps(block, block_input()), steps(compiled, block_input())
    assert (block.path, compiled.path) == ('eager', 'layers')
    torch.testing.assert_close(results, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize('training', [False, True])
def test_exported_equals_fused(training):
    model, (images, _) = net('fused', 10).train(training), batch()
    exported = torch.export.export(copy.deepcopy(model), (images,))
    torch.testing.assert_close(exported.module()(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings('ignore')  # the exporters warn of their own future
def test_onnx_export_gives_the_same_logits(tmp_path):
    onnxruntime = pytest.importorskip('onnxruntime')
    model, (images, _) = net('fused', 10), batch()
    with torch.no_grad():
        for _ in range(3):
            model(images)  # running statistics of fused blocks
    path = str(tmp_path / 'densenet.onnx')
    torch.onnx.export(model.eval(), (images,), path)
    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), model(images), rtol=1e-3, atol=1e-4)


def test_copies_and_whole_pickles_are_independent_and_fused():
    model, (images, labels) = net('fused', 10), batch()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    gradients = []
    for twin in (model, copy.deepcopy(model), torch.load(file, weights_only=False)):
        F.cross_entropy(twin(images), labels).backward()
        gradients.append([p.grad for p in twin.parameters()])
        assert paths(twin) == {'eager'}
    torch.testing.assert_close(gradients[1], gradients[0], rtol=0, atol=0)
    torch.testing.assert_close(gradients[2], gradients[0], rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.parametrize('layout', LAYOUTS)
@pytest.mark.parametrize('bottleneck', [True, False])
def test_fused_on_cuda_equals_plain_on_the_cpu(bottleneck, layout):
    plain = make_block('plain', bottleneck=bottleneck)
    fused = make_block('efficient', bottleneck=bottleneck).cuda()
    truth, results = steps(plain, block_input(layout)), steps(fused, block_input(layout).cuda())
    assert fused.path == 'eager'
    torch.testing.assert_close(results, truth, rtol=1e-9, atol=1e-9, check_device=False)


@pytest.mark.cuda
def test_on_cuda_memory_efficient_blocks_are_fused():
    images, _ = batch()
    for efficient in (False, True):
        model = DenseNet(4, (2, 2), 8, memory_efficient=efficient, small_inputs=True).cuda()
        fuse(model)(images.cuda())
        assert paths(model) == {'eager' if efficient else 'layers'}
        reasons = {block.reason for block in blocks_of(model)}
        assert reasons == {None} if efficient else 'memory_efficient' in str(reasons)
        assert math.isfinite(sum(p.sum().item() for p in model.parameters()))
