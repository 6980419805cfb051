"""Checkpoints: saved atomically, loaded without running code, and resumed.

    save('work/x/latest.pth', {**state.state_dict(), 'args': vars(args)}, keep_previous=True)
    args, saved = with_saved_flags(flags.parse(['--resume', 'work/x/latest.pth']))
    resume(state, saved, args, train_loader, eval_loader)

A checkpoint holds only tensors and plain values. The model's state dict is
`torch.load(path, map_location='cpu', weights_only=True)['model']`.
"""

import argparse
import contextlib
import dataclasses
import io
import os
from pathlib import Path

import torch

from training import datasets, distributed, flags, image_files, torch_files
from training.console import UserError, explain_errors, say, warn
from training.datasets import DATASETS
from training.files import replace_file

# Flags that must not change on resume, in addition to flags.MODEL_FLAGS.
FIXED_FLAGS = ('optimizer', 'freeze_features', 'freeze_norm', 'head_lr', 'ema', 'best_by',
               'val_split', 'fold', 'mean', 'std', 'value_range')


# ---- resuming --------------------------------------------------------------------------------

def with_saved_flags(given, parser=None):
    """All flags, and the content of the checkpoint of --resume (None without --resume).

    --resume without a path resumes latest.pth of the run directory, or starts a new run if there is
    none, so that the same command can be repeated (torchrun --max-restarts). `args.resume` becomes
    the path of the checkpoint.

    Raises:
        UserError: contradictory flags, or a checkpoint that can't be read.
    """
    args = flags.with_defaults(given, parser)
    if args.resume is None:
        return flags.complete(given, parser=parser), None
    path = Path(args.resume or flags.run_directory(args))
    if path.is_dir() or not args.resume:
        path /= 'latest.pth'
    if not (args.resume or args.evaluate or path.exists() or Path(f'{path}.1').exists()):
        say(f'nothing to resume in {path.parent}: starting a new run')
        given = argparse.Namespace(**{**vars(given), 'resume': None})
        return flags.complete(given, parser=parser), None
    found, saved = load_newest(path)
    if found != str(path):
        warn(f'{path} is damaged or missing: resuming the previous one, {found}')
    if not all(isinstance(saved.get(key), dict) for key in ('args', 'dataset', 'model')):
        raise UserError(f'{found} holds no run to resume; --pretrained loads weights')
    check_contents(saved, found)
    saved_flags = dict(saved['args'])
    if not (args.resume or args.evaluate):  # a repeated command: --pretrained was for the start
        given = argparse.Namespace(**{flag: value for flag, value in vars(given).items()
                                      if flag not in ('pretrained', 'reset_classifier')})
    others = other_data(given, saved_flags) if args.evaluate else ''
    if others and not has_same_training_images(given, saved):
        held_out = saved_flags.get('val_split') or saved_flags.get('fold')
        # Test on all images of other data.
        dropped = [f'--{flag.replace("_", "-")}' for flag in ('labels', 'val_split', 'fold')
                   if saved_flags.pop(flag, None) and getattr(given, flag, None) is None]
        if dropped:
            warn(f'ignoring {" and ".join(dropped)} of {found}, because {others} has not the '
                 f'images that it was trained on')
        if held_out and getattr(given, 'labels', None) is not None:
            warn(f'{given.labels}: images that {found} was trained on, if there are any, make the '
                 f'result too good')
    if others and not (args.save or args.name):  # keep the report on the run's own data
        given.save = str(path.parent / f'on-{others}')
    args = flags.complete(argparse.Namespace(**{**vars(given), 'resume': found}), saved_flags,
                          parser)
    if args.evaluate:  # another split would test on training images
        check_fixed_flags(args, saved_flags, ('val_split', 'fold'))
    return args, saved


def other_data(given, saved_flags):
    """A name for the data that are given, if they are not those of the checkpoint, or ''."""
    names = []
    if getattr(given, 'dataset', None) not in (None, saved_flags.get('dataset')):
        names.append(given.dataset)
    for flag in ('data', 'labels'):
        path, before = getattr(given, flag, None), saved_flags.get(flag)
        if path is not None and (before is None or Path(path).resolve() != Path(before).resolve()):
            path = Path(path).resolve()
            names.append(path.name if flag == 'data' else path.stem)
    return '-'.join(names)


