"""The files of an evaluation, which evaluation.py writes and report_figures.py reads. No torch.

    predictions.csv    a row per image: its class, the three most probable ones, logits
    predictions.npz    instead of the columns of logits, for more than `MAX_COLUMNS` classes
    confusion.csv      int [C, C]: rows are true classes, columns predicted ones
    metrics.json       all metrics, see `metrics.summarize`
    mistakes.npz       the `most_confident_mistakes`, their files, pictures uint8 [M, H, W, C]

Predictions on the validation images are in predictions-val.csv and .npz. `labels` are int64 [N] or,
multi-label, float32 [N, C] of 0, 1 and NaN (unknown); `logits` are float32 [N, C].
"""

import csv
from typing import NamedTuple

import numpy as np

from training import metrics
from training.console import UserError
from training.files import open_csv, read_json

MAX_COLUMNS = 100  # predictions.csv has the logits of up to this many classes
RANKS = 'predicted', 'second', 'third'


class Predictions(NamedTuple):
    """The labels and logits of a split's images, and the names of the classes."""

    labels: np.ndarray
    logits: np.ndarray
    classes: list

    @property
    def multi_label(self):
        return self.labels.ndim == 2

    @property
    def truth(self):
        """float32 [N, C] of 0, 1 and NaN (unknown)."""
        if self.multi_label:
            return self.labels
        return metrics.one_hot(self.labels, len(self.classes))


def suffix(split):
    return '' if split == 'test' else f'-{split}'


# ---- write --------------------------------------------------------------------------------

def save_predictions(directory, split, files, predictions, groups=None):
    """Write predictions.csv and, for many classes, predictions.npz.

    Args:
        files: names or numbers of N images.
        groups: N names or None.
    """
    labels, logits, classes = predictions
    describe = label_columns if predictions.multi_label else answer_columns
    columns = {'file': files, **describe(labels, logits, classes)}
    if groups is not None:
        columns['group'] = ['' if group is None else group for group in groups]
    if len(classes) <= MAX_COLUMNS:
        for name, values in zip(classes, logits.T):  # 9 digits determine a float32
            columns[f'logit:{name}'] = [f'{value:.9g}' for value in values.tolist()]
    else:
        np.savez(directory / f'predictions{suffix(split)}.npz', labels=labels, logits=logits,
                 classes=list(classes), files=list(map(str, files)))
    with open_csv(directory / f'predictions{suffix(split)}.csv', 'w') as file:
        writer = csv.writer(file)  # lines end in \r\n, so that both are quoted in names
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))


def answer_columns(labels, logits, classes):
    """{column: N values}: true class, 1 for an error, and the most probable classes."""
    probs, rows = metrics.probabilities(logits, multi_label=False), np.arange(len(logits))
    order = np.argsort(-logits, axis=1, kind='stable')[:, :len(RANKS)].T
    columns = {'class': [classes[label] for label in labels],
               'error': (order[0] != labels).astype(int).tolist()}
    for rank, found in zip(RANKS, order):
        columns[rank] = [classes[label] for label in found]
        name = 'probability' if rank == 'predicted' else f'{rank}_probability'
        columns[name] = [f'{prob:.6f}' for prob in probs[rows, found]]
    return columns


def label_columns(labels, logits, classes):
    """{column: N values} for each class: 0, 1, or '' if unknown."""
    return {f'label:{name}': ['' if np.isnan(value) else int(value) for value in values]
            for name, values in zip(classes, labels.T)}


def save_confusion(path, confusion, classes):
    """Write a CSV file with the class names in the header and at the start of each row."""
    with open_csv(path, 'w') as file:
        writer = csv.writer(file)
        writer.writerow(['true / predicted', *classes])
        writer.writerows([name, *row] for name, row in zip(classes, confusion.tolist()))


