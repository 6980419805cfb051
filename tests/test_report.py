"""The report of an evaluation against definitions: its text, its files read back, its figures."""

import base64
import csv
import html.parser
import io
import json
import math
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from conftest import ROOT, read_csv
from PIL import Image
from torch import nn

import plot
from training import evaluation, loaders, metrics, predictions, report_figures
from training.predictions import Predictions

FLOWERS = ['Gänseblümchen, weiß', 'a "rose"', 'tulip $5 to $6', 'Straße']
LATIN = os.fsdecode(b'caf\xe9')  # a name that is not UTF-8


def some_answers(classes, number=300, without=(), never=(), seed=0):
    """A SplitResult: labels of all classes except `without`, and `never` is not predicted."""
    rng, count = np.random.default_rng(seed), len(classes)
    labels = rng.choice([c for c in range(count) if c not in without], number)
    logits = rng.normal(size=(number, count)) + 2 * metrics.one_hot(labels, count)
    logits[:, list(never)] -= 100
    return answers_of(labels, logits, classes, seed=seed)


def some_findings(classes, number=200, seed=0):
    rng = np.random.default_rng(seed)
    labels = (rng.random((number, len(classes))) < 0.4).astype(np.float32)
    logits = rng.normal(size=labels.shape) + 2 * labels - 1
    labels[rng.random(labels.shape) < 0.2] = np.nan
    return answers_of(labels, logits, classes, channels=1, seed=seed)


def answers_of(labels, logits, classes, groups=None, channels=3, seed=0):
    rng, number = np.random.default_rng(seed), len(labels)
    images = torch.from_numpy(rng.integers(0, 256, (number, channels, 8, 8)).astype(np.uint8))
    loader = SimpleNamespace(images=images, files=[f'test/{i}, ü.png' for i in range(number)],
                             groups=groups)
    test = evaluation.TestResult(0.5, 25.0, 12.5, math.nan, len(classes))
    return evaluation.SplitResult(loader, test,
                                  Predictions(labels, logits.astype(np.float32), list(classes)))


def write_report(directory, capsys, test, val=None):
    """The lines printed, and the content of metrics.json."""
    directory.mkdir(exist_ok=True)
    sys.stdout.reconfigure(errors='backslashreplace')  # as in train.py
    answers = {'test': test} if val is None else {'test': test, 'val': val}
    dataset = SimpleNamespace(name='folder', root='more', labels_file=None, in_memory=True)
    evaluation.write_report(answers, dataset, directory, 'best.pth, after epoch 7')
    return (capsys.readouterr().out.splitlines(),
            json.loads((directory / 'metrics.json').read_text()))


def pairs_of(answers):
    """(true, predicted) classes of the images."""
    found = answers.predictions
    return list(zip(found.labels.tolist(), found.logits.argmax(1).tolist()))


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
def test_table_and_balanced_error_are_their_definitions(tmp_path, capsys, without, never):
    answers = some_answers(FLOWERS, without=without, never=never)
    lines, record = write_report(tmp_path, capsys, answers)
    pairs, rows = pairs_of(answers), record['splits']['test']['classes']
    first, header, *table = lines[:6]
    error = 100 * np.mean([truth != predicted for truth, predicted in pairs])
    assert first == f'test loss 0.5000, error {error:.2f}%'
    assert header.split() == ['class', 'images', 'recall', '%', 'precision', '%', 'AUC', '95%',
                              'interval']
    for label, (name, row) in enumerate(zip(FLOWERS, table, strict=True)):
        assert row.startswith(f'{name} ') and len(row) == len(header)
        found = row.removeprefix(name).split()
        assert found[:3] == brute_force_row(pairs, label)
        if label in without:
            assert found[3:] == ['-', '-']
        else:
            low, high = rows[label]['auc_interval']
            assert ' '.join(found[3:]) == f'{rows[label]["auc"]:.4f} {low:.4f} to {high:.4f}'
    expected = brute_force_balanced_error(pairs)
    assert lines[6] == (f'balanced error {expected:.2f}% '
                        '(the mean of the error per class)')


