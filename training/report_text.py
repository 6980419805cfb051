"""What `train.py --evaluate` prints about an evaluation. No torch.

    lines('test', record['splits']['test'], record)      # record: the content of metrics.json
"""

from training import metrics

MAX_CLASSES = 20  # the table has all classes up to this number,
NUM_WORST = 10    # and this many if there are more


def number(value, digits=4):
    return '-' if value is None else f'{value:.{digits}f}'


def interval(ends, digits=4, unit=''):
    return '-' if ends is None else f'{ends[0]:.{digits}f} to {ends[1]:.{digits}f}{unit}'


def lines(split, summary, record):
    """The lines of the report on a split, with '-' for undefined values.

    Args:
        summary: from `metrics.summarize`.
        record: the content of metrics.json.
    """
    output = [f'{split} loss {summary["loss"]:.4f}']
    output[0] += f', error {summary["error"]:.2f}%'
    if 'error5' in summary:
        output[0] += f', top-5 error {summary["error5"]:.2f}%'
    if split == 'val':  # other metrics are biased: val chose the model and the thresholds
        return output
    output += table(summary['classes'], record['multi_label'])
    if not record['multi_label']:
        output.append(f'balanced error {number(summary["balanced_error"], 2)}% '
                      f'(the mean of the error per class)')
    output += rank_lines(summary, record['multi_label'])
    output += threshold_lines(summary, record)
    output.append(f'expected calibration error {percent(summary["expected_calibration_error"])}%')
    if record['temperature'] is not None:
        after = percent(summary['expected_calibration_error_with_temperature'])
        output[-1] += (f', {after}% with the logits divided by {record["temperature"]:.3g} '
                       f'(fitted on val); negative log-likelihood {summary["nll"]:.4f}, '
                       f'{summary["nll_with_temperature"]:.4f}')
    return output + interval_lines(summary, record)


def table(rows, multi_label):
    """A line for each class, or for the NUM_WORST if there are more than MAX_CLASSES.

    Single-label: number of images, recall, precision and, if there are more than two classes, AUC.
    Multi-label: number of positive and negative labels, AUC and average precision.
    """
    if multi_label:
        columns = [('positive', 8, lambda row: row['positives']),
                   ('negative', 8, lambda row: row['negatives']),
                   ('AUC', 6, lambda row: number(row['auc'])),
                   ('95% interval', 16, lambda row: interval(row['auc_interval'])),
                   ('average precision', 17, lambda row: number(row['average_precision']))]
        key, word = 'auc', 'AUC'
    else:
        columns = [('images', 6, lambda row: row['positives']),
                   ('recall %', 8, lambda row: percent(row['recall'])),
                   ('precision %', 11, lambda row: percent(row['precision']))]
        if len(rows) > 2:
            columns += [('AUC', 6, lambda row: number(row['auc'])),
                        ('95% interval', 16, lambda row: interval(row['auc_interval']))]
        key, word = 'recall', 'recall'
    output, listed = [], rows
    if len(rows) > MAX_CLASSES:
        output = [f'the {NUM_WORST} of {len(rows)} classes with the lowest {word}:']
        # Classes without images, None, come last.
        listed = sorted(rows, key=lambda row: 2 if row[key] is None else row[key])[:NUM_WORST]
    width = max(len('class'), *(len(row['class']) for row in listed))
    output.append('  '.join([f'{"class":<{width}}', *(f'{name:>{size}}'
                                                      for name, size, _ in columns)]))
    output += ['  '.join([f'{row["class"]:<{width}}', *(f'{value(row):>{size}}'
                                                       for _, size, value in columns)])
               for row in listed]
    return output


def percent(share):
    return number(None if share is None else 100 * share, 2)


def headline(summary, multi_label):
    """(metrics, prefix of their names, description) of the line for all classes.

    With two classes, one label an image, the metrics are those of the second class (the AUC of the
    first is the same); otherwise they are means over the classes.
    """
    if not multi_label and len(summary['classes']) == 2:
        row = summary['classes'][1]
        return row, '', row['class']
    return summary, 'mean_', 'mean over the classes'


def rank_lines(summary, multi_label):
    found, prefix, which = headline(summary, multi_label)
    texts = []
    for name, word in (('auc', 'ROC AUC'), ('average_precision', 'average precision')):
        value, ends = found[prefix + name], found[f'{prefix}{name}_interval']
        texts.append(f'{word} {number(value)}' + (f' ({interval(ends)})' if ends else ''))
    return [f'{", ".join(texts)} ({which})']


def threshold_lines(summary, record):
    """Sensitivity, specificity and F1, except where the argmax decides."""
    if record['threshold_rule'] == 'argmax':
        return []
    found, prefix, which = headline(summary, record['multi_label'])
    values = ', '.join(f'{name} {number(found[prefix + name.lower()])}'
                       for name in ('sensitivity', 'specificity', 'F1'))
    where = 'a probability of 0.5'
    if record['threshold_rule'] == 'youden':
        where = f'a probability of {found["threshold"]:.3g}' if not prefix else 'thresholds'
        where += ' chosen on val by Youden\'s J'
    return [f'{which}, at {where}: {values}']


def interval_lines(summary, record):
    """How the intervals were computed, and those of the errors."""
    unit = 'images' if summary['units'] == summary['images'] else 'groups'
    output = [f'intervals: {metrics.LEVEL:.0%}, from {metrics.RESAMPLES:,} bootstrap resamples of '
              f'{summary["units"]:,} {unit}']
    if not record['multi_label']:
        output[0] += (f'; error {interval(summary["error_interval"], 2, "%")}, balanced error '
                      f'{interval(summary["balanced_error_interval"], 2, "%")}')
    if len(summary['classes']) > metrics.MAX_INTERVALS:
        output.append(f'no intervals per class for more than {metrics.MAX_INTERVALS} classes')
    return output
