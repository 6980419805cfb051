"""DenseNet and DenseNet-BC in one file: copy it into your project, all it needs is torch.

    model = densenet121(num_classes=1000)                  # the ImageNet family, 7x7 stem
    model = densenet_cifar(depth=100, growth_rate=12)      # the CIFAR and SVHN family, 3x3 stem
    logits = model(images)                                 # [N, 3, H, W] -> [N, num_classes]
    feature_map = model.features(images)                   # before the last ReLU and the pooling

Modules have the names and kinds of torchvision's DenseNet, and state dicts go both ways. Memory in
training grows linearly with depth: see `DenseBlock` and `_LinearMemoryBlock`. On CPUs,
densenet_cpu.py and densenet_cpu.cpp beside this file make it faster: copy them, too.

"The paper" is Huang, Liu, van der Maaten, Weinberger: Densely Connected Convolutional Networks,
CVPR 2017, https://arxiv.org/abs/1608.06993; "the technical report" Pleiss et al.: Memory-Efficient
Implementation of DenseNets, 2017, https://arxiv.org/abs/1707.06990.
"""

import contextlib
import functools
import importlib
import re
from collections import OrderedDict
from typing import NamedTuple

import torch
import torch.fx
import torch.nn.functional as F
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

__all__ = ['DenseNet', 'densenet121', 'densenet161', 'densenet169', 'densenet201', 'densenet264',
           'densenet232_k48', 'densenet264_k48', 'densenet_cifar']

try:
    _kernels = importlib.import_module('.densenet_cpu' if __package__ else 'densenet_cpu',
                                       __package__ or None)
except ImportError:
    _kernels = None


# ---- the network ---------------------------------------------------------------------------------

