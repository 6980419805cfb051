"""The report of evaluation.py against brute-force definitions; its files, read back."""

import csv
import io
import math
import os
import re

import numpy as np
import pytest
import torch

import plot
from training import evaluation

FLOWERS = ['Gänseblümchen, weiß', 'a "rose"', 'tulip $5 to $6', 'Straße']


def some_pairs(num_classes, number=300, without=(), never=(), seed=0):
    """(true, predicted) classes of images; no true one is in `without`, no predicted in `never`."""
    rng = np.random.default_rng(seed)
    truths = [c for c in range(num_classes) if c not in without]
    others = [c for c in range(num_classes) if c not in never]
    pairs = []
    for label in rng.choice(truths, number).tolist():
        hit = label not in never and rng.random() < 0.3 + 0.6 * label / num_classes
        pairs.append((label, label if hit else int(rng.choice(others))))
    return pairs


def count(pairs, num_classes):
    return torch.tensor([[pairs.count((i, j)) for j in range(num_classes)]
                         for i in range(num_classes)])


def brute_force_row(pairs, label):
    """Images, recall and precision of a class as in the table, from the images one by one."""
    images = [predicted for truth, predicted in pairs if truth == label]
    found = [truth for truth, predicted in pairs if predicted == label]
    shares = [f'{100 * sum(other == label for other in group) / len(group):.2f}' if group else '-'
              for group in (images, found)]
    return [str(len(images)), *shares]


def brute_force_balanced_error(pairs):
    labels = {truth for truth, _ in pairs}
    errors = [[predicted != truth for truth, predicted in pairs if truth == label]
              for label in labels]
    return 100 * math.fsum(sum(group) / len(group) for group in errors) / len(labels)


# ---- text ---------------------------------------------------------------------------------

@pytest.mark.parametrize('without, never', [((), ()), ((2,), ()), ((), (1,)), ((0, 3), (0, 2))])
def test_table_and_balanced_error_are_their_definitions(without, never):
    pairs = some_pairs(4, without=without, never=never)
    confusion = count(pairs, 4)
    header, *rows, balanced = evaluation.lines(confusion, FLOWERS)
    assert header.split() == ['class', 'images', 'recall', '%', 'precision', '%']
    for label, (name, row) in enumerate(zip(FLOWERS, rows, strict=True)):
        assert row.startswith(f'{name} ') and len(row) == len(header)
        assert row.removeprefix(name).split() == brute_force_row(pairs, label)
    expected = brute_force_balanced_error(pairs)
    assert isinstance(evaluation.balanced_error(confusion), float)
    assert evaluation.balanced_error(confusion) == pytest.approx(expected, rel=1e-12)
    assert balanced == (f'balanced error {expected:.2f}% '
                        '(the mean over classes of the share of errors)')


def test_many_classes_are_cut_to_the_ten_with_the_lowest_recall():
    pairs = some_pairs(21, 900, without=(4, 7))
    names = [f'class-{label}' for label in range(21)]
    heading, _, *rows, balanced = evaluation.lines(count(pairs, 21), names)
    assert '10 of 21 classes' in heading and 'lowest recall' in heading
    fields = {name: brute_force_row(pairs, label) for label, name in enumerate(names)}
    with_images = [name for name in names if fields[name][1] != '-']
    worst = sorted(with_images, key=lambda name: float(fields[name][1]))[:10]
    assert [row.split() for row in rows] == [[name, *fields[name]] for name in worst]
    assert f'{brute_force_balanced_error(pairs):.2f}%' in balanced  # over all of them
    assert len(evaluation.lines(count(pairs, 21)[:20, :20], names[:20])) == 22


def brute_force_auc(scores, labels):
    wins = [(first < second) + 0.5 * (first == second)
            for first, one in zip(scores, labels) if one == 0
            for second, other in zip(scores, labels) if other == 1]
    return sum(wins) / len(wins)


@pytest.mark.parametrize('decimals', [0, 1, 7], ids=['two scores', 'many ties', 'no ties'])
@pytest.mark.parametrize('number', [7, 150])
def test_roc_auc_is_the_share_of_pairs_in_order(number, decimals):
    rng = np.random.default_rng(number)
    labels = np.append([0, 1], rng.integers(0, 2, number))
    scores = rng.random(number + 2, dtype=np.float32).round(decimals)
    *_, line = evaluation.lines(torch.ones(2, 2, dtype=torch.int64), ['a', 'b'],
                            torch.from_numpy(scores), torch.from_numpy(labels))
    expected = brute_force_auc(scores.tolist(), labels.tolist())
    assert line.startswith('ROC AUC ') and float(line.split()[-1]) == round(expected, 4)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('labels, scores, expected', [
    ([1, 1, 1], [0.1, 0.2, 0.3], '-'), ([0, 0], [0.5, 0.5], '-'), ([0, 1, 1], [0.5] * 3, '0.5000'),
    ([0, 0, 1], [0.1, 0.2, 0.9], '1.0000'), ([1, 0], [0.1, 0.9], '0.0000')])
