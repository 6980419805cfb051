"""DenseNet and DenseNet-BC in one file. Copy it into your project; it needs only torch.

    model = densenet121(num_classes=1000)                  # the ImageNet family, 7x7 stem
    model = densenet_cifar(depth=100, growth_rate=12)      # the CIFAR and SVHN family, 3x3 stem
    logits = model(images)                                 # [N, 3, H, W] -> [N, num_classes]
    feature_map = model.features(images)                   # before the last ReLU and the pooling

Arguments of `DenseNet`, module names and state-dict keys are torchvision's, so either can replace
the other. On CPUs `fused_dense_block.fuse(model)` trains faster, in memory linear in depth.

"The paper" is Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks,
CVPR 2017, https://arxiv.org/abs/1608.06993; "the technical report" Pleiss et al.: Memory-Efficient
Implementation of DenseNets, 2017, https://arxiv.org/abs/1707.06990.
"""

import contextlib
import re
from collections import OrderedDict

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ['DenseNet', 'densenet121', 'densenet161', 'densenet169', 'densenet201', 'densenet264',
           'densenet232_k48', 'densenet264_k48', 'densenet_cifar']


class DenseNet(nn.Module):
    """A densely connected network; the first seven arguments are torchvision's.

    The defaults give the paper's DenseNet-BC; bottleneck=False with compression=1 its DenseNet.

    Args:
        growth_rate: channels that each layer adds, k in the paper.
        block_config: number of layers in each dense block.
        num_init_features: output channels of the stem's convolution.
        bn_size: width of the 1x1 bottleneck convolution, in units of growth_rate.
        drop_rate: dropout after every convolution except the first (paper, section 4.2).
        num_classes: outputs of the classifier.
        memory_efficient: recompute the first half of each layer in backward instead of storing it.
            No effect under torch.compile.
        compression: fraction of the channels that a transition keeps, theta in the paper.
        bottleneck: a 1x1 convolution before each 3x3 one (DenseNet-B).
        small_inputs: the stem for CIFAR and SVHN, one 3x3 convolution, instead of ImageNet's.
        in_channels: channels of the images.

    Shapes: images [N, in_channels, H, W] to logits [N, num_classes].

    Attributes:
        config: all arguments; `DenseNet(**model.config)` builds the same network.
        min_size: the smallest H and W of images, in pixels.

    Raises:
        ValueError: an argument out of range, or images that are too small.
    """

    def __init__(self, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64,
                 bn_size=4, drop_rate=0.0, num_classes=1000, memory_efficient=False, *,
                 compression=0.5, bottleneck=True, small_inputs=False, in_channels=3):
        super().__init__()
        block_config = tuple(block_config)
        self.config = dict(
            growth_rate=growth_rate, block_config=block_config, num_init_features=num_init_features,
            bn_size=bn_size, drop_rate=drop_rate, num_classes=num_classes,
            memory_efficient=memory_efficient, compression=compression, bottleneck=bottleneck,
            small_inputs=small_inputs, in_channels=in_channels)
        _check_config(**self.config)
        # A transition halves the map, rounding down; the ImageNet stem divides by 4, rounding up.
        smallest_map = 2 ** (len(block_config) - 1)
        self.min_size = smallest_map if small_inputs else 4 * (smallest_map - 1) + 1

        self.features = nn.Sequential(_stem(in_channels, num_init_features, small_inputs))
        channels = num_init_features
        for i, num_layers in enumerate(block_config, start=1):
            block = DenseBlock(num_layers, channels, growth_rate, bn_size, drop_rate, bottleneck,
                               memory_efficient)
            self.features.add_module(f'denseblock{i}', block)
            channels += num_layers * growth_rate
            if i < len(block_config):
                compressed = int(channels * compression)
                if compressed < 1:
                    raise ValueError(f'compression {compression} leaves no channels of {channels}')
                transition = Transition(channels, compressed, drop_rate)
                self.features.add_module(f'transition{i}', transition)
                channels = compressed
        self.features.add_module('norm5', nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        # As in the official code: He initialization with fan_out. Batch norms keep 1 and 0.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        traced = _is_traced(x)  # a tracer would record the comparison's result as a constant
        if not traced and (x.dim() != 4 or min(x.shape[2:]) < self.min_size):
            raise ValueError(f'expected images [N, C, H, W] with H and W at least {self.min_size}, '
                             f'not {list(x.shape)}')
        x = self.features(x)
        # In place in evaluation, as in torchvision: some heat-map tools save the output of
        # `features` in a forward hook and expect it rectified. With a backward hook the output is a
        # view, on which in-place operations raise.
        x = F.relu(x, inplace=not (self.training or traced or x._is_view()))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.classifier(torch.flatten(x, 1))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Runs before the children load, so they find the keys already renamed.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            # DDP and torch.compile prefix the names; before 2018, norm1 was norm.1.
            name = re.sub(r'^(?:module\.|_orig_mod\.)+', '', key[len(prefix):])
            name = re.sub(r'(denselayer\d+\.(?:norm|relu|conv))\.([12])\.', r'\1\2.', name)
            state_dict[prefix + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_config(block_config, drop_rate, compression, **others):
    for name in ('growth_rate', 'num_init_features', 'bn_size', 'num_classes', 'in_channels'):
        if others[name] < 1:
            raise ValueError(f'{name} must be at least 1, not {others[name]}')
    if min(block_config, default=0) < 1:
        raise ValueError(f'block_config must have at least one layer in each block, not '
                         f'{block_config}')
    if not 0 <= drop_rate < 1:
        raise ValueError(f'drop_rate must be in [0, 1), not {drop_rate}')
    if not 0 < compression <= 1:
        raise ValueError(f'compression must be in (0, 1], not {compression}')


def _stem(in_channels, out_channels, small_inputs):
    if small_inputs:
        return OrderedDict(conv0=nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(out_channels),
        relu0=nn.ReLU(),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )


class DenseBlock(nn.ModuleDict):
    """Each layer reads the concatenation of the input and the outputs of all earlier layers.

    [N, C, H, W] -> [N, C + num_layers * growth_rate, H, W]
    """

    def __init__(self, num_layers, in_channels, growth_rate, bn_size, drop_rate, bottleneck,
                 memory_efficient):
        super().__init__({
            f'denselayer{i + 1}': DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size,
                                             drop_rate, bottleneck, memory_efficient)
            for i in range(num_layers)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class DenseLayer(nn.Module):
    """BN-ReLU-Conv(1x1)-BN-ReLU-Conv(3x3) or, without bottleneck, BN-ReLU-Conv(3x3).

    A feature map [N, C, H, W], or a list of maps with C channels in all -> [N, growth_rate, H, W]
    """

    def __init__(self, in_channels, growth_rate, bn_size, drop_rate, bottleneck, memory_efficient):
        super().__init__()
        self.drop_rate = drop_rate
        self.bottleneck = bottleneck
        self.memory_efficient = memory_efficient
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()  # in place would save no memory, and break backward hooks
        if bottleneck:
            width = bn_size * growth_rate
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.relu2 = nn.ReLU()
            self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, features):
        features = features if isinstance(features, (list, tuple)) else [features]
        if (self.memory_efficient and self.training and torch.is_grad_enabled()
                and not _is_traced(features[0])):
            # No dropout in here, so no random state to restore for the recomputation.
            x = checkpoint(self._first_half, *features, use_reentrant=False,
                           preserve_rng_state=False, context_fn=lambda: (
                               contextlib.nullcontext(), _FrozenRunningStatistics(self.norm1)))
        else:
            x = self._first_half(*features)
        x = self._dropout(x)
        if self.bottleneck:
            x = self._dropout(self.conv2(self.relu2(self.norm2(x))))
        return x

    def _first_half(self, *features):
        return self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))

    def _dropout(self, x):
        return F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x


