"""Draw the figures of a run, or compare several runs, from their CSV files.

    python plot.py                                        # work/cifar10.base
    python plot.py work/demo --format png pdf             # for the screen and for a paper
    python plot.py work/cifar10.base work/cifar10.cosine  # compare: work/compare-error.png, ...
    python plot.py work/demo --output figures --format svg
    python plot.py bench.csv                              # bench.png, from bench.py's table

A run is a directory that train.py writes. The figures loss, error and loss-error (side by side)
come from train.csv and test.csv and can be redrawn at any time, also during the run. Losses and
errors are on logarithmic axes. After --evaluate, there are also the figures of
training/report_figures.py and, with the format png, report.html, a page with all of them.
"""

import argparse
import contextlib
import csv
import json
import os
import textwrap
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

from training import console
from training.console import UserError
from training.figures import COLORS, GREY, MARKERS, STYLE, save_figure, shorten
from training.files import open_csv
from training.parsing import Parser

CURVES = {'loss': ['loss'], 'error': ['error'], 'loss-error': ['loss', 'error']}
AXIS_LABELS = {'loss': 'cross-entropy loss (log scale)', 'error': 'error (%, log scale)'}
COLUMNS = ['epoch', 'loss', 'error']  # in every train.csv and test.csv
BENCH_COLUMNS = ['row', 'precision', 'batch_size', 'ms', 'ms_quartile1', 'ms_quartile3',
                 'memory_mib', 'peak_mib', 'failure', 'workload']


class Run(NamedTuple):
    name: str
    train: dict[str, np.ndarray]  # column name -> one value per row
    test: dict[str, np.ndarray]
    split: str                    # of test.csv: 'test' or 'val'


# ---- reading ------------------------------------------------------------------------------

def read_table(path):
    """Read a CSV file of numbers as {column: values}; empty columns if it does not exist.

    Skips incomplete rows. Raises UserError if columns are missing.
    """
    text = path.read_text(encoding='utf-8-sig', errors='replace') if path.exists() else ''
    header, *lines = [line.split(',') for line in text.splitlines()] or [COLUMNS]
    header, rows = [name.strip() for name in header], []
    if not {*COLUMNS} <= {*header}:
        raise UserError(f'{path} is not a CSV file of a run: its first line must be a header such '
                        f'as {",".join(COLUMNS)}')
    for line in lines:
        with contextlib.suppress(ValueError):  # the last row is incomplete if the run was killed
            # The header has fewer columns if an older version started the run.
            rows.append([float(field) for _, field in zip(header, line[:len(header)], strict=True)])
    if len(rows) < len(lines):
        console.warn(f'{path}: left out {len(lines) - len(rows)} incomplete rows of {len(lines)}',
                     script='plot.py')
    return dict(zip(header, np.array(rows).reshape(-1, len(header)).T))


def read_split(path):
    """The split of test.csv."""
    try:
        return json.loads(path.read_text(encoding='utf-8')).get('selection_split', 'test')
    except (OSError, ValueError, AttributeError):  # no args.json, or not train.py's
        return 'test'


def points(table, column):
    """(epochs, values) of the rows where both are finite."""
    finite = np.isfinite(table[column]) & np.isfinite(table['epoch'])
    return table['epoch'][finite], table[column][finite]


def common_parent(directories):
    return os.path.commonpath([os.path.dirname(os.path.abspath(run)) for run in directories])


def read_runs(directories):
    """Read the runs that have at least one point to draw."""
    parent, runs = common_parent(directories), []
    for directory in directories:
        run = Run(os.path.relpath(directory, parent), read_table(directory / 'train.csv'),
                  read_table(directory / 'test.csv'), read_split(directory / 'args.json'))
        if any(len(points(table, column)[0]) for table in run[1:3] for column in AXIS_LABELS):
            runs.append(run)
        elif len(directories) > 1:
            console.warn(f'{directory}: left out, nothing to draw yet', script='plot.py')
    return runs


def read_rows(path, columns):
    """Read a CSV file as dicts of strings; raises UserError if columns are missing."""
    with open_csv(path) as file:
        rows = list(csv.DictReader(file))
    if not rows or not {*columns} <= rows[0].keys():
        raise UserError(f'{path} is not a table with rows and the columns {",".join(columns)}')
    return rows


