"""The flags of train.py: names, aliases, defaults, and checks.

    given = flags.parse(['--depth', '40'])     # a Namespace with only the given flags
    args = flags.complete(given)               # a Namespace with all flags

Defaults come from the data set's recipe or, on --resume, from the checkpoint
(`checkpoint.with_saved_flags`). They are the paper's, section 4.2; the aliases are those of the
classic repositories. Opens no file and does not import torch, so that --help and wrong flags answer
at once.
"""

import argparse
import os
from pathlib import Path

from training.console import UserError
from training.datasets import DATASETS, MAX_CHANNELS, MAX_SIZE, is_small, show_size
from training.parsing import POSITIVE, SHARE, ImageSize, Parser, fold, number, one_of

DEVICES = 'auto', 'cpu', 'cuda', 'mps'
PRECISIONS = 'fp32', 'tf32', 'bf16', 'fp16'
TORCHVISION_WEIGHTS = ('densenet121', 'densenet161', 'densenet169', 'densenet201')
ARCHITECTURES = TORCHVISION_WEIGHTS + ('densenet264', 'densenet232_k48', 'densenet264_k48')
LEARNING_RATES = {'sgd': 0.1, 'adam': 1e-3, 'adamw': 1e-3, 'rmsprop': 1e-2}
LAYERS = number(int, '[1, 10000]')  # of a block, or --depth; more take minutes to build
# Defaults with --pretrained; attic/own-images.md compares them with others.
FINE_TUNING = dict(epochs=30, lr_schedule='cosine')

LAYER_FLAGS = ('arch', 'depth', 'block_config')  # mutually exclusive
# Flags that describe the network. They must agree with a checkpoint that is evaluated or resumed.
MODEL_FLAGS = (*LAYER_FLAGS, 'growth_rate', 'compression', 'bottleneck', 'init_features',
               'bn_size', 'in_channels')
# Flags that --resume does not take from the checkpoint.
CALL_FLAGS = ('save', 'name', 'resume', 'overwrite', 'start_epoch', 'pretrained',
              'reset_classifier', 'evaluate', 'device')
EXAMPLES = """examples:
  python train.py --depth 40 --no-bottleneck --compression 1 --name densenet-40-12
  python train.py --name densenet-40-12 --resume
  python train.py --dataset folder --data flowers --pretrained --reset-classifier --lr 0.01

With --resume, flags that are not given are taken from the checkpoint, except --device.
"""


