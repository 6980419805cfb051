"""Figures of an evaluation, from the files of predictions.py. No torch.

    for name, figure in report_figures.figures(directory): ...   # 'roc', 'precision-recall', ...

Each class has a colour. If there are more classes than colours, only the worst have, and the others
are thin and grey.
"""

import math
import os

import matplotlib
import numpy as np
from matplotlib.colors import LinearSegmentedColormap, PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from training import metrics, predictions
from training.console import explain_errors
from training.figures import COLORS, GREY, MARKERS, STYLE, shorten

MAX_NUMBERS = 20  # numbers in the confusion matrix up to this many classes
MAX_NAMES = 200   # names on its axes up to this many classes
MAX_ROWS = 40     # classes in the recall figure
NUM_WORST = 5     # classes with a colour, if there are more classes than colours
COLUMNS = 6       # of pictures in the mistakes figure


def figures(directory):
    """Yield (name, Figure) for each figure whose file is in the run directory.

    Raises:
        UserError: a file has another format.
    """
    name = os.path.basename(os.path.abspath(directory))
    if (directory / 'confusion.csv').exists():
        yield 'confusion', confusion_figure(directory / 'confusion.csv', name)
    if (directory / 'metrics.json').exists():
        record, found = predictions.read_metrics(directory), predictions.read_predictions(directory)
        yield 'roc', roc_figure(found, record, name)
        yield 'precision-recall', precision_recall_figure(found, record, name)
        yield 'reliability', reliability_figure(found, record, name)
        yield 'recall', recall_figure(record, name)
    if (directory / 'mistakes.npz').exists():
        figure = mistakes_figure(directory / 'mistakes.npz', name)
        if figure is not None:
            yield 'mistakes', figure


def new_figure(name, record, size):
    figure = Figure(size, layout='constrained')
    figure.suptitle(f'{shorten(name)}\n{record["splits"]["test"]["images"]:,} test images',
                    fontsize=9, color=GREY)
    return figure


# ---- confusion ----------------------------------------------------------------------------

def confusion_figure(path, name):
    """The confusion matrix: colours show shares of a row, numbers count images.

    Args:
        path: confusion.csv.
        name: the run's.
    """
    counts, classes = predictions.read_confusion(path)
    num_classes = len(classes)
    with np.errstate(invalid='ignore'):
        shares = 100 * counts / counts.sum(1, keepdims=True)  # NaN: no images, drawn grey
    names = [shorten(name) for name in classes] if num_classes <= MAX_NAMES else []
    # In inches. The font size follows the cells, from 6 points (100 classes) to 9 (20).
    side = max(2.5, min(0.5 * num_classes, 8), 0.11 * num_classes) if names else 11
    cell = side / num_classes
    font_size = min(9, 72 * cell / 1.3)
    margin = 0.6 + 0.6 * font_size / 72 * max(map(len, names), default=0)
    is_vertical = margin - 0.6 > 0.9 * cell
    colors = LinearSegmentedColormap.from_list('', ['white', COLORS[0]])
    with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
        figure = Figure((side + margin + 1, side + (margin if is_vertical else 0.8) + 0.4),
                        layout='constrained')
        error = 100 * (1 - counts.trace() / counts.sum())
        figure.suptitle(f'{shorten(name)}\n{counts.sum():,} images, error {error:.2f}%',
                        fontsize=9, color=GREY)
        axes = figure.add_subplot(xlabel='predicted class', ylabel='true class')
        # The square-root scale makes the errors of a good model, a few percent, visible.
        image = axes.imshow(shares, norm=PowerNorm(0.5, 0, 100), interpolation='nearest',
                            cmap=colors.with_extremes(bad=STYLE['grid.color']))
        axes.set_xticks(range(len(names)), names, rotation=90 if is_vertical else 0,
                        fontsize=font_size)
        axes.set_yticks(range(len(names)), names, fontsize=font_size)
        borders = np.arange(len(names) - 1) + 0.5
        axes.set_xticks(borders, minor=True)
        axes.set_yticks(borders, minor=True)
        axes.grid(which='minor')
        axes.tick_params(which='both', length=0)
        if num_classes <= MAX_NUMBERS:
            size = min(9, 72 * 0.9 * cell / (0.64 * len(str(counts.max()))))
            for (i, j), count in np.ndenumerate(counts):
                color = 'white' if shares[i, j] > 50 else 'black' if count else GREY
                axes.text(j, i, count, ha='center', va='center', color=color, fontsize=size)
        # An inset has the height of the axes and does not change their aspect.
        figure.colorbar(image, cax=axes.inset_axes([1 + 0.1 / side, 0, 0.15 / side, 1]),
                        ticks=[0, 1, 5, 10, 20, 40, 60, 80, 100],
                        label='share of the row (%, square-root scale)')
    return figure


# ---- curves -------------------------------------------------------------------------------

