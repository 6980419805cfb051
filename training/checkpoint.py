"""Checkpoints: what training changes, saved so that a file is either the old one or the new one.

    state = TrainState(model, optimizer, scaler, sums=torch.zeros(2, device=device))
    save('work/x/latest.pth', {**state.state_dict(), 'args': vars(args)}, keep_previous=True)
    path, saved = load_newest('work/x/latest.pth')    # or latest.pth.1, if that one is damaged
    resume(state, saved, args, num_images=50_000)

A checkpoint holds tensors and plain values alone, so that loading one can't run code. The model's
state dict is `torch.load(path, map_location='cpu', weights_only=True)['model']`.
"""

import argparse
import contextlib
import dataclasses
import inspect
import io
import math
import os
import textwrap
from pathlib import Path

import torch

from training import datasets, distributed, flags, weights
from training.averages import WeightAverages
from training.console import UserError, say, warn
from training.datasets import DATASETS

# A run can't be resumed if one of these flags, or one of the network's, changes.
FIXED_FLAGS = ('optimizer', 'freeze_features', 'freeze_norm', 'head_lr', 'ema', 'best_by',
               'val_split', 'fold', 'mean', 'std')


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged or of another model."""


@dataclasses.dataclass
class TrainState:
    """The state of training, all of which a checkpoint holds.

    An interval is what has come after the last row of train.csv. Its sums stay on the device, so
    that no step synchronizes with it; sums and random state are per process.
    """

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    sums: torch.Tensor         # float32 [2]: loss and errors of this process in the interval
    averages: WeightAverages = None
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
        if self.averages:
            self.averages.update()

    def tested_weights(self):
        """A context in which the model has the weights to test: the averages, if there are any."""
        return self.averages.in_use() if self.averages else contextlib.nullcontext()

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

    def forget_best(self):
        self.best_score, self.best_error, self.best_epoch = math.inf, math.inf, 0

    @contextlib.contextmanager
    def rehearsal(self):
        """Undo, in place, what the steps within this context change.

        The optimizer's state must exist already (`initialize_optimizer`): a CUDA graph keeps the
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
            p: set(values) for p, values in entries.items()}, 'a step made new optimizer state'
        for tensor, value in before:
            tensor.copy_(value)
        for parameter, values in entries.items():
            optimizer[parameter].update(values)
        self.scaler.load_state_dict(scaler)
        self.set_random_state(random_state)

    def own_state(self):
        """What is this process's alone."""
        return {'interval': self.sums.cpu(), 'rng': self.random_state()}

    def state_dict(self, own_states=None):
        """What a checkpoint holds; `own_states` has the `own_state()` of each process, by rank."""
        state = {
            'model': self.model.state_dict(), 'optimizer': self.optimizer.state_dict(),
            'scaler': self.scaler.state_dict(), 'processes': own_states or [self.own_state()],
            **self.counters(),
        }
        if self.averages:  # `model` has the weights that were tested
            state.update(model=self.averages.state_dict(), trained_model=state['model'],
                         average_updates=self.averages.updates)
        return state


def initialize_optimizer(optimizer):
    """Make the state that the first step would make (momenta, step counts), with its first values.

    torch.optim makes it in `_init_group`, the first time that a parameter has a gradient. SGD makes
    its momentum elsewhere: see `train.make_optimizer`.
    """
    for group in optimizer.param_groups:
        for parameter in group['params']:
            parameter.grad = torch.zeros_like(parameter)
        if hasattr(optimizer, '_init_group'):
            arguments = inspect.signature(optimizer._init_group).parameters
            optimizer._init_group(group, *([] for _ in range(len(arguments) - 1)))
    optimizer.zero_grad()


# ---- resuming --------------------------------------------------------------------------------