def has_same_training_images(given, saved):
    """True if the given data are those of the checkpoint in another place, such as a machine.

    Compares names and labels of the training images, with the checkpoint's flags where none are
    given. False if the training images are missing.
    """
    args = flags.with_defaults(argparse.Namespace(**{**saved['args'], **vars(given)}))
    if args.dataset != saved['args'].get('dataset') or 'digests' not in saved:
        return False
    if DATASETS[args.dataset].read:
        return True
    try:
        dataset = describe_data(argparse.Namespace(**{**vars(args), 'evaluate': False}), saved)
        return image_files.list_images(dataset, 'train').digest() == saved['digests']['train']
    except UserError:
        return False


def check_contents(saved, source):
    """Raises UserError if a checkpoint lacks the network, or has data of an unknown kind."""
    if not all(isinstance(saved.get(key), dict) for key in ('config', 'dataset', 'model')):
        raise UserError(f'{source} holds no run: it lacks the network or the classes')
    with explain_errors(f'{source} is not a checkpoint of this version of train.py'):
        datasets.Description(root=None, **saved['dataset'])


def check_network(build, state_dict, source):
    """Check that a state dict fits the network that `build()` returns, without allocating memory.

    Raises:
        UserError: it does not fit; names the first differences.
    """
    with explain_errors(f'{source} does not fit the model'), torch.device('meta'):
        model = build()
        for name, tensor in model.state_dict().items():
            kind = state_dict[name].dtype if name in state_dict else tensor.dtype
            if kind.is_floating_point != tensor.is_floating_point():  # other floats are converted
                raise ValueError(f'{name} is {kind} in the file and {tensor.dtype} here')
        # A copy, because torch would store `assign` in the state dict's metadata.
        model.load_state_dict(dict(state_dict), assign=True)


def describe_data(args, saved):
    """The data set that the flags name, with the classes and statistics of a checkpoint, if any.

    Raises:
        UserError: as in `datasets.describe`, or the checkpoint was trained on other classes.
    """
    trained_on = saved['dataset'] if saved else {}
    image_size = args.image_size
    if saved and args.dataset != trained_on['name'] and DATASETS[args.dataset].read:
        image_size = None  # args has the checkpoint's size, and this data set has its own
    dataset = datasets.describe(
        args.dataset, args.data, image_size, 'test' if args.evaluate else 'train',
        in_channels=args.in_channels, value_range=args.value_range or trained_on.get('value_range'),
        labels_file=args.labels, val_split=args.val_split, fold=args.fold,
        seed=trained_on.get('split_seed', args.seed), workers=flags.num_workers(args))
    if saved:
        check_classes(dataset, trained_on, args)
        dataset = dataclasses.replace(dataset, classes=tuple(trained_on['classes']),
                                      mean=trained_on['mean'], std=trained_on['std'])
        if args.evaluate:
            warn_of_other_held_out_images(dataset, saved, args.resume)
            if dataset.value_range:
                images = image_files.list_images(dataset, 'test')
                image_files.warn_of_other_values(
                    dataset, image_files.some_readable(images, len(dataset.mean), count=7))
    return datasets.with_statistics(dataset, args.mean, args.std)


def check_classes(dataset, trained_on, args):
    """Raises UserError if a checkpoint was trained on other classes than those of the data."""
    known, found = tuple(trained_on['classes']), dataset.classes
    where = f'{args.dataset} in {args.data}'
    if dataset.multi_label != trained_on.get('multi_label', False):
        kinds = 'several labels an image', 'one class an image'
        was, now = kinds if trained_on.get('multi_label') else reversed(kinds)
        raise UserError(f'{args.resume} was trained on {was}, and {where} has {now}: --labels '
                        f'names a table of them')
    if set(found) - set(known) or not args.evaluate and known != found:
        differing = min(set(found) ^ set(known), default=None)
        what = f'{differing} is in only one of them' if differing else 'in another order'
        raise UserError(f'{args.resume} was trained on other classes than those of {where}: {what}')


