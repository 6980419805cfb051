"""Device, precision and determinism."""

import ctypes
import os
import platform
import re
import sys
import warnings

import torch

from training.console import UserError

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's mallopt(3)
AUTOCAST_TYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


def choose_device(name):
    """The torch.device of this process; `name` is one of `flags.DEVICES`.

    Raises:
        UserError: torch finds no such device, or has no code for it.
    """
    available = {'cuda': cuda_is_available(name), 'mps': torch.backends.mps.is_available(),
                 'cpu': True}
    if name == 'auto':  # MPS is untested, so only on request
        name = 'cuda' if available['cuda'] else 'cpu'
    if not available[name]:
        raise UserError(f'--device {name}: torch {torch.__version__} finds no such device; '
                        f'--device auto selects one')
    if name != 'cuda':
        return torch.device(name)
    gpu = int(os.environ.get('LOCAL_RANK', 0))  # set by torchrun: one GPU per process
    count = torch.cuda.device_count()
    if gpu >= count:
        raise UserError(f'torchrun started more processes on {platform.node()} than it has GPUs: '
                        f'--nproc-per-node {count}')
    check_compute_capability(gpu)
    torch.cuda.set_device(gpu)
    return torch.device('cuda', gpu)


def keep_freed_memory():
    """Let malloc keep memory that is freed from now on, unless the user has configured malloc.

    By default glibc returns large blocks to the system, which has to map and clear new pages for
    the tensors of the next step. To be called when the data are loaded, because what loading them
    frees would be kept, too. Other C libraries have no mallopt.
    """
    if sys.platform != 'linux' or any(name.startswith(('MALLOC_', 'GLIBC_TUNABLES'))
                                      for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), 'mallopt', None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)         # large blocks come from the heap, too,
        mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


def cuda_is_available(name):
    """True if torch can use a GPU. Raises UserError if it can't use an existing one."""
    with warnings.catch_warnings(record=True) as reasons:
        warnings.simplefilter('always')
        available = torch.cuda.is_available()
    if name in ('auto', 'cuda') and not available and torch.cuda.device_count():
        reason = ' '.join(str(reasons[-1].message).split()) if reasons else 'no reason given'
        raise UserError(f'torch {torch.__version__} can\'t use the GPU of this machine ({reason}); '
                        f'--device cpu runs without it')
    return available


def check_compute_capability(gpu):
    """Raises UserError if torch was built without code for this GPU, before a kernel fails."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # torch's own warning, a paragraph
        major, minor = torch.cuda.get_device_capability(gpu)
    built = [re.match(r'(sm|compute)_(\d+)(\d)', arch) for arch in torch.cuda.get_arch_list()]
    # sm_ is machine code for one major version, from its minor version on; compute_ is compiled.
    runs = [int(b[2]) == major and int(b[3]) <= minor if b[1] == 'sm'
            else (int(b[2]), int(b[3])) <= (major, minor) for b in built if b]
    if runs and not any(runs):
        raise UserError(f'{torch.cuda.get_device_name(gpu)} has compute capability '
                        f'{major}.{minor}, and torch {torch.__version__} was built for '
                        f'{", ".join(torch.cuda.get_arch_list())}: install one that was built for '
                        f'it (pytorch.org/get-started), or give --device cpu')


def choose_precision(name, device):
    """Returns fp32, tf32, bf16 or fp16, and configures cuBLAS and cuDNN for it."""
    if name == 'auto':
        has_bf16 = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        name = 'bf16' if has_bf16 else 'tf32' if device.type == 'cuda' else 'fp32'
    if name == 'tf32' and device.type != 'cuda':
        raise UserError(f'--precision tf32 is for cuda, not {device.type}: try fp32')
    torch.backends.cuda.matmul.allow_tf32 = name != 'fp32'
    torch.backends.cudnn.allow_tf32 = name != 'fp32'
    torch.backends.cudnn.benchmark = True  # shapes are constant
    return name


def set_determinism(wanted):
    """Make runs on a GPU bit-identical; on a CPU they always are."""
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        torch.backends.cudnn.benchmark = False  # chooses kernels by timing
        torch.utils.deterministic.fill_uninitialized_memory = False  # it is never read
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when cuBLAS starts


def make_autocast(precision, device):
    """The context of a forward pass; a no-op for fp32 and tf32."""
    return torch.autocast(device.type, AUTOCAST_TYPES.get(precision),
                          enabled=precision in AUTOCAST_TYPES)


def ran_out_of_memory(error):
    signs = 'out of memory', "can't allocate memory", 'ALLOC_FAILED'
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(
        sign in str(error) for sign in signs)
