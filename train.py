"""Train a DenseNet on CIFAR-10, CIFAR-100, SVHN, ImageNet, a folder of images, or drawn shapes.

    python train.py                                          # the paper's DenseNet-BC-100-12, C10+
    python train.py --depth 40 --no-bottleneck --compression 1 --name densenet-40-12
    python train.py --name densenet-40-12 --resume           # go on where it stopped
    python train.py --dataset imagenet --data /imagenet --arch densenet121 --workers 16
    python train.py --evaluate --resume work/densenet-40-12/best.pth

A run writes args.json, train.csv, test.csv, latest.pth, best.pth and its figures into its
directory, work/<name>. The defaults are the paper's: https://arxiv.org/abs/1608.06993, section 4.2.
"""

import argparse
import contextlib
import functools
import json
import math
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

import checkpoint
import data
import densenet
import runlog
from checkpoint import CheckpointError, TrainState
from data import DataError
from runlog import RunDirectoryError, RunLog

TORCHVISION_WEIGHTS = ('densenet121', 'densenet161', 'densenet169', 'densenet201')
ARCHITECTURES = TORCHVISION_WEIGHTS + ('densenet264', 'densenet232_k48', 'densenet264_k48')
AUTOCAST_TYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16}

# Three ways to say how many layers there are, of which a command may use one.
LAYER_FLAGS = ('arch', 'depth', 'block_config')
# What a run is resumed with unchanged.
FIXED_FLAGS = (*LAYER_FLAGS, 'growth_rate', 'compression', 'bottleneck', 'init_features',
               'bn_size', 'optimizer')
# Flags of one call of this script; with --resume, all others are by default the checkpoint's.
CALL_FLAGS = ('save', 'name', 'resume', 'overwrite', 'start_epoch', 'pretrained',
              'reset_classifier', 'evaluate', 'device')


class UsageError(Exception):
    """Flags that don't go together or with this machine, said in one line."""


class TrainingError(Exception):
    """Training that cannot go on, said in one line."""


class CaptureError(Exception):
    """A step that can't be recorded as a CUDA graph, said in one line."""


class Interrupted(Exception):
    """A signal asked the run to stop."""


# ---------------------------------------------------------------------------------------------
# Flags


class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the page of usage before it
        self.exit(2, f'{self.prog}: error: {message}\n')


def number(kind, interval):
    """An argparse type: int or float, in an interval such as '[0, 1)'."""
    low, high = map(float, interval[1:-1].split(','))
    name = {int: 'whole number', float: 'number'}[kind]

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            at_an_end = (value == low and interval[0] == '[') or \
                (value == high and interval[-1] == ']')
            if low < value < high or at_an_end:
                return value
        raise argparse.ArgumentTypeError(f'{text!r} is not a {name} in {interval}')
    return parse


POSITIVE, SHARE = number(int, '[1, inf)'), number(float, '[0, 1)')


def make_parser():
    parser = Parser(prog='train.py', description=__doc__.split('\n\n')[0], allow_abbrev=False,
                    epilog='With --resume, flags that are not given are the checkpoint\'s, all '
                           'but --device.')
    add_data_and_model_flags(parser)
    add_recipe_flags(parser)
    add_run_flags(parser)
    return parser


