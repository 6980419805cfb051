"""argparse for the scripts: one-line errors, suggestions for unknown flags, and types of values.

Does not import torch, so that --help and wrong flags answer at once.
"""

import argparse
import contextlib
import difflib
import re
import sys

from training.console import UserError

# Flags of other repositories (timm, torchvision's references, the official code) and ours instead.
FLAGS_ELSEWHERE = {
    **dict.fromkeys(('--gpu', '--gpus', '--gpu-id', '--gpu-ids', '--num-gpu'),
                    '--device cuda, on the GPU that CUDA_VISIBLE_DEVICES names'),
    **dict.fromkeys(('--model', '-a', '--netType'), '--arch'),
    **dict.fromkeys(('-j', '--num-workers', '--num_workers'), '--workers'),
    **dict.fromkeys(('--amp', '--bf16'), '--precision bf16'), '--fp16': '--precision fp16',
    **dict.fromkeys(('--output', '--output-dir', '--outdir', '--checkpoint-dir'), '--save'),
    **dict.fromkeys(('--input-size', '--img-size', '--crop-size'), '--image-size'),
    **dict.fromkeys(('--data-path', '--data-dir', '--dataroot'), '--data'),
    **dict.fromkeys(('--weights', '--finetune', '--initial-checkpoint'), '--pretrained'),
    **dict.fromkeys(('--sched', '--lr-scheduler', '--scheduler'), '--lr-schedule'),
    **dict.fromkeys(('--test-only', '--eval', '--validate'), '--evaluate'),
    **dict.fromkeys(('--model-ema', '--model-ema-decay'), '--ema'),
    **dict.fromkeys(('--reprob', '--random-erase'), '--random-erasing'),
    **dict.fromkeys(('--mixup-alpha', '--cutmix-alpha'), '--mixup or --cutmix'),
    **dict.fromkeys(('--early-stopping', '--early-stop'), '--patience'),
    **dict.fromkeys(('--multi-label', '--multilabel', '--csv', '--label-file'), '--labels'),
    **dict.fromkeys(('--folds', '--k-fold', '--kfold'), '--fold 1/5'), '--aa': '--auto-augment',
    **dict.fromkeys(('--hflip', '--no-flip', '--no-hflip'), '--no-mirror'),
    **dict.fromkeys(('--freeze-bn', '--bn-frozen'), '--freeze-norm'),
    '--num-classes': '--dataset folder, which has a class per folder',
    '--drop': '--drop-rate', '--smoothing': '--label-smoothing', '--tta': '--ten-crop',
    '--log-interval': '--print-freq', '--warmup': '--warmup-epochs',
    '--lr-warmup-epochs': '--warmup-epochs', '--experiment': '--name', '--logdir': '--save',
    '--wandb': '--tensorboard', '--log-wandb': '--tensorboard', '--channels': '--in-channels',
    '--accum-iter': '--grad-accum', '--grad-accum-steps': '--grad-accum',
    '--checkpointing': '--memory-efficient', '--optMemory': '--memory-efficient',
    '--torchcompile': '--compile', '--no-aug': '--no-augment', '--da': '--no-augment',
}


class Parser(argparse.ArgumentParser):
    """Raises UserError instead of printing the usage, and suggests flags for unknown ones."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._negative_number_matcher = re.compile(r'-\.?\d')  # -1e-5, too, as of Python 3.14

    def error(self, message):
        raise UserError(message)

    def parse_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        for flag in args:  # the official code's single dash: -batchSize would be -b atchSize
            flag = flag.partition('=')[0]
            if flag.startswith('-') and f'-{flag}' in self._option_string_actions:
                raise UserError(f'there is no {flag}: did you mean -{flag}?')
        args, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition('=')[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, 1, 0.85)
            known = FLAGS_ELSEWHERE.get(flag, near[0] if near else None)
            raise UserError(f'there is no {flag}' + (f': did you mean {known}?' if known else ''))
        return args


def number(kind, interval):
    """An argparse type: int or float, in an interval such as '[0, 1)'."""
    low, high = map(float, interval[1:-1].split(','))
    closed_ends = [end for end, bracket in ((low, '['), (high, ']')) if bracket in interval]
    name = {int: 'whole number', float: 'number'}[kind]

    def parse(text):
        with contextlib.suppress(ValueError):
            value = kind(text)
            if low < value < high or value in closed_ends:
                return value
        raise argparse.ArgumentTypeError(f'{text!r} is not a {name} in {interval}')
    return parse


def one_of(*names):
    """An argparse type: one of the names, or 'none', which is None."""
    def parse(text):
        if text not in (*names, 'none'):
            raise argparse.ArgumentTypeError(f'{text!r} is none of {", ".join((*names, "none"))}')
        return None if text == 'none' else text
    return parse


POSITIVE, SHARE = number(int, '[1, 1000000000]'), number(float, '[0, 1)')


def fold(text):
    """An argparse type: 'i/k' with 1 <= i <= k and k >= 2."""
    i, slash, k = text.partition('/')
    if not (i.isdecimal() and k.isdecimal() and 1 <= int(i) <= int(k) >= 2):
        raise argparse.ArgumentTypeError(f'{text!r} is not I/K, such as 1/5, with I from 1 to K')
    return f'{int(i)}/{int(k)}'


class ImageSize(argparse.Action):
    """One number or HEIGHT WIDTH: an int, or (height, width) if they differ."""

    def __call__(self, parser, namespace, values, option_string=None):
        if len(values) > 2:
            raise argparse.ArgumentError(self, 'one number, or height and width')
        size = values[0] if len(set(values)) == 1 else tuple(values)
        setattr(namespace, self.dest, size)