def with_saved_flags(given, parser=None):
    """All flags, and what the checkpoint of --resume holds (None without --resume).

    --resume without a path goes on from latest.pth of the run directory, and begins a new run if
    there is none, so that one command can be given again and again (torchrun --max-restarts).
    `args.resume` becomes the path of the checkpoint.

    Raises:
        UserError: flags that don't go together.
        CheckpointError: a checkpoint that can't be read.
    """
    args = flags.with_defaults(given, parser)
    if args.resume is None:
        return flags.complete(given, parser=parser), None
    path = Path(args.resume or flags.run_directory(args))
    if path.is_dir() or not args.resume:
        path /= 'latest.pth'
    if not (args.resume or args.evaluate or path.exists() or Path(f'{path}.1').exists()):
        say(f'nothing to resume in {path.parent}: this run begins there')
        given = argparse.Namespace(**{**vars(given), 'resume': None})
        return flags.complete(given, parser=parser), None
    found, saved = load_newest(path)
    if found != str(path):
        warn(f'{path} is damaged or missing: going on from the one before, {found}')
    if not all(isinstance(saved.get(key), dict) for key in ('args', 'dataset', 'model')):
        raise CheckpointError(f'{found} holds no run to resume; for weights alone --pretrained')
    check_claims(saved, found)
    saved_flags = dict(saved['args'])
    if not (args.resume or args.evaluate):  # the same command again: --pretrained has done its work
        given = argparse.Namespace(**{flag: value for flag, value in vars(given).items()
                                      if flag not in ('pretrained', 'reset_classifier')})
    if args.evaluate and any(is_another_path(given, saved_flags, flag)
                             for flag in ('data', 'labels')):
        for flag in ('labels', 'val_split', 'fold'):  # of other data, all images are for testing
            saved_flags.pop(flag, None)
    given = argparse.Namespace(**{**vars(given), 'resume': found})
    return flags.complete(given, saved_flags, parser), saved


def is_another_path(given, saved_flags, flag):
    """Whether a path is given, and is not the checkpoint's."""
    path, before = getattr(given, flag, None), saved_flags.get(flag)
    return path is not None and (before is None or Path(path).resolve() != Path(before).resolve())


def check_claims(saved, source):
    """Check what a checkpoint claims of its network and its images, before they take memory.

    Raises:
        CheckpointError: it does not say what they are, has values that the command line would
            refuse, or more layers than weights.
    """
    if not all(isinstance(saved.get(key), dict) for key in ('config', 'dataset', 'model')):
        raise CheckpointError(f'{source} holds no run: its network or its classes are unknown')
    config, model = saved['config'], saved['model']
    with explained(f'{source} is no checkpoint of train.py, or an altered one'):
        dataset = datasets.Description(root=None, **saved['dataset'])
        needed = {'dataset': dataset.name, 'image_size': dataset.image_size, 'mean': dataset.mean,
                  'std': dataset.std}
        if (None in needed.values() or len(dataset.classes) != config['num_classes']
                or not all(isinstance(name, str) for name in dataset.classes)):
            raise ValueError(f'its data set is {saved["dataset"]}')
        flags.check_values({**needed, 'val_split': dataset.val_split, 'seed': dataset.split_seed,
                            'value_range': dataset.value_range}, flags.make_parser())
        if not len(dataset.mean) == len(dataset.std) == config['in_channels']:
            raise ValueError(f'it has statistics of {len(dataset.mean)} channels, and images of '
                             f'{config["in_channels"]}')
        args = saved.get('args') or {}
        layers = max(args.get('depth') or 0, sum(args.get('block_config') or ()),
                     sum(config['block_config']))
        if layers > len(model):
            raise ValueError(f'it has {layers} layers, and {len(model)} weights')


def check_network(build, state_dict, source):
    """Check that a state dict is of the network that `build()` makes, before that takes memory.

    Raises:
        CheckpointError: the two don't fit; names the first differences.
    """
    with explained(f'{source} does not fit the model'), torch.device('meta'):
        model = build()
        for name, tensor in model.state_dict().items():
            kind = state_dict[name].dtype if name in state_dict else tensor.dtype
            if kind.is_floating_point != tensor.is_floating_point():  # other floats are converted
                raise ValueError(f'{name} is {kind} in the file and {tensor.dtype} here')
        # A copy, because torch would keep `assign` in the state dict's metadata for later loads.
        model.load_state_dict(dict(state_dict), assign=True)