def test_many_classes_are_cut_to_the_ten_with_the_lowest_recall(tmp_path, capsys):
    names = [f'class-{label}' for label in range(21)]
    answers = some_answers(names, 900, without=(4, 7))
    lines, _ = write_report(tmp_path, capsys, answers)
    first, heading, _, *rows = lines[:13]
    assert 'top-5 error 12.50%' in first
    assert '10 of 21 classes' in heading and 'lowest recall' in heading
    fields = {name: brute_force_row(pairs_of(answers), i) for i, name in enumerate(names)}
    with_images = [name for name in names if fields[name][1] != '-']
    worst = sorted(with_images, key=lambda name: float(fields[name][1]))[:10]
    assert [row.split()[:4] for row in rows] == [[name, *fields[name]] for name in worst]


def test_two_classes_have_one_auc_and_a_threshold_from_val(tmp_path, capsys):
    test, val = some_answers(['sick', 'well']), some_answers(['sick', 'well'], seed=1)
    lines, record = write_report(tmp_path, capsys, test)
    assert record['threshold_rule'] == 'argmax' and record['temperature'] is None
    assert not any('sensitivity' in line for line in lines)
    lines, record = write_report(tmp_path, capsys, test, val)
    row = record['splits']['test']['classes'][1]
    low, high = row['auc_interval']
    assert lines[0].startswith('val loss 0.5000, error ') and lines[1].startswith('test loss ')
    assert lines[2].split() == ['class', 'images', 'recall', '%', 'precision', '%']
    assert lines[6].startswith(f'ROC AUC {row["auc"]:.4f} ({low:.4f} to {high:.4f}), average ')
    assert lines[7].startswith(f'well, at a probability of {row["threshold"]:.3g} chosen on val by '
                               f'Youden\'s J: sensitivity {row["sensitivity"]:.4f}, ')
    scores = metrics.log_odds(val.predictions.logits, False)
    cut = metrics.youden_thresholds(scores, val.predictions.truth)[1]
    found = metrics.log_odds(test.predictions.logits, False)[:, 1] >= cut
    assert row['sensitivity'] == pytest.approx(found[test.predictions.labels == 1].mean())
    assert row['specificity'] == pytest.approx(1 - found[test.predictions.labels == 0].mean())
    assert (tmp_path / 'predictions-val.csv').exists()


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('labels', [[1, 1, 1], [0, 0, 0]])
def test_a_class_without_images(tmp_path, capsys, labels):
    answers = answers_of(np.array(labels), np.eye(3, 2), ['a', 'b'])
    lines, record = write_report(tmp_path, capsys, answers)
    assert any(line.startswith('ROC AUC -, average precision') for line in lines)
    assert record['splits']['test']['classes'][1]['auc'] is None


def test_saturated_probabilities_do_not_tie(tmp_path, capsys):
    logits = np.array([[60, -50], [50, -50], [40, -50], [55, -50]])
    answers = answers_of(np.array([0, 1, 1, 0]), logits, ['a', 'b'])
    lines, _ = write_report(tmp_path, capsys, answers)
    assert any(line.startswith('ROC AUC 1.0000') for line in lines)
    assert {row['probability'] for row in read_csv(tmp_path / 'predictions.csv')} == {'1.000000'}


def test_multi_label_report(tmp_path, capsys):
    names = ['mass', 'node <1 cm', 'effusion']
    test = some_findings(names)
    lines, record = write_report(tmp_path, capsys, test)
    assert lines[0] == 'test loss 0.5000, error 25.00%' and record['threshold_rule'] == '0.5'
    for c, name in enumerate(names):
        labels, (low, high) = test.predictions.labels[:, c], record['splits']['test']['classes'][c][
            'auc_interval']
        assert lines[2 + c].removeprefix(name).split()[:2] == [
            str(np.sum(labels == 1)), str(np.sum(labels == 0))]
        assert f'{low:.4f} to {high:.4f}' in lines[2 + c]
    assert 'mean over the classes, at a probability of 0.5: sensitivity' in lines[6]
    assert not (tmp_path / 'confusion.csv').exists()
    lines, record = write_report(tmp_path, capsys, test, some_findings(names, seed=1))
    assert 'at thresholds chosen on val by Youden\'s J' in lines[7]


# ---- files --------------------------------------------------------------------------------

def save(tmp_path, labels, logits, classes, files=None, groups=None):
    found = Predictions(np.array(labels), np.array(logits, np.float32), list(classes))
    files = files or [f'{i}.png' for i in range(len(labels))]
    predictions.save_predictions(tmp_path, 'test', files, found, groups)
    with open(tmp_path / 'predictions.csv', newline='', encoding='utf-8',
              errors='surrogateescape') as file:
        return list(csv.DictReader(file)), found


