"""Draw the training curves of a run, or of several runs over each other, from their CSV files.

    python plot.py                                        # work/cifar10.base
    python plot.py work/demo --format png pdf             # for the screen and for the paper
    python plot.py work/cifar10.base work/cifar10.cosine  # compare: work/compare-error.png, ...
    python plot.py work/demo --output figures --format svg

A run is a directory with train.csv and test.csv, as train.py writes them. The figures are loss,
error and loss-error (both side by side). They can be drawn at any time, also during the run.
"""

import argparse
import contextlib
import os
import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

FIGURES = {'loss': ['loss'], 'error': ['error'], 'loss-error': ['loss', 'error']}
AXIS_LABELS = {'loss': 'cross-entropy loss', 'error': 'error (%)'}
COLUMNS = ['epoch', 'loss', 'error']  # that every table has

# Okabe and Ito's palette, which colour-blind readers can tell apart; its yellow is too pale here.
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
GREY = '#777777'
STYLE = {
    'font.size': 10, 'legend.fontsize': 9, 'legend.title_fontsize': 9, 'legend.frameon': False,
    'legend.borderaxespad': 0.2, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.formatter.useoffset': False, 'axes.formatter.limits': [-9, 12],
    'axes.grid': True, 'axes.grid.axis': 'y', 'axes.axisbelow': True, 'grid.color': '#e6e6e6',
    'grid.linewidth': 0.6, 'lines.linewidth': 1.4, 'lines.markersize': 4, 'text.usetex': False,
    'savefig.dpi': 200, 'pdf.fonttype': 42,  # TrueType: publishers turn down Type 3 fonts
}


class UsageError(Exception):
    """Files or flags that can't be used, said in one line."""


class Run(NamedTuple):
    name: str
    train: dict[str, np.ndarray]  # column name -> a value a row
    test: dict[str, np.ndarray]


# ---- reading ------------------------------------------------------------------------------

def warn(message):
    print(f'plot.py: warning: {message}', file=sys.stderr)


def read_table(path):
    """{column: values} of a CSV file of numbers; none if it is not there. Broken rows are left out.

    Raises UsageError for a file without the columns of a run.
    """
    text = path.read_text(encoding='utf-8-sig', errors='replace') if path.exists() else ''
    header, *lines = [line.split(',') for line in text.splitlines()] or [COLUMNS]
    header, rows = [name.strip() for name in header], []
    if not {*COLUMNS} <= {*header}:
        raise UsageError(f'{path} is not a CSV file of a run: its first line must be a header such '
                         f'as {",".join(COLUMNS)}')
    for line in lines:
        with contextlib.suppress(ValueError):  # the last one of a process that was killed
            # A run that an older version began has fewer columns in its header.
            rows.append([float(field) for _, field in zip(header, line[:len(header)], strict=True)])
    if len(rows) < len(lines):
        warn(f'{path}: left out {len(lines) - len(rows)} incomplete rows of {len(lines)}')
    return dict(zip(header, np.array(rows).reshape(-1, len(header)).T))


def points(table, column):
    """(epochs, values) of the rows that can be drawn."""
    finite = np.isfinite(table[column])
    return table['epoch'][finite], table[column][finite]


def common_parent(directories):
    return os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in directories])


def read_runs(directories):
    """The runs that have something to draw; UsageError if none has."""
    parent, runs = common_parent(directories), []
    for directory in directories:
        run = Run(os.path.relpath(directory, parent), read_table(directory / 'train.csv'),
                  read_table(directory / 'test.csv'))
        if any(len(points(table, column)[0]) for table in run[1:] for column in AXIS_LABELS):
            runs.append(run)
        elif len(directories) > 1:
            warn(f'{directory}: left out, nothing to draw yet')
    if not runs:
        raise UsageError(f'nothing to draw in {", ".join(map(str, directories))}: give directories '
                         f'of runs, with a row in train.csv or test.csv')
    return runs


# ---- what the curves say ------------------------------------------------------------------

def running_mean(epochs, values):
    """Mean over the epoch that ends at each row: of the rows so far in (epoch - 1, epoch].

    Rows may lie unevenly, as the last of an epoch does: each is weighted by the distance from the
    row before it. Before epoch 1 the mean is of what there is.
    """
    spans = np.diff(epochs)
    weights = np.append(spans[:1], spans) if len(spans) else np.ones(len(epochs))
    # 1e-6: in binary 1.1 - 1 lies a little above 0.1, and elsewhere a little below.
    first = np.searchsorted(epochs, epochs - 1 + 1e-6, side='right')
    windows = [slice(start, stop) for stop, start in enumerate(first, start=1)]
    # Not by differences of cumulative sums, which are noise after one loss of 1e30.
    return np.array([weights[w] @ values[w] / weights[w].sum() for w in windows])


def format_value(column, value):
    return f'{value:.2f}%' if column == 'error' else f'{value:#.3g}'.rstrip('.')


# ---- drawing ------------------------------------------------------------------------------

def draw_train_mean(axes, run, column, label, **style):
    epochs, values = points(run.train, column)
    if len(epochs):
        mean = running_mean(epochs, values)
        axes.plot(epochs, mean, marker='o' if len(epochs) == 1 else '',
                  label=label and f'{label}, final {format_value(column, mean[-1])}', **style)


