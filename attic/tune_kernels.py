"""Which sizes of tiles are the fastest for the Triton kernels, on this GPU.

    python attic/tune_kernels.py                                          # DenseNet-BC-100-12
    python attic/tune_kernels.py --arch densenet121 --batch-size 256
    python attic/tune_kernels.py --depth 190 --growth-rate 40 --keep 5    # the five fastest of each

For the middle layer of each dense block, the sizes that densenet_triton.py has in its functions
`conv_tile` and `conv_backward_tile`, and below them the fastest of all others that fit on the GPU,
in microseconds. Each of these is compiled first: some minutes for a network, a second time none.
"""

import argparse
import itertools
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import triton  # noqa: E402

import bench  # noqa: E402
import densenet_triton as kernels  # noqa: E402
import flags  # noqa: E402
import train  # noqa: E402


def candidates(tile, forward):
    """All tiles of forward's or backward's kernel, for as many outputs as this one, worth a try."""
    choices = dict(ROWS=(32, 64, 128) if forward else (16, 32, 64),
                   IN=(32, 64) if forward else (32, 64, 128), num_warps=(4, 8),
                   num_stages=(2, 3, 4) if forward else (2, 3))
    return [tile | dict(zip(choices, values)) for values in itertools.product(*choices.values())]


def times_of_tiles(name, function, device, rounds):
    """[(seconds, tile)] of an operation of `bench.layer_operations`, the table's tile first."""
    forward = 'forward' in name
    chooser = 'conv_tile' if forward else 'conv_backward_tile'
    choose, found = getattr(kernels, chooser), []

    def time_with(choose_here):
        setattr(kernels, chooser, choose_here)
        return bench.time_operation(lambda: function(True), device, rounds)

    tiles = []
    try:
        seconds = time_with(lambda *args: tiles.append(choose(*args)) or tiles[-1])
        found.append((seconds, tiles[0]))
        for tile in candidates(tiles[0], forward):
            try:
                found.append((time_with(lambda *args, tile=tile: tile), tile))
            except triton.runtime.errors.OutOfResources:
                pass  # it does not fit on this GPU
    finally:
        setattr(kernels, chooser, choose)
    return found


def describe(tile):
    return ', '.join(f'{name} {value}' for name, value in tile.items()
                     if name != 'enable_fp_fusion')


def make_parser():
    parser = flags.Parser(prog='tune_kernels.py', description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', choices=flags.ARCHITECTURES, metavar='NAME',
                        help='an ImageNet network instead of DenseNet-BC for CIFAR')
    parser.add_argument('--depth', type=flags.POSITIVE, help='(default: 100)')
    parser.add_argument('--growth-rate', type=flags.POSITIVE, help='(default: 12)')
    parser.add_argument('--image-size', type=flags.POSITIVE, metavar='PIXELS',
                        help='(default: 32, with --arch 224)')
    parser.add_argument('--batch-size', '-b', type=flags.POSITIVE, default=64,
                        help='(default: %(default)s)')
    parser.add_argument('--precision', choices=('bf16', 'fp16'), default='bf16')
    parser.add_argument('--rounds', type=flags.POSITIVE, default=10, help='(default: %(default)s)')
    parser.add_argument('--keep', type=flags.POSITIVE, default=3, metavar='N',
                        help='how many of the fastest to print (default: %(default)s)')
    return parser


def main(argv=None):
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        device = train.choose_device('auto')
        bench.check_kernels(device, [args.precision])
        workload = bench.describe_network(args)
    except (flags.UsageError, ValueError) as error:
        parser.exit(2, f'tune_kernels.py: error: {error}\n')
    dtype = {'bf16': torch.bfloat16, 'fp16': torch.float16}[args.precision]
    for shape, num_layers in zip(bench.block_inputs(workload), workload.block_config):
        operations = bench.layer_operations(shape, num_layers, workload.growth_rate, device, dtype)
        for name, (_, function) in operations.items():
            (seconds, tile), *others = times_of_tiles(name, function, device, args.rounds)
            print(f'{shape[2]}x{shape[3]} pixels, {name}: {1e6 * seconds:.1f}  {describe(tile)}')
            for seconds, tile in sorted(others, key=lambda other: other[0])[:args.keep]:
                print(f'    {1e6 * seconds:.1f}  {describe(tile)}', flush=True)


if __name__ == '__main__':
    main()
