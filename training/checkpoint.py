"""Checkpoints: what training changes, saved so that a file is either the old one or the new one.

    state = TrainState(model, optimizer, scaler, sums=torch.zeros(2, device=device))
    save('work/x/latest.pth', {**state.state_dict(), 'args': vars(args)}, keep_previous=True)
    path, saved = load_newest('work/x/latest.pth')    # or latest.pth.1, if that one is damaged
    state.resume(saved, args, num_images=50_000)

A checkpoint holds tensors and plain values alone, so that loading one can't run code. The model's
state dict is `torch.load(path, map_location='cpu', weights_only=True)['model']`.
"""

import argparse
import contextlib
import dataclasses
import io
import math
import os
import textwrap
import zipfile
from pathlib import Path

import torch

from training.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""


@dataclasses.dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    An interval is what has come after the last row of train.csv. Its sums stay on the device, so
    that no step synchronizes with it; sums and random state are per process.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: torch.Tensor         # float32 [2]: loss and errors of this process in the interval
    interval_images: int = 0   # of all processes
    epoch_sums: tuple = (0.0, 0.0, 0)  # loss, errors, images of all processes in this epoch's rows
    epoch: int = 1             # counted from 1
    step: int = 0              # steps of this epoch that are done
    last_error: float = math.nan  # percent, of the last epoch's evaluation
    best_score: float = math.inf  # the lowest test result so far, of what --best-by names
    best_error: float = math.inf  # percent, of that epoch
    best_epoch: int = 0
    seconds: float = 0.0       # of training, evaluation and saving, over all resumed runs
    peak_memory: int = 0       # bytes allocated on rank 0's GPU

    def counters(self):
        """The plain values among the fields: those that have a default."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.default is not dataclasses.MISSING}

    def begin_epoch(self, epoch):
        self.epoch, self.step, self.epoch_sums = epoch, 0, (0.0, 0.0, 0)
        self.begin_interval()

    def begin_interval(self):
        self.sums.zero_()
        self.interval_images = 0

    def count_step(self, num_images):
        self.step += 1
        self.interval_images += num_images

    def random_state(self):
        """The states of the generators of the CPU and of the device, by its kind."""
        kind = self.sums.device.type
        state = {'cpu': torch.get_rng_state()}
        if kind != 'cpu':
            state[kind] = torch.get_device_module(kind).get_rng_state()
        return state

    def set_random_state(self, state):
        """A state that was saved on another kind of device sets the CPU's generator alone."""
        kind = self.sums.device.type
        torch.set_rng_state(state['cpu'])
        if kind != 'cpu' and state.get(kind) is not None:
            torch.get_device_module(kind).set_rng_state(state[kind])

    @contextlib.contextmanager
    def rehearsal(self):
        """Undo, in place, what the steps within this context change."""
        def of_optimizer():
            return [value for values in self.optimizer.state.values()
                    for value in values.values() if torch.is_tensor(value)]

        before = [(tensor, tensor.clone())
                  for tensor in (*self.model.state_dict().values(), self.sums, *of_optimizer())]
        scaler, random_state = self.scaler.state_dict(), self.random_state()
        yield
        for tensor in of_optimizer():  # what its first step makes: all of ours start from zeros
            tensor.zero_()
        for tensor, value in before:
            tensor.copy_(value)
        self.scaler.load_state_dict(scaler)
        self.set_random_state(random_state)

    def own_state(self):
        """What is this process's alone."""
        return {'interval': self.sums.cpu(), 'rng': self.random_state()}

    def state_dict(self, own_states=None):
        """What a checkpoint holds; `own_states` are those of all processes, by rank."""
        return {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(), 'processes': own_states or [self.own_state()],
            **self.counters(),
        }

    def resume(self, saved, args, num_images, rank=0, world_size=1):
        """Continue where the checkpoint was, or at the beginning of --start-epoch.

        With another number of processes than it was saved by, rank 0 takes over all sums, and a
        process that is new keeps its random state.

        Raises:
            CheckpointError: it is of another model, holds weights alone, or was saved within an
                epoch of other batches.
        """
        load_weights(self.model, saved['model'], args.resume)
        if 'optimizer' not in saved:
            raise CheckpointError(f'{args.resume} holds weights alone: --pretrained {args.resume} '
                                  f'starts training from them')
        # Momenta are the checkpoint's; learning rate, weight decay and the like are this run's.
        groups = self.optimizer.state_dict()['param_groups']
        self.optimizer.load_state_dict({**saved['optimizer'], 'param_groups': groups})
        self.scaler.load_state_dict(saved['scaler'])
        for name, default in self.counters().items():  # older checkpoints lack some
            setattr(self, name, saved.get(name, default))
        self.best_score = saved.get('best_score', self.best_error)
        processes = saved['processes']
        if rank < len(processes):
            self.set_random_state(processes[rank]['rng'])
        # Older checkpoints have two more values in an interval.
        sums = torch.stack([process['interval'][:2] for process in processes])
        self.sums.copy_(sums[rank] if len(processes) == world_size else sums.sum(0) * (rank == 0))
        if args.start_epoch:
            self.begin_epoch(args.start_epoch)
        before = saved['args'].get('batch_size'), saved.get('num_images')
        if self.step and before != (args.batch_size, num_images):
            raise CheckpointError(
                f'{args.resume} was written within an epoch of {before[1]} images in batches of '
                f'{before[0]}, and cannot go on in one of {num_images} in batches of '
                f'{args.batch_size}; --start-epoch {self.epoch} begins it anew')


