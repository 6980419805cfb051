"""Checkpoints: what training changes, written so that a file is either the old one or the new one.

    state = TrainState(model, optimizer, scaler, interval=torch.zeros(3, device=device))
    save('work/x/latest.pth', state.state_dict(), args=vars(args))
    state.load_state_dict(load('work/x/latest.pth'))

A checkpoint holds tensors and plain values alone, so that reading one can't run code:
`torch.load(path, weights_only=True)['model']` is the model's state dict.
"""

import argparse
import contextlib
import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

import torch


class CheckpointError(Exception):
    """A checkpoint that is missing, broken or of another model, said in one line."""


@dataclass
class TrainState:
    """All that training changes, and so all that a checkpoint holds.

    An interval is what comes after the last row of train.csv. Its sums are on the device, so that
    no step has to wait for them. Where several processes train together, each has sums and a random
    state of its own; all else is the same in all of them.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    interval: torch.Tensor  # float32 [3]: loss, errors, steps before the first loss not finite
    interval_steps: int = 0
    interval_images: int = 0
    epoch_sums: tuple = (0.0, 0.0, 0)  # loss, errors, images of the intervals of this epoch
    epoch: int = 1                     # counted from 1
    step: int = 0                      # steps of this epoch that are done
    last_error: float = math.nan  # percent, of the last epoch's evaluation
    best_error: float = math.inf
    best_epoch: int = 0

    # Without an annotation, so not a field: the plain values among them.
    _plain = ('interval_steps', 'interval_images', 'epoch_sums', 'epoch', 'step', 'last_error',
              'best_error', 'best_epoch')

    def begin_epoch(self, epoch):
        self.epoch, self.step, self.epoch_sums = epoch, 0, (0.0, 0.0, 0)
        self.begin_interval()

    def begin_interval(self):
        self.interval.zero_()
        self.interval_steps = self.interval_images = 0

    def count_step(self, num_images):
        self.interval_steps += 1
        self.interval_images += num_images
        self.step += 1

    @contextlib.contextmanager
    def rehearsal(self):
        """A context whose steps leave no trace; every tensor keeps its place in memory."""
        def tensors():
            optimizer = [value for values in self.optimizer.state.values()
                         for value in values.values() if torch.is_tensor(value)]
            return [*self.model.state_dict().values(), self.interval, *optimizer]

        before = {tensor.data_ptr(): tensor.clone() for tensor in tensors()}
        scaler, random_state = self.scaler.state_dict(), self._random_state()
        try:
            yield
        finally:
            with torch.no_grad():
                for tensor in tensors():
                    if tensor.data_ptr() in before:
                        tensor.copy_(before[tensor.data_ptr()])
                    else:  # made by SGD, Adam or RMSprop in its first step: that starts from zeros
                        tensor.zero_()
            self.scaler.load_state_dict(scaler)
            self._set_random_state(random_state)

    def _random_state(self):
        return {'cpu': torch.get_rng_state(),
                'cuda': torch.cuda.get_rng_state() if self.interval.is_cuda else None}

    def _set_random_state(self, state):
        torch.set_rng_state(state['cpu'])
        if self.interval.is_cuda and state['cuda'] is not None:
            torch.cuda.set_rng_state(state['cuda'])

    def own_state(self):
        """What is this process's alone."""
        return {'interval': self.interval.cpu(), 'rng': self._random_state()}

    def state_dict(self, own_states=None):
        """What a checkpoint holds; `own_states` are all processes', in the order of ranks."""
        return {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(), 'processes': own_states or [self.own_state()],
            **{name: getattr(self, name) for name in self._plain},
        }

    def load_state_dict(self, saved, source='the checkpoint', rank=0, world_size=1):
        """Go on from a checkpoint, random state included, as one of some processes.

        They may be more or fewer than before: then rank 0 takes over all sums, and a process that
        is new keeps the random state it has.

        Raises:
            CheckpointError: it is of another model, or lacks something; names the first difference.
        """
        load_weights(self.model, saved.get('model'), source)
        try:
            # The momenta are the checkpoint's; learning rate, decay and the like are this run's.
            groups = [{**group, 'params': saved_group['params']} for group, saved_group
                      in zip(self.optimizer.param_groups, saved['optimizer']['param_groups'])]
            self.optimizer.load_state_dict({**saved['optimizer'], 'param_groups': groups})
            self.scaler.load_state_dict(saved['scaler'])
            for name in self._plain:
                setattr(self, name, saved[name])
            processes = saved['processes']
            if rank < len(processes):
                self._set_random_state(processes[rank]['rng'])
            sums = torch.stack([process['interval'] for process in processes])
            if len(processes) == world_size:
                self.interval.copy_(sums[rank])
            else:
                loss, errors, _ = sums.sum(0) if rank == 0 else sums.new_zeros(3)
                self.interval.copy_(torch.stack([loss, errors, sums[:, 2].min()]))
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f'{source} cannot be resumed from: '
                                  f'{type(error).__name__}: {_one_line(error)}') from error