# ---- training curves: values --------------------------------------------------------------

def running_mean(epochs, values, window=1.0):
    """For each row, the mean of the rows in (epoch - window, epoch].

    Rows are weighted by the number of steps that they cover, in proportion to the distance from the
    previous row: the last row of an epoch often covers fewer. In epoch 1 the window is shorter.
    """
    spans = np.diff(epochs)
    weights = np.append(spans[:1], spans) if len(spans) else np.ones(len(epochs))
    # 1e-6: for rounding, such as 1.1 - 1 > 0.1.
    first = np.searchsorted(epochs, epochs - window + 1e-6, side='right')
    return window_sums(weights * values, first) / window_sums(weights, first)


def window_sums(values, first):
    """values[first[i]:i + 1].sum() for each i.

    (Differences of cumulative sums would lose all precision after a loss of 1e30.)
    """
    edges = np.stack([first, np.arange(1, len(values) + 1)], 1).ravel()
    return np.add.reduceat(np.append(values, 0.0), edges)[::2]


def logged(epochs, values):
    """The values as logged, where rows that cover few steps are averaged with the previous row.

    These are the last rows of epochs, if they cover less than half of the usual steps: the error on
    a few images is noise.
    """
    interval = np.median(np.diff(epochs)) if len(epochs) > 1 else 1.0
    return running_mean(epochs, values, interval / 2)


def format_value(column, value):
    return f'{value:.2f}%' if column == 'error' else f'{value:#.3g}'.rstrip('.')


# ---- training curves: drawing -------------------------------------------------------------

def curve_figure(runs, columns):
    """A Figure with a panel for each of `columns`, keys of AXIS_LABELS."""
    height = 4.2 + 0.18 * max(0, len(runs) - 3)  # room for a long legend
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6 if len(columns) == 1 else 11, height), layout='constrained')
        figure.get_layout_engine().set(wspace=0.06)
        for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
            draw_panel(axes, runs, column)
        if len(runs) == 1:
            figure.suptitle(shorten(runs[0].name), fontsize=9, color=GREY)
    return figure


def draw_panel(axes, runs, column):
    axes.set(xlabel='epoch', ylabel=AXIS_LABELS[column])
    title = None
    if len(runs) == 1:
        draw_run(axes, runs[0], column)
    else:
        splits = ' and '.join(sorted({run.split for run in runs}))
        title = f'{splits}: thick, with markers; train (mean over an epoch): thin'
        for i, run in enumerate(runs):
            draw_compared_run(axes, run, column, i)
    if axes.lines:
        set_epoch_axis(axes)
        set_value_axis(axes, column)
        # Above the axes, not over a curve.
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), alignment='left', title=title)


def draw_run(axes, run, column):
    epochs, values = points(run.train, column)
    if len(epochs):
        mean = running_mean(epochs, values)
        axes.plot(epochs, mean, color=COLORS[0], marker='o' if len(epochs) == 1 else '',
                  label=f'train (mean over an epoch), final {format_value(column, mean[-1])}')
        axes.plot(epochs, logged(epochs, values), color=COLORS[0], alpha=0.35, linewidth=0.7,
                  zorder=1, label='train (as logged)')
    draw_test(axes, run, column, run.split, color=COLORS[1],
              marker='o' if len(points(run.test, column)[0]) <= 20 else '')


