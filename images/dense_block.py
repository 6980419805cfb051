"""Draw a dense block of five layers with growth rate 4, as figure 1 of the paper does.

    python images/dense_block.py        # draws images/dense-block.png

Its background is transparent and its colours are of medium lightness, for pages light and dark.
"""

import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Polygon

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import plot  # noqa: E402

NUM_LAYERS, GROWTH_RATE, INPUT = 5, 4, 8  # an input of twice the growth rate, as in DenseNet-BC
COLORS = plot.COLORS[:NUM_LAYERS + 1]
STEP = 2.6      # from one layer to the next
HEIGHT = 1.5    # of a feature map
TILT = 0.35     # its depth in the picture
BOX = 0.62      # width of a layer


def draw_maps(axes, x, count, color):
    """Feature maps, one behind the other; returns the x of the middle of their upper edge."""
    for i in reversed(range(count)):
        left = x + 0.1 * i
        corners = [(left, 0), (left + TILT, TILT), (left + TILT, HEIGHT + TILT), (left, HEIGHT)]
        axes.add_patch(Polygon(corners, facecolor=color, edgecolor='white', linewidth=0.7))
    return x + (0.1 * (count - 1) + TILT) / 2


def draw_layer(axes, x, lines):
    axes.add_patch(FancyBboxPatch((x - BOX / 2, 0.2), BOX, HEIGHT, facecolor=plot.GREY, linewidth=0,
                                  boxstyle='round,pad=0.06,rounding_size=0.15'))
    axes.text(x, 0.2 + HEIGHT / 2, '\n'.join(lines), color='white', ha='center', va='center',
              fontsize=10.5, linespacing=1.5)


def connect(axes, start, end, color, lift):
    """An arrow from (x, y) to (x, y), straight or, with `lift`, over what lies between."""
    style = f'arc3,rad={-lift}' if lift else 'arc3'
    axes.add_patch(FancyArrowPatch(start, end, connectionstyle=style, color=color, linewidth=1.5,
                                   arrowstyle='-|>', mutation_scale=11, shrinkA=0, shrinkB=1))


def draw_block(axes):
    tops = []  # x of the middle of the upper edge of each group of maps
    widths = [INPUT] + [GROWTH_RATE] * NUM_LAYERS
    for i, (count, color) in enumerate(zip(widths, COLORS)):
        x = i * STEP - (0.1 * (count - 1)) / 2
        tops.append(draw_maps(axes, x, count, color))
        name = f'layer {i}\'s' if i else 'input:'
        axes.text(tops[-1], -0.25, f'{name}\n{count} maps', color=plot.GREY, ha='center', va='top',
                  fontsize=11.5)
    for j in range(1, NUM_LAYERS + 2):
        x = (j - 0.5) * STEP + 0.25
        read = sum(widths[:j])
        last = j == NUM_LAYERS + 1
        draw_layer(axes, x, ['trans-', 'ition'] if last else ['BN', 'ReLU', 'conv'])
        axes.text(x, -0.25, f'reads\n{read}', color=plot.GREY, ha='center', va='top', fontsize=11.5)
        if not last:
            connect(axes, (x + BOX / 2 + 0.06, 0.95), (j * STEP - 0.12, 0.95), plot.GREY, 0)
        for i in range(j):
            if i == j - 1:
                connect(axes, (i * STEP + 0.1 * widths[i] / 2 + TILT, 0.95),
                        (x - BOX / 2 - 0.06, 0.95), COLORS[i], 0)
            else:
                end = x + 0.11 * ((j - 2) / 2 - i)  # so the arrows don't cross
                connect(axes, (tops[i], HEIGHT + TILT), (end, 0.2 + HEIGHT + 0.07), COLORS[i], 0.33)


def main():
    with rc_context(plot.STYLE):
        figure = Figure(figsize=(11, 3.6))
        axes = figure.add_axes((0, 0, 1, 1))
        draw_block(axes)
        axes.set(xlim=(-0.9, 15.3), ylim=(-1.05, 4.25), aspect='equal')
        axes.axis('off')
        figure.patch.set_alpha(0)
    path = ROOT / 'images' / 'dense-block.png'
    plot.save_figure(figure, path)
    print(path.relative_to(ROOT))


if __name__ == '__main__':
    main()
