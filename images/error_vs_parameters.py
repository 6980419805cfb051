"""Draw the paper's test errors over the number of parameters, and those of our runs beside them.

    python images/error_vs_parameters.py                         # images/error-vs-parameters.png
    python images/error_vs_parameters.py work/densenet-bc-40-12  # with a point for that run

DenseNet and DenseNet-BC are of the paper's table 2, Wide-DenseNet-BC is of the README of the
official repository, all with augmentation. A run's error is that of its final epoch.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import LogLocator, NullFormatter

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

import plot  # noqa: E402
from densenet import densenet_cifar  # noqa: E402

CURVES = {  # (L, k): test error in percent on CIFAR-10+ and CIFAR-100+
    'DenseNet': {(40, 12): (5.24, 24.42), (100, 12): (4.10, 20.20), (100, 24): (3.74, 19.25)},
    'DenseNet-BC': {(100, 12): (4.51, 22.27), (250, 24): (3.62, 17.60), (190, 40): (3.46, 17.18)},
    'Wide-DenseNet-BC': {(40, 36): (4.58, 22.30), (40, 48): (3.99, 20.29), (40, 60): (4.01, 19.99)},
}


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
        for (depth, growth_rate), size, value in zip(errors, sizes, values):
            is_crowded = (depth, growth_rate) in ((250, 24), (40, 48))
            axes.annotate(f'{depth}-{growth_rate}', (size, value), color=color,
                          ha='right' if is_crowded else 'center',
                          xytext=(0, 6 if name == 'DenseNet' else -13), textcoords='offset points',
                          path_effects=[withStroke(linewidth=2.5, foreground='white')])


def draw_run(axes, directory, color):
    """A CIFAR-10 run of ours: of the final epoch in its test.csv."""
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
        figure = Figure(figsize=(10, 4.2), layout='constrained')
        panels = figure.subplots(1, 2, width_ratios=(1.5, 1))
        for column, (axes, classes) in enumerate(zip(panels, (10, 100))):
            draw_paper(axes, column, classes)
            if classes == 10:
                for directory, color in zip(args.runs, plot.COLORS[3:]):
                    draw_run(axes, directory, color)
            axes.set(xscale='log', xlabel='parameters (millions)', yscale='log',
                     ylabel=f'test error on CIFAR-{classes}+ (%)')
            axes.margins(0.09)
            axes.yaxis.set_major_locator(LogLocator(subs=range(1, 10)))
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter('{x:g}')
                axis.set_minor_formatter(NullFormatter())
            axes.legend(loc='upper right')
    plot.save_figure(figure, ROOT / 'images' / 'error-vs-parameters.png')


if __name__ == '__main__':
    main()
