"""The Triton kernels against float64: on a GPU for real, elsewhere under Triton's interpreter."""

import contextlib
import functools
import importlib
import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.distributed
import torch.nn.functional as F
from conftest import ROOT
from torch import nn

import densenet
import flags
import train
from densenet import DenseBlock, densenet_cifar
from memory import Allocations

triton = pytest.importorskip('triton', reason='Triton is not made for this machine')
kernels = pytest.importorskip('densenet_triton')

pytestmark = pytest.mark.usefixtures('working_kernels')
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
HALF = torch.bfloat16


@pytest.fixture(autouse=True)
def round_to_nearest(monkeypatch):
    """The interpreter rounds bf16 towards zero, a GPU to the nearest."""
    if DEVICE == 'cuda':
        return
    interpreter = importlib.import_module('triton.runtime.interpreter')
    convert = interpreter._convert_float

    def convert_as_gpus_do(values, source, target, mode):
        if (source, target) != (triton.language.float32, triton.language.bfloat16):
            return convert(values, source, target, mode)
        rounded = torch.from_numpy(np.ascontiguousarray(values)).view(torch.float32).bfloat16()
        return rounded.view(torch.int16).numpy()

    monkeypatch.setattr(interpreter, '_convert_float', convert_as_gpus_do)


@pytest.fixture(autouse=True)
def exact_library(monkeypatch):
    """Convolutions of cuDNN have the same bits each time and, in fp32, all of fp32's digits."""
    for name, value in dict(deterministic=True, benchmark=False, allow_tf32=False).items():
        monkeypatch.setattr(torch.backends.cudnn, name, value)


def new_maps(n, c, h, w, dtype=torch.float32):
    """Maps full of NaN: what a kernel leaves unwritten, or reads too much, is seen."""
    maps = kernels.new_maps(torch.empty(n, 1, h, w, dtype=dtype, device=DEVICE), c)
    for tensor in maps[:4]:
        tensor.fill_(torch.nan)
    return maps


def random_maps(n, c, h, w, unused=0, mean=2.0):
    """Maps of random numbers with their statistics; the last channels are `unused`: NaN."""
    maps = new_maps(n, c + unused, h, w)
    x = torch.randn(n, c, h, w, device=DEVICE) + mean * torch.randn(c, 1, 1, device=DEVICE)
    maps.data[:, :c] = x
    maps.mean[:c] = x.mean((0, 2, 3))
    maps.invstd[:c] = (x.var((0, 2, 3), correction=0) + 1e-5).rsqrt()
    return maps


def random_half(c, out, side, unit, fused):
    kernel = torch.randn(out, c, side, side, device=DEVICE) / (c * side * side) ** 0.5
    return kernels.Half(torch.randn(c, device=DEVICE), torch.randn(c, device=DEVICE),
                        kernel.contiguous(memory_format=torch.channels_last), 1e-5, unit, fused)


