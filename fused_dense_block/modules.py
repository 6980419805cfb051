"""The modules that `fuse` supports, and the detection of later changes.

A dense block, in any container, has the children denselayer1, denselayer2, ... with the children
norm1, relu1, conv1 and, with bottleneck, norm2, relu2, conv2, in this order:

    this repository, torchvision, segmentation_models_pytorch    exactly like this
    torchxrayvision    the block is an nn.Sequential, and a layer returns cat([x, new], 1)
    timm               norm and relu are one module, a BatchNormAct2d
    MONAI              like torchxrayvision; the children of a layer are in its `layers`
"""

import enum
import gc
import itertools
import weakref
from operator import methodcaller
from typing import NamedTuple

import torch
import torch.fx
from torch import nn
from torch.autograd import forward_ad

STEM = 'conv0', 'norm0', 'relu0', 'pool0'
VALUES = methodcaller('values')
HOOKS = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'
# These names are private. If a torch version renames one, global hooks are ignored.
GLOBAL_HOOKS = [getattr(nn.modules.module, f'_global{kind}', {}) for kind in HOOKS]

# Expected class and attributes of each submodule, by name (digits stripped).
EXPECTED = {
    'norm': (nn.BatchNorm2d, dict(affine=[True], track_running_stats=[True])),
    'relu': (nn.ReLU, {}),
    'conv': (nn.Conv2d, dict(stride=[(1, 1)], dilation=[(1, 1)], padding_mode=['zeros'],
                             groups=[1], bias=[None])),
    'pool': (nn.AvgPool2d, dict(kernel_size=[2, (2, 2)], stride=[2, (2, 2)], padding=[0, (0, 0)],
                                ceil_mode=[False], divisor_override=[None])),
}
EXPECTED_STEM = {**EXPECTED, 'conv': (nn.Conv2d, dict(bias=[None])),
                 'pool': (nn.MaxPool2d, dict(return_indices=[False]))}


class Difference(Exception):
    """Difference(name, what): a module differs from what is expected."""

    def inside(self, name):
        """The message, with `name` as the parent of the module."""
        child, what = self.args
        return f'{".".join(filter(None, (name, child)))} {what}'

    def __str__(self):
        return self.inside('')


class NormConvModules(NamedTuple):
    """A norm, and the convolution after norm and ReLU."""
    norm: nn.Module
    conv: nn.Module


class StemModules(NamedTuple):
    conv: nn.Module
    norm: nn.Module
    pool: nn.Module


def dense_layers(block):
    """The layers of a dense block, each a list of NormConvModules: two, or one without bottleneck.

    Raises:
        Difference: it is not a dense block as described above.
    """
    layers, channels = [], None  # channels that the layer reads
    for i, (name, layer) in enumerate(block._modules.items(), start=1):
        if name != f'denselayer{i}':
            raise Difference(name, f'is in place of denselayer{i}')
        if [*layer._modules] == ['layers']:  # MONAI
            name, layer = f'{name}.layers', layer.layers
        digits = '12' if 'norm2' in layer._modules else '1'
        modules = _children(layer, name, [kind + digit for digit in digits
                                          for kind in ('norm', 'relu', 'conv')])
        norm_convs = [NormConvModules(modules[f'norm{digit}'], modules[f'conv{digit}'])
                  for digit in digits]
        for digit, (norm, conv) in zip(digits, norm_convs):
            _check_channels(f'{name}.norm{digit}', norm, channels)
            _check_conv(f'{name}.conv{digit}', conv, norm, 3 if digit == digits[-1] else 1)
            channels = conv.out_channels
        channels = norm_convs[0].norm.num_features + norm_convs[-1].conv.out_channels
        layers.append(norm_convs)
    norms = [id(norm) for norm_convs in layers for norm, _ in norm_convs]
    if len({*norms}) < len(norms):
        raise Difference('', 'has a norm in two places')
    return layers


def transition(module):
    """The NormConvModules of a transition.

    Raises:
        Difference: its children are not norm, relu, conv and pool of a DenseNet.
    """
    modules = _children(module, '', ['norm', 'relu', 'conv', 'pool'])
    _check_conv('conv', modules['conv'], modules['norm'], 1)
    return NormConvModules(modules['norm'], modules['conv'])


