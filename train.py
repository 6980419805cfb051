"""Train a DenseNet on CIFAR-10, CIFAR-100, SVHN, ImageNet, a folder of images, or drawn shapes.

    python train.py                                          # the paper's DenseNet-BC-100-12, C10+
    python train.py --depth 40 --no-bottleneck --compression 1 --name densenet-40-12
    python train.py --name densenet-40-12 --resume           # go on where it stopped
    python train.py --dataset imagenet --data /imagenet --arch densenet121 --workers 16
    torchrun --nproc-per-node 4 train.py --dataset imagenet --data /imagenet --arch densenet121
    python train.py --evaluate --resume work/densenet-40-12/best.pth

A run writes args.json, train.csv, test.csv, latest.pth, best.pth and its figures into its
directory, work/<name>. The defaults are the paper's: https://arxiv.org/abs/1608.06993, section 4.2.
"""

import os

# Let idle OpenMP threads sleep: beside other processes, spinning makes a step much slower.
# The OpenMP library reads this when torch loads it.
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F

from training import checkpoint, datasets, distributed, flags, loaders, networks, runlog
from training.checkpoint import CheckpointError, TrainState
from training.cuda_graph import CudaGraphStep
from training.device import (
    choose_device,
    choose_precision,
    make_autocast,
    ran_out_of_memory,
    set_determinism,
)
from training.distributed import Stopped, StopSignals
from training.errors import UserError
from training.evaluation import at_least_fp32, count_errors, evaluate, report_errors
from training.runlog import RunLog, say

# ---- build: optimizer, learning rate ---------------------------------------------------------

def prepare_model(model, args, device):
    """Freeze the features if the flags say so, fuse the dense blocks, and move all to the device.

    `model.not_fused` says why they could not be fused, or is None.
    """
    if args.freeze_features:
        model.features.requires_grad_(False)
    model.not_fused = networks.fuse(model, device)
    # Convolutions are faster in channels_last, on CPUs too; activations follow the weights' layout.
    # On MPS, which nobody has tried, the default layout is safer.
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last
    return model.to(device, memory_format=layout)


def set_training_mode(model, args):
    model.train()
    if args.freeze_features:  # neither their weights nor their running statistics change
        model.features.eval()


