"""Triton kernels for a dense block in training; `DenseBlock.kernels` of densenet.py turns them on.

    DenseBlock.kernels = '3x3'     # for all blocks; where they can't be used, `obstacle` says why

A DenseNet is bound by memory traffic, so each kernel does in one pass over its feature maps all
that is to be done with them. The mathematics, and the names G, A and B, are those of
`densenet._LinearMemoryBlock`. Both halves of a layer are the same operation, norm-ReLU-convolution,
from the channels [0, c) of some feature maps to channels of others:

    forward     reads x, normalises it on the way into the convolution, writes the output where it
                belongs, and the output's mean and sum of squared deviations for each tile of rows
    backward    completes the gradient of the output on the way in; gradients of input and kernel,
                the ReLU, the sum into G and both sums over the batch come from one pass over x

each followed by a small kernel that puts the tiles together. Feature maps are matrices here, a row
a pixel, a column a channel (NHWC); in them and in their gradients numbers are bf16 or fp16, all
else is float32. Nothing is added up by atomics: two runs give the same bits.

Under TRITON_INTERPRET=1 all of it runs on the CPU, slowly.
"""

import functools
import math
import os
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

# How much of a block the kernels compute; each level includes those before it. Below '3x3' the
# library (cuDNN) convolves: all that is written around it is still the kernels' work.
LEVELS = ('elementwise', '1x1', '3x3')

INTERPRETED = tl.constexpr(os.environ.get('TRITON_INTERPRET') == '1')


def find_obstacle(x, level, drop_rate):
    """Why the kernels can't compute a dense block of x, [N, C, H, W], or None if they can.

    Raises:
        ValueError: `level` is none of LEVELS.
    """
    if level not in LEVELS:
        raise ValueError(f'kernels must be None or one of {LEVELS}, not {level!r}')
    if not INTERPRETED.value and not (x.is_cuda
                                      and torch.cuda.get_device_capability(x.device) >= (8, 0)):
        return f'kernels need a GPU of compute capability 8.0 or more, not {x.device}'
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f'kernels compute in bf16 and fp16, not in {x.dtype}'
    if not x.is_contiguous(memory_format=torch.channels_last):
        return 'kernels read channels_last'
    if drop_rate:
        return 'kernels have no dropout'
    return None


# ---- kernels ------------------------------------------------------------------------------
# Numbers of channels come in units of UNIT, which divides them all: the compiler then knows how
# many neighbouring channels it can load at once, whatever the width of a row.
#
# The sides of a tile are powers of two. Where the next one would waste much, the outputs of a
# convolution are two tiles, OUT and TAIL wide: 160 are 128 + 32, not 256. Elsewhere TAIL is 0.

@triton.jit
def _affine(x, mean, scale, bias):
    # Not x * scale + shift: far from 0 that would lose the digits that decide over the ReLU.
    return (x.to(tl.float32) - mean[None, :]) * scale[None, :] + bias[None, :]


@triton.jit
def _relu(values, y):
    """values where y > 0, else 0; unlike with tl.maximum, NaN stays NaN."""
    return tl.where(y <= 0.0, 0.0, values)


@triton.jit
def _dot(x, y, sum_):
    if INTERPRETED:  # there is no bf16 in NumPy: its dot would take the bits for integers
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, sum_, input_precision='ieee')


@triton.jit
def _load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, mask):
    """mean, scale and bias of some channels."""
    invstd = tl.load(invstd_ptr + channels, mask=mask, other=0.0)
    scale = tl.load(weight_ptr + channels, mask=mask, other=0.0) * invstd
    return (tl.load(mean_ptr + channels, mask=mask, other=0.0), scale,
            tl.load(bias_ptr + channels, mask=mask, other=0.0))


@triton.jit
def _store_maps(y, y_ptr, rows, num_rows, stride, start, channels, num_channels, partial_ptr, tile,
                num_tiles, ROWS: tl.constexpr):
    """Store a tile of y, and of each channel in it mean and sum of squared deviations.

    The latter go to `partial`, [2, num_tiles, num_channels].
    """
    used, valid = channels < num_channels, (rows < num_rows)[:, None]
    y = y.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows.to(tl.int64)[:, None] * stride + start + channels[None, :], y,
             mask=valid & used[None, :])
    y = y.to(tl.float32)  # as it was rounded
    mean = tl.sum(tl.where(valid, y, 0.0), 0) / tl.minimum(num_rows - tile * ROWS, ROWS)
    deviation = tl.where(valid, y - mean[None, :], 0.0)
    here = partial_ptr + tile * num_channels + channels
    tl.store(here, mean, mask=used)
    tl.store(here + num_tiles * num_channels, tl.sum(deviation * deviation, 0), mask=used)