def draw_test(axes, run, column, label, **style):
    epochs, values = points(run.test, column)
    if len(epochs):
        final = format_value(column, run.test[column][-1])  # which may be nan
        best = f'{format_value(column, values.min())} (epoch {epochs[values.argmin()]:g})'
        axes.plot(epochs, values, marker='o' if len(epochs) <= 20 else '',
                  label=f'{label}, final {final}, best {best}', **style)


def set_value_axis(axes, values):
    """Logarithmic if the curves span more than a decade and nothing is negative, else linear."""
    positive = values[values > 0]
    if (values < 0).any() or not len(positive) or positive.max() <= 10 * positive.min():
        return
    # Three decades about the median, so that one spike, or one error in a whole epoch, doesn't
    # squeeze the rest. 'clip' lets a curve that reaches zero leave through the bottom.
    median = np.median(positive)
    axes.set_yscale('log', nonpositive='clip')
    axes.set_ylim(max(positive.min(), median / 1e3) / 1.5, min(positive.max(), median * 1e3) * 1.2)
    axes.yaxis.set_major_locator(LogLocator(subs=[1, 2, 5], numticks=50))
    axes.yaxis.set_major_formatter('{x:g}')  # 0.1, not 10^-1
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axes.yaxis.set_minor_formatter(NullFormatter())


def make_figure(runs, columns):
    """A matplotlib Figure with a panel for each of columns, which are keys of AXIS_LABELS."""
    height = 4 + 0.18 * max(0, len(runs) - 3)  # room for a long legend
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6 if len(columns) == 1 else 11, height), layout='constrained')
        figure.get_layout_engine().set(wspace=0.06)
        for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
            draw_panel(axes, runs, column)
        if len(runs) == 1:
            figure.suptitle(runs[0].name, fontsize=9, color=GREY)
    return figure


def draw_panel(axes, runs, column):
    axes.set(xlabel='epoch', ylabel=AXIS_LABELS[column])
    if len(runs) == 1:
        draw_train_mean(axes, runs[0], column, 'train (mean over an epoch)', color=COLORS[0])
        draw_test(axes, runs[0], column, 'test', color=COLORS[1])
    else:  # a color for each run: test thick, training thin
        for i, run in enumerate(runs):
            color = COLORS[i % len(COLORS)]
            # A line of the legend has room for 22 letters.
            name = run.name if len(run.name) <= 22 else f'{run.name[:10]}…{run.name[-11:]}'
            is_tested = len(points(run.test, column)[0]) > 0
            draw_train_mean(axes, run, column, '' if is_tested else f'{name}, train', color=color,
                            linewidth=0.6, alpha=0.7)
            draw_test(axes, run, column, name, color=color,
                      linestyle=['-', '--', '-.'][i // len(COLORS) % 3])
    if axes.lines:
        # From the start of the first epoch to the end of the last, ticks at whole epochs.
        epochs = np.concatenate([line.get_xdata() for line in axes.lines])
        start = max(0, np.ceil(epochs.min()) - 1)
        stop = max(start + 1, np.ceil(epochs.max()))
        margin = 0.015 * (stop - start)  # for the markers of the last epoch
        axes.set_xlim(start - margin, stop + margin)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
        set_value_axis(axes, np.concatenate([line.get_ydata() for line in axes.lines]))
        if len(runs) == 1:  # behind them, and not to set the axes by
            axes.plot(*points(runs[0].train, column), color=COLORS[0], alpha=0.3, linewidth=0.7,
                      zorder=1)
        # Above the axes, where it can't cover a curve, however the run goes.
        title = 'test thick, train (mean over an epoch) thin' if len(runs) > 1 else None
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), alignment='left', title=title)


def save_figure(figure, path):
    """Writes the figure whole or not at all, for somebody may be looking at the last one."""
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')  # train.py removes old ones
    try:
        with matplotlib.rc_context(STYLE):
            figure.savefig(temporary, format=path.suffix[1:])
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- command line -------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(prog='plot.py', description=__doc__,
                                     usage=argparse.SUPPRESS,  # an error is one line
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='RUN', nargs='*', type=Path,
                        default=[Path('work/cifar10.base')],
                        help='run directory; several are compared (default: work/cifar10.base)')
    parser.add_argument('--format', nargs='+', choices=['png', 'pdf', 'svg'], default=['png'],
                        help='one or more of png, pdf, svg (default: png)')
    parser.add_argument('--output', metavar='DIR', type=Path,
                        help='where to write (default: the run, or what several are all in)')
    args = parser.parse_args(argv)
    is_comparison = len(args.runs) > 1
    output = args.output or (Path(common_parent(args.runs)) if is_comparison else args.runs[0])
    try:
        runs = read_runs(args.runs)
        output.mkdir(parents=True, exist_ok=True)
        for name, columns in FIGURES.items():
            figure = make_figure(runs, columns)
            for suffix in args.format:
                path = output / f'{"compare-" * is_comparison}{name}.{suffix}'
                save_figure(figure, path)
                print(path)
    except (UsageError, OSError) as error:
        parser.error(error)


if __name__ == '__main__':
    main()