class DenseNet(nn.Module):
    """A densely connected network; the first seven arguments are those of torchvision's class.

    The paper's DenseNet-BC has bottleneck and compression 0.5, its plain DenseNet has neither.

    Args:
        growth_rate: channels that each layer adds, k in the paper.
        block_config: number of layers in each dense block.
        num_init_features: channels of the stem's convolution.
        bn_size: width of the 1x1 bottleneck convolution, in units of growth_rate.
        drop_rate: dropout after every convolution but the first (paper, section 4.2).
        num_classes: width of the classifier.
        memory_efficient: save little but the feature maps for backward and recompute the rest
            (see `DenseBlock`). No effect under torch.compile.
        compression: share of the channels that a transition keeps, theta in the paper.
        bottleneck: a 1x1 convolution before each 3x3 one (DenseNet-B).
        small_inputs: the stem for CIFAR and SVHN, one 3x3 convolution, instead of ImageNet's.
        in_channels: channels of the images.

    Shapes: images [N, in_channels, H, W] to logits [N, num_classes].

    Attributes:
        config: all the arguments, so that `DenseNet(**model.config)` is the same network.
        min_size: the least H and W of images, in pixels.

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

        self.features = Features(_stem(in_channels, num_init_features, small_inputs))
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
                self.features.add_module(f'transition{i}', Transition(channels, compressed,
                                                                      drop_rate, memory_efficient))
                channels = compressed
        self.features.add_module('norm5', nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        # As the official code: He et al. by the number of outputs; nn.BatchNorm2d starts right.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        nn.init.zeros_(self.classifier.bias)

    def forward(self, x):
        # In a graph that is being recorded, this comparison would be frozen.
        if not _is_traced(x) and (x.dim() != 4 or min(x.shape[2:]) < self.min_size):
            raise ValueError(f'expected images [N, C, H, W] with H and W at least {self.min_size}, '
                             f'not {list(x.shape)}')
        x = F.relu(self.features(x))
        x = F.adaptive_avg_pool2d(x, 1)
        return self.classifier(torch.flatten(x, 1))

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # Called before the children load, so that they find the keys already renamed.
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


class Features(nn.Sequential):
    """Stem, dense blocks, transitions and the last norm.

    On CPUs and without gradients, a few images at a time go through ImageNet's stem: their maps
    stay in the cache, while a page of fresh memory costs more than the arithmetic. The norm is
    folded into the convolution, and ReLU, which commutes with the max-pool, comes after it.
    """

    def forward(self, x):
        modules = list(self)
        if ('norm0' in self._modules and not _is_traced(x) and x.device.type == 'cpu'
                and not (self.training or torch.is_grad_enabled() or _transformed_or_hooked())
                and not any(map(_difference, modules, ('conv0', 'norm', 'relu', 'pool0')))):
            conv, norm, _, pool, *modules = modules
            scale = norm.weight / (norm.running_var + norm.eps).sqrt()
            kernel = conv.weight * scale[:, None, None, None]
            bias = norm.bias - norm.running_mean * scale
            x = torch.cat([pool(conv._conv_forward(part, kernel, bias)).relu_()
                           for part in x.split(4)])
        for module in modules:
            x = module(x)
        return x


class _LinearMemory:
    """The choice of `DenseBlock` and `Transition` between linear memory and plain autograd.

    Attributes:
        linear_memory: whether to train in linear memory. None, the default: with memory_efficient
            and on CPUs; on GPUs the plain way is faster.
        cpu_kernels: False turns off the kernels of densenet_cpu.py.
        path: how the last forward was computed.
        fallback_reason: why the last forward did not use linear memory although it should have.
    """

    linear_memory = cpu_kernels = path = fallback_reason = None

    def _choose_operations(self, x):
        """The implementation of the operations for x, or None for the modules one by one."""
        self.fallback_reason = None
        if _is_traced(x):
            return None
        has_kernels = self.cpu_kernels is not False and _kernels and _kernels.supports(x)
        ops = _kernels if has_kernels else _EagerOperations
        wanted = self.linear_memory
        if not self.training:  # without gradients there is no memory to save, only time
            wanted = not torch.is_grad_enabled() and ops is not _EagerOperations
        elif wanted is None:
            wanted = self.memory_efficient or x.device.type == 'cpu'
        if wanted:
            self.fallback_reason = _fallback_reason(self, x)
        return ops if wanted and self.fallback_reason is None else None


class DenseBlock(_LinearMemory, nn.ModuleDict):
    """Layers of which each reads the concatenation of the input and all earlier layers' outputs.

    [N, C, H, W] -> [N, C + num_layers * growth_rate, H, W]

    In training there are four ways to compute it, with the same outputs, gradients and running
    statistics; `path` is the one of the last forward:

        'plain'         layer by layer; what autograd saves grows with the square of the depth
        'linear'        as one function, `_LinearMemoryBlock`, which saves the feature maps once
                        and the outputs of the 1x1 convolutions; not even those with
                        memory_efficient. The maps are its output: do not change it in place
        'kernels'       the same by densenet_cpu.py, for float32 and bfloat16 in channels_last;
                        evaluation without gradients, too
        'checkpointed'  memory_efficient where 'linear' is impossible: layer by layer, with the
                        first convolution of each recomputed in backward

    Where modules were changed (hooks, replaced modules, norms in eval mode) or under transforms
    (torch.func, forward-mode AD), 'linear' is impossible, and `fallback_reason` says why.
    """

    def __init__(self, num_layers, in_channels, growth_rate, bn_size, drop_rate, bottleneck,
                 memory_efficient):
        super().__init__({
            f'denselayer{i + 1}': DenseLayer(in_channels + i * growth_rate, growth_rate, bn_size,
                                             drop_rate, bottleneck, memory_efficient)
            for i in range(num_layers)})
        self.memory_efficient = memory_efficient

    def forward(self, x):
        ops = self._choose_operations(x)
        if ops:
            self.path = ops.path
            if not self.training:
                return self._evaluate(ops, x)
            # Grad mode is read here: within a Function it is always off.
            save_bottlenecks = torch.is_grad_enabled() and not self.memory_efficient
            layers = list(self.values())
            parameters = [parameter for layer in layers for norm, conv in layer.halves()
                          for parameter in (norm.weight, norm.bias, conv.weight)]
            return _LinearMemoryBlock.apply(ops, layers, save_bottlenecks, x, *parameters)
        self.path = 'checkpointed' if _recomputes(self, x) else 'plain'
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def _evaluate(self, ops, x):
        c, layers = x.shape[1], list(self.values())
        features = ops.new_maps(x, c + sum(layer.out_channels for layer in layers))
        features[:, :c].copy_(x)
        # The same memory for all layers: fresh memory costs more than the arithmetic.
        widest = ops.new_maps(x, max(len(layer.conv1.weight) for layer in layers))
        for layer in layers:
            maps, stop = features[:, :c], c + layer.out_channels
            if layer.bottleneck:
                maps = _evaluate_half(ops, maps, layer.norm1, layer.conv1,
                                      out=widest[:, :len(layer.conv1.weight)])
            _evaluate_half(ops, maps, *layer.halves()[-1], out=features[:, c:stop])
            c = stop
        return features


class DenseLayer(nn.Module):
    """BN-ReLU-Conv(1x1)-BN-ReLU-Conv(3x3) or, without bottleneck, BN-ReLU-Conv(3x3).

    Feature maps [N, C, H, W], or a list of maps with C channels in all -> [N, growth_rate, H, W]
    """

    def __init__(self, in_channels, growth_rate, bn_size, drop_rate, bottleneck, memory_efficient):
        super().__init__()
        self.drop_rate = drop_rate
        self.bottleneck = bottleneck
        self.memory_efficient = memory_efficient
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.relu1 = nn.ReLU()  # in place it would save no memory, and hooks on it would fail
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
        if _recomputes(self, features[0]):
            # Dropout stays outside: there is no random state to restore for the recomputation.
            x = checkpoint(self._first_half, *features, use_reentrant=False,
                           preserve_rng_state=False, context_fn=lambda: (
                               contextlib.nullcontext(), _kept_statistics(self.norm1)))
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

    def halves(self):
        """(norm, conv) of each half."""
        halves = [(self.norm1, self.conv1)]
        return [*halves, (self.norm2, self.conv2)] if self.bottleneck else halves

    @property
    def out_channels(self):
        return len((self.conv2 if self.bottleneck else self.conv1).weight)


class Transition(_LinearMemory, nn.Sequential):
    """BN-ReLU-Conv(1x1), then 2x2 average pooling (paper, section 3).

    [N, C, H, W] -> [N, out_channels, H // 2, W // 2]

    Computed in the order norm-ReLU-pool-convolution, where it can be: convolution and pooling
    commute, and after the pooling the convolution has a quarter of the work.
    """

    def __init__(self, in_channels, out_channels, drop_rate=0.0, memory_efficient=False):
        super().__init__(OrderedDict(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(),
            conv=nn.Conv2d(in_channels, out_channels, 1, bias=False),
            pool=nn.AvgPool2d(2)))
        self.drop_rate = drop_rate
        self.memory_efficient = memory_efficient

    def forward(self, x):
        self.path = 'plain'
        # Not with dropout between the two, nor where somebody may look there.
        if (self.drop_rate and self.training or isinstance(x, torch.fx.Proxy)
                or _difference(self.conv, 'conv', self.training)
                or _difference(self.pool, 'pool', self.training)
                or self.conv.kernel_size != (1, 1)):
            x = self.conv(self.relu(self.norm(x)))
            return self.pool(F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x)
        ops = self._choose_operations(x)
        if not ops:
            return self.conv(self.pool(self.relu(self.norm(x))))
        self.path = ops.path
        if not self.training:
            return _evaluate_half(ops, x, self.norm, self.conv, pool=True)
        return _LinearMemoryTransition.apply(ops, self.norm, x, self.norm.weight, self.norm.bias,
                                             self.conv.weight)


# ---- when linear memory is impossible ------------------------------------------------------------

def _is_traced(x):
    """Is a graph of module calls being recorded: torch.compile, export, jit.trace, fx?"""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()
            or isinstance(x, torch.fx.Proxy))


def _recomputes(module, x):
    """Does a block or layer that runs the plain way recompute its first convolutions?"""
    return (module.memory_efficient and module.training and torch.is_grad_enabled()
            and not _is_traced(x))


@contextlib.contextmanager
def _kept_statistics(norm):
    """A context in which a norm in training leaves its running statistics as they are."""
    if not hasattr(norm, 'num_batches_tracked'):  # another kind of norm
        yield
        return
    kept = norm.momentum, norm.num_batches_tracked
    norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        norm.momentum, norm.num_batches_tracked = kept


# What is taken for granted of the modules, by their names, but for the stem's without the number:
# their class, and the values that attributes may have.
_AS_BUILT = {
    'conv0': (nn.Conv2d, dict(bias=[None])),
    'pool0': (nn.MaxPool2d, dict(return_indices=[False])),
    'denselayer': (DenseLayer, {}),
    'norm': (nn.BatchNorm2d, dict(affine=[True], track_running_stats=[True])),
    'relu': (nn.ReLU, {}),
    'conv': (nn.Conv2d, dict(
        kernel_size=[(1, 1), (3, 3)], dilation=[(1, 1)], padding=[(0, 0), (1, 1)],
        padding_mode=['zeros'], stride=[(1, 1)], groups=[1], bias=[None])),
    'pool': (nn.AvgPool2d, dict(kernel_size=[2], stride=[2], padding=[0])),
}
_HOOKS = '_forward_hooks', '_forward_pre_hooks', '_backward_hooks', '_backward_pre_hooks'


def _transformed_or_hooked():
    """Transforms or global hooks that need the modules one by one, or None."""
    # By private names. In a torch that renames one, autograd still refuses transforms of a
    # Function, but global hooks would be overlooked.
    if (getattr(torch._C, '_are_functorch_transforms_active', lambda: False)()
            or getattr(forward_ad, '_current_level', -1) >= 0):
        return 'torch.func or forward-mode differentiation'
    if any(getattr(nn.modules.module, f'_global_{kind}_hooks', None)
           for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')):
        return 'global module hooks'
    return None


def _fallback_reason(block, x):
    """Why the linear way would not compute what a block's or transition's modules do, or None."""
    if reason := _transformed_or_hooked():
        return reason
    if x.dim() != 4 or x.numel() <= x.shape[1] * block.training:  # nn.BatchNorm2d complains
        return f'an input of shape {list(x.shape)}'
    channels = x.shape[1]
    for name, module in block.named_modules():
        kind = name.rpartition('.')[2].rstrip('0123456789')
        difference = kind and _difference(module, kind, block.training)
        if difference:
            return f'{name}{difference}'
        if kind == 'denselayer':
            read, channels = channels, channels + module.out_channels
        if name.endswith('norm1') and len(module.weight) != read:
            return f'{name} is of {len(module.weight)} channels, not {read}'
    weights, device = {parameter.dtype for parameter in block.parameters()}, x.device.type
    autocast = None
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        autocast = torch.get_autocast_dtype(device)
    precision = {torch.float32: autocast or torch.float32, torch.float64: torch.float64}
    if len(weights) != 1 or x.dtype != precision.get(*weights):
        return f'input of {x.dtype}, weights of {", ".join(map(str, weights))}'
    return None


def _difference(module, kind, training=False):
    """How a module differs from what is built here under that name, or None."""
    expected, attributes = _AS_BUILT.get(kind, (None, {}))
    if type(module) is not expected:
        return f' is a {type(module).__name__}'
    # vars(module) would stop torch.compile in torch 2.6.
    if 'forward' in module.__dict__ or any(getattr(module, name) for name in _HOOKS):
        return ' has hooks or a forward of its own'
    for name, allowed in {'training': [training], **attributes}.items():
        if getattr(module, name) not in allowed:
            return f'.{name} is not {" or ".join(map(str, allowed))}'
    return None


def _no_autocast(x):
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


# ---- training in linear memory -------------------------------------------------------------------

class _LinearMemoryBlock(torch.autograd.Function):
    """A dense block in training as one function, whose memory is linear in the number of layers.

    Each layer writes its own channels into one buffer: nothing is ever concatenated. The mean m and
    variance of a channel over the batch are the same for every layer that reads it, so they are
    taken once, and norm1 of layer l is (x - m) * s + bias with s = weight * r and
    r = 1 / sqrt(variance + eps). Saved for backward are the buffer, vectors of one number a
    channel, the masks of dropout and, with `save_bottlenecks`, the outputs of the 1x1 convolutions.
    The rest is cheap to recompute.

    In backward, let g be the gradient at the output of norm1 of layer l, and M = N * H * W. Batch
    normalisation gives

        d_bias = sum(g),  d_weight = sum(g * (x - m)) * r,
        dx = s * g - s * (d_bias + (x - m) * r * d_weight) / M

    and the gradient of a channel is the sum over the layers that read it. All but s * g is linear
    in x - m, so the coefficients are summed, and applied in one pass when all layers are done:

        dx = G - (A + (x - m) * B)  with
        G = sum of s * g,  A = sum of s * d_bias / M,  B = sum of s * r * d_weight / M  over l.

    x is [N, C, H, W], the result [N, C + num_layers * growth_rate, H, W]; `parameters` are those of
    the layers, in their order, whose running statistics are updated.
    """

    @staticmethod
    def forward(ctx, ops, layers, save_bottlenecks, x, *parameters):
        ctx.ops, ctx.in_channels = ops, x.shape[1]
        ctx.settings = [(layer.drop_rate, [norm.eps for norm, _ in layer.halves()])
                        for layer in layers]
        channels = x.shape[1] + sum(layer.out_channels for layer in layers)
        features = _Maps(ops.new_maps(x, channels), *parameters[0].new_empty(2, channels))
        saved, norms, statistics = [], [], []
        with _no_autocast(x):
            c = x.shape[1]  # channels that the layer reads
            features.part(0, c).copy_(_Maps(x, *ops.statistics(x)))
            for layer in layers:
                maps, new = features.part(0, c), features.part(c, c + layer.out_channels)
                for i, (norm, conv) in enumerate(layer.halves(), start=1):
                    norms.append(norm)
                    statistics.append(maps._replace(data=None))
                    half, mask, is_last = _Half.of(norm, conv), None, i == len(layer.halves())
                    maps = _Maps(*ops.norm_relu_conv(maps, half, statistics=not layer.drop_rate,
                                                     out=new.data if is_last else None))
                    if layer.drop_rate:
                        data, mask = torch.native_dropout(maps.data, layer.drop_rate, True)
                        maps = _Maps(data, *ops.statistics(data))
                    is_saved = save_bottlenecks and not is_last
                    saved += [*half[:3], mask, maps.data if is_saved else None, *maps[1:]]
                new.copy_(maps)
                c += layer.out_channels
        _update_running_statistics(norms, statistics, x.numel() // x.shape[1])
        ctx.save_for_backward(*features, *saved)
        return features.data

    @staticmethod
    def backward(ctx, grad):
        data, mean, var, *saved = ctx.saved_tensors
        features, rows = _Maps(data, mean, var), zip(*[iter(saved)] * 7)
        # Of each half of each layer: its parameters, drop rate, mask of dropout or None, and
        # output, without data where that is to be recomputed or in the buffer.
        layers = [[(_Half(*row[:3], eps), drop_rate, row[3], _Maps(*row[4:]))
                   for eps, row in zip(all_eps, rows)] for drop_rate, all_eps in ctx.settings]
        if torch.is_grad_enabled():  # create_graph=True
            x = data[:, :ctx.in_channels]  # from there, the identity leads to the input
            parameters = [value for layer in layers for half, *_ in layer for value in half[:3]]
            return None, None, None, *_differentiable_gradients(
                functools.partial(_plain_block, layers), grad, x, *parameters)
        ops, gradients, end = ctx.ops, [], len(mean)
        G = ops.new_maps(data, end).copy_(grad)  # names as above
        A, B = torch.zeros_like(mean), torch.zeros_like(mean)
        with _no_autocast(grad):
            for layer in reversed(layers):
                c = end - len(layer[-1][0].kernel)  # channels that the layer has read
                inputs = [features.part(0, c)]
                for half, drop_rate, mask, output in layer[:-1]:
                    if output.data is None:
                        z, *_ = ops.norm_relu_conv(inputs[-1], half)
                        output = output._replace(data=_dropout_backward(z, mask, drop_rate))
                    inputs.append(output)
                # What completes a gradient once all layers that read the channels are done.
                grad, completion = G[:, c:end], (features.part(c, end), A[c:end], B[c:end])
                for maps, (half, drop_rate, mask, _) in zip(reversed(inputs), reversed(layer)):
                    if mask is not None:
                        grad = _dropout_backward(ops.complete(grad, *completion), mask, drop_rate)
                        completion = None
                    grad, completion, found = _half_backward(
                        ops, grad, maps, half, completion=completion,
                        total=G[:, :c] if maps is inputs[0] else None)
                    gradients = found + gradients
                A[:c].add_(completion[1])
                B[:c].add_(completion[2])
                end = c
            dx = ops.complete(G[:, :c], inputs[0], A[:c], B[:c])
            return None, None, None, dx, *gradients


class _LinearMemoryTransition(torch.autograd.Function):
    """A transition in training, pooled before the convolution; saves its input alone.

    x is [N, C, H, W], the result [N, out_channels, H // 2, W // 2]; the running statistics of
    `norm` are updated.
    """

    @staticmethod
    def forward(ctx, ops, norm, x, *parameters):
        ctx.ops, ctx.eps = ops, norm.eps
        with _no_autocast(x):
            maps = _Maps(x, *ops.statistics(x))
            y, *_ = ops.norm_relu_conv(maps, _Half(*parameters, norm.eps), pool=True)
        _update_running_statistics([norm], [maps], x.numel() // x.shape[1])
        ctx.save_for_backward(*maps, *parameters)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mean, var, *parameters = ctx.saved_tensors
        if torch.is_grad_enabled():  # create_graph=True
            return None, None, *_differentiable_gradients(
                functools.partial(_plain_half, eps=ctx.eps, pool=True), grad, x, *parameters)
        with _no_autocast(grad):
            total, completion, found = _half_backward(
                ctx.ops, grad, _Maps(x, mean, var), _Half(*parameters, ctx.eps), pool=True)
            return None, None, ctx.ops.complete(total, *completion), *found


class _Maps(NamedTuple):
    """Feature maps [N, C, H, W], and mean and biased variance of each channel over the batch."""
    data: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor

    def part(self, start, stop):
        return _Maps(self.data[:, start:stop], self.mean[start:stop], self.var[start:stop])

    def copy_(self, other):
        for target, source in zip(self, other):
            if target is not source:
                target.copy_(source)


class _Half(NamedTuple):
    """The parameters of norm-ReLU-convolution: half a dense layer, or a transition."""
    weight: torch.Tensor  # of the norm, [C]
    bias: torch.Tensor
    kernel: torch.Tensor  # of the convolution, [O, C, 1, 1] or [O, C, 3, 3]
    eps: float

    @staticmethod
    def of(norm, conv):
        return _Half(norm.weight, norm.bias, conv.weight, norm.eps)


def _evaluate_half(ops, x, norm, conv, pool=False, out=None):
    maps = _Maps(x, norm.running_mean, norm.running_var)
    with _no_autocast(x):
        return ops.norm_relu_conv(maps, _Half.of(norm, conv), pool, out)[0]


def _half_backward(ops, grad, maps, half, **options):
    """`norm_relu_conv_backward`, with the half's parts of A and B, as above.

    Returns:
        total; (maps, a, b), which complete it; [gradients of weight, of bias, of the kernel].
    """
    invstd = (maps.var + half.eps).rsqrt()
    total, *found = ops.norm_relu_conv_backward(grad, maps, half, invstd, **options)
    d_weight, d_bias, _ = found
    share = half.weight * invstd / (maps.data.numel() // len(invstd))
    return total, (maps, share * d_bias, share * invstd * d_weight), found


def _update_running_statistics(norms, maps, count):
    """As nn.BatchNorm2d does, from the `_Maps` that each norm read, `count` values a channel."""
    unbiased = torch._foreach_mul([m.var for m in maps], count / (count - 1))
    by_momentum = {}
    for norm, m, var in zip(norms, maps, unbiased):
        # A momentum of None, for the average over all batches, synchronizes with the device.
        momentum = (1 / (float(norm.num_batches_tracked) + 1) if norm.momentum is None
                    else norm.momentum)
        by_momentum.setdefault(momentum, []).extend([(norm.running_mean, m.mean),
                                                     (norm.running_var, var)])
    for momentum, pairs in by_momentum.items():
        torch._foreach_lerp_(*map(list, zip(*pairs)), momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def _differentiable_gradients(function, grad, *inputs):
    """Gradients of function(*inputs) that can be differentiated again."""
    with _no_autocast(grad):
        return torch.func.vjp(function, *inputs)[1](grad)


def _plain_half(x, weight, bias, kernel, eps, pool=False):
    y = F.relu(F.batch_norm(x, None, None, weight, bias, training=True, eps=eps))
    return _conv(F.avg_pool2d(y, 2) if pool else y, kernel)


def _plain_block(layers, x, *parameters):
    """The block in operations that autograd knows, with the dropout of the saved halves."""
    features, triples = [x], zip(*[iter(parameters)] * 3)
    for layer in layers:
        y = torch.cat(features, 1)
        for half, drop_rate, mask, _ in layer:
            y = _dropout_backward(_plain_half(y, *next(triples), half.eps), mask, drop_rate)
        features.append(y)
    return torch.cat(features, 1)


# ---- the operations of a block -------------------------------------------------------------------

class _EagerOperations:
    """What blocks and transitions in linear memory are made of, in PyTorch's own operations.

    densenet_cpu.py has the same five functions. Maps may be in any layout and some channels of
    wider ones; they are in the precision of the convolutions, and statistics, parameters and their
    gradients in float32 or float64. They compute, pooled 2x2 before the convolution if `pool`,

        normed = (maps.data - maps.mean) / sqrt(maps.var + half.eps),
        output = conv(relu(normed * half.weight + half.bias), half.kernel).
    """

    path = 'linear'

    @staticmethod
    def new_maps(x, channels):
        """Memory for [N, channels, H, W], laid out as x is, which may be a slice of channels."""
        channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1
        layout = torch.channels_last if channels_last else torch.contiguous_format
        return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                           memory_format=layout)

    @staticmethod
    def statistics(data):
        """Mean and biased variance of each channel."""
        dtype = torch.promote_types(data.dtype, torch.float32)
        if data.device.type not in ('cpu', 'cuda'):  # the others lack the faster operation below
            var, mean = torch.var_mean(data.to(dtype), (0, 2, 3), correction=0)
            return mean, var
        # The results have the precision of the running statistics, which are not needed here.
        unused = data.new_zeros(data.shape[1], dtype=dtype)
        return torch.ops.aten.batch_norm_update_stats.default(data, unused, unused.clone(), 0)

    @staticmethod
    def norm_relu_conv(maps, half, pool=False, out=None, statistics=False):
        """The output, in `out` if given, and its `statistics` if wanted, else None and None."""
        y = _affine(maps, half.weight, half.bias, maps.var, half.eps).relu_()
        y = _conv(F.avg_pool2d(y, 2) if pool else y, half.kernel)
        found = _EagerOperations.statistics(y) if statistics else (None, None)
        return y if out is None else out.copy_(y), *found

    @staticmethod
    def norm_relu_conv_backward(grad, maps, half, invstd, pool=False, total=None, completion=None):
        """From the gradient of the output to those of what it was made of.

        Args:
            grad: the gradient of the output, or `complete(grad, *completion)` is.
            invstd: 1 / sqrt(maps.var + half.eps).

        Returns:
            total: g * weight * invstd, or the sum of that and `total`, in place; g is the gradient
                of normed * weight + bias.
            Gradients of weight (sum of g * normed), of bias (sum of g) and of the kernel.
        """
        if completion is not None:
            grad = _EagerOperations.complete(grad, *completion)
        maps = maps._replace(data=_dense(maps.data))
        y = _affine(maps, half.weight, half.bias, maps.var, half.eps).relu_()
        g, d_kernel, _ = torch.ops.aten.convolution_backward.default(
            grad, F.avg_pool2d(y, 2) if pool else y, half.kernel.to(y.dtype), None, [1, 1],
            [half.kernel.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
        if pool:
            g = torch.ops.aten.avg_pool2d_backward.default(g, y, [2, 2], [2, 2], [0, 0], False,
                                                           True, None)
        torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)  # the ReLU's mask
        # In eval mode, where mean and variance are constants. CPUs read the variance, GPUs 1 / std.
        g, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward.default(
            g, maps.data, half.weight, maps.mean, maps.var, maps.mean, invstd, False, half.eps,
            [True] * 3)
        return (g if total is None else total.add_(g), d_weight, d_bias,
                d_kernel.to(half.kernel.dtype))

    @staticmethod
    def complete(total, maps, a, b):
        """total - (a + (data - mean) * b): the gradient of maps, from that of all their readers."""
        share = _affine(maps, b, a)
        return torch.sub(total, share, out=share)


def _dense(x):
    """A slice of channels as a tensor of its own, in the same layout."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if dense else x.clone()


def _affine(maps, weight, bias, var=None, eps=0):
    """(data - mean) / sqrt(var + eps) * weight + bias, dense, in the precision of the data."""
    var = torch.ones_like(weight) if var is None else var
    y, *_ = torch.native_batch_norm(_dense(maps.data), weight, bias, maps.mean, var, False, 0, eps)
    return y


def _conv(x, kernel):
    return F.conv2d(x, kernel.to(x.dtype), padding=kernel.shape[-1] // 2)


def _dropout_backward(x, mask, rate):
    """Backward of dropout in training, which is also its forward with that mask."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - rate))


# ---- the paper's networks ------------------------------------------------------------------------

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
