"""A dense block, or a transition, in training as one autograd function.

The block's memory is linear in the number of layers. Each layer writes its own channels into one
buffer, so nothing is ever concatenated. The mean m and the variance of a channel over the batch are
the same for every layer that reads it, so they are computed once, and norm1 of layer l is
(x - m) * s + bias with s = weight * r and r = 1 / sqrt(variance + eps). Saved for backward are the
buffer, per-channel vectors, dropout masks and, unless the layer is memory-efficient, the outputs of
the 1x1 convolutions. The rest is cheap to recompute.

In backward, let g be the gradient at the output of norm1 of layer l, and M = N * H * W. Batch
normalization gives

    d_bias = sum(g),  d_weight = sum(g * (x - m)) * r,
    dx = s * g - s * (d_bias + (x - m) * r * d_weight) / M

and the gradient of a channel is the sum over the layers that read it. Everything except s * g is
linear in x - m, so the coefficients are summed, and applied in one pass when all layers are done:

    dx = G - (A + (x - m) * B)  with
    G = sum of s * g,  A = sum of s * d_bias / M,  B = sum of s * r * d_weight / M  over l.

Until then a gradient is `pending`: it lacks its batch-statistics terms.

The algebra is written in terms of five operations, `ops`: the module eager.py or cpu.py.
"""

import contextlib
from typing import NamedTuple

import torch


class Maps(NamedTuple):
    """Feature maps [N, C, H, W], and mean and biased variance of each channel over the batch."""
    data: torch.Tensor
    mean: torch.Tensor
    var: torch.Tensor

    def part(self, start, stop):
        return Maps(self.data[:, start:stop], self.mean[start:stop], self.var[start:stop])

    def copy_(self, other):
        for target, source in zip(self, other):
            if target is not source:
                target.copy_(source)


class NormConv(NamedTuple):
    """The parameters of norm, ReLU and convolution: half a dense layer, or a transition."""
    weight: torch.Tensor  # of the norm, [C]
    bias: torch.Tensor
    filters: torch.Tensor  # weight of the convolution, [O, C, 1, 1] or [O, C, 3, 3]
    eps: float

    def part(self, start, stop):
        """The parameters of these input channels."""
        return NormConv(self.weight[start:stop], self.bias[start:stop],
                        self.filters[:, start:stop], self.eps)


class Layer(NamedTuple):
    """The settings of a dense layer; each tuple has an entry per NormConv (two, or one)."""
    norms: tuple          # modules, whose running statistics are updated
    eps: tuple
    drop_rates: tuple     # of the dropout after each convolution
    recompute: bool       # in backward, instead of saving the output of the 1x1 convolution


