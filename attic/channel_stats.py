"""Means and standard deviations of the channels of a data set, for training/datasets.py.

    python attic/channel_stats.py                                    # CIFAR-10
    python attic/channel_stats.py --dataset cifar100
    python attic/channel_stats.py --dataset imagenet --data /data/imagenet --workers 16
    python attic/channel_stats.py --dataset folder --data fields --in-channels 5

Measures the training images, on the scale 0..255, resized and cropped as for testing. Takes
train.py's flags, and leaves out the same images: `--labels x.csv --val-split 0.1`. Two standard
deviations are in use: CIFAR is normalized by the standard deviation of all pixels together,
ImageNet by the mean of the standard deviations of the images. The first is larger, because it
includes how the images differ in brightness.
"""

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import checkpoint, console, flags, loaders


def channel_statistics(loader):
    """Three float64 numbers a channel, [3, C], of a loader of images with their own values.

    They are the mean, the standard deviation of all pixels, and the mean of the images' own.
    """
    sums = 0
    for images, _ in loader:
        pixels = images.flatten(2).double()  # [B, C, H * W]
        sums = sums + torch.stack([pixels.mean(2).sum(0), pixels.square().mean(2).sum(0),
                                   pixels.std(2, correction=0).sum(0)])
    mean, square, own_std = sums / loader.num_images
    return torch.stack([mean, (square - mean**2).sqrt(), own_std])


def make_parser():
    parser = flags.make_parser()
    parser.prog, parser.description = 'channel_stats.py', __doc__.partition('\n')[0]
    return parser


def run(argv):
    args = flags.complete(flags.parse(argv, make_parser()))
    dataset = checkpoint.describe_data(args, None)
    raw = dataclasses.replace(dataset, mean=(0.0,) * len(dataset.mean),
                              std=(1.0,) * len(dataset.mean))
    loader = loaders.make_loader(raw, 'train', batch_size=100, device=torch.device('cpu'),
                                 workers=flags.num_workers(args))
    rows = channel_statistics(loader).tolist()
    print(f'{args.dataset}: {loader.num_images:,} training images of {dataset.image_size} pixels')
    names = ('mean', 'std of all pixels', 'mean std of an image', 'mean in datasets.py',
             'std in datasets.py')
    for name, values in zip(names, [*rows, dataset.mean, dataset.std]):
        print(f'{name:<23}' + ''.join(f'{value:>10.3f}' for value in values))
    for flag, values in zip(('--mean', '--std'), rows):
        print(flag, *(f'{value / 255:.4f}' for value in values))


def main(argv=None):
    console.exit_on_user_error(lambda: run(argv), 'channel_stats.py')


if __name__ == '__main__':
    main()
