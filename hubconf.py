"""The networks for torch.hub, from a clone or from a repository's name:

    model = torch.hub.load('path/to/clone', 'densenet121', source='local', pretrained=True)
    model = torch.hub.load('path/to/clone', 'densenet_cifar', source='local', depth=40)
    model = torch.hub.load('path/to/clone', 'densenet_bc_100_12', source='local', pretrained=True)

All take the arguments of `densenet.DenseNet`; the weights are torchvision's for ImageNet, and ours
for CIFAR-10.
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
            from torchvision.models import get_model_weights  # the networks alone need none

            weights = get_model_weights(build.__name__).DEFAULT
            model.load_state_dict(weights.get_state_dict(weights_only=True))
        return model
    return entry_point


def densenet_bc_100_12(pretrained=False, **kwargs):
    """DenseNet-BC, L=100, k=12. With `pretrained`, our weights for CIFAR-10."""
    model = densenet_cifar(100, 12, **kwargs)
    if pretrained:
        path = Path(__file__).parent / 'work/densenet-bc-100-12/best.pth'
        model.load_state_dict(torch.load(path, map_location='cpu', weights_only=True)['model'])
    return model


densenet121, densenet161, densenet169, densenet201 = map(_with_weights, (
    densenet.densenet121, densenet.densenet161, densenet.densenet169, densenet.densenet201))
