"""DenseNet and DenseNet-BC in one file: copy it into your project, all it needs is torch.

    model = densenet121(num_classes=1000)                  # the ImageNet family, 7x7 stem
    model = densenet_cifar(depth=100, growth_rate=12)      # the CIFAR and SVHN family, 3x3 stem
    logits = model(images)                                 # [N, 3, H, W] -> [N, num_classes]
    feature_map = model.features(images)                   # before the last ReLU and the pooling

Modules have the names and kinds of torchvision's DenseNet, and state dicts go both ways:
`model.load_state_dict(torchvision.models.densenet121(weights='DEFAULT').state_dict())`.
Memory in training grows linearly with depth: see `DenseBlock` and `_LinearMemoryBlock`. On CPUs,
densenet_cpu.py and densenet_cpu.cpp make it faster: copy them, too, and they are found beside this
file.

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


# ---- the network ---------------------------------------------------------------------------------

class DenseNet(nn.Module):
    """A densely connected network; the first seven arguments are those of torchvision's class.

    Args:
        growth_rate: channels that each layer adds, k in the paper.
        block_config: number of layers in each dense block.
        num_init_features: channels of the stem's convolution.
        bn_size: width of the 1x1 bottleneck convolution, in units of growth_rate.
        drop_rate: dropout after every convolution but the first (paper, section 4.2).
        num_classes: width of the classifier.
        memory_efficient: save little but the feature maps for backward and recompute the rest
            (see `DenseBlock`): the same gradients and running statistics, in less memory and a
            little more time. No effect under torch.compile.
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
        ValueError: an argument out of range, or images that are too small.

    The paper's DenseNet-BC has bottleneck and compression 0.5, its plain DenseNet has neither.
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
                self.features.add_module(f'transition{i}', Transition(channels, compressed,
                                                                      drop_rate, memory_efficient))
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
        kernels = None if self.cpu_kernels is False else _cpu_kernels()
        ops = kernels if kernels and kernels.supports(x) else _EagerOperations
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

    'linear' stands for the modules as they are built here. Where they were changed (hooks,
    replaced modules, norms in eval mode) or under transforms (torch.func, forward-mode AD) the
    block falls back to the others, and `fallback_reason` says why.
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
            layers = list(self.values())
            # Grad mode is read here: within a Function it is always off.
            save_bottlenecks = torch.is_grad_enabled() and not self.memory_efficient
            return _LinearMemoryBlock.apply(ops, layers, save_bottlenecks, x,
                                            *_parameters(layers))
        self.path = 'checkpointed' if _recomputes(self, x) else 'plain'
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    def _evaluate(self, ops, x):
        """In eval mode and without gradients: in one buffer, as in training."""
        c = x.shape[1]
        channels = c + sum(len(layer.halves()[-1][1].weight) for layer in self.values())
        features = ops.new_maps(x, channels)
        features[:, :c].copy_(x)
        for layer in self.values():
            *first, (norm, conv) = layer.halves()
            maps, k = features[:, :c], len(conv.weight)
            for half in first:
                maps = _evaluate_half(ops, maps, *half)
            _evaluate_half(ops, maps, norm, conv, out=features[:, c:c + k])
            c += k
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
                           preserve_rng_state=False, context_fn=self._checkpoint_contexts)
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

    def _checkpoint_contexts(self):
        is_batch_norm = hasattr(self.norm1, 'num_batches_tracked')  # nobody has replaced it
        recompute = _UntrackedStatistics(self.norm1) if is_batch_norm else contextlib.nullcontext()
        return contextlib.nullcontext(), recompute

    def halves(self):
        """(norm, conv) of each half."""
        halves = [(self.norm1, self.conv1)]
        return [*halves, (self.norm2, self.conv2)] if self.bottleneck else halves


class _UntrackedStatistics:
    """A context in which a norm takes batch statistics and leaves its running statistics alone.

    Not a generator, since each backward through a retained graph enters it again.
    """

    def __init__(self, norm):
        self.norm = norm

    def __enter__(self):
        self.kept = self.norm.momentum, self.norm.num_batches_tracked
        self.norm.momentum, self.norm.num_batches_tracked = 0.0, None

    def __exit__(self, *_):
        self.norm.momentum, self.norm.num_batches_tracked = self.kept


