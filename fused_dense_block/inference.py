"""A dense block, a transition and ImageNet's stem in evaluation, without gradients.

`halves` are modules.NormConvModules; `ops` is the module eager.py or cpu.py.
"""

import torch

from .autograd import Maps, NormConv, no_autocast


def run_block(ops, layers, x):
    """[N, C, H, W] -> [N, C + num_layers * growth_rate, H, W]"""
    c = x.shape[1]
    features = ops.new_maps(x, c + sum(halves[-1].conv.out_channels for halves in layers))
    features[:, :c].copy_(x)
    # The same memory for all layers: fresh memory costs more than the arithmetic.
    widest = ops.new_maps(x, max(halves[0].conv.out_channels for halves in layers))
    for halves in layers:
        maps, stop = features[:, :c], c + halves[-1].conv.out_channels
        for half in halves[:-1]:
            maps = run_norm_conv(ops, half, maps, out=widest[:, :half.conv.out_channels])
        run_norm_conv(ops, halves[-1], maps, out=features[:, c:stop])
        c = stop
    return features


def run_norm_conv(ops, half, x, pool=False, out=None):
    norm, conv = half
    maps = Maps(x, norm.running_mean, norm.running_var)
    with no_autocast(x):
        parameters = NormConv(norm.weight, norm.bias, conv.weight, norm.eps)
        return ops.norm_relu_conv(maps, parameters, pool, out)[0]


def run_stem(stem, x):
    """Convolution with the norm folded in, max-pool, and then ReLU, which commutes with it.

    A few images at a time: their maps stay in the cache, while a page of fresh memory costs more
    than the arithmetic.
    """
    conv, norm, pool = stem
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = conv.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    return torch.cat([pool(conv._conv_forward(part, kernel, bias)).relu_() for part in x.split(4)])