def assert_same(one, other):
    for first, second in zip(one[:2], other[:2]):
        np.testing.assert_array_equal(first, second)
    assert one.classes == other.classes


def test_predictions_read_back(tmp_path):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(20, 4)) * 3, rng.integers(0, 4, 20).tolist()
    files = [f'val/{FLOWERS[label]}/Größe, {i}.png' for i, label in enumerate(labels)]
    rows, found = save(tmp_path, labels, logits, FLOWERS, files)
    assert list(rows[0]) == ['file', 'class', 'error', 'predicted', 'probability', 'second',
                             'second_probability', 'third', 'third_probability',
                             *(f'logit:{name}' for name in FLOWERS)]
    for row, file, label, values in zip(rows, files, labels, found.logits, strict=True):
        ranked = sorted(range(4), key=lambda other: -values[other])[:3]
        shares = np.exp(values.astype(float)) / np.exp(values.astype(float)).sum()
        assert row['file'] == file and row['class'] == FLOWERS[label]
        assert row['error'] == ('0' if ranked[0] == label else '1')
        for other, rank in zip(ranked, ('', 'second', 'third')):
            assert row[rank or 'predicted'] == FLOWERS[other]
            share = row[f'{rank}_probability'.lstrip('_')]
            assert float(share) == pytest.approx(shares[other], abs=5.1e-7)
    assert {row['error'] for row in rows} == {'0', '1'}
    assert_same(predictions.read_predictions(tmp_path), found)  # to the bit


def test_predictions_of_two_classes_have_no_third(tmp_path):
    [row], _ = save(tmp_path, [0], [[0, math.log(3)]], ['a', 'b'], groups=['Ms X'])
    assert list(row) == ['file', 'class', 'error', 'predicted', 'probability', 'second',
                         'second_probability', 'group', 'logit:a', 'logit:b']
    assert list(row.values())[:8] == ['0.png', 'a', '1', 'b', '0.750000', 'a', '0.250000', 'Ms X']


def test_predictions_of_several_labels_read_back(tmp_path):
    labels = np.float32([[0, 1], [np.nan, 1], [1, np.nan]])
    rows, found = save(tmp_path, labels, [[1.5, -2], [3, 4], [-1e-7, 1e9]], ['a', 'b, c'],
                       groups=['p', None, 'q'])
    assert list(rows[0]) == ['file', 'label:a', 'label:b, c', 'group', 'logit:a', 'logit:b, c']
    assert [list(row.values())[:4] for row in rows] == [
        ['0.png', '0', '1', 'p'], ['1.png', '', '1', ''], ['2.png', '1', '', 'q']]
    assert_same(predictions.read_predictions(tmp_path), found)


def test_logits_of_many_classes_are_in_an_npz_file(tmp_path):
    classes = [f'c{i}' for i in range(100)] + [LATIN]
    logits = np.random.default_rng(0).normal(size=(3, 101))
    rows, found = save(tmp_path, [0, 1, 100], logits, classes)
    assert not any(column.startswith('logit:') for column in rows[0])
    assert_same(predictions.read_predictions(tmp_path), found)
    with np.load(tmp_path / 'predictions.npz') as file:
        assert file['files'].tolist() == ['0.png', '1.png', '2.png']


def test_a_name_that_is_not_utf_8_is_written_byte_for_byte(tmp_path):
    [row], _ = save(tmp_path, [0], [[1, 0]], [LATIN, 'b'], [f'{LATIN}/1.png'])
    assert os.fsencode(row['class']) == b'caf\xe9'
    assert b'caf\xe9/1.png,caf\xe9,0,' in (tmp_path / 'predictions.csv').read_bytes()


def test_names_with_line_breaks_or_of_formulas(tmp_path, capsys):
    names = ['a\rb.png', 'a\nb.png', 'a\r\nb.png', 'a"b,c.png', '=1+1.png', '+1.png', '-1.png',
             '@x.png', 'a=b/-1.png']
    answers = some_answers(['a', 'b'], 9)
    answers.loader.files = names
    write_report(tmp_path, capsys, answers)
    rows = read_csv(tmp_path / 'predictions.csv')
    assert [row['file'] for row in rows] == [
        f'./{name}' if name[0] in '=+-@' else name for name in names]
    assert [os.path.normpath(row['file']) for row in rows] == names
    content = (tmp_path / 'predictions.csv').read_bytes().decode()
    assert len(list(csv.reader(io.StringIO(content, newline=''), strict=True))) == 10
    outside = re.sub('"[^"]*"', '', content)  # of quotes, where other readers count rows
    assert outside.count('\n') == outside.count('\r') == outside.count('\r\n') == 10