def drawn_classes(record, key):
    """[(index, row, line style)] of the classes to draw, the grey ones first."""
    rows = list(enumerate(record['splits']['test']['classes']))
    if len(rows) == 2 and not record['multi_label']:
        rows = rows[1:]  # the first class has the mirrored curve
    rows = [(c, row) for c, row in rows if row[key] is not None]
    if len(rows) <= len(COLORS):
        return [(c, row, {'color': color}) for (c, row), color in zip(rows, COLORS)]
    rows.sort(key=lambda pair: -pair[1][key])
    others = rows[:-NUM_WORST] if len(rows) <= metrics.MAX_INTERVALS else []
    return ([(c, row, {'color': '#cccccc', 'linewidth': 0.6}) for c, row in others] +
            [(c, row, {'color': color})
             for (c, row), color in zip(rows[:-NUM_WORST - 1:-1], COLORS)])


def class_curves(record, name, key, word, curve, note=''):
    """A Figure with a curve per class, with its metric in the legend, and the axes.

    Args:
        key, word: the metric's name in metrics.json and in the legend.
        curve: function of a class index that returns x and y.
        note: added to the legend's title.
    """
    drawn, summary = drawn_classes(record, key), record['splits']['test']
    count = len(summary['classes'])
    title = word + (' (95% interval)' if count <= metrics.MAX_INTERVALS else '')
    if len(drawn) > 1:
        title = f'{title}; mean over {count} classes {summary[f"mean_{key}"]:.4f}'
    if count > len(COLORS):
        others = ', all others grey' if len(drawn) > NUM_WORST else ''
        title += f'\nthe {NUM_WORST} lowest{others}'
    title += note
    lines = min(len(drawn), len(COLORS)) + title.count('\n')
    figure = new_figure(name, record, (5.6, 5.9 + 0.19 * lines))  # square axes
    axes = figure.add_subplot(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
    for c, row, style in drawn:
        label, ends = '', row[f'{key}_interval']
        if 'linewidth' not in style:
            label = f'{shorten(row["class"], 24)}, {row[key]:.4f}'
            label += f' ({ends[0]:.4f} to {ends[1]:.4f})' if ends else ''
        axes.plot(*curve(c), label=label, **style)
    if drawn:  # above the axes, not over a curve
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1), alignment='left', title=title)
    return figure, axes


def roc_figure(found, record, name):
    """ROC curves, one class against the others."""
    from sklearn.metrics import roc_curve  # slow to import

    scores, truth = metrics.log_odds(found.logits, found.multi_label), found.truth

    def curve(c):
        known = ~np.isnan(truth[:, c])
        return roc_curve(truth[known, c], scores[known, c])[:2]

    with matplotlib.rc_context({**STYLE, 'axes.grid.axis': 'both'}):
        has_val = record['threshold_rule'] == 'youden'
        figure, axes = class_curves(record, name, 'auc', 'ROC AUC', curve,
                                    '\ndots: thresholds chosen on val' if has_val else '')
        axes.plot([0, 1], [0, 1], ':', color=GREY, linewidth=1)
        axes.set(xlabel='false positive rate (1 - specificity)',
                 ylabel='true positive rate (sensitivity)')
        for _, row, style in drawn_classes(record, 'auc'):
            if has_val and 'linewidth' not in style:
                axes.plot(1 - row['specificity'], row['sensitivity'], 'o', clip_on=False, **style)
    return figure


def precision_recall_figure(found, record, name):
    """Precision over recall, in steps, as average precision sums it.

    Dotted: the share of positives, which is the precision of guessing.
    """
    from sklearn.metrics import precision_recall_curve  # slow to import

    scores, truth = metrics.log_odds(found.logits, found.multi_label), found.truth

    def curve(c):
        known = ~np.isnan(truth[:, c])
        precision, recall, _ = precision_recall_curve(truth[known, c], scores[known, c])
        return recall, precision

    with matplotlib.rc_context({**STYLE, 'axes.grid.axis': 'both'}):
        figure, axes = class_curves(record, name, 'average_precision', 'average precision', curve,
                                    '\ndotted: shares of positives')
        for line in axes.lines:
            line.set_drawstyle('steps-post')
        for _, row, style in drawn_classes(record, 'average_precision'):
            if 'linewidth' not in style:
                share = row['positives'] / (row['positives'] + row['negatives'])
                axes.axhline(share, linestyle=':', linewidth=1, **style)
        axes.set(xlabel='recall (sensitivity)', ylabel='precision')
    return figure


# ---- calibration --------------------------------------------------------------------------

