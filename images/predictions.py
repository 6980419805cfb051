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
        for first, chosen in ((0, answers == labels), (SHOWN, answers != labels)):
            here = torch.where(chosen & (labels == label))[0]
            surest = here[confidence[here].argsort(descending=True)]
            for axis, i in zip(axes[first:first + SHOWN, label], surest):
                axis.imshow(images[i].numpy(), interpolation='nearest')
                if answers[i] != label:
                    axis.set_xlabel(f'{classes[answers[i]]}\n{confidence[i]:.0%}',
                                    color='tab:red', fontsize=8, labelpad=2)
        axes[0, label].set_title(name, fontsize=9)
    axes[SHOWN // 2, 0].set_ylabel('right', fontsize=10)
    axes[SHOWN + SHOWN // 2, 0].set_ylabel('wrong: taken for', fontsize=10)


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
    figure = Figure(figsize=(10, 7), layout='constrained')
    axes = figure.subplots(2 * SHOWN, len(dataset.classes), subplot_kw=dict(xticks=[], yticks=[]))
    draw_images(axes, images, labels, probabilities, dataset.classes)
    error = 100 * (probabilities.argmax(1) != labels).double().mean().item()
    figure.suptitle(f'{Path(args.checkpoint).parent.name}: {len(labels):,} test images of '
                    f'{args.data.name}, error {error:.2f}%')
    figure.savefig(args.output, dpi=110)
    print(args.output)


if __name__ == '__main__':
    main()