def add_data_and_model_flags(parser):
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', choices=data.NAMES, default='cifar10')
    group.add_argument('--data', metavar='DIR', default='work/data',
                       help='where the data are or go (default: %(default)s)')
    group.add_argument('--image-size', type=POSITIVE, metavar='PIXELS',
                       help='folder, imagenet (default: 224, or that of small images)')
    group.add_argument('--augment', action=argparse.BooleanOptionalAction, default=True,
                       help='crop and mirror (default: yes, svhn: no)')
    group.add_argument('--workers', '--nThreads', type=number(int, '[0, inf)'),
                       default=min(8, os.cpu_count() or 1),
                       help='processes that read images over 64 pixels (default: %(default)s)')

    group = parser.add_argument_group('model')
    group.add_argument('--arch', choices=ARCHITECTURES, metavar='NAME',
                       help=f'one of {", ".join(ARCHITECTURES)}')
    group.add_argument('--depth', '--layers', type=POSITIVE,
                       help='L: 6n+4, or 3n+4 without bottleneck (default: 100; imagenet: 121)')
    group.add_argument('--growth-rate', '--growth', '--growthRate', type=POSITIVE,
                       help='k (default: 12, or that of the --arch)')
    group.add_argument('--compression', '--reduce', '--reduction', default=0.5,
                       type=number(float, '(0, 1]'),
                       help='share of channels that a transition keeps (default: %(default)s)')
    group.add_argument('--no-bottleneck', dest='bottleneck', action='store_false',
                       help='no 1x1 convolution before each 3x3 one')
    group.add_argument('--block-config', type=POSITIVE, nargs='+', metavar='LAYERS',
                       help='layers of each block, instead of --depth')
    group.add_argument('--init-features', type=POSITIVE,
                       help='width of the first convolution (default: 2k with bottleneck and '
                            'compression, else 16; ImageNet\'s: 2k)')
    group.add_argument('--bn-size', type=POSITIVE, default=4,
                       help='width of the bottleneck, times k (default: %(default)s)')
    group.add_argument('--drop-rate', '--droprate', '--dropRate', type=SHARE, default=0.0,
                       help='dropout (default: 0; svhn, and cifar without augmentation: 0.2)')
    group.add_argument('--memory-efficient', action='store_true',
                       help='recompute instead of storing: less memory, more time')


def add_recipe_flags(parser):
    group = parser.add_argument_group('recipe')
    group.add_argument('--epochs', '--nEpochs', type=POSITIVE, default=300,
                       help='(default: %(default)s; svhn: 40, imagenet: 90)')
    group.add_argument('--batch-size', '-b', '--batchSz', '--batchSize', type=POSITIVE, default=64,
                       help='(default: %(default)s; imagenet: 256)')
    group.add_argument('--grad-accum', type=POSITIVE, default=1, metavar='N',
                       help='run each batch in N parts, for less memory (default: %(default)s)')
    group.add_argument('--optimizer', '--opt', choices=('sgd', 'adam', 'adamw', 'rmsprop'),
                       default='sgd', help='sgd has Nesterov momentum (default: %(default)s)')
    group.add_argument('--lr', '--learning-rate', '--LR', type=number(float, '(0, inf)'),
                       help='at the start (default: sgd 0.1, adam and adamw 0.001, rmsprop 0.01)')
    group.add_argument('--lr-schedule', '--lrShape', choices=('multistep', 'cosine'),
                       default='multistep',
                       help='multistep: a tenth from 50%% and again from 75%% of the epochs on '
                            '(imagenet: after each third); cosine: to 0, step by step '
                            '(default: %(default)s)')
    group.add_argument('--momentum', type=SHARE, default=0.9,
                       help='of sgd and rmsprop (default: %(default)s)')
    group.add_argument('--weight-decay', '--wd', '--weightDecay', type=number(float, '[0, inf)'),
                       default=1e-4, help='on every parameter (default: %(default)s)')
    group.add_argument('--label-smoothing', type=SHARE, default=0.0, help='(default: %(default)s)')
    group.add_argument('--seed', '--manualSeed', type=number(int, '[0, 4294967295]'), default=1,
                       help='(default: %(default)s)')