class Transition(_LinearMemory, nn.Sequential):
    """BN-ReLU-Conv(1x1), then 2x2 average pooling (paper, section 3).

    [N, C, H, W] -> [N, out_channels, H // 2, W // 2]

    Convolution and pooling commute, and after the pooling the convolution has a quarter of the
    work. In training, `path` 'linear' is norm-ReLU-pool-convolution as one function that saves its
    input alone.
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
        if not self._can_pool_first(x):
            x = self.conv(self.relu(self.norm(x)))
            return self.pool(F.dropout(x, self.drop_rate, self.training) if self.drop_rate else x)
        ops = self._choose_operations(x)
        if ops:
            self.path = ops.path
            if not self.training:
                return _evaluate_half(ops, x, self.norm, self.conv, pool=True)
            return _LinearMemoryTransition.apply(ops, self.norm, x, self.norm.weight,
                                                 self.norm.bias, self.conv.weight)
        return self.conv(self.pool(self.relu(self.norm(x))))

    def _can_pool_first(self, x):
        """Not with dropout between the two, nor where somebody may look there."""
        return not (self.drop_rate and self.training or isinstance(x, torch.fx.Proxy)
                    or _module_reason(self.conv, nn.Conv2d, self.training)
                    or _module_reason(self.pool, nn.AvgPool2d, self.training)
                    or self.conv.kernel_size != (1, 1))


# ---- when linear memory is impossible ------------------------------------------------------------

def _is_traced(x):
    """Is a graph of module calls being recorded: torch.compile, export, jit.trace, fx?"""
    return (torch.compiler.is_compiling() or torch.jit.is_tracing()
            or isinstance(x, torch.fx.Proxy))


def _recomputes(module, x):
    """Does a block or layer that runs the plain way recompute its first convolutions?"""
    return (module.memory_efficient and module.training and torch.is_grad_enabled()
            and not _is_traced(x))


# The kinds of modules by their names, without the number.
_KINDS = {'denselayer': DenseLayer, 'norm': nn.BatchNorm2d, 'relu': nn.ReLU, 'conv': nn.Conv2d,
          'pool': nn.AvgPool2d}


def _fallback_reason(block, x):
    """Why the linear way would not compute what the modules of a block or transition do, or None.

    The first two look at private names. In a torch that renames one, the functions below still
    refuse transforms themselves, but global hooks would be overlooked.
    """
    if (getattr(torch._C, '_are_functorch_transforms_active', lambda: False)()
            or getattr(forward_ad, '_current_level', -1) >= 0):
        return 'torch.func or forward-mode differentiation'
    if any(getattr(nn.modules.module, f'_global_{kind}_hooks', None)
           for kind in ('forward', 'forward_pre', 'backward', 'backward_pre')):
        return 'global module hooks'
    if x.dim() != 4 or x.numel() <= x.shape[1] * block.training:  # nn.BatchNorm2d complains
        return f'an input of shape {list(x.shape)}'
    channels = x.shape[1]
    for name, module in block.named_modules():
        kind = name.rpartition('.')[2].rstrip('0123456789')
        reason = kind and _module_reason(module, _KINDS.get(kind), block.training)
        if reason:
            return f'{name} {reason}'
        if kind == 'denselayer':
            if len(module.norm1.weight) != channels:
                return f'{name} reads {len(module.norm1.weight)} channels, not {channels}'
            channels += len(module.halves()[-1][1].weight)
    dtypes = {parameter.dtype for parameter in block.parameters()}
    if len(dtypes) > 1 or x.dtype != _conv_dtype(x, *dtypes):
        return f'input of {x.dtype}, weights of {", ".join(map(str, dtypes))}'
    return None


def _module_reason(module, kind, training):
    """Why a module may not do what it does as it is built here, or None."""
    if type(module) is not kind:
        return f'is a {type(module).__name__}'
    if (module._forward_hooks or module._forward_pre_hooks or module._backward_hooks
            or module._backward_pre_hooks or 'forward' in module.__dict__):
        return 'has hooks, or a forward of its own'
    if module.training != training:
        return f'is in {"eval" if training else "training"} mode'
    if kind is nn.BatchNorm2d and any(value is None for value in (
            module.weight, module.bias, module.running_mean)):
        return 'has no weights or no running statistics'
    if kind is nn.Conv2d:
        side = module.kernel_size[0]
        geometry = (module.kernel_size, module.stride, module.padding, module.dilation,
                    module.groups, module.padding_mode, module.bias)
        same = (side,) * 2, (1, 1), (side // 2,) * 2, (1, 1), 1, 'zeros', None
        if side not in (1, 3) or geometry != same:
            return 'has a bias, or is not a "same" convolution of stride 1'
    if kind is nn.AvgPool2d and (module.kernel_size, module.stride, module.padding) != (2, 2, 0):
        return 'does not pool 2x2'
    return None


def _conv_dtype(x, weight_dtype):
    """The precision in which a convolution of x is computed, None if the block has no such."""
    device = x.device.type
    if weight_dtype not in (torch.float32, torch.float64):
        return None
    if (weight_dtype == torch.float32 and torch.amp.is_autocast_available(device)
            and torch.is_autocast_enabled(device)):
        return torch.get_autocast_dtype(device)
    return weight_dtype


def _no_autocast(x):
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


# ---- training in linear memory -------------------------------------------------------------------

class _LinearMemoryBlock(torch.autograd.Function):
    """A dense block in training as one function, whose memory is linear in the number of layers.

    All feature maps are in one buffer, where each layer writes its own channels: nothing is ever
    concatenated. The mean m and variance of a channel over the batch are the same for every layer
    that reads it, so they are taken once, and norm1 of layer l is (x - m) * s + bias with
    s = weight * r and r = 1 / sqrt(variance + eps). Saved for backward are the buffer, vectors of
    one number a channel, the outputs of the 1x1 convolutions (or not: `save_bottlenecks`) and the
    masks of dropout. The rest is cheap to recompute.

    In backward, let g be the gradient at the output of norm1 of layer l, and M = N * H * W. Batch
    normalisation gives

        d_bias = sum(g),  d_weight = sum(g * (x - m)) * r,
        dx = s * g - s * (d_bias + (x - m) * r * d_weight) / M

    and the gradient of a channel is the sum over the layers that read it. All but s * g is linear
    in x - m, so the coefficients are summed, and applied in one pass when all layers are done:

        dx = G - (A + (x - m) * B)  with
        G = sum of s * g,  A = sum of s * d_bias / M,  B = sum of s * r * d_weight / M  over l.

    Args:
        ops: the implementation of the operations, such as `_EagerOperations`.
        layers: the DenseLayers, for their settings and running statistics, which are updated.
        save_bottlenecks: save the outputs of the 1x1 convolutions for backward.
        x: [N, C, H, W].
        parameters: `_parameters(layers)`.

    Returns:
        The feature maps [N, C + num_layers * growth_rate, H, W].
    """

    @staticmethod
    def forward(ctx, ops, layers, save_bottlenecks, x, *parameters):
        ctx.ops, ctx.in_channels = ops, x.shape[1]
        ctx.drop_rates = [layer.drop_rate for layer in layers]
        ctx.eps = [[norm.eps for norm, _ in layer.halves()] for layer in layers]
        layer_halves = _halves(parameters, ctx.eps)
        channels = x.shape[1] + sum(len(halves[-1].kernel) for halves in layer_halves)
        features = _Maps(ops.new_maps(x, channels),
                         *(x.new_empty(channels, dtype=parameters[0].dtype) for _ in range(2)))
        saved, updates = [], []
        with _no_autocast(x):
            features.part(0, x.shape[1]).copy_(_Maps(x, *ops.statistics(x)))
            for layer, halves in zip(layers, layer_halves):
                c = len(halves[0].weight)  # channels that this layer reads
                maps, new = features.part(0, c), features.part(c, c + len(halves[-1].kernel))
                for (norm, _), half in zip(layer.halves(), halves):
                    updates.append((norm, maps))
                    is_last, mask = half is halves[-1], None
                    maps = _Maps(*ops.norm_relu_conv(maps, half, statistics=not layer.drop_rate,
                                                     out=new.data if is_last else None))
                    if layer.drop_rate:
                        data, mask = torch.native_dropout(maps.data, layer.drop_rate, True)
                        maps = _Maps(data, *ops.statistics(data))
                    is_saved = save_bottlenecks and not is_last
                    saved += [mask, maps.data if is_saved else None, maps.mean, maps.var]
                new.copy_(maps)
        _update_running_statistics(updates, x.numel() // x.shape[1])
        ctx.save_for_backward(*features, *parameters, *saved)
        return features.data

    @staticmethod
    def backward(ctx, grad):
        features, layers, parameters = _LinearMemoryBlock._unpack(ctx)
        if _needs_autograd(grad):
            x = features.data[:, :ctx.in_channels]  # from there, the identity leads to the input
            return None, None, None, *_gradients_by_autograd(
                functools.partial(_plain_block, layers), [x, *parameters], grad)
        ops, gradients, end = ctx.ops, [], len(features.mean)
        G = ops.new_maps(features.data, end).copy_(grad)  # names as above
        A, B = torch.zeros_like(features.mean), torch.zeros_like(features.mean)

        def incomplete(start, stop):
            """Of some channels' gradient G, and what completes it when all layers are in."""
            part = slice(start, stop)
            return G[:, part], (features.part(start, stop), A[part], B[part])

        with _no_autocast(grad):
            for layer in reversed(layers):
                c = len(layer.halves[0].weight)
                inputs = [features.part(0, c), *layer.outputs[:-1]]
                grad, completion = incomplete(c, end)
                for i in reversed(range(len(inputs))):
                    maps, half, mask = inputs[i], layer.halves[i], layer.masks[i]
                    if maps.data is None:
                        z, *_ = ops.norm_relu_conv(inputs[i - 1], layer.halves[i - 1])
                        z = _dropout_backward(z, layer.masks[i - 1], layer.drop_rate)
                        maps = maps._replace(data=z)
                    if mask is not None:
                        grad = _dropout_backward(ops.complete(grad, *completion), mask,
                                                 layer.drop_rate)
                        completion = None
                    grad, *found = ops.norm_relu_conv_backward(
                        grad, maps, half, total=None if i else G[:, :c], completion=completion)
                    completion = maps, *_coefficients(maps, half, *found[:2])
                    gradients = found + gradients
                A[:c] += completion[1]
                B[:c] += completion[2]
                end = c
            grad, completion = incomplete(0, end)
            return None, None, None, ops.complete(grad, *completion), *gradients

    @staticmethod
    def _unpack(ctx):
        data, mean, var, *tensors = ctx.saved_tensors
        count = 3 * sum(map(len, ctx.eps))
        parameters, saved = tensors[:count], zip(*[iter(tensors[count:])] * 4)
        layers = []
        for halves, drop_rate in zip(_halves(parameters, ctx.eps), ctx.drop_rates):
            masks, *outputs = zip(*(next(saved) for _ in halves))
            layers.append(_SavedLayer(halves, drop_rate, masks, list(map(_Maps, *outputs))))
        return _Maps(data, mean, var), layers, parameters