def make_parser():
    parser = Parser(prog='train.py', description='Train a DenseNet.', allow_abbrev=False,
                    epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_data_flags(parser)
    add_model_flags(parser)
    add_recipe_flags(parser)
    add_run_flags(parser)
    return parser


def add_data_flags(parser):
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', choices=DATASETS, default='cifar10')
    group.add_argument('--data', metavar='DIR', default='work/data',
                       help='where the data set is, or is downloaded to (default: %(default)s)')
    group.add_argument('--image-size', type=number(int, f'[1, {MAX_SIZE}]'), nargs='+',
                       action=ImageSize, metavar='PIXELS',
                       help='folder, imagenet: one number, or height and width (default: 224, or '
                            'the size of small images)')
    group.add_argument('--in-channels', type=number(int, f'[1, {MAX_CHANNELS}]'), default=3,
                       metavar='N', help='folder, imagenet: 1 for grey images; other numbers for '
                       '.npy, TIFF and, if 4, RGBA, whose alpha is the fourth channel (default: '
                       '%(default)s)')
    group.add_argument('--value-range', type=number(float, '(-1e30, 1e30)'), nargs=2,
                       metavar=('LOW', 'HIGH'), help='of images of more than 8 bits '
                       '(default: measured on the training images)')
    for name, what in (('--mean', 'mean'), ('--std', 'standard deviation')):
        group.add_argument(name, type=number(float, '(-1e30, 1e30)' if name == '--mean' else
                                             '(0, 1e30)'), nargs='+', metavar='VALUE',
                           help=f'{what} of each channel, of values in 0..1 (default: those of the '
                                f'data set)')
    group.add_argument('--labels', metavar='FILE', help='folder: a CSV file with the columns file '
                       'and label, or file and a column per class (1, 0 or empty), and optionally '
                       'split and group; the files are in --data (default: a folder per class)')
    held_out = group.add_mutually_exclusive_group()
    held_out.add_argument('--val-split', type=SHARE, default=0.0, metavar='SHARE',
                          help='hold out this share of the training images of each class, to '
                               'choose best.pth; images of one group stay together')
    held_out.add_argument('--fold', type=fold, metavar='I/K',
                          help='hold out fold I, counted from 1, of K')
    group.add_argument('--augment', action=argparse.BooleanOptionalAction, default=True,
                       help='crop and mirror (default: yes, svhn: no)')
    group.add_argument('--mirror', action=argparse.BooleanOptionalAction, default=True,
                       help='mirror half of the images, where they are augmented (default: yes, '
                            'svhn: no); left and right matter in radiology')
    group.add_argument('--color-jitter', action=argparse.BooleanOptionalAction, default=True,
                       help='vary brightness, contrast and colours of images over 64 pixels, where '
                            'they are augmented (default: yes)')
    group.add_argument('--auto-augment', type=one_of('randaugment', 'trivialaugment'),
                       metavar='{randaugment,trivialaugment,none}',
                       help='also apply torchvision\'s RandAugment or TrivialAugmentWide')
    group.add_argument('--random-erasing', type=SHARE, default=0.0, metavar='P',
                       help='erase a part of an image with this probability (default: 0)')
    group.add_argument('--mixup', type=number(float, '[0, 1e3]'), default=0.0, metavar='ALPHA',
                       help='mix pairs of images and labels (default: 0, off)')
    group.add_argument('--cutmix', type=number(float, '[0, 1e3]'), default=0.0, metavar='ALPHA',
                       help='paste a part of an image into another (default: 0, off)')
    group.add_argument('--workers', '--nThreads', type=number(int, '[0, 1024]'),
                       help='worker processes that decode images, per process of torchrun '
                            f'(default: one per core, at most 8; here {default_workers()})')


def add_model_flags(parser):
    group = parser.add_argument_group('model')
    layers = group.add_mutually_exclusive_group()
    layers.add_argument('--arch', choices=ARCHITECTURES, metavar='NAME',
                        help=f'one of {", ".join(ARCHITECTURES)}')
    layers.add_argument('--depth', '--layers', type=LAYERS,
                        help='L: 6n+4, or 3n+4 without bottleneck (default: 100; images of more '
                             'than 64 pixels: 121)')
    layers.add_argument('--block-config', type=LAYERS, nargs='+', metavar='LAYERS',
                        help='layers of each block, instead of --depth')
    group.add_argument('--growth-rate', '--growth', '--growthRate', type=POSITIVE,
                       help='k (default: 12; images of more than 64 pixels: 32, or the one of '
                            '--arch)')
    group.add_argument('--compression', '--reduce', '--reduction', default=0.5,
                       type=number(float, '(0, 1]'),
                       help='share of channels that a transition keeps (default: %(default)s)')
    group.add_argument('--no-bottleneck', dest='bottleneck', action='store_false',
                       help='no 1x1 convolution before each 3x3 one')
    group.add_argument('--init-features', type=POSITIVE,
                       help='width of the first convolution (default: 2k with bottleneck and '
                            'compression, otherwise 16; ImageNet\'s: 2k)')
    group.add_argument('--bn-size', type=POSITIVE, default=4,
                       help='width of the bottleneck, times k (default: %(default)s)')
    group.add_argument('--drop-rate', '--droprate', '--dropRate', type=SHARE, default=0.0,
                       help='dropout (default: 0; svhn, and cifar without augmentation: 0.2)')
    group.add_argument('--memory-efficient', action=argparse.BooleanOptionalAction, default=False,
                       help='recompute instead of storing: less memory, more time')


def default_workers():
    """One worker per available core, divided among the processes of torchrun; at most 8."""
    has_affinity = hasattr(os, 'sched_getaffinity')  # not on macOS
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    return max(1, min(8, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))


def num_workers(args):
    """--workers, or the default of this machine, which a checkpoint does not take to another."""
    return default_workers() if args.workers is None else args.workers


def add_recipe_flags(parser):
    group = parser.add_argument_group('recipe')
    group.add_argument('--epochs', '--nEpochs', type=POSITIVE, default=300,
                       help='(default: %(default)s; svhn: 40, imagenet: 90; with --pretrained: 30)')
    group.add_argument('--batch-size', '-b', '--batchSz', '--batchSize', type=POSITIVE, default=64,
                       help='of all processes together (default: %(default)s; imagenet: 256)')
    group.add_argument('--grad-accum', type=POSITIVE, default=1, metavar='N',
                       help='run each batch in N parts, for less memory (default: %(default)s)')
    group.add_argument('--optimizer', '--opt', choices=tuple(LEARNING_RATES),
                       default='sgd', help='sgd has Nesterov momentum (default: %(default)s)')
    group.add_argument('--lr', '--learning-rate', '--LR', type=number(float, '(0, 1e30]'),
                       help='initial learning rate (default: ' + ', '.join(
                           f'{name} {rate:g}' for name, rate in LEARNING_RATES.items()) + ')')
    group.add_argument('--lr-schedule', '--lrShape', choices=('multistep', 'cosine'),
                       default='multistep',
                       help='multistep: divide by 10 at 50%% and 75%% of the epochs (imagenet: '
                            'every 30 epochs); cosine: to 0, step by step '
                            '(default: %(default)s; with --pretrained: cosine)')
    group.add_argument('--warmup-epochs', type=number(float, '[0, inf)'), default=0.0,
                       metavar='EPOCHS', help='linear warm-up from a hundredth of the '
                       'learning rate, step by step (default: 0)')
    group.add_argument('--momentum', type=SHARE,
                       help='of sgd and rmsprop (default: sgd 0.9, rmsprop 0)')
    group.add_argument('--weight-decay', '--wd', '--weightDecay', type=number(float, '[0, 1e30]'),
                       default=1e-4, help='applied to every parameter (default: %(default)s)')
    group.add_argument('--label-smoothing', type=SHARE, default=0.0, help='(default: %(default)s)')
    group.add_argument('--head-lr', type=number(float, '(0, 1e30]'), metavar='LR',
                       help='learning rate of the classifier (default: --lr)')
    group.add_argument('--ema', type=number(float, '(0, 1)'), metavar='DECAY',
                       help='test and save moving averages of the weights, such as 0.999')
    group.add_argument('--patience', type=POSITIVE, metavar='EPOCHS',
                       help='stop after this many epochs without improvement')
    group.add_argument('--class-weights', type=one_of('balanced'), metavar='{balanced,none}',
                       help='weight the loss by inverse class frequency')
    group.add_argument('--seed', '--manualSeed', type=number(int, '[0, 4294967295]'), default=1,
                       help='(default: %(default)s)')


def add_run_flags(parser):
    group = parser.add_argument_group('machine')
    group.add_argument('--device', choices=DEVICES, default='auto',
                       help='(default: cuda if there is one, otherwise cpu; mps only if asked for)')
    group.add_argument('--no-cuda', dest='device', action='store_const', const='cpu',
                       help='the same as --device cpu')
    group.add_argument('--precision', choices=('auto', *PRECISIONS), default='auto',
                       help='of the forward and backward pass; weights, statistics and '
                       'losses are fp32 (default: bf16 on cuda, tf32 if the GPU has no bf16; '
                       'fp32 elsewhere)')
    group.add_argument('--cuda-graph', action=argparse.BooleanOptionalAction,
                       help='launch a training step as one CUDA graph (default: yes on cuda)')
    group.add_argument('--deterministic', action=argparse.BooleanOptionalAction, default=False,
                       help='bit-identical runs on a GPU too, but slower')
    group.add_argument('--compile', action=argparse.BooleanOptionalAction, default=False,
                       help='use torch.compile (minutes to start)')

    group = parser.add_argument_group('run')
    group.add_argument('--name', help='the run directory is work/NAME (default: <dataset>.base; '
                       '<dataset>.pretrained for --evaluate --pretrained)')
    group.add_argument('--save', metavar='DIR', help='the run directory, instead of work/NAME')
    again = group.add_mutually_exclusive_group()
    again.add_argument('--resume', nargs='?', const='', metavar='CHECKPOINT',
                       help='resume from a checkpoint (default: latest.pth in the run directory, '
                            'or start a new run if there is none)')
    again.add_argument('--overwrite', action='store_true', help='replace an existing run')
    group.add_argument('--start-epoch', type=number(int, '[0, 1000000000]'), metavar='EPOCH',
                       help='start at the beginning of this epoch, counted from 1')
    group.add_argument('--pretrained', '--retrain', nargs='?', const='', metavar='FILE',
                       help='start from the weights in FILE: .pth, .safetensors, .t7 of Lua Torch; '
                            'FILE:NAME for one of several networks in it (default: torchvision\'s '
                            'for --arch)')
    group.add_argument('--reset-classifier', '--resetClassifier', action='store_true',
                       help='load --pretrained without its classifier')
    group.add_argument('--freeze-features', action='store_true',
                       help='train only the classifier; the rest stays as in --pretrained')
    group.add_argument('--freeze-norm', action='store_true',
                       help='keep weights and statistics of the batch norms as in --pretrained')
    group.add_argument('--evaluate', '--testOnly', action='store_true',
                       help='only evaluate the model of --resume or --pretrained')
    group.add_argument('--best-by', choices=('error', 'balanced-error', 'loss', 'auc'),
                       default='error', help='metric that picks best.pth, on val/ or, without it, '
                       'test/; balanced-error: mean over the classes; auc: mean area under the ROC '
                       'curve (default: %(default)s)')
    group.add_argument('--ten-crop', '--tenCrop', action=argparse.BooleanOptionalAction,
                       default=False,
                       help='test on ten crops of each image over 64 pixels')
    group.add_argument('--print-freq', '-p', type=POSITIVE, default=50, metavar='STEPS',
                       help='steps per row of train.csv (default: %(default)s)')
    group.add_argument('--tensorboard', action=argparse.BooleanOptionalAction, default=False,
                       help='also write event files')
    group.add_argument('--plot', action=argparse.BooleanOptionalAction, default=True,
                       help='draw the figures after each epoch (default: yes)')


def parse(argv=None, parser=None):
    """Parse only the given flags, without defaults, into a Namespace.

    Args:
        parser: from `make_parser`, perhaps with additional flags.

    Raises:
        UserError: an unknown flag or a wrong value.
    """
    parser, absent = parser or make_parser(), object()
    names = vars(parser.parse_args(argv))  # --help shows the defaults
    given = parser.parse_args(argv, argparse.Namespace(**dict.fromkeys(names, absent)))
    return argparse.Namespace(**{name: value for name, value in vars(given).items()
                                 if value is not absent})


def with_defaults(given, parser=None):
    """The given flags, completed by the parser's defaults."""
    parser = parser or make_parser()
    return argparse.Namespace(**{**vars(parser.parse_args([])), **vars(given)})


def complete(given, saved=None, parser=None):
    """All flags: given ones first, then the checkpoint's or the recipe's, then parser defaults.

    Args:
        given: the Namespace of `parse`.
        saved: the dict of flags in the checkpoint to resume, or None.

    Raises:
        UserError: contradictory flags.
    """
    parser = parser or make_parser()
    given, defaults = vars(given), vars(parser.parse_args([]))
    if saved is None:
        others = recipe({**defaults, **given})
    else:
        new_layers = any(flag in given for flag in LAYER_FLAGS)
        fixed = {*CALL_FLAGS, *(LAYER_FLAGS if new_layers else ())}
        others = {flag: value for flag, value in saved.items()
                  if flag in defaults and flag not in fixed and value is not None}
        others = {**recipe({**defaults, **others}), **others}
    args = argparse.Namespace(**{**defaults, **others, **given})
    check_flags(args)
    return args


def recipe(args):
    """Defaults that depend on the data set (section 4.2), the optimizer and --pretrained."""
    dataset = DATASETS[args['dataset']]
    flags = dict(lr=LEARNING_RATES[args['optimizer']], augment=dataset.augment,
                 in_channels=len(dataset.mean), momentum=0.9 if args['optimizer'] == 'sgd' else 0.0,
                 **dataset.recipe)
    if not args['augment']:
        flags.update(dataset.recipe_without_augment)
    if args['pretrained'] is not None:
        flags.update(FINE_TUNING)
    return flags


def with_network(args, image_size):
    """The flags with depth or architecture, and growth rate, filled in for the image size."""
    chosen = {**vars(args), 'image_size': image_size}
    small = is_small(image_size)
    if args.arch is None and args.block_config is None:
        if small:
            chosen['depth'] = args.depth or 100
        else:  # as in the official code, the depth names the network
            chosen.update(depth=None, arch=f'densenet{args.depth or 121}')
            if chosen['arch'] not in ARCHITECTURES:
                raise UserError(f'--depth {args.depth}: for images of {show_size(image_size)} '
                                f'pixels there are --arch {", ".join(ARCHITECTURES)} and '
                                f'--block-config')
    if args.growth_rate is None and chosen['arch'] is None:
        chosen['growth_rate'] = 12 if small else 32
    return argparse.Namespace(**chosen)


def check_flags(args):
    for flag in ('evaluate', 'freeze_features', 'freeze_norm'):
        if getattr(args, flag) and args.resume is None and args.pretrained is None:
            raise UserError(f'--{flag.replace("_", "-")} needs a model: --resume for the one in '
                            f'{run_directory(args)}, --resume CHECKPOINT or --pretrained [FILE]')
    if args.resume is not None and args.pretrained is not None:
        raise UserError('--resume and --pretrained are mutually exclusive: both load weights')
    if args.reset_classifier and args.pretrained is None:
        raise UserError('--reset-classifier needs --pretrained')
    if args.evaluate and args.reset_classifier:
        raise UserError('--evaluate --reset-classifier would test a classifier without training')
    if args.value_range and args.value_range[0] >= args.value_range[1]:
        raise UserError('--value-range LOW HIGH: LOW must be less than HIGH')
    if args.evaluate:
        return
    for flag in ('auto_augment', 'random_erasing', 'mixup', 'cutmix'):
        if getattr(args, flag) and not args.augment:
            raise UserError(f'--{flag.replace("_", "-")} needs --augment, which is off by default '
                            f'for svhn')
    if args.auto_augment and args.in_channels not in (1, 3):
        raise UserError('--auto-augment is for images of 1 or 3 channels')
    if args.head_lr and args.freeze_features:
        raise UserError('--freeze-features trains only the classifier, whose learning rate is --lr')
    processes = int(os.environ.get('WORLD_SIZE', 1))  # set by torchrun
    if args.grad_accum * processes > args.batch_size:
        raise UserError(f'--batch-size {args.batch_size} is for all processes together: it must be '
                        f'at least --grad-accum {args.grad_accum} times {processes} processes')
    if args.start_epoch and args.start_epoch > args.epochs:
        raise UserError(f'--start-epoch {args.start_epoch} is after the last, {args.epochs}')


def run_directory(args):
    """--save, work/<name>, or the directory of the checkpoint to resume.

    Otherwise work/<dataset>.base or, to evaluate --pretrained, work/<dataset>.pretrained.
    """
    if args.save:
        return Path(args.save)
    if args.name:
        return Path('work', args.name)
    if args.resume:
        return Path(args.resume).parent
    is_other_model = args.evaluate and args.pretrained is not None
    return Path('work', f'{args.dataset}.{"pretrained" if is_other_model else "base"}')