def add_run_flags(parser):
    group = parser.add_argument_group('machine')
    group.add_argument('--device', choices=('auto', 'cpu', 'cuda', 'mps'), default='auto',
                       help='(default: cuda if there is one, else cpu)')
    group.add_argument('--no-cuda', dest='device', action='store_const', const='cpu',
                       help='the same as --device cpu')
    group.add_argument('--precision', choices=('auto', 'fp32', 'tf32', 'bf16', 'fp16'),
                       default='auto', help='of the arithmetic; weights, statistics and losses are '
                       'fp32 (default: bf16 on cuda, tf32 where it has none; fp32 elsewhere)')
    group.add_argument('--cuda-graph', action=argparse.BooleanOptionalAction,
                       help='launch a training step as one CUDA graph (default: yes on cuda)')
    group.add_argument('--compile', action='store_true', help='torch.compile: minutes to start')

    group = parser.add_argument_group('run')
    group.add_argument('--name', help='the run directory is work/NAME (default: <dataset>.base)')
    group.add_argument('--save', metavar='DIR', help='the run directory, wherever you like')
    again = group.add_mutually_exclusive_group()
    again.add_argument('--resume', nargs='?', const='', metavar='CHECKPOINT',
                       help='go on from a checkpoint (default: latest.pth of the run directory)')
    again.add_argument('--overwrite', action='store_true', help='replace the run that is there')
    group.add_argument('--start-epoch', type=POSITIVE, metavar='EPOCH',
                       help='start at the beginning of this epoch, counted from 1')
    group.add_argument('--pretrained', '--retrain', nargs='?', const='', metavar='FILE',
                       help='start from the weights in a file (default: torchvision\'s for --arch)')
    group.add_argument('--reset-classifier', '--resetClassifier', action='store_true',
                       help='of --pretrained take all but the classifier')
    group.add_argument('--evaluate', '--testOnly', action='store_true',
                       help='only test what --resume or --pretrained names')
    group.add_argument('--ten-crop', '--tenCrop', action='store_true',
                       help='test on ten crops of each image over 64 pixels')
    group.add_argument('--print-freq', '-p', type=POSITIVE, default=50, metavar='STEPS',
                       help='steps to a row of train.csv (default: %(default)s)')
    group.add_argument('--tensorboard', action='store_true', help='write event files as well')
    group.add_argument('--no-plot', dest='plot', action='store_false',
                       help='draw no figures after each epoch')


def parse_args(argv=None):
    """The flags; what is not given comes from the resumed checkpoint, else from the data set."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.resume is not None:
        path = resume_path(args)
        saved = checkpoint.load(path).get('args')
        if not isinstance(saved, dict):
            raise CheckpointError(f'{path} holds no run to resume; for weights alone --pretrained')
        own = set(CALL_FLAGS)
        if any(getattr(args, flag) is not None for flag in LAYER_FLAGS):
            own.update(LAYER_FLAGS)
        parser.set_defaults(**{flag: saved[flag] for flag in vars(args)
                               if flag in saved and flag not in own})
    else:
        parser.set_defaults(**recipe(args))
    args = parser.parse_args(argv)
    if args.resume is not None:
        args.resume = path
    check_flags(args)
    return args


def recipe(args):
    """Defaults that depend on other flags: the paper's (section 4.2), those of the optimizers."""
    lr = {'sgd': 0.1, 'adam': 1e-3, 'adamw': 1e-3, 'rmsprop': 1e-2}[args.optimizer]
    if args.dataset == 'svhn':
        return dict(lr=lr, epochs=40, drop_rate=0.2, augment=False)
    if args.dataset == 'imagenet':
        return dict(lr=lr, epochs=90, batch_size=256)
    if args.dataset in ('cifar10', 'cifar100') and not args.augment:
        return dict(lr=lr, drop_rate=0.2)
    return dict(lr=lr)


