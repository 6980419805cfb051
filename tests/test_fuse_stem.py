"""ImageNet's stem in evaluation by the CPU kernels, against torchvision's modules in float64."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from fused_dense_block import cpu, fuse, unfuse

reason = cpu.unavailable_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=f'no kernels here: {reason}')


def network(in_channels=3, layout=torch.channels_last, **conv):
    """torchvision's, in evaluation, its norm with weights of both signs, and a zero."""
    torch.manual_seed(0)
    model = torchvision.models.DenseNet(4, (1, 1), num_init_features=20, num_classes=5)
    features = model.features
    features.conv0 = nn.Conv2d(in_channels, 20, **{
        **dict(kernel_size=7, stride=2, padding=3, bias=False), **conv})
    nn.init.uniform_(features.norm0.weight, -1, 1)
    nn.init.zeros_(features.norm0.weight[:1])
    nn.init.normal_(features.norm0.bias)
    nn.init.normal_(features.norm0.running_mean)
    nn.init.uniform_(features.norm0.running_var, 0.5, 1.5)
    return model.to(memory_format=layout).eval()


def images(n=2, in_channels=3, size=(37, 44), layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, in_channels, *size, generator=generator)
    return x.to(memory_format=layout)


@torch.no_grad()
def stem_of(model, x):
    """The output of the stem, which is the input of the first dense block."""
    found = []
    hook = model.features.denseblock1.register_forward_pre_hook(
        lambda module, inputs: found.append(inputs[0]))
    model(x)
    hook.remove()
    return found[0]


@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
@pytest.mark.parametrize('in_channels, size', [
    (1, (224, 224)), (3, (37, 44)), (5, (29, 31)), (3, (32, 225)), (2, (33, 30))])
def test_as_close_to_float64_as_the_plain_modules(in_channels, size, dtype, layout):
    plain, x = network(in_channels), images(2, in_channels, size, layout)
    model = fuse(copy.deepcopy(plain))
    truth = stem_of(copy.deepcopy(plain).double(), x.double())
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        found, expected = stem_of(model, x), stem_of(plain, x)
    assert (model.features.path, model.features.reason) == ('kernels', None)
    assert found.dtype == expected.dtype and found.shape == truth.shape
    assert 0 < (found - truth).norm() <= 1.1 * (expected - truth).norm()


def test_the_bits_depend_neither_on_threads_nor_on_the_batch():
    model, x = fuse(network()), images(5)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(stem_of(model, x))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert torch.equal(stem_of(model, x[3:4]), found[0][3:4])


def test_images_in_any_memory():
    model, x = fuse(network()), images(3)
    expected = stem_of(model, x)
    wide = torch.randn(3, 5, 40, 90)
    wide[:, 1:4, 2:39, :88:2] = x
    assert torch.equal(stem_of(model, wide[:, 1:4, 2:39, :88:2]), expected)
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(stem_of(model, grey), stem_of(model, grey.contiguous()))


@pytest.mark.parametrize('value', [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize('dtype', [None, torch.bfloat16])
def test_nan_and_infinity_reach_the_same_outputs(value, dtype):
    plain, x = network(), images()
    x[1, 0, 20, 17] = value
    # fp32 is the truth for bf16, too: with AVX512_BF16, oneDNN's bf16 convolution (torch 2.14.1)
    # gives NaN for most of the outputs that an infinite input makes infinite.
    expected = stem_of(plain, x)
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        found = stem_of(fuse(copy.deepcopy(plain)), x)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.isinf(), expected.isinf()) and not found.isfinite().all()


UNUSUAL = {
    'conv0.kernel_size is not (7, 7)': dict(kernel_size=3, padding=1),
    'conv0.stride is not (2, 2)': dict(stride=1),
    'conv0.padding is not (3, 3)': dict(padding=2),
    'conv0.padding_mode is not zeros': dict(padding_mode='reflect'),
}


@pytest.mark.parametrize('complaint', UNUSUAL)
def test_other_convolutions_have_no_kernel(complaint):
    plain, x = network(**UNUSUAL[complaint]), images()
    model = fuse(copy.deepcopy(plain))
    torch.testing.assert_close(stem_of(model, x), stem_of(plain, x), rtol=1e-4, atol=1e-4)
    assert (model.features.path, model.features.reason) == ('eager', complaint)


@pytest.mark.parametrize('attribute, value', [
    ('kernel_size', 2), ('stride', 1), ('padding', 0), ('ceil_mode', True)])
def test_another_pooling_has_no_kernel(attribute, value):
    plain = network()
    model = fuse(copy.deepcopy(plain))
    stem_of(model, images())
    assert model.features.path == 'kernels'
    for m in (plain, model):  # after `fuse`, which is noticed
        setattr(m.features.pool0, attribute, value)
    torch.testing.assert_close(stem_of(model, images()), stem_of(plain, images()), rtol=1e-4,
                               atol=1e-4)
    assert model.features.path == 'eager'
    assert model.features.reason.startswith(f'pool0.{attribute} is not ')


def test_nchw_stays_nchw():
    model, x = fuse(network(layout=torch.contiguous_format)), images()
    stem = stem_of(model, x)
    assert stem.is_contiguous() and model.features.path == 'eager'
    assert model.features.reason == 'the images and the weights are not in channels_last'
    stem = stem_of(model, x.to(memory_format=torch.channels_last))
    assert stem.is_contiguous(memory_format=torch.channels_last)
    assert model.features.path == 'kernels'
    assert stem_of(model, x).is_contiguous() and model.features.path == 'eager'


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_weights_of_another_precision_have_no_kernel(dtype):
    plain = network().to(dtype)
    model = fuse(copy.deepcopy(plain))
    torch.testing.assert_close(stem_of(model, images().to(dtype)),
                               stem_of(plain, images().to(dtype)), rtol=0.1, atol=0.1)
    assert model.features.path == 'eager' and str(dtype) in model.features.reason


def test_changed_weights_are_noticed():
    model, x = fuse(network()), images()
    before = stem_of(model, x)
    with torch.no_grad():
        model.features.norm0.bias.add_(1)
    changed = stem_of(model, x)
    assert not torch.equal(changed, before) and model.features.path == 'kernels'
    torch.testing.assert_close(changed, stem_of(unfuse(model), x), rtol=1e-4, atol=1e-4)
