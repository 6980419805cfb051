"""A GPU that is only pretended: PyTorch's CUDA code runs on a machine that has none.

    python tests/pretended_cuda script.py ...      # any script; torch.cuda.is_available() is True
    pytest tests/pretended_cuda                    # each test here runs in a process of its own

    import pretended_cuda                          # in such a process
    operations = pretended_cuda.record(lambda: step(images, labels))
    assert [o.kind for o in operations].count('graph') == 1

A library in C++, loaded before all others (LD_PRELOAD), takes the place of the CUDA runtime, of the
driver, and of cuBLAS, cuDNN and NCCL.

Real: all of torch's own code on the host. Its dispatcher and autograd threads, which kernels it
chooses and in what order it launches them, the caching allocator with its pools and
`record_stream`, streams and events, the random generators, fused and foreach optimizers, CUDA
graphs, DistributedDataParallel.

Pretended: the device. Kernels do nothing, a convolution or a product of matrices is one operation,
nothing is sent between processes, and whatever is copied to the host is zeros: False and 0.0.
Device memory is addresses without storage. Streams are never behind, but whether events and waits
put work in order is followed (`Operation.ordered`). A capture is broken by what really breaks one:
waits, copies from or to pageable memory, cudaMalloc, events of outside, streams not joined.

So it proves what the host does: which kernels in which order, what waits, what is recorded in a
graph, how much memory torch allocates, and that whole programs run. It proves nothing about
numbers, speed, or kernels themselves, nor about memory that the libraries take for themselves.
Functions that are missing here reach the real library, and fail there for want of a driver.

It needs Linux, g++ and a torch for CUDA 13. The headers come with torch: most are in its dependency
nvidia-cuda-runtime, and crt/host_defines.h, which that one leaves out, is in triton.

The environment of a process says what GPU it has: PRETENDED_CUDA_GIB (80), PRETENDED_CUDA_DEVICES
(1), PRETENDED_CUDA_CAPABILITY (90; below 75 no kernel can be launched) and PRETENDED_CUDA_DRIVER
(13000, as cudaDriverGetVersion has it).
"""

import ctypes
import functools
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
SOURCES = [HERE / 'runtime.cpp', HERE / 'libraries.cpp']
LIBRARY = 'PRETENDED_CUDA_LIBRARY'  # in the environment: the library that the process has loaded


class Operation(NamedTuple):
    """An operation on a stream, or of the host: a wait, or an allocation of device memory."""
    kind: str      # kernel, memset, copy, graph, collective; synchronize, allocate
    stream: str
    ordered: bool  # begins after all work submitted before it, on any stream, has ended
    name: str      # of the kernel or function; of a copy '... to ...'; of a graph its number


# ---- building it, and processes that have it -----------------------------------------------------

def unavailable_reason():
    """Why there can be no pretended GPU here, or None."""
    if sys.platform != 'linux':
        return 'the pretended GPU is for Linux'
    if shutil.which('g++') is None:
        return 'the pretended GPU needs g++'
    import torch  # only now: the server's processes and the tests have it anyway
    if not (torch.version.cuda or '').startswith('13.'):
        return f'the pretended GPU needs a torch for CUDA 13, and this one is {torch.__version__}'
    for header in ('cuda_runtime_api.h', 'crt/host_defines.h'):
        if not any((folder / header).exists() for folder in include_folders()):
            return f'the pretended GPU needs {header}, of nvidia-cuda-runtime or triton'
    return None


def include_folders():
    folders = []
    for package, inside in (('nvidia', 'cu13/include'), ('triton', 'backends/nvidia/include')):
        spec = importlib.util.find_spec(package)
        if spec is not None:
            folders += [Path(root) / inside for root in spec.submodule_search_locations]
    return folders


def build(folder):
    """The library's path in `folder`, compiled if it is not there: two seconds."""
    path = Path(folder) / 'libpretended_cuda.so'
    if not path.exists():
        unfinished = path.with_suffix(f'.{os.getpid()}')
        # The name inside is the driver's, so that it is found where the driver is looked for.
        subprocess.run(['g++', '-std=c++17', '-O1', '-shared', '-fPIC', '-Wl,-soname,libcuda.so.1',
                        *(f'-I{include}' for include in include_folders()), *map(str, SOURCES),
                        '-o', str(unfinished)], check=True)
        unfinished.rename(path)
    return path


def environment(library):
    """The variables of a process that is to have the pretended GPU."""
    return {**os.environ, LIBRARY: str(library), 'LD_PRELOAD': str(library), 'OMP_NUM_THREADS': '1',
            'PYTHONPATH': os.pathsep.join([str(HERE.parent.parent), str(HERE.parent)])}


# ---- in such a process: what torch did ----------------------------------------------------------

@functools.cache
def _library():
    library = ctypes.CDLL(os.environ[LIBRARY])
    for name in ('end_log', 'graph', 'problems'):
        getattr(library, f'pretended_{name}').restype = ctypes.c_char_p
    return library


def _parse(lines):
    operations = []
    for line in lines.decode().splitlines():
        kind, stream, ordered, name = line.split('\t')
        operations.append(Operation(kind, stream, ordered == '1', name))
    return operations


def start_recording():
    _library().pretended_start_log()


def end_recording():
    """The operations of all threads since `start_recording`, in order."""
    return _parse(_library().pretended_end_log())


def record(function):
    """The operations of a call."""
    start_recording()
    try:
        function()
    finally:
        operations = end_recording()
    return operations


def graphs():
    """The nodes of each graph that was captured, as operations, in the order of capture."""
    library = _library()
    return [_parse(library.pretended_graph(i)) for i in range(library.pretended_graph_count())]


def problems():
    """Errors of captures, and operations left out of them, since the last call: a line each."""
    return _library().pretended_problems().decode().splitlines()


def compare_as_zeros():
    """Have `<=` and `>=` between single numbers on the device be true, as they are of zeros.

    The result would be read as False: optimizers would refuse any learning rate there.
    """
    import torch

    def compares_zeros(original):
        def compare(tensor, other):
            single = tensor.is_cuda and tensor.dim() == 0 and not getattr(other, 'ndim', 0)
            return single or original(tensor, other)
        return compare

    torch.Tensor.__le__ = compares_zeros(torch.Tensor.__le__)
    torch.Tensor.__ge__ = compares_zeros(torch.Tensor.__ge__)
