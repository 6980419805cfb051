"""Train a DenseNet on CIFAR-10, CIFAR-100, SVHN, ImageNet, a folder of images, or drawn shapes.

    python train.py                                          # the paper's DenseNet-BC-100-12, C10+
    python train.py --depth 40 --no-bottleneck --compression 1 --name densenet-40-12
    python train.py --name densenet-40-12 --resume           # go on where it stopped
    python train.py --dataset imagenet --data /imagenet --arch densenet121 --workers 16
    torchrun --nproc-per-node 4 train.py --dataset imagenet --data /imagenet --arch densenet121
    python train.py --evaluate --resume work/densenet-40-12/best.pth
    python train.py --predict cat.jpg --resume work/densenet-40-12/best.pth

A run writes args.json, train.csv, test.csv, latest.pth, best.pth and its figures into its
directory, work/<name>. The defaults are the paper's: https://arxiv.org/abs/1608.06993, section 4.2.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import checkpoint
import data
import densenet
import distributed
import faults
import flags
import memory
import runlog
from checkpoint import CheckpointError, TrainState
from data import DataError
from distributed import PeerError
from faults import Interrupted, StopSignals, TrainingError, check_finite, explained
from flags import UsageError
from runlog import RunDirectoryError, RunLog, say

AUTOCAST_TYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}


class CaptureError(Exception):
    """A step that can't be recorded as a CUDA graph, said in one line."""


# ---------------------------------------------------------------------------------------------
# Device, model, optimizer


def choose_device(name):
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'cpu'
    available = {'cpu': True, 'cuda': torch.cuda.is_available(),
                 'mps': torch.backends.mps.is_available()}[name]
    if not available:
        raise UsageError(f'--device {name}: torch {torch.__version__} finds none here; '
                         f'--device auto takes what there is')
    if distributed.world_size() == 1:
        return torch.device(name)
    if name == 'mps':
        raise UsageError('--device mps is for one process: python train.py, without torchrun')
    if name == 'cuda':
        number, count = distributed.local_rank(), torch.cuda.device_count()
        if number >= count:
            raise UsageError(f'torchrun started more processes on {platform.node()} than it has '
                             f'GPUs: --nproc-per-node {count}')
        torch.cuda.set_device(number)
        return torch.device(name, number)
    return torch.device(name)


def choose_precision(name, device):
    """fp32, tf32, bf16 or fp16; sets what the libraries of the device may do."""
    if name == 'auto':
        has_bf16 = device.type == 'cuda' and torch.cuda.is_bf16_supported(including_emulation=False)
        name = 'bf16' if has_bf16 else 'tf32' if device.type == 'cuda' else 'fp32'
    if name == 'tf32' and device.type != 'cuda':
        raise UsageError(f'--precision tf32 is for cuda, and this is {device.type}: try fp32')
    torch.backends.cuda.matmul.allow_tf32 = name != 'fp32'
    torch.backends.cudnn.allow_tf32 = name != 'fp32'  # torch's own default is True, whatever we say
    torch.backends.cudnn.benchmark = True             # the shapes stay the same from step to step
    return name


def choose_determinism(wanted):
    """Whether two runs are to end with the same bits on a GPU, too, as they do on a CPU anyway."""
    torch.use_deterministic_algorithms(wanted)
    if wanted:
        torch.backends.cudnn.benchmark = False  # which chooses by time
        torch.utils.deterministic.fill_uninitialized_memory = False  # nothing of ours reads it
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # read when cuBLAS starts


def make_autocast(precision, device):
    """The context of a forward pass: it does nothing for fp32 and tf32."""
    return torch.autocast(device.type, AUTOCAST_TYPES.get(precision),
                          enabled=precision in AUTOCAST_TYPES)


