"""Means and standard deviations of the channels of a data set, for training/datasets.py.

    python attic/channel_stats.py                                    # CIFAR-10
    python attic/channel_stats.py --dataset cifar100
    python attic/channel_stats.py --dataset imagenet --data /data/imagenet --workers 16
    python attic/channel_stats.py --dataset folder --data fields --in-channels 5

Measures the training images, on the scale 0..255; ImageNet's are resized and cropped as for
testing. Two standard deviations are in use: CIFAR is normalised by the standard deviation of all
pixels together, ImageNet by the mean of the standard deviations of the images. The first is larger,
because it includes how the images differ in brightness.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from training import datasets, loaders


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


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('--dataset', choices=datasets.DATASETS, default='cifar10', help='(default: %(default)s)')
    add('--data', metavar='DIR', default='work/data', help='(default: %(default)s)')
    add('--workers', type=int, default=0, help='that read image files (default: 0)')
    add('--in-channels', type=int, default=3, help='of images in folders (default: 3)')
    args = parser.parse_args(argv)
    try:
        dataset = datasets.describe(args.dataset, args.data, in_channels=args.in_channels)
        raw = dataclasses.replace(dataset, mean=(0.0,) * len(dataset.mean),
                                  std=(1.0,) * len(dataset.mean))
        loader = loaders.make_loader(raw, 'train', batch_size=100, device=torch.device('cpu'),
                                  workers=args.workers)
        rows = channel_statistics(loader).tolist()
    except (datasets.DataError, OSError) as error:
        parser.exit(2, f'channel_stats.py: error: {error}\n')
    print(f'{args.dataset}: {loader.num_images:,} training images of {dataset.image_size} pixels')
    names = ('mean', 'std of all pixels', 'mean std of an image', 'mean in datasets.py',
             'std in datasets.py')
    for name, values in zip(names, [*rows, dataset.mean, dataset.std]):
        print(f'{name:<23}' + ''.join(f'{value:>10.3f}' for value in values))
    for flag, values in zip(('--mean', '--std'), rows):
        print(flag, *(f'{value / 255:.4f}' for value in values))


if __name__ == '__main__':
    main()
