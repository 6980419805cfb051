"""Several processes that train one model: those that torchrun starts, or this one alone.

    torchrun --nproc-per-node 4 train.py ...     # four GPUs of this machine

    with distributed.process_group():
        with distributed.all_or_none():          # what fails in one process ends all of them
            model = ...
        forward = distributed.wrap(model)        # PyTorch's DistributedDataParallel

Gradients on GPUs go by NCCL; all else, such as whether to stop, by gloo between the hosts, so that
no GPU is waited for. In a process that is alone nothing here does anything: there is one code path.
"""

import contextlib
import inspect
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class PeerError(Exception):
    """Another process has failed, and has said why."""


@contextlib.contextmanager
def process_group():
    """Join the processes of torchrun, if it started this one; all but rank 0 print nothing."""
    if not (dist.is_torchelastic_launched() and int(os.environ['WORLD_SIZE']) > 1):
        yield
        return
    # The store may be that of torchrun, in which processes that were killed have left addresses.
    store, own_rank, processes = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(f'start {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
                            store=store, rank=own_rank, world_size=processes)
    with open(os.devnull, 'w') as nowhere:
        with contextlib.redirect_stdout(nowhere if rank() else sys.stdout):
            try:
                yield
            except SystemExit:  # all of them leave
                _say_goodbye()
                raise
    _say_goodbye()


def _say_goodbye():
    time.sleep(0.1)  # torch before 2.8 hangs if threads of gloo still want the interpreter's lock
    dist.destroy_process_group()


def leave(code):
    """Exit after an error.

    With several processes at once, and without the shutdown of Python: in that, threads of torch
    may crash, or wait for processes that are gone.
    """
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def local_rank():
    """The rank among the processes on this machine, and so the number of this one's GPU."""
    return int(os.environ['LOCAL_RANK']) if dist.is_initialized() else 0


def launcher():
    """What tells this torchrun from all others, also after it started its processes again; or None.

    The number of its process is not enough: in a container it is always the same.
    """
    if not dist.is_torchelastic_launched():
        return None
    parent = Path(f'/proc/{os.getppid()}/stat')
    start = parent.read_text().rpartition(')')[2].split()[19] if parent.exists() else ''
    return f'{os.environ["TORCHELASTIC_RUN_ID"]} {platform.node()} {os.getppid()} {start}'


def is_restart():
    """Has the torchrun that started this process started it, or one in its place, before?"""
    return dist.is_torchelastic_launched() and os.environ['TORCHELASTIC_RESTART_COUNT'] != '0'


def may_restart():
    """Does a torchrun watch over this process that will start it again should it fail?"""
    return dist.is_torchelastic_launched() and os.environ['TORCHELASTIC_MAX_RESTARTS'] != '0'


def all_gather(value):
    """Each process's value, in the order of ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def of_rank_0(function):
    """What `function()` returns in rank 0, or its error, for all; the others don't call it."""
    with all_or_none():
        result = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def all_or_none():
    """A context that an error in one process ends in all; the lowest rank with that error has it.

    Raises:
        PeerError: in the others.
    """
    failure = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = all_gather(failure and f'{type(failure).__name__}: {failure}')
    if failure and messages.index(messages[rank()]) == rank():
        raise failure
    if any(messages):
        raise PeerError


def in_turns(function):
    """What `function()` returns: rank 0 calls it first, then one process of each machine, then all.

    What it downloads is so downloaded once, whether or not the machines have a disk in common.
    """
    result, turn = None, 0 if rank() == 0 else 1 if local_rank() == 0 else 2
    for i in range(3 if world_size() > 1 else 1):
        with all_or_none():
            if i == turn:
                result = function()
    return result


def agree(code):
    """The largest of all processes' whole numbers."""
    if world_size() == 1:
        return code
    codes = torch.tensor(code)
    dist.all_reduce(codes, dist.ReduceOp.MAX)
    return codes.item()


def all_reduce(tensor):
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def wrap(model):
    """The forward of a model whose gradients are to be the mean over all processes."""
    if world_size() == 1:
        return model
    # Each process keeps running statistics of its own, and `share_statistics` makes them one: a
    # broadcast with every forward, DDP's default, would be one more message in each step.
    known = inspect.signature(DistributedDataParallel).parameters
    flag = 'forward_sync_buffers' if 'forward_sync_buffers' in known else 'broadcast_buffers'
    return DistributedDataParallel(model, gradient_as_bucket_view=True, **{flag: False})


def no_sync(forward, last):
    """A context for a part of a batch: gradients are sent after the last one."""
    return contextlib.nullcontext() if last or world_size() == 1 else forward.no_sync()


def share_statistics(model):
    """Take over the running statistics of rank 0, as DDP does by default."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)


def lost_a_peer(error):
    """Is this what a process is told whose peer has died?"""
    return world_size() > 1 and (isinstance(error, dist.DistError) or 'gloo' in str(error))