def choose_model(args, image_size):
    """The flags, with depth or architecture and growth rate filled in by the size of the images."""
    chosen = {**vars(args), 'image_size': image_size}
    if args.arch is None and args.block_config is None:
        if image_size <= data.SMALL:
            chosen['depth'] = args.depth or 100
        else:  # as the official code, which takes the depth for the name
            chosen.update(depth=None, arch=f'densenet{args.depth or 121}')
            if chosen['arch'] not in flags.ARCHITECTURES:
                raise UsageError(f'--depth {args.depth}: for images of {image_size} pixels there '
                                 f'are --arch {", ".join(flags.ARCHITECTURES)} and --block-config')
    if args.growth_rate is None and chosen['arch'] is None:
        chosen['growth_rate'] = 12 if image_size <= data.SMALL else 32
    return argparse.Namespace(**chosen)


def build_model(args, dataset):
    """The network, on the CPU: it starts from the same weights wherever it runs."""
    small = dataset.image_size <= data.SMALL
    settings = dict(
        num_classes=len(dataset.classes), small_inputs=small,
        drop_rate=args.drop_rate, bn_size=args.bn_size, compression=args.compression,
        bottleneck=args.bottleneck, memory_efficient=args.memory_efficient)
    if args.growth_rate is not None:
        settings['growth_rate'] = args.growth_rate
    if args.init_features is not None:
        settings['num_init_features'] = args.init_features
    try:
        if args.arch is not None:
            model = getattr(densenet, args.arch)(**settings)
        elif args.block_config is not None:
            k = args.growth_rate
            width = densenet.stem_width(k, args.bottleneck, args.compression) if small else 2 * k
            settings.setdefault('num_init_features', width)
            model = densenet.DenseNet(block_config=args.block_config, **settings)
        else:
            model = densenet.densenet_cifar(args.depth, **settings)
    except (ValueError, RuntimeError) as error:  # RuntimeError: no memory for so many weights
        raise UsageError(f'no such model: {error}') from error
    if dataset.image_size < model.min_size:
        raise UsageError(f'this model needs images of at least {model.min_size} pixels, and those '
                         f'of {dataset.name} have {dataset.image_size}')
    return model


def torchvision_weights(arch):
    try:
        weights = torchvision.models.get_model_weights(arch).DEFAULT
        return weights.get_state_dict(weights_only=True)
    except Exception as error:  # no network, or a broken file in its cache, or a stranger's
        reason = str(error).partition('\n')[0]
        raise UsageError(f'--pretrained: torchvision could not download or read its weights of '
                         f'{arch} ({reason}); give a file: --pretrained FILE') from error


def load_pretrained(model, args):
    """Weights from a file, ours or another's, or torchvision's download (--pretrained)."""
    if not args.pretrained and args.arch not in flags.TORCHVISION_WEIGHTS:
        raise UsageError(f'--pretrained without a file takes torchvision\'s weights, which are for '
                         f'--arch {", ".join(flags.TORCHVISION_WEIGHTS)} and images of more than '
                         f'{data.SMALL} pixels')
    weights = (checkpoint.load_weights_file(args.pretrained) if args.pretrained else
               distributed.in_turns(functools.partial(torchvision_weights, args.arch)))
    source = args.pretrained or 'torchvision\'s file'
    if model.config['small_inputs'] and any(key.endswith('norm0.weight') for key in weights):
        raise CheckpointError(f'{source} has ImageNet\'s 7x7 stem, and images of up to '
                              f'{data.SMALL} pixels get a 3x3 stem: give --image-size '
                              f'{data.SMALL + 1} or more')
    if args.reset_classifier:
        weights = {key: weight for key, weight in weights.items() if 'classifier.' not in key}
        weights.update({f'classifier.{key}': weight
                        for key, weight in model.classifier.state_dict().items()})
    try:
        checkpoint.load_weights(model, weights, source)
    except CheckpointError as error:
        if 'classifier.' not in str(error):
            raise
        remedy = ('--predict knows ImageNet\'s classes alone, or those of a run, by --resume'
                  if args.predict else '--reset-classifier starts that one anew')
        raise CheckpointError(f'{error}: {remedy}') from error


def prepare_model(model, args, device):
    """To the device, with what is not to be trained or not to stay in each process by itself."""
    if args.freeze_features:
        model.features.requires_grad_(False)
    if args.sync_bn and distributed.world_size() > 1:
        if device.type != 'cuda':
            raise UsageError(f'--sync-bn: torch has it for cuda alone, and this is {device.type}')
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    # Convolutions are faster with the channels innermost, also on the CPU, if a little; the
    # feature maps take the layout of the weights.
    return model.to(device, memory_format=torch.channels_last)