class _LinearMemoryTransition(torch.autograd.Function):
    """A transition in training, pooled before the convolution; saves its input alone.

    x [N, C, H, W] -> [N, out_channels, H // 2, W // 2]; the running statistics of `norm` are
    updated.
    """

    @staticmethod
    def forward(ctx, ops, norm, x, *parameters):
        ctx.ops, ctx.eps = ops, norm.eps
        with _no_autocast(x):
            maps = _Maps(x, *ops.statistics(x))
            y, *_ = ops.norm_relu_conv(maps, _Half(*parameters, norm.eps), pool=True)
        _update_running_statistics([(norm, maps)], x.numel() // x.shape[1])
        ctx.save_for_backward(*maps, *parameters)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, mean, var, *parameters = ctx.saved_tensors
        maps = _Maps(x, mean, var)
        if _needs_autograd(grad):
            def plain(x, *parameters):
                return _plain_half(x, _Half(*parameters, ctx.eps), pool=True)
            return None, None, *_gradients_by_autograd(plain, [x, *parameters], grad)
        with _no_autocast(grad):
            half = _Half(*parameters, ctx.eps)
            total, *found = ctx.ops.norm_relu_conv_backward(grad, maps, half, pool=True)
            dx = ctx.ops.complete(total, maps, *_coefficients(maps, half, *found[:2]))
            return None, None, dx, *found


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

    def invstd(self, maps):
        """1 / the standard deviation of each channel, as the norm takes it."""
        return (maps.var + self.eps).rsqrt()


class _SavedLayer(NamedTuple):
    """What backward has of a dense layer: in lists, an entry for each half."""
    halves: list
    drop_rate: float
    masks: list    # of dropout, or None
    outputs: list  # _Maps; without data where it is to be recomputed, or in the buffer


def _parameters(layers):
    """Of each half, weight and bias of the norm and weight of the convolution."""
    return [parameter for layer in layers for norm, conv in layer.halves()
            for parameter in (norm.weight, norm.bias, conv.weight)]


def _halves(parameters, eps):
    """The halves of each layer, from `_parameters(layers)` and the eps of the norms."""
    triples = zip(*[iter(parameters)] * 3)
    return [[_Half(*next(triples), value) for value in values] for values in eps]


def _evaluate_half(ops, x, norm, conv, pool=False, out=None):
    maps = _Maps(x, norm.running_mean, norm.running_var)
    half = _Half(norm.weight, norm.bias, conv.weight, norm.eps)
    with _no_autocast(x):
        return ops.norm_relu_conv(maps, half, pool, out)[0]


def _coefficients(maps, half, d_weight, d_bias):
    """A half's parts of A and B, as above."""
    invstd = half.invstd(maps)
    share = half.weight * invstd / (maps.data.numel() // len(invstd))
    return share * d_bias, share * invstd * d_weight


@torch.no_grad()
def _update_running_statistics(updates, count):
    """As nn.BatchNorm2d does: for pairs of a norm and its maps of `count` values a channel."""
    norms, maps = zip(*updates)
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


def _needs_autograd(grad):
    """Are gradients to be differentiated again (create_graph=True), or batched (vmap)?

    Batched ones can't be written into memory that is not.
    """
    names = 'is_batchedtensor', 'is_legacy_batchedtensor'
    return torch.is_grad_enabled() or any(
        getattr(torch._C._functorch, name, lambda _: False)(grad) for name in names)


def _gradients_by_autograd(function, inputs, grad):
    """Gradients of function(*inputs), with a graph of their own if grad mode is on."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), _no_autocast(grad):
        # Views, so that autograd stops here and does not go on to one input through another.
        inputs = [value.view_as(value) for value in inputs]
        wanted = [value for value in inputs if value.requires_grad]
        found = iter(torch.autograd.grad(function(*inputs), wanted, grad,
                                         create_graph=create_graph))
        return [next(found) if value.requires_grad else None for value in inputs]


def _plain_half(x, half, pool=False):
    y = F.relu(F.batch_norm(x, None, None, half.weight, half.bias, training=True, eps=half.eps))
    return _conv(F.avg_pool2d(y, 2) if pool else y, half.kernel)


def _plain_block(layers, x, *parameters):
    """The block in operations that autograd knows, with the dropout of the saved layers."""
    features, triples = [x], zip(*[iter(parameters)] * 3)
    for layer in layers:
        y = torch.cat(features, 1)
        for half, mask in zip(layer.halves, layer.masks):
            y = _plain_half(y, _Half(*next(triples), half.eps))
            y = _dropout_backward(y, mask, layer.drop_rate)
        features.append(y)
    return torch.cat(features, 1)


# ---- the operations of a block -------------------------------------------------------------------

class _EagerOperations:
    """What blocks and transitions in linear memory are made of, in PyTorch's own operations.

    Maps may be in any layout and some channels of wider ones; they are in the precision of the
    convolutions, and statistics, parameters and their gradients in float32 or float64. With

        normed = (maps.data - maps.mean) / sqrt(maps.var + half.eps),
        output = conv(relu(normed * half.weight + half.bias), half.kernel),

    pooled 2x2 before the convolution if `pool`, another implementation has the same five functions,
    as densenet_cpu.py does.
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
    def norm_relu_conv_backward(grad, maps, half, pool=False, total=None, completion=None):
        """From the gradient of the output to those of what it was made of.

        With g the gradient of normed * weight + bias.

        Args:
            grad: the gradient of the output, or `complete(grad, *completion)` is.

        Returns:
            total: g * weight / sqrt(var + eps), or the sum of that and `total`, in place.
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
            g, maps.data, half.weight, maps.mean, maps.var, maps.mean, half.invstd(maps), False,
            half.eps, [True] * 3)
        return (g if total is None else total.add_(g), d_weight, d_bias,
                d_kernel.to(half.kernel.dtype))

    @staticmethod
    def complete(total, maps, a, b):
        """total - (a + (data - mean) * b): the gradient of maps, from that of all their readers."""
        share = _affine(maps, b, a)
        return torch.sub(total, share, out=share)


@functools.cache
def _cpu_kernels():
    """The operations of densenet_cpu.py, if it is beside this file."""
    try:
        return importlib.import_module('.densenet_cpu' if __package__ else 'densenet_cpu',
                                       __package__ or None)
    except ImportError:
        return None


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