@pytest.mark.parametrize('classes', [
    FLOWERS, ['a', 'b\rc', 'd\ne', LATIN], ['=1+1', ' x ', "'", '1']],
    ids=['flowers', 'line ends and bytes', 'signs'])
def test_confusion_reads_back(tmp_path, capsys, classes):
    answers = some_answers(classes)
    write_report(tmp_path, capsys, answers)
    pairs = pairs_of(answers)
    expected = [[pairs.count((i, j)) for j in range(4)] for i in range(4)]
    counts, names = predictions.read_confusion(tmp_path / 'confusion.csv')
    assert counts.tolist() == expected and names == classes
    with open(tmp_path / 'confusion.csv', newline='', encoding='utf-8',
              errors='surrogateescape') as file:
        header, *rows = csv.reader(file)
    assert header == ['true / predicted', *classes]
    assert rows == [[name, *map(str, row)] for name, row in zip(classes, expected)]


def test_mistakes_are_the_most_confident_ones_with_their_pictures(tmp_path, capsys):
    test = some_answers(FLOWERS)
    write_report(tmp_path, capsys, test)
    found, saved = test.predictions, np.load(tmp_path / 'mistakes.npz')
    shares = metrics.probabilities(found.logits, False)
    order = sorted((i for i, (truth, answer) in enumerate(pairs_of(test)) if truth != answer),
                   key=lambda i: -shares[i].max())[:24]
    assert saved['files'].tolist() == [test.loader.files[i] for i in order]
    assert saved['true'].tolist() == [FLOWERS[found.labels[i]] for i in order]
    assert saved['predicted'].tolist() == [FLOWERS[found.logits[i].argmax()] for i in order]
    np.testing.assert_allclose(saved['probabilities'], shares[order].max(1))
    np.testing.assert_array_equal(saved['pictures'].transpose(0, 3, 1, 2),
                                  test.loader.images[order].numpy())


def test_mistakes_among_several_labels():
    found = Predictions(np.float32([[1, 0], [np.nan, 1], [0, 1]]),
                        np.float32([[-3, -1], [9, -0.5], [2, 5]]), ['a', 'b'])
    mistakes = predictions.most_confident_mistakes(found, 24)
    assert mistakes['indices'].tolist() == [0, 2, 1]
    assert mistakes['true'] == ['a', 'not a', 'b']
    assert mistakes['predicted'] == ['not a', 'a', 'not b']
    odds = np.exp([3, 2, 0.5])
    assert mistakes['probabilities'].tolist() == pytest.approx(odds / (1 + odds))
    mistakes = predictions.most_confident_mistakes(found, 1, thresholds=np.array([-4, -0.6]))
    assert (mistakes['indices'].tolist(), mistakes['true']) == ([2], ['not a'])


def test_pictures_of_files_are_what_the_model_sees(tmp_path):
    Image.fromarray(np.full((300, 300, 3), 7, np.uint8)).save(tmp_path / 'x.png')
    dataset = SimpleNamespace(in_memory=False, image_size=224, mean=(0,) * 3, std=(1,) * 3,
                              value_range=None)
    loader = SimpleNamespace(files=[str(tmp_path / 'x.png')])
    pictures = evaluation.read_pictures(loader, dataset, [0])
    assert pictures.shape == (1, 224, 224, 3) and (pictures == 7).all()
    assert evaluation.read_pictures(loader, dataset, []).shape[0] == 0


class PixelsAsLogits(nn.Module):
    """Of images [N, C, 1, 1]: a loader's pixels are the logits."""

    def forward(self, images):
        return images.flatten(1)