def resume(state, saved, args, train_loader, eval_loader):
    """Continue where the checkpoint was saved, or at the beginning of --start-epoch.

    Must not change: the network and the classes (checked before, by `check_network` and
    `check_classes`), `FIXED_FLAGS`, and within an epoch the number of training images, the batch
    size and the seed. All other flags may change; `train.warn_of_new_rate` warns if that changes
    the learning rate. With another number of processes, rank 0 takes over all sums, and additional
    ranks start with a new random state. On the CPU, a resumed run is bit-identical to an
    uninterrupted one, given the same number of threads and the same kernels; other kernels are a
    warning (`networks.warn_of_other_kernels`).

    Other training images are a warning. Other images that choose best.pth, another --image-size and
    another --ten-crop also reset the best epoch.

    Args:
        state: a new TrainState with an initialized optimizer.
        saved: a checkpoint that has passed `check_contents` and `check_network`.
        eval_loader: of the images that choose best.pth (see make_loaders in train.py).

    Raises:
        UserError: the checkpoint is of another model, damaged, holds only weights, or was saved
            in mid-epoch with another number of images, batch size or seed.
    """
    source, rank, world_size = args.resume, distributed.rank(), distributed.world_size()
    check_fixed_flags(args, saved['args'], FIXED_FLAGS)
    if 'optimizer' not in saved:
        raise UserError(f'{source} holds only weights: --pretrained {source} starts training from '
                        f'them')
    with explain_errors(f'{source} can\'t be resumed'):
        state.model.load_state_dict(saved.get('trained_model', saved['model']))
        load_optimizer(state.optimizer, saved['optimizer'])
        load_scaler(state.scaler, saved['scaler'], source)
        if state.averages:
            state.averages.load(saved['model'], saved['average_updates'])
        vars(state).update({name: saved[name] for name in state.counters()})
        processes = saved['processes']
        if rank < len(processes):
            state.set_random_state(processes[rank]['rng'])
        sums = torch.stack([process['interval'] for process in processes])
        if len(processes) == world_size:
            state.sums.copy_(sums[rank])
        elif rank == 0:
            state.sums.copy_(sums.sum(0))
    if args.start_epoch:
        state.begin_epoch(args.start_epoch)
    warn_of_other_images(state, saved, args, train_loader, eval_loader)
    now = train_loader.num_images, args.batch_size, args.seed
    before = saved.get('num_images'), saved['args'].get('batch_size'), saved['args'].get('seed')
    if state.step and before != now:
        texts = ['{} images in batches of {} with --seed {}'.format(*values)
                 for values in (before, now)]
        raise UserError(f'{source} was saved within an epoch of {texts[0]}, and can\'t be resumed '
                        f'with {texts[1]}; --start-epoch {state.epoch} starts that epoch again')


def structure(values):
    """Types of values, and shapes and dtypes of tensors, of nested dicts and tuples."""
    if isinstance(values, dict):
        return {key: structure(value) for key, value in values.items()}
    if isinstance(values, tuple):
        return [*map(structure, values)]
    if torch.is_tensor(values):
        return values.shape, values.dtype, values.layout
    return type(values)


def load_scaler(scaler, saved, source):
    """Load the loss scale of fp16, which is missing if the run used another precision."""
    new = scaler.state_dict()
    if new and not saved:
        warn(f'{source} was not trained in fp16: the loss scale starts at '
             f'{scaler.get_scale():g}')
        return
    if structure(saved) != structure(new) and new:
        raise UserError('its loss scale is not valid')
    scaler.load_state_dict(saved)


def warn_of_other_images(state, saved, args, train_loader, eval_loader):
    """Warn if images, or how they are tested, have changed since the checkpoint."""
    now = digests(train_loader, eval_loader)
    before = saved.get('digests', now)
    sizes = [datasets.sides(size) for size in (saved['dataset']['image_size'], args.image_size)]
    is_done = state.epoch > args.epochs  # best.pth stays what it is
    if not is_done and (sizes[0] != sizes[1] or
                        args.ten_crop != saved['args'].get('ten_crop', args.ten_crop)):
        state.reset_best()
        if distributed.rank() == 0:
            warn('--image-size or --ten-crop has changed, and with it the results: best.pth is '
                 'chosen anew')
    for split, digest in now.items():
        if before[split] == digest:
            continue
        which, consequence = 'training images', ''
        if split == 'test':  # those of val, if there are any
            which = 'images that choose best.pth'
            if not is_done:
                state.reset_best()
                consequence = ', and it is chosen anew'
            if args.val_split or args.fold:
                consequence += '; some that are now held out may have been trained on'
        if distributed.rank() == 0:
            warn(f'the {which} are not those of the checkpoint: some were added, removed, renamed '
                 f'or relabelled{consequence}')


