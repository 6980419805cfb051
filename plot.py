"""Draw the training curves of a run, or of several runs over each other, from their CSV files.

    python plot.py                                        # work/cifar10.base
    python plot.py work/demo --format png pdf             # for the screen and for the paper
    python plot.py work/cifar10.base work/cifar10.cosine  # compare: work/compare-error.png, ...
    python plot.py work/demo --output figures --format svg

A run is a directory with train.csv and test.csv, as train.py writes them; the header-less
`epoch,loss,error` files of bamos/densenet.pytorch work too. The figures are loss, error and
loss-error (both side by side). It may be run at any time, also while the run is going on.
"""

import argparse
import io
import itertools
import os
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

FIGURES = {'loss': ['loss'], 'error': ['error'], 'loss-error': ['loss', 'error']}
AXIS_LABELS = {'loss': 'cross-entropy loss', 'error': 'error (%)'}
COLUMNS = ['epoch', 'loss', 'error', 'lr']  # what is read; other columns are left alone
# Of a row without a header, or under one that is damaged: a row of test.csv and of the classic
# repositories has no more than these, and the fourth column of train.csv is the learning rate.
HEADERLESS_COLUMNS = {3: COLUMNS[:3], 4: [*COLUMNS[:3], ''], 5: [*COLUMNS, ''],
                      6: [*COLUMNS, '', '']}

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
    'svg.hashsalt': 'plot.py',  # the same ids, and so the same file, every time
}


class Run(NamedTuple):
    name: str
    train: dict[str, np.ndarray]  # column name -> a value a row; empty if there is no file
    test: dict[str, np.ndarray]


# ---- reading ------------------------------------------------------------------------------

def warn(message):
    print(f'plot.py: warning: {message}', file=sys.stderr)


def parse_row(fields, names):
    """The values of COLUMNS in one line; ValueError if it isn't a whole row of numbers."""
    if len(fields) != len(names):
        raise ValueError(f'expected {len(names)} columns, found {len(fields)}')
    values = {name: float(field) for name, field in zip(names, fields) if name in COLUMNS}
    return [values.get(name, np.nan) for name in COLUMNS]


def read_table(path):
    """{column: values} of a CSV file, {} if there is none; rows that can't be read are skipped."""
    if not path.exists():
        return {}
    # Line by line, not by the csv module, to which a stray quote or NUL byte is an error that
    # takes the following rows along; newline='\n' keeps the line numbers an editor's.
    with open(path, encoding='utf-8-sig', errors='replace', newline='\n') as file:
        lines = [(number, [field.strip('" \t\r\n') for field in line.split(',')])
                 for number, line in enumerate(file, start=1) if line.strip()]
    # A header that is not as wide as most lines is damaged: then they are read as if without one.
    width = Counter(len(fields) for _, fields in lines).most_common(1)[0][0] if lines else 0
    names, rows, numbers, skipped = HEADERLESS_COLUMNS.get(width, COLUMNS[:3]), [], [], []
    for number, fields in lines:
        fits = len(fields) == width or width not in HEADERLESS_COLUMNS
        if not rows and 'epoch' in fields and fits:
            names = fields
            continue
        try:
            rows.append(parse_row(fields, names))
            numbers.append(number)
        except ValueError as error:
            skipped.append((number, str(error)[:80]))
    values = np.array(rows, dtype=float).reshape(len(rows), len(COLUMNS))
    odd = out_of_order(values[:, 0])
    skipped += [(numbers[i], f'epoch {values[i, 0]:g} is out of order')
                for i in np.flatnonzero(odd)]
    skipped.sort()
    for number, reason in skipped[:5]:
        warn(f'{path}, line {number}: skipped: {reason}')
    if len(skipped) > 5:
        warn(f'{path}: {len(skipped) - 5} more lines skipped, the last is line {skipped[-1][0]}')
    table = dict(zip(COLUMNS, values[~odd].T))
    if np.isnan(table['lr']).all():  # only train.csv has it
        del table['lr']
    return drop_superseded(table)


def out_of_order(epochs):
    """True for a row alone without which the epochs would rise: a damaged one.

    Where they fall and rise on from there, a run was resumed: see `drop_superseded`.
    """
    before, after = np.append(-np.inf, epochs[:-1]), np.append(epochs[1:], np.nan)
    too_low = (epochs < before) & (after > before)
    too_high = (epochs > after) & (before <= after)
    both = too_high[:-1] & too_low[1:]  # it fell by less than a row
    too_high[:-1] &= ~both
    too_low[1:] &= ~both
    return too_low | too_high


def drop_superseded(table):
    """A run resumed from its last checkpoint does some epochs again: the later rows count."""
    known = drawable(table['epoch'])
    table = {name: values[known] for name, values in table.items()}
    earliest_from_here = np.minimum.accumulate(table['epoch'][::-1])[::-1]
    keep = table['epoch'] <= earliest_from_here
    return {name: values[keep] for name, values in table.items()}


def drawable(values):
    """Not NaN (it compares false), not infinite, nor so large that nothing else would be seen."""
    return np.abs(values) < 1e12


