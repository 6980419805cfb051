"""A fused dense block in training (five operations) and evaluation by CPU kernels in C++.

Needs a CPU with AVX2 and a C++ compiler, see library.py; without them eager.py takes over.

The first part has the operations that eager.py documents. Maps [N, C, H, W] are float32 or bfloat16
in channels_last and may be some channels of a wider such map; everything else is float32.
"""

import ctypes
import mmap

import torch

from . import library
from .library import TYPES, unavailable_reason

_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, 'MADV_HUGEPAGE') else None


# ---- Operations ----

path = 'kernels'


def why_not(x):
    """Why the other functions do not take x as maps, or None."""
    return why_not_dtype(x.dtype) or (None if _row_stride(x) is not None else
                                      'the input is not in channels_last')


def why_not_dtype(dtype):
    """Why there are no kernels for maps of dtype, or None."""
    if dtype not in TYPES:
        return f'no kernels for {dtype}'
    if torch._C._len_torch_dispatch_stack():  # such as FakeTensorMode, whose tensors have no memory
        return 'a TorchDispatchMode is active'
    return unavailable_reason(dtype)


def new_maps(x, channels, size=None):
    """Memory for maps like x, of height and width `size` if given; on huge pages if large.

    Page faults in new memory cost more than its use, and far more with pages of 4 KiB.
    """
    height, width = size or x.shape[2:]
    maps = x.new_empty(len(x), height, width, channels)
    # Whole pages; a page that the memory shares with other data does not matter.
    start = maps.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    if maps.nbytes >= 4 << 20 and _madvise:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(maps.nbytes), mmap.MADV_HUGEPAGE)
    return maps.permute(0, 3, 1, 2)


def statistics(data):
    """Mean and biased variance of each channel."""
    n, c, h, w = data.shape
    mean, var = _vectors(data, 2, c)
    _call('statistics', data.dtype, *_map(data), n * h * w, c, mean, var)
    return mean, var