def test_report_of_a_model(tmp_path, monkeypatch, capsys):
    """The pixels arrive as logits in the files, in the same order."""
    rng, made = np.random.default_rng(0), {}
    for split, number in (('test', 23), ('val', 10)):
        images = torch.from_numpy(rng.integers(0, 256, (number, 3, 1, 1)).astype(np.uint8))
        labels = torch.from_numpy(rng.integers(0, 3, number))
        made[split] = loaders.MemoryLoader(images, labels, 4, device=torch.device('cpu'),
                                           mean=(100,) * 3, std=(50,) * 3)
    monkeypatch.setattr(loaders, 'make_loader', lambda dataset, split, *_, **__: made[split])
    dataset = SimpleNamespace(name='folder', root='more', labels_file=None, in_memory=True,
                              classes=('a', 'b', 'c'), selection_split='val')
    args = SimpleNamespace(save=str(tmp_path / 'run'), batch_size=4, workers=0, ten_crop=False)
    directory = evaluation.report(PixelsAsLogits(), dataset, torch.device('cpu'),
                                  torch.autocast('cpu', enabled=False), args, 'best.pth')
    for split, loader in made.items():
        found = predictions.read_predictions(directory, split)
        np.testing.assert_allclose(found.logits, (loader.images[:, :, 0, 0].numpy() - 100.0) / 50,
                                   rtol=1e-6)
        assert found.labels.tolist() == loader.labels.tolist() and found.classes == ['a', 'b', 'c']
    assert [row['file'] for row in read_csv(directory / 'predictions.csv')] == list(
        map(str, range(23)))
    summary = json.loads((directory / 'metrics.json').read_text())['splits']['test']
    assert summary['loss'] == pytest.approx(summary['nll'], rel=1e-5)
    assert 'logits divided by' in capsys.readouterr().out


# ---- figures and page ---------------------------------------------------------------------

FIGURES = ['confusion', 'roc', 'precision-recall', 'reliability', 'recall', 'mistakes']


def drawn(directory):
    return dict(report_figures.figures(directory))


def legend_of(figure):
    return [text.get_text() for text in figure.axes[0].get_legend().get_texts()]


@pytest.mark.filterwarnings('error')
def test_figures_show_the_numbers(tmp_path, capsys):
    names = ['sick', 'well']
    test = some_answers(names)
    _, record = write_report(tmp_path / 'run', capsys, test, some_answers(names, seed=1))
    figures, summary = drawn(tmp_path / 'run'), record['splits']['test']
    assert list(figures) == FIGURES
    row = summary['classes'][1]
    low, high = row['auc_interval']
    assert legend_of(figures['roc']) == [f'well, {row["auc"]:.4f} ({low:.4f} to {high:.4f})']
    curve, _, dot = figures['roc'].axes[0].lines
    assert sklearn.metrics.auc(*curve.get_data()) == pytest.approx(row['auc'])
    assert dot.get_xydata().tolist() == [[1 - row['specificity'], row['sensitivity']]]
    curve, guess = figures['precision-recall'].axes[0].lines
    recall, precision = curve.get_data()
    assert -np.sum(np.diff(recall) * precision[:-1]) == pytest.approx(row['average_precision'])
    assert guess.get_ydata()[0] == np.mean(test.predictions.labels)
    _, before, after = figures['reliability'].axes[0].lines
    numbers, means, shares = metrics.calibration_bins(
        *metrics.confidences(test.predictions.truth, test.predictions.logits, False))
    np.testing.assert_array_equal(before.get_xydata(), np.stack([means, shares], 1))
    assert f'{summary["expected_calibration_error"]:.2%}' in before.get_label()
    assert f'{summary["expected_calibration_error_with_temperature"]:.2%}' in after.get_label()
    dots, interval = figures['recall'].axes[0].lines[:2]
    assert dots.get_xdata().tolist() == [summary['classes'][0]['recall']]
    assert list(interval.get_xdata()) == summary['classes'][0]['recall_interval']
    pictures = [axes for axes in figures['mistakes'].axes if axes.images]
    assert len(pictures) == 24
    np.testing.assert_array_equal(pictures[0].images[0].get_array(),
                                  np.load(tmp_path / 'run/mistakes.npz')['pictures'][0])


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('make, classes', [
    (some_answers, [f'class {i}' for i in range(9)]),
    (some_findings, [*FLOWERS, 'x' * 99, LATIN, '$\\frac'])], ids=['nine', 'odd names'])
