"""Several processes that are one run, and the signals that stop it.

    torchrun --nproc-per-node 4 train.py ...     # four GPUs of this machine

    with distributed.process_group(), StopSignals() as stop:
        forward = distributed.wrap(model)        # PyTorch's DistributedDataParallel
        stop.deferred = True
        for images, labels in loader:
            train_step(...)
            stop.check()                         # raises Stopped in all processes at the same step

Gradients on GPUs go by NCCL; all else goes by gloo between the hosts, so that nothing synchronizes
with a GPU. Every function is a no-op with one process. A process that fails says why and exits;
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
    """A signal asked this process, or another one of the run, to stop."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 end a run: at once or, if `deferred`, at the next `check`.

    A second SIGINT kills, but not under torchrun: there the first may have come twice, from the
    terminal and from torchrun.
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
        """Raises Stopped if any process has received a signal; all of them call it."""
        signum = torch.tensor(self.received)
        if world_size() > 1:
            dist.all_reduce(signum, dist.ReduceOp.MAX)
        if signum:
            raise Stopped(signum.item())


@contextlib.contextmanager
def process_group():
    """Join the processes of torchrun, if it started this one; all but rank 0 print nothing."""
    if not (dist.is_torchelastic_launched() and int(os.environ['WORLD_SIZE']) > 1):
        yield
        return
    # A store for each start: killed processes have left their addresses in torchrun's store.
    store, own_rank, processes = next(dist.rendezvous('env://'))
    store = dist.PrefixStore(f'start {os.environ["TORCHELASTIC_RESTART_COUNT"]}', store)
    dist.init_process_group('cpu:gloo,cuda:nccl' if torch.cuda.is_available() else 'gloo',
                            store=store, rank=own_rank, world_size=processes)
    if rank():
        sys.stdout = open(os.devnull, 'w')
    try:
        yield
    except SystemExit as stopped:  # all processes stop together
        exit_now(stopped.code)
    time.sleep(0.1)  # torch before 2.8 hangs if threads of gloo still want the interpreter's lock
    dist.destroy_process_group()


def exit_now(code):
    """Exit; of several processes without Python's shutdown, which would wait for the others."""
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
    """Is this error what a process gets whose peer has died?"""
    return world_size() > 1 and (isinstance(error, dist.DistError) or 'gloo' in str(error))


def all_gather(value):
    """Each process's value, a list in the order of ranks."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def all_reduce(tensor):
    """The sum over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def from_rank_0(function):
    """What `function()` returns in rank 0, for all processes; the others don't call it."""
    result = [function() if rank() == 0 else None]
    if world_size() > 1:
        dist.broadcast_object_list(result)
    return result[0]


@contextlib.contextmanager
def rank_0_first():
    """A context that the others enter when rank 0 has left it: what it downloads is there then."""
    if rank() > 0:
        all_gather(None)
    yield
    if rank() == 0:
        all_gather(None)


def wrap(model):
    """The forward of a model whose gradients are to be the mean over all processes."""
    if world_size() == 1:
        return model
    forward = DistributedDataParallel(model, gradient_as_bucket_view=True)
    # Each process keeps its own running statistics until `share_statistics`: DDP's default, a
    # broadcast with every forward, would be one more message in each step. Set here, because the
    # constructor's argument has different names in torch 2.6 and 2.14.
    forward.broadcast_buffers = False
    return forward


def no_sync(forward, last):
    """A context for a micro-batch: gradients are exchanged in the last one of a step."""
    return contextlib.nullcontext() if last or world_size() == 1 else forward.no_sync()


def share_statistics(state):
    """Broadcast the running statistics of rank 0, as DDP does by default, and their averages."""
    if world_size() > 1:
        averages = state.averages.averages if state.averages else ()
        for tensor in (*state.model.buffers(), *averages):
            dist.broadcast(tensor, 0)
