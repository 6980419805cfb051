"""The networks for torch.hub, from a clone or from a repository's name:

    model = torch.hub.load('path/to/clone', 'densenet121', source='local', pretrained=True)
    model = torch.hub.load('path/to/clone', 'densenet_cifar', source='local', depth=40)
    model = torch.hub.load('path/to/clone', 'densenet_bc_100_12', source='local', pretrained=True)

The networks for ImageNet take the arguments of `densenet.DenseNet`, and `densenet_cifar` those of
`densenet.densenet_cifar`. With `pretrained`, densenet121, 161, 169 and 201 have torchvision's
weights for ImageNet, and densenet_bc_100_12 ours for CIFAR-10; the attributes `classes`, `mean` and
`std` then have the class names and the statistics per channel of images in 0..1, otherwise they are
None. Models are in eval mode, with fused dense blocks (see fused_dense_block/).
"""

import functools
import warnings
from pathlib import Path as _Path  # torch.hub.list shows all public callables

import torch

import densenet
from fused_dense_block import fuse as _fuse

dependencies = ['torch']


def _entry_point(build):
    @functools.wraps(build)
    def entry_point(pretrained=False, **kwargs):
        if not pretrained:
            return _prepared(build(**kwargs))
        from torchvision.models import get_model_weights  # the networks alone need no torchvision

        weights = get_model_weights(build.__name__).DEFAULT
        transforms = weights.transforms()
        return _prepared(build(weights=weights, **kwargs), weights.meta['categories'],
                         transforms.mean, transforms.std)
    return entry_point


def densenet_bc_100_12(pretrained=False, **kwargs):
    """DenseNet-BC, L=100, k=12. With `pretrained`, our weights for CIFAR-10."""
    model = densenet.densenet_cifar(100, 12, **kwargs)
    if not pretrained:
        return _prepared(model)
    path = _Path(__file__).parent / 'work/densenet-bc-100-12/best.pth'
    saved = torch.load(path, map_location='cpu', weights_only=True)
    model.load_state_dict(saved['model'])
    dataset = saved['dataset']
    return _prepared(model, dataset['classes'], *([round(value / 255, 6) for value in dataset[key]]
                                                  for key in ('mean', 'std')))


@functools.wraps(densenet.densenet_cifar)
def densenet_cifar(*args, **kwargs):
    return _prepared(densenet.densenet_cifar(*args, **kwargs))


def _prepared(model, classes=None, mean=None, std=None):
    model.classes, model.mean, model.std = (
        value and list(value) for value in (classes, mean, std))
    try:
        _fuse(model)
    except ValueError as error:
        warnings.warn(f'{error}: it runs layer by layer, which is slower', stacklevel=3)
    return model.eval()


densenet121, densenet161, densenet169, densenet201 = map(_entry_point, (
    densenet.densenet121, densenet.densenet161, densenet.densenet169, densenet.densenet201))
densenet264, densenet232_k48, densenet264_k48 = map(_entry_point, (
    densenet.densenet264, densenet.densenet232_k48, densenet.densenet264_k48))
