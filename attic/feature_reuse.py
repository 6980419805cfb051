"""Draw how much each layer of a trained DenseNet uses the layers before it: the paper's figure 5.

    python attic/feature_reuse.py work/densenet-bc-100-12/best.pth
    python attic/feature_reuse.py work/x/best.pth --output images/feature-reuse.png

For each dense block, the mean absolute weight of layer l (a column) for the feature maps of layer s
(a row; 0 is the block's input): "Feature Reuse" in section 5 of the paper. The last column is the
transition after the block or, after the last block, the classifier. Each column is divided by its
largest value. Also prints the paper's four observations and numbers for or against them.
"""

import argparse
import sys
from pathlib import Path

import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parents[1]))

import plot
import predict
from densenet import DenseBlock, Transition
from training.console import UserError


def block_reuse(model):
    """Yields a float32 tensor [1 + layers, layers + 1] for each dense block: sources by readers.

    The first source is the block's input, the last reader the transition or classifier after it.
    NaN if the reader comes before the source.
    """
    blocks = [module for module in model.features if isinstance(module, DenseBlock)]
    follows = [module.conv for module in model.features if isinstance(module, Transition)]
    for block, last in zip(blocks, [*follows, model.classifier]):
        layers = list(block.values())
        last_convs = [getattr(layer, 'conv2', layer.conv1) for layer in layers]
        sizes = [layers[0].conv1.in_channels, *(conv.out_channels for conv in last_convs)]
        reuse = torch.full((len(sizes), len(sizes)), torch.nan)
        for column, reader in enumerate([*(layer.conv1 for layer in layers), last]):
            sources = reader.weight.detach().float().abs().split(sizes[:column + 1], dim=1)
            reuse[:column + 1, column] = torch.stack([weight.mean() for weight in sources])
        yield reuse


def draw(reuses, path):
    with rc_context({**plot.STYLE, 'axes.grid': False}):
        figure = Figure(figsize=(4 * len(reuses) + 1, 4.8), layout='constrained')
        axes = figure.subplots(1, len(reuses), squeeze=False)[0]
        for i, (axis, reuse) in enumerate(zip(axes, reuses), start=1):
            scaled = reuse / reuse.nan_to_num().amax(0)
            image = axis.imshow(scaled.numpy(), cmap='viridis', vmin=0, vmax=1)
            n = reuse.shape[1]
            axis.axvline(n - 1.5, color='white', linewidth=2)
            last = 'classifier' if i == len(reuses) else f'transition {i}'
            axis.set(title=f'dense block {i}', xlabel=f'layer (last column: {last})')
            ticks = sorted({0, n // 2 - 1, n - 2})
            axis.set_xticks([*ticks, n - 1], [*(t + 1 for t in ticks), last[0].upper()])
        axes[0].set_ylabel('source layer (0: input of the block)')
        figure.colorbar(image, ax=axes, label='mean absolute weight / largest of the column')
    plot.save_figure(figure, path)


def observations(reuse):
    """{one of the paper's four observations: the number for it in this block}."""
    third = len(reuse) // 3
    layers, last = reuse[1:-1, :-1], reuse[:, -1]  # no layer uses the last one
    return {
        'first third of the layers over last third, as used by the last third':
            layers[:third, -third:].nanmean() / layers[-third:, -third:].nanmean(),
        'least used source of the transition or classifier, over the mean':
            last.min() / last.mean(),
        'input of the block over the mean source, as used by its layers':
            (reuse[0, :-1] / reuse[:, :-1].nanmean(0)).mean(),
        'last third of the layers over the mean, as used by the transition or classifier':
            last[-third:].mean() / last.mean()}


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
        parser.exit(2, f'feature_reuse.py: error: {error}\n')
    blocks = [observations(reuse) for reuse in reuses]
    for line in blocks[0]:
        print(f'{line}: {", ".join(f"{block[line]:.2f}" for block in blocks)}')
    print(args.output)


if __name__ == '__main__':
    main()
