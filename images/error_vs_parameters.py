"""Draw the paper's test errors against the number of parameters, and the errors of our runs.

    python images/error_vs_parameters.py                         # images/error-vs-parameters.png
    python images/error_vs_parameters.py work/densenet-bc-40-12  # with a point for that run

DenseNet and DenseNet-BC are from the paper's table 2, Wide-DenseNet-BC from the README of the
official repository, all with augmentation. For a run it is the error of the final epoch.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch

import plot
from densenet import densenet_cifar

CURVES = {  # (L, k): test error in percent on CIFAR-10+ and CIFAR-100+
    'DenseNet': {(40, 12): (5.24, 24.42), (100, 12): (4.10, 20.20), (100, 24): (3.74, 19.25)},
    'DenseNet-BC': {(100, 12): (4.51, 22.27), (250, 24): (3.62, 17.60), (190, 40): (3.46, 17.18)},
    'Wide-DenseNet-BC': {(40, 36): (4.58, 22.30), (40, 48): (3.99, 20.29), (40, 60): (4.01, 19.99)},
}


# Where the labels go, in points from the marker: beside the lines and each other.
ABOVE = dict(xytext=(4, 3), ha='left', va='bottom')
BELOW = dict(xytext=(-4, -3), ha='right', va='top')
OVER = dict(xytext=(6, 5), ha='right', va='bottom')
LEFT = dict(xytext=(-7, 2), ha='right', va='center')
UNDER = dict(xytext=(0, -8), ha='center', va='top')
RIGHT_BELOW = dict(xytext=(2, -4), ha='left', va='top')
PLACES = {'DenseNet': {10: [ABOVE] * 3, 100: [ABOVE] * 3},
          'DenseNet-BC': {10: [BELOW, BELOW, UNDER], 100: [BELOW] * 3},
          'Wide-DenseNet-BC': {10: [LEFT, BELOW, UNDER], 100: [OVER, BELOW, RIGHT_BELOW]}}


def millions_of_parameters(depth, growth_rate, classes, **settings):
    with torch.device('meta'):
        model = densenet_cifar(depth, growth_rate, num_classes=classes, **settings)
    return sum(parameter.numel() for parameter in model.parameters()) / 1e6


def draw_paper(axes, column, classes):
    for (name, errors), color, marker in zip(CURVES.items(), plot.COLORS, 'os^'):
        plain = dict(bottleneck=False, compression=1.0) if name == 'DenseNet' else {}
        sizes = [millions_of_parameters(*key, classes, **plain) for key in errors]
        values = [pair[column] for pair in errors.values()]
        axes.plot(sizes, values, color=color, marker=marker, markersize=5, label=name)
        for (depth, growth_rate), size, value, place in zip(errors, sizes, values,
                                                            PLACES[name][classes]):
            axes.annotate(f'{depth}-{growth_rate}', (size, value), color=color, fontsize=9,
                          textcoords='offset points', **place)


def draw_run(axes, directory, color):
    """A CIFAR-10 run of ours, with the error of the final epoch in its test.csv."""
    args = json.loads((directory / 'args.json').read_text())['args']
    size = millions_of_parameters(args['depth'], args['growth_rate'], 10,
                                  bottleneck=args['bottleneck'], compression=args['compression'])
    error = plot.read_table(directory / 'test.csv')['error'][-1]
    data = 'JPEG copy, ' * (args['dataset'] == 'folder')
    axes.plot(size, error, color=color, marker='D', linestyle='', markersize=6,
              label=f'ours: {directory.name}, {data}{args["epochs"]} epochs')


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('runs', metavar='RUN', nargs='*', type=Path, help='runs on CIFAR-10')
    args = parser.parse_args(argv)
    with rc_context(plot.STYLE):
        figure = Figure(figsize=(10, 5), layout='constrained')
        panels = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for column, (axes, classes) in enumerate(zip(panels, (10, 100))):
            draw_paper(axes, column, classes)
            if classes == 10:
                for directory, color in zip(args.runs, plot.COLORS[3:]):
                    draw_run(axes, directory, color)
            axes.set(xscale='log', xlabel='parameters (millions, log scale)', yscale='log',
                     ylabel=f'test error on CIFAR-{classes}+ (%, log scale)')
            axes.margins(x=0.11 if classes == 10 else 0.22, y=0.07)  # room for labels
            axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter('{x:g}')
                axis.set_minor_formatter(NullFormatter())
            axes.legend(loc='upper right')
    plot.save_figure(figure, ROOT / 'images' / 'error-vs-parameters.png')


if __name__ == '__main__':
    main()
