"""The network that the flags of train.py describe: build it, name it, fuse it.

    model = networks.build(args, num_classes=10, image_size=32)
    networks.fuse(model, device)
"""

import torch

import densenet
import fused_dense_block
from fused_dense_block import library
from training import datasets, distributed
from training.console import UserError, warn
from training.device import AUTOCAST_TYPES


def build(args, num_classes, image_size):
    """Build the network that the flags describe, on the CPU; `args` from `flags.with_network`.

    Raises:
        UserError: there is no such network, or the images are too small for it.
    """
    small = datasets.is_small(image_size)
    settings = dict(
        growth_rate=args.growth_rate, num_init_features=args.init_features,
        num_classes=num_classes, small_inputs=small, in_channels=args.in_channels,
        drop_rate=args.drop_rate, bn_size=args.bn_size, compression=args.compression,
        bottleneck=args.bottleneck, memory_efficient=args.memory_efficient)
    settings = {name: value for name, value in settings.items() if value is not None}
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
    except (ValueError, RuntimeError) as error:  # RuntimeError: out of memory
        raise UserError(f'no such model: {error}') from error
    if min(datasets.sides(image_size)) < model.min_size:
        raise UserError(f'this model needs images of at least {model.min_size} pixels, and these '
                        f'have {datasets.show_size(image_size)}')
    return model


def name(args):
    if args.arch is not None:
        return args.arch
    letters = ('B' if args.bottleneck else '') + ('C' if args.compression < 1 else '')
    layers = f'L={args.depth}' if args.depth else f'blocks {"-".join(map(str, args.block_config))}'
    return f'DenseNet{"-" if letters else ""}{letters} {layers} k={args.growth_rate}'


def fuse(model, device, script='train.py'):
    """Fuse the dense blocks of a model that will be moved to `device`.

    If an edited densenet.py can't be fused, warns; the model then runs layer by layer.

    Returns:
        The reason why it was not fused, or None.
    """
    try:
        fused_dense_block.fuse(model, kernels=device.type == 'cpu')
    except ValueError as error:
        if distributed.rank() == 0:
            warn(f'{error}: it runs layer by layer, which is slower', script=script)
        return str(error)
    return None


def cpu_kernels(model, device, precision):
    """The instructions of the CPU kernels, such as 'avx2 fma', or None if none are used.

    Two runs end with the same bits only if they are the same.
    """
    if device.type != 'cpu' or model.not_fused:
        return None
    return library.description(AUTOCAST_TYPES.get(precision, torch.float32))


def choose_kernels(saved, precision):
    """Multiply bf16 as the run of a checkpoint did, if this CPU can; to be called before `fuse`."""
    if precision == 'bf16':
        library.resumed = saved.get('cpu_kernels')


def warn_of_other_kernels(saved, now):
    before = saved.get('cpu_kernels')
    if before and before != now and distributed.rank() == 0:
        warn(f'trained so far with CPU kernels for {before}, and from now on for {now or "none"}: '
             f'results will differ in the last bits')


def warn_of_slow_bf16(model, device, precision):
    """Warn if bf16 has neither CPU kernels nor instructions.

    torch 2.14 then multiplies bf16 by a plain loop (pytorch/pytorch#146508): on AVX2, convolutions
    took 10 to 40 times as long as in fp32.
    """
    if (precision == 'bf16' and device.type == 'cpu' and not cpu_kernels(model, device, precision)
            and not torch.ops.mkldnn._is_mkldnn_bf16_supported() and distributed.rank() == 0):
        warn('this CPU has no bf16 instructions, and without the CPU kernels bf16 can take many '
             'times as long as --precision fp32')
