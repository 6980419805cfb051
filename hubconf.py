"""The networks for torch.hub, from a clone or from a repository's name:

    model = torch.hub.load('path/to/clone', 'densenet121', source='local', pretrained=True)
    model = torch.hub.load('path/to/clone', 'densenet_cifar', source='local', depth=40)
    model = torch.hub.load('path/to/clone', 'densenet_bc_100_12', source='local', pretrained=True)

All take the arguments of `densenet.DenseNet`; the weights are torchvision's for ImageNet, and ours
for CIFAR-10. The dense blocks are fused (see fused_dense_block/).
"""

import functools
import warnings
from pathlib import Path

import torch

import densenet
from fused_dense_block import fuse

dependencies = ['torch']


def _entry_point(build):
    @functools.wraps(build)
    def entry_point(pretrained=False, **kwargs):
        if pretrained:
            from torchvision.models import get_model_weights  # the networks alone need none

            kwargs['weights'] = get_model_weights(build.__name__).DEFAULT
        return _fused(build(**kwargs))
    return entry_point


def densenet_bc_100_12(pretrained=False, **kwargs):
    """DenseNet-BC, L=100, k=12. With `pretrained`, our weights for CIFAR-10."""
    model = densenet.densenet_cifar(100, 12, **kwargs)
    if pretrained:
        path = Path(__file__).parent / 'work/densenet-bc-100-12/best.pth'
        model.load_state_dict(torch.load(path, map_location='cpu', weights_only=True)['model'])
    return _fused(model)


@functools.wraps(densenet.densenet_cifar)
def densenet_cifar(*args, **kwargs):
    return _fused(densenet.densenet_cifar(*args, **kwargs))


def _fused(model):
    try:
        return fuse(model)
    except ValueError as error:
        warnings.warn(f'{error}: it runs layer by layer, which is slower', stacklevel=2)
        return model


densenet121, densenet161, densenet169, densenet201 = map(_entry_point, (
    densenet.densenet121, densenet.densenet161, densenet.densenet169, densenet.densenet201))
densenet264, densenet232_k48, densenet264_k48 = map(_entry_point, (
    densenet.densenet264, densenet.densenet232_k48, densenet.densenet264_k48))
