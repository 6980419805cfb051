"""The five operations of a fused dense block, by PyTorch; cpu.py has the same five.

Maps may have any layout and may be a slice of channels. They are in the precision of the
convolutions; statistics, parameters and their gradients are in float32 or float64. The operations
compute the following, with y 2x2 average-pooled before the convolution if `pool`:

    normed = (maps.data - maps.mean) / sqrt(maps.var + norm_conv.eps),
    y = relu(normed * norm_conv.weight + norm_conv.bias),
    output = conv(y, norm_conv.filters).
"""

import math

import torch
import torch.nn.functional as F

path = 'eager'


def new_maps(x, channels):
    """An empty tensor [N, channels, H, W] in the layout of x, which may be a slice of channels."""
    channels_last = x.stride(1) == 1 and x.shape[2:].numel() > 1
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=layout)


def statistics(data):
    """Mean and biased variance of each channel."""
    dtype = torch.promote_types(data.dtype, torch.float32)
    if data.device.type not in ('cpu', 'cuda'):  # others lack the faster operation below
        var, mean = torch.var_mean(data.to(dtype), (0, 2, 3), correction=0)
        return mean, var
    # Running statistics are not needed here, but determine the dtype of the results.
    unused = data.new_zeros(data.shape[1], dtype=dtype)
    return torch.ops.aten.batch_norm_update_stats.default(data, unused, unused.clone(), 0)


def norm_relu_conv(maps, norm_conv, pool=False, out=None, with_statistics=False):
    """The output, in `out` if given, and its mean and variance, or None, None."""
    y = _conv(_norm_relu(maps, norm_conv, pool), norm_conv.filters)
    found = statistics(y) if with_statistics else (None, None)
    return y if out is None else out.copy_(y), *found


def norm_relu_conv_backward(grad, maps, norm_conv, pool=False, pending=None, before=None, out=None,
                            add_to=None):
    """The gradients of the input and the parameters, from the gradient of the output.

    Args:
        grad: the gradient of the output.
        pending: arguments of `complete` for grad, if it is pending.
        before, out: if given, `before` plus the gradient of the input is written to `out`; they may
            be the same maps.
        add_to: if given, a and b are added to these two vectors.

    Returns:
        The gradient of the input, pending: g * weight / std, where g is the gradient of
            normed * weight + bias.
        The other arguments of `complete` for it: maps, a and b.
        [Gradients of weight (sum of g * normed), of bias (sum of g) and of the filters].
    """
    if pending is not None:
        grad = complete(grad, *pending)
    c = maps.data.shape[1]
    invstd = (maps.var + norm_conv.eps).rsqrt()
    # The memory peak is in the last layers of a block, which read almost all of its channels:
    # process these in two parts, of at most half of the block's channels each.
    if out is not None and c > _buffer_channels(out) / 2:
        ranges = (0, math.ceil(c / 2)), (math.ceil(c / 2), c)
        _, *found = zip(*(_backward(
            grad, maps.part(*part), norm_conv.part(*part), invstd[slice(*part)], pool,
            before[:, slice(*part)], out[:, slice(*part)]) for part in ranges))
        gradients = [*map(torch.cat, found[:2]), torch.cat(found[2], 1)]
    else:
        out, *gradients = _backward(grad, maps, norm_conv, invstd, pool, before, out)
    d_weight, d_bias, _ = gradients
    share = norm_conv.weight * invstd / (maps.data.numel() // c)
    a, b = share * d_bias, share * invstd * d_weight
    if add_to is not None:
        a, b = add_to[0].add_(a), add_to[1].add_(b)
    return out, (maps, a, b), gradients


def _buffer_channels(part):
    return part.untyped_storage().nbytes() // part.element_size() // part[:, 0].numel()


def _backward(grad, maps, norm_conv, invstd, pool, before, out):
    y = _norm_relu(maps, norm_conv)
    g, d_filters, _ = torch.ops.aten.convolution_backward.default(
        grad, F.avg_pool2d(y, 2) if pool else y, norm_conv.filters.to(y.dtype), None, [1, 1],
        [norm_conv.filters.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    if pool:
        g = torch.ops.aten.avg_pool2d_backward.default(g, y, [2, 2], [2, 2], [0, 0], False, True,
                                                       None)
    torch.ops.aten.threshold_backward.grad_input(g, y, 0, grad_input=g)  # the ReLU's mask
    del y
    # train=False treats mean and variance as constants. The CPU uses the variance, CUDA 1 / std.
    g, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward.default(
        g, _dense(maps.data), norm_conv.weight, maps.mean, maps.var, maps.mean, invstd, False,
        norm_conv.eps, [True] * 3)
    return (g if out is None else torch.add(before, g, out=out), d_weight, d_bias,
            d_filters.to(norm_conv.filters.dtype))


def complete(total, maps, a, b):
    """total - (a + (data - mean) * b): the gradient of maps, from their readers' sums."""
    share = _affine(maps, b, a)
    return torch.sub(total, share, out=share)


def _norm_relu(maps, norm_conv, pool=False):
    y = _affine(maps, norm_conv.weight, norm_conv.bias, maps.var, norm_conv.eps).relu_()
    return F.avg_pool2d(y, 2) if pool else y


def _affine(maps, weight, bias, var=None, eps=0):
    """(data - mean) / sqrt(var + eps) * weight + bias, dense, in the precision of the data."""
    var = torch.ones_like(weight) if var is None else var
    y, *_ = torch.native_batch_norm(_dense(maps.data), weight, bias, maps.mean, var, False, 0, eps)
    return y


def _dense(x):
    """A dense copy, in the same layout, if x is a slice of channels; otherwise x."""
    dense = x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)
    return x if dense else x.clone()


def _conv(x, filters):
    return F.conv2d(x, filters.to(x.dtype), padding=filters.shape[-1] // 2)
