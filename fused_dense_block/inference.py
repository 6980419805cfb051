"""Packed weights for evaluation by the CPU kernels, and evaluation by PyTorch's operations."""

import gc
import operator
from operator import attrgetter

import torch

from . import cpu, eager
from .autograd import Maps, NormConv, no_autocast

VERSION, DATA_PTR = attrgetter('_version'), torch.Tensor.data_ptr


class Packed:
    """The weights and statistics of a fused module as the CPU kernels read them.

    A tensor that is replaced, whose memory moves or whose version counter changes is always
    noticed. Writes through `.data`, NumPy and fused optimizers leave the counter as it is: they are
    noticed if they change one of 8 values of each tensor that are compared.
    """

    def __init__(self, places, eps, dtype):
        """
        Args:
            places: for each convolution (dict, name) of six tensors: norm weight, norm bias,
                filters, running mean, running variance and num_batches_tracked. The last is the
                only one whose version counter changes when nn.BatchNorm2d trains.
        """
        self.dicts = [*{id(tensors): tensors for tensors, _ in places}.values()]
        self.values = gc.get_referents(*self.dicts)  # before another thread may replace a tensor
        self.tensors = tensors = [tensors[name] for tensors, name in places]
        # Kept, so that no other tensor can get the same address.
        self.storages = [tensor.untyped_storage() for tensor in tensors]
        self.pointers = [*map(DATA_PTR, tensors)]
        # Inference tensors have no versions, and other processes may write to shared memory.
        self.versions = None
        if not any(tensor.is_inference() or tensor.is_shared() for tensor in tensors):
            self.versions = [*map(VERSION, tensors)]
        self.sample = cpu.sample([tensor for tensor in tensors if tensor.is_floating_point()])
        self.sampled = self.sample()
        norm_convs = [(weight, bias, mean, var, e, filters)
                      for (weight, bias, filters, mean, var, _), e in
                      zip(zip(*[iter(tensors)] * 6), eps)]
        with no_autocast(tensors[0]):
            self.convs, self.owners = cpu.pack(norm_convs, dtype)
        self.dtype = dtype
        self.growth = sum(conv.outputs for conv in self.convs if conv.side == 3)

    def is_current(self):
        if self.versions is None:
            return False
        values = gc.get_referents(*self.dicts)  # in one call, all values of the dicts
        return (len(values) == len(self.values) and all(map(operator.is_, values, self.values))
                and [*map(VERSION, self.tensors)] == self.versions
                and [*map(DATA_PTR, self.tensors)] == self.pointers
                and self.sample() == self.sampled)


def run_block(layers, x):
    """A dense block by eager operations, for the self-check alone."""
    for norm_convs in layers:
        new = x
        for norm_conv in norm_convs:
            new = run_norm_conv(norm_conv, new)
        x = torch.cat([x, new], 1)
    return x


def run_norm_conv(norm_conv, x, pool=False):
    norm, conv = norm_conv
    parameters = NormConv(norm.weight, norm.bias, conv.weight, norm.eps)
    return eager.norm_relu_conv(Maps(x, norm.running_mean, norm.running_var), parameters, pool)[0]


def run_stem(stem, x):
    """Convolution with the norm folded in, max-pool, and then ReLU, which commutes with it.

    A few images at a time: their maps stay in the cache, while a page of fresh memory costs more
    than the arithmetic.
    """
    conv, norm, pool = stem
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    filters = conv.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    return torch.cat([pool(conv._conv_forward(part, filters, bias)).relu_() for part in x.split(4)])
