"""Two training steps of three small networks, against the official Lua implementation.

official-densenet.json holds what github.com/liuzhuang13/DenseNet computes on Torch7 in float64; its
'description' has the formulas of weights, images and labels.
"""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import train
from densenet import DenseNet, densenet_cifar
from fused_dense_block import fuse

OFFICIAL = json.loads(Path(__file__).with_name('official-densenet.json').read_text())['networks']
NETWORKS = {
    'bc': lambda **kwargs: densenet_cifar(16, 4, **kwargs),
    'plain': lambda **kwargs: densenet_cifar(10, 4, bottleneck=False, compression=1.0,
                                             num_init_features=8, **kwargs),
    'imagenet': lambda **kwargs: DenseNet(4, (1, 2, 1, 2), num_init_features=8, **kwargs),
}


def u(t, shape):
    """Pseudo-random float64 numbers in [-0.5, 0.5); t is the tensor's number."""
    i = torch.arange(torch.Size(shape).numel())
    numerator = (31 * i * i + 7919 * i + 104729 * t) % 10007
    return (numerator.double() / 10007 - 0.5).view(shape)


def make_network(name, way):
    model = NETWORKS[name](memory_efficient=way == 'memory_efficient').double()
    with torch.no_grad():
        for t, (key, parameter) in enumerate(model.named_parameters(), start=1):
            is_norm_weight = 'norm' in key and key.endswith('weight')
            parameter.copy_(1 + 0.4 * u(t, parameter.shape) if is_norm_weight
                            else 0.3 * u(t, parameter.shape))
        for b, norm in enumerate(norms(model), start=1):
            norm.running_mean.copy_(0.2 * u(1000 + b, norm.running_mean.shape))
            norm.running_var.copy_(1 + 0.5 * u(2000 + b, norm.running_var.shape))
    return fuse(model) if way == 'fused' else model


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def train_two_steps(model, images, labels):
    """{key of the JSON file: tensor}, with the default optimizer of train.py."""
    optimizer = train.make_optimizer(train.flags.complete(train.flags.parse([])), model)
    parameters = list(model.parameters())
    first, last = norms(model)[0], norms(model)[-1]
    results = {}

    def record(**values):
        for name, value in values.items():
            value = torch.stack(value) if isinstance(value, list) else value
            results[name] = value.detach().clone()

    with torch.no_grad():
        record(eval0=model.eval()(images)[:, :10])
    model.train()
    for step in (1, 2):
        optimizer.zero_grad()
        logits = model(images)
        loss = F.cross_entropy(logits, labels)
        loss.backward()
        record(**{
            f'logits{step}': logits[:, :10], f'loss{step}': loss,
            f'gradnorm{step}': [p.grad.norm() for p in parameters],
            f'graddot{step}': [(p.grad * p).sum() for p in parameters],
            f'rm_first{step}': first.running_mean, f'rv_first{step}': first.running_var,
            f'rm_last{step}': last.running_mean, f'rv_last{step}': last.running_var})
        optimizer.step()
        record(**{f'weightnorm{step}': [p.norm() for p in parameters]})
    with torch.no_grad():
        record(eval2=model.eval()(images)[:, :10])
    return results


@pytest.mark.parametrize('way', ['plain', 'memory_efficient', 'fused'])
@pytest.mark.parametrize('name', NETWORKS)
def test_computes_what_the_official_code_computes(name, way):
    expected = dict(OFFICIAL[name])
    n, size, _ = (expected.pop(key) for key in ('N', 'S', 'network'))
    model = make_network(name, way)
    images = 4 * u(3001, (n, 3, size, size))
    labels = (3 * torch.arange(n) + 1) % model.classifier.out_features
    expected = {key: torch.tensor(value, dtype=torch.float64) for key, value in expected.items()}
    # The file has 12 significant digits. Some sums in graddot cancel, hence atol.
    torch.testing.assert_close(train_two_steps(model, images, labels), expected,
                               rtol=5e-12, atol=1e-13)
    if way == 'fused':
        model.train()(images)
        paths = {module.path for module in model.features if hasattr(module, 'path')}
        assert paths == {'eager'}, 'not the fused way'