def test_roc_auc_of_odd_scores(labels, scores, expected):
    *_, line = evaluation.lines(torch.ones(2, 2, dtype=torch.int64), ['a', 'b'],
                            torch.tensor(scores), torch.tensor(labels))
    assert line == f'ROC AUC {expected}'


def test_no_auc_for_three_classes_or_without_scores():
    scores, labels = torch.tensor([0.2, 0.7]), torch.tensor([0, 1])
    three = evaluation.lines(torch.eye(3, dtype=torch.int64), ['a', 'b', 'c'], scores, labels)
    assert not any('AUC' in line for line in three)
    assert not any('AUC' in line for line in evaluation.lines(torch.eye(2).long(), ['a', 'b']))


# ---- predictions.csv ----------------------------------------------------------------------

def write_predictions(tmp_path, probabilities, labels, classes, files=None):
    path = tmp_path / 'predictions.csv'
    evaluation.save_predictions(path, files or [f'{i}.png' for i in range(len(labels))],
                            torch.tensor(labels), torch.tensor(probabilities), classes)
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        return list(csv.DictReader(file))


def test_predictions_read_back(tmp_path):
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet([0.5] * 4, size=20).astype(np.float32).tolist()
    labels = rng.integers(0, 4, 20).tolist()
    files = [f'val/{FLOWERS[label]}/Größe, {i}.png' for i, label in enumerate(labels)]
    rows = write_predictions(tmp_path, probabilities, labels, FLOWERS, files)
    assert list(rows[0]) == ['file', 'class', 'error', 'predicted', 'probability', 'second',
                             'second_probability', 'third', 'third_probability']
    for row, file, label, shares in zip(rows, files, labels, probabilities, strict=True):
        ranked = sorted(range(4), key=lambda other: -shares[other])[:3]
        assert row['file'] == file and row['class'] == FLOWERS[label]
        assert row['error'] == ('0' if ranked[0] == label else '1')
        for other, rank in zip(ranked, ('', 'second', 'third')):
            assert row[rank or 'predicted'] == FLOWERS[other]
            share = row[f'{rank}_probability'.lstrip('_')]
            assert float(share) == pytest.approx(shares[other], abs=5.1e-7)
    assert {row['error'] for row in rows} == {'0', '1'}


def test_predictions_of_two_classes_have_no_third(tmp_path):
    [row] = write_predictions(tmp_path, [[0.25, 0.75]], [0], ['a', 'b'])
    assert row == {'file': '0.png', 'class': 'a', 'error': '1', 'predicted': 'b',
                   'probability': '0.750000', 'second': 'a', 'second_probability': '0.250000'}


def test_a_name_that_is_not_utf_8_is_written_byte_for_byte(tmp_path):
    name = os.fsdecode(b'caf\xe9')  # a Latin-1 file name
    [row] = write_predictions(tmp_path, [[1.0, 0.0]], [0], [name, 'b'], [f'{name}/1.png'])
    assert os.fsencode(row['class']) == b'caf\xe9'
    assert b'caf\xe9/1.png,caf\xe9,0,' in (tmp_path / 'predictions.csv').read_bytes()


def test_names_with_line_breaks_or_of_formulas(tmp_path):
    names = ['a\rb.png', 'a\nb.png', 'a\r\nb.png', 'a"b,c.png', '=1+1.png', '+1.png', '-1.png',
             '@x.png', 'a=b/-1.png']
    rows = write_predictions(tmp_path, [[1.0, 0.0]] * 9, [0] * 9, ['a', 'b'], names)
    assert [row['file'] for row in rows] == [
        f'./{name}' if name[0] in '=+-@' else name for name in names]
    assert [os.path.normpath(row['file']) for row in rows] == names
    content = (tmp_path / 'predictions.csv').read_bytes().decode()
    assert len(list(csv.reader(io.StringIO(content, newline=''), strict=True))) == 10
    outside = re.sub('"[^"]*"', '', content)  # of quotes, where other readers count rows
    assert outside.count('\n') == outside.count('\r') == outside.count('\r\n') == 10


# ---- confusion.csv ------------------------------------------------------------------------

@pytest.mark.parametrize('classes', [
    FLOWERS, ['a', 'b\rc', 'd\ne', os.fsdecode(b'caf\xe9')], ['=1+1', ' x ', "'", '1']],
    ids=['flowers', 'line ends and bytes', 'signs'])
def test_confusion_reads_back(tmp_path, classes):
    confusion = count(some_pairs(4), 4)
    path = tmp_path / 'confusion.csv'
    evaluation.save_confusion(path, confusion, classes)
    counts, names = plot.read_confusion(path)
    assert counts.tolist() == confusion.tolist() and names == classes
    with open(path, newline='', encoding='utf-8', errors='surrogateescape') as file:
        header, *rows = csv.reader(file)
    assert header == ['true / predicted', *classes]
    assert rows == [[name, *map(str, row)] for name, row in zip(classes, confusion.tolist())]