def conv_of(x, mean, invstd, weight, bias, kernel):
    """conv(relu(norm(x))), norm's statistics taken for constants."""
    channel = lambda vector: vector.view(-1, 1, 1)
    y = (x - channel(mean)) * channel(invstd * weight) + channel(bias)
    return F.conv2d(y.relu(), kernel, padding=kernel.shape[-1] // 2)


def assert_close(found, truth, tolerance=2e-5):
    assert found.shape == truth.shape
    assert (found.double() - truth).norm() <= tolerance * truth.norm(), 'or NaN'


@pytest.fixture
def sanitizer(monkeypatch):
    if DEVICE == 'cpu':
        from sanitizer import Sanitizer  # of the interpreter, which is not there on a GPU
        Sanitizer(monkeypatch)


watched = pytest.mark.usefixtures('sanitizer')

# Images; channels read, of so many; channels written, of so many; what divides all of these.
SHAPES = [((3, 5, 7), (1, 1), (1, 1), 1),
          ((1, 1, 2), (3, 5), (2, 3), 1),
          ((1, 3, 43), (12, 24), (12, 24), 4),       # 129 rows: tiles of 128 and of one row
          ((2, 9, 5), (200, 212), (40, 40), 4),
          ((1, 13, 5), (150, 342), (12, 342), 2),    # 65 rows
          ((4, 2, 2), (64, 96), (32, 96), 8),
          ((1, 1, 33), (40, 40), (160, 160), 8)]     # 33 rows, two programs for the channels
FUSED = pytest.mark.parametrize('fused', [False, True])


@watched
@FUSED
@pytest.mark.parametrize('side', [1, 3])
@pytest.mark.parametrize('images, ins, outs, unit', SHAPES)
def test_forward_of_half_a_layer(images, ins, outs, unit, side, fused):
    torch.manual_seed(0)
    n, h, w = images
    (c, channels), (out, out_channels), start = ins, outs, outs[1] - outs[0]
    x = random_maps(n, c, h, w, unused=channels - c)
    y = new_maps(n, out_channels, h, w)
    half = random_half(c, out, side, unit, fused)
    kernels.forward_half(half, x, y, start)
    truth = conv_of(*(tensor.double() for tensor in (
        x.data[:, :c], x.mean[:c], x.invstd[:c], half.weight, half.bias, half.kernel)))
    assert_close(y.data[:, start:], truth)
    assert_close(y.mean[start:], truth.mean((0, 2, 3)))
    assert_close(y.var[start:], truth.var((0, 2, 3)))
    assert_close(y.invstd[start:], (truth.var((0, 2, 3), correction=0) + 1e-5).rsqrt())
    assert all(tensor[:start].isnan().all() for tensor in (y.mean, y.var, y.invstd))
    assert y.data[:, :start].isnan().all()


@watched
@FUSED
@pytest.mark.parametrize('accumulate', [False, True])
@pytest.mark.parametrize('side', [1, 3])
@pytest.mark.parametrize('images, ins, outs, unit', SHAPES)
def test_backward_of_half_a_layer(images, ins, outs, unit, side, accumulate, fused):
    torch.manual_seed(0)
    n, h, w = images
    (c, channels), (out, out_channels), start = ins, outs, outs[1] - outs[0]
    if fused and side * side * out > kernels.MAX_COLUMNS:
        pytest.skip('too wide for the kernel: the library convolves')
    vectors = lambda size: torch.randn(2, size, device=DEVICE)
    x = random_maps(n, c, h, w, unused=channels - c)
    before = torch.randn(n, channels, h, w, device=DEVICE).contiguous(
        memory_format=torch.channels_last)
    a, b = vectors(channels)
    x = x._replace(grad=before.clone(memory_format=torch.preserve_format), a=a.clone(),
                   b=b.clone())
    y = random_maps(n, out_channels, h, w)
    a_of_y, b_of_y = vectors(out_channels)
    y = y._replace(grad=torch.randn_like(y.data), a=a_of_y, b=b_of_y)
    half = random_half(c, out, side, unit, fused)
    found = kernels.backward_half(half, x, y, start, accumulate)

    inputs = [tensor.detach().double() for tensor in (
        x.data[:, :c], x.mean[:c], x.invstd[:c], half.weight, half.bias, half.kernel)]
    channel = lambda vector: vector[start:].double().view(-1, 1, 1)
    rest = channel(y.a) + (y.data[:, start:] - channel(y.mean)) * channel(y.b)
    g = y.grad[:, start:] - rest / (n * h * w)
    for i in (0, 3, 4, 5):
        inputs[i].requires_grad_()
    dx, *truth = torch.autograd.grad(conv_of(*inputs), [inputs[i] for i in (0, 3, 4, 5)], g)
    for result, expected in zip(found, truth):
        assert_close(result, expected)
    s, r = (half.weight * x.invstd[:c]).double(), x.invstd[:c].double()
    share = float(accumulate)
    assert_close(x.grad[:, :c], share * before[:, :c] + dx)
    assert_close(x.a[:c], share * a[:c] + s * truth[1])
    assert_close(x.b[:c], share * b[:c] + s * r * truth[0])
    assert torch.equal(x.grad[:, c:], before[:, c:])
    assert torch.equal(x.a[c:], a[c:]) and torch.equal(x.b[c:], b[c:])


@FUSED
def test_a_mean_far_from_zero_costs_the_norm_no_digits(fused):
    torch.manual_seed(0)
    x, y = random_maps(2, 12, 5, 7, mean=3000.0), new_maps(2, 4, 5, 7)
    half = random_half(12, 4, 1, 4, fused)
    kernels.forward_half(half, x, y, 0)
    assert_close(y.data, conv_of(*(tensor.double() for tensor in (
        x.data, x.mean, x.invstd, half.weight, half.bias, half.kernel))))


@watched
@pytest.mark.parametrize('n, c, h, w, unit', [(1, 1, 1, 2, 1), (1, 200, 3, 43, 8), (2, 5, 8, 8, 1)])
def test_statistics_keep_their_digits_where_the_mean_is_far_from_zero(n, c, h, w, unit):
    torch.manual_seed(0)
    maps = new_maps(n, c + 8, h, w)
    x = torch.randn(n, c, h, w, device=DEVICE) + 1000
    kernels.copy(x.contiguous(memory_format=torch.channels_last), maps, 8, 1e-5, unit)
    assert torch.equal(maps.data[:, 8:], x)
    assert_close(maps.mean[8:], x.double().mean((0, 2, 3)), 1e-6)
    assert_close(maps.var[8:], x.double().var((0, 2, 3)), 1e-4)


def test_statistics_of_more_tiles_than_are_merged_at_once():
    torch.manual_seed(0)
    x = torch.randn(1, 2, 257, 257, device=DEVICE) + 1
    x += torch.linspace(-3, 3, 257, device=DEVICE)[:, None]  # the tiles' means differ
    x = x.contiguous(memory_format=torch.channels_last)
    maps = new_maps(*x.shape)
    kernels.copy(x, maps, 0, 1e-5, 2)
    assert_close(maps.mean, x.double().mean((0, 2, 3)))
    assert_close(maps.var, x.double().var((0, 2, 3)))


@watched
def test_backward_in_more_splits_than_are_added_up_at_once(monkeypatch):
    monkeypatch.setattr(kernels, 'num_processors', lambda device: 132)
    test_backward_of_half_a_layer((4, 12, 13), (3, 4), (2, 2), 1, 3, True, True)


@watched
def test_gradient_of_some_channels():
    y = random_maps(2, 20, 5, 7)
    a, b = torch.randn(2, 20, device=DEVICE)
    y = y._replace(grad=torch.randn_like(y.data), a=a, b=b)
    channel = lambda vector: vector[8:12].double().view(-1, 1, 1)
    rest = channel(a) + (y.data[:, 8:12] - channel(y.mean)) * channel(b)
    assert_close(kernels.gradient(y, 8, 4, 4), y.grad[:, 8:12] - rest / 70)


@FUSED
def test_what_is_no_number_passes_the_relu(fused):
    x, y = random_maps(1, 4, 3, 3), new_maps(1, 2, 3, 3)
    x.data[0, 1, 1, 1] = torch.nan
    kernels.forward_half(random_half(4, 2, 1, 1, fused), x, y, 0)
    assert y.data[0, :, 1, 1].isnan().all() and y.data.isnan().sum() == 2


@pytest.mark.skipif(DEVICE == 'cuda', reason='on a GPU there is compute-sanitizer')
def test_an_access_out_of_bounds_and_a_race_are_seen(sanitizer):
    x, y = random_maps(1, 4, 10, 20), new_maps(1, 4, 10, 20)
    grid, partial = kernels._tiles_and_partial(y, 4, 128, 32)

    def launch(source=x, num_rows=200, y_units=1, start=0):
        kernels._copy_kernel[grid](source.data, y.data, partial, num_rows, 1, 1, y_units, start,
                                   grid[0], UNIT=4, **kernels.TILES['copy'])

    launch()
    with pytest.raises(Exception, match='out of bounds'):
        launch(num_rows=201)
    with pytest.raises(AssertionError, match='two programs of _copy_kernel write the same'):
        launch(y_units=0)
    with pytest.raises(AssertionError, match='programs of _copy_kernel race'):
        launch(source=y, num_rows=199, start=1)  # each row goes where the next one is read


# ---- a whole block ---------------------------------------------------------------------------

def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, DenseBlock)]