def check_fixed_flags(args, saved_args, names):
    """Raises CheckpointError if a flag differs with which a run can't be resumed."""
    for flag in names:
        # Older checkpoints lack some, which then had the default of today.
        before, now = saved_args.get(flag, getattr(args, flag)), getattr(args, flag)
        if now != before:
            raise CheckpointError(f'{args.resume} cannot go on with another {flag}: its own is '
                                  f'{before}, not {now}')


def save(path, content, keep_previous=False):
    """Save plain values and tensors; whole and on the disk before the file takes its name.

    With `keep_previous`, the file that had the name becomes path.1. Killed at any moment, this
    leaves at least one of the two, whole; a failed write changes neither.
    """
    path, archive = Path(path), io.BytesIO()
    torch.save(content, archive)  # in memory: into a full disk, torch.save fails in odd ways
    temporary = path.with_name(f'.{path.name}.tmp')
    try:
        with open(temporary, 'wb') as file:
            file.write(archive.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, f'{path}.1')
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        error.filename = str(path)  # a failed write names no file
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the rename itself
    os.close(directory)


def load(path):
    """The dictionary that a checkpoint holds, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, a damaged one, or one that would run code.
    """
    try:
        if zipfile.is_zipfile(path):  # torch.load does not check the CRCs
            with zipfile.ZipFile(path) as archive:
                record = archive.testzip()
            if record:
                raise CheckpointError(f'{path} is damaged: the CRC of {record} is wrong')
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its flags so
            saved = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f'{path} is not there') from error
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # a file that is no checkpoint makes the reader fail in any way
        raise CheckpointError(f'{path} is not a checkpoint, or a damaged one '
                              f'({type(error).__name__})') from error
    if not isinstance(saved, dict):
        raise CheckpointError(f'{path} is not a checkpoint: it holds a {type(saved).__name__}')
    return saved


def load_newest(path):
    """`path`, or the one before it where that is damaged or missing: its name, what it holds.

    Raises:
        CheckpointError: neither can be loaded; says what is wrong with `path`.
    """
    try:
        return str(path), load(path)
    except CheckpointError:
        with contextlib.suppress(CheckpointError):
            return f'{path}.1', load(f'{path}.1')
        raise


@contextlib.contextmanager
def explained(what):
    """Turns any error into a CheckpointError: what it is about, and the first of what it says."""
    try:
        yield
    except Exception as error:  # torch may name hundreds of weights in it
        raise CheckpointError(f'{what}: {textwrap.shorten(str(error), 250)}') from error


def load_weights_file(path):
    """The state dict in a file: our checkpoint, or one of torchvision or timm, bare or not.

    Raises:
        CheckpointError: as `load`; or it is a .safetensors file, and the package is not there.
    """
    if Path(path).suffix == '.safetensors':  # as timm's weights come
        with explained(f'{path} cannot be read'):
            from safetensors.torch import load_file

            return load_file(path)
    saved = load(path)
    return next((saved[key] for key in ('model', 'state_dict') if key in saved), saved)


def torchvision_weights(arch):
    """The state dict of torchvision's weights for ImageNet, downloaded if it has to be.

    Raises:
        CheckpointError: no network, or a broken file in torchvision's cache.
    """
    import torchvision  # here, for checkpoints alone need no torchvision

    with explained(f'torchvision could not download or read its weights of {arch}'):
        return torchvision.models.get_model_weights(arch).DEFAULT.get_state_dict(weights_only=True)


def load_weights(model, weights, source):
    """Load a state dict into `model`.

    Raises:
        CheckpointError: the two don't fit; names the first differences.
    """
    with explained(f'{source} does not fit the model'):
        model.load_state_dict(weights)


def first_not_finite(model):
    """The name of the first parameter or running statistic that is not finite, or None."""
    tensors = {name: value for name, value in model.state_dict().items()
               if value.is_floating_point()}
    # Sums of absolute values: those of squares would overflow before the numbers do.
    bad = ~torch.stack(torch._foreach_norm([*tensors.values()], 1)).isfinite()
    return [*tensors][bad.int().argmax()] if bad.any() else None