def reliability_figure(found, record, name):
    """Reliability diagram: accuracy over confidence, and the distribution of confidences."""
    summary, temperature = record['splits']['test'], record['temperature']
    series = [('as trained', 1.0, '')]
    if temperature is not None:
        series.append((f'logits / {temperature:.3g} (fitted on val)', temperature,
                       '_with_temperature'))
    with matplotlib.rc_context(STYLE):
        figure = new_figure(name, record, (5.6, 6.4))
        axes, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3.5, 1])
        axes.plot([0, 1], [0, 1], ':', color=GREY, linewidth=1)
        for (word, divisor, suffix), color, marker in zip(series, COLORS, MARKERS):
            numbers, confidence, share = metrics.calibration_bins(
                *metrics.confidences(found.truth, found.logits, found.multi_label, divisor))
            error = summary[f'expected_calibration_error{suffix}']
            axes.plot(confidence, share, color=color, marker=marker,
                      label=f'{word}: expected calibration error {error:.2%}')
            counts.stairs(numbers / numbers.sum(), np.linspace(0, 1, len(numbers) + 1),
                          color=color, linewidth=1.4)
        axes.legend(loc='lower left', bbox_to_anchor=(0, 1.01), alignment='left')
        if found.multi_label:
            axes.set_ylabel('share of positive labels')
            counts.set(xlabel='probability of a label (mean of each bin)', ylabel='share of labels')
        else:
            axes.set_ylabel('share of right answers')
            counts.set(xlabel='probability of the answer (mean of each bin)',
                       ylabel='share of images')
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.02, 1.02))
        counts.set_ylim(bottom=0)
        for axis in (axes.xaxis, axes.yaxis, counts.yaxis):
            axis.set_major_formatter(PercentFormatter(1))
    return figure


def recall_figure(record, name):
    """Recall of each class with its interval; multi-label: sensitivity and specificity."""
    rows = record['splits']['test']['classes']
    keys = ['sensitivity', 'specificity'] if record['multi_label'] else ['recall']
    has_intervals = len(rows) <= metrics.MAX_INTERVALS
    title = 'with 95% intervals' if has_intervals else None
    rows = [row for row in rows if row[keys[0]] is not None]
    if len(rows) > MAX_ROWS:
        rows = sorted(rows, key=lambda row: row[keys[0]])[:MAX_ROWS]
        title = f'the {MAX_ROWS} lowest' + (f', {title}' if title else '')
    with matplotlib.rc_context({**STYLE, 'axes.grid.axis': 'x'}):
        figure = new_figure(name, record, (6, 1.6 + 0.28 * max(2, len(rows))))
        axes = figure.add_subplot(xlabel=' and '.join(keys))
        for key, color, marker, shift in zip(keys, COLORS, MARKERS,
                                             [-0.13, 0.13] if len(keys) == 2 else [0]):
            for i, row in enumerate(rows):
                value, ends = row[key], row[f'{key}_interval']
                if value is not None:
                    axes.plot(value, i + shift, color=color, marker=marker, linestyle='',
                              markersize=5, clip_on=False, label=key if i == 0 else '')
                if ends is not None:
                    axes.plot(ends, [i + shift] * 2, color=color, clip_on=False)
        axes.set_yticks(range(len(rows)), [shorten(row['class'], 30) for row in rows])
        axes.set(xlim=(-0.01, 1.01), ylim=(len(rows) - 0.5, -0.5))  # the first row at the top
        axes.xaxis.set_major_formatter(PercentFormatter(1))
        if rows:
            axes.legend(loc='lower left', bbox_to_anchor=(0, 1), alignment='left', ncols=2,
                        title=title)
    return figure


# ---- mistakes -----------------------------------------------------------------------------

def mistakes_figure(path, name):
    """The pictures of mistakes.npz with true and predicted class; None if it is empty."""
    with explain_errors(f'{path} can\'t be read'), np.load(path) as file:
        mistakes = dict(file)
    count = len(mistakes['pictures'])
    if count == 0:
        return None
    columns, rows = min(COLUMNS, count), math.ceil(count / COLUMNS)
    width, height = max(4, 1.7 * columns), 0.6 + 2.1 * rows
    with matplotlib.rc_context({**STYLE, 'axes.grid': False}):
        figure = Figure((width, height))
        figure.suptitle(f'{shorten(name)}\nmost confident mistakes on the test images: true class, '
                        f'predicted class and its probability', fontsize=9, color=GREY,
                        y=1 - 0.05 / height)
        # A constrained layout would be slow with so many axes.
        all_axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=dict(
            left=0.1 / width, right=1 - 0.1 / width, bottom=0.1 / height, top=1 - 0.9 / height,
            wspace=0.07, hspace=0.3)).ravel()
        for axes in all_axes:
            axes.set_axis_off()
        for axes, picture, true, predicted, share in zip(
                all_axes, *(mistakes[key] for key in ('pictures', 'true', 'predicted',
                                                      'probabilities'))):
            if picture.shape[2] != 3:  # show the first of other numbers of channels
                picture = picture[:, :, 0]
            axes.imshow(picture, cmap='gray', vmin=0, vmax=255, interpolation='nearest')
            axes.set_title(f'{shorten(str(true), 20)}\n{shorten(str(predicted), 20)} {share:.1%}',
                           fontsize=8)
    return figure
