"""The operations of a dense block as CPU kernels, compiled at first use: optional, for densenet.py.

    import densenet_cpu
    densenet_cpu.supports(x)              # False: see densenet_cpu.unsupported_reason(x)

Needs torch and a C++ compiler, g++ at best. What it compiles of `densenet_cpu.cpp`, in 3 seconds
for each type of map, is kept in the user's cache directory: `$XDG_CACHE_HOME/densenet` or
`~/.cache/densenet`. Without a compiler one warning says so, and densenet.py takes its eager
operations. DENSENET_CPU_KERNELS=0 turns the kernels off.

Maps are [N, C, H, W], float32 or bfloat16, in channels_last, and may be some channels of a wider
such tensor. Vectors are float32 [C], and so are sums. Convolutions are 1x1 or 3x3, of stride 1 and
with zeros around the map; `kernel` is float32 [O, C, 1, 1] or [O, C, 3, 3].
"""

import ctypes
import functools
import hashlib
import mmap
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_suffix('.cpp')
PAGE = mmap.PAGESIZE
FLAGS = '-std=c++17 -O3 -march=native -ffp-contract=fast -fopenmp -fPIC'.split()
_madvise = ctypes.CDLL(None).madvise if hasattr(mmap, 'MADV_HUGEPAGE') else None
TYPES = {torch.float32: 'float', torch.bfloat16: 'bf16'}


# ---- Operations ----

def supports(x):
    """Whether the operations below take x as a map; `unsupported_reason(x)` says why not."""
    return unsupported_reason(x) is None


def unsupported_reason(x):
    """Why the operations below do not take x as a map, or None if they do."""
    if x.device.type != 'cpu':
        return f'a tensor on {x.device}'
    if x.dtype not in TYPES:
        return f'a map of {x.dtype}'
    if x.dim() != 4 or not x.numel() or _row_stride(x) is None:
        return 'a map that is not in channels_last'
    return unavailable_reason(x.dtype)


def statistics(x):
    """Mean and biased variance of each channel."""
    mean, variance = x.new_empty(2, x.shape[1], dtype=torch.float32)
    _call('statistics', x, *_map(x), *_size(x), _pointer(mean), _pointer(variance))
    return mean, variance


