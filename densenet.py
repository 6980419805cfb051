"""DenseNet and DenseNet-BC in one file: copy it into your project, all it needs is torch.

    from densenet import densenet121, densenet_cifar
    model = densenet121(num_classes=1000)                  # the ImageNet family, 7x7 stem
    model = densenet_cifar(depth=100, growth_rate=12)      # the CIFAR and SVHN family, 3x3 stem
    logits = model(images)                                 # [N, 3, H, W] -> [N, num_classes]
    feature_map = model.features(images)                   # before the last ReLU and the pooling

Weights load from torchvision's state dicts, the old spelling included, and go back the same way:
`model.load_state_dict(torchvision.models.densenet121(weights='DEFAULT').state_dict())`.

"The paper" is Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks,
CVPR 2017, https://arxiv.org/abs/1608.06993. "The technical report" is Pleiss et al.:
Memory-Efficient Implementation of DenseNets, 2017, https://arxiv.org/abs/1707.06990.
"""

import contextlib
import re
from collections import OrderedDict
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ['DenseNet', 'densenet121', 'densenet161', 'densenet169', 'densenet201', 'densenet264',
           'densenet232_k48', 'densenet264_k48', 'densenet_cifar']


class DenseNet(nn.Module):
    """A densely connected network; the first seven arguments are those of torchvision's class.

    Args:
        growth_rate: channels that each layer adds, k in the paper.
        block_config: number of layers in each dense block.
        num_init_features: channels of the stem's convolution.
        bn_size: width of the 1x1 bottleneck convolution, in units of growth_rate.
        drop_rate: dropout after every convolution but the first (paper, section 4.2).
        num_classes: width of the classifier.
        memory_efficient: recompute concatenation, norm and ReLU in backward instead of storing
            them; the same gradients and running statistics for less memory and more time. Under
            torch.compile it has no effect: the compiler decides for itself what to recompute.
        compression: share of the channels that a transition keeps, theta in the paper.
        bottleneck: a 1x1 convolution before each 3x3 one (DenseNet-B).
        small_inputs: the stem for CIFAR and SVHN, one 3x3 convolution, instead of ImageNet's.
        in_channels: channels of the images.

    Shapes: images [N, in_channels, H, W] to logits [N, num_classes]; any H and W of at least
    `min_size` pixels.

    Raises:
        ValueError: an argument out of range, or images that are too small or not of that shape.

    The paper's DenseNet-BC has bottleneck and compression 0.5, its plain DenseNet has neither.
    """

    def __init__(self, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64,
                 bn_size=4, drop_rate=0.0, num_classes=1000, memory_efficient=False, *,
                 compression=0.5, bottleneck=True, small_inputs=False, in_channels=3):
        super().__init__()
        block_config = tuple(block_config)
        _check_positive(growth_rate=growth_rate, num_init_features=num_init_features,
                        bn_size=bn_size, num_classes=num_classes, in_channels=in_channels)
        _check_positive(**{f'block_config[{i}]': n for i, n in enumerate(block_config)})
        if not block_config:
            raise ValueError('block_config is empty: give the number of layers of each block')
        if not 0 <= drop_rate < 1:
            raise ValueError(f'drop_rate must be in [0, 1), not {drop_rate}')
        if not 0 < compression <= 1:
            raise ValueError(f'compression must be in (0, 1], not {compression}')

        self.in_channels = in_channels
        # A transition halves the map, rounding down; the ImageNet stem divides by 4, rounding up.
        smallest_map = 2 ** (len(block_config) - 1)
        self.min_size = smallest_map if small_inputs else 4 * (smallest_map - 1) + 1

        stem = _small_stem if small_inputs else _imagenet_stem
        self.features = nn.Sequential(stem(in_channels, num_init_features))
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
                self.features.add_module(f'transition{i}',
                                         Transition(channels, compressed, drop_rate))
                channels = compressed
        self.features.add_module('norm5', nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        self._init_weights()

    def _init_weights(self):
        """As the official code: He et al. by the number of outputs; nn.BatchNorm2d starts right."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(self, images):
        self._check_images(images)
        x = F.relu(self.features(images))
        x = F.adaptive_avg_pool2d(x, 1).flatten(1)
        return self.classifier(x)

    def _check_images(self, images):
        if torch.jit.is_tracing():  # sizes are tensors here, and a comparison would be frozen in
            return
        shape = tuple(images.shape)
        if len(shape) != 4 or shape[1] != self.in_channels or min(shape[2:]) < self.min_size:
            raise ValueError(f'expected images [N, {self.in_channels}, H, W] with H and W at least '
                             f'{self.min_size}, not {list(shape)}')

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Called before the children load, so that they find the keys already renamed.
        for key in [key for key in state_dict if key.startswith(prefix)]:
            new_key = prefix + _canonical_key(key[len(prefix):])
            if new_key != key:
                state_dict[new_key] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check_positive(**values):
    for name, value in values.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f'{name} must be a positive whole number, not {value!r}')


def _canonical_key(key):
    """The key of today for `module.` (DDP), `_orig_mod.` (compile) and, pre-2018, `norm.1`."""
    key = re.sub(r'^(?:module\.|_orig_mod\.)+', '', key)
    return re.sub(r'(denselayer\d+\.(?:norm|relu|conv))\.([12])\.', r'\1\2.', key)


def _small_stem(in_channels, out_channels):
    return OrderedDict(conv0=nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False))


def _imagenet_stem(in_channels, out_channels):
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, out_channels, 7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(out_channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(3, stride=2, padding=1),
    )


class DenseBlock(nn.ModuleDict):
    """Layers of which each reads the concatenation of the input and all earlier layers' outputs.

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

    A list of feature maps [N, C_i, H, W], C in all -> [N, growth_rate, H, W]
    """

    def __init__(self, in_channels, growth_rate, bn_size, drop_rate, bottleneck, memory_efficient):
        super().__init__()
        self.drop_rate = drop_rate
        self.bottleneck = bottleneck
        self.memory_efficient = memory_efficient
        self.norm1 = nn.BatchNorm2d(in_channels)
        if bottleneck:
            width = bn_size * growth_rate
            self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
            self.norm2 = nn.BatchNorm2d(width)
            self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(in_channels, growth_rate, 3, padding=1, bias=False)

    def forward(self, features):
        if (self.memory_efficient and self.training and torch.is_grad_enabled()
                and not torch.compiler.is_compiling()):
            # Dropout stays outside, so there is no random state to keep for the second run.
            x = checkpoint(self._first_conv, *features, use_reentrant=False,
                           preserve_rng_state=False, context_fn=self._checkpoint_contexts)
        else:
            x = self._first_conv(*features)
        x = F.dropout(x, self.drop_rate, self.training)
        if self.bottleneck:
            x = self.conv2(F.relu(self.norm2(x)))
            x = F.dropout(x, self.drop_rate, self.training)
        return x

    def _first_conv(self, *features):
        # The ReLU is not in place: that would save backward no memory, and break hooks on norm1.
        return self.conv1(F.relu(self.norm1(torch.cat(features, 1))))

    def _checkpoint_contexts(self):
        return contextlib.nullcontext(), _FrozenStatistics(self.norm1)


class _FrozenStatistics:
    """A context in which a norm takes batch statistics but doesn't count them in the running ones.

    It can be entered again, since a graph that is retained is recomputed by each backward.
    """

    def __init__(self, norm):
        self.norm = norm

    def __enter__(self):
        counter = self.norm.num_batches_tracked
        self.kept = self.norm.momentum, counter
        self.norm.momentum = 0.0
        self.norm.num_batches_tracked = None if counter is None else counter.clone()

    def __exit__(self, *_):
        self.norm.momentum, self.norm.num_batches_tracked = self.kept


class Transition(nn.Module):
    """BN-ReLU-Conv(1x1), then 2x2 average pooling (paper, section 3).

    [N, C, H, W] -> [N, out_channels, H // 2, W // 2]
    """

    def __init__(self, in_channels, out_channels, drop_rate):
        super().__init__()
        self.drop_rate = drop_rate
        self.norm = nn.BatchNorm2d(in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)

    def forward(self, x):
        x = self.conv(F.relu(self.norm(x)))
        x = F.dropout(x, self.drop_rate, self.training)
        return F.avg_pool2d(x, 2)


def densenet121(**kwargs):
    """DenseNet-121 (paper, table 1), 7,978,856 parameters; `kwargs` as for `DenseNet`."""
    return _imagenet_model(32, (6, 12, 24, 16), kwargs)


def densenet169(**kwargs):
    """DenseNet-169 (paper, table 1), 14,149,480 parameters; `kwargs` as for `DenseNet`."""
    return _imagenet_model(32, (6, 12, 32, 32), kwargs)


def densenet201(**kwargs):
    """DenseNet-201 (paper, table 1), 20,013,928 parameters; `kwargs` as for `DenseNet`."""
    return _imagenet_model(32, (6, 12, 48, 32), kwargs)


def densenet161(**kwargs):
    """DenseNet-161, k=48 (official code), 28,681,000 parameters; `kwargs` as for `DenseNet`."""
    return _imagenet_model(48, (6, 12, 36, 24), kwargs)


def densenet264(**kwargs):
    """DenseNet-264 (paper, table 1), 33,337,704 parameters; `kwargs` as for `DenseNet`."""
    return _imagenet_model(32, (6, 12, 64, 48), kwargs)


def densenet232_k48(**kwargs):
    """DenseNet-232, k=48 (technical report), 55,570,984 parameters; `kwargs` as for `DenseNet`."""
    return _imagenet_model(48, (6, 12, 48, 48), kwargs)


def densenet264_k48(**kwargs):
    """DenseNet-264, k=48 (technical report, there also "cosine-264"), 72,686,632 parameters."""
    return _imagenet_model(48, (6, 12, 64, 48), kwargs)


def _imagenet_model(growth_rate, block_config, kwargs):
    settings = {'growth_rate': growth_rate, 'block_config': block_config, **kwargs}
    settings.setdefault('num_init_features', 2 * settings['growth_rate'])
    return DenseNet(**settings)


def stem_width(growth_rate, bottleneck, compression):
    """Channels of the first convolution for CIFAR and SVHN (paper, section 3).

    2 * growth_rate with bottleneck and compression (BC), else 16: only so do the paper's parameter
    counts come out.
    """
    return 2 * growth_rate if bottleneck and compression < 1 else 16


def densenet_cifar(depth=100, growth_rate=12, *, bottleneck=True, compression=0.5, num_classes=10,
                   drop_rate=0.0, num_init_features=None, small_inputs=True, **kwargs):
    """The paper's networks for CIFAR and SVHN: three equal dense blocks (section 3).

    Args:
        depth: L in the paper, counted in layers with weights: 6n+4 with bottleneck, else 3n+4.
        num_init_features: by default `stem_width`.
        other arguments: as for `DenseNet`.

    Raises:
        ValueError: a depth that three equal blocks cannot have; names the nearest ones that can.
    """
    step = 6 if bottleneck else 3
    if not isinstance(depth, Integral):
        raise ValueError(f'depth must be a whole number, not {depth!r}')
    if depth < step + 4 or (depth - 4) % step:
        below = 4 + step * max(1, (depth - 4) // step)
        nearest = f'{below} and {below + step}' if depth > below else f'{below}'
        raise ValueError(f'depth must be {step}n+4 {"with" if bottleneck else "without"} '
                         f'bottleneck, not {depth}: nearest {nearest}')
    if num_init_features is None:
        num_init_features = stem_width(growth_rate, bottleneck, compression)
    return DenseNet(growth_rate, 3 * ((depth - 4) // step,), num_init_features,
                    drop_rate=drop_rate, num_classes=num_classes, compression=compression,
                    bottleneck=bottleneck, small_inputs=small_inputs, **kwargs)
