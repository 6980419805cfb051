"""DenseNet and DenseNet-BC in one file: copy it into your project, all it needs is torch.

    from densenet import densenet121, densenet_cifar
    model = densenet121(num_classes=1000)                  # the ImageNet family, 7x7 stem
    model = densenet_cifar(depth=100, growth_rate=12)      # the CIFAR and SVHN family, 3x3 stem
    logits = model(images)                                 # [N, 3, H, W] -> [N, num_classes]
    feature_map = model.features(images)                   # before the last ReLU and the pooling

Weights load from torchvision's state dicts, the old spelling included, and go back the same way:
`model.load_state_dict(torchvision.models.densenet121(weights='DEFAULT').state_dict())`.

A dense block can train in memory that grows linearly with its depth, not with the square of it:
`DenseBlock` says when it does, and `_LinearMemoryBlock` how.

"The paper" is Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks,
CVPR 2017, https://arxiv.org/abs/1608.06993. "The technical report" is Pleiss et al.:
Memory-Efficient Implementation of DenseNets, 2017, https://arxiv.org/abs/1707.06990.
"""

import contextlib
import re
from collections import OrderedDict, namedtuple
from collections.abc import Iterable
from numbers import Integral, Real

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

__all__ = ['DenseNet', 'densenet121', 'densenet161', 'densenet169', 'densenet201', 'densenet264',
           'densenet232_k48', 'densenet264_k48', 'densenet_cifar']

# A typing error should not fill the machine's memory. The paper's largest has 73 million weights.
MAX_WEIGHTS = 10**9
MAX_LAYERS = 10_000


class DenseNet(nn.Module):
    """A densely connected network; the first seven arguments are those of torchvision's class.

    Args:
        growth_rate: channels that each layer adds, k in the paper.
        block_config: number of layers in each dense block.
        num_init_features: channels of the stem's convolution.
        bn_size: width of the 1x1 bottleneck convolution, in units of growth_rate.
        drop_rate: dropout after every convolution but the first (paper, section 4.2).
        num_classes: width of the classifier.
        memory_efficient: keep little but the feature maps for backward and compute the rest
            again; the same gradients and running statistics for less memory and a little more
            time (see `DenseBlock`). Under torch.compile it has no effect: the compiler decides for
            itself what to recompute.
        compression: share of the channels that a transition keeps, theta in the paper.
        bottleneck: a 1x1 convolution before each 3x3 one (DenseNet-B).
        small_inputs: the stem for CIFAR and SVHN, one 3x3 convolution, instead of ImageNet's.
        in_channels: channels of the images.

    Shapes: images [N, in_channels, H, W] to logits [N, num_classes]; any H and W of at least
    `min_size` pixels.

    Attributes:
        config: all the arguments, so that `DenseNet(**model.config)` is the same network.
        min_size: pixels.

    Raises:
        ValueError: an argument out of range, or images that are too small or not of that shape.

    The paper's DenseNet-BC has bottleneck and compression 0.5, its plain DenseNet has neither.
    """

    def __init__(self, growth_rate=32, block_config=(6, 12, 24, 16), num_init_features=64,
                 bn_size=4, drop_rate=0.0, num_classes=1000, memory_efficient=False, *,
                 compression=0.5, bottleneck=True, small_inputs=False, in_channels=3):
        super().__init__()
        if not isinstance(block_config, Iterable):
            raise ValueError(f'block_config must be a number of layers for each block, not '
                             f'{block_config!r}')
        block_config = tuple(block_config)
        self.config = dict(
            growth_rate=growth_rate, block_config=block_config, num_init_features=num_init_features,
            bn_size=bn_size, drop_rate=drop_rate, num_classes=num_classes,
            memory_efficient=memory_efficient, compression=compression, bottleneck=bottleneck,
            small_inputs=small_inputs, in_channels=in_channels)
        _check_positive(growth_rate=growth_rate, num_init_features=num_init_features,
                        bn_size=bn_size, num_classes=num_classes, in_channels=in_channels)
        _check_positive(**{f'block_config[{i}]': n for i, n in enumerate(block_config)})
        for name in ('memory_efficient', 'bottleneck', 'small_inputs'):
            if not isinstance(self.config[name], int):
                raise ValueError(f'{name} must be True or False, not {self.config[name]!r}')
        if not block_config:
            raise ValueError('block_config is empty: give the number of layers of each block')
        if not (isinstance(drop_rate, Real) and 0 <= drop_rate < 1):
            raise ValueError(f'drop_rate must be in [0, 1), not {drop_rate!r}')
        _check_compression(compression)
        _check_size(**self.config)

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
        whole = isinstance(value, Integral) and not isinstance(value, bool)
        if not (whole and 1 <= value <= MAX_WEIGHTS):
            raise ValueError(f'{name} must be a whole number from 1 to {MAX_WEIGHTS:,}, not '
                             f'{value!r}')