class Transition(nn.Sequential):
    """BN-ReLU-Conv(1x1), then 2x2 average pooling (paper, section 3).

    [N, C, H, W] -> [N, out_channels, H // 2, W // 2]
    """

    def __init__(self, in_channels, out_channels, drop_rate=0.0):
        super().__init__(OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pool=nn.AvgPool2d(2)))
        self.drop_rate = drop_rate

    def forward(self, x):
        for name, module in self._modules.items():
            x = module(x)
            if name == 'conv' and self.drop_rate:
                x = F.dropout(x, self.drop_rate, self.training)
        return x


class _FrozenRunningStatistics:
    """A context in which a norm in training mode does not update its running statistics.

    A class, because double backward recomputes several times and re-enters the same object.
    """

    def __init__(self, norm):
        self.norm = norm if hasattr(norm, 'num_batches_tracked') else None  # not a batch norm

    def __enter__(self):
        if self.norm is not None:
            self.kept = self.norm.momentum, self.norm.num_batches_tracked
            self.norm.momentum, self.norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_):
        if self.norm is not None:
            self.norm.momentum, self.norm.num_batches_tracked = self.kept


def _is_traced(x):
    """True while torch.compile, export, jit.trace or fx records a graph."""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()
            or isinstance(x, torch.fx.Proxy))


