"""Networks by the CPU kernels: as close to float64 as by PyTorch's own operations."""

import copy
import statistics

import pytest
import torch
import torch.nn.functional as F
from test_fuse import block_input

from densenet import DenseBlock, DenseLayer, DenseNet, Transition
from fused_dense_block import cpu, fuse, library

reason = cpu.unavailable_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=f'no kernels here: {reason}')


def network(growth_rate=12, in_float64=False, seed=0, **kwargs):
    torch.manual_seed(seed)
    model = DenseNet(growth_rate, (3, 4), 2 * growth_rate, num_classes=10, small_inputs=True,
                     **kwargs)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):  # gamma of both signs, and 0
            torch.nn.init.uniform_(module.weight, -1, 1)
            torch.nn.init.zeros_(module.weight[:1])
            torch.nn.init.normal_(module.bias)
    return model.to(torch.float64 if in_float64 else torch.float32,
                    memory_format=torch.channels_last).train()


def batch(n=8, size=(9, 10)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, *size, generator=generator), torch.arange(n) % 10


def training_step(model, images, labels, dtype=None):
    """All numbers that a step makes, in one vector for each kind of them."""
    torch.manual_seed(2)
    with torch.autocast('cpu', dtype, enabled=dtype is not None):
        logits = model(images)
    F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels).backward()
    kinds = {'logits': [logits], 'gradients': [p.grad for p in model.parameters()],
             'statistics': [b for b in model.buffers() if b.is_floating_point()]}
    return {kind: torch.cat([value.detach().double().flatten() for value in values])
            for kind, values in kinds.items()}


def errors(found, truth):
    return {kind: ((found[kind] - truth[kind]).norm() / truth[kind].norm()).item()
            for kind in truth}


@pytest.mark.parametrize('settings, dtype, networks', [
    (dict(growth_rate=12), None, 9), (dict(growth_rate=5, memory_efficient=True), None, 9),
    (dict(growth_rate=24), None, 9), (dict(growth_rate=12, bottleneck=False), None, 9),
    (dict(growth_rate=7, drop_rate=0.2), None, 9),
    (dict(growth_rate=40, compression=1.0, memory_efficient=True), None, 9),
    (dict(growth_rate=12), torch.bfloat16, 12),
    (dict(growth_rate=7, memory_efficient=True), torch.bfloat16, 12),
    (dict(growth_rate=12, bottleneck=False), torch.bfloat16, 12)])
def test_a_step_is_as_close_to_float64_as_with_eager_operations(settings, dtype, networks):
    images, labels = batch()
    exact = network(in_float64=True, **settings)
    models = {'kernels': fuse(network(**settings)), 'plain': network(**settings),
              'eager': fuse(network(**settings), kernels=False)}
    found = {way: [] for way in models}
    for seed in range(networks):  # now and then rounding turns a ReLU on or off
        weights = network(seed=seed, **settings).state_dict()
        for model in (exact, *models.values()):
            model.load_state_dict(weights)
            model.zero_grad()
        truth = training_step(exact, images.double(), labels)
        for way, model in models.items():
            found[way].append(errors(training_step(model, images, labels, dtype), truth))
    for kind in truth:
        median = {way: statistics.median(each[kind] for each in found[way]) for way in found}
        bound = 1.1 * max(median['eager'], median['plain'])
        assert 0 < median['kernels'] <= bound, (kind, median)


@pytest.mark.parametrize('settings', [dict(growth_rate=12), dict(growth_rate=9, bottleneck=False),
                                      dict(growth_rate=12, drop_rate=0.3)])
@pytest.mark.parametrize('size', [(9, 10), (2, 2), (5, 3)])
def test_evaluation_equals_the_plain_one(settings, size):
    model, (images, labels) = network(**settings), batch(size=size)
    for _ in range(3):
        training_step(model, images, labels)
    model.eval()
    with torch.no_grad():
        plain = model(images), model(images[:1])
        fuse(model)
        torch.testing.assert_close((model(images), model(images[:1])), plain, rtol=1e-5, atol=1e-5)
    assert {module.path for module in model.modules() if hasattr(module, 'path')} == {'kernels'}