def _check_compression(compression):
    if not (isinstance(compression, Real) and 0 < compression <= 1):
        raise ValueError(f'compression must be in (0, 1], not {compression!r}')


def _check_size(growth_rate, block_config, num_init_features, bn_size, num_classes, compression,
                bottleneck, small_inputs, in_channels, **_):
    """Refuse at once what would take hours to build, or more memory than there is."""
    if len(block_config) > 16 or sum(block_config) > MAX_LAYERS:
        raise ValueError(f'block_config has {sum(block_config)} layers in {len(block_config)} '
                         f'blocks: more than {MAX_LAYERS} layers or 16 blocks are not built')
    channels, width = num_init_features, bn_size * growth_rate
    count = in_channels * channels * (9 if small_inputs else 49)  # weights of convolutions
    for i, num_layers in enumerate(block_config, start=1):
        read = num_layers * channels + growth_rate * num_layers * (num_layers - 1) // 2
        count += (read * width + 9 * num_layers * width * growth_rate if bottleneck
                  else 9 * read * growth_rate)
        channels += num_layers * growth_rate
        if i < len(block_config):
            count += channels * int(channels * compression)
            channels = int(channels * compression)
    count += channels * num_classes
    if count > MAX_WEIGHTS:
        raise ValueError(f'such a network has {count:.1e} weights: more than {MAX_WEIGHTS:.0e} '
                         f'are not built')


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

    In training there are three ways to compute it, which end with the same outputs, gradients and
    running statistics. `path` says which one the last forward took:

        'plain'         layer by layer; what it keeps for backward grows with the square of depth
        'linear'        as one function, `_LinearMemoryBlock`, whose memory grows linearly with
                        depth; with memory_efficient=True it is little more than the feature maps.
                        They are its output: do not change that in place
        'checkpointed'  memory_efficient=True where 'linear' is impossible: the plain way, with
                        each layer's first convolution computed again in backward

    The function knows the layers as they are built here. Where they were changed (hooks, a norm of
    another type, frozen statistics), and in torch.func and the like, a block falls back to the
    other ways, and `obstacle` says why.

    Attributes:
        memory_efficient: as for `DenseNet`.
        linear_memory: True or False for the 'linear' way or the others. None, the default: True
            with memory_efficient, and on CPUs, where it was measured to take about as long as the
            plain way; on GPUs that is still to be measured.
        path: one of the three; None before a forward, and under torch.compile.
        obstacle: why the last forward fell back, or None if it did not.
    """

    linear_memory = None

    def __init__(self, num_layers, in_channels, growth_rate, bn_size, drop_rate, bottleneck,
                 memory_efficient):
        super().__init__({
            f'denselayer{i + 1}': DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size,
                                             drop_rate, bottleneck, memory_efficient)
            for i in range(num_layers)})
        self.path = self.obstacle = None

    @property
    def memory_efficient(self):
        return any(getattr(layer, 'memory_efficient', False) for layer in self.values())

    @memory_efficient.setter
    def memory_efficient(self, value):
        for layer in self.values():
            layer.memory_efficient = value

    def forward(self, x):
        self.path = self.obstacle = None
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return self._forward_plain(x)
        if self._wants_linear(x):
            self.obstacle = self._find_obstacle(x)
            if self.obstacle is None:
                self.path = 'linear'
                return self._forward_linear(x)
        checkpointed = self.memory_efficient and self.training and torch.is_grad_enabled()
        self.path = 'checkpointed' if checkpointed else 'plain'
        return self._forward_plain(x)

    def _wants_linear(self, x):
        if self.linear_memory is None:
            return self.training and (self.memory_efficient or x.device.type == 'cpu')
        return self.training and self.linear_memory

    def _forward_plain(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def _forward_linear(self, x):
        # Grad mode is asked for here: within a Function it is always off.
        keep_bottlenecks = torch.is_grad_enabled() and not self.memory_efficient
        return _LinearMemoryBlock.apply(list(self.values()), keep_bottlenecks, x,
                                        *self._parameters_in_order())

    def _parameters_in_order(self):
        """Layer after layer, weight and bias of norm1, weight of conv1, and of norm2, conv2."""
        return [parameter for layer in self.values()
                for norm, conv in zip(layer.norms(), layer.convs())
                for parameter in (norm.weight, norm.bias, conv.weight)]

    def _find_obstacle(self, x):
        """Why `_LinearMemoryBlock` can't stand in for the layers here, or None if it can."""
        # The first three have private names only. A torch that renames one is not asked: then
        # the function itself refuses torch.func and forward mode, but hooks would be overlooked.
        if getattr(torch._C, '_are_functorch_transforms_active', lambda: False)():
            return 'torch.func'
        if getattr(forward_ad, '_current_level', -1) >= 0:
            return 'forward-mode differentiation'
        if any(getattr(nn.modules.module, f'_global_{kind}_hooks', None)
               for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')):
            return 'global module hooks'
        if torch.jit.is_tracing():
            return 'torch.jit.trace'
        if x.dim() != 4 or x.numel() <= x.shape[1]:
            return f'an input of shape {list(x.shape)}'  # nn.BatchNorm2d complains about it
        channels = x.shape[1]
        for name, layer in self.items():
            if type(layer) is not DenseLayer:
                return f'{name} is a {type(layer).__name__}'
            obstacle = layer.find_obstacle(channels)
            if obstacle:
                return f'{name}: {obstacle}'
            channels += layer.convs()[-1].out_channels
        if len({(layer.drop_rate, layer.bottleneck, norm.eps) for layer in self.values()
                for norm in layer.norms()}) > 1:
            return 'layers that differ in drop_rate, bottleneck or eps'
        dtypes = {parameter.dtype for parameter in self._parameters_in_order()}
        if dtypes not in ({torch.float32}, {torch.float64}) or x.dtype != _conv_dtype(x, *dtypes):
            return f'input of {x.dtype}, weights of {", ".join(map(str, dtypes))}'
        return None


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
        counts = hasattr(self.norm1, 'num_batches_tracked')  # not if it was replaced by a GroupNorm
        recompute = _FrozenStatistics(self.norm1) if counts else contextlib.nullcontext()
        return contextlib.nullcontext(), recompute

    def norms(self):
        return [self.norm1, self.norm2] if self.bottleneck else [self.norm1]

    def convs(self):
        return [self.conv1, self.conv2] if self.bottleneck else [self.conv1]

    def find_obstacle(self, in_channels):
        """What `_LinearMemoryBlock` would overlook in this layer, such as 'norm1 has hooks'."""
        norms = {f'norm{i}': norm for i, norm in enumerate(self.norms(), start=1)}
        convs = {f'conv{i}': conv for i, conv in enumerate(self.convs(), start=1)}
        patches = {'forward', '_conv_forward', '_first_conv'}
        for name, module in {'it': self, **norms, **convs}.items():
            kind = nn.BatchNorm2d if name in norms else nn.Conv2d if name in convs else DenseLayer
            if type(module) is not kind or patches & vars(module).keys():
                return f'{name} is not a plain {kind.__name__}'
            if (module._forward_hooks or module._forward_pre_hooks
                    or module._backward_hooks or module._backward_pre_hooks):
                return f'{name} has hooks'
            if not module.training:
                return f'{name} is in eval mode'
        for name, norm in norms.items():
            if any(tensor is None for tensor in (norm.weight, norm.bias, norm.running_mean,
                                                 norm.running_var, norm.num_batches_tracked)):
                return f'{name} has no weights or no running statistics'
        if self.norm1.num_features != in_channels:
            return f'norm1 is for {self.norm1.num_features} channels, not {in_channels}'
        for name, conv in convs.items():
            side = conv.kernel_size[0]
            if (side % 2 == 0 or conv.kernel_size != (side, side)
                    or conv.padding != (side // 2, side // 2)
                    or not conv.stride == conv.dilation == (1, 1) or conv.groups > 1
                    or conv.padding_mode != 'zeros' or conv.bias is not None):
                return f'{name} has a bias, or is not a "same" convolution of stride 1'
        return None


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
        x = F.relu(self.norm(x))
        if not (self.drop_rate and self.training):
            return self.conv(F.avg_pool2d(x, 2))  # the two commute; pooled, it is a quarter as much
        return F.avg_pool2d(F.dropout(self.conv(x), self.drop_rate, self.training), 2)


class _LinearMemoryBlock(torch.autograd.Function):
    """A dense block in training as one function, whose memory is linear in the number of layers.

    All feature maps are in one buffer, where each layer writes its own channels: nothing is ever
    concatenated. The mean m and variance of a channel over the batch are the same for every layer
    that reads it, so they are taken once, and norm1 of layer l is (x - m) * s + bias with
    s = weight * r and r = 1 / sqrt(variance + eps). Saved for backward are the buffer, vectors of
    one number a channel, the outputs of the 1x1 convolutions (or not: `keep_bottlenecks`) and the
    masks of dropout. The rest is cheap to compute again.

    In backward, let g be the gradient at the output of norm1 of layer l, and M = N * H * W. Batch
    normalisation gives

        d_bias = sum(g),  d_weight = sum(g * (x - m) * r),
        dx = s * g - s * (d_bias + (x - m) * r * d_weight) / M

    and the gradient of a channel is the sum over the layers that read it. All but s * g is linear
    in x - m, so the coefficients are summed, and applied in one pass when all layers are done:

        dx = G - (A + (x - m) * B) / M  with
        G = sum of s * g,  A = sum of s * d_bias,  B = sum of s * r * d_weight  over l.

    Args:
        layers: the DenseLayers, for their settings and their running statistics, which are
            updated as nn.BatchNorm2d does it.
        keep_bottlenecks: keep the outputs of the 1x1 convolutions for backward.
        x: [N, C, H, W].
        parameters: layer after layer, weight and bias of norm1, weight of conv1 and, with
            bottleneck, those of norm2 and conv2.

    Returns:
        The feature maps [N, C + num_layers * growth_rate, H, W].
    """

    @staticmethod
    def forward(ctx, layers, keep_bottlenecks, x, *parameters):
        ctx.num_layers, ctx.in_channels = len(layers), x.shape[1]
        ctx.drop_rate, ctx.eps = layers[0].drop_rate, layers[0].norm1.eps
        layer_weights = _split(parameters, ctx.num_layers)
        channels = x.shape[1] + sum(weights[-1].shape[0] for weights in layer_weights)
        features = _empty_maps_like(x, channels)
        m, var, r = (x.new_empty(channels, 1, 1, dtype=parameters[0].dtype) for _ in range(3))

        def append(start, new):
            part = slice(start, start + new.shape[1])
            features[:, part] = new
            m[part], var[part] = _channel_statistics(features[:, part])
            r[part] = (var[part] + ctx.eps).rsqrt()

        kept = []
        with _no_autocast(x):
            append(0, x)
            for layer, (weight1, bias1, kernel1, *second_half) in zip(layers, layer_weights):
                c = len(weight1)  # channels that this layer reads
                s = _per_channel(weight1) * r[:c]
                y = _affine(features[:, :c], m[:c], s, _per_channel(bias1)).relu_()
                y, mask1 = _dropout(_conv(y, kernel1), ctx.drop_rate)
                z = mean2 = invstd2 = mask2 = None
                if second_half:
                    weight2, bias2, kernel2 = second_half
                    norm2, z = layer.norm2, y
                    y, mean2, invstd2 = torch.native_batch_norm(
                        z, weight2, bias2, norm2.running_mean, norm2.running_var, True,
                        _share_of_next_batch(norm2), ctx.eps)
                    y, mask2 = _dropout(_conv(y.relu_(), kernel2), ctx.drop_rate)
                kept += mask1, z if keep_bottlenecks else None, mean2, invstd2, mask2
                append(c, y)
        M = x.numel() // x.shape[1]
        unbiased = var.flatten() * (M / (M - 1))
        _count_batch(layers, [(layer.norm1, m.flatten(), unbiased) for layer in layers])
        ctx.save_for_backward(features, m, r, *parameters, *kept)
        return features

    @staticmethod
    def backward(ctx, grad):
        # With create_graph=True these gradients are to be differentiated again; batched ones
        # (is_grads_batched=True, vmap) can't be written into memory that is not.
        if torch.is_grad_enabled() or _is_batched(grad):
            return None, None, *_gradients_by_autograd(ctx, grad)
        features, m, r, layer_weights, layer_kept = _unpack(ctx)
        layer_needs = _split(ctx.needs_input_grad[3:], ctx.num_layers)
        M = features.numel() // features.shape[1]
        G = _empty_maps_like(features, features.shape[1]).copy_(grad)  # names as above
        A, B = torch.zeros_like(m), torch.zeros_like(m)

        def gradient_of(part):
            """That of some channels, once all layers that read them are in G, A and B."""
            share = features[:, part] - m[part]
            share.mul_(B[part] / M).add_(A[part] / M)
            return (G[:, part] - share).to(features.dtype)

        gradients = []
        with _no_autocast(features):
            for weights, kept, needs in reversed(list(zip(layer_weights, layer_kept,
                                                          layer_needs))):
                weight1, bias1, kernel1, *second_half = weights
                c = len(weight1)
                x, s = features[:, :c], _per_channel(weight1) * r[:c]
                y = _affine(x, m[:c], s, _per_channel(bias1)).relu_()
                g = gradient_of(slice(c, c + weights[-1].shape[0]))
                if second_half:
                    z = kept.z
                    if z is None:
                        z = _drop(_conv(y, kernel1), kept.mask1, ctx.drop_rate)
                    g, *second_gradients = _second_half_backward(
                        _drop(g, kept.mask2, ctx.drop_rate), z, kept, *second_half, ctx.eps,
                        kernel_needed=needs[5])
                    gradients = second_gradients + gradients
                g, d_kernel1 = _conv_backward(_drop(g, kept.mask1, ctx.drop_rate), y, kernel1,
                                              kernel_needed=needs[2])
                _relu_backward_(g, y)
                d_bias1 = _channel_sum(g, s.dtype)
                d_weight1 = _channel_sum(_affine(x, m[:c], r[:c], out=y).mul_(g), s.dtype)
                G[:, :c].addcmul_(g, s)
                A[:c].addcmul_(s, d_bias1)
                B[:c].addcmul_(s * r[:c], d_weight1)
                gradients = [d_weight1.flatten(), d_bias1.flatten(), d_kernel1] + gradients
        dx = gradient_of(slice(ctx.in_channels)) if ctx.needs_input_grad[2] else None
        return None, None, dx, *gradients


def _is_batched(tensor):
    names = 'is_batchedtensor', 'is_legacy_batchedtensor'
    return any(getattr(torch._C._functorch, name, lambda _: False)(tensor) for name in names)


# What a layer saves for backward: z is the input of norm2, and None where it is computed again.
_Kept = namedtuple('_Kept', 'mask1 z mean2 invstd2 mask2')


def _unpack(ctx):
    """What forward saved: features, their m and r, and for each layer its weights and a _Kept."""
    features, m, r, *rest = ctx.saved_tensors
    num_kept = len(_Kept._fields) * ctx.num_layers
    kept = [_Kept(*values) for values in _split(rest[-num_kept:], ctx.num_layers)]
    return features, m, r, _split(rest[:-num_kept], ctx.num_layers), kept


def _second_half_backward(grad, z, kept, weight, bias, kernel, eps, kernel_needed):
    """Gradients of conv2(relu(norm2(z))): of z, and of norm2's weight and bias and the kernel."""
    scale = weight * kept.invstd2
    y = _affine(z, *map(_per_channel, (kept.mean2, scale, bias))).relu_()
    grad, d_kernel = _conv_backward(grad, y, kernel, kernel_needed)
    _relu_backward_(grad, y)
    dz, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward.default(
        grad, z, weight, None, None, kept.mean2, kept.invstd2, True, eps, [True] * 3)
    return dz, d_weight, d_bias, d_kernel


def _gradients_by_autograd(ctx, grad):
    """Those of x and the parameters through the plain computation; they have a graph if asked to.

    x is read from the buffer, whose first channels it is: the identity leads from there to it.
    The parameters are viewed, so that autograd stops here, and doesn't go on to them through x.
    """
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _no_autocast(grad):
        features, _, _, layer_weights, layer_kept = _unpack(ctx)
        inputs = [features[:, :ctx.in_channels]]
        maps = inputs[:]
        for weights, kept in zip(layer_weights, layer_kept):
            weights = [weight.view_as(weight) for weight in weights]
            inputs += weights
            y = torch.cat(maps, 1)
            halves = _split(weights, len(weights) // 3)
            for (weight, bias, kernel), mask in zip(halves, (kept.mask1, kept.mask2)):
                y = F.relu(F.batch_norm(y, None, None, weight, bias, training=True, eps=ctx.eps))
                y = _drop(_conv(y, kernel), mask, ctx.drop_rate)
            maps.append(y)
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        found = torch.autograd.grad(torch.cat(maps, 1), [inputs[i] for i in wanted], grad,
                                    create_graph=create_graph)
    gradients = dict(zip(wanted, found))
    return [gradients.get(i) for i in range(len(inputs))]


def _count_batch(layers, statistics):
    """Update the counters of all norms in the layers, and the running statistics of some.

    `statistics` has a norm, and mean and unbiased variance of channels; it reads the first of them.
    """
    updates_of_share = {}
    for norm, mean, var in statistics:
        size = norm.num_features
        updates_of_share.setdefault(_share_of_next_batch(norm), []).extend(
            [(norm.running_mean, mean[:size]), (norm.running_var, var[:size])])
    for share, updates in updates_of_share.items():
        torch._foreach_lerp_(*map(list, zip(*updates)), share)
    torch._foreach_add_([norm.num_batches_tracked for layer in layers for norm in layer.norms()], 1)


def _share_of_next_batch(norm):
    """Its weight in the running statistics; a momentum of None is for the average of all batches.

    That one waits for the device.
    """
    return 1 / (float(norm.num_batches_tracked) + 1) if norm.momentum is None else norm.momentum


def _split(values, parts):
    size = len(values) // parts
    return [values[i * size:(i + 1) * size] for i in range(parts)]


def _per_channel(vector):
    return vector.view(-1, 1, 1)


def _empty_maps_like(x, channels):
    """Memory for [N, channels, H, W], laid out as x is, which may be a slice of channels."""
    channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=layout)


def _channel_statistics(x):
    """Mean and biased variance, [C, 1, 1], in two passes and in float32 at least."""
    mean = x.mean((0, 2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))[0]
    return mean, (x - mean).square_().mean((0, 2, 3), keepdim=True)[0]


def _channel_sum(x, dtype):
    """[N, C, H, W] -> [C, 1, 1]"""
    return x.sum((0, 2, 3), keepdim=True, dtype=dtype)[0]


def _affine(x, mean, scale, bias=None, out=None):
    """(x - mean) * scale + bias, dense, in x's precision and layout."""
    if out is None:
        out = _empty_maps_like(x, x.shape[1])
    if x.dtype == scale.dtype:
        # x * scale + (bias - mean * scale) would lose digits where the mean is far from 0.
        torch.sub(x, mean, out=out).mul_(scale)
        return out if bias is None else out.add_(bias)
    # bf16 and fp16 lose more by rounding after each operation: this is one, in float32.
    shift = -mean * scale if bias is None else bias - mean * scale
    return torch.addcmul(shift, x, scale, out=out)


def _relu_backward_(grad, output):
    """Zero the gradient, in place, where the ReLU's output is."""
    torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


def _conv(x, kernel):
    return F.conv2d(x, kernel.to(x.dtype), padding=kernel.shape[-1] // 2)


def _conv_backward(grad, x, kernel, kernel_needed):
    """Gradients of `_conv`, of x and of the kernel."""
    dx, d_kernel, _ = torch.ops.aten.convolution_backward.default(
        grad, x, kernel.to(x.dtype), None, [1, 1], [kernel.shape[-1] // 2] * 2, [1, 1], False,
        [0, 0], 1, [True, kernel_needed, False])
    return dx, d_kernel.to(kernel.dtype) if kernel_needed else None


def _dropout(x, rate):
    """What F.dropout makes of x in training, from the same random numbers, and the mask."""
    return torch.native_dropout(x, rate, True) if rate else (x, None)


def _drop(x, mask, rate):
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - rate))


def _conv_dtype(x, weight_dtype):
    """The precision in which a convolution of x is computed."""
    device = x.device.type
    if (weight_dtype == torch.float32 and torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)):
        return torch.get_autocast_dtype(device)
    return weight_dtype


def _no_autocast(x):
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


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
    _check_positive(growth_rate=settings['growth_rate'])
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
        _check_positive(growth_rate=growth_rate)
        _check_compression(compression)
        num_init_features = stem_width(growth_rate, bottleneck, compression)
    return DenseNet(growth_rate, 3 * ((depth - 4) // step,), num_init_features,
                    drop_rate=drop_rate, num_classes=num_classes, compression=compression,
                    bottleneck=bottleneck, small_inputs=small_inputs, **kwargs)