def most_confident_mistakes(predictions, limit, thresholds=None):
    """Up to `limit` wrong decisions, the most confident first.

    Multi-label: labels that are wrong at the `thresholds` (log-odds [C], by default p = 0.5), with
    classes written as 'name' and 'not name'.

    Returns:
        {column: M values}: `indices` of the images; `true` and `predicted` classes;
        `probabilities` of the latter.
    """
    labels, logits, classes = predictions
    scores = metrics.log_odds(logits, predictions.multi_label)
    probs = metrics.probabilities(logits, predictions.multi_label)
    if not predictions.multi_label:
        answers = logits.argmax(1)
        wrong = np.flatnonzero(answers != labels)
        wrong = wrong[np.argsort(-scores[wrong, answers[wrong]], kind='stable')][:limit]
        return {'indices': wrong, 'true': [classes[label] for label in labels[wrong]],
                'predicted': [classes[label] for label in answers[wrong]],
                'probabilities': probs[wrong, answers[wrong]]}
    margins = scores - (0 if thresholds is None else thresholds)
    wrong, label = np.nonzero(~np.isnan(labels) & ((margins >= 0) != (labels == 1)))
    order = np.argsort(-np.abs(margins[wrong, label]), kind='stable')[:limit]
    wrong, label = wrong[order], label[order]
    says_yes, probs = (margins[wrong, label] >= 0).astype(int), probs[wrong, label]
    names = [(f'not {classes[c]}', classes[c]) for c in label]
    return {'indices': wrong, 'true': [pair[1 - yes] for pair, yes in zip(names, says_yes)],
            'predicted': [pair[yes] for pair, yes in zip(names, says_yes)],
            'probabilities': np.where(says_yes, probs, 1 - probs)}


# ---- read ---------------------------------------------------------------------------------

def read_predictions(directory, split='test'):
    """Read the Predictions of a split; raises UserError if the files have no logits."""
    path = directory / f'predictions{suffix(split)}.npz'
    columns = read_columns(path.with_suffix('.csv'))
    classes = [name.removeprefix('logit:') for name in columns if name.startswith('logit:')]
    if not classes:
        if not path.exists():
            raise UserError(f'{path.with_suffix(".csv")} has no logits: train.py --evaluate writes '
                            f'them')
        with np.load(path) as file:
            return Predictions(file['labels'], file['logits'], file['classes'].tolist())
    logits = np.array([columns[f'logit:{name}'] for name in classes], np.float32).T
    if 'class' in columns:
        numbers = {name: label for label, name in enumerate(classes)}
        return Predictions(np.array([numbers[name] for name in columns['class']]), logits, classes)
    labels = [[value or 'nan' for value in columns[f'label:{name}']] for name in classes]
    return Predictions(np.array(labels, np.float32).T, logits, classes)


def read_columns(path):
    """{column: strings} of a CSV file; raises UserError if its rows have other lengths."""
    with open_csv(path) as file:
        header, *rows = [row for row in csv.reader(file) if row] or [[]]
    if not rows or any(len(row) != len(header) for row in rows):
        raise UserError(f'{path} is damaged: its rows have other lengths than its header')
    return dict(zip(header, zip(*rows)))


def read_confusion(path):
    """Read confusion.csv: int64 [C, C] and the names of the C classes.

    Raises:
        UserError: the file is not a table as `save_confusion` writes it.
    """
    with open_csv(path) as file:
        (_, *names), *rows = [row for row in csv.reader(file) if row] or [['']]
    try:
        counts = np.array([[int(field) for field in row] for _, *row in rows])
    except ValueError:  # not whole numbers, or rows of different lengths
        counts = np.empty(0)
    if not names or counts.shape != (len(names), len(names)) or counts.sum() == 0:
        raise UserError(f'{path} is not a confusion matrix: a header with the class names, then a '
                        f'name and as many numbers of images for each class')
    return counts, names


def read_metrics(directory):
    return read_json(directory / 'metrics.json')