def net(level, seed=0, **kwargs):
    """DenseNet-BC 10-12 (three blocks of one layer), or as the arguments say."""
    torch.manual_seed(seed)
    model = densenet_cifar(**{'depth': 10, **kwargs}).to(DEVICE, memory_format=torch.channels_last)
    for block in blocks_of(model):
        block.kernels = level
        block.linear_memory = level is not None
    return model.train()


def batch(n=4, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator).to(DEVICE)
    return images.contiguous(memory_format=torch.channels_last), (torch.arange(n) % 10).to(DEVICE)


def paths(model):
    return {(block.path, block.obstacle) for block in blocks_of(model)}


def gradients(model, dtype=HALF, **kwargs):
    """Of all parameters, in one vector of float64; `kwargs` as for `batch`."""
    images, labels = batch(**kwargs)
    with torch.autocast(DEVICE, dtype, enabled=dtype == HALF):
        loss = F.cross_entropy(model(images.to(torch.promote_types(dtype, torch.float32))), labels)
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten().double() for p in model.parameters()])


BOTTLENECK = {'depth': 16}
NO_BOTTLENECK = {'depth': 10, 'bottleneck': False, 'compression': 1.0, 'growth_rate': 10}
SETTINGS = pytest.mark.parametrize('settings', [BOTTLENECK, NO_BOTTLENECK])


