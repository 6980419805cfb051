"""Draw a dense block of five layers with growth rate 4, as figure 1 of the paper does.

    python images/dense_block.py        # draws images/dense-block.png

The background is transparent and the colours are of medium lightness, for light and dark pages.
"""

import sys
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot

WIDTHS = [8, 4, 4, 4, 4, 4]  # maps: the input has 2k, as in DenseNet-BC, each layer k = 4
STEP = 2.6      # distance between layers
HEIGHT = 1.5    # of a feature map
TILT = 0.35     # its depth in the picture
SHIFT = 0.1     # between a map and the one behind it
BOX = 0.62      # width of a layer
MIDDLE = 0.95   # height of the straight arrows


def connect(axes, start, end, color, bend=0.0):
    """An arrow from (x, y) to (x, y), straight or, with `bend`, curved upwards."""
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=f'arc3,rad={-bend}', color=color,
                                   linewidth=1.5, arrowstyle='-|>', mutation_scale=11, shrinkA=0,
                                   shrinkB=1))


def draw_block(axes):
    below = dict(y=-0.25, color=plot.GREY, ha='center', va='top', fontsize=11.5)
    for i, width in enumerate(WIDTHS):
        for j in reversed(range(width)):  # maps one behind the other
            left = i * STEP + SHIFT * (j - (width - 1) / 2)
            corners = [(left, 0), (left + TILT, TILT), (left + TILT, HEIGHT + TILT), (left, HEIGHT)]
            axes.add_patch(Polygon(corners, facecolor=plot.COLORS[i], edgecolor='white',
                                   linewidth=0.7))
        name = f"layer {i}'s" if i else 'input:'
        axes.text(i * STEP + TILT / 2, s=f'{name}\n{width} maps', **below)
    for i, width in enumerate(WIDTHS):  # the layer or transition after each group of maps
        x = (i + 0.5) * STEP + 0.25
        is_layer = i + 1 < len(WIDTHS)
        axes.add_patch(FancyBboxPatch((x - BOX / 2, 0.2), BOX, HEIGHT, facecolor=plot.GREY,
                                      linewidth=0, boxstyle='round,pad=0.06,rounding_size=0.15'))
        axes.text(x, 0.2 + HEIGHT / 2, 'BN\nReLU\nconv' if is_layer else 'trans-\nition',
                  color='white', ha='center', va='center', fontsize=10.5, linespacing=1.5)
        axes.text(x, s=f'reads\n{sum(WIDTHS[:i + 1])}', **below)
        for j in range(i):
            end = x + 0.11 * ((i - 1) / 2 - j)  # so the arrows don't cross
            connect(axes, (j * STEP + TILT / 2, HEIGHT + TILT), (end, 0.2 + HEIGHT + 0.07),
                    plot.COLORS[j], bend=0.33)
        connect(axes, (i * STEP + SHIFT * width / 2 + TILT, MIDDLE), (x - BOX / 2 - 0.06, MIDDLE),
                plot.COLORS[i])
        if is_layer:
            connect(axes, (x + BOX / 2 + 0.06, MIDDLE), ((i + 1) * STEP - 0.12, MIDDLE), plot.GREY)


def main():
    figure = Figure(figsize=(11, 3.6))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-0.9, 15.3), ylim=(-1.05, 4.25), aspect='equal')
    axes.axis('off')
    draw_block(axes)
    figure.patch.set_alpha(0)
    plot.save_figure(figure, ROOT / 'images' / 'dense-block.png')


if __name__ == '__main__':
    main()