def draw_compared_run(axes, run, column, i):
    """Draw run number i with its own colour and marker."""
    name, color = shorten(run.name, 22), COLORS[i % len(COLORS)]
    num_tests = len(points(run.test, column)[0])
    epochs, values = points(run.train, column)
    if len(epochs):
        mean = running_mean(epochs, values)
        label = '' if num_tests else f'{name}, train, final {format_value(column, mean[-1])}'
        axes.plot(epochs, mean, color=color, linewidth=0.6, alpha=0.7, label=label,
                  marker='o' if len(epochs) == 1 else '')
    linestyle = ['-', '--', '-.'][i // len(COLORS) % 3]
    draw_test(axes, run, column, name, color=color, linestyle=linestyle,
              marker=MARKERS[i % len(MARKERS)], markevery=max(1, num_tests // 10))


def draw_test(axes, run, column, label, **style):
    epochs, values = points(run.test, column)
    if len(epochs):
        final = format_value(column, run.test[column][-1])  # may be NaN
        best = f'{format_value(column, values.min())} (epoch {epochs[values.argmin()]:g})'
        axes.plot(epochs, values, label=f'{label}, final {final}, best {best}', **style)


def set_epoch_axis(axes):
    """Limits at the start of the first and the end of the last epoch; ticks at whole epochs."""
    epochs = np.concatenate([line.get_xdata() for line in axes.lines])
    start = max(0, np.ceil(epochs.min()) - 1)
    stop = max(start + 1, np.ceil(epochs.max()))
    margin = 0.015 * (stop - start)  # for the markers of the last epoch
    axes.set_xlim(start - margin, stop + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def value_limits(curves, behind):
    """(low, high) for a logarithmic axis, so that spikes do not squeeze the rest.

    Covers the first and last value and the quartiles of each curve; other values, also of the lines
    behind, only up to a factor of 2 beyond these.
    """
    values = np.concatenate([*curves, *behind])
    anchors = np.concatenate([[curve[0], curve[-1],
                               *np.quantile(curve, [0.25, 0.75], method='nearest')]
                              for curve in curves])
    values, anchors = values[values > 0], anchors[anchors > 0]
    if not len(values):
        return 0.1, 1.0
    anchors = anchors if len(anchors) else values
    low, high = max(values.min(), anchors.min() / 2), min(values.max(), 2 * anchors.max())
    margin = max(1.05, (high / low) ** 0.04)
    return low / margin, high * margin


def set_value_axis(axes, column):
    """A logarithmic axis; the legend lists minima and maxima that are off scale."""
    low, high = value_limits([line.get_ydata() for line in axes.lines if line.get_zorder() > 1],
                             [line.get_ydata() for line in axes.lines if line.get_zorder() == 1])
    off_scale = []
    for line in axes.lines:
        least, most = line.get_ydata().min(), line.get_ydata().max()
        in_legend = not line.get_label().startswith('_')
        prefix = '' if in_legend else 'train '  # of a compared run; its test line is next
        off_scale += [f'{prefix}min {format_value(column, least)}'] if least < low else []
        off_scale += [f'{prefix}max {format_value(column, most)}'] if most > high else []
        if off_scale and in_legend:
            line.set_label(f'{line.get_label()}\noff scale: {", ".join(off_scale)}')
            off_scale = []
    axes.set_ylim(low, high)
    axes.set_yscale('log', nonpositive='clip')  # a curve that reaches 0 leaves the axes
    subs = [1, 2, 5] if high / low > 10 else [1, 2, 3, 4, 5, 7]
    axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=50))
    axes.yaxis.set_major_formatter('{x:g}')  # 0.1, not 10^-1
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axes.yaxis.set_minor_formatter(NullFormatter())


# ---- the table of bench.py -----------------------------------------------------------------

def speed_figure(rows):
    """Horizontal bars of time and memory, for the rows of bench.py's table (dicts)."""
    ms, low, high, memory, peak = (np.array([float(row[key]) for row in rows]) for key in (
        'ms', 'ms_quartile1', 'ms_quartile3', 'memory_mib', 'peak_mib'))
    varying = [(key, text) for key, text in (('precision', '{}'), ('batch_size', 'batch {}'))
               if len({row[key] for row in rows}) > 1]
    names = [', '.join([row['row'], *(text.format(row[key]) for key, text in varying)])
             for row in rows]
    colors = [COLORS[row['row'].startswith('ours')] for row in rows]
    panels = [('time per step (ms): median and quartiles', ms, [ms - low, high - ms])]
    if np.isfinite(memory).any():
        # On a GPU, the column memory_mib has the peak.
        kind = 'memory held for backward' if np.isfinite(peak).any() else 'peak memory'
        panels.append((f'{kind} (MiB)', memory, None))
    width = 10 if len(panels) == 2 else 7
    network, _, machine = rows[0]['workload'].partition('; ')
    precisions = ' and '.join(dict.fromkeys(row['precision'] for row in rows))
    title = f'{network}, {precisions}\n{textwrap.fill(machine, 14 * width)}'
    with matplotlib.rc_context({**STYLE, 'axes.grid.axis': 'x'}):
        figure = Figure((width, 1.5 + 0.28 * len(rows)), layout='constrained')
        figure.suptitle(title, fontsize=8, color=GREY)
        all_axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (label, values, spread) in zip(all_axes, panels):
            bars = axes.barh(range(len(rows)), np.nan_to_num(values), color=colors, ecolor='black',
                             xerr=spread and np.nan_to_num(spread), error_kw={'linewidth': 1})
            texts = [format_number(value) if np.isfinite(value) else
                     shorten(row['failure'] or '-') for value, row in zip(values, rows)]
            axes.bar_label(bars, texts, padding=3, fontsize=8)
            axes.set_xlabel(label)
            axes.margins(x=0.12, y=0.02)
        all_axes[0].set_yticks(range(len(rows)), names)
        all_axes[0].invert_yaxis()  # the first row at the top
    return figure


def format_number(value):
    return f'{value:,.0f}' if value >= 100 else f'{value:.3g}'


# ---- command line -------------------------------------------------------------------------

def is_csv_of_bench(paths):
    return len(paths) == 1 and paths[0].suffix == '.csv' and not paths[0].is_dir()


def all_figures(paths):
    """Yield (file name without suffix, Figure) for runs, or for a CSV file of bench.py."""
    if is_csv_of_bench(paths):
        yield paths[0].stem, speed_figure(read_rows(paths[0], BENCH_COLUMNS))
        return
    runs, prefix = read_runs(paths), 'compare-' if len(paths) > 1 else ''
    for name, columns in CURVES.items():
        if runs:
            yield prefix + name, curve_figure(runs, columns)
    if len(paths) == 1:
        from training import report_figures  # SciPy and scikit-learn are slow to import

        yield from report_figures.figures(paths[0])


def draw(paths, output, formats):
    """Write all figures into a folder and, if a run has an evaluation, report.html with the PNGs.

    Yields the path of each file.
    """
    figures = {}
    for name, figure in all_figures(paths):
        output.mkdir(parents=True, exist_ok=True)
        for suffix in formats:
            save_figure(figure, output / f'{name}.{suffix}')
            yield output / f'{name}.{suffix}'
        figures[name] = figure
    if len(paths) == 1 and 'png' in formats and (paths[0] / 'metrics.json').exists():
        from training import report_page

        report_page.write_page(output / 'report.html', paths[0], figures)
        yield output / 'report.html'


def save_reports(directory):
    """Draw all figures of a run directory as PNG, and report.html; returns the paths."""
    return list(draw([directory], directory, ['png']))


def make_parser():
    parser = Parser(prog='plot.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='RUN', nargs='*', type=Path,
                        default=[Path('work/cifar10.base')],
                        help='run directory; several are compared; or a CSV file of bench.py '
                             '(default: work/cifar10.base)')
    parser.add_argument('--format', nargs='+', choices=['png', 'pdf', 'svg'], default=['png'],
                        help='one or more of png, pdf, svg (default: png)')
    parser.add_argument('--output', metavar='DIR', type=Path,
                        help='where to write (default: the run, or the parent of several)')
    return parser


def run(argv):
    args = make_parser().parse_args(argv)
    output = args.output
    if output is None:
        is_run = len(args.runs) == 1 and not is_csv_of_bench(args.runs)
        output = args.runs[0] if is_run else Path(common_parent(args.runs))
    is_empty = True
    for path in draw(args.runs, output, args.format):
        is_empty = False
        print(str(path).encode(errors='backslashreplace').decode())
    if is_empty:
        raise UserError(f'nothing to draw in {", ".join(map(str, args.runs))}: give run '
                        f'directories with a row in train.csv or test.csv')


def main(argv=None):
    console.exit_on_user_error(lambda: run(argv), 'plot.py')


if __name__ == '__main__':
    main()