class DenseBlockFunction(torch.autograd.Function):
    """apply(ops, layers, x, *parameters)

    x is [N, C, H, W], the result [N, C + num_layers * growth_rate, H, W], which must not be
    modified in place. `parameters` are norm weight, norm bias and filters of each NormConv of each
    layer.
    """

    @staticmethod
    def forward(ctx, ops, layers, x, *parameters):
        ctx.ops, ctx.layers = ops, layers
        triples = zip(*[iter(parameters)] * 3)
        # for each layer two, or one without bottleneck
        norm_convs = [[NormConv(*next(triples), eps) for eps in layer.eps] for layer in layers]
        c = x.shape[1]  # channels that the layer reads
        channels = c + sum(len(last.filters) for *_, last in norm_convs)
        features = Maps(ops.new_maps(x, channels), *parameters[0].new_empty(2, channels))
        saved, norms, statistics = [], [], []
        with no_autocast(x):
            features.part(0, c).copy_(Maps(x, *ops.statistics(x)))
            for layer, pair in zip(layers, norm_convs):
                last = pair[-1]
                new = features.part(c, c + len(last.filters))
                maps = features.part(0, c)
                for norm_conv, rate in zip(pair, layer.drop_rates):
                    is_last, mask = norm_conv is last, None
                    statistics.append(maps._replace(data=None))
                    maps = Maps(*ops.norm_relu_conv(maps, norm_conv, with_statistics=not rate,
                                                    out=new.data if is_last else None))
                    if rate:
                        data, mask = torch.native_dropout(maps.data, rate, True)
                        maps = Maps(data, *ops.statistics(data))
                    is_saved = not (is_last or layer.recompute)
                    saved += [*norm_conv[:3], mask, maps.data if is_saved else None, *maps[1:]]
                new.copy_(maps)
                norms += layer.norms
                c += len(last.filters)
        update_running_statistics(norms, statistics, x.numel() // x.shape[1])
        ctx.save_for_backward(*features, *saved)
        return features.data

    @staticmethod
    def backward(ctx, grad):
        check_first_order()
        data, mean, var, *saved = ctx.saved_tensors
        features, rows = Maps(data, mean, var), zip(*[iter(saved)] * 7)
        # For each NormConv of each layer: itself, drop rate, dropout mask or None, and output.
        # `output.data` is None if it is in the buffer or will be recomputed.
        layers = [[(NormConv(*row[:3], eps), rate, row[3], Maps(*row[4:]))
                   for eps, rate, row in zip(layer.eps, layer.drop_rates, rows)]
                  for layer in ctx.layers]
        ops, gradients, end = ctx.ops, [], len(mean)
        # Names as above. G has the channels that the last layer has read. That layer adds to the
        # gradient of the block's output, and the others add to G in place.
        G, before = ops.new_maps(data, end - len(layers[-1][-1][0].filters)), grad
        A, B = torch.zeros_like(mean), torch.zeros_like(mean)
        with no_autocast(grad):
            for layer in reversed(layers):
                c = end - len(layer[-1][0].filters)  # channels that the layer has read
                inputs = [features.part(0, c)]
                for norm_conv, rate, mask, output in layer[:-1]:
                    if output.data is None:
                        z, *_ = ops.norm_relu_conv(inputs[-1], norm_conv)
                        output = output._replace(data=dropout_backward(z, mask, rate))
                    inputs.append(output)
                # All readers of the new channels are done, so their gradient can be completed.
                grad, pending = before[:, c:end], (features.part(c, end), A[c:end], B[c:end])
                for maps, (norm_conv, rate, mask, _) in zip(reversed(inputs), reversed(layer)):
                    if mask is not None:
                        grad = dropout_backward(ops.complete(grad, *pending), mask, rate)
                        pending = None
                    sums = {}
                    if maps is inputs[0]:
                        sums = dict(before=before[:, :c], out=G[:, :c], add_to=(A[:c], B[:c]))
                    grad, pending, found = ops.norm_relu_conv_backward(
                        grad, maps, norm_conv, pending=pending, **sums)
                    gradients = found + gradients
                before, end = G, c
            dx = ops.complete(grad, *pending)
            return None, None, dx, *gradients


class TransitionFunction(torch.autograd.Function):
    """apply(ops, norm, x, weight, bias, filters): a transition; saves only its input.

    x is [N, C, H, W], the result [N, out_channels, H // 2, W // 2]. Pools before the convolution,
    since the two commute and the convolution then has a quarter of the work. Updates the running
    statistics of the module `norm`.
    """

    @staticmethod
    def forward(ctx, ops, norm, x, *parameters):
        ctx.ops, ctx.eps = ops, norm.eps
        with no_autocast(x):
            maps = Maps(x, *ops.statistics(x))
            y, *_ = ops.norm_relu_conv(maps, NormConv(*parameters, norm.eps), pool=True)
        update_running_statistics([norm], [maps], x.numel() // x.shape[1])
        ctx.save_for_backward(*maps, *parameters)
        return y

    @staticmethod
    def backward(ctx, grad):
        check_first_order()
        x, mean, var, *parameters = ctx.saved_tensors
        with no_autocast(grad):
            grad, pending, found = ctx.ops.norm_relu_conv_backward(
                grad, Maps(x, mean, var), NormConv(*parameters, ctx.eps), pool=True)
            return None, None, ctx.ops.complete(grad, *pending), *found


def update_running_statistics(norms, maps, count):
    """Update running statistics as nn.BatchNorm2d does.

    Args:
        maps: the input Maps of each norm.
        count: values per channel.
    """
    unbiased = torch._foreach_mul([m.var for m in maps], count / (count - 1))
    by_momentum = {}
    for norm, m, var in zip(norms, maps, unbiased):
        # A momentum of None averages over all batches, whose number is read with a GPU sync.
        momentum = (1 / (float(norm.num_batches_tracked) + 1) if norm.momentum is None
                    else norm.momentum)
        by_momentum.setdefault(momentum, []).extend([(norm.running_mean, m.mean),
                                                     (norm.running_var, var)])
    for momentum, pairs in by_momentum.items():
        torch._foreach_lerp_(*map(list, zip(*pairs)), momentum)
    torch._foreach_add_([norm.num_batches_tracked for norm in norms], 1)


def dropout_backward(x, mask, rate):
    """Multiply by the mask and 1 / (1 - rate), in forward and backward alike."""
    return x if mask is None else torch.ops.aten.native_dropout_backward(x, mask, 1 / (1 - rate))


def check_first_order():
    if torch.is_grad_enabled():  # create_graph=True
        raise RuntimeError('fused dense blocks do not support double backward (create_graph=True): '
                           'use fused_dense_block.unfuse(model)')


def no_autocast(x):
    device = x.device.type
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()
