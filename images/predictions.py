"""Draw test images that a trained network gets right and wrong.

    python images/predictions.py work/densenet-bc-100-12/best.pth --data work/data/cifar10-jpeg

Writes images/predictions.png: for each class, the three images that the network gives the highest
probability of all it gets right, and the three wrong answers that it is surest of.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import predict  # noqa: E402
import train  # noqa: E402
from training import datasets, loaders  # noqa: E402
from training.console import UserError  # noqa: E402
from training.device import make_autocast  # noqa: E402

SHOWN = 3  # right and wrong images of each class


def draw_images(axes, images, labels, probabilities, classes):
    """A column for each class: right answers above, wrong ones with their names below."""
    confidence, answers = probabilities.max(1)
    is_right = answers == labels
    for label, column in enumerate(axes.T):
        column[0].set_title(classes[label], fontsize=9)
        for rows, chosen in ((column[:SHOWN], is_right), (column[SHOWN:], ~is_right)):
            here = torch.where(chosen & (labels == label))[0]
            for axis, i in zip(rows, here[confidence[here].argsort(descending=True)]):
                axis.imshow(images[i].permute(1, 2, 0).numpy(), interpolation='nearest')
                if answers[i] != label:
                    axis.set_xlabel(f'{classes[answers[i]]}\n{confidence[i]:.0%}',
                                    color='tab:red', fontsize=8, labelpad=2)
    axes[SHOWN // 2, 0].set_ylabel('right', fontsize=10)
    axes[SHOWN + SHOWN // 2, 0].set_ylabel('wrong: taken for', fontsize=10)


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
            raise UserError(f'this is for networks for images of up to {datasets.SMALL} pixels')
        dataset = dataclasses.replace(dataset, root=args.data)
        loader = loaders.make_loader(dataset, 'test', 250, device=device)
    except UserError as error:
        parser.exit(2, f'predictions.py: error: {error}\n')
    outputs = []
    test = train.evaluate(model.to(memory_format=torch.channels_last), loader,
                          make_autocast('fp32', device), outputs=outputs)
    labels, probabilities = map(torch.cat, zip(*outputs))
    figure = Figure(figsize=(10, 7), layout='constrained')
    axes = figure.subplots(2 * SHOWN, len(dataset.classes), subplot_kw=dict(xticks=[], yticks=[]))
    draw_images(axes, loader.images, labels, probabilities, dataset.classes)
    figure.suptitle(f'{Path(args.checkpoint).parent.name}: {len(labels):,} test images of '
                    f'{args.data.name}, error {test.error:.2f}%')
    figure.savefig(args.output, dpi=110)
    print(args.output)


if __name__ == '__main__':
    main()