@watched
@pytest.mark.parametrize('level, settings', [
    ('elementwise', BOTTLENECK), ('3x3', BOTTLENECK), ('3x3', NO_BOTTLENECK)])
def test_gradients_of_a_network_are_as_close_to_float64_as_the_plain_ones(level, settings):
    """On average over networks: in each of them it depends on a few ReLUs that flip."""
    images = dict(n=64, size=32) if DEVICE == 'cuda' else dict(n=4, size=8)
    distance = {None: 0.0, level: 0.0}
    for seed in range(3):
        model = net(None, seed, **settings).double()
        truth = gradients(model, torch.float64, seed=seed, **images)
        for name in distance:
            model = net(name, seed, **settings)
            found = gradients(model, seed=seed, **images)
            distance[name] += (found - truth).norm() / truth.norm()
            assert paths(model) == {('triton' if name else 'plain', None)}
    assert 0 < distance[level] <= 1.1 * distance[None]


@SETTINGS
@pytest.mark.parametrize('level', ['elementwise', '3x3'])
def test_memory_efficient_and_a_second_run_give_the_same_bits(level, settings):
    runs = []
    for efficient in (False, False, True):
        model = net(level, memory_efficient=efficient, **settings)
        runs.append((gradients(model), model.state_dict()))
        assert paths(model) == {('triton', None)}
    torch.testing.assert_close(runs[1:], [runs[0]] * 2, rtol=0, atol=0)


def block_gradients(level, x, dtype=torch.float16, hooks=None):
    """Of x and the parameters of a block of two layers that read and add four maps."""
    torch.manual_seed(0)
    block = DenseBlock(2, x.shape[1], 4, 4, 0.0, True, False).to(DEVICE).train()
    block.to(torch.promote_types(dtype, torch.float32))
    block.kernels, block.linear_memory = level, True
    x = x.half().to(DEVICE, dtype, memory_format=torch.channels_last).requires_grad_()
    autocast = torch.autocast(DEVICE, dtype, enabled=dtype == torch.float16)
    with autocast, hooks or contextlib.nullcontext():
        output = block(x)
    assert block.path == ('triton' if level else 'linear')
    return torch.autograd.grad(output, [x, *block.parameters()],
                               torch.randn(output.shape).half().to(output))