def make_optimizer(args, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_cuda = parameters[0].is_cuda
    fused = parameters[0].device.type in ('cpu', 'cuda')  # one pass over all parameters
    # On CUDA the learning rate is in device memory, so that a CUDA graph follows a change of rate.
    lr = torch.tensor(args.lr, device=parameters[0].device) if on_cuda else args.lr
    common = dict(lr=lr, weight_decay=args.weight_decay)
    if args.optimizer == 'sgd':
        optimizer = torch.optim.SGD(parameters, momentum=args.momentum, fused=fused,
                                    nesterov=args.momentum > 0, **common)
        if args.momentum:
            # Made now: in fp16 the scaler may skip the first steps, and a graph recorded in one of
            # them would have no momentum.
            for parameter in parameters:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        return optimizer
    if args.optimizer == 'rmsprop':
        return torch.optim.RMSprop(parameters, momentum=args.momentum, capturable=on_cuda, **common)
    kind = torch.optim.Adam if args.optimizer == 'adam' else torch.optim.AdamW
    return kind(parameters, fused=fused, capturable=on_cuda, **common)


def make_state(args, model, device, precision):
    """A new TrainState; `model` must be on its device."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    return TrainState(model, make_optimizer(args, model), scaler,
                      sums=torch.zeros(2, device=device))


def learning_rate(args, epoch, done=0.0):
    """The learning rate in `epoch`, counted from 1, of which the fraction `done` is done.

    cosine: from --lr to 0 over all epochs.
    multistep: divided by 10 at half and again at three quarters of the epochs, but not before
    epoch 2 (of 300: from epochs 150 and 225 on, as in the official code). ImageNet, whatever the
    number of epochs: divided by 10 every 30 epochs (from epochs 31, 61, ... on, as there).
    In the warm-up epochs, either is multiplied by a factor that rises linearly from 0.01 to 1
    (Goyal et al.: Accurate, Large Minibatch SGD, 2017, section 2.2).
    """
    epochs_done = epoch - 1 + done
    lr = args.lr
    if epochs_done < args.warmup_epochs:
        lr *= 0.01 + 0.99 * epochs_done / args.warmup_epochs
    if args.lr_schedule == 'cosine':
        return lr * (1 + math.cos(math.pi * epochs_done / args.epochs)) / 2
    every = datasets.DATASETS[args.dataset].lr_drop_every
    if every:
        return lr / 10 ** ((epoch - 1) // every)
    drops = args.epochs / 2, args.epochs * 3 / 4
    return lr / 10 ** sum(epoch >= max(2, drop) for drop in drops)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(lr)
        else:
            group['lr'] = lr


# ---- step -----------------------------------------------------------------------------------

def train_step(state, images, labels, batch_size=None, *, autocast, grad_accum=1,
               label_smoothing=0.0, class_weights=None, forward=None):
    """One optimizer step on a batch, float32 [B, C, H, W] and int64 [B].

    Adds the loss and the errors of the images to `state.sums`. Nothing in it waits for the device,
    but rmsprop with fp16. Of several processes, each calls it with its shard of a batch of
    `batch_size` images, and with `forward`, the model as `distributed.wrap` has it.
    """
    forward = state.model if forward is None else forward
    # DistributedDataParallel takes the mean over W processes: that of sum / (B / W) is sum / B.
    divisor = batch_size / distributed.world_size() if batch_size else len(images)
    state.optimizer.zero_grad()
    micro_batches = list(zip(images.chunk(grad_accum), labels.chunk(grad_accum)))
    for i, (part, part_labels) in enumerate(micro_batches, start=1):
        with distributed.no_sync(forward, last=i == len(micro_batches)):
            with autocast:
                logits = forward(part)
            loss = F.cross_entropy(at_least_fp32(logits), part_labels, class_weights,
                                   reduction='sum', label_smoothing=label_smoothing)
            state.scaler.scale(loss / divisor).backward()
        state.sums[0].add_(loss.detach())
        state.sums[1].add_(count_errors(logits.detach().argmax(1) == part_labels, part_labels))
    state.scaler.step(state.optimizer)
    state.scaler.update()


def balanced_class_weights(class_counts):
    """Inverse class frequencies, scaled so that their mean over the images is 1.

    The loss of a batch is still divided by the number of its images, so that the learning rate
    means the same. int64 [classes] to float32.
    """
    return class_counts.sum() / (len(class_counts) * class_counts)


def make_step(args, state, shapes, autocast, class_weights=None):
    """The function of images and labels that trains `state`, as a CUDA graph where possible.

    Raises:
        UserError: as `CudaGraphStep`.
    """
    step = functools.partial(
        train_step, state, autocast=autocast, grad_accum=args.grad_accum,
        label_smoothing=args.label_smoothing, class_weights=class_weights,
        forward=distributed.wrap(state.model))
    if distributed.world_size() > 1:
        settle_order_of_sums(step, state, shapes[0])
    device = state.sums.device.type
    if args.cuda_graph is False or (args.cuda_graph is None and device != 'cuda'):
        return step
    if device != 'cuda':
        reason = f'the device is {device}'
    elif args.optimizer == 'rmsprop' and state.scaler.is_enabled():
        reason = 'with fp16, the host waits for the device in each step of rmsprop'
    elif distributed.world_size() > 1:
        reason = 'several processes exchange gradients in it'
    else:
        graphed = CudaGraphStep(step, state, shapes)
        if graphed.agrees():
            return graphed
        reason = 'it does not do what the step does; please report this'
    say(f'no CUDA graph, each kernel is launched by itself: {reason}')
    return step


def settle_order_of_sums(step, state, shape):
    """Take a step and undo it, for batches of `shape`, [B, C, H, W], of all processes together.

    After its first step, DistributedDataParallel arranges the gradients anew, and then sums them
    over the processes in another order. A resumed run would have a first step where one that was
    not interrupted has none.
    """
    n, *image = shape
    images = torch.zeros(-(-n // distributed.world_size()), *image, device=state.sums.device)
    with state.rehearsal():
        step(images, images.new_zeros(len(images), dtype=torch.int64))


# ---- loop ------------------------------------------------------------------------------------

def fit(args, state, step, train_loader, test_loader, log, save, stop, autocast):
    """Train and evaluate from where `state` is to the last epoch.

    Raises:
        Stopped: a signal arrived; `state` is that after a whole step, and can be saved.
    """
    while state.epoch <= args.epochs:
        set_training_mode(state.model, args)
        train_loader.set_epoch(state.epoch, start=state.step)  # a resumed run may start mid-epoch
        log.start_epoch(state.epoch, state.step)
        for images, labels in log.watch(train_loader):
            lr = learning_rate(args, state.epoch, state.step / len(train_loader))
            set_learning_rate(state.optimizer, lr)
            batch_size = train_loader.images_in(state.step)
            step(images, labels, batch_size)
            state.count_step(batch_size)
            log.advance(batch_size)
            if state.step % args.print_freq == 0 or state.step == len(train_loader):
                log.train_row(*take_means(args, state), lr)
            stop.check()
        distributed.share_statistics(state.model)
        test = evaluate(state.model, test_loader, autocast, stop)
        improved = record_test(state, test, log, args.best_by)
        state.begin_epoch(state.epoch + 1)
        if improved:  # saved after the epoch's end, so that it resumes in the next one
            save('best.pth')
        log.sync()
        save('latest.pth')


def take_means(args, state):
    """Mean loss and error in percent since the last row of train.csv; begins the next interval.

    Synchronizes with the device.

    Raises:
        UserError: the loss was not finite.
    """
    loss, errors = map(sum, zip(*distributed.all_gather(state.sums.tolist())))
    if not math.isfinite(loss):
        first = state.step - (state.step - 1) % args.print_freq
        raise not_finite(f'the loss of steps {first} to {state.step}', state)
    images = state.interval_images
    state.epoch_sums = tuple(map(sum, zip(state.epoch_sums, (loss, errors, images))))
    state.begin_interval()
    return loss / images, 100 * errors / images


def record_test(state, test, log, best_by):
    """Record the TestResult of the epoch; returns whether it is the best so far."""
    if not math.isfinite(test.loss):
        raise not_finite('the test loss', state)
    state.last_error = test.error
    score = getattr(test, best_by.replace('-', '_'))
    improved = score < state.best_score
    if improved:
        state.best_score, state.best_error, state.best_epoch = score, test.error, state.epoch
    train_loss, train_errors, images = state.epoch_sums
    log.end_epoch((train_loss / images, 100 * train_errors / images), test,
                  best_so_far(state, best_by))
    return improved


def best_so_far(state, best_by):
    by = '' if best_by == 'error' else f', by the {best_by} of {state.best_score:.4g}'
    return f'best {state.best_error:.2f}%{by} (epoch {state.best_epoch})'


def not_finite(what, state):
    name = checkpoint.first_not_finite(state.model)
    culprit = f', and the first bad parameter is {name}' if name else ''
    if state.epoch == 1 and state.step == 0:
        return UserError(f'{what} is not finite before the first step{culprit}')
    return UserError(f'{what} in epoch {state.epoch} is not finite{culprit}: try a lower --lr; the '
                     f'last checkpoint is untouched')


# ---- main ------------------------------------------------------------------------------------

def choose_dataset(args, saved):
    """The data set that the flags name, read as it was for the checkpoint if there is one."""
    trained_on = saved['dataset'] if saved else {}
    image_size = args.image_size
    if saved and args.dataset != trained_on['name'] and datasets.DATASETS[args.dataset].read:
        image_size = None  # args has that of the checkpoint, and this data set has its own
    dataset = datasets.describe(
        args.dataset, args.data, image_size, 'test' if args.evaluate else 'train',
        in_channels=args.in_channels, value_range=args.value_range or trained_on.get('value_range'),
        val_split=args.val_split, seed=trained_on.get('split_seed', args.seed),
        workers=args.workers)
    if not saved:
        return dataset
    known, found = trained_on['classes'], dataset.classes
    if set(found) - set(known) or not args.evaluate and tuple(known) != found:
        differing = min(set(found) ^ set(known), default=None)
        what = f'{differing} is in only one of them' if differing else 'in another order'
        raise CheckpointError(f'{args.resume} was trained on other classes than those of '
                              f'{args.dataset} in {args.data}: {what}')
    return dataclasses.replace(dataset, classes=tuple(known), mean=trained_on['mean'],
                               std=trained_on['std'])


def make_save(args, state, dataset, num_images, directory):
    """A function that saves `state` in the directory under a name; all processes call it."""
    started = time.monotonic() - state.seconds

    def save(name):
        state.seconds = time.monotonic() - started
        state.peak_memory = max(state.peak_memory, torch.cuda.max_memory_allocated())
        own_states = distributed.all_gather(state.own_state())
        if distributed.rank() > 0:
            return
        if not all(own['interval'].isfinite().all() for own in own_states):
            raise not_finite('the loss', state)
        if checkpoint.first_not_finite(state.model):
            raise not_finite('a weight', state)
        checkpoint.save(directory / name, {
            **state.state_dict(own_states), 'args': vars(args), 'num_images': num_images,
            'dataset': dataset.plain(), 'config': state.model.config,
        }, keep_previous=name == 'latest.pth')
    return save


def describe_data(dataset, loaders):
    train_images, test_images = (loader.num_images for loader in loaders)
    values = ''
    if dataset.value_range:
        values = ' with values from {:g} to {:g}'.format(*dataset.value_range)
    return (f'{dataset.name}: {train_images:,} training and {test_images:,} test images of '
            f'{dataset.image_size} pixels{values}, {len(dataset.classes)} classes')


def train(args, dataset, model, both_loaders, directory, stop, *, device, precision,
          saved, goes_on):
    """One training run, in a directory that this process has claimed."""
    train_loader, test_loader = both_loaders
    autocast = make_autocast(precision, device)
    state = make_state(args, model, device, precision)
    if distributed.rank():  # each process has its own dropout
        torch.manual_seed((args.seed + 1_000_003 * distributed.rank()) % 2**32)
    if saved:
        state.resume(saved, args, train_loader.num_images, distributed.rank(),
                     distributed.world_size())
        say(f'resuming {args.resume} in epoch {state.epoch} after step {state.step}')
    elif args.start_epoch:
        state.begin_epoch(args.start_epoch)
    best_is_here = distributed.from_rank_0((directory / 'best.pth').exists)
    if state.epoch <= args.epochs and not best_is_here:
        # Resumed from another directory, which has the best so far: this one gets its own.
        state.best_score, state.best_error, state.best_epoch = math.inf, math.inf, 0
    if args.compile:
        model.compile(dynamic=False)  # one compilation for each batch size, as with CUDA graphs
    set_training_mode(model, args)  # before a graph is recorded
    image = model.config['in_channels'], dataset.image_size, dataset.image_size
    sizes = args.batch_size, train_loader.num_images % args.batch_size  # full and last batches
    weights = None
    if args.class_weights:
        weights = balanced_class_weights(train_loader.class_counts).to(device)
    step = make_step(args, state, [(n, *image) for n in sizes if n], autocast, weights)
    graphed = isinstance(step, CudaGraphStep)
    save = make_save(args, state, dataset, train_loader.num_images, directory)
    if not goes_on or args.start_epoch:  # so that --resume finds it if this is killed before a save
        save('latest.pth')
    hardware = torch.cuda.get_device_name() if device.type == 'cuda' else device.type
    log = runlog.NoLog()
    if distributed.rank() == 0:
        runlog.write_record(directory, args, precision=precision, cuda_graph=graphed,
                            not_fused=model.not_fused, device=hardware,
                            processes=distributed.world_size())
        log = RunLog(directory, steps_per_epoch=len(train_loader), epochs=args.epochs,
                     start=(state.epoch, state.step), tensorboard=args.tensorboard,
                     figures=args.plot)
    processes = f'{distributed.world_size()} x ' if distributed.world_size() > 1 else ''
    say(f'{networks.name(args)}: {sum(p.numel() for p in model.parameters()):,} parameters; '
        f'{describe_data(dataset, both_loaders)}; '
        f'{processes}{hardware}, {precision}{", CUDA graph" * graphed}')
    with contextlib.closing(log):
        try:
            fit(args, state, step, train_loader, test_loader, log, save, stop, autocast)
        except Stopped as stopped:
            log.sync()
            save('latest.pth')
            say(f'{stopped}: saved in epoch {state.epoch} after step {state.step}; --resume goes '
                f'on from {directory / "latest.pth"}')
            sys.exit(128 + stopped.signum)
        log.end_run()
    used = str(timedelta(seconds=round(state.seconds)))
    if state.peak_memory:
        used += f' with at most {state.peak_memory / 2**30:.2f} GiB on the GPU'
    say(f'final error {state.last_error:.2f}% (epoch {state.epoch - 1}), '
        f'{best_so_far(state, args.best_by)}, after {used}; everything is in {directory}')


def main(argv=None):
    with StopSignals() as stop, distributed.process_group():
        # `saved` is what the checkpoint of --resume holds, or None.
        args, saved = distributed.from_rank_0(lambda: flags.parse_args(argv))
        device = choose_device(args.device)
        precision = choose_precision(args.precision, device)
        set_determinism(args.deterministic)
        dataset = distributed.from_rank_0(lambda: choose_dataset(args, saved))
        args = flags.with_network(args, dataset.image_size)
        if saved:
            checkpoint.check_fixed_flags(args, saved['args'], flags.MODEL_FLAGS if args.evaluate
                                         else flags.RUN_FLAGS)
        torch.manual_seed(args.seed)
        model = networks.build(args, len(dataset.classes), dataset.image_size)
        if args.pretrained is not None:
            networks.load_pretrained(model, args)
        elif args.evaluate:  # training loads them with all the rest, in `TrainState.resume`
            checkpoint.load_weights(model, saved.get('model'), args.resume)
        model = prepare_model(model, args, device)
        if args.evaluate:
            report_errors(model, dataset, device, make_autocast(precision, device), args)
            return
        directory = flags.run_directory(args)
        resumed = Path(args.resume).resolve() if saved else None
        latest = directory.resolve() / 'latest.pth'
        with contextlib.ExitStack() as stack:
            if distributed.rank() == 0:
                is_ours = resumed is not None and resumed.parent == latest.parent
                stack.enter_context(runlog.claim(directory,
                                                 may_hold_run=is_ours or args.overwrite))
                if args.overwrite:
                    runlog.clear(directory)
            with distributed.rank_0_first():
                common = dict(device=device, workers=args.workers,
                              shard=(distributed.rank(), distributed.world_size()))
                both_loaders = (
                    loaders.make_loader(dataset, 'train', args.batch_size, augment=args.augment,
                                     seed=args.seed, **common),
                    # A micro-batch, so that testing needs no more memory than training.
                    loaders.make_loader(dataset, 'test', -(-args.batch_size // args.grad_accum),
                                     ten_crop=args.ten_crop, **common))
            stop.deferred = True  # until a step is done, and all can be saved
            train(args, dataset, model, both_loaders, directory, stop, device=device,
                  precision=precision, saved=saved, goes_on=resumed == latest)


def cli(argv=None):
    """Run `main`; what a user can put right is one line on stderr, and exit code 2."""
    try:
        main(argv)
    except (UserError, OSError, EOFError, RuntimeError, ValueError, MemoryError) as error:
        # Else torch's handler raises again, anywhere, for each worker that dies now.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = explanation(error)
        if message is None:
            raise
        rank = distributed.rank()
        runlog.warn(f'rank {rank}: {message}' if rank else message, 'error')
        distributed.leave(1 if distributed.lost_a_peer(error) else 2)


def explanation(error):
    """What was wrong and what would be right, in one line; None for an error of this program."""
    text = ' '.join(str(error).split())
    if isinstance(error, UserError):
        return text
    if ran_out_of_memory(error):
        return ('out of memory: give --memory-efficient, a lower --batch-size, a higher '
                '--grad-accum, --precision bf16, smaller images or a smaller network')
    # The connection to a worker process that has died is reset, or at its end.
    if 'DataLoader worker' in text or isinstance(error, (ConnectionError, EOFError)):
        return (f'a process that reads images has died ({text}): if it was for lack of memory, '
                f'give fewer --workers')
    if isinstance(error, OSError):  # a disk that is full, a directory that must not be written to
        where = f'{error.filename}: ' if error.filename else ''
        return where + (error.strerror or text)
    if 'value per channel' in text:  # a single image whose last feature map is one pixel
        return f'{text}: change --batch-size or --grad-accum'
    if 'deterministic implementation' in text:
        return f'--deterministic: {text}'
    if distributed.lost_a_peer(error):
        return 'the connection to another process is lost; if that had an error, it is above'
    return None


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # class names may not be valid UTF-8
    warnings.showwarning = lambda message, *_: runlog.warn(message)
    cli()