def norm_relu_conv(x, mean, scale, bias, kernel, pool=False, out=None, with_statistics=False):
    """conv(relu((x - mean) * scale + bias)), and with_statistics also the result's statistics.

    With pool, which takes a 1x1 kernel, the convolution reads the 2x2 averages of its input. The
    result is written to `out` if given.
    """
    n, c, h, w = x.shape
    outputs, side = kernel.shape[0], kernel.shape[-1]
    if out is None:
        out = _empty(x, outputs, *((h // 2, w // 2) if pool else (h, w)))
    vectors = [_vector(v) for v in (mean, scale, bias)]
    kernel = _vector(kernel)
    moments = torch.empty(2, outputs) if with_statistics else None
    z_mean, z_variance = (None, None) if moments is None else moments
    _call('norm_relu_conv', x, *_map(x), *map(_pointer, vectors), _pointer(kernel), *_map(out),
          *map(ctypes.c_long, (n, h, w, c, outputs, side)), ctypes.c_int(pool),
          _pointer(z_mean), _pointer(z_variance))
    return (out, z_mean, z_variance) if with_statistics else out


def norm_relu_conv_backward(grad, x, mean, scale, bias, kernel, total=None, pool=False,
                            completion=None):
    """Back through `norm_relu_conv`, but for what the norm's own statistics carry.

    `completion` (z, mean, a, b) says that grad is still to be completed:
    grad - (a + (z - mean) * b), where z is the convolution's output.

    With g the gradient at (x - mean) * scale + bias, returns
        total     g * scale, added in place to `total` if given
        sum_g     sum of g over pixels
        sum_gx    sum of g * (x - mean)
        d_kernel  float32
    """
    n, c, h, w = x.shape
    outputs, side = kernel.shape[0], kernel.shape[-1]
    grad = grad.to(x.dtype)
    if _row_stride(grad) is None:
        grad = grad.contiguous(memory_format=torch.channels_last)
    add = total is not None
    if not add:
        total = _empty(x, c, h, w)
        if pool and (h % 2 or w % 2):
            total.zero_()  # the last line and column have no gradient
    vectors = [_vector(v) for v in (mean, scale, bias)]
    kernel = _vector(kernel)
    sum_g, sum_gx = torch.empty(2, c)
    d_kernel = torch.empty(kernel.shape)
    z, *z_vectors = completion or [None] * 4
    z_vectors = [v if v is None else _vector(v) for v in z_vectors]
    _call('norm_relu_conv_backward', x, *_map(grad),
          *((_pointer(None), ctypes.c_long(0)) if z is None else _map(z)),
          *map(_pointer, z_vectors), *_map(x), *map(_pointer, vectors),
          _pointer(kernel), *_map(total), ctypes.c_int(add),
          *map(ctypes.c_long, (n, h, w, c, outputs, side)), ctypes.c_int(pool),
          _pointer(sum_g), _pointer(sum_gx), _pointer(d_kernel))
    return total, sum_g, sum_gx, d_kernel


def complete(total, x, mean, a, b):
    """total - (a + (x - mean) * b)"""
    out = _empty(x, *x.shape[1:])
    vectors = [_vector(v) for v in (mean, a, b)]
    _call('complete', x, *_map(total), *_map(x), *map(_pointer, vectors), *_map(out), *_size(x))
    return out


class Operations:
    """The operations as densenet.py takes them, with its `_Maps` and `_Half` for arguments."""

    path = 'kernels'
    supports = staticmethod(supports)
    statistics = staticmethod(statistics)

    @staticmethod
    def new_maps(x, channels):
        n, _, h, w = x.shape
        return empty(n, channels, h, w, x.dtype)

    @staticmethod
    def norm_relu_conv(maps, half, pool=False, out=None, statistics=False):
        scale = half.weight * (maps.var + half.eps).rsqrt()
        found = norm_relu_conv(maps.data, maps.mean, scale, half.bias, half.kernel, pool, out,
                               statistics)
        return found if statistics else (found, None, None)

    @staticmethod
    def norm_relu_conv_backward(grad, maps, half, pool=False, total=None, completion=None):
        invstd = (maps.var + half.eps).rsqrt()
        if completion is not None:
            z, a, b = completion
            completion = z.data, z.mean, a, b
        total, sum_g, sum_gx, d_kernel = norm_relu_conv_backward(
            grad, maps.data, maps.mean, half.weight * invstd, half.bias, half.kernel, total, pool,
            completion=completion)
        return total, sum_gx * invstd, sum_g, d_kernel

    @staticmethod
    def complete(total, maps, a, b):
        return complete(total, maps.data, maps.mean, a, b)


# ---- Tensors as arguments ----

def _row_stride(x):
    """Elements from a pixel to the next, where x [N, C, H, W] lies in NHWC; else None."""
    n, c, h, w = x.shape
    strides = [(n, x.stride(0), h * w), (h, x.stride(2), w), (w, x.stride(3), 1)]
    used = [(stride, rows) for size, stride, rows in strides if size > 1]
    if not used:
        return c if c == 1 or x.stride(1) == 1 else None
    stride, rows = used[-1]
    row = stride // rows
    regular = all(stride == row * rows for stride, rows in used)
    return row if regular and row >= c and (c == 1 or x.stride(1) == 1) else None


def empty(n, c, h, w, dtype):
    """A map with room for [N, C, H, W], on huge pages where it is large.

    Touching fresh memory costs the kernel more than reading or writing it costs the processor: with
    pages of 4 KiB, five times as much.
    """
    x = torch.empty(n, h, w, c, dtype=dtype)
    start = -(-x.data_ptr() // PAGE) * PAGE
    size = (x.data_ptr() + x.nbytes - start) // PAGE * PAGE
    if size >= 4 << 20 and _madvise:
        _madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_HUGEPAGE)
    return x.permute(0, 3, 1, 2)


def _empty(like, c, h, w):
    return empty(len(like), c, h, w, like.dtype)


def _map(x):
    row = _row_stride(x)
    if row is None:
        raise ValueError(f'a map that is not in channels_last: shape {list(x.shape)}, strides '
                         f'{x.stride()}')
    return _pointer(x), ctypes.c_long(row)


def _size(x):
    n, c, h, w = x.shape
    return ctypes.c_long(n * h * w), ctypes.c_long(c)


def _vector(v):
    return v.detach().to(torch.float32).contiguous()


def _pointer(tensor):
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _call(name, x, *arguments):
    getattr(_load(x.dtype)[0], name)(*arguments, ctypes.c_int(torch.get_num_threads()))


# ---- Compiling ----

class KernelsUnavailable(Exception):
    """There are no kernels on this machine; the message says why."""


def unavailable_reason(dtype=torch.float32):
    """Why there are no kernels here, or None. Compiles them if that was not done before."""
    if os.environ.get('DENSENET_CPU_KERNELS') == '0':
        return 'DENSENET_CPU_KERNELS=0'
    return _load(dtype)[1]


@functools.cache
def _load(dtype):
    """The library for maps of dtype and None, or None and why there is none; also a warning."""
    try:
        return _open(_build(TYPES[dtype])), None
    except KernelsUnavailable as error:
        warnings.warn(f'DenseNet goes on without its CPU kernels, slower: {error}', stacklevel=2)
        return None, str(error)


def _build(map_type):
    """The path of the compiled library, compiled now if it is not in the cache."""
    compiler = _find_compiler()
    flags = [*FLAGS, f'-DMAP={map_type}']
    if platform.machine() in ('x86_64', 'AMD64'):
        flags.append('-mprefer-vector-width=512')
    version = _run([*compiler, '--version'])
    key = hashlib.sha256(repr((SOURCE.read_bytes(), compiler, version, flags, _cpu())).encode())
    cache = _cache_directory()
    library = cache / f'{map_type}-{key.hexdigest()[:32]}.so'
    if not library.exists():
        # Several processes may do this at once: each in its own directory, and the last one wins.
        with tempfile.TemporaryDirectory(dir=cache) as build:
            compiled, linked = f'{build}/kernels.o', f'{build}/kernels.so'
            # Linked without -fopenmp: its functions are those of the library that torch has loaded.
            _run([*compiler, *flags, '-c', str(SOURCE), '-o', compiled])
            _run([*compiler, '-shared', compiled, '-o', linked])
            os.replace(linked, library)
    _check_private(library)
    return library


def _find_compiler():
    names = shlex.split(os.environ.get('CXX', '')) and [os.environ['CXX']]
    for command in [*names, 'g++', 'c++', 'clang++']:
        program, *options = shlex.split(command)
        path = shutil.which(program)
        if path:
            return [path, *options]
    raise KernelsUnavailable('there is no C++ compiler (g++, c++, clang++ or $CXX)')


def _run(command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailable(f'{command[0]}: {error}') from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if 'error' in line] or ['']
        raise KernelsUnavailable(f'{" ".join(command)} fails: {lines[0]}')
    return done.stdout


def _cpu():
    """What -march=native looks at."""
    try:
        lines = Path('/proc/cpuinfo').read_text().split('\n\n')[0].splitlines()
    except OSError:
        return platform.processor()
    return [line for line in lines
            if line.startswith(('model', 'cpu family', 'flags', 'Features', 'CPU '))]


def _cache_directory():
    """Where compiled libraries are kept: a directory to which nobody else can write."""
    try:
        base = os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache'
        directory = Path(base) / 'densenet'
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home directory
        raise KernelsUnavailable(f'no directory to keep them in: {error}') from None
    _check_private(directory)
    if not os.access(directory, os.W_OK):
        raise KernelsUnavailable(f'{directory} is not writable')
    return directory


def _check_private(path):
    status = path.lstat()
    if hasattr(os, 'geteuid') and (status.st_uid != os.geteuid() or status.st_mode & 0o022
                                   or stat.S_ISLNK(status.st_mode)):
        raise KernelsUnavailable(f'{path} is a link, or belongs or is writable to other users')


def _open(library):
    try:
        maps = Path('/proc/self/maps').read_text()
        for path in set(re.findall(r'\S*/lib[gi]?omp[^/\s]*\.so\S*', maps)):
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        pass  # not Linux: torch's OpenMP is visible already, or the next line complains
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise KernelsUnavailable(str(error)) from None
