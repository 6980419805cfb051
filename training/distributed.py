"""Distributed training with DDP, and stop signals.

    torchrun --nproc-per-node 4 train.py ...     # four GPUs of this machine

    with distributed.process_group(), StopSignals() as stop:
        forward = distributed.wrap(model)        # PyTorch's DistributedDataParallel
        stop.deferred = True
        for images, labels in loader:
            train_step(...)
            stop.check()                         # raises Stopped in all processes at the same step

Gradients on GPUs are exchanged by NCCL, everything else by gloo on the CPU, without GPU syncs.
Every function is a no-op with one process. A process that fails prints the error and exits;
torchrun then stops the others.
"""

import contextlib
import os
import signal
import sys
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Stopped(Exception):
    """A stop signal has arrived at this rank or another one."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 end a run: at once or, if `deferred`, at the next `check`.

    A second SIGINT kills the process, except under torchrun, where a Ctrl-C may arrive twice, from
    the terminal and from torchrun.
    """

    received, deferred = 0, False

    def __enter__(self):
        names = [name for name in ('SIGINT', 'SIGTERM', 'SIGUSR1') if hasattr(signal, name)]
        self.handlers = {signum: signal.signal(signum, self._note)
                         for signum in (getattr(signal, name) for name in names)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def _note(self, signum, _):
        if not self.deferred:
            exit_now(128 + signum)
        self.received = signum
        if signum == signal.SIGINT and not dist.is_torchelastic_launched():
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self):
        """Raises Stopped if any rank has received a signal; must be called by all ranks."""
        signum = torch.tensor(self.received)
        if world_size() > 1:
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        if signum:
            raise Stopped(signum.item())


@contextlib.contextmanager
def process_group():
    """Initialize the process group under torchrun; silence stdout on ranks above 0."""
    if not (dist.is_torchelastic_launched() and int(os.environ['WORLD_SIZE']) > 1):
        yield
        return
    # A new store for each restart: killed processes have left addresses in torchrun's store.
    store, own_rank, processes = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(f'start {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
                            store=store, rank=own_rank, world_size=processes)
    if rank():
        sys.stdout = open(os.devnull, 'w')
    try:
        yield
    except SystemExit as stopped:  # all ranks stop together
        exit_now(stopped.code)
    time.sleep(0.1)  # torch < 2.8 deadlocks if threads of gloo are still waiting for the GIL
    dist.destroy_process_group()


def exit_now(code):
    """Exit; with several ranks, without Python's shutdown, which would wait for the others."""
    if world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def lost_a_peer(error):
    """True if the error means that another rank has died."""
    return world_size() > 1 and (isinstance(error, dist.DistError) or 'gloo' in str(error))


def all_gather(value):
    """The values of all ranks, as a list."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce(tensor):
    """The sum over all ranks, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(function):
    """Call `function` on rank 0 only, and return its result on all ranks."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def rank_0_first():
    """A context that other ranks enter after rank 0 has left it, for example for downloads."""
    if rank() > 0:
        all_gather(None)
    yield
    if rank() == 0:
        all_gather(None)


def wrap(model):
    """The model's forward, wrapped in DDP, which averages gradients over all ranks."""
    if world_size() == 1:
        return model
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Running statistics are per rank until `share_statistics`: DDP's default would broadcast them
    # in every step. Set here, because the constructor's argument differs in torch 2.6 and 2.14.
    forward.broadcast_buffers = False
    return forward


def no_sync(forward, last):
    """A context for a micro-batch: gradients are exchanged only in the last one of a step."""
    return contextlib.nullcontext() if last or world_size() == 1 else forward.no_sync()


def share_statistics(state):
    """Broadcast rank 0's running statistics, as DDP does by default, and their averages."""
    if world_size() > 1:
        averages = state.averages.averages if state.averages else ()
        for tensor in (*state.model.buffers(), *averages):
            dist.broadcast(tensor, 0)
