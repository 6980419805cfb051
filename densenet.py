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
from collections import OrderedDict
from numbers import Integral

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
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
        memory_efficient: keep nothing but the feature maps for backward and compute the rest
            again; the same gradients and running statistics for less memory and a little more
            time (see `DenseBlock`). Under torch.compile it has no effect: the compiler decides for
            itself what to recompute.
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

    In training there are three ways to compute it, which end with the same outputs, gradients and
    running statistics. `path` says which one the last forward took:

        'plain'         layer by layer; what it keeps for backward grows with the square of depth
        'linear'        as one function, `_LinearMemoryBlock`, which keeps what its name says, and
                        with memory_efficient=True little more than the feature maps
        'checkpointed'  memory_efficient=True where 'linear' is impossible: the plain way, with
                        each layer's first convolution computed again in backward

    Whatever the one function would overlook (hooks, a replaced norm, torch.func, and so on) goes
    the other ways, and `obstacle` says what it was.

    Attributes:
        memory_efficient: as for `DenseNet`.
        linear_memory: whether training is to take the 'linear' way. None, the default, stands for
            always with memory_efficient=True, and without it on CPUs, where it was measured to
            take about as long as the plain way; on GPUs that is still to be measured.
        path: 'plain', 'linear' or 'checkpointed'; None before a forward, and under torch.compile.
        obstacle: what kept the last forward from the 'linear' way that it was to take, or None.
    """

    linear_memory = None

    def __init__(self, num_layers, in_channels, growth_rate, bn_size, drop_rate, bottleneck,
                 memory_efficient):
        super().__init__({
            f'denselayer{i + 1}': DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size,
                                             drop_rate, bottleneck, memory_efficient)
            for i in range(num_layers)})
        self.memory_efficient = memory_efficient
        self.path = self.obstacle = None

    def forward(self, x):
        self.path = self.obstacle = None
        if torch.compiler.is_compiling():  # the compiler decides itself what to keep
            return self._forward_plain(x)
        if self._is_to_be_linear(x):
            self.obstacle = self._find_obstacle(x)
            if self.obstacle is None:
                self.path = 'linear'
                return self._forward_linear(x)
        checkpointed = self.memory_efficient and self.training and torch.is_grad_enabled()
        self.path = 'checkpointed' if checkpointed else 'plain'
        return self._forward_plain(x)

    def _is_to_be_linear(self, x):
        if self.linear_memory is None:
            return self.training and (self.memory_efficient or x.device.type == 'cpu')
        return self.training and self.linear_memory

    def _forward_plain(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def _forward_linear(self, x):
        layers, parameters = list(self.values()), self._parameters_in_order()
        with torch.no_grad():
            torch._foreach_add_([norm.num_batches_tracked for layer in layers
                                 for norm in layer.norms()], 1)
        # Grad mode is asked for here: within a Function it is always off.
        keep_bottlenecks = torch.is_grad_enabled() and not self.memory_efficient
        features, mean, var = _LinearMemoryBlock.apply(layers, keep_bottlenecks, x, *parameters)
        count = x.numel() // x.shape[1]
        _update_running_statistics([layer.norm1 for layer in layers], mean,
                                   var * (count / (count - 1)))
        return features

    def _parameters_in_order(self):
        """Layer after layer, weight and bias of norm1, weight of conv1, and of norm2, conv2."""
        return [parameter for layer in self.values()
                for norm, conv in zip(layer.norms(), layer.convs())
                for parameter in (norm.weight, norm.bias, conv.weight)]

    def _find_obstacle(self, x):
        """Why `_LinearMemoryBlock` can't stand in for the layers here, or None if it can."""
        # Three questions that torch answers only in private. One that has renamed the answer gets
        # to the function, which then raises an error (but for the hooks).
        if getattr(torch._C, '_are_functorch_transforms_active', bool)():
            return 'torch.func'
        if getattr(forward_ad, '_current_level', -1) >= 0:
            return 'forward-mode differentiation'
        if torch.jit.is_tracing():
            return 'torch.jit.trace'
        if any(getattr(nn.modules.module, f'_global_{kind}_hooks', None)
               for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')):
            return 'global module hooks'
        if x.dim() != 4 or x.numel() <= x.shape[1]:
            return 'a single value per channel, or none'  # nn.BatchNorm2d complains about it
        channels = x.shape[1]
        for name, layer in self.items():
            if type(layer) is not DenseLayer:
                return f'{name} is a {type(layer).__name__}'
            obstacle = layer.find_obstacle(channels)
            if obstacle:
                return f'{name}: {obstacle}'
            channels += layer.convs()[-1].out_channels
        if len({(layer.drop_rate, layer.bottleneck, layer.norm1.eps, layer.norm1.momentum)
                for layer in self.values()}) > 1:
            return 'layers that differ in drop_rate, bottleneck, eps or momentum'
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
        for name, module in {'it': self, **norms, **convs}.items():
            kind = nn.BatchNorm2d if name in norms else nn.Conv2d if name in convs else DenseLayer
            if type(module) is not kind or 'forward' in vars(module):
                return f'{name} is not a plain {kind.__name__}'
            if (module._forward_hooks or module._forward_pre_hooks
                    or module._backward_hooks or module._backward_pre_hooks):
                return f'{name} has hooks'
        for name, norm in norms.items():
            if not (norm.training and norm.affine and norm.track_running_stats):
                return f'{name} is in eval mode, or has no weights or running statistics'
        if self.norm1.num_features != in_channels:
            return f'norm1 is for {self.norm1.num_features} channels, not {in_channels}'
        for name, conv in convs.items():
            side = conv.kernel_size[0]
            if (conv.kernel_size != (side, side) or conv.padding != (side // 2, side // 2)
                    or not conv.stride == conv.dilation == (1, 1) or conv.groups > 1
                    or conv.padding_mode != 'zeros' or conv.bias is not None):
                return f'{name} has a bias, or another geometry'
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
    s = weight * r and r = 1 / sqrt(variance + eps). For backward there stay the buffer, those
    vectors, the outputs of the 1x1 convolutions (or not: `keep_bottlenecks`) and the masks of
    dropout. The rest is cheap to compute again.

    In backward, let g be the gradient at the output of norm1 of layer l, and M = N * H * W. Batch
    normalisation gives

        d_bias = sum(g),  d_weight = r * sum(g * (x - m)),
        dx = s * g - s * (d_bias + (x - m) * r * d_weight) / M

    and the gradient of a channel is the sum over the layers that read it. All but s * g is linear
    in x - m, so the coefficients are summed, and applied in one pass when all layers are done:

        dx = G - (A + (x - m) * B) / M  with
        G = sum of s * g,  A = sum of s * d_bias,  B = sum of s * r * d_weight  over l.

    Args:
        layers: the DenseLayers, for their settings; norm2's running statistics are updated.
        keep_bottlenecks: keep the outputs of the 1x1 convolutions for backward.
        x: [N, C, H, W].
        parameters: layer after layer, weight and bias of norm1, weight of conv1 and, with
            bottleneck, those of norm2 and conv2.

    Returns:
        The feature maps [N, C + num_layers * growth_rate, H, W], and mean and biased variance of
        their channels over the batch, for the running statistics of norm1.
    """

    @staticmethod
    def forward(ctx, layers, keep_bottlenecks, x, *parameters):
        of_layers = _split(parameters, len(layers))
        channels = x.shape[1] + sum(weights[-1].shape[0] for weights in of_layers)
        features = _empty_like(x, channels)
        mean, var, invstd = x.new_empty(3, channels, 1, 1, dtype=parameters[0].dtype)

        def append(start, new):
            part = slice(start, start + new.shape[1])
            features[:, part] = new
            mean[part], var[part] = _channel_statistics(features[:, part])
            torch.rsqrt(var[part] + layers[0].norm1.eps, out=invstd[part])

        kept = []
        with _no_autocast(x):
            append(0, x)
            for layer, (weight1, bias1, kernel1, *second_half) in zip(layers, of_layers):
                c = len(weight1)
                s = _per_channel(weight1) * invstd[:c]
                y = _norm_relu(features[:, :c], mean[:c], s, _per_channel(bias1))
                y, mask1 = _dropout(_conv(y, kernel1), layer.drop_rate)
                z = mean2 = invstd2 = mask2 = None
                if second_half:
                    weight2, bias2, kernel2 = second_half
                    norm2, z = layer.norm2, y
                    y, mean2, invstd2 = torch.native_batch_norm(
                        z, weight2, bias2, norm2.running_mean, norm2.running_var, True,
                        _momentum(norm2), norm2.eps)
                    y, mask2 = _dropout(_conv(y.relu_(), kernel2), layer.drop_rate)
                kept += mask1, z if keep_bottlenecks else None, mean2, invstd2, mask2
                append(c, y)
        ctx.layers, ctx.in_channels = layers, x.shape[1]
        ctx.save_for_backward(features, mean, invstd, *parameters, *kept)
        mean, var = mean.flatten(), var.flatten()
        ctx.mark_non_differentiable(mean, var)
        return features, mean, var

    @staticmethod
    def backward(ctx, grad, *_):
        if torch.is_grad_enabled():  # create_graph=True: these gradients are to be differentiated
            return None, None, *_differentiable_gradients(ctx, grad)
        layers, in_channels = ctx.layers, ctx.in_channels
        features, mean, invstd, of_layers, kept = _unpack(ctx)
        needed = _split(ctx.needs_input_grad[3:], len(layers))
        count = features.numel() // features.shape[1]
        G = _empty_like(features, features.shape[1]).copy_(grad)
        A, B = torch.zeros_like(mean), torch.zeros_like(mean)

        def finished(part):
            """The gradient of channels that all their readers have been gone through for."""
            share = features[:, part] - mean[part]
            share.mul_(B[part] / count).add_(A[part] / count)
            return (G[:, part] - share).to(features.dtype)

        gradients = []
        with _no_autocast(features):
            for i, layer in reversed(list(enumerate(layers))):
                weight1, bias1, kernel1, *second_half = of_layers[i]
                mask1, z, *statistics2, mask2 = kept[i]
                c = len(weight1)
                x, m, r = features[:, :c], mean[:c], invstd[:c]
                s = _per_channel(weight1) * r
                y = _norm_relu(x, m, s, _per_channel(bias1))
                g = finished(slice(c, c + of_layers[i][-1].shape[0]))
                if second_half:
                    if z is None:
                        z = _drop(_conv(y, kernel1), mask1, layer.drop_rate)
                    g, *gradients2 = _second_half_backward(
                        _drop(g, mask2, layer.drop_rate), z, *statistics2, *second_half,
                        layer.norm2.eps, needed[i][5])
                    gradients = gradients2 + gradients
                g, d_kernel1 = _conv_backward(_drop(g, mask1, layer.drop_rate), y, kernel1,
                                              needed[i][2])
                _relu_backward_(g, y)
                d_bias1 = _channel_sum(g, s.dtype)
                d_weight1 = _channel_sum(torch.sub(x, m, out=y).mul_(g), s.dtype) * r
                G[:, :c].addcmul_(g, s)
                A[:c].addcmul_(s, d_bias1)
                B[:c].addcmul_(s * r, d_weight1)
                gradients = [d_weight1.flatten(), d_bias1.flatten(), d_kernel1] + gradients
        dx = finished(slice(in_channels)) if ctx.needs_input_grad[2] else None
        return None, None, dx, *gradients


def _second_half_backward(grad, z, mean, invstd, weight, bias, kernel, eps, kernel_needed):
    """Gradients of conv2(relu(norm2(z))): of z, and of norm2's weight and bias and the kernel."""
    y = _norm_relu(z, *map(_per_channel, (mean, weight * invstd, bias)))
    grad, d_kernel = _conv_backward(grad, y, kernel, kernel_needed)
    dz, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward.default(
        _relu_backward_(grad, y), z, weight, None, None, mean, invstd, True, eps, [True] * 3)
    return dz, d_weight, d_bias, d_kernel


def _differentiable_gradients(ctx, grad):
    """Those of x and the parameters, by autograd through the plain computation, with their graph.

    x is read from the buffer, whose first channels it is: the identity leads from there to it.
    The parameters are viewed, so that autograd stops here, and doesn't go on to them through x.
    """
    features, _, _, of_layers, kept = _unpack(ctx)
    x = features[:, :ctx.in_channels]
    of_layers = [[weight.view_as(weight) for weight in weights] for weights in of_layers]
    maps = [x]
    with _no_autocast(features):
        for layer, weights, (mask1, _, _, _, mask2) in zip(ctx.layers, of_layers, kept):
            y = torch.cat(maps, 1)
            for norm, mask, (weight, bias, kernel) in zip(
                    layer.norms(), (mask1, mask2), _split(weights, len(weights) // 3)):
                y = F.relu(F.batch_norm(y, None, None, weight, bias, training=True, eps=norm.eps))
                y = _drop(_conv(y, kernel), mask, layer.drop_rate)
            maps.append(y)
        inputs = [x, *(weight for weights in of_layers for weight in weights)]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        found = torch.autograd.grad(torch.cat(maps, 1), [inputs[i] for i in wanted], grad,
                                    create_graph=True)
    gradients = dict(zip(wanted, found))
    return [gradients.get(i) for i in range(len(inputs))]


def _unpack(ctx):
    """What forward saved; parameters and kept values a list for each layer."""
    features, mean, invstd, *rest = ctx.saved_tensors
    num_kept = 5 * len(ctx.layers)
    return (features, mean, invstd, _split(rest[:-num_kept], len(ctx.layers)),
            _split(rest[-num_kept:], len(ctx.layers)))


def _split(values, parts):
    size = len(values) // parts
    return [values[i * size:(i + 1) * size] for i in range(parts)]


def _per_channel(vector):
    return vector.view(-1, 1, 1)


def _empty_like(x, channels):
    """Memory for [N, channels, H, W], laid out as x is, which may be a slice of channels."""
    channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=layout)


def _channel_statistics(x):
    """Mean and biased variance of each channel, [1, C, 1, 1], in two passes and float32 or more."""
    mean = x.mean((0, 2, 3), keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
    return mean, (x - mean).square_().mean((0, 2, 3), keepdim=True)


def _channel_sum(x, dtype):
    return x.sum((0, 2, 3), keepdim=True, dtype=dtype)[0]


def _norm_relu(x, mean, scale, bias):
    """relu((x - mean) * scale + bias), dense, in x's precision and layout."""
    out = _empty_like(x, x.shape[1])
    if x.dtype == scale.dtype:
        # x * scale + (bias - mean * scale) would lose digits where the mean is far from 0.
        return torch.sub(x, mean, out=out).mul_(scale).add_(bias).relu_()
    # bf16 and fp16 lose more by rounding after each operation: this is one, in float32.
    return torch.addcmul(bias - mean * scale, x, scale, out=out).relu_()


def _relu_backward_(grad, output):
    return torch.ops.aten.threshold_backward.grad_input(grad, output, 0, grad_input=grad)


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


def _momentum(norm):
    """The weight of this batch in the running statistics; None stands for their plain average."""
    return 1 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum


@torch.no_grad()
def _update_running_statistics(norms, mean, var):
    """As nn.BatchNorm2d does; each norm reads the first channels, and all have one momentum."""
    momentum = _momentum(norms[0])
    for running, batch in (([norm.running_mean for norm in norms], mean),
                           ([norm.running_var for norm in norms], var)):
        torch._foreach_lerp_(running, [batch[:len(value)] for value in running], momentum)


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