def check_flags(args):
    if args.evaluate and args.resume is None and args.pretrained is None:
        raise UsageError('--evaluate needs a model: --resume CHECKPOINT or --pretrained FILE')
    if args.resume is not None and args.pretrained is not None:
        raise UsageError('--resume and --pretrained exclude each other: both bring weights')
    if args.reset_classifier and args.pretrained is None:
        raise UsageError('--reset-classifier is for the weights of --pretrained')
    if args.pretrained == '' and args.arch not in TORCHVISION_WEIGHTS:
        raise UsageError(f'--pretrained without a file needs --arch: torchvision has weights of '
                         f'{", ".join(TORCHVISION_WEIGHTS)}')
    if sum(getattr(args, flag) is not None for flag in LAYER_FLAGS) > 1:
        raise UsageError('--arch, --depth and --block-config exclude each other: give one')
    if args.grad_accum > args.batch_size:
        raise UsageError(f'--grad-accum {args.grad_accum} is more parts than a batch of '
                         f'{args.batch_size} has images')
    if args.start_epoch and args.start_epoch > args.epochs:
        raise UsageError(f'--start-epoch {args.start_epoch} is after the last of {args.epochs}')


def run_directory(args):
    """--save, or work/<name>, or where the resumed checkpoint lies, or work/<dataset>.base."""
    if args.save:
        return Path(args.save)
    if args.name:
        return Path('work', args.name)
    if args.resume:
        return Path(args.resume).parent
    return Path('work', f'{args.dataset}.base')


def resume_path(args):
    """The checkpoint that --resume means: a file, or latest.pth of a run directory."""
    path = Path(args.resume or run_directory(args))
    return str(path / 'latest.pth' if path.is_dir() or not args.resume else path)


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
            if chosen['arch'] not in ARCHITECTURES:
                raise UsageError(f'--depth {args.depth}: for images of {image_size} pixels there '
                                 f'are --arch {", ".join(ARCHITECTURES)} and --block-config')
    if args.growth_rate is None and chosen['arch'] is None:
        chosen['growth_rate'] = 12 if image_size <= data.SMALL else 32
    return argparse.Namespace(**chosen)


def build_model(args, dataset):
    """The network, on the CPU: it starts from the same weights wherever it runs."""
    small = dataset.image_size <= data.SMALL
    settings = dict(
        num_classes=dataset.num_classes, small_inputs=small,
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


def load_pretrained(model, args):
    """Weights from a file, ours or another's, or torchvision's download (--pretrained)."""
    if args.pretrained:
        saved = checkpoint.load(args.pretrained)
        weights = next((saved[key] for key in ('model', 'state_dict') if key in saved), saved)
    else:
        try:
            weights = torchvision.models.get_model_weights(args.arch).DEFAULT.get_state_dict()
        except Exception as error:  # no network, or a broken file in its cache
            raise UsageError(f'--pretrained: torchvision could not download or read its weights of '
                             f'{args.arch} ({error}); give a file: --pretrained FILE') from error
    if args.reset_classifier:
        weights = {key: weight for key, weight in weights.items() if 'classifier.' not in key}
        weights.update({f'classifier.{key}': weight
                        for key, weight in model.classifier.state_dict().items()})
    try:
        checkpoint.load_weights(model, weights, args.pretrained or 'torchvision\'s file')
    except CheckpointError as error:
        if 'classifier.' in str(error):
            raise CheckpointError(f'{error}: --reset-classifier starts that one anew') from error
        raise


def make_optimizer(args, model):
    parameters = list(model.parameters())
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
                      interval=torch.zeros(3, device=device))


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(lr)
        else:
            group['lr'] = lr


def learning_rate(args, epoch, done=0.0):
    """The learning rate in `epoch`, counted from 1, of which the share `done` is done.

    Of 300 epochs, 150 is the first at a tenth and 225 the first at a hundredth (official code); of
    ImageNet's 90 they are 31 and 61. The first epoch has the full rate, however few there are.
    """
    if args.lr_schedule == 'cosine':
        return args.lr * (1 + math.cos(math.pi * (epoch - 1 + done) / args.epochs)) / 2
    if args.dataset == 'imagenet':
        drops = sum(epoch > max(1, args.epochs * part) for part in (1 / 3, 2 / 3))
    else:
        drops = sum(epoch >= max(2, args.epochs * part) for part in (1 / 2, 3 / 4))
    return args.lr / 10**drops