def stem(features):
    """The StemModules of ImageNet's stem, the first children of `features`.

    Raises:
        Difference: they are other modules.
    """
    first = nn.ModuleDict({name: child for name, child in [*features._modules.items()][:len(STEM)]
                           if name in STEM})
    modules = _children(first, '', STEM, EXPECTED_STEM)
    _check_channels('norm0', modules['norm0'], modules['conv0'].out_channels)
    return StemModules(modules['conv0'], modules['norm0'], modules['pool0'])


def unusual_stem(stem):
    """Why the CPU kernels can't run these StemModules, or None."""
    expected = dict(kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), dilation=(1, 1), groups=1,
                    padding_mode='zeros')
    expected_pool = dict(kernel_size=3, stride=2, padding=1, dilation=1, ceil_mode=False)
    for name, module, attributes in (('conv0', stem.conv, expected),
                                     ('pool0', stem.pool, expected_pool)):
        for attribute, value in attributes.items():
            if getattr(module, attribute) not in (value, (value, value)):
                return f'{name}.{attribute} is not {value}'
    return None


def _children(module, name, expected, table=EXPECTED):
    """The children by name. If the norm includes the ReLU (timm), no relu child is expected."""
    found = module._modules
    expected = [child for child in expected if not (
        child.startswith('relu') and _includes_relu(found.get(child.replace('relu', 'norm'))))]
    for child, part in found.items():
        if child in expected:
            _check(part, f'{name}.{child}'.lstrip('.'), *table[child.rstrip('012')])
    if [*found] != expected:
        raise Difference(name, f'has the children {", ".join(found)} instead of '
                               f'{", ".join(expected)}')
    return found


def _check(module, name, expected, attributes):
    if _includes_relu(module):
        for child, allowed in (('act', nn.ReLU), ('drop', nn.Identity)):
            if type(getattr(module, child)) is not allowed:
                raise Difference(f'{name}.{child}', f'is a {type(getattr(module, child)).__name__}')
    elif type(module) is not expected:
        raise Difference(name, f'is a {type(module).__name__}')
    for attribute, allowed in attributes.items():
        if getattr(module, attribute) not in allowed:
            raise Difference(f'{name}.{attribute}', f'is not {allowed[0]}')
    if isinstance(module, nn.BatchNorm2d):
        for attribute, value in (*module._parameters.items(), *module._buffers.items()):
            if value is None:
                raise Difference(f'{name}.{attribute}', 'is None')


def _check_channels(name, norm, channels):
    if channels not in (None, norm.num_features):
        raise Difference(name, f'is for {norm.num_features} channels, and there are {channels}')


