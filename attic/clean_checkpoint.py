"""Reduce a checkpoint to what is needed to use the network: for the repository, or for others.

    python attic/clean_checkpoint.py work/x/best.pth --output work/x/best.pth

The weights are rounded to fp16 (batch statistics stay fp32: a variance may be below fp16's
smallest number); optimizer, random states and sums are left out. `train.py` evaluates, predicts
and fine-tunes with it as with any other checkpoint, but can't go on training where it stopped.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import checkpoint  # noqa: E402
from checkpoint import CheckpointError  # noqa: E402

KEPT = ('config', 'dataset', 'args', 'last_error', 'best_error', 'best_epoch', 'seconds',
        'peak_memory')


def clean(saved):
    """What to keep of a checkpoint of train.py, a dictionary that `checkpoint.load` returns."""
    model = {key: tensor if 'running' in key or not tensor.is_floating_point() else tensor.half()
             for key, tensor in saved['model'].items()}
    if not all(torch.isfinite(tensor).all() for tensor in model.values()):
        raise CheckpointError('a weight is not finite, or too large for fp16')
    return {'model': model, **{key: saved[key] for key in KEPT if key in saved}}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', type=Path, help='best.pth or latest.pth of a run')
    parser.add_argument('--output', type=Path, required=True, metavar='FILE',
                        help='where to write; it may be the same file')
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        saved, before = checkpoint.load(args.checkpoint), args.checkpoint.stat().st_size
        if not saved.keys() >= {'model', 'config', 'dataset', 'args'}:
            raise CheckpointError(f'{args.checkpoint} is not a checkpoint of a run of train.py')
        checkpoint.save(args.output, clean(saved))
    except CheckpointError as error:
        parser.exit(2, f'clean_checkpoint.py: error: {error}\n')
    except OSError as error:
        parser.exit(2, f'clean_checkpoint.py: error: {args.output} cannot be written: '
                       f'{error.strerror}\n')
    print(f'{args.output}: {args.output.stat().st_size / 1e6:.2f} MB, of {before / 1e6:.2f}')


if __name__ == '__main__':
    main()