def test_training_takes_the_kernels():
    model = fuse(network())
    training_step(model, *batch())
    assert {module.path for module in model.modules() if hasattr(module, 'path')} == {'kernels'}


def test_two_steps_give_the_same_bits():
    images, labels = batch()
    first, second = (training_step(fuse(network()), images, labels) for _ in range(2))
    assert all(torch.equal(first[kind], second[kind]) for kind in first)


def test_nan_in_is_nan_out():
    images, labels = batch()
    images[3, 1, 4, 4] = torch.nan
    model = fuse(network())
    found = training_step(model, images, labels)
    assert found['logits'].isnan().any() and found['gradients'].isnan().any()
    images[3, 1, 4, 4] = 0
    with torch.no_grad():
        fresh = fuse(network()).eval()
        images[0, 0, 0, 0] = torch.nan
        assert fresh(images)[0].isnan().all() and fresh(images)[1:].isfinite().all()


def test_frozen_parameters_get_no_gradient_and_the_others_the_same():
    images, labels = batch()
    gradients = []
    for on in (True, False):
        model = fuse(network(), kernels=on)
        for parameter in list(model.parameters())[::3]:
            parameter.requires_grad = False
        F.cross_entropy(model(images), labels).backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)


def test_gradients_add_up_over_backwards():
    images, labels = batch()
    model = fuse(network())
    once = copy.deepcopy(model)
    for _ in range(2):
        F.cross_entropy(model(images), labels).backward()
    F.cross_entropy(once(images), labels).backward()
    torch.testing.assert_close([p.grad for p in model.parameters()],
                               [2 * p.grad for p in once.parameters()])


def test_batched_gradients_are_an_error():
    x = block_input('channels_last').float().requires_grad_()
    parts = fuse(torch.nn.Sequential(DenseBlock(2, 6, 4, 2, 0.0, True, False), Transition(6, 3)))
    for module in parts:
        output = module(x)
        assert module.path == 'kernels'
        n, c, h, w = output.shape
        for grads in (torch.randn(3, n, c, h, w), torch.randn(3, n, h, w, c).movedim(-1, 2)):
            with pytest.raises(RuntimeError, match='vmap|data pointer'):
                torch.autograd.grad(output, x, grads, is_grads_batched=True, retain_graph=True)


def test_the_kernels_of_a_dtype_are_compiled_and_verified_when_first_used(monkeypatch):
    loaded, load, conv = set(), library.load, cpu.norm_relu_conv

    def wrong_in_bf16(maps, *args, **kwargs):
        z, *rest = conv(maps, *args, **kwargs)
        return [-z if z.dtype == torch.bfloat16 else z, *rest]

    monkeypatch.setattr(library, 'load', lambda dtype: loaded.add(dtype) or load(dtype))
    monkeypatch.setattr(cpu, 'norm_relu_conv', wrong_in_bf16)
    model, (images, _) = fuse(network()), batch()
    assert loaded == {torch.float32}
    block = model.features.denseblock1
    with torch.autocast('cpu'):
        model(images)
    assert block.path == 'layers' and torch.bfloat16 in loaded
    assert 'other outputs by the CPU kernels in torch.bfloat16' in block.reason
    monkeypatch.setattr(cpu, 'norm_relu_conv', conv)
    with torch.autocast('cpu'):
        fuse(model)(images)
    assert block.path == 'kernels'


def test_fuse_takes_one_thread_and_gives_the_others_back():
    class Layer(DenseLayer):
        def forward(self, x):
            threads.append(torch.get_num_threads())
            return super().forward(x)

    threads, model = [], network()
    for layer in model.features.denseblock1.children():
        layer.__class__ = Layer
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        fuse(model)
        assert {*threads} == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_library_that_fails_to_compile_only_turns_off_its_own_dtype(monkeypatch):
    load = library.load
    monkeypatch.setattr(library, 'load', lambda dtype: (
        (None, 'it fails') if dtype == torch.bfloat16 else load(dtype)))
    model, (images, _) = fuse(network()), batch()
    for dtype, expected in ((torch.float32, ('kernels', None)),
                            (torch.bfloat16, ('eager', 'it fails'))):
        with torch.autocast('cpu', enabled=dtype == torch.bfloat16):
            model(images)
        block = model.features.denseblock1
        assert (block.path, block.reason) == expected
