"""Reduce a checkpoint to what is needed to use the network: for the repository, or for others.

    python attic/clean_checkpoint.py work/x/best.pth --output weights.pth

The weights are rounded to fp16 (running statistics stay fp32: a variance may be below fp16's
smallest number); optimizer, random states and sums are left out. Evaluation, `predict.py` and
fine-tuning take it as any other checkpoint, but training can't be resumed from it.
"""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import checkpoint
from training.console import UserError


def clean(saved):
    """A copy of a checkpoint without training state, and with weights and biases in fp16."""
    left_out = {'optimizer', 'scaler', 'processes', 'trained_model', 'average_updates'}
    kept = {key: saved[key] for key in saved.keys() - left_out}
    kept['model'] = {key: tensor.half() if key.endswith(('weight', 'bias')) else tensor
                     for key, tensor in saved['model'].items()}
    return kept


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint', type=Path, help='best.pth or latest.pth of a run')
    parser.add_argument('--output', type=Path, required=True, metavar='FILE',
                        help='where to write; must not be there yet')
    args = parser.parse_args(argv)
    try:
        saved = checkpoint.load(args.checkpoint)
        if not saved.keys() >= {'model', 'config', 'dataset', 'args'}:
            raise UserError(f'{args.checkpoint} is not a checkpoint of a run')
        if args.output.exists():
            raise UserError(f'{args.output} is there already: name another file')
        checkpoint.save(args.output, clean(saved))
    except (UserError, OSError) as error:
        parser.exit(2, f'clean_checkpoint.py: error: {error}\n')
    before, after = (path.stat().st_size / 1e6 for path in (args.checkpoint, args.output))
    print(f'{args.output}: {after:.2f} MB, of {before:.2f}')


if __name__ == '__main__':
    main()