def test_a_hook_on_saved_tensors_may_lose_their_layout():
    x = torch.randn(2, 4, 5, 7)
    hooks = torch.autograd.graph.saved_tensors_hooks(  # as those of save_on_cpu(pin_memory=True)
        lambda tensor: tensor.clone(memory_format=torch.contiguous_format), lambda tensor: tensor)
    torch.testing.assert_close(block_gradients('3x3', x, hooks=hooks), block_gradients('3x3', x),
                               rtol=0, atol=0)


def test_in_fp16_nothing_of_the_rows_past_the_end_is_added():
    x = torch.randn(2, 4, 5, 7)
    x[:, 1] = -300  # times 1 / sqrt(1e-5): a row of zeros, normalised, would be infinite
    for found, truth in zip(block_gradients('3x3', x), block_gradients(None, x, torch.float64)):
        assert_close(found, truth, 0.01)


@pytest.mark.parametrize('efficient', [False, True])
def test_no_more_memory_is_taken_than_by_the_linear_way(efficient):
    held, forward_peak, peak = {}, {}, {}
    for level in (None, '3x3'):
        block = DenseBlock(4, 8, 4, 4, 0.0, True, efficient).to(DEVICE).train()
        block.kernels, block.linear_memory = level, True
        x = torch.randn(4, 8, 16, 16, device=DEVICE, dtype=HALF).contiguous(
            memory_format=torch.channels_last).requires_grad_()
        with Allocations() as allocations:
            with torch.autocast(DEVICE, HALF):
                output = block(x)
            held[level] = allocations.held(but=(x, output))
            forward_peak[level] = allocations.peak
            output.sum().backward()
        peak[level] = allocations.peak
        assert block.path == ('triton' if level else 'linear')
    maps_of_a_bottleneck = 4 * 16 * 16 * 16 * x.element_size()  # all else is vectors and weights
    assert held['3x3'] < held[None] + maps_of_a_bottleneck / 4
    assert forward_peak['3x3'] < forward_peak[None] + maps_of_a_bottleneck / 2
    assert peak['3x3'] < peak[None] + maps_of_a_bottleneck / 2


@SETTINGS
def test_running_statistics_are_the_linear_ways(settings):
    states = []
    for level in (None, '3x3'):
        model = net(level, **settings)
        for block in blocks_of(model):
            block.linear_memory = True
            block.denselayer1.norm1.momentum = None  # the average
            if len(block) > 1:
                block.denselayer2.norm1.momentum = 0.3
        for _ in range(2):
            gradients(model)
        assert paths(model) == {('triton' if level else 'linear', None)}
        states.append(dict(model.named_buffers()))
    torch.testing.assert_close(states[1], states[0], rtol=0.05, atol=0.01)
    assert int(states[1]['features.denseblock1.denselayer1.norm1.num_batches_tracked']) == 2


def test_a_block_of_maps_of_one_pixel():
    x = torch.randn(9, 4, 1, 1, generator=torch.Generator().manual_seed(1)).to(DEVICE, HALF)
    results = {}
    for name, level in (('truth', None), ('plain', None), ('kernels', '3x3')):
        torch.manual_seed(0)
        block = DenseBlock(2, 4, 4, 2, 0.0, True, False).to(DEVICE).train()
        block.kernels, block.linear_memory = level, level is not None
        dtype = torch.float64 if name == 'truth' else HALF
        x_here = x.to(dtype).clone(memory_format=torch.channels_last).requires_grad_()
        if name == 'truth':
            block.double()
        with torch.autocast(DEVICE, HALF, enabled=name != 'truth'):
            output = block(x_here)
        output.double().square().sum().backward()
        results[name] = output.detach().double(), x_here.grad.double()
    assert block.path == 'triton'
    for truth, plain, found in zip(*results.values()):
        assert (found - truth).norm() <= 2 * (plain - truth).norm()


def test_frozen_parameters_get_no_gradient():
    model = net('3x3')
    frozen = model.features.denseblock1.denselayer1.conv1.weight
    frozen.requires_grad = False
    images, labels = batch()
    with torch.autocast(DEVICE, HALF):
        F.cross_entropy(model(images), labels).backward()
    assert frozen.grad is None and model.features.conv0.weight.grad is not None


