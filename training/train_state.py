"""Everything that training changes, which a checkpoint therefore holds.

    state = TrainState(model, optimizer, scaler, sums=torch.zeros(2, device=device))
    with state.dry_run():
        train_step(...)           # changes nothing
    state.state_dict()
"""

import contextlib
import dataclasses
import inspect
import math

import torch

from training.averages import WeightAverages


@dataclasses.dataclass
class TrainState:
    """Model, optimizer, loss scale, counters, and the sums since the last row of train.csv.

    Those sums stay on the device, so that no step synchronizes with the GPU. Sums and random state
    are per rank.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: torch.Tensor         # float32 [2]: loss and errors of this rank since the last row
    averages: WeightAverages = None
    interval_images: int = 0   # since the last row, over all ranks
    epoch_sums: tuple = (0.0, 0.0, 0)  # loss, errors, images in this epoch's rows, over all ranks
    epoch: int = 1             # counted from 1
    step: int = 0              # completed steps of this epoch
    last_error: float = math.nan  # percent, at the end of the last epoch
    best_score: float = math.inf  # the lowest value so far of the metric that --best-by names
    best_error: float = math.inf  # percent, in that epoch
    best_epoch: int = 0
    seconds: float = 0.0       # of training, evaluation and saving, over all resumed runs
    peak_memory: int = 0       # bytes allocated on rank 0's GPU

    def counters(self):
        """The fields with plain values, which are those with a default."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)
                if field.default not in (dataclasses.MISSING, None)}

    def begin_epoch(self, epoch):
        self.epoch, self.step, self.epoch_sums = epoch, 0, (0.0, 0.0, 0)
        self.begin_interval()

    def begin_interval(self):
        self.sums.zero_()
        self.interval_images = 0

    def count_step(self, num_images):
        self.step += 1
        self.interval_images += num_images

    def tested_weights(self):
        """A context in which the model has the weights to test: the averages, if there are any."""
        return self.averages.in_use() if self.averages else contextlib.nullcontext()

    def random_state(self):
        """The states of the CPU's and the device's generators, by device type."""
        kind = self.sums.device.type
        state = {'cpu': torch.get_rng_state()}
        if kind != 'cpu':
            state[kind] = torch.get_device_module(kind).get_rng_state()
        return state

    def set_random_state(self, state):
        """Restore `random_state()`; only the CPU's if it was saved on another type of device."""
        kind = self.sums.device.type
        torch.set_rng_state(state['cpu'])
        if kind != 'cpu' and state.get(kind) is not None:
            torch.get_device_module(kind).set_rng_state(state[kind])

    def reset_best(self):
        self.best_score, self.best_error, self.best_epoch = math.inf, math.inf, 0

    @contextlib.contextmanager
    def dry_run(self):
        """A context in which steps can be taken; at its end, the state is restored in place.

        The optimizer must be initialized (`initialize_optimizer`), because a CUDA graph keeps the
        addresses of its tensors.
        """
        optimizer = self.optimizer.state
        tensors = (*self.model.state_dict().values(), self.sums,
                   *(value for values in optimizer.values() for value in values.values()
                     if torch.is_tensor(value)))
        before = [(tensor, tensor.clone()) for tensor in tensors]
        entries = {parameter: dict(values) for parameter, values in optimizer.items()}
        scaler, random_state = self.scaler.state_dict(), self.random_state()
        yield
        assert {p: set(values) for p, values in optimizer.items()} == {
            p: set(values) for p, values in entries.items()}, 'a step created optimizer state'
        for tensor, value in before:
            tensor.copy_(value)
        for parameter, values in entries.items():
            optimizer[parameter].update(values)
        self.scaler.load_state_dict(scaler)
        self.set_random_state(random_state)

    def rank_state(self):
        """The per-rank part of the state."""
        return {'interval': self.sums.cpu(), 'rng': self.random_state()}

    def state_dict(self, rank_states=None):
        """The content of a checkpoint; `rank_states` has the `rank_state()` of each rank."""
        state = {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(), 'processes': rank_states or [self.rank_state()],
            **self.counters(),
        }
        if self.averages:  # `model` has the weights that were tested
            state.update(model=self.averages.state_dict(), trained_model=state['model'],
                         average_updates=self.averages.updates)
        return state


def initialize_optimizer(optimizer):
    """Create the state (momenta, step counts) that the first step would create.

    torch.optim creates it in `_init_group`, for parameters that have a gradient. SGD creates its
    momentum elsewhere: see `train.make_optimizer`.
    """
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter)
        if hasattr(optimizer, '_init_group'):
            arguments = inspect.signature(optimizer._init_group).parameters
            optimizer._init_group(group, *([] for _ in range(len(arguments) - 1)))
    optimizer.zero_grad()