def points(table, column):
    """(epochs, values) of the rows that can be drawn; empty if there is no such column."""
    if column not in table:
        return np.empty(0), np.empty(0)
    keep = drawable(table[column])
    return table['epoch'][keep], table[column][keep]


def has_points(run):
    return any(len(points(table, column)[0])
               for table in (run.train, run.test) for column in AXIS_LABELS)


def run_names(directories):
    """Each directory's last name, after as many parents as it takes to tell it from the others."""
    paths = [Path(os.path.abspath(directory)).parts for directory in directories]
    names = []
    for path in paths:
        depth = next(depth for depth in itertools.count(1)
                     if sum(other[-depth:] == path[-depth:] for other in paths) == 1)
        name = '/'.join(path[-depth:])
        # A legend line has room for 22 letters; one that begins with _ would be left out of it.
        if len(name) > 22 and len(paths) > 1:
            name = f'{name[:10]}…{name[-11:]}'
        names.append(f' {name}' if name.startswith('_') else name)
    return names


def read_runs(directories):
    """The runs that have something to draw. Raises FileNotFoundError if one is no directory."""
    for directory in directories:
        if not directory.is_dir():
            raise FileNotFoundError(f'no run directory {directory}: give a directory that holds '
                                    'train.csv or test.csv, as train.py makes them under work/')
    runs = [Run(name, read_table(directory / 'train.csv'), read_table(directory / 'test.csv'))
            for name, directory in zip(run_names(directories), directories)]
    empty = [str(directory) for run, directory in zip(runs, directories) if not has_points(run)]
    if len(empty) == len(runs):
        raise FileNotFoundError(f'nothing to draw yet in {", ".join(empty)}: train.csv or '
                                'test.csv must hold a row with an epoch and a loss or an error')
    for directory in empty:
        warn(f'{directory}: left out, nothing to draw yet')
    return [run for run in runs if has_points(run)]


# ---- what the curves say ------------------------------------------------------------------

def running_mean(epochs, values):
    """Mean over the epoch that ends at each row: of the rows so far in (epoch - 1, epoch].

    Rows may lie unevenly, as the last of an epoch does: each counts by the span since the row
    before it (all count alike if some share an epoch). Before epoch 1 the mean is of what there is.
    """
    spans = np.diff(epochs)
    weights = np.append(spans[:1], spans) if len(spans) and spans.min() > 0 else 0 * epochs + 1
    # 1e-6: in binary 1.1 - 1 lies a little above 0.1, and elsewhere a little below.
    first = np.searchsorted(epochs, epochs - 1 + 1e-6, side='right')
    # Each window is summed by itself, since after one loss of 1e30 a difference of cumulative
    # sums would be noise. reduceat's every other sum, from end to the next first, is of no use.
    bounds = np.column_stack([first, np.arange(1, len(epochs) + 1)]).ravel()
    total, weight = (np.add.reduceat(np.append(terms, 0.0), bounds)[::2]
                     for terms in (values * weights, weights))
    return total / weight


def lr_drops(epochs, lr):
    """Epochs after which the learning rate fell to half or less, if it only falls in such steps.

    A cosine also halves from row to row at its very end, but before that it falls slowly.
    """
    before, after = lr[:-1], lr[1:]
    fell = after < before * (1 - 1e-6)
    halved = fell & (after <= before * (0.5 + 1e-6))
    return epochs[:-1][halved] if np.array_equal(fell, halved) else epochs[:0]