def test_a_gradient_penalty_is_as_close_to_float64_as_the_plain_one():
    def gradients_of_penalty(model, dtype):
        images, labels = batch()
        images = images.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        with torch.autocast(DEVICE, dtype, enabled=dtype == HALF):
            loss = F.cross_entropy(model(images), labels)
        gradient, = torch.autograd.grad(loss, images, create_graph=True)
        gradient.square().sum().backward()
        return torch.cat([p.grad.flatten().double() for p in model.parameters()
                          if p.grad is not None])

    truth = gradients_of_penalty(net(None).double(), torch.float64)
    plain, found = (gradients_of_penalty(net(level), HALF) for level in (None, '3x3'))
    assert (found - truth).norm() <= 1.5 * (plain - truth).norm()


def test_training_follows_the_plain_way():
    """As closely as the linear way does, which rounds at other places, too."""
    steps, n, size = (200, 64, 32) if DEVICE == 'cuda' else (8, 8, 8)
    curves = {}
    for name, level in (('plain', None), ('linear', None), ('triton', '3x3')):
        model = net(level)
        for block in blocks_of(model):
            block.linear_memory = name != 'plain'
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
        losses = []
        for step in range(steps):
            images, labels = batch(n, size)
            with torch.autocast(DEVICE, HALF):
                loss = F.cross_entropy(model(images.roll(step, 3)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert paths(model) == {(name, None)}
        curves[name] = torch.tensor(losses)
    plain, linear, triton = curves.values()
    assert plain[-1] < 0.9 * plain[0]
    assert (triton - plain).abs().mean() <= 2 * (linear - plain).abs().mean() + 0.01 * plain.mean()


def test_under_ddp(tmp_path):
    alone, shared = net('3x3'), net('3x3')
    torch.distributed.init_process_group('nccl' if DEVICE == 'cuda' else 'gloo', world_size=1,
                                         rank=0, init_method=f'file://{tmp_path}/rendezvous')
    try:
        found = gradients(nn.parallel.DistributedDataParallel(shared))
    finally:
        torch.distributed.destroy_process_group()
    torch.testing.assert_close(found, gradients(alone), rtol=0, atol=0)


# ---- which way -------------------------------------------------------------------------------

def way_of(block, dtype=HALF, layout=torch.channels_last):
    x = torch.randn(2, 4, 4, 4).to(DEVICE, dtype, memory_format=layout)
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        block(x)
    return block.path, block.obstacle


def small_block(level='3x3', drop_rate=0.0):
    block = DenseBlock(1, 4, 4, 2, drop_rate, True, False).to(DEVICE).train()
    block.kernels = level
    return block


def test_where_the_kernels_cannot_compute_the_library_does():
    assert way_of(small_block()) == ('triton', None)
    assert way_of(small_block(drop_rate=0.1)) == ('linear', 'kernels have no dropout')
    assert way_of(small_block(), torch.float32) == (
        'linear', 'kernels compute in bf16 and fp16, not in torch.float32')
    assert way_of(small_block(), layout=torch.contiguous_format) == (
        'linear', 'kernels read channels_last')
    block = small_block()
    block.denselayer1.norm2.register_forward_hook(lambda *_: None)
    assert way_of(block) == ('plain', 'denselayer1: norm2 has hooks')
    assert way_of(small_block().eval()) == ('plain', None)
    block = small_block()
    block.linear_memory = False
    assert way_of(block) == ('plain', None)


def test_kernels_that_there_are_not():
    with pytest.raises(ValueError, match="kernels must be None or one of .*, not '5x5'"):
        way_of(small_block('5x5'))


@pytest.mark.parametrize('missing', ['triton', 'densenet_triton'])
def test_without_triton_or_the_file_a_block_says_so(missing, monkeypatch):
    monkeypatch.delitem(sys.modules, 'densenet_triton')
    monkeypatch.setitem(sys.modules, missing, None)
    path, obstacle = way_of(small_block())
    assert path == 'linear' and obstacle.startswith('no kernels: ') and f'of {missing} ' in obstacle


def test_beside_densenet_in_a_package_they_are_found(tmp_path):
    package = tmp_path / 'package'
    package.mkdir()
    (package / '__init__.py').touch()
    for module in (densenet, kernels):
        shutil.copy(module.__file__, package)
    script = (f'import torch; from package.densenet import DenseBlock; device = "{DEVICE}"\n'
              'block = DenseBlock(1, 4, 4, 2, 0.0, True, False).to(device).train()\n'
              'block.kernels = "3x3"\n'
              'x = torch.ones(2, 4, 4, 4, dtype=torch.float16, device=device)\n'
              'with torch.autocast(device, torch.float16):\n'
              '    block(x.to(memory_format=torch.channels_last))\n'
              'print(block.path, block.obstacle)')
    result = subprocess.run([sys.executable, '-c', script], cwd=tmp_path, capture_output=True,
                            text=True)
    assert result.stdout == 'triton None\n', result.stderr


# ---- on a GPU --------------------------------------------------------------------------------

@pytest.mark.skipif(tuple(map(int, triton.__version__.split('.')[:2])) < (3, 3),
                    reason='compiling without a GPU was another interface before Triton 3.3')
@pytest.mark.parametrize('argv, spilled', [(['90'], 64), (['80', 'BC-100-12'], 256)])
def test_the_compiler_finds_room_for_all_and_loads_neighbours_together(argv, spilled):
    environment = {name: value for name, value in os.environ.items() if name != 'TRITON_INTERPRET'}
    result = subprocess.run([sys.executable, ROOT / 'tests' / 'compile_kernels.py', *argv],
                            capture_output=True, text=True, cwd=ROOT,
                            env=environment | {'PYTHONPATH': str(ROOT)})
    assert result.returncode == 0, result.stderr
    reports = [json.loads(line) for line in result.stdout.splitlines()]
    for report in reports:
        assert report['shared'] <= 99 * 1024 and report['spilled'] <= spilled, report
        instructions = ' '.join(report['instructions']) + ' '
        assert '.U16' not in instructions, report  # one channel at a time
        width = {2: 'LDG(STS)?.E ', 4: 'LDG(STS)?.E.64', 8: 'LDG(STS)?.E.*128'}
        assert 'UNIT' not in report or re.search(width[report['UNIT']], instructions), report
        assert 'conv' not in report['kernel'] or 'MMA' in instructions, report
    launches = sum(report['launches'] for report in reports if report['network'] == 'BC-100-12')
    assert launches == 8 * 48 + 3 * 3  # in each of the three blocks: copy, merge, gradient


@pytest.mark.cuda
@pytest.mark.parametrize('efficient', [False, True])
def test_in_a_cuda_graph_steps_end_with_the_bits_of_steps_without(efficient):
    """After three steps of train.py's own."""
    device, results = torch.device('cuda'), []
    images, labels = batch(16, 32)
    for graph in (False, True):
        model = net('3x3', memory_efficient=efficient)
        autocast = train.make_autocast('bf16', device)
        state = train.make_state(flags.parse_args(['--lr', '0.1']), model, device, 'bf16')
        step = functools.partial(train.train_step, state, autocast=autocast)
        if graph:
            step = train.CudaGraphStep(step, state, [images.shape])
        for i in range(3):
            step(images.roll(i, 3), labels)
        assert paths(model) == {('triton', None)}
        results.append(model.state_dict())
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.cuda
@pytest.mark.skipif(shutil.which('compute-sanitizer') is None, reason='needs compute-sanitizer')
def test_compute_sanitizer_finds_nothing_in_a_step():
    script = ('import sys; sys.path.insert(0, "tests")\n'
              'from test_densenet_triton import *\n'
              'gradients(net("3x3"))\n'
              'gradients(net("3x3", bottleneck=False, compression=1.0, growth_rate=10))')
    result = subprocess.run(['compute-sanitizer', '--error-exitcode', '99', sys.executable, '-c',
                             script], capture_output=True, text=True, cwd=ROOT,
                            env=os.environ | {'PYTORCH_NO_CUDA_MEMORY_CACHING': '1'})
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