def make_optimizer(args, model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_cuda = parameters[0].is_cuda
    # On CUDA one kernel updates all parameters, and reads the learning rate from device memory, so
    # that a CUDA graph of it follows a change of rate.
    lr = torch.tensor(args.lr, device=parameters[0].device) if on_cuda else args.lr
    common = dict(lr=lr, weight_decay=args.weight_decay)
    if args.optimizer == 'sgd':
        optimizer = torch.optim.SGD(parameters, momentum=args.momentum, fused=on_cuda,
                                    nesterov=args.momentum > 0, **common)
        if args.momentum:  # made now: in fp16 a first step that overflows would leave them unset
            for parameter in parameters:
                optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
        return optimizer
    if args.optimizer == 'rmsprop':
        return torch.optim.RMSprop(parameters, momentum=args.momentum, capturable=on_cuda, **common)
    kind = torch.optim.Adam if args.optimizer == 'adam' else torch.optim.AdamW
    return kind(parameters, fused=on_cuda, capturable=on_cuda, **common)


def make_state(args, model, device, precision):
    """Training that has not begun, of a model that is on its device."""
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    return TrainState(model, make_optimizer(args, model), scaler,
                      interval=torch.zeros(4, device=device))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(lr)
        else:
            group['lr'] = lr


def learning_rate(args, epoch, done=0.0):
    """The learning rate in `epoch`, counted from 1, of which the share `done` is done.

    Of 300 epochs, 150 is the first at a tenth and 225 the first at a hundredth (official code); of
    ImageNet's 90 they are 31 and 61. The first epoch has the full rate, however few there are. In
    the warm-up epochs the rate is a share of that, which rises from 0.01 to 1 (Goyal et al.:
    Accurate, Large Minibatch SGD, 2017, section 2.2).
    """
    epochs_done = epoch - 1 + done
    lr = args.lr
    if epochs_done < args.warmup_epochs:
        lr *= 0.01 + 0.99 * epochs_done / args.warmup_epochs
    if args.lr_schedule == 'cosine':
        return lr * (1 + math.cos(math.pi * epochs_done / args.epochs)) / 2
    if args.dataset == 'imagenet':
        drops = sum(epoch > max(1, args.epochs * part) for part in (1 / 3, 2 / 3))
    else:
        drops = sum(epoch >= max(2, args.epochs * part) for part in (1 / 2, 3 / 4))
    return lr / 10**drops


# ---------------------------------------------------------------------------------------------
# The loop


def train_step(state, images, labels, batch_size=None, *, autocast, grad_accum=1,
               label_smoothing=0.0, forward=None):
    """One step on a batch, float32 [B, C, H, W] and int64 [B]; the host reads nothing back.

    Of several processes, each calls it with its part of a batch of `batch_size` images, and with
    `forward`, the model as `distributed.wrap` has it.
    """
    forward = forward or state.model
    # DistributedDataParallel will take the mean over the processes.
    share = (batch_size or len(images)) / distributed.world_size()
    state.optimizer.zero_grad()
    parts, parts_labels = images.chunk(grad_accum), labels.chunk(grad_accum)
    for i, (part, part_labels) in enumerate(zip(parts, parts_labels), start=1):
        with distributed.no_sync(forward, last=i == len(parts)):
            with autocast:
                logits = forward(part)
            loss = F.cross_entropy(at_least_fp32(logits), part_labels, reduction='sum',
                                   label_smoothing=label_smoothing)
            state.scaler.scale(loss / share).backward()
        state.interval[0].add_(loss.detach())
        state.interval[1].add_(count_errors(logits.detach().argmax(1) == part_labels, part_labels))
    faults.note_what_is_not_finite(state)
    state.scaler.step(state.optimizer)
    state.scaler.update()


def at_least_fp32(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def count_errors(hit, labels):
    return (~hit & (labels != data.NO_LABEL)).sum()


class CudaGraphStep:
    """A step recorded once as a CUDA graph, and launched as a whole for each batch.

    Args:
        step: a function of images and labels, such as `train_step` with all else given.
        state: what it changes. Recording leaves weights, statistics, optimizer, sums and random
            state as they were.
        shapes: those of images, [B, C, H, W], that it will be called with, the largest first.
            Each has a graph of its own, in the same memory.

    Raises:
        CaptureError: something in the step can't be recorded; says what.
    """

    def __init__(self, step, state, shapes):
        device = state.interval.device
        self.batches = {shape: (torch.zeros(shape, device=device),
                                torch.zeros(shape[0], dtype=torch.int64, device=device))
                        for shape in shapes}
        self.graphs, pool = {}, torch.cuda.graph_pool_handle()
        stream, caller = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream), state.rehearsal():
                for batch in self.batches.values():
                    for _ in range(3):  # libraries choose kernels, the optimizer makes its state
                        step(*batch)
                state.optimizer.zero_grad()
                for shape, batch in self.batches.items():
                    self.graphs[shape] = self._record(step, batch, pool, stream)
        finally:
            caller.wait_stream(stream)

    @staticmethod
    def _record(step, batch, pool, stream):
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step(*batch)
        except RuntimeError as error:
            cause = error
            while cause.__context__ is not None:  # the end of a recording that failed fails, too
                cause = cause.__context__
            raise CaptureError(str(cause).splitlines()[0]) from error
        return graph

    def __call__(self, images, labels, batch_size=None):
        static_images, static_labels = self.batches[images.shape]
        static_images.copy_(images)
        static_labels.copy_(labels)
        self.graphs[images.shape].replay()


def make_step(args, state, shapes, autocast):
    """The function of images and labels that trains `state`: a CUDA graph where that can be."""
    step = functools.partial(
        train_step, state, autocast=autocast, grad_accum=args.grad_accum,
        label_smoothing=args.label_smoothing, forward=distributed.wrap(state.model))
    device = state.interval.device.type
    if args.cuda_graph is False or (args.cuda_graph is None and device != 'cuda'):
        return step
    try:
        if device != 'cuda':
            raise CaptureError(f'the device is {device}')
        if args.optimizer == 'rmsprop' and state.scaler.is_enabled():
            raise CaptureError('with fp16, rmsprop waits for the host')
        if distributed.world_size() > 1:
            raise CaptureError('several processes exchange gradients in it')
        return CudaGraphStep(step, state, shapes)
    except CaptureError as error:
        say(f'no CUDA graph, each kernel is launched by itself: {error}')
        return step


def batches(loader, stop):
    """The loader's, until a signal comes or a batch can't be read: to all processes at once."""
    iterator = iter(loader)
    while True:
        batch = error = None
        try:
            batch = next(iterator, None)
        except DataError as caught:
            error = caught
        stop.check(error)
        if batch is None:
            return
        yield batch


def train_epoch(args, state, loader, log, step, stop):
    """The rest of the epoch that `state` is in."""
    state.model.train()
    if args.freeze_features:  # neither their weights nor their running statistics change
        state.model.features.eval()
    loader.set_epoch(state.epoch, start=state.step)
    log.start_epoch(state.epoch, state.step)
    started = step_ended = time.perf_counter()
    images_before, waited = state.interval_images, 0.0  # `waited`: seconds, for batches
    for images, labels in batches(loader, stop):
        waited += time.perf_counter() - step_ended
        lr = learning_rate(args, state.epoch, state.step / len(loader))
        set_learning_rate(state.optimizer, lr)
        batch_size = loader.images_in(state.step)
        step(images, labels, batch_size)
        state.count_step(batch_size)
        log.advance()
        if state.step % args.print_freq == 0 or state.step == len(loader):
            loss, error, images_here = close_interval(state)
            now = time.perf_counter()
            log.train_row(state.epoch - 1 + state.step / len(loader), loss, error, lr,
                          images_per_second=(images_here - images_before) / (now - started),
                          data_wait=100 * waited / (now - started))
            started, images_before, waited = now, 0, 0.0
        step_ended = time.perf_counter()


def close_interval(state):
    """Mean loss, error in percent and number of images since the last row; begins the next."""
    loss, errors = check_finite(state)
    images = state.interval_images
    sums = zip(state.epoch_sums, (loss, errors, images))
    state.epoch_sums = tuple(total + here for total, here in sums)
    state.begin_interval()
    return loss / images, 100 * errors / images, images


def classify(model, images, autocast):
    """Logits [B, classes] of images [B, C, H, W] or, their mean, of crops [B, 10, C, H, W]."""
    with autocast:
        logits = at_least_fp32(model(images.flatten(0, -4)))
    return logits.view(len(images), -1, logits.shape[1]).mean(1) if images.dim() > 4 else logits


@torch.no_grad()
def evaluate(model, loader, autocast, stop=None):
    """Mean loss, top-1 and top-5 error in percent; of ten crops the logits are averaged."""
    model.eval()
    sums = None
    for images, labels in batches(loader, stop or StopSignals()):
        logits = classify(model, images, autocast)
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        batch = torch.stack([F.cross_entropy(logits, labels, reduction='sum'),
                             count_errors(ranked[:, 0], labels),
                             count_errors(ranked.any(1), labels)])
        sums = batch if sums is None else sums + batch
    loss, errors, errors5 = (distributed.all_reduce(sums) / loader.num_images).tolist()
    return loss, 100 * errors, 100 * errors5


def fit(args, state, step, train_loader, test_loader, log, save, stop, autocast):
    """Train and test from where `state` is to the last epoch.

    Raises:
        Interrupted, DataError, PeerError: a signal, or an image that can't be read, in this process
            or another. All is saved.
    """
    while state.epoch <= args.epochs:
        try:
            train_epoch(args, state, train_loader, log, step, stop)
            distributed.share_statistics(state.model)
            test = evaluate(state.model, test_loader, autocast, stop)
        except (Interrupted, DataError, PeerError):  # each comes between two steps
            check_finite(state)
            log.sync()
            save('latest.pth')
            raise
        if end_epoch(state, test, log):
            save('best.pth')
        if state.epoch > args.epochs or (state.epoch - 1) % args.save_every == 0:
            log.sync()
            save('latest.pth')


def end_epoch(state, test, log):
    """Note the test results and go to the next epoch; is this one the best?"""
    loss, error, error5 = test
    if not math.isfinite(loss):
        faults.check_model(state)
        raise TrainingError(f'the test loss is not finite after epoch {state.epoch}: '
                            f'{faults.REMEDY}')
    log.test_row(state.epoch, loss, error, error5)
    state.last_error = error
    improved = error < state.best_error
    if improved:
        state.best_error, state.best_epoch = error, state.epoch
    train_loss, train_errors, images = state.epoch_sums
    log.end_epoch((train_loss / images, 100 * train_errors / images), test,
                  (state.best_error, state.best_epoch))
    state.begin_epoch(state.epoch + 1)
    return improved


def describe_run(args, device, precision, graphed):
    """What args.json holds: the flags, and what they ran on."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'],
                                cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip() or None
    except OSError:  # no git here
        commit = None
    return {
        'args': vars(args), 'precision': precision, 'cuda_graph': graphed, 'git_commit': commit,
        'processes': distributed.world_size(),
        'device': torch.cuda.get_device_name() if device.type == 'cuda' else device.type,
        'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                     'torchvision': torchvision.__version__, 'cuda': torch.version.cuda},
    }


def model_name(args):
    if args.arch is not None:
        return args.arch
    letters = 'B' * args.bottleneck + 'C' * (args.compression < 1)
    layers = f'L={args.depth}' if args.depth else f'blocks {"-".join(map(str, args.block_config))}'
    return f'DenseNet{"-" * bool(letters)}{letters} {layers} k={args.growth_rate}'


def check_fixed_flags(args, saved_args):
    for flag in flags.FIXED_FLAGS:
        if getattr(args, flag) != saved_args.get(flag):
            raise CheckpointError(f'{args.resume} is of another architecture or optimizer: its '
                                  f'{flag} is {saved_args.get(flag)}, not {getattr(args, flag)}')


def resume(args, state, saved, num_images):
    """Bring `state` to where the checkpoint was, or to the beginning of --start-epoch."""
    state.load_state_dict(saved, args.resume, distributed.rank(), distributed.world_size())
    if args.start_epoch:
        state.begin_epoch(args.start_epoch)
    before = saved['args'].get('batch_size'), saved.get('num_images')
    now = args.batch_size, num_images
    if state.step * args.batch_size >= num_images + args.batch_size and before == now:
        raise CheckpointError(f'{args.resume} is damaged: its epoch has {state.step} steps')
    if state.step and before != now:
        raise CheckpointError(f'{args.resume} was written within an epoch of {before[1]} images in '
                              f'batches of {before[0]}, and cannot go on in one of {now[1]} in '
                              f'batches of {now[0]}; --start-epoch {state.epoch} begins it anew')
    say(f'resuming {args.resume} in epoch {state.epoch} after step {state.step}')


def begin(args, dataset, model, num_images, *, device, precision, saved):
    """The state of a run before its first step, or of a resumed one before its next."""
    if args.batch_size > num_images:
        raise UsageError(f'--batch-size {args.batch_size} is larger than the data set: '
                         f'{dataset.name} has {num_images} training images')
    state = make_state(args, model, device, precision)
    if distributed.rank():  # each has a dropout of its own
        torch.manual_seed((args.seed + 1_000_003 * distributed.rank()) % 2**32)
    if saved:
        resume(args, state, saved, num_images)
    elif args.start_epoch:
        state.begin_epoch(args.start_epoch)
    return state


def make_save(args, state, dataset, num_images, directory):
    """A function that saves `state` in the directory under a name; all processes call it."""
    started, seconds_before = time.monotonic(), state.seconds

    def save(name):
        state.seconds = seconds_before + time.monotonic() - started
        state.peak_memory = max(state.peak_memory, torch.cuda.max_memory_allocated())
        own_states = distributed.all_gather(state.own_state())
        with distributed.all_or_none():
            try:
                if distributed.rank() == 0:
                    faults.check_model(state)
                    checkpoint.save(directory / name, state.state_dict(own_states),
                                    keep=args.keep if name == 'latest.pth' else 0, args=vars(args),
                                    num_images=num_images, dataset=dataset.plain(),
                                    config=state.model.config, launcher=distributed.launcher())
            except OSError as error:
                if not directory.exists():
                    raise RunDirectoryError(f'{directory} is gone: it was deleted or moved while '
                                            f'the run was in it') from error
                raise RunDirectoryError(f'{directory / name} cannot be written '
                                        f'({error.strerror}); what was saved before is '
                                        f'untouched') from error
    return save


def open_directory(args, directory, record, save, **log_settings):
    """Make the directory that of this run, from now on, and open its log."""
    latest = directory / 'latest.pth'
    with distributed.all_or_none():
        if args.overwrite and distributed.rank() == 0:
            runlog.clear(directory)
            for version in checkpoint.versions(latest):
                version.unlink(missing_ok=True)
        if args.resume and distributed.rank() == 0 and Path(args.resume) != latest:
            checkpoint.set_aside_damaged(latest)
    goes_on = args.resume and Path(args.resume).resolve() == latest.resolve()
    if not goes_on or args.start_epoch:  # what is killed in its first epoch can be resumed, too
        save('latest.pth')
    with distributed.all_or_none():
        if distributed.rank():
            return runlog.NoLog()
        with checkpoint.replacing(directory / 'args.json') as file:
            file.write(json.dumps(record, indent=2).encode())
        return RunLog(directory, epochs=args.epochs, tensorboard=args.tensorboard,
                      figures=args.plot, **log_settings)


def train(args, dataset, model, loaders, directory, stop, *, device, precision, autocast, saved):
    """A whole run, in a directory that is ours."""
    train_loader, test_loader = loaders
    with distributed.all_or_none():
        state = begin(args, dataset, model, train_loader.num_images, device=device,
                      precision=precision, saved=saved)
    best_is_here = distributed.of_rank_0((directory / 'best.pth').exists)
    if state.epoch <= args.epochs and not best_is_here:  # it is another directory's
        state.best_error, state.best_epoch = math.inf, 0
    if args.compile:
        model.compile()
    image = model.config['in_channels'], dataset.image_size, dataset.image_size
    sizes = args.batch_size, train_loader.num_images % args.batch_size  # the last one is smaller
    remedy = functools.partial(
        memory.remedy, functools.partial(train_step, state, autocast=autocast), model, image,
        args.batch_size, args.grad_accum)
    with explained(args, remedy):
        step = make_step(args, state, [(n, *image) for n in sizes if n], autocast)
    graphed = isinstance(step, CudaGraphStep)
    record = describe_run(args, device, precision, graphed)
    save = make_save(args, state, dataset, train_loader.num_images, directory)
    log = open_directory(args, directory, record, save, steps_per_epoch=len(train_loader),
                         start=(state.epoch, state.step))
    hardware = f'{record["processes"]} x ' * (record['processes'] > 1) + record['device']
    say(f'{model_name(args)}: {sum(p.numel() for p in model.parameters()):,} parameters; '
        f'{dataset.name}: {train_loader.num_images:,} training and {test_loader.num_images:,} '
        f'test images of {dataset.image_size} pixels, {len(dataset.classes)} classes; '
        f'{hardware}, {precision}{", CUDA graph" * graphed}')
    if args.tensorboard_graph:
        with torch.random.fork_rng(devices=[]):  # its weights are of no interest
            log.graph(densenet.DenseNet(**model.config).eval(), torch.zeros(1, *image))
    with contextlib.closing(log):
        try:
            with explained(args, remedy):
                fit(args, state, step, train_loader, test_loader, log, save, stop, autocast)
        except Interrupted as interrupted:
            say(f'{interrupted}: saved in epoch {state.epoch} after step {state.step}; --resume '
                f'goes on from {directory / "latest.pth"}')
            sys.exit(128 + interrupted.signum)
        log.end_run(flags.hyper_parameters(args), (state.last_error, state.best_error))
        log.finish_figures()
    used = str(timedelta(seconds=round(state.seconds)))
    if state.peak_memory:
        used += f' with at most {state.peak_memory / 2**30:.2f} GiB on the GPU'
    say(f'final error {state.last_error:.2f}% (epoch {state.epoch - 1}), best '
        f'{state.best_error:.2f}% (epoch {state.best_epoch}), after {used}; everything is in '
        f'{directory}')


# ---------------------------------------------------------------------------------------------
# Using what was trained


def choose_dataset(args, saved):
    """What is trained or tested on; with --predict, what the model was trained on."""
    try:
        known = saved and data.Description(root=Path(args.data), **saved['dataset'])
    except TypeError as error:
        raise CheckpointError(f'{args.resume} is damaged: {error}') from error
    if args.predict:
        known = known or data.Description('imagenet', Path(args.data), imagenet_classes(), 224,
                                          *data.STATISTICS['imagenet'])
        return dataclasses.replace(known, image_size=args.image_size or known.image_size)
    other = known and known.name != args.dataset  # which may have a size of its own
    found = data.describe(args.dataset, args.data,
                          None if other and args.dataset in data.CLASSES else args.image_size,
                          split='test' if args.evaluate else 'train')
    if known is None:
        return found
    if found.classes != known.classes:
        odd = min(set(found.classes) ^ set(known.classes), default=None)
        raise CheckpointError(f'{args.resume} was trained on other classes than those of '
                              f'{args.dataset} in {args.data}: ' + (
                                  f'{odd} is in only one of them' if odd else 'in another order'))
    return dataclasses.replace(found, mean=known.mean, std=known.std)


def imagenet_classes():
    return tuple(torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.meta['categories'])


def print_errors(model, dataset, device, autocast, args):
    """On the test images; with --ten-crop, of one crop and of ten."""
    for ten_crop in (False, True)[:1 + args.ten_crop]:
        loader = distributed.in_turns(functools.partial(
            data.make_test_loader, dataset, args.batch_size, device=device, workers=args.workers,
            ten_crop=ten_crop, shard=(distributed.rank(), distributed.world_size())))
        loss, error, error5 = evaluate(model, loader, autocast)
        crops = ('ten crops: ' if ten_crop else 'one crop: ') if args.ten_crop else ''
        print(f'{crops}test loss {loss:.4f}, error {error:.2f}%, top-5 error {error5:.2f}%',
              flush=True)


@torch.no_grad()
def predict(model, dataset, device, autocast, args):
    """Print for each file its most likely classes, at most five, and their probabilities."""
    names = dataset.classes
    if len(names) == 1000 and all(re.fullmatch(r'n\d{8}', name) for name in names):
        names = imagenet_classes()  # instead of numbers in WordNet
    model.eval()
    for path in args.predict:
        image = data.read_image(path, dataset, args.ten_crop).to(device)
        shares = classify(model, image[None], autocast)[0].softmax(0)
        best = shares.topk(min(5, len(names)))
        print(f'{path}:', ', '.join(f'{names[label]} {100 * share:.2f}%' for share, label
                                    in zip(best.values.tolist(), best.indices.tolist())),
              flush=True)


def main(argv=None):
    with StopSignals() as stop, distributed.process_group():
        with distributed.all_or_none():
            args = flags.parse_args(argv)
            saved = args.resume and distributed.of_rank_0(lambda: checkpoint.load(args.resume))
        with distributed.all_or_none():
            device = choose_device(args.device)
            precision = choose_precision(args.precision, device)
            choose_determinism(args.deterministic)
            dataset = choose_dataset(args, saved)
            args = choose_model(args, dataset.image_size)
            if saved:
                check_fixed_flags(args, saved['args'])
            torch.manual_seed(args.seed)
            model = build_model(args, dataset)
        with distributed.all_or_none():
            if args.pretrained is not None:
                load_pretrained(model, args)
            elif args.evaluate or args.predict:
                checkpoint.load_weights(model, saved.get('model'), args.resume)
            model = prepare_model(model, args, device)
        autocast = make_autocast(precision, device)
        if args.predict:
            predict(model, dataset, device, autocast, args)
        elif args.evaluate:
            with explained(args):
                print_errors(model, dataset, device, autocast, args)
        else:
            directory = flags.run_directory(args)
            goes_on = saved and Path(args.resume).parent.resolve() == directory.resolve()
            with contextlib.ExitStack() as stack:
                with distributed.all_or_none():
                    if distributed.rank() == 0:
                        stack.enter_context(runlog.claim(
                            directory, may_hold_run=goes_on or args.overwrite))
                dataset, *loaders = distributed.in_turns(functools.partial(
                    data.make_loaders, dataset, args.batch_size, parts=args.grad_accum,
                    device=device, augment=args.augment, seed=args.seed, workers=args.workers,
                    ten_crop=args.ten_crop, shard=(distributed.rank(), distributed.world_size())))
                with stop.deferred():
                    train(args, dataset, model, loaders, directory, stop, device=device,
                          precision=precision, autocast=autocast, saved=saved)


def cli(argv=None):
    """`main`, with what a user can put right said in one line, and exit code 2."""
    try:
        main(argv)
    except PeerError:  # which has said why
        distributed.leave(2)
    except (UsageError, TrainingError, CheckpointError, DataError, RunDirectoryError) as error:
        if not isinstance(error, TrainingError) or distributed.rank() == 0:  # that one all have
            complain(error)
        distributed.leave(2)
    except OSError as error:  # a disk that is full, a directory that must not be written to
        complain(f'{error.filename}: ' * bool(error.filename) + (error.strerror or str(error)))
        distributed.leave(2)
    except (RuntimeError, MemoryError) as error:
        if memory.ran_out(error):
            complain('out of memory before the first step: try another --device, smaller images or '
                     'a smaller network')
            distributed.leave(2)
        if not distributed.lost_a_peer(error):
            raise
        complain('the connection to another process is lost; if that had an error, it is above')
        distributed.leave(1)


def complain(error):
    rank = distributed.rank()
    runlog.warn(f'{f"rank {rank}: " * (rank > 0)}{error}', 'error')


if __name__ == '__main__':
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:  # closed, and its number free for the next file
            setattr(sys, name, open(os.devnull, 'w'))
    sys.stdout.reconfigure(errors='backslashreplace')  # the name of a class may be no text
    cli()
