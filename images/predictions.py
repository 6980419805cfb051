"""Draw test images that a trained network classifies right and wrong.

    python images/predictions.py work/densenet-bc-100-12/best.pth --data work/data/cifar10-jpeg

Writes images/predictions.png: for each class, the three right and the three wrong answers with the
highest probability.
"""

import argparse
import dataclasses
import math
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import plot
import predict
from training import datasets, evaluation, loaders
from training.console import UserError
from training.device import make_autocast

SHOWN = 3  # right and wrong images per class


def draw_images(axes, images, labels, probabilities, classes):
    """A column for each class: right answers above, wrong ones with the predicted class below.

    Returns the lowest probability of the wrong answers shown, 1.0 if there are none.
    """
    confidence, answers = probabilities.max(1)
    is_right, lowest = answers == labels, 1.0
    for label, column in enumerate(axes.T):
        column[0].set_title(plot.shorten(classes[label], 16), fontsize=9)
        for rows, chosen in ((column[:SHOWN], is_right), (column[SHOWN:], ~is_right)):
            here = torch.where(chosen & (labels == label))[0]
            order = confidence[here].argsort(descending=True, stable=True)  # many are 1.0
            for axis, i in zip(rows, here[order]):
                axis.imshow(images[i].permute(1, 2, 0).numpy(), interpolation='nearest')
                if answers[i] != label:
                    axis.set_xlabel(plot.shorten(classes[answers[i]], 16), fontsize=8, labelpad=2)
                    lowest = min(lowest, confidence[i].item())
    axes[SHOWN // 2, 0].set_ylabel('right')
    axes[SHOWN + SHOWN // 2, 0].set_ylabel('wrong, predicted as')
    return lowest


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint')
    parser.add_argument('--data', required=True, type=Path, help='with test/ or val/')
    parser.add_argument('--output', type=Path, default=ROOT / 'images/predictions.png')
    args = parser.parse_args(argv)
    device = torch.device('cpu')
    try:
        model, dataset = predict.load_model(args)
        if not dataset.in_memory:
            raise UserError(f'only for networks for images of up to {datasets.SMALL} pixels')
        dataset = dataclasses.replace(dataset, root=args.data)
        loader = loaders.make_loader(dataset, 'test', 250, device=device)
    except UserError as error:
        parser.exit(2, f'predictions.py: error: {error}\n')
    outputs = []
    test = evaluation.evaluate(model.to(memory_format=torch.channels_last), loader,
                               make_autocast('fp32', device), outputs=outputs)
    labels, logits = map(torch.cat, zip(*outputs))
    frames = {f'axes.spines.{side}': True for side in ('top', 'right')}
    with rc_context({**plot.STYLE, **frames}):
        figure = Figure(figsize=(10, 6.6), layout='constrained')
        axes = figure.subplots(2 * SHOWN, len(dataset.classes),
                               subplot_kw=dict(xticks=[], yticks=[]))
        lowest = draw_images(axes, loader.images, labels, logits.softmax(1), dataset.classes)
        figure.suptitle(
            f'{Path(args.checkpoint).parent.name}: {len(labels):,} test images of '
            f'{args.data.name}, error {test.error:.2f}%\nThe right and the wrong answers with the '
            f'highest probability (the wrong ones: {math.floor(1000 * lowest) / 10}% or more)',
            fontsize=10)
    plot.save_figure(figure, args.output)
    print(args.output)


if __name__ == '__main__':
    main()