@triton.jit
def _store_relu_backward(h, x, g_ptr, offsets, mask, mean, scale, bias, ACCUMULATE: tl.constexpr):
    """Take h, the gradient at the ReLU's output, back to its input, and its share of x's into G.

    h must be 0 beyond the mask. Returns the ReLU's output, and the sums over the gradient at its
    input for the norm's bias and, but for invstd, weight.
    """
    y = _affine(x, mean, scale, bias)
    h = _relu(h, y)
    share = h * scale[None, :]
    if ACCUMULATE:
        share += tl.load(g_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(g_ptr + offsets, share.to(g_ptr.dtype.element_ty), mask=mask)
    return _relu(y, y), tl.sum(h, 0), tl.sum(h * (x.to(tl.float32) - mean[None, :]), 0)


@triton.jit
def _shifted(rows, num_rows, height, width, dy, dx):
    """The rows of the pixels (dy, dx) away, and which of them are pixels of the same image."""
    y = (rows // width) % height + dy
    x = rows % width + dx
    inside = (rows < num_rows) & (y >= 0) & (y < height) & (x >= 0) & (x < width)
    return rows + dy * width + dx, inside


@triton.jit
def _complete_gradient(grad, y, mean, a, b, num_rows):
    """The gradient of feature maps y: G - (A + (y - mean) * B) / M."""
    share = a[None, :] + (y.to(tl.float32) - mean[None, :]) * b[None, :]
    return grad.to(tl.float32) - share / num_rows


@triton.jit(do_not_specialize=['num_rows', 'height', 'width', 'in_units', 'x_units', 'out_units',
                               'y_units', 'start_units', 'num_tiles'])
def _conv_kernel(x_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, kernel_ptr, y_ptr, partial_ptr,
                 num_rows, height, width, in_units, x_units, out_units, y_units, start_units,
                 num_tiles, UNIT: tl.constexpr, SIDE: tl.constexpr, ROWS: tl.constexpr,
                 IN: tl.constexpr, OUT: tl.constexpr, TAIL: tl.constexpr):
    """y[:, start:][:, :out] = conv(relu(norm(x[:, :in]))), and the statistics of each tile of y.

    kernel is [out, SIDE, SIDE, in].
    """
    in_channels, out_channels = in_units * UNIT, out_units * UNIT
    tile = tl.program_id(0)
    rows = tile * ROWS + tl.arange(0, ROWS)
    outs = tl.program_id(1) * OUT + tl.arange(0, OUT)
    sum_ = tl.zeros((ROWS, OUT), tl.float32)
    if TAIL:
        tail_outs = OUT + tl.arange(0, TAIL)
        tail_sum = tl.zeros((ROWS, TAIL), tl.float32)
    steps = tl.cdiv(in_channels, IN)
    for step in range(SIDE * SIDE * steps):
        tap = step // steps
        ins = step % steps * IN + tl.arange(0, IN)
        valid = ins < in_channels
        mean, scale, bias = _load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, ins, valid)
        if SIDE == 1:
            sources, inside = rows, rows < num_rows
        else:
            sources, inside = _shifted(rows, num_rows, height, width, tap // SIDE - SIDE // 2,
                                       tap % SIDE - SIDE // 2)
        mask = inside[:, None] & valid[None, :]
        x = tl.load(x_ptr + sources.to(tl.int64)[:, None] * (x_units * UNIT) + ins[None, :],
                    mask=mask, other=0.0)
        y = _affine(x, mean, scale, bias)
        y = tl.where(mask, _relu(y, y), 0.0)  # the convolution pads with zeros, after the ReLU
        y = y.to(kernel_ptr.dtype.element_ty)
        kernel_of_tap = kernel_ptr + tap * in_channels + ins[:, None]
        sum_ = _dot(y, tl.load(kernel_of_tap + outs[None, :] * (SIDE * SIDE * in_channels),
                               mask=valid[:, None] & (outs < out_channels)[None, :], other=0.0),
                    sum_)
        if TAIL:
            tail_sum = _dot(y, tl.load(
                kernel_of_tap + tail_outs[None, :] * (SIDE * SIDE * in_channels),
                mask=valid[:, None] & (tail_outs < out_channels)[None, :], other=0.0), tail_sum)
    _store_maps(sum_, y_ptr, rows, num_rows, y_units * UNIT, start_units * UNIT, outs,
                out_channels, partial_ptr, tile, num_tiles, ROWS)
    if TAIL:
        _store_maps(tail_sum, y_ptr, rows, num_rows, y_units * UNIT, start_units * UNIT, tail_outs,
                    out_channels, partial_ptr, tile, num_tiles, ROWS)


@triton.jit(do_not_specialize=['num_rows', 'units', 'x_units', 'y_units', 'start_units',
                               'num_tiles'])
def _copy_kernel(x_ptr, y_ptr, partial_ptr, num_rows, units, x_units, y_units, start_units,
                 num_tiles, UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """y[:, start:][:, :channels] = x, and the statistics of each tile."""
    tile, num_channels = tl.program_id(0), units * UNIT
    rows = tile * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (rows < num_rows)[:, None] & (channels < num_channels)[None, :]
    x = tl.load(x_ptr + rows.to(tl.int64)[:, None] * (x_units * UNIT) + channels[None, :],
                mask=mask, other=0.0)
    _store_maps(x, y_ptr, rows, num_rows, y_units * UNIT, start_units * UNIT, channels,
                num_channels, partial_ptr, tile, num_tiles, ROWS)


@triton.jit(do_not_specialize=['num_rows', 'num_channels', 'start', 'num_tiles', 'tile_rows',
                               'eps'])
def _merge_kernel(partial_ptr, mean_ptr, var_ptr, invstd_ptr, num_rows, num_channels, start,
                  num_tiles, tile_rows, eps, TILES: tl.constexpr, CHANNELS: tl.constexpr):
    """Statistics of channels from those of their tiles (Chan, Golub, LeVeque 1979).

    var is the unbiased variance, for running statistics; invstd is of the biased one.
    """
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channels < num_channels
    mean = tl.zeros((CHANNELS,), tl.float32)
    deviation = tl.zeros((CHANNELS,), tl.float32)
    count = 0.0
    for first in range(0, num_tiles, TILES):
        tiles = first + tl.arange(0, TILES)
        counts = tl.maximum(tl.minimum(num_rows - tiles * tile_rows, tile_rows), 0).to(tl.float32)
        here = partial_ptr + tiles[:, None] * num_channels + channels[None, :]
        mask = (tiles < num_tiles)[:, None] & valid[None, :]
        means = tl.load(here, mask=mask, other=0.0)
        deviations = tl.load(here + num_tiles * num_channels, mask=mask, other=0.0)
        count_here = tl.sum(counts, 0)
        mean_here = tl.sum(means * counts[:, None], 0) / count_here
        distance = tl.where(mask, means - mean_here[None, :], 0.0)
        deviation_here = tl.sum(deviations + distance * distance * counts[:, None], 0)
        step = mean_here - mean
        share = count_here / (count + count_here)
        mean += step * share
        deviation += deviation_here + step * step * count * share
        count += count_here
    tl.store(mean_ptr + start + channels, mean, mask=valid)
    tl.store(var_ptr + start + channels, deviation / (num_rows - 1), mask=valid)
    tl.store(invstd_ptr + start + channels, 1.0 / tl.sqrt(deviation / num_rows + eps), mask=valid)


@triton.jit
def _load_columns(columns, a_ptr, b_ptr, y_mean_ptr, kernel_ptr, start, out_channels, ins,
                  in_channels, SIDE: tl.constexpr):
    """A, B and mean of the output channels of some columns, and these rows of the kernel."""
    outs, used = columns % out_channels, columns < SIDE * SIDE * out_channels
    row = outs * (SIDE * SIDE) + columns // out_channels
    return (tl.load(a_ptr + start + outs, mask=used, other=0.0),
            tl.load(b_ptr + start + outs, mask=used, other=0.0),
            tl.load(y_mean_ptr + start + outs, mask=used, other=0.0),
            tl.load(kernel_ptr + row[:, None] * in_channels + ins[None, :],
                    mask=used[:, None] & (ins < in_channels)[None, :], other=0.0))


@triton.jit
def _load_gradient(columns, a, b, y_mean, y_ptr, y_grad_ptr, y_stride, start, out_channels, rows,
                   num_rows, height, width, SIDE: tl.constexpr):
    """The gradient of what these rows of pixels went into, by each column's tap."""
    tap = columns // out_channels
    if SIDE == 1:
        targets, inside = rows[:, None], (rows < num_rows)[:, None]
    else:
        targets, inside = _shifted(rows[:, None], num_rows, height, width,
                                   (SIDE // 2 - tap // SIDE)[None, :],
                                   (SIDE // 2 - tap % SIDE)[None, :])
    mask = inside & (columns < SIDE * SIDE * out_channels)[None, :]
    there = targets.to(tl.int64) * y_stride + start + (columns % out_channels)[None, :]
    g = _complete_gradient(tl.load(y_grad_ptr + there, mask=mask, other=0.0),
                           tl.load(y_ptr + there, mask=mask, other=0.0), y_mean, a, b, num_rows)
    return tl.where(mask, g, 0.0)


@triton.jit(do_not_specialize=['num_rows', 'height', 'width', 'in_units', 'x_units', 'out_units',
                               'y_units', 'start_units', 'span', 'num_splits'])
def _conv_backward_kernel(y_ptr, y_grad_ptr, y_mean_ptr, a_ptr, b_ptr, kernel_ptr,
                          x_ptr, x_grad_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
                          sums_ptr, partial_ptr,
                          num_rows, height, width, in_units, x_units, out_units, y_units,
                          start_units, span, num_splits,
                          UNIT: tl.constexpr, SIDE: tl.constexpr, ACCUMULATE: tl.constexpr,
                          ROWS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
                          TAIL: tl.constexpr):
    """All of the backward of `_conv_kernel` for a split of the rows, `span` of them.

    y_grad, a and b are G, A and B of y; G of x is written or, with ACCUMULATE, added to. A split's
    sums are [2, num_splits, in], its share of the kernel's gradient is
    [num_splits, SIDE * SIDE * out, in]: the convolution is one product of matrices here, over
    SIDE * SIDE * out columns, a tap's output channel each. OUT + TAIL are at least as many.
    """
    in_channels, out_channels = in_units * UNIT, out_units * UNIT
    y_stride, start = y_units * UNIT, start_units * UNIT
    split = tl.program_id(1)
    ins = tl.program_id(0) * IN + tl.arange(0, IN)
    valid = ins < in_channels
    mean, scale, bias = _load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, ins, valid)
    bias_sum = tl.zeros((IN,), tl.float32)
    weight_sum = tl.zeros((IN,), tl.float32)

    columns = tl.arange(0, OUT)
    a, b, y_mean, kernel = _load_columns(columns, a_ptr, b_ptr, y_mean_ptr, kernel_ptr, start,
                                         out_channels, ins, in_channels, SIDE)
    kernel_grad = tl.zeros((OUT, IN), tl.float32)
    if TAIL:
        tail_columns = OUT + tl.arange(0, TAIL)
        tail_a, tail_b, tail_mean, tail_kernel = _load_columns(
            tail_columns, a_ptr, b_ptr, y_mean_ptr, kernel_ptr, start, out_channels, ins,
            in_channels, SIDE)
        tail_kernel_grad = tl.zeros((TAIL, IN), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, num_rows), ROWS):
        rows = first + tl.arange(0, ROWS)
        g = _load_gradient(columns, a, b, y_mean, y_ptr, y_grad_ptr, y_stride, start, out_channels,
                           rows, num_rows, height, width, SIDE).to(kernel.dtype)
        h = _dot(g, kernel, tl.zeros((ROWS, IN), tl.float32))
        if TAIL:
            tail_g = _load_gradient(tail_columns, tail_a, tail_b, tail_mean, y_ptr, y_grad_ptr,
                                    y_stride, start, out_channels, rows, num_rows, height, width,
                                    SIDE).to(kernel.dtype)
            h = _dot(tail_g, tail_kernel, h)
        mask = (rows < num_rows)[:, None] & valid[None, :]
        here = rows.to(tl.int64)[:, None] * (x_units * UNIT) + ins[None, :]
        x = tl.load(x_ptr + here, mask=mask, other=0.0)
        output, bias_share, weight_share = _store_relu_backward(
            h, x, x_grad_ptr, here, mask, mean, scale, bias, ACCUMULATE)
        # Rows past the end would be relu(bias - mean * scale), infinite in fp16: 0 * inf is NaN.
        output = tl.where(mask, output, 0.0).to(kernel.dtype)
        bias_sum += bias_share
        weight_sum += weight_share
        kernel_grad = _dot(tl.trans(g), output, kernel_grad)
        if TAIL:
            tail_kernel_grad = _dot(tl.trans(tail_g), output, tail_kernel_grad)
    sums = sums_ptr + split * in_channels + ins
    tl.store(sums, bias_sum, mask=valid)
    tl.store(sums + num_splits * in_channels, weight_sum, mask=valid)
    num_columns = SIDE * SIDE * out_channels
    partial = partial_ptr + split.to(tl.int64) * num_columns * in_channels + ins[None, :]
    tl.store(partial + columns[:, None] * in_channels, kernel_grad,
             mask=(columns < num_columns)[:, None] & valid[None, :])
    if TAIL:
        tl.store(partial + tail_columns[:, None] * in_channels, tail_kernel_grad,
                 mask=(tail_columns < num_columns)[:, None] & valid[None, :])


@triton.jit
def _sum_of_splits(partial_ptr, places, size, num_splits, SPLITS: tl.constexpr,
                   BLOCK: tl.constexpr):
    sum_ = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, num_splits, SPLITS):
        splits = first + tl.arange(0, SPLITS)
        mask = (splits < num_splits)[:, None] & (places < size)[None, :]
        sum_ += tl.sum(tl.load(partial_ptr + splits.to(tl.int64)[:, None] * size + places[None, :],
                               mask=mask, other=0.0), 0)
    return sum_


@triton.jit(do_not_specialize=['num_splits', 'in_channels', 'out_channels', 'taps'])
def _finish_kernel(sums_ptr, partial_ptr, invstd_ptr, weight_ptr, a_ptr, b_ptr, weight_grad_ptr,
                   bias_grad_ptr, kernel_grad_ptr, num_splits, in_channels, out_channels, taps,
                   ACCUMULATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """Add up what the splits of a backward found; A and B are written or, ACCUMULATE, added to.

    The kernel's gradient is [out, taps, in], its partial ones are [num_splits, taps, out, in]. The
    first programs do the vectors, a block of channels each, the others the kernel, if there is one.
    """
    block, vector_blocks = tl.program_id(0), tl.cdiv(in_channels, BLOCK)
    if block < vector_blocks:
        ins = block * BLOCK + tl.arange(0, BLOCK)
        valid = ins < in_channels
        bias_grad = _sum_of_splits(sums_ptr, ins, in_channels, num_splits, SPLITS, BLOCK)
        weight_grad = _sum_of_splits(sums_ptr + num_splits * in_channels, ins, in_channels,
                                     num_splits, SPLITS, BLOCK)
        invstd = tl.load(invstd_ptr + ins, mask=valid, other=0.0)
        scale = tl.load(weight_ptr + ins, mask=valid, other=0.0) * invstd
        weight_grad *= invstd
        tl.store(weight_grad_ptr + ins, weight_grad, mask=valid)
        tl.store(bias_grad_ptr + ins, bias_grad, mask=valid)
        a, b = scale * bias_grad, scale * invstd * weight_grad
        if ACCUMULATE:
            a += tl.load(a_ptr + ins, mask=valid, other=0.0)
            b += tl.load(b_ptr + ins, mask=valid, other=0.0)
        tl.store(a_ptr + ins, a, mask=valid)
        tl.store(b_ptr + ins, b, mask=valid)
    elif partial_ptr is not None:
        size = taps * out_channels * in_channels
        places = (block - vector_blocks) * BLOCK + tl.arange(0, BLOCK)
        kernel_grad = _sum_of_splits(partial_ptr, places, size, num_splits, SPLITS, BLOCK)
        column, channel = places // in_channels, places % in_channels
        row = column % out_channels * taps + column // out_channels
        tl.store(kernel_grad_ptr + row * in_channels + channel, kernel_grad, mask=places < size)


@triton.jit(do_not_specialize=['num_rows', 'units', 'y_units', 'start_units'])
def _gradient_kernel(y_ptr, y_grad_ptr, mean_ptr, a_ptr, b_ptr, out_ptr, num_rows, units, y_units,
                     start_units, UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out = the complete gradient of y[:, start:][:, :channels]."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channels < units * UNIT
    mask = (rows < num_rows)[:, None] & valid[None, :]
    there = start_units * UNIT + channels
    mean = tl.load(mean_ptr + there, mask=valid, other=0.0)
    a = tl.load(a_ptr + there, mask=valid, other=0.0)
    b = tl.load(b_ptr + there, mask=valid, other=0.0)
    rows = rows.to(tl.int64)[:, None]
    there = rows * (y_units * UNIT) + there[None, :]
    g = _complete_gradient(tl.load(y_grad_ptr + there, mask=mask, other=0.0),
                           tl.load(y_ptr + there, mask=mask, other=0.0), mean, a, b, num_rows)
    tl.store(out_ptr + rows * (units * UNIT) + channels[None, :],
             g.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['num_rows', 'units', 'x_units'])
def _norm_relu_kernel(x_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, units,
                      x_units, UNIT: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr):
    """out = relu(norm(x[:, :channels]))"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channels = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channels < units * UNIT
    mask = (rows < num_rows)[:, None] & valid[None, :]
    mean, scale, bias = _load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, valid)
    rows = rows.to(tl.int64)[:, None]
    x = tl.load(x_ptr + rows * (x_units * UNIT) + channels[None, :], mask=mask, other=0.0)
    y = _affine(x, mean, scale, bias)
    tl.store(out_ptr + rows * (units * UNIT) + channels[None, :],
             _relu(y, y).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=['num_rows', 'units', 'x_units', 'span', 'num_splits'])
def _norm_relu_backward_kernel(h_ptr, x_ptr, x_grad_ptr, mean_ptr, invstd_ptr, weight_ptr, bias_ptr,
                               sums_ptr, num_rows, units, x_units, span, num_splits,
                               UNIT: tl.constexpr, ACCUMULATE: tl.constexpr, ROWS: tl.constexpr,
                               CHANNELS: tl.constexpr):
    """That of `_norm_relu_kernel`; h is the gradient of its output, the rest as `_conv_backward`'s.
    """
    num_channels, split = units * UNIT, tl.program_id(1)
    channels = tl.program_id(0) * CHANNELS + tl.arange(0, CHANNELS)
    valid = channels < num_channels
    mean, scale, bias = _load_norm(mean_ptr, invstd_ptr, weight_ptr, bias_ptr, channels, valid)
    bias_sum = tl.zeros((CHANNELS,), tl.float32)
    weight_sum = tl.zeros((CHANNELS,), tl.float32)
    for first in range(split * span, tl.minimum((split + 1) * span, num_rows), ROWS):
        rows = (first + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (rows < num_rows) & valid[None, :]
        here = rows * (x_units * UNIT) + channels[None, :]
        x = tl.load(x_ptr + here, mask=mask, other=0.0)
        h = tl.load(h_ptr + rows * num_channels + channels[None, :], mask=mask, other=0.0)
        _, bias_share, weight_share = _store_relu_backward(
            h.to(tl.float32), x, x_grad_ptr, here, mask, mean, scale, bias, ACCUMULATE)
        bias_sum += bias_share
        weight_sum += weight_share
    sums = sums_ptr + split * num_channels + channels
    tl.store(sums, bias_sum, mask=valid)
    tl.store(sums + num_splits * num_channels, weight_sum, mask=valid)


# ---- sizes --------------------------------------------------------------------------------
# Chosen by what the compiler says of them (tests/compile_kernels.py): at most the 99 KB of shared
# memory that all GPUs since Ampere have, and few registers spilled, on compute capability 9.0 fewer
# than on 8.0. None has been timed yet: attic/tune_kernels.py finds the fastest ones.

def _tile(num_warps, num_stages=2, **sizes):
    # Whether a * b + c is rounded once or twice is asked for: Triton's default is about to change.
    return dict(sizes, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True)


TILES = {'copy': _tile(4, ROWS=128, CHANNELS=32),
         'merge': _tile(8, TILES=512, CHANNELS=8),
         'elementwise': _tile(4, ROWS=64, CHANNELS=64),
         'finish': _tile(4, SPLITS=16, BLOCK=128)}
MAX_COLUMNS = 512  # of a kernel whose backward fits


def _two_powers(n):
    """Powers of two whose sum is at least n, and not much more: one and 0, or two."""
    whole = max(16, triton.next_power_of_2(n))
    tail = max(16, triton.next_power_of_2(n - whole // 2))
    return (whole, 0) if whole <= 64 or whole // 2 + tail == whole else (whole // 2, tail)


def conv_tile(rows, out_channels, processors):
    out, tail = _two_powers(out_channels) if out_channels <= 256 else (256, 0)
    tile_rows = 64 if out + tail > 128 else 128
    while tile_rows > 32 and rows < tile_rows * processors:  # so that all of them have work
        tile_rows //= 2
    return _tile(8 if tile_rows * (out + tail) >= 8192 else 4, 3, ROWS=tile_rows, IN=32, OUT=out,
                 TAIL=tail)


def conv_backward_tile(side, out_channels):
    out, tail = _two_powers(side * side * out_channels)
    rows, ins = (32, 64) if out + tail <= 128 else (32, 32) if out + tail <= 288 else (16, 32)
    return _tile(8, ROWS=rows, IN=ins, OUT=out, TAIL=tail)


@functools.lru_cache
def num_processors(device):
    """Streaming multiprocessors; under the interpreter a few, so that there is work for some."""
    if device.type == 'cuda':
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 4


def _split_rows(x, channels, tile_rows, tile_channels):
    """A grid that keeps the device busy: blocks of channels, splits of rows, and rows in each."""
    num_blocks, tiles = triton.cdiv(channels, tile_channels), triton.cdiv(x.rows, tile_rows)
    wanted = max(1, 2 * num_processors(x.data.device) // num_blocks)
    tiles_each = triton.cdiv(tiles, wanted)
    return num_blocks, triton.cdiv(tiles, tiles_each), tiles_each * tile_rows


# ---- launching them -----------------------------------------------------------------------

class Maps(NamedTuple):
    """Feature maps, and what the kernels know of each channel; in backward G, A and B as well."""
    data: torch.Tensor           # [N, C, H, W], channels_last
    mean: torch.Tensor           # [C], float32, as are those below, but for grad
    invstd: torch.Tensor         # 1 / sqrt(biased variance + eps)
    var: torch.Tensor = None     # the unbiased variance
    grad: torch.Tensor = None    # [N, C, H, W], as data
    a: torch.Tensor = None
    b: torch.Tensor = None

    @property
    def channels(self):
        return self.data.shape[1]

    @property
    def rows(self):
        return self.data.numel() // self.data.shape[1]


def new_maps(x, channels):
    """Maps to be filled in, with the N, H and W of x."""
    # One allocation for each: Triton compiles a kernel anew for vectors that are not aligned.
    return Maps(_empty(x, channels), *(x.new_empty(channels, dtype=torch.float32)
                                       for _ in range(3)))


def _empty(x, channels):
    return torch.empty((x.shape[0], channels, *x.shape[2:]), dtype=x.dtype, device=x.device,
                       memory_format=torch.channels_last)


class Half(NamedTuple):
    """Half a layer: norm, ReLU and convolution. The norm reads the first channels of its input."""
    weight: torch.Tensor  # [in], float32
    bias: torch.Tensor
    kernel: torch.Tensor  # [out, in, side, side], in the data's precision, channels_last
    eps: float            # of the norm that reads the output
    unit: int             # divides all numbers of channels; at most 8, which are 16 bytes
    fused: bool           # convolve in the kernels, not in the library

    @property
    def side(self):
        return self.kernel.shape[-1]


def copy(x, y, start, eps, unit):
    """Put x, [N, C, H, W], into the channels [start, start + C) of Maps y, with its statistics."""
    tile, channels = TILES['copy'], x.shape[1]
    grid, partial = _tiles_and_partial(y, channels, tile['ROWS'], tile['CHANNELS'])
    _copy_kernel[grid](x, y.data, partial, y.rows, channels // unit, channels // unit,
                       y.channels // unit, start // unit, grid[0], UNIT=unit, **tile)
    _merge(partial, y, start, tile['ROWS'], eps)


def _tiles_and_partial(y, channels, tile_rows, tile_channels):
    """A grid of programs, and memory for the statistics of its tiles."""
    grid = triton.cdiv(y.rows, tile_rows), triton.cdiv(channels, tile_channels)
    return grid, torch.empty((2, grid[0], channels), dtype=torch.float32, device=y.data.device)


def _merge(partial, y, start, tile_rows, eps):
    tile = TILES['merge']
    _, num_tiles, channels = partial.shape
    _merge_kernel[triton.cdiv(channels, tile['CHANNELS']),](
        partial, y.mean, y.var, y.invstd, y.rows, channels, start, num_tiles, tile_rows, eps,
        **tile)


def forward_half(half, x, y, start):
    """The channels of Maps y from `start` on become conv(relu(norm(x))); with statistics."""
    if not half.fused:
        maps = F.conv2d(_norm_relu(half, x), half.kernel, padding=half.side // 2)
        return copy(maps.contiguous(memory_format=torch.channels_last), y, start, half.eps,
                    half.unit)
    in_channels, out_channels = len(half.weight), len(half.kernel)
    tile = conv_tile(x.rows, out_channels, num_processors(x.data.device))
    grid, partial = _tiles_and_partial(y, out_channels, tile['ROWS'], tile['OUT'] + tile['TAIL'])
    _conv_kernel[grid](
        x.data, x.mean, x.invstd, half.weight, half.bias, half.kernel, y.data, partial, x.rows,
        *x.data.shape[2:], in_channels // half.unit, x.channels // half.unit,
        out_channels // half.unit, y.channels // half.unit, start // half.unit, grid[0],
        UNIT=half.unit, SIDE=half.side, **tile)
    _merge(partial, y, start, tile['ROWS'], half.eps)


def _norm_relu(half, x):
    tile, channels = TILES['elementwise'], len(half.weight)
    y = _empty(x.data, channels)
    grid = triton.cdiv(x.rows, tile['ROWS']), triton.cdiv(channels, tile['CHANNELS'])
    _norm_relu_kernel[grid](x.data, x.mean, x.invstd, half.weight, half.bias, y, x.rows,
                            channels // half.unit, x.channels // half.unit, UNIT=half.unit, **tile)
    return y


def gradient(y, start, channels, unit):
    """The gradient of some channels of Maps y, once all that read them are in G, A and B."""
    tile, dense = TILES['elementwise'], _empty(y.data, channels)
    grid = triton.cdiv(y.rows, tile['ROWS']), triton.cdiv(channels, tile['CHANNELS'])
    _gradient_kernel[grid](y.data, y.grad, y.mean, y.a, y.b, dense, y.rows, channels // unit,
                           y.channels // unit, start // unit, UNIT=unit, **tile)
    return dense


def backward_half(half, x, y, start, accumulate):
    """The backward of `forward_half`: writes G, A and B of x or, with `accumulate`, adds to them.

    Returns the gradients of weight, bias and kernel, float32.
    """
    convolve = _conv_backward if half.fused else _conv_backward_of_library
    sums, partial, kernel_grad = convolve(half, x, y, start, accumulate)
    tile, in_channels = TILES['finish'], len(half.weight)
    num_blocks = triton.cdiv(in_channels, tile['BLOCK'])
    if partial is not None:
        num_blocks += triton.cdiv(kernel_grad.numel(), tile['BLOCK'])
    weight_grad, bias_grad = (torch.empty_like(half.weight) for _ in range(2))
    _finish_kernel[num_blocks,](
        sums, partial, x.invstd, half.weight, x.a, x.b, weight_grad, bias_grad, kernel_grad,
        sums.shape[1], in_channels, len(half.kernel), half.side**2, ACCUMULATE=accumulate, **tile)
    return weight_grad, bias_grad, kernel_grad


def _conv_backward(half, x, y, start, accumulate):
    """Sums for the norm and partial gradients of the kernel, a split each, and room for the whole.
    """
    tile, in_channels = conv_backward_tile(half.side, len(half.kernel)), len(half.weight)
    num_blocks, num_splits, span = _split_rows(x, in_channels, tile['ROWS'], tile['IN'])
    sums = half.weight.new_empty(2, num_splits, in_channels)
    partial = half.weight.new_empty(num_splits, *half.kernel.shape)
    _conv_backward_kernel[num_blocks, num_splits](
        y.data, y.grad, y.mean, y.a, y.b, half.kernel, x.data, x.grad, x.mean, x.invstd,
        half.weight, half.bias, sums, partial, x.rows, *x.data.shape[2:],
        in_channels // half.unit, x.channels // half.unit, len(half.kernel) // half.unit,
        y.channels // half.unit, start // half.unit, span, num_splits, UNIT=half.unit,
        SIDE=half.side, ACCUMULATE=accumulate, **tile)
    return sums, partial, torch.empty_like(half.kernel, dtype=torch.float32)


def _conv_backward_of_library(half, x, y, start, accumulate):
    """The same, but for the gradient of the kernel, which is whole: there are no partial ones."""
    h, kernel_grad, _ = torch.ops.aten.convolution_backward.default(
        gradient(y, start, len(half.kernel), half.unit), _norm_relu(half, x), half.kernel, None,
        [1, 1], [half.side // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False])
    tile, channels = TILES['elementwise'], len(half.weight)
    num_blocks, num_splits, span = _split_rows(x, channels, tile['ROWS'], tile['CHANNELS'])
    sums = half.weight.new_empty(2, num_splits, channels)
    _norm_relu_backward_kernel[num_blocks, num_splits](
        h.contiguous(memory_format=torch.channels_last), x.data, x.grad, x.mean, x.invstd,
        half.weight, half.bias, sums, x.rows, channels // half.unit, x.channels // half.unit, span,
        num_splits, UNIT=half.unit, ACCUMULATE=accumulate, **tile)
    return sums, None, kernel_grad.float()


# ---- a dense block ------------------------------------------------------------------------

def forward(x, layer_weights, eps, keep_bottlenecks, level):
    """A dense block in training.

    Args:
        x: [N, C, H, W], one for which `find_obstacle` finds nothing.
        layer_weights: for each layer weight, bias and kernel of one half or of two, float32.
        eps: of the norms.
        keep_bottlenecks: keep the feature maps between the two halves of a layer for backward.
        level: one of LEVELS.

    Returns:
        The block's feature maps, as Maps, and a list of those between the halves of each layer:
        Maps, whose data are None if they are not kept, or None for a layer of one half.
    """
    layers = _halves(x, layer_weights, eps, level)
    features = new_maps(x, x.shape[1] + sum(len(halves[-1].kernel) for halves in layers))
    bottlenecks = []
    with torch.cuda.device_of(x):
        copy(x, features, 0, eps, layers[0][0].unit)
        for first, *second in layers:
            start = len(first.weight)  # where the layer's output goes: after all that it reads
            if second:
                z = new_maps(x, len(first.kernel))
                forward_half(first, features, z, 0)
                forward_half(*second, z, features, start)
                bottlenecks.append(z if keep_bottlenecks else z._replace(data=None))
            else:
                forward_half(first, features, features, start)
                bottlenecks.append(None)
    return features, bottlenecks


def backward(grad, features, bottlenecks, layer_weights, in_channels, eps, level):
    """The gradients of x, [N, C, H, W], and of all of layer_weights, in their order.

    Args:
        grad: that of the block's feature maps.
        features, bottlenecks: what `forward` returned; data that are None are computed again.
        in_channels: C.
        other arguments: as for `forward`.
    """
    layers = _halves(features.data, layer_weights, eps, level)
    features = features._replace(grad=torch.empty_like(features.data).copy_(grad),
                                 a=torch.zeros_like(features.mean),
                                 b=torch.zeros_like(features.mean))
    gradients = []
    with torch.cuda.device_of(grad):
        for (first, *second), z in reversed(list(zip(layers, bottlenecks))):
            y, start, second_gradients = features, len(first.weight), ()
            if second:
                z = _prepare_bottleneck(first, features, z)
                second_gradients = backward_half(*second, z, features, start, accumulate=False)
                y, start = z, 0
            first_gradients = backward_half(first, features, y, start, accumulate=True)
            gradients = [*first_gradients, *second_gradients, *gradients]
        dx = gradient(features, 0, in_channels, layers[0][0].unit)
    return dx, gradients


def _prepare_bottleneck(half, features, z):
    """The maps that this half of a layer makes, computed again if need be, with room for G."""
    if z.data is None:
        z = new_maps(features.data, len(half.kernel))
        forward_half(half, features, z, 0)
    return z._replace(grad=torch.empty_like(z.data), a=torch.empty_like(z.mean),
                      b=torch.empty_like(z.mean))


def _halves(x, layer_weights, eps, level):
    """The weights of each layer as a list of one Half or two; kernels in the precision of x."""
    kernels = [weights[i] for weights in layer_weights for i in range(2, len(weights), 3)]
    cast = [torch.empty_like(kernel, dtype=x.dtype, memory_format=torch.channels_last)
            for kernel in kernels]
    torch._foreach_copy_(cast, kernels)
    cast = iter(cast)
    unit = math.gcd(8, *(n for kernel in kernels for n in kernel.shape[:2]))

    def half(weight, bias, kernel):
        side = kernel.shape[-1]
        fused = ((level == '3x3' or (level, side) == ('1x1', 1))
                 and side * side * len(kernel) <= MAX_COLUMNS)
        return Half(weight, bias, next(cast), eps, unit, fused)

    return [[half(*weights[i:i + 3]) for i in range(0, len(weights), 3)]
            for weights in layer_weights]