def decimate(epochs, values, limit=2000):
    """At most limit points that look the same: the lowest and highest of each stretch of rows."""
    if len(epochs) <= limit:
        return epochs, values
    starts = np.linspace(0, len(epochs), limit // 2, endpoint=False).astype(int)
    lowest, highest = np.minimum.reduceat(values, starts), np.maximum.reduceat(values, starts)
    return np.repeat(epochs[starts], 2), np.column_stack([lowest, highest]).ravel()


def format_value(column, value):
    return f'{value:.2f}%' if column == 'error' else f'{value:#.3g}'.rstrip('.')


def summarize_test(table, column):
    """'final 4.73%, best 4.65% (epoch 287)'; a final NaN is said, not hidden."""
    epochs, values = points(table, column)
    best = values.argmin()
    return (f'final {format_value(column, table[column][-1])}, '
            f'best {format_value(column, values[best])} (epoch {epochs[best]:g})')


# ---- drawing ------------------------------------------------------------------------------

def draw_run(axes, run, column):
    """One run: training and test in two colours. Returns the curves that the axes must show."""
    curves = []
    epochs, values = points(run.train, column)
    if len(epochs):
        mean = running_mean(epochs, values)
        axes.plot(*decimate(epochs, values), color=COLORS[0], alpha=0.3, linewidth=0.7)
        axes.plot(*decimate(epochs, mean), color=COLORS[0], marker='o' if len(epochs) == 1 else '',
                  label=f'train (mean over an epoch), final {format_value(column, mean[-1])}')
        curves.append((epochs, mean))
    epochs, values = points(run.test, column)
    if len(epochs):
        axes.plot(epochs, values, color=COLORS[1], marker='o' if len(epochs) <= 20 else '',
                  label=f'test, {summarize_test(run.test, column)}')
        curves.append((epochs, values))
    for i, epoch in enumerate(lr_drops(*points(run.train, 'lr'))):
        axes.axvline(epoch, color=GREY, linestyle=(0, (4, 3)), linewidth=0.7, zorder=1,
                     label='_' if i else 'learning rate drops')
    return curves


def draw_comparison(axes, runs, column):
    """A colour a run: test thick, training thin. Returns the curves that the axes must show."""
    curves = []
    for i, run in enumerate(runs):
        color = COLORS[i % len(COLORS)]
        epochs, values = points(run.train, column)
        tested, test_values = points(run.test, column)
        if len(epochs):
            mean = running_mean(epochs, values)
            final = format_value(column, mean[-1])
            axes.plot(*decimate(epochs, mean), color=color, linewidth=0.6, alpha=0.7,
                      marker='o' if len(epochs) == 1 else '',
                      label='_' if len(tested) else f'{run.name}, train, final {final}')
            curves.append((epochs, mean))
        if len(tested):
            axes.plot(tested, test_values, color=color, marker='o' if len(tested) <= 20 else '',
                      linestyle=['-', '--', '-.'][i // len(COLORS) % 3],
                      label=f'{run.name}, {summarize_test(run.test, column)}')
            curves.append((tested, test_values))
    return curves


def set_epoch_axis(axes, epochs):
    """From the start of the first epoch to the end of the last, ticks at whole epochs."""
    start = max(0, np.ceil(epochs.min()) - 1)
    stop = max(start + 1, np.ceil(epochs.max()))
    margin = 0.015 * (stop - start)  # for the markers of the last epoch
    axes.set_xlim(start - margin, stop + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


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
    axes.yaxis.set_major_formatter(StrMethodFormatter('{x:g}'))  # 0.1, not 10^-1
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10), numticks=50))
    axes.yaxis.set_minor_formatter(NullFormatter())


def make_figure(runs, columns):
    """A matplotlib Figure with a panel for each of columns, which are keys of AXIS_LABELS."""
    height = 4 + 0.18 * max(0, len(runs) - 3)  # room for a long legend
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6 if len(columns) == 1 else 11, height), layout='constrained')
        figure.get_layout_engine().set(wspace=0.06)
        for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns):
            if len(runs) == 1:
                curves = draw_run(axes, runs[0], column)
            else:
                curves = draw_comparison(axes, runs, column)
            axes.set(xlabel='epoch', ylabel=AXIS_LABELS[column])
            if curves:
                set_epoch_axis(axes, np.concatenate([epochs for epochs, _ in curves]))
                set_value_axis(axes, np.concatenate([values for _, values in curves]))
                # Above the axes, where it can't cover a curve, however the run goes.
                legend = axes.legend(loc='lower left', bbox_to_anchor=(0, 1), alignment='left')
                for text in legend.get_texts():
                    text.set_parse_math(False)  # a run may be called a$b$
                if len(runs) > 1:
                    legend.set_title('test thick, train (mean over an epoch) thin')
        if len(runs) == 1:
            figure.suptitle(runs[0].name, fontsize=9, color=GREY, parse_math=False)
    return figure


def save_figure(figure, path):
    """Writes the figure whole or not at all, for somebody may be looking at the last one."""
    dates = {'.svg': {'Date': None}, '.pdf': {'CreationDate': None}}  # none, so that files repeat
    image = io.BytesIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(image, format=path.suffix[1:], metadata=dates.get(path.suffix))
    temporary = path.with_name(f'.{path.name}.{os.getpid()}.tmp')  # train.py sweeps
    try:
        temporary.write_bytes(image.getvalue())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---- command line -------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    def error(self, message):
        self.exit(2, f'plot.py: error: {message}\n')


def make_parser():
    parser = Parser(prog='plot.py', description=__doc__,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', metavar='RUN', nargs='*', type=Path,
                        default=[Path('work/cifar10.base')],
                        help='run directory; several are compared (default: work/cifar10.base)')
    parser.add_argument('--format', nargs='+', choices=['png', 'pdf', 'svg'], default=['png'],
                        help='one or more of png, pdf, svg (default: png)')
    parser.add_argument('--output', metavar='DIR', type=Path,
                        help='where to write (default: the run directory; for several runs, '
                             'the directory that they have in common)')
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    directories = list({os.path.abspath(run): run for run in args.runs}.values())
    if len(directories) == 1:
        prefix, output = '', args.output or directories[0]
    else:
        parents = [os.path.dirname(os.path.abspath(run)) for run in directories]
        prefix, output = 'compare-', args.output or Path(os.path.commonpath(parents))
    try:
        runs = read_runs(directories)
        output.mkdir(parents=True, exist_ok=True)
        for name, columns in FIGURES.items():
            figure = make_figure(runs, columns)
            for suffix in dict.fromkeys(args.format):
                path = output / f'{prefix}{name}.{suffix}'
                save_figure(figure, path)
                print(path)
    except OSError as error:
        parser.error(error)


if __name__ == '__main__':
    main()
