"""Evaluation by the CPU kernels: their packed weights follow whatever changes the model."""

import copy
import threading

import pytest
import torch
from test_fuse_cpu import batch, network
from torch import nn

from fused_dense_block import cpu, fuse, unfuse

reason = cpu.unavailable_reason()
pytestmark = pytest.mark.skipif(reason is not None, reason=f'no kernels here: {reason}')

IMAGES, LABELS = batch(3)


def paths(model):
    return {module.path for module in model.modules() if hasattr(module, 'path')}


def evaluate(model, images=IMAGES):
    with torch.no_grad():
        return model.eval()(images)


def assert_equals_plain(model):
    found = evaluate(model)
    assert paths(model) == {'kernels'}
    plain = unfuse(copy.deepcopy(model)).double()
    torch.testing.assert_close(found.double(), evaluate(plain, IMAGES.double()), rtol=1e-5,
                               atol=1e-5)
    return found


def train_step(model, **options):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, **options)
    nn.functional.cross_entropy(model(IMAGES), LABELS).backward()
    optimizer.step()


def train_with_frozen_norms(model):
    model.eval()  # evaluation with gradients: no statistic changes
    train_step(model, fused=True)  # torch's fused optimizers bump no version counter


def train_layer_by_layer(model):
    hook = model.features.denseblock1.denselayer1.norm2.register_forward_hook(lambda *_: None)
    model.train()(IMAGES)
    hook.remove()


def set_by_numpy(model):
    model.features.denseblock2.denselayer1.conv1.weight.detach().numpy()[:] *= 2


def replace(model):
    model.features.transition1.norm.bias = nn.Parameter(torch.randn(120)[::2])


def change_first_layer(name, value):
    def change(model):
        with torch.no_grad():
            model.features.denseblock1.denselayer1.get_parameter(name)[0] = value
    return change


CHANGES = {
    'a weight': change_first_layer('conv2.weight', 3.0),
    'a norm': change_first_layer('norm2.bias', 3.0),
    'state dict': lambda model: model.load_state_dict(network(seed=1).state_dict()),
    'training': lambda model: train_step(model.train()),
    'training with frozen norms': train_with_frozen_norms,
    'statistics, by nn.BatchNorm2d': train_layer_by_layer,
    'other memory': lambda model: model.to(torch.bfloat16).to(torch.float32),
    'data': lambda model: [p.data.mul_(2) for p in model.features.denseblock2.parameters()],
    'numpy': set_by_numpy,
    'another parameter': replace,
    'eps': lambda model: setattr(model.features.denseblock1.denselayer2.norm1, 'eps', 1.0),
}


@pytest.mark.parametrize('change', CHANGES)
def test_weights_are_packed_again_when_they_change(change):
    model = fuse(network())
    train_step(model)
    before = assert_equals_plain(model)
    CHANGES[change](model)
    assert not torch.equal(assert_equals_plain(model), before)


@pytest.mark.parametrize('name', ['denseblock1.denselayer1.conv1', 'transition1.conv'])
def test_a_bias_that_a_convolution_gets_later_is_added(name):
    model = fuse(network())
    before, conv = evaluate(model), model.features.get_submodule(name)
    conv.bias = nn.Parameter(torch.ones(conv.out_channels))
    found = evaluate(model)
    assert not torch.equal(found, before)
    torch.testing.assert_close(found, evaluate(unfuse(model)))


def test_weights_are_packed_once_and_given_up_in_training(monkeypatch):
    model, calls = fuse(network()), []
    monkeypatch.setattr(cpu, 'pack', lambda *args, pack=cpu.pack: calls.append(1) or pack(*args))
    first = evaluate(model)
    assert len(calls) == 3 and torch.equal(evaluate(model), first) and len(calls) == 3
    model.train()(IMAGES)
    assert not any(block._fused.plans[False].packed for block in
                   (model.features.denseblock1, model.features.transition1))


def test_weights_that_are_shared_or_made_in_inference_mode_are_packed_each_time():
    with torch.inference_mode():
        model = fuse(network())
        for value in (1.0, 2.0):
            model.features.denseblock1.denselayer1.conv2.weight[0, 0, 0, 0] = value
            found = evaluate(model)
            assert torch.equal(found, evaluate(fuse(unfuse(model))))
    model = fuse(network())
    model.share_memory()
    evaluate(model)
    weight = model.features.denseblock1.denselayer1.conv2.weight
    weight.data[0, 0, 0, 0] = 3.0  # as another process does
    assert_equals_plain(model)


def test_precisions_take_turns():
    model = fuse(network())
    first, plain = evaluate(model), evaluate(network())
    with torch.autocast('cpu', torch.bfloat16):
        low, plain_low = evaluate(model), evaluate(network())
    assert torch.equal(evaluate(model), first) and paths(model) == {'kernels'}
    assert 0 < (low - plain).norm() < 1.2 * (plain_low - plain).norm()


def test_two_threads_of_a_server():
    model = fuse(network())
    parts = [IMAGES[:1], IMAGES, IMAGES[:2]]
    expected, errors = [evaluate(model, part) for part in parts], []
    model = fuse(network()).eval()  # not packed yet

    def serve():
        try:
            for _ in range(5):
                for part, logits in zip(parts, expected):
                    with torch.inference_mode():
                        assert torch.equal(model(part), logits)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def test_nan_and_infinity_stay_in_their_image():
    model, clean = fuse(network(growth_rate=5)), evaluate(fuse(network(growth_rate=5)))
    for value in (torch.nan, torch.inf):
        images = IMAGES.clone()
        images[1, 0, 2, 2] = value
        found, plain = evaluate(model, images), evaluate(network(growth_rate=5), images)
        assert torch.equal(found[::2], clean[::2])
        assert torch.equal(found[1].isfinite(), plain[1].isfinite())
        assert not found[1].isfinite().all()


@pytest.mark.parametrize('name, part', [('evaluate_block', 'denseblock1'),
                                        ('evaluate_transition', 'transition1')])
def test_the_check_covers_evaluation(name, part, monkeypatch):
    function = getattr(cpu, name)
    monkeypatch.setattr(cpu, name, lambda *args: 1.1 * function(*args))
    with pytest.raises(ValueError, match=f'{part} has other outputs by the CPU kernels'):
        fuse(network())


def test_frozen_features_take_the_kernels_with_gradients_on():
    model = fuse(network()).eval()
    model.features.requires_grad_(False)
    plain = unfuse(copy.deepcopy(model))
    for each in (model, plain):
        nn.functional.cross_entropy(each(IMAGES), LABELS).backward()
    assert paths(model) == {'kernels'}
    for mine, theirs in zip(model.classifier.parameters(), plain.classifier.parameters()):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    images = IMAGES.clone().requires_grad_()
    model(images).sum().backward()
    assert paths(model) & {'layers', 'pooled first'} and images.grad.abs().sum() > 0
    model.features.denseblock2.denselayer1.norm1.weight.requires_grad_()
    model(IMAGES).sum().backward()
    assert model.features.denseblock1.path == 'kernels'
    assert model.features.denseblock2.path == 'layers'
    assert model.features.denseblock2.denselayer1.norm1.weight.grad.abs().sum() > 0