def norm_relu_conv(maps, norm_conv, pool=False, out=None, with_statistics=False):
    """The output, in `out` if given, and its `statistics` if wanted, otherwise two Nones."""
    if out is None:
        size = [size // 2 if pool else size for size in maps.data.shape[2:]]
        out = new_maps(maps.data, len(norm_conv.filters), size)
    mean, var = _vectors(out, 2, len(norm_conv.filters)) if with_statistics else (None, None)
    _call('norm_relu_conv', out.dtype, *_input(maps, norm_conv, pool), *_map(out), mean, var)
    return out, mean, var


def norm_relu_conv_backward(grad, maps, norm_conv, pool=False, pending=None, before=None, out=None,
                            add_to=None):
    """`out`, or new maps; (maps, a, b); [gradients of weight, bias and filters]."""
    n, c, h, w = maps.data.shape
    if out is None:
        out = new_maps(maps.data, c)
        if pool and (h % 2 or w % 2):
            out.zero_()  # the last line and column have no gradient
    z, *coefficients = pending or [None] * 3
    output = [None, 0, None] if z is None else [*_read(z.data, out.dtype), z.mean]
    a, b = _vectors(maps.data, 2, c) if add_to is None else add_to
    d_filters = torch.empty_like(norm_conv.filters, memory_format=torch.channels_last)
    gradients = [*_vectors(maps.data, 2, c), d_filters]
    _call('norm_relu_conv_backward', out.dtype, *_read(grad, out.dtype), *output,
          *coefficients, *_input(maps, norm_conv, pool),
          *([None, 0] if before is None else _read(before, out.dtype)), *_map(out), *gradients,
          a, b, add_to is not None)
    return out, (maps, a, b), gradients


def complete(total, maps, a, b):
    """total - (a + (data - mean) * b)"""
    n, c, h, w = maps.data.shape
    out = new_maps(maps.data, c)
    _call('complete', out.dtype, *_read(total, out.dtype), *_read(maps.data, out.dtype), maps.mean,
          a, b, *_map(out), n * h * w, c)
    return out


# ---- Evaluation ----

class PackedConv(ctypes.Structure):
    """A convolution and its norm as the library reads them: pointers and sizes."""

    _fields_ = [(name, ctypes.c_void_p) for name in ('mean', 'scale', 'bias', 'filters')]
    _fields_ += [(name, ctypes.c_long) for name in ('channels', 'outputs', 'side')]


def pack(norm_convs, dtype):
    """Packs for maps of dtype.

    Args:
        norm_convs: tuples of a norm's weight, bias, mean, variance and eps, and the filters.

    Returns:
        [PackedConv], and the tensors that own their memory.
    """
    packed, owners = [], []
    for weight, bias, mean, var, eps, filters in norm_convs:
        o, c, *_ = filters.shape
        vectors = torch.zeros(3, len(mean) + 64, dtype=torch.float32, device='cpu')
        for vector, value in zip(vectors, (mean, weight * (var + eps).rsqrt(), bias)):
            vector[:len(mean)] = value
        filters = filters.contiguous(memory_format=torch.channels_last)
        arguments = filters, o, filters.shape[-1], c
        words = torch.empty(_call('pack', dtype, *arguments, None), dtype=torch.int32, device='cpu')
        _call('pack', dtype, *arguments, words)
        owners += [vectors, words]
        packed.append(PackedConv(*(vector.data_ptr() for vector in vectors), words.data_ptr(), c,
                                 o, filters.shape[-1]))
    return (PackedConv * len(packed))(*packed), owners


def sample(tensors):
    """A function that returns a hash of some values of each of these float32 tensors."""
    pointers = (ctypes.c_void_p * len(tensors))(*map(torch.Tensor.data_ptr, tensors))
    # An expanded tensor has less memory than elements.
    sizes = (ctypes.c_long * len(tensors))(*(
        min(t.numel(), t.untyped_storage().nbytes() // 4 - t.storage_offset()) for t in tensors))
    function = library.load(torch.float32)[0].sample
    return lambda: function(pointers, sizes, ctypes.c_long(len(tensors)))


def evaluate_block(convs, growth, x):
    """[N, C, H, W] -> [N, C + growth, H, W] by the [PackedConv] of all layers."""
    n, c, h, w = x.shape
    features = new_maps(x, c + growth)
    _call('evaluate_dense_block', x.dtype, convs, len(convs), *_map(x), n, h, w, c,
          *_map(features))
    return features


def evaluate_transition(conv, x):
    """[N, C, H, W] -> [N, out_channels, H // 2, W // 2]"""
    n, _, h, w = x.shape
    out = new_maps(x, conv[0].outputs, (h // 2, w // 2))
    _call('evaluate_pooled_conv', x.dtype, conv, *_map(x), n, h, w, *_map(out))
    return out


def evaluate_stem(conv, x):
    """Images [N, C, H, W] in any layout -> maps [N, outputs, ...] after the max-pool."""
    n, _, h, w = x.shape
    out = new_maps(x, conv[0].outputs, ((h + 3) // 4, (w + 3) // 4))
    _call('evaluate_stem_conv', x.dtype, conv, x, (ctypes.c_long * 4)(*x.stride()), n, h, w,
          *_map(out))
    return out


# ---- Tensors as arguments ----

def _row_stride(x):
    """The stride between pixels, in elements, if x [N, C, H, W] lies in NHWC; otherwise None."""
    n, c, h, w = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        return c
    strides = [(n, x.stride(0), h * w), (h, x.stride(2), w), (w, x.stride(3), 1)]
    used = [(stride, rows) for size, stride, rows in strides if size > 1]
    if not used:
        return c if c == 1 or x.stride(1) == 1 else None
    stride, rows = used[-1]
    row = stride // rows
    regular = all(stride == row * rows for stride, rows in used)
    return row if regular and row >= c and (c == 1 or x.stride(1) == 1) else None


def _map(x):
    row = _row_stride(x)
    if row is None:
        raise ValueError(f'a map that is not in channels_last: shape {list(x.shape)}, strides '
                         f'{x.stride()}')
    return x, row


def _read(x, dtype):
    """As `_map`, after conversion to dtype and channels_last: hooks may change saved tensors."""
    x = x.to(dtype)
    return _map(x if _row_stride(x) is not None else
                x.contiguous(memory_format=torch.channels_last))


def _input(maps, norm_conv, pool):
    n, c, h, w = maps.data.shape
    vectors = maps.mean, maps.var, norm_conv.weight, norm_conv.bias
    filters = norm_conv.filters.contiguous(memory_format=torch.channels_last)
    return (*_read(maps.data, maps.data.dtype), *(vector.contiguous() for vector in vectors),
            float(norm_conv.eps), filters, n, h, w, c, len(filters), filters.shape[-1], pool)


def _vectors(x, count, channels):
    # x.new_empty, because torch's default dtype and device may differ.
    return [x.new_empty(channels, dtype=torch.float32) for _ in range(count)]


def _call(name, dtype, *arguments):
    """Calls a function of the library with pointers (of tensors, or None) and numbers."""
    pointers = [ctypes.c_long(value) if isinstance(value, int) else
                ctypes.c_float(value) if isinstance(value, float) else
                value if isinstance(value, ctypes.Array) else
                ctypes.c_void_p(None if value is None else value.data_ptr())
                for value in arguments]
    return getattr(library.load(dtype)[0], name)(*pointers, ctypes.c_long(torch.get_num_threads()))
