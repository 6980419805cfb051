"""Counts what a training step launches on a GPU, without one: a table in Markdown.

    python tests/pretended_cuda attic/count_kernels.py                  # DenseNet-BC-100-12
    python tests/pretended_cuda attic/count_kernels.py --arch densenet121 --batch-size 256

The steps are bench.py's, in channels_last, on the pretended GPU of tests/pretended_cuda: torch
chooses the kernels and allocates the memory as with a GPU. Counted are kernels, copies within the
device and memsets of an eager step; a convolution and a product of matrices are one each, for which
a real library launches one or several. Memory is the peak of a step by torch's allocator, with
weights and momentum, without what libraries take. Counts say nothing about speed.
"""

import argparse
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import pretended_cuda

import bench
from training import networks

PRECISIONS = 'fp32', 'bf16', 'fp16'
ROWS = [('torchvision', 'plain'), ('torchvision', 'checkpointed'), ('timm', 'plain'),
        *(('ours', mode) for mode in bench.MODES if bench.MODES[mode].cuda)]


def count(row, args):
    """Operations of a step by kind, and bytes of memory at the most."""
    runner = bench.Runner(row, args, torch.device('cuda'))
    runner.start()
    operations = pretended_cuda.record(lambda: runner.step(*runner.batch))
    return [o for o in operations if o.kind in ('kernel', 'copy', 'memset')], runner.memory


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch')
    parser.add_argument('--batch-size', type=int, default=64)
    options = parser.parse_args(argv)
    args = bench.network_flags(**vars(options))
    print(f'{networks.name(args)}, {args.batch_size} images of {args.image_size} pixels, torch '
          f'{torch.__version__}: operations of an eager step, and GiB\n')
    print('|', ' | '.join(['', *PRECISIONS]), '|')
    print('|---' * (1 + len(PRECISIONS)) + '|')
    for source, mode in ROWS:
        cells = []
        for precision in PRECISIONS:
            operations, memory = count(bench.Row(source, mode, precision), args)
            cells.append(f'{len(operations):,}; {memory / 2**30:.2f}')
        print('|', ' | '.join([f'{source} {mode}', *cells]), '|', flush=True)


if __name__ == '__main__':
    main()
