"""Draw test images that a trained network gets right and wrong, and its confusion matrix.

    python images/predictions.py work/densenet-bc-100-12/best.pth --data work/data/cifar10-jpeg

Writes images/predictions.png: for each class, the three images that the network gives the highest
probability of all it gets right, the three wrong answers that it is surest of, and beside them how
many images of each class (row) are taken for which (column).
"""

import argparse
import dataclasses
import sys
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import data  # noqa: E402
import predict  # noqa: E402
import runlog  # noqa: E402
from errors import UserError  # noqa: E402

SHOWN = 3  # right and wrong images of each class


@torch.no_grad()
def classify_all(model, loader, dataset):
    """All test images as uint8 [N, H, W, 3], their labels and the probabilities [N, classes]."""
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (dataset.mean, dataset.std))
    model = model.to(memory_format=torch.channels_last)
    parts = [((images * std + mean).round().byte().permute(0, 2, 3, 1), labels,
              model(images).softmax(1)) for images, labels in loader]
    return [torch.cat(part) for part in zip(*parts)]


def draw_images(axes, images, labels, probabilities, classes):
    """A column for each class: right answers above, wrong ones with their names below."""
    confidence, answers = probabilities.max(1)
    for label, name in enumerate(classes):
        for half, chosen in enumerate((answers == labels, answers != labels)):
            here = torch.where(chosen & (labels == label))[0]
            surest = here[confidence[here].argsort(descending=True)[:SHOWN]]
            for row in range(SHOWN):
                axis = axes[half * SHOWN + row, label]
                axis.set(xticks=[], yticks=[])
                if row >= len(surest):
                    axis.axis('off')
                    continue
                axis.imshow(images[surest[row]].numpy(), interpolation='nearest')
                if half:
                    axis.set_xlabel(f'{classes[answers[surest[row]]]}\n'
                                    f'{confidence[surest[row]]:.0%}', color='tab:red', fontsize=8,
                                    labelpad=2)
        axes[0, label].set_title(name, fontsize=9)
    axes[SHOWN // 2, 0].set_ylabel('right', fontsize=10)
    axes[SHOWN + SHOWN // 2, 0].set_ylabel('wrong: taken for', fontsize=10)


def draw_confusion(axis, labels, answers, classes):
    n = len(classes)
    counts = torch.bincount(labels * n + answers, minlength=n * n).view(n, n)
    shares = counts / counts.sum(1, keepdim=True)
    axis.imshow(shares.sqrt(), cmap='Blues', vmin=0, vmax=1)  # the square root shows few, too
    for row in range(n):
        for column in range(n):
            axis.text(column, row, counts[row, column].item(), ha='center', va='center', fontsize=8,
                      color='white' if shares[row, column] > 0.25 else 'black')
    axis.set_xticks(range(n), classes, rotation=45, ha='right', fontsize=9)
    axis.set_yticks(range(n), classes, fontsize=9)
    axis.set(xlabel='answer', ylabel='class')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint')
    parser.add_argument('--data', required=True, type=Path, help='with test/ or val/')
    parser.add_argument('--output', type=Path, default=ROOT / 'images/predictions.png')
    args = parser.parse_args(argv)
    try:
        model, dataset = predict.load_model(args)
        dataset = dataclasses.replace(dataset, root=args.data)
        loader = data.make_loader(dataset, 'test', 250, device=torch.device('cpu'))
        images, labels, probabilities = classify_all(model, loader, dataset)
    except UserError as error:
        runlog.warn(error, 'error', 'predictions.py')
        sys.exit(2)
    answers = probabilities.argmax(1)
    error = 100 * (answers != labels).double().mean().item()
    figure = Figure(figsize=(17, 7), layout='constrained')
    left, right = figure.subfigures(1, 2, width_ratios=[1.45, 1])
    draw_images(left.subplots(2 * SHOWN, len(dataset.classes)), images, labels, probabilities,
                dataset.classes)
    draw_confusion(right.subplots(), labels, answers, dataset.classes)
    figure.suptitle(f'{Path(args.checkpoint).parent.name}: {len(labels):,} test images of '
                    f'{args.data.name}, error {error:.2f}%')
    figure.savefig(args.output, dpi=90)
    print(args.output)


if __name__ == '__main__':
    main()