def _check_conv(name, conv, norm, side):
    if conv.kernel_size != (side, side) or conv.padding != (side // 2, side // 2):
        raise Difference(name, f'is not a {side}x{side} convolution with padding {side // 2}')
    if conv.in_channels != norm.num_features:
        raise Difference(name, f'is for {conv.in_channels} channels, and there are '
                               f'{norm.num_features}')


def _includes_relu(norm):
    return type(norm).__name__ == 'BatchNormAct2d'  # timm's


def recomputes(layer):
    return bool(vars(layer).get('memory_efficient') or vars(layer).get('grad_checkpointing'))


# ---- later changes -------------------------------------------------------------------------------

def obstacle(root, watched):
    """Why the modules must run one by one, or None. `watched` has (name, module) pairs."""
    for name, module in watched:
        if 'forward' in vars(module) or any(getattr(module, kind) for kind in HOOKS):
            return f'{name} has hooks or a forward of its own'
        if module.training != root.training:
            return f'{name}.training is not {root.training}'
    return None


def signature(root, watched):
    """All that determines what the modules compute: classes, methods and attributes.

    Except attributes that the fused forward reads on every call.

    Raises:
        Difference: a module of a class outside torch has an attribute that can change in place.
    """
    read = {'training', 'eps', 'momentum', 'drop_rate', 'memory_efficient', 'grad_checkpointing',
            'path', 'reason', '_fused', *vars(nn.Module())}
    found = []
    for name, module in [('', root), *watched]:
        attributes = {key: value for key, value in vars(module).items() if key not in read}
        if own_classes(module):
            for key, value in attributes.items():
                if not _is_immutable(value):
                    raise Difference(name, f'has the attribute {key}, a {type(value).__name__}, '
                                           f'which may change in place')
        else:  # the attributes that matter are checked one by one, unless they replace a method
            attributes = {key: value for key, value in attributes.items()
                          if hasattr(type(module), key)}
        found.append((name, [list(vars(cls).values()) for cls in own_classes(module)],
                      torch_methods(original_class(module)), original_class(module), attributes,
                      bool(vars(module).get('drop_rate'))))
    return found


def _is_immutable(value):
    if isinstance(value, (tuple, frozenset)):
        return all(map(_is_immutable, value))
    return callable(value) or isinstance(value, (
        type(None), bool, int, float, complex, str, bytes, enum.Enum, torch.dtype, torch.device,
        torch.memory_format))


def own_classes(module):
    """The classes of a module that are defined outside torch and this package."""
    return [cls for cls in type(module).__mro__ if not hasattr(cls, '_kind')
            and cls.__module__.partition('.')[0] not in ('torch', 'builtins')
            and not cls.__module__.startswith(__package__)]


def original_class(module):
    """The class of a module before it was fused."""
    return getattr(type(module), '_base', type(module))


def torch_methods(cls):
    return cls.forward, getattr(cls, '_conv_forward', None)  # the second is patched, too


class Snapshot:
    """Detects changes in the watched modules, cheaply enough for each forward pass.

    Compares classes and their methods, attributes, hooks, children, and the mode of `root`.
    """

    def __init__(self, root, watched):
        self.root = weakref.ref(root)  # no cycles: they would keep a deleted model in memory
        self.modules = [module for _, module in watched]
        # From Python 3.13 on, the values of an object's dict may belong to the object instead.
        self.owners = [*self.modules, *map(vars, self.modules)]
        self.owners += [module._modules for module in self.modules if module._modules]
        self.hooks = [getattr(module, kind) for module in self.modules for kind in HOOKS]
        self.classes = [vars(cls) for cls in {cls for module in (root, *self.modules)
                                              for cls in own_classes(module)}]
        self.torch_classes = [*set(map(type, self.modules))]
        self.state = self._state(root)

    def _state(self, root):
        # Flat lists, built and compared in C, by identity first. gc.get_referents gives all values
        # of many dicts in one call.
        attributes = [value for name, value in vars(root).items()
                      if name not in ('path', 'reason', '_fused')]
        return ([*map(type, self.modules)], [*map(torch_methods, self.torch_classes)],
                [*itertools.chain.from_iterable(map(VALUES, self.classes))],
                gc.get_referents(*self.owners), [*root._modules.values()],
                any(self.hooks) and [*map(bool, self.hooks)], attributes)

    def holds(self, root):
        try:
            return root is self.root() and self._state(root) == self.state
        except (RuntimeError, ValueError):  # a tensor or array was replaced, which == compares
            return False


def is_traced(x):
    """True while torch.compile, export, jit.trace or fx records a graph."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()
            or isinstance(x, torch.fx.Proxy))


def unusual_class(tensors):
    """Why tensors of these classes rule out the fused paths, or None.

    Subclasses may have no memory of their own (DTensor), or outputs of their own class (MONAI's
    MetaTensor).
    """
    for cls in {*map(type, tensors)} - {torch.Tensor, nn.Parameter}:
        return f'a tensor of the class {cls.__name__}'
    return None


def transformed_or_hooked():
    """Active transforms or global hooks, which rule out the fused paths, or None."""
    # Private names too; if torch renames these, transforms still raise.
    if (getattr(torch._C, '_are_functorch_transforms_active', lambda: False)()
            or getattr(forward_ad, '_current_level', -1) >= 0):
        return 'torch.func or forward-mode differentiation'
    if any(GLOBAL_HOOKS):
        return 'global module hooks'
    return None
