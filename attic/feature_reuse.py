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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import predict  # noqa: E402
import runlog  # noqa: E402
from errors import UserError  # noqa: E402


def mean_weights(weight, sizes):
    """Of a weight [out, in, ...], the mean absolute value for consecutive groups of inputs."""
    return torch.stack([part.abs().mean() for part in weight.detach().float().split(sizes, dim=1)])


def block_reuse(model):
    """For each dense block, a float32 tensor [1 + layers, layers + 1]: sources by readers.

    The first source is the block's input, the last reader the transition or classifier after it.
    NaN where a reader comes before the source.
    """
    features = dict(model.features.named_children())
    blocks = [name for name in features if name.startswith('denseblock')]
    for i, name in enumerate(blocks, start=1):
        layers = list(features[name].values())
        k = model.config['growth_rate']
        sizes = [layers[0].conv1.in_channels] + [k] * len(layers)
        follows = features[f'transition{i}'].conv if i < len(blocks) else model.classifier
        readers = [layer.conv1.weight for layer in layers] + [follows.weight]
        reuse = torch.full((len(sizes), len(readers)), torch.nan)
        for column, weight in enumerate(readers):
            reuse[:column + 1, column] = mean_weights(weight, sizes[:column + 1])
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
    """The paper's four, each with what was measured here, a line each."""
    spread = [reuse[1:i + 1, i].amax() / reuse[1:i + 1, i].mean() for reuse in reuses
              for i in range(2, reuse.shape[1] - 1)]
    early = [reuse[1:1 + n // 3, n - 1 - n // 3:n - 1].mean()
             / reuse[n - 1 - n // 3:n - 1, n - 1 - n // 3:n - 1].nanmean()
             for reuse in reuses for n in [reuse.shape[1]]]
    after = [reuse[:, -1] / reuse[:, -1].mean() for reuse in reuses]
    inputs = [(reuse[0, :-1] / reuse[:, :-1].nanmean(0)).mean() for reuse in reuses]
    third = len(after[-1]) // 3

    def listed(values):
        return ', '.join(f'{value:.2f}' for value in values)

    return [
        f'layers read all of their block: the largest weight is {sum(spread) / len(spread):.2f} '
        f'times the mean over the sources; the last third of the layers reads the first third with '
        f'{listed(early)} of the weight with which it reads itself, in blocks 1 to {len(reuses)}',
        f'transitions do, too: smallest and largest over mean '
        f'{"; ".join(listed([a.min(), a.max()]) for a in after[:-1])}',
        f'the block\'s input is read least in later blocks: over mean {listed(inputs)}',
        f'the classifier reads the last maps most: last third over mean '
        f'{after[-1][-third:].mean():.2f}, first third {after[-1][:third].mean():.2f}']


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint', help='best.pth or latest.pth of a run')
    parser.add_argument('--output', type=Path, default=ROOT / 'images/feature-reuse.png')
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
