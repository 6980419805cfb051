"""What ends a run before its last epoch: signals, numbers that are not finite, too little memory.

    with StopSignals() as stop, stop.deferred():
        for images, labels in loader:
            stop.check()                    # raises Interrupted, if a signal has come
            train_step(state, images, labels)
        check_finite(state)                 # raises TrainingError

None of them costs more than the steps since the last checkpoint, and a signal not even those.
"""

import contextlib
import signal
import traceback

import torch

import distributed
import memory
from data import DataError
from distributed import PeerError
from flags import UsageError

REMEDY = 'try a lower --lr; the last good checkpoint is untouched'


class TrainingError(Exception):
    """Training that cannot go on, said in one line."""


class Interrupted(Exception):
    """A signal asked the run, or another process of it, to stop."""

    def __init__(self, signum):
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StopSignals:
    """SIGINT, SIGTERM and SIGUSR1 end a run: at once or, where there is something to save, soon.

    In `deferred` they are noted, for the loop to ask by `check` after each step; a second SIGINT
    kills. Not so under torchrun, which passes on what a scheduler may have sent to all processes.
    """

    received, in_training = 0, False
    FAILED = 10**9  # in rank 0, one less in each further one: more than the number of any signal

    def __enter__(self):
        self.handlers = {signum: signal.signal(signum, self.note)
                         for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self):
        self.in_training = True
        yield
        self.in_training = False

    def note(self, signum, _):
        if not self.in_training:
            distributed.leave(128 + signum)
        self.received = signum
        if signum == signal.SIGINT and distributed.launcher() is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def check(self, error=None):
        """Raises an Interrupted for a signal, or else for `error` what `all_or_none` raises."""
        own_code = self.FAILED - distributed.rank() if error else self.received
        code = distributed.agree(own_code)
        if error and code == own_code:
            raise error
        if code > self.FAILED - distributed.world_size():
            raise PeerError
        if code:
            raise Interrupted(code)


@torch.no_grad()
def note_what_is_not_finite(state):
    """Have `state.interval` say when the loss, a weight or a gradient first was not finite.

    Its last value, the culprit, is 0 as long as all is finite, and then the number, from 1, of the
    first of `suspects` that was not (one more if none was); negative if the loss was not, either.
    """
    loss, _, finite_steps, culprit = state.interval
    norms = torch._foreach_norm([weight.grad if kind == 'gradient' else weight
                                 for weight, kind in suspects(state)], 1)  # squares overflow
    bad = ~torch.stack(norms).isfinite()
    any_bad, loss_is_bad = bad.any(), ~loss.isfinite()
    # No torch.where, which would send its constants to the device: a CUDA graph can't have that.
    number = any_bad * (bad.int().argmax() + 1) + (~any_bad & loss_is_bad) * (len(bad) + 1)
    culprit.add_((culprit == 0) * number * (1 - 2 * loss_is_bad.int()))
    finite_steps.add_(culprit == 0)


def suspects(state):
    """What a step goes wrong by: weights, and then their gradients as backward comes by them.

    The gradients of fp16 are left to its scaler, which takes no step by those that overflow.
    """
    weights = state.optimizer.param_groups[0]['params']
    gradients = [] if state.scaler.is_enabled() else reversed(weights)
    return [*((weight, 'value') for weight in weights),
            *((weight, 'gradient') for weight in gradients)]


def check_finite(state):
    """Loss and errors of all processes since the last row of train.csv, if all was finite.

    Raises:
        TrainingError: it was not; names the epoch, the step and the first bad parameter.
    """
    sums = distributed.all_gather(state.interval.tolist())  # waits for the device
    odd = [(finite_steps, int(culprit)) for *_, finite_steps, culprit in sums if culprit]
    if odd:
        finite_steps, culprit = min(odd)
        step = state.step - state.interval_steps + int(finite_steps) + 1
        what, by = 'the loss', ''
        for weight, kind in suspects(state)[abs(culprit) - 1:abs(culprit)]:
            name = next(name for name, known in state.model.named_parameters() if known is weight)
            what = what if culprit < 0 else f'a {kind}'
            by = f' the first bad parameter is {name}, by its {kind};'
        raise TrainingError(f'{what} is not finite at epoch {state.epoch}, step {step}:{by} '
                            f'{REMEDY}')
    loss, errors, *_ = zip(*sums)
    return sum(loss), sum(errors)


@torch.no_grad()
def check_model(state):
    """Raises a TrainingError if a weight or a running statistic, to be saved, is not finite."""
    tensors = {name: value for name, value in state.model.state_dict().items()
               if value.is_floating_point()}
    bad = ~torch.stack(torch._foreach_norm([*tensors.values()], 1)).isfinite()
    if bad.any():
        name = [*tensors][bad.int().argmax()]
        raise TrainingError(f'the model is not finite in epoch {state.epoch} after step '
                            f'{state.step}: the first bad parameter is {name}; {REMEDY}')


@contextlib.contextmanager
def explained(args, remedy=lambda: 'lower --batch-size'):
    """What can go wrong in a step and be put right by flags, said in one line.

    `remedy()` is what to say where memory ran out, called when what the step held of it is free.
    """
    try:
        yield
        return
    except (ValueError, RuntimeError, MemoryError) as error:
        text = ' '.join(str(error).split())
        if 'value per channel' in text:
            raise UsageError('a batch, or a part of one by --grad-accum or torchrun, has a single '
                             'image, and its last feature map is one pixel, which has no variance: '
                             'change --batch-size or --grad-accum') from error
        if 'DataLoader worker' in text:
            raise DataError(f'a process that reads images has died ({text}): if it was for lack of '
                            f'memory, give fewer --workers than {args.workers}') from error
        if args.deterministic and 'deterministic' in text:
            raise UsageError(f'--deterministic: {text}') from error
        if not memory.ran_out(error):
            raise
        traceback.clear_frames(error.__traceback__)
    raise UsageError(f'out of memory: {remedy()}')
