"""The networks for torch.hub, from a clone or from a repository's name:

    model = torch.hub.load('path/to/clone', 'densenet121', source='local', pretrained=True)
    model = torch.hub.load('path/to/clone', 'densenet_cifar', source='local', depth=40)
    model = torch.hub.load('path/to/clone', 'densenet_bc_100_12', source='local', pretrained=True)

All take the arguments of `densenet.DenseNet`. `pretrained=True` loads torchvision's weights for
ImageNet's 1000 classes, through torchvision's own download and cache; for densenet_bc_100_12, which
has CIFAR-10's 10 classes, those that this repository has trained.
"""

import functools
from pathlib import Path

import torch

import densenet
from densenet import densenet232_k48, densenet264, densenet264_k48, densenet_cifar  # noqa: F401

dependencies = ['torch']


def _with_weights(build):
    @functools.wraps(build)
    def entry_point(pretrained=False, **kwargs):
        model = build(**kwargs)
        if pretrained:
            # Here, for the networks alone need no torchvision.
            from torchvision.models import get_model_weights

            weights = get_model_weights(build.__name__).DEFAULT
            model.load_state_dict(weights.get_state_dict(weights_only=True))
        return model

    entry_point.__doc__ += ' With `pretrained`, torchvision\'s weights.'
    return entry_point


def densenet_bc_100_12(pretrained=False, **kwargs):
    """DenseNet-BC, L=100, k=12. With `pretrained`, our weights: see the README's results."""
    model = densenet_cifar(100, 12, **kwargs)
    if pretrained:
        path = Path(__file__).parent / 'work/densenet-bc-100-12/best.pth'
        saved = torch.load(path, map_location='cpu', weights_only=True)
        model.load_state_dict(saved['model'])
    return model


densenet121, densenet161, densenet169, densenet201 = map(_with_weights, (
    densenet.densenet121, densenet.densenet161, densenet.densenet169, densenet.densenet201))