# ---- the paper's networks ------------------------------------------------------------------------

def densenet121(weights=None, progress=True, **kwargs):
    """DenseNet-121 (paper, table 1), 7,978,856 parameters.

    The ImageNet constructors take torchvision's arguments, except weights named by a string:

    Args:
        weights: a member of torchvision's enum, such as `DenseNet121_Weights.DEFAULT`, whose file
            is downloaded once, or a state dict. None: random weights.
        progress: show a progress bar while downloading.
        kwargs: as for `DenseNet`.

    Raises:
        ValueError: `weights` is a string, or an argument is out of range.
    """
    return _imagenet_model(32, (6, 12, 24, 16), weights, progress, kwargs)


def densenet169(weights=None, progress=True, **kwargs):
    """DenseNet-169 (paper, table 1), 14,149,480 parameters."""
    return _imagenet_model(32, (6, 12, 32, 32), weights, progress, kwargs)


def densenet201(weights=None, progress=True, **kwargs):
    """DenseNet-201 (paper, table 1), 20,013,928 parameters."""
    return _imagenet_model(32, (6, 12, 48, 32), weights, progress, kwargs)


def densenet161(weights=None, progress=True, **kwargs):
    """DenseNet-161, k=48 (official code), 28,681,000 parameters."""
    return _imagenet_model(48, (6, 12, 36, 24), weights, progress, kwargs)


def densenet264(weights=None, progress=True, **kwargs):
    """DenseNet-264 (paper, table 1), 33,337,704 parameters."""
    return _imagenet_model(32, (6, 12, 64, 48), weights, progress, kwargs)


def densenet232_k48(weights=None, progress=True, **kwargs):
    """DenseNet-232, k=48 (technical report), 55,570,984 parameters."""
    return _imagenet_model(48, (6, 12, 48, 48), weights, progress, kwargs)


def densenet264_k48(weights=None, progress=True, **kwargs):
    """DenseNet-264, k=48 (technical report, also called "cosine-264"), 72,686,632 parameters."""
    return _imagenet_model(48, (6, 12, 64, 48), weights, progress, kwargs)


def _imagenet_model(growth_rate, block_config, weights, progress, kwargs):
    if isinstance(weights, str):
        raise ValueError(f'weights must be a member of torchvision\'s enum or a state dict, not '
                         f'{weights!r}: torchvision.models.get_weight(...) finds a member by name, '
                         f'such as \'DenseNet121_Weights.IMAGENET1K_V1\'')
    settings = {'growth_rate': growth_rate, 'block_config': block_config, **kwargs}
    settings.setdefault('num_init_features', 2 * settings['growth_rate'])
    model = DenseNet(**settings)
    if hasattr(weights, 'get_state_dict'):
        weights = weights.get_state_dict(progress=progress, check_hash=True, weights_only=True)
    if weights is not None:
        model.load_state_dict(weights)
    return model


def stem_width(growth_rate, bottleneck, compression):
    """Channels of the first convolution for CIFAR and SVHN (paper, section 3).

    2 * growth_rate with bottleneck and compression (BC), otherwise 16: only these widths give the
    paper's parameter counts.
    """
    return 2 * growth_rate if bottleneck and compression < 1 else 16


def densenet_cifar(depth=100, growth_rate=12, *, bottleneck=True, compression=0.5, num_classes=10,
                   drop_rate=0.0, num_init_features=None, small_inputs=True, **kwargs):
    """The paper's networks for CIFAR and SVHN: three equal dense blocks (section 3).

    Args:
        depth: L in the paper, number of layers with weights: 6n+4 with bottleneck, 3n+4 without.
        num_init_features: by default `stem_width`.
        other arguments: as for `DenseNet`.

    Raises:
        ValueError: a depth that three equal blocks cannot have; names the nearest valid ones.
    """
    step = 6 if bottleneck else 3
    if depth < step + 4 or (depth - 4) % step:
        below = 4 + step * max(1, (depth - 4) // step)
        nearest = f'{below} and {below + step}' if depth > below else f'{below}'
        raise ValueError(f'depth must be {step}n+4 {"with" if bottleneck else "without"} '
                         f'bottleneck, not {depth}: nearest {nearest}')
    if num_init_features is None:
        num_init_features = stem_width(growth_rate, bottleneck, compression)
    n = (depth - 4) // step
    return DenseNet(growth_rate, (n, n, n), num_init_features,
                    drop_rate=drop_rate, num_classes=num_classes, compression=compression,
                    bottleneck=bottleneck, small_inputs=small_inputs, **kwargs)