def save(path, state, **extra):
    """Write `state` and what else is given; complete and on the disk before it takes its name."""
    with replacing(path) as file:
        torch.save({**state, **extra}, file)


def load(path):
    """The dictionary that a checkpoint holds, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, or not a checkpoint, or one that would run code.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its flags in one
            saved = torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f'{path} is not there: --resume and --pretrained take the path of a '
                              f'checkpoint, such as work/cifar10.base/latest.pth') from error
    except OSError as error:
        raise CheckpointError(f'{path} cannot be read: {error.strerror}') from error
    except Exception as error:  # whatever a file that is no checkpoint makes the reader stumble on
        raise CheckpointError(f'{path} is not a checkpoint, or a broken one '
                              f'({type(error).__name__})') from error
    if not isinstance(saved, dict):
        raise CheckpointError(f'{path} is not a checkpoint: it holds a {type(saved).__name__}')
    return saved


def load_weights_file(path):
    """The state dict in a file: our checkpoint, or one of torchvision or timm, bare or not.

    Raises:
        CheckpointError: as `load`; or it is a .safetensors file, and the package is not there.
    """
    if Path(path).suffix == '.safetensors':  # as timm's weights come
        try:
            from safetensors.torch import load_file

            return load_file(path)
        except Exception as error:  # not installed, no such file, a broken one
            raise CheckpointError(f'{path} cannot be read: {_one_line(error)}') from error
    saved = load(path)
    return next((saved[key] for key in ('model', 'state_dict') if key in saved), saved)


def load_weights(model, weights, source):
    """Load a state dict into `model`.

    Raises:
        CheckpointError: the two don't fit; names the first difference.
    """
    if not isinstance(weights, dict) or not all(torch.is_tensor(w) for w in weights.values()):
        raise CheckpointError(f'{source} holds no weights of a model')
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(f'{source} is of another architecture: '
                              f'{_first_difference(str(error))}') from error


def _first_difference(message):
    """The first of the complaints in the message of nn.Module.load_state_dict."""
    size = re.search(r'size mismatch for (\S+): .* shape torch.Size\((.*?)\) from checkpoint, .* '
                     r'torch.Size\((.*?)\)', message)
    missing = re.search(r'Missing key\(s\) in state_dict: "(.*?)"', message)
    unexpected = re.search(r'Unexpected key\(s\) in state_dict: "(.*?)"', message)
    if missing:
        return f'it has no {missing[1]}'
    if unexpected:
        return f'it has {unexpected[1]}, and this model has not'
    if size:
        return f'{size[1]} is {size[2]} there and {size[3]} here'
    return _one_line(message)


def _one_line(text):
    return ' '.join(str(text).split())


@contextlib.contextmanager
def replacing(path):
    """A binary file that takes the place of `path` once it is whole; an error changes nothing."""
    path = Path(path)
    temporary = path.with_name(f'.{path.name}.tmp')  # a killed run leaves at most this one behind
    try:
        with open(temporary, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno and not error.filename:  # a write names none
            error.filename = str(path)
        raise
    directory = os.open(path.parent, os.O_RDONLY)
    os.fsync(directory)  # the rename itself
    os.close(directory)