def warn_of_other_held_out_images(dataset, saved, source):
    """Warn if the images held out for an evaluation are not those of the checkpoint."""
    split = dataset.selection_split
    if dataset.is_divided(split) and DATASETS[dataset.name].read is None and 'digests' in saved:
        if image_files.list_images(dataset, split).digest() != saved['digests']['test']:
            warn(f'the held out images are not those of {source}: some images were added, removed, '
                 f'renamed or relabelled, and it may have been trained on some that are now held '
                 f'out')


def digests(train_loader, eval_loader):
    return {'train': train_loader.digest, 'test': eval_loader.digest}


def load_optimizer(optimizer, saved):
    """Load the optimizer's state (momenta etc.); keep this run's learning rate, weight decay etc.

    torch's fused optimizers check neither shapes nor strides: a wrong shape would crash the
    process, and each tensor must have the memory layout of its parameter.
    """
    new = optimizer.state_dict()
    if structure(saved['state']) != structure(new['state']):
        raise UserError('the state of its optimizer does not fit the network and --momentum')
    optimizer.load_state_dict({'state': saved['state'], 'param_groups': new['param_groups']})
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            if torch.is_tensor(value) and value.shape == parameter.shape:
                layout = torch.empty_like(parameter, dtype=value.dtype)
                values[key] = layout.copy_(value)


def check_fixed_flags(args, saved_flags, names):
    """Raises UserError if one of these flags has changed."""
    for flag in names:
        now = getattr(args, flag)
        before = saved_flags.get(flag, now)
        if now != before:
            verb = 'evaluated' if args.evaluate else 'resumed'
            name = 'no-bottleneck' if flag == 'bottleneck' else flag.replace('_', '-')
            raise UserError(f'{args.resume} can\'t be {verb} with another --{name}: it has '
                            f'{before}, not {now}')


# ---- files -----------------------------------------------------------------------------------

def save(path, content, keep_previous=False):
    """Save plain values and tensors atomically: flushed to disk, then renamed.

    With `keep_previous`, the existing file becomes path.1. If the process is killed at any moment,
    at least one of the two files is complete; a failed write changes neither.
    """
    path, archive = Path(path), io.BytesIO()
    torch.save(content, archive)  # in memory: errors of torch.save on a full disk are obscure
    with replace_file(path) as temporary:
        with open(temporary, 'wb') as file:
            file.write(archive.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        if keep_previous and path.exists():
            os.replace(path, f'{path}.1')
    if os.name != 'nt':  # Windows can't open a directory
        directory = os.open(path.parent, os.O_RDONLY)
        os.fsync(directory)  # the rename itself
        os.close(directory)


def load(path):
    """The content of a checkpoint, a dict, on the CPU.

    Raises:
        UserError: as in `torch_files.load`, or it is not a dict.
    """
    saved, _ = torch_files.load(path)
    if not isinstance(saved, dict):
        raise UserError(f'{path} is not a checkpoint: it holds a {type(saved).__name__}')
    return saved


def load_newest(path):
    """Load `path` or, if it is damaged or missing, `path`.1. Returns path and content.

    Raises:
        UserError: neither can be loaded; the message is about `path`.
    """
    try:
        return str(path), load(path)
    except UserError:
        with contextlib.suppress(UserError):
            return f'{path}.1', load(f'{path}.1')
        raise


def progress(saved):
    """Text: the epoch and the step of a checkpoint, which may lack both."""
    epoch, step = saved.get('epoch'), saved.get('step')
    if epoch is None:
        return 'of an unknown epoch'
    return f'in epoch {epoch} after step {step}' if step else f'after epoch {epoch - 1}'


def check_finite(model, source):
    """Raises UserError if a weight or running statistic is not finite."""
    name = first_not_finite(model)
    if name:
        raise UserError(f'{source} has weights that are not finite, the first in {name}: use an '
                        f'earlier checkpoint')


def first_not_finite(model):
    """The name of the first parameter or running statistic that is not finite, or None."""
    tensors = {name: value for name, value in model.state_dict().items()
               if value.is_floating_point()}
    # L1 norms, because squares may overflow.
    bad = ~torch.stack(torch._foreach_norm([*tensors.values()], 1)).isfinite()
    return [*tensors][bad.int().argmax()] if bad.any() else None