def test_no_text_is_cut_off_or_covered(tmp_path, capsys, make, classes):
    write_report(tmp_path / LATIN, capsys, make(classes, 30), make(classes, 30, seed=1))
    for name, figure in drawn(tmp_path / LATIN).items():
        figure.draw_without_rendering()
        boxes = [axes.get_tightbbox() for axes in figure.axes]
        title = figure._suptitle.get_window_extent()
        assert min(box.x0 for box in boxes) >= -1 and min(box.y0 for box in boxes) >= -1, name
        assert max(box.x1 for box in boxes) <= figure.bbox.x1 + 1, name
        assert max(box.y1 for box in boxes) <= title.y0 + 1 < figure.bbox.y1, name


def test_of_many_classes_the_worst_have_colours(tmp_path, capsys):
    _, record = write_report(tmp_path, capsys, some_answers([f'class {i}' for i in range(50)], 400))
    figures, rows = drawn(tmp_path), record['splits']['test']['classes']
    worst = sorted(rows, key=lambda row: row['auc'])[:5]
    assert [text.split(',')[0] for text in legend_of(figures['roc'])] == [
        row['class'] for row in worst]
    colors = [line.get_color() for line in figures['roc'].axes[0].lines]
    assert colors[:45] == ['#cccccc'] * 45 and colors[45:50] == report_figures.COLORS[:5]
    lowest = sorted(rows, key=lambda row: row['recall'])[:40]
    assert [text.get_text() for text in figures['recall'].axes[0].get_yticklabels()] == [
        row['class'] for row in lowest]


class Page(html.parser.HTMLParser):
    """Counts tags, and keeps texts and images."""

    def __init__(self, text):
        super().__init__()
        self.open, self.texts, self.images, self.links = [], [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag not in ('meta', 'img'):
            self.open.append(tag)
        if tag == 'img':
            self.images[attributes['alt']] = attributes['src']
        self.links += [attributes[key] for key in ('href', 'src') if key in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, text):
        self.texts += [text.strip()] if text.strip() else []


def test_the_page_has_all_in_one_file_and_escapes_names(tmp_path, capsys):
    run, names = tmp_path / '<b>run & co', ['<script>alert(1)</script>', LATIN, 'a & b']
    _, record = write_report(run, capsys, some_answers(names, 20), some_answers(names, 20, seed=1))
    (run / 'train.csv').write_text('epoch,loss,error\n1,2,50\n2,1,40\n')
    (run / 'args.json').write_text(json.dumps(
        {'args': {'data': '<i>', 'lr': 0.1, 'arch': None}, 'versions': {'torch': '2.6'}}))
    plot.main([str(run), '--output', str(tmp_path / 'out')])
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / 'out/report.html')
    page = Page((tmp_path / 'out/report.html').read_text(encoding='utf-8'))
    assert page.open == [] and page.texts[-1] == '2.6'
    assert {'<b>run & co', names[0], 'caf\ufffd', 'a & b', '<i>'} <= set(page.texts)
    assert any(text.startswith('best.pth, after epoch 7, tested on folder in more.')
               for text in page.texts)
    row = record['splits']['test']['classes'][0]
    low, high = row['auc_interval']
    assert f'{row["auc"]:.3f} ({low:.3f} to {high:.3f})' in page.texts
    assert list(page.images) == ['loss-error', 'recall', 'confusion', 'roc', 'precision-recall',
                                 'reliability', 'mistakes']
    for name, source in zip(page.images, page.links, strict=True):
        kind, _, data = source.partition(';base64,')
        assert kind == 'data:image/png'
        assert base64.b64decode(data) == (tmp_path / f'out/{name}.png').read_bytes()
    Image.open(tmp_path / 'out/mistakes.png').load()


def test_missing_files_are_not_drawn(tmp_path, capsys):
    answers = answers_of(np.array([0, 1]), np.eye(2), ['a', 'b'])  # no mistake
    write_report(tmp_path, capsys, answers)
    assert 'mistakes' not in drawn(tmp_path) and 'roc' in drawn(tmp_path)
    (tmp_path / 'metrics.json').unlink()
    assert list(drawn(tmp_path)) == ['confusion']
    assert plot.save_reports(tmp_path) == [tmp_path / 'confusion.png']


def test_drawing_does_not_import_torch(tmp_path, capsys):
    write_report(tmp_path, capsys, some_answers(['a', 'b'], 30))
    code = (f'import pathlib, sys, plot; list(plot.all_figures([pathlib.Path({str(tmp_path)!r})]));'
            f'assert "sklearn" in sys.modules and "torch" not in sys.modules')
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=60)