def describe_data(args, saved):
    """The data set that the flags name, read as it was for the checkpoint if there is one.

    Raises:
        DataError: as `datasets.describe`.
        CheckpointError: the checkpoint was trained on other classes.
    """
    trained_on = saved['dataset'] if saved else {}
    image_size = args.image_size
    if saved and args.dataset != trained_on['name'] and DATASETS[args.dataset].read:
        image_size = None  # args has the checkpoint's size, and this data set has its own
    dataset = datasets.describe(
        args.dataset, args.data, image_size, 'test' if args.evaluate else 'train',
        in_channels=args.in_channels, value_range=args.value_range or trained_on.get('value_range'),
        labels_file=args.labels, val_split=args.val_split, fold=args.fold,
        seed=trained_on.get('split_seed', args.seed), workers=args.workers)
    if saved:
        known, found = tuple(trained_on['classes']), dataset.classes
        if dataset.multi_label != trained_on.get('multi_label', False):
            kinds = 'several labels an image', 'one class an image'
            was, now = kinds if trained_on.get('multi_label') else reversed(kinds)
            raise CheckpointError(f'{args.resume} was trained on {was}, and {args.dataset} in '
                                  f'{args.data} has {now}: --labels names a table of them')
        if set(found) - set(known) or not args.evaluate and known != found:
            differing = min(set(found) ^ set(known), default=None)
            what = f'{differing} is in only one of them' if differing else 'in another order'
            raise CheckpointError(f'{args.resume} was trained on other classes than those of '
                                  f'{args.dataset} in {args.data}: {what}')
        dataset = dataclasses.replace(dataset, classes=known, mean=trained_on['mean'],
                                      std=trained_on['std'])
    for flag in ('mean', 'std'):
        values = getattr(args, flag)
        if values is None:
            continue
        if len(values) not in (1, args.in_channels):
            raise UserError(f'--{flag} takes a value for each of {args.in_channels} channels, or '
                            f'one for all')
        values = values * (args.in_channels // len(values))
        dataset = dataclasses.replace(dataset, **{flag: tuple(255 * value for value in values)})
    return dataset


def resume(state, saved, args, train_loader, test_loader):
    """Continue where the checkpoint was, or at the beginning of --start-epoch.

    Must stay the same: the network, the classes, the normalisation, and `FIXED_FLAGS`; within an
    epoch also the number of training images, the batch size and the seed. All other flags may
    change; `train.warn_of_new_rate` says when that changes the learning rate. With another number
    of processes, rank 0 takes over the sums of all, and new processes keep their random state.
    On the CPU, a resumed run is bit-identical to an uninterrupted one with the same number of
    threads and the same kernels; other kernels are a warning (networks.warn_of_other_kernels).

    Other training images are a warning; with other test images, so is a new search for the best
    epoch.

    Args:
        state: a new TrainState, whose optimizer is initialized.
        test_loader: of the images that choose best.pth.

    Raises:
        CheckpointError: it is of another model, damaged, holds weights alone, or was saved within
            an epoch of other batches.
    """
    source, rank, world_size = args.resume, distributed.rank(), distributed.world_size()
    check_fixed_flags(args, saved['args'], FIXED_FLAGS)
    load_weights(state.model, saved.get('trained_model', saved['model']), source)
    if 'optimizer' not in saved:
        raise CheckpointError(f'{source} holds weights alone: --pretrained {source} starts '
                              f'training from them')
    with explained(f'{source} can\'t be resumed'):
        load_optimizer(state.optimizer, saved['optimizer'])
        load_scaler(state.scaler, saved['scaler'], source)
        if state.averages:
            state.averages.load(saved['model'], saved['average_updates'])
        counters = {name: saved[name] for name in state.counters()}
        if kinds(counters) != kinds(state.counters()):
            raise CheckpointError('its counters are of other types')
        vars(state).update(counters)
        processes = saved['processes']
        if rank < len(processes):
            state.set_random_state(processes[rank]['rng'])
        sums = torch.stack([process['interval'] for process in processes])
        state.sums.copy_(sums[rank] if len(processes) == world_size else sums.sum(0) * (rank == 0))
    if args.start_epoch:
        state.begin_epoch(args.start_epoch)
    warn_of_other_images(state, saved, train_loader, test_loader)
    num_images = train_loader.num_images
    before = saved.get('num_images'), saved['args'].get('batch_size'), saved['args'].get('seed')
    if state.step and before != (num_images, args.batch_size, args.seed):
        raise CheckpointError(
            f'{source} was written within an epoch of {before[0]} images in batches of {before[1]} '
            f'with --seed {before[2]}, and cannot go on in one of {num_images} in batches of '
            f'{args.batch_size} with --seed {args.seed}; --start-epoch {state.epoch} begins it '
            f'anew')


def kinds(values):
    """What has to be the same in state to load: types of values, shapes and dtypes of tensors."""
    if isinstance(values, dict):
        return {key: kinds(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return [*map(kinds, values)]
    if torch.is_tensor(values):
        return values.shape, values.dtype, values.layout
    return type(values)


def load_scaler(scaler, saved, source):
    """Load the scale of fp16, which a run in another precision does not have."""
    new = scaler.state_dict()
    if new and not saved:
        warn(f'{source} was not trained in fp16: the scale of the loss begins at '
             f'{scaler.get_scale():g}')
        return
    if kinds(saved) != kinds(new) and new:
        raise CheckpointError('its loss scale is not valid')
    scaler.load_state_dict(saved)


def warn_of_other_images(state, saved, train_loader, test_loader):
    """Compare the lists of images with those of the checkpoint; forget a best that is another's."""
    now = digests(train_loader, test_loader)
    before = saved.get('digests', now)
    for split, digest in now.items():
        if before[split] == digest:
            continue
        consequence = ''
        if split == 'test':
            state.forget_best()
            consequence = '; best.pth is chosen anew'
        if distributed.rank() == 0:
            warn(f'the {split} images are not those of the checkpoint: some were added, removed, '
                 f'renamed or relabelled{consequence}')


def digests(train_loader, test_loader):
    return {'train': train_loader.digest, 'test': test_loader.digest}


def load_optimizer(optimizer, saved):
    """Load momenta and the like, but keep this run's learning rate, weight decay etc.

    Shapes and types are compared first, since torch's fused optimizers check nothing: a wrong one
    would end the process by a signal. They also walk memory whatever its strides, so that each
    tensor must be laid out as its parameter.
    """
    new = optimizer.state_dict()
    if kinds(saved['state']) != kinds(new['state']):
        raise CheckpointError('the state of its optimizer does not fit the network')
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': new['param_groups']})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                layout = torch.empty_like(parameter, dtype=value.dtype)
                values[key] = layout.copy_(value)


def check_fixed_flags(args, saved_flags, names):
    """Raises CheckpointError if one of these flags is not what it was."""
    for flag in names:
        now = getattr(args, flag)
        before = saved_flags.get(flag, now)
        if now != before:
            raise CheckpointError(f'{args.resume} cannot go on with another {flag}: its own is '
                                  f'{before}, not {now}')


# ---- files -----------------------------------------------------------------------------------

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
    if os.name != 'nt':  # Windows can't open a directory
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the rename itself
        os.close(directory)


def load(path):
    """The dictionary that a checkpoint holds, its tensors on the CPU.

    Raises:
        CheckpointError: no such file, not a checkpoint, a damaged one, or one that would run code.
    """
    try:
        weights.check_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # timm keeps its flags so
            saved = torch.load(path, map_location='cpu', weights_only=True)
    except UserError as error:
        raise CheckpointError(str(error)) from error
    except MemoryError:
        raise
    except Exception as error:  # a file that is no checkpoint makes the reader fail in any way
        raise CheckpointError(f'{path} is not a checkpoint, or a damaged one '
                              f'({type(error).__name__})') from error
    if not isinstance(saved, dict):
        raise CheckpointError(f'{path} is not a checkpoint: it holds a {type(saved).__name__}')
    return saved


def load_newest(path):
    """Load `path`, or the previous one if it is damaged or missing; returns path and content.

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
    """Turn any error into a CheckpointError: what failed, and the beginning of its message."""
    try:
        yield
    except Exception as error:  # torch may name hundreds of weights in it
        raise CheckpointError(f'{what}: {textwrap.shorten(str(error), 250)}') from error


def load_weights(model, state_dict, source):
    """Load a state dict into `model`.

    Raises:
        CheckpointError: the two don't fit; names the first differences.
    """
    with explained(f'{source} does not fit the model'):
        model.load_state_dict(state_dict)


def check_finite(model, source):
    """Raises CheckpointError if a weight or running statistic is not finite."""
    name = first_not_finite(model)
    if name:
        raise CheckpointError(f'{source} has weights that are not finite, the first in {name}: '
                              f'use an earlier checkpoint')


def first_not_finite(model):
    """The name of the first parameter or running statistic that is not finite, or None."""
    tensors = {name: value for name, value in model.state_dict().items()
               if value.is_floating_point()}
    # Sums of absolute values, because sums of squares overflow before the numbers do.
    bad = ~torch.stack(torch._foreach_norm([*tensors.values()], 1)).isfinite()
    return [*tensors][bad.int().argmax()] if bad.any() else None
