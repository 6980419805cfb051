"""Draw which feature maps the layers of a trained DenseNet read: figure 5 of the paper.

    python attic/feature_reuse.py work/densenet-bc-100-12/best.pth
    python attic/feature_reuse.py work/x/best.pth --output images/feature-reuse.png

For each dense block, the mean absolute weight with which layer l (a column) reads the maps that
layer s (a row; 0 is the block's input) has made: "Feature Reuse" in section 5 of the paper. The
last column is the transition after the block or, of the last block, the classifier. Each column is
divided by its largest value. The paper's four observations are printed, with the numbers that speak
for or against them.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import predict
import runlog
from errors import UserError


def block_reuse(model):
    """For each dense block, a float32 tensor [1 + layers, layers + 1]: sources by readers.

    The first source is the block's input, the last reader the transition or classifier after it.
    NaN where a reader comes before the source.
    """
    features = dict(model.features.named_children())
    blocks = [name for name in features if name.startswith('denseblock')]
    for i, name in enumerate(blocks, start=1):
        layers = list(features[name].values())
        follows = features[f'transition{i}'].conv if i < len(blocks) else model.classifier
        readers = [*(layer.conv1 for layer in layers), follows]
        sizes = [layers[0].conv1.in_channels] + [model.config['growth_rate']] * len(layers)
        reuse = torch.full((len(sizes), len(readers)), torch.nan)
        for column, reader in enumerate(readers):
            sources = reader.weight.detach().float().split(sizes[:column + 1], dim=1)
            for row, weight in enumerate(sources):
                reuse[row, column] = weight.abs().mean()
        yield reuse


def draw(reuses, path):
    figure = Figure(figsize=(4 * len(reuses) + 1, 4.8), layout='constrained')
    axes = figure.subplots(1, len(reuses), squeeze=False)[0]
    for i, (axis, reuse) in enumerate(zip(axes, reuses), start=1):
        scaled = reuse / reuse.nan_to_num().amax(0)
        image = axis.imshow(scaled.numpy(), cmap='jet', vmin=0, vmax=1)
        n = reuse.shape[1]
        axis.axvline(n - 1.5, color='black', linewidth=1)
        last = 'classifier' if i == len(reuses) else f'transition {i}'
        axis.set(title=f'dense block {i}', xlabel=f'reading layer (last column: {last})')
        ticks = sorted({0, n // 2 - 1, n - 2})
        axis.set_xticks([*ticks, n - 1], [*(t + 1 for t in ticks), last[0].upper()])
    axes[0].set_ylabel('source layer (0: input of the block)')
    figure.colorbar(image, ax=axes, label='mean absolute weight, of the column\'s largest')
    figure.savefig(path, dpi=120)


def observations(reuses):
    """The paper's four, each with what was measured here: a line each, a number a block."""
    lines = {'first third of the layers over last third, as the last third reads them': [],
             'source that the transition or classifier reads least, over the mean': [],
             'input of the block, over the mean source, as its layers read it': [],
             'last third of the layers, over the mean, as transition or classifier read it': []}
    for reuse in reuses:
        third = len(reuse) // 3
        layers, last = reuse[1:-1, :-1], reuse[:, -1]  # no layer reads the last one
        values = (layers[:third, -third:].nanmean() / layers[-third:, -third:].nanmean(),
                  last.min() / last.mean(), (reuse[0, :-1] / reuse[:, :-1].nanmean(0)).mean(),
                  last[-third:].mean() / last.mean())
        for line, value in zip(lines.values(), values):
            line.append(f'{value:.2f}')
    return [f'{line}: {", ".join(values)}' for line, values in lines.items()]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint', help='best.pth or latest.pth of a run')
    parser.add_argument('--output', type=Path, default=Path('images/feature-reuse.png'))
    args = parser.parse_args(argv)
    try:
        model, _ = predict.load_model(args)
        reuses = list(block_reuse(model))
        draw(reuses, args.output)
    except (UserError, OSError) as error:
        runlog.warn(error, 'error', 'feature_reuse.py')
        sys.exit(2)
    print('\n'.join(observations(reuses)))
    print(args.output)


if __name__ == '__main__':
    main()
