"""How much memory a training step takes, and what there is of it.

    with Allocations() as allocations:
        train_step(state, images, labels, autocast=autocast)
    print(allocations.peak)                          # bytes, on whatever device
    print(images_that_fit(step, (3, 32, 32), device))
"""

import gc
import resource

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import distributed
from densenet import DenseBlock


class Allocations(TorchDispatchMode):
    """A context that counts the memory of what operations make in it, forward and backward.

    Compiled code is out of its sight.

    Attributes:
        peak: the most bytes that there were at once.
    """

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                self.made[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, self.held())
        return result

    def held(self, but=()):
        """Bytes of what has been made and is still there, but for the storages of some tensors."""
        self.made = {key: made for key, made in self.made.items() if not made[0].expired()}
        others = {tensor.untyped_storage()._cdata for tensor in but}
        return sum(size for key, (_, size) in self.made.items() if key not in others)


def ran_out(error):
    """Is this what an allocation fails with?"""
    signs = 'out of memory', "can't allocate memory", 'ALLOC_FAILED'
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs))


def available(device):
    """Bytes that could be allocated now, by estimate."""
    gc.collect()
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    with open('/proc/meminfo') as meminfo, open('/proc/self/statm') as statm:
        room = 1024 * next(int(line.split()[1]) for line in meminfo if 'MemAvailable' in line)
        limit = resource.getrlimit(resource.RLIMIT_AS)[0]  # `ulimit -v`
        in_use = int(statm.read().split()[0]) * resource.getpagesize()
    return room if limit == resource.RLIM_INFINITY else min(room, limit - in_use)


def images_that_fit(step, image_shape, device):
    """How many images [C, H, W] a step could take at once: an estimate from steps of 2 and of 4.

    What libraries need besides is taken to be a tenth.
    """
    peaks = []
    for n in (2, 4):
        images = torch.zeros(n, *image_shape, device=device)
        with Allocations() as allocations:
            step(images, torch.zeros(n, dtype=torch.int64, device=device))
        peaks.append(1.1 * allocations.peak)
    each = (peaks[1] - peaks[0]) / 2
    return max(0, int((available(device) - (peaks[0] - 2 * each)) / each))


def remedy(step, model, image_shape, batch_size, grad_accum):
    """What to lower where memory ran out in a step of `model`; the numbers are estimates.

    The images [C, H, W] are on the device of the model, `batch_size` of them for all processes, and
    its dense blocks are left as --memory-efficient has them.
    """
    advice = 'lower --batch-size, raise --grad-accum or give --memory-efficient'
    blocks = [module for module in model.modules() if isinstance(module, DenseBlock)]
    device, fitting = next(model.parameters()).device, []
    was_efficient = blocks[0].memory_efficient
    try:
        for efficient in (was_efficient, True):
            for block in blocks:
                block.memory_efficient = efficient
            fitting.append(images_that_fit(step, image_shape, device))
    except Exception:  # there is too little for an estimate, too
        return advice
    share = -(-batch_size // distributed.world_size())
    parts = min(share, max(grad_accum + 1, -(-share // max(1, fitting[0]))))
    text = f'{advice}; by estimate {fitting[0]} images fit at once (--grad-accum {parts})'
    return text if was_efficient else f'{text}, with --memory-efficient {fitting[1]}'