# ---------------------------------------------------------------------------------------------
# The loop


def train_step(state, images, labels, *, autocast, grad_accum=1, label_smoothing=0.0):
    """One step on a batch, float32 [B, C, H, W] and int64 [B]; the host reads nothing back."""
    state.optimizer.zero_grad()
    for part, part_labels in zip(images.chunk(grad_accum), labels.chunk(grad_accum)):
        with autocast:
            logits = state.model(part)
        loss = F.cross_entropy(logits.float(), part_labels, reduction='sum',
                               label_smoothing=label_smoothing)
        state.scaler.scale(loss / len(images)).backward()
        state.interval[0].add_(loss.detach())
        state.interval[1].add_((logits.detach().argmax(1) != part_labels).sum())
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.interval[2].add_(state.interval[0].isfinite())


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

    def __call__(self, images, labels):
        static_images, static_labels = self.batches[images.shape]
        static_images.copy_(images)
        static_labels.copy_(labels)
        self.graphs[images.shape].replay()


def make_step(args, state, shapes, autocast):
    """The function of images and labels that trains `state`: a CUDA graph where that can be."""
    step = functools.partial(train_step, state, autocast=autocast, grad_accum=args.grad_accum,
                             label_smoothing=args.label_smoothing)
    device = state.interval.device.type
    if args.cuda_graph is False or (args.cuda_graph is None and device != 'cuda'):
        return step
    try:
        if device != 'cuda':
            raise CaptureError(f'the device is {device}')
        if args.optimizer == 'rmsprop' and state.scaler.is_enabled():
            raise CaptureError('with fp16, rmsprop waits for the host')
        return CudaGraphStep(step, state, shapes)
    except CaptureError as error:
        print(f'no CUDA graph, each kernel is launched by itself: {error}', flush=True)
        return step


def train_epoch(args, state, loader, log, step, stop):
    """The rest of the epoch that `state` is in."""
    state.model.train()
    loader.set_epoch(state.epoch, start=state.step)
    log.start_epoch(state.epoch, state.step)
    started, images_before = time.perf_counter(), state.interval_images
    for images, labels in loader:
        lr = learning_rate(args, state.epoch, state.step / len(loader))
        set_learning_rate(state.optimizer, lr)
        step(images, labels)
        state.count_step(len(images))
        log.advance()
        if state.step % args.print_freq == 0 or state.step == len(loader):
            loss, error, images_here = close_interval(state)
            now = time.perf_counter()
            log.train_row(state.epoch - 1 + state.step / len(loader), loss, error, lr,
                          (images_here - images_before) / (now - started))
            started, images_before = now, 0
        stop.check()


def check_finite(state):
    """The sums since the last row of train.csv, if all of their losses were finite."""
    loss, errors, finite_steps = state.interval.tolist()  # waits for the device
    if not math.isfinite(loss):
        step = state.step - state.interval_steps + int(finite_steps) + 1
        raise TrainingError(f'the loss is not finite at epoch {state.epoch}, step {step}: try a '
                            f'lower --lr; the last good checkpoint is untouched')
    return loss, errors


def close_interval(state):
    """Mean loss, error in percent and number of images since the last row; begins the next."""
    loss, errors = check_finite(state)
    images = state.interval_images
    sums = zip(state.epoch_sums, (loss, errors, images))
    state.epoch_sums = tuple(total + here for total, here in sums)
    state.begin_interval()
    return loss / images, 100 * errors / images, images


@torch.no_grad()
def evaluate(model, loader, autocast, check_stop=lambda: None):
    """Mean loss, top-1 and top-5 error in percent; of ten crops the logits are averaged."""
    model.eval()
    sums = None
    for images, labels in loader:
        with autocast:
            logits = model(images.flatten(0, -4)).float()  # crops, [B, 10, C, H, W], are flattened
        logits = logits.view(len(labels), -1, logits.shape[1]).mean(1)
        ranked = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
        batch = torch.stack([F.cross_entropy(logits, labels, reduction='sum'),
                             (~ranked[:, 0]).sum(), (~ranked.any(1)).sum()])
        sums = batch if sums is None else sums + batch
        check_stop()
    loss, errors, errors5 = (sums / loader.num_images).tolist()
    return loss, 100 * errors, 100 * errors5


class StopSignals:
    """Notes SIGINT and SIGTERM, for the loop to stop after its step; the second one kills."""

    received = None

    def __enter__(self):
        self.handlers = {signum: signal.signal(signum, self.note)
                         for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.handlers.items():
            signal.signal(signum, handler)

    def note(self, signum, _):
        self.received = signum
        signal.signal(signum, signal.SIG_DFL)

    def check(self):
        if self.received:
            raise Interrupted


@contextlib.contextmanager
def single_values_explained():
    try:
        yield
    except ValueError as error:
        if 'value per channel' not in str(error):
            raise
        raise UsageError('a batch, or with --grad-accum a part of one, has a single image, and '
                         'its last feature map is one pixel, which has no variance: change '
                         '--batch-size or --grad-accum') from error


def fit(args, state, step, train_loader, test_loader, log, autocast):
    """Train and test from where `state` is to the last epoch; save and exit if a signal comes."""
    latest, best = log.directory / 'latest.pth', log.directory / 'best.pth'

    def save(path):
        checkpoint.save(path, state.state_dict(), args=vars(args),
                        num_images=train_loader.num_images)

    if not latest.exists():  # a run that is killed in its first epoch can be resumed, too
        save(latest)
    with StopSignals() as stop:
        try:
            while state.epoch <= args.epochs:
                train_epoch(args, state, train_loader, log, step, stop)
                test = evaluate(state.model, test_loader, autocast, stop.check)
                improved = end_epoch(state, test, log)
                if improved:
                    save(best)
                save(latest)
        except (Interrupted, DataError) as stopped:  # either comes between two steps
            check_finite(state)
            save(latest)
            if isinstance(stopped, DataError):
                raise
            print(f'{signal.Signals(stop.received).name}: saved in epoch {state.epoch} after step '
                  f'{state.step}; --resume goes on from {latest}', flush=True)
            sys.exit(128 + stop.received)


def end_epoch(state, test, log):
    """Note the test results and go to the next epoch; is this one the best?"""
    loss, error, error5 = test
    if not math.isfinite(loss):
        raise TrainingError(f'the test loss is not finite after epoch {state.epoch}: try a lower '
                            f'--lr; the last good checkpoint is untouched')
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
    for flag in FIXED_FLAGS:
        if getattr(args, flag) != saved_args.get(flag):
            raise CheckpointError(f'{args.resume} is of another architecture or optimizer: its '
                                  f'{flag} is {saved_args.get(flag)}, not {getattr(args, flag)}')


def resume(args, state, saved, num_images):
    """Bring `state` to where the checkpoint was, or to the beginning of --start-epoch."""
    state.load_state_dict(saved, args.resume)
    if args.start_epoch:
        state.begin_epoch(args.start_epoch)
    before, now = (saved['args']['batch_size'], saved['num_images']), (args.batch_size, num_images)
    if state.step and before != now:
        raise CheckpointError(f'{args.resume} was written within an epoch of {before[1]} images in '
                              f'batches of {before[0]}, and cannot go on in one of {now[1]} in '
                              f'batches of {now[0]}; --start-epoch {state.epoch} begins it anew')
    print(f'resuming {args.resume} in epoch {state.epoch} after step {state.step}', flush=True)


def train(args, dataset, model, loaders, directory, *, device, precision, autocast, saved):
    """A whole run, in a directory that is ours."""
    train_loader, test_loader = loaders
    if args.batch_size > train_loader.num_images:
        raise UsageError(f'--batch-size {args.batch_size} is larger than the data set: '
                         f'{dataset.name} has {train_loader.num_images} training images')
    state = make_state(args, model, device, precision)
    if saved:
        resume(args, state, saved, train_loader.num_images)
    elif args.start_epoch:
        state.begin_epoch(args.start_epoch)
    if state.epoch <= args.epochs and not (directory / 'best.pth').exists():  # of another directory
        state.best_error, state.best_epoch = math.inf, 0
    if args.compile:
        model.compile()
    image = model.in_channels, dataset.image_size, dataset.image_size
    sizes = args.batch_size, train_loader.num_images % args.batch_size  # the last one is smaller
    with single_values_explained():
        step = make_step(args, state, [(n, *image) for n in sizes if n], autocast)
    graphed = isinstance(step, CudaGraphStep)
    record = describe_run(args, device, precision, graphed)
    if args.overwrite:
        runlog.clear(directory)
    with checkpoint.replacing(directory / 'args.json') as file:
        file.write(json.dumps(record, indent=2).encode())
    print(f'{model_name(args)}: {sum(p.numel() for p in model.parameters()):,} parameters; '
          f'{dataset.name}: {train_loader.num_images:,} training and {test_loader.num_images:,} '
          f'test images of {dataset.image_size} pixels, {dataset.num_classes} classes; '
          f'{record["device"]}, {precision}{", CUDA graph" * graphed}', flush=True)
    log = RunLog(directory, steps_per_epoch=len(train_loader), epochs=args.epochs,
                 start=(state.epoch, state.step), tensorboard=args.tensorboard, figures=args.plot)
    with contextlib.closing(log), single_values_explained():
        fit(args, state, step, train_loader, test_loader, log, autocast)
        log.finish_figures()
    print(f'final error {state.last_error:.2f}% (epoch {state.epoch - 1}), best '
          f'{state.best_error:.2f}% (epoch {state.best_epoch}); everything is in {directory}')


def main(argv=None):
    args = parse_args(argv)
    device = choose_device(args.device)
    precision = choose_precision(args.precision, device)
    autocast = make_autocast(precision, device)
    dataset = data.describe(args.dataset, args.data, args.image_size)
    args = choose_model(args, dataset.image_size)
    torch.manual_seed(args.seed)
    model = build_model(args, dataset)
    if args.pretrained is not None:
        load_pretrained(model, args)
    # Convolutions are faster with the channels innermost, also on the CPU, if a little; the
    # feature maps take the layout of the weights.
    model.to(device, memory_format=torch.channels_last)

    saved = checkpoint.load(args.resume) if args.resume else None
    if saved:
        check_fixed_flags(args, saved['args'])
    load_data = functools.partial(
        data.make_loaders, dataset, args.batch_size, device=device, augment=args.augment,
        seed=args.seed, workers=args.workers, ten_crop=args.ten_crop)
    if args.evaluate:
        if saved:
            checkpoint.load_weights(model, saved.get('model'), args.resume)
        loss, error, error5 = evaluate(model, load_data()[1], autocast)
        print(f'test loss {loss:.4f}, error {error:.2f}%, top-5 error {error5:.2f}%')
        return
    directory = run_directory(args)
    goes_on = saved is not None and Path(args.resume).parent.resolve() == directory.resolve()
    with runlog.claim(directory, may_hold_run=goes_on or args.overwrite):
        train(args, dataset, model, load_data(), directory, device=device, precision=precision,
              autocast=autocast, saved=saved)


def cli(argv=None):
    """`main`, with what a user can put right said in one line, and exit code 2."""
    try:
        main(argv)
    except (UsageError, TrainingError, CheckpointError, DataError, RunDirectoryError) as error:
        print(f'train.py: error: {error}', file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk that is full, a directory that must not be written to
        name = f'{error.filename}: ' if error.filename else ''
        print(f'train.py: error: {name}{error.strerror or error}', file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:  # before there was anything to save
        sys.exit(128 + signal.SIGINT)


if __name__ == '__main__':
    cli()
