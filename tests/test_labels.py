"""Labels in a CSV file, several labels an image, held out images and folds."""

import csv
import dataclasses
import functools
import math
import re
import shutil

import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
from conftest import SMALL, fails, read_csv, write_images
from forked import run_interrupted
from PIL import Image

import train
from training import (
    checkpoint,
    datasets,
    evaluation,
    folds,
    image_files,
    labels,
    loaders,
    losses,
)
from training.console import DataError

pytestmark = pytest.mark.usefixtures('no_figures')

CPU = torch.device('cpu')


def write_csv(path, rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    return path


# ---- the table -------------------------------------------------------------------------------

def test_a_table_is_read_as_it_is_written(tmp_path):
    path = tmp_path / 'x.csv'
    path.write_text('\ufefffile, nodule,effusion,split,group\r\n"a, 1.png",1,,train,p 1\r\n\r\n'
                    'b.png,0,1.0,valid,p2\r\n', encoding='utf-8')
    table = labels.read_table(path)
    assert table.classes() == ('nodule', 'effusion')
    np.testing.assert_array_equal(table.label_array(('effusion', 'x', 'nodule')),
                                  np.float32([[math.nan, math.nan, 1], [1, math.nan, 0]]))
    assert (table.files, table.groups) == (['a, 1.png', 'b.png'], ['p 1', 'p2'])
    assert table.splits == ['train', 'val'] and table.of_split('val').files == ['b.png']
    write_csv(path, [('file', 'label', 'age'), *((f'{i}.png', i, 30)
                                                 for i in ('10', '9', '1', '01'))])
    table = labels.read_table(path)
    assert table.classes() == ('01', '1', '9', '10')  # by value
    assert table.label_array(table.classes()).tolist() == [3, 2, 1, 0]


WRONG = {  # the content of a file: the message about it
    '': 'has no rows',
    'file,label\n': 'has no rows',
    'name,label\na.png,x\n': "no column `file`: its header is 'name,label'",
    'file;label\na.png;x\n': "its header is 'file;label'; .* separated by commas",
    'file,split\na.png,train\n': 'has no labels',
    'file,label\na.png,x\na.png,y\n': r'column file: row 2 \(a.png\), row 3 \(a.png\) is named m',
    'file,label\n,x\n': r'column file: row 2 \(\) names no file',
    'file,label\na.png,\n': 'column label: .* is empty',
    'file,label,split\na.png,x,dev\n': r'column split: row 2 \(dev\) is none of train, val, ',
    'file,label,group\na.png,x,\n': 'column group: .* is empty',
    'file,a,age\na.png,1,41\n': r'column age: row 2 \(41\) is not 1 .* remove columns',
    'file,a\na.png,-1\n': r'column a: row 2 \(-1\) is not 1 \(present\), 0',
    'file,a,a\na.png,1,1\n': "two columns 'a'",
    'file,label\na,b.png,x\n': 'the header has 2 cells, and row 2 has 3',
    'file,label\n"a.png,x\n': 'is not a CSV file',
    'file,label\na.png,x\n./a.png,y\n': r'row 2 \(a.png\), row 3 \(a.png\) is named more than once',
    ',file,label\n0,a.png,x\n': 'a column without a name, perhaps an index that pandas wrote',
    'file,a,b\na.png,1,\nb.png,0,\n': 'no label of b is known in the training images',
    'file,a,split\na.png,1,train\nb.png,0,train\nd.png,,val\n':
        'no label of the test images is known',
    'file,label,split\na.png,x,train\nb.png,y,test\n': 'only one class for training, x',
    'file,label,split\na.png,x,train\nb.png,y,train\nc.png,x,val\n':
        r'column file: row 4 \(c.png\) is not in --data',
    'file,label,split\na.png,x,train\nb.png,y,train\nd.png,z,val\n':
        r'column label: row 4 \(z\) is not a training class',
    'file,label,split\na.png,x,test\n': 'has no train images',
    'file,label\na.png,x\nb.png,y\n': 'has no test images: .* --val-split 0.1 or --fold 1/5',
}


def test_a_table_in_utf_16_is_named(tmp_path):
    path = tmp_path / 'table.csv'
    path.write_text('file,label\na.png,x\nb.png,y\n', encoding='utf-16')
    with pytest.raises(DataError, match='not in UTF-8: save it as|line contains NUL'):
        labels.read_table(path)


@pytest.mark.parametrize('content', WRONG)
def test_wrong_tables_are_one_line(tmp_path, content):
    for name in 'abd':
        Image.new('RGB', (8, 8)).save(tmp_path / f'{name}.png')
    path = tmp_path / 'labels.csv'
    path.write_text(content)
    with pytest.raises(DataError, match=WRONG[content]) as caught:
        dataset = datasets.describe('folder', tmp_path, labels_file=path)
        for split in ('train', 'test'):
            loaders.make_loader(dataset, split, 4, device=CPU)
    assert '\n' not in str(caught.value) and str(path) in str(caught.value)


def test_empty_columns_are_left_out_and_equal_labels_are_a_warning(tmp_path, capsys):
    root = write_images(tmp_path, {'x': 3}, (8, 8))
    path = tmp_path / 'x.csv'
    path.write_text('file,a,b,,\nx/0.png,1,0,,\nx/1.png,0,0,,\nx/2.png,1,,,\n')
    dataset = datasets.describe('folder', root, labels_file=path, val_split=0.3)
    assert dataset.classes == ('a', 'b')
    loaders.make_loader(dataset, 'train', 2, device=CPU)
    assert 'all known labels to train on are the same for b' in capsys.readouterr().err


def test_names_of_columns_in_any_case_and_those_not_used(tmp_path, capsys):
    root = write_images(tmp_path, {'x': 6}, (8, 8))
    path = write_csv(tmp_path / 'x.csv', [
        ('File', 'LABEL', 'Split', 'Patient_ID', 'age'),
        *((f'x/{i}.png', 'ab'[i % 2], 'Train' if i < 4 else 'test', f'p{i}', 50)
          for i in range(6))])
    argv = ['--dataset', 'folder', '--data', root, '--labels', path]
    assert 'has a column Split: it must be called split' in fails(capsys, *argv)
    path.write_text(path.read_text().replace('Split', 'split'))
    assert re.search('row 2 .Train., row 3 .Train., .* is none of train', fails(capsys, *argv))
    path.write_text(path.read_text().replace('Train', 'train'))
    dataset = datasets.describe('folder', root, labels_file=path)
    said = []
    images = image_files.list_images(dataset, 'train', said.append)
    assert len(images) == 4 and dataset.classes == ('a', 'b')
    assert 'not used: Patient_ID, age; ' in said[0] and len(said) == 1


def test_labels_that_are_not_utf_8_are_named(tmp_path):
    for content in ('file,label\na.png,Ödem\n', 'file,Ödem\na.png,1\n'):
        (tmp_path / 'x.csv').write_text(content, encoding='cp1252')
        with pytest.raises(DataError, match='is not in UTF-8: save it as "CSV UTF-8"'):
            labels.read_table(tmp_path / 'x.csv')


@pytest.mark.parametrize('multi_label', [False, True])
def test_a_class_that_is_held_out_as_a_whole_is_a_warning(tmp_path, multi_label):
    root = write_images(tmp_path, {'x': 12}, (8, 8))
    rows = [(f'x/{i}.png', *((int(i < 2), i % 2) if multi_label else ['rare' if i < 2 else 'b']),
             'one patient' if i < 2 else f'p{i}') for i in range(12)]
    path = write_csv(tmp_path / 'x.csv', [
        ('file', *(('rare', 'b') if multi_label else ['label']), 'group'), *rows])
    warned = []
    for i in range(1, 4):
        said, dataset = [], datasets.describe('folder', root, labels_file=path, fold=f'{i}/3')
        image_files.list_images(dataset, 'train', said.append)
        warned += said
    assert len(warned) == 1 and 'all images of rare are held out: none is left' in warned[0]


def test_a_patient_in_two_splits_is_a_warning(tmp_path, capsys):
    root = write_images(tmp_path, {'x': 4}, (8, 8))
    path = write_csv(tmp_path / 'x.csv', [
        ('file', 'label', 'split', 'group'),
        *((f'x/{i}.png', i % 2, 'train' if i < 3 else 'test', 'same' if i > 1 else i)
          for i in range(4))])
    dataset = datasets.describe('folder', root, labels_file=path)
    loader = loaders.make_loader(dataset, 'train', 2, device=CPU)
    assert loader.groups == ['0', '1', 'same']
    assert '1 groups are in more than one split, such as same in test and train' in (
        capsys.readouterr().err)


# ---- folds -----------------------------------------------------------------------------------

def names_of(n):
    return np.array([b'%d' % i for i in range(n)])


@pytest.mark.parametrize('k', [2, 5])
def test_folds_have_each_image_once_and_classes_to_one_image(k):
    rng = np.random.RandomState(0)
    classes = rng.choice(4, 500, p=(0.6, 0.3, 0.08, 0.02))
    parts = [folds.hold_out(classes, names_of(500), (1 / k,) * k, i) for i in range(k)]
    assert (np.sum(parts, 0) == 1).all()
    counts = np.array([np.bincount(classes[part], minlength=4) for part in parts])
    assert (np.ptp(counts, 0) <= 1).all()
    again = folds.hold_out(classes[::-1], names_of(500)[::-1], (1 / k,) * k, 0)
    np.testing.assert_array_equal(again[::-1], parts[0])  # by their names, whatever the order
    other = folds.hold_out(classes, names_of(500), (1 / k,) * k, 0, seed=2)
    assert (other != parts[0]).any()


@pytest.mark.parametrize('multi_label', [False, True])
def test_folds_keep_groups_together_and_classes_balanced(multi_label):
    rng = np.random.RandomState(0)
    groups = np.repeat(np.arange(300), rng.randint(1, 6, 300))
    n = len(groups)
    if multi_label:
        classes = (rng.rand(n, 3) < (0.4, 0.1, 0.03)).astype(np.float32)
        classes[rng.rand(n, 3) < 0.1] = math.nan
        present = classes == 1
    else:
        classes = rng.choice(3, n, p=(0.6, 0.3, 0.1))
        present = classes[:, None] == np.arange(3)
    parts = [folds.hold_out(classes, names_of(n), (0.2,) * 5, i, groups=names_of(n)[groups])
             for i in range(5)]
    assert (np.sum(parts, 0) == 1).all()
    for group in range(300):
        assert sum(part[groups == group].any() for part in parts) == 1
    counts = np.array([[*present[part].sum(0), part.sum()] for part in parts])
    assert (np.ptp(counts, 0) <= 2).all()
    held_out = folds.hold_out(classes, names_of(n), (0.1, 0.9), 0, groups=names_of(n)[groups])
    np.testing.assert_allclose([*present[held_out].sum(0), held_out.sum()],
                               [*present.sum(0) / 10, n / 10], atol=2)


def test_the_choice_is_the_same_on_every_machine():
    chosen = folds.hold_out(np.arange(20) % 2, names_of(20), (0.2,) * 5, 1)
    assert np.flatnonzero(chosen).tolist() == [0, 13, 18, 19]


@pytest.mark.parametrize('classes, images, k', [(150, 2, 5), (100, 7, 5), (100, 3, 10)])
def test_folds_of_many_small_classes_have_equal_sizes(classes, images, k):
    labels, n = np.arange(classes * images) % classes, classes * images
    sizes = [folds.hold_out(labels, names_of(n), (1 / k,) * k, i).sum() for i in range(k)]
    assert sum(sizes) == n and max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize('shares', [(0.2,) * 5, (0.2, 0.8)])
def test_an_added_image_moves_few_others(shares):
    classes = np.arange(200) % 2
    before = folds.hold_out(classes, names_of(200), shares, 0)
    after = folds.hold_out(np.append(classes, 0), names_of(201), shares, 0)[:200]
    assert before.sum() == 40 and (before != after).sum() <= 4


def test_folds_of_a_data_set_in_memory_leave_its_test_images_alone(monkeypatch):
    shapes, sizes = datasets.DATASETS['shapes'], {}
    monkeypatch.setitem(datasets.DATASETS, 'shapes', dataclasses.replace(
        shapes, read=functools.cache(shapes.read)))
    for i in (1, 2, 3):
        dataset = datasets.describe('shapes', fold=f'{i}/3')
        assert dataset.selection_split == 'val'
        for split in ('train', 'val', 'test'):
            loader = loaders.make_loader(dataset, split, 64, device=CPU)
            sizes[i, split] = loader.all_labels.bincount().tolist()
    assert {tuple(size) for (_, split), size in sizes.items() if split == 'test'} == {(100,) * 10}
    assert all(sizes[i, 'val'] == [200] * 10 and sizes[i, 'train'] == [400] * 10 for i in (1, 2, 3))


# ---- several labels an image -----------------------------------------------------------------

def random_findings(n=40, classes=3):
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(n, classes, generator=generator).gt(0.6).float()
    truth[torch.rand(n, classes, generator=generator) < 0.2] = math.nan
    return torch.randn(n, classes, generator=generator, requires_grad=True), truth


def test_loss_and_errors_of_several_labels_by_hand():
    logits, truth = random_findings()
    weights = torch.tensor([2.0, 1.0, 0.5])
    expected, errors = 0, 0
    for row, known in zip(logits, truth):
        mask = ~known.isnan()
        expected += F.binary_cross_entropy_with_logits(
            row[mask], 0.9 * known[mask] + 0.05, pos_weight=weights[mask], reduction='sum') / 3
        if mask.any():
            errors += ((row[mask] > 0) != known[mask].bool()).double().mean()
    loss = losses.multi_label_loss(logits, truth, weights, 0.1)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses.multi_label_errors(logits, truth).double(), errors)
    loss.backward()
    assert logits.grad.isfinite().all() and (logits.grad[truth.isnan()] == 0).all()
    positive, negative = ((truth == value).sum(0) for value in (1, 0))
    torch.testing.assert_close(losses.balanced_class_weights(truth, 3), negative / positive)


def test_evaluation_of_several_labels_agrees_with_sklearn():
    logits, truth = (value.detach() for value in random_findings())
    batches = [(logits[i:i + 16, :, None, None], truth[i:i + 16]) for i in range(0, 40, 16)]

    class Loader(list):
        num_images = 40

    result = evaluation.evaluate(torch.nn.Flatten(), Loader(batches),
                                 torch.autocast('cpu', enabled=False), auc=True)
    known = ~truth.isnan()
    pairs = [(truth[known[:, c], c], logits[known[:, c], c]) for c in range(3)]
    areas = [sklearn.metrics.roc_auc_score(*pair) for pair in pairs]
    balanced = [sklearn.metrics.balanced_accuracy_score(t, s > 0) for t, s in pairs]
    np.testing.assert_allclose(result.auc, np.mean(areas), rtol=1e-6)
    np.testing.assert_allclose(result.balanced_error, 100 * (1 - np.mean(balanced)), rtol=1e-6)
    assert math.isnan(result.error5) and result.num_classes == 3


@pytest.fixture(scope='module')
def findings(tmp_path_factory):
    """Flags of a run on 24 + 8 + 8 images with two labels: bright above, bright on the left."""
    root = tmp_path_factory.mktemp('findings')
    rng, rows = np.random.RandomState(0), [('file', 'top', 'left', 'split', 'group')]
    for i in range(40):
        image, found = rng.randint(0, 100, (8, 8)), rng.rand(2) < 0.5
        image[:4] += 100 * found[0]
        image[:, :4] += 50 * found[1]
        Image.fromarray(image.astype(np.uint8)).save(root / f'{i}.png')
        cells = [int(value) if rng.rand() < 0.9 else '' for value in found]
        rows.append((f'{i}.png', *cells, ['train', 'val', 'test'][(i >= 24) + (i >= 32)], i // 2))
    return ['--dataset', 'folder', '--data', str(root), '--labels',
            str(write_csv(root / 'labels.csv', rows)), *SMALL, '--epochs', '2', '--no-augment']


def test_training_on_several_labels_resumes_bit_for_bit(findings, tmp_path, capsys):
    argv = [*findings, '--class-weights', 'balanced', '--best-by', 'auc', '--label-smoothing',
            '0.1', '--epochs', '4']
    train.main([*argv, '--save', str(tmp_path / 'whole')])
    said = capsys.readouterr().out
    assert '24 training and 8 val images of 8 pixels, 2 labels' in said
    assert ', chosen on the val images, ' in said and 'test loss ' in said
    stopped = [*argv, '--save', tmp_path / 'stopped']
    assert run_interrupted(stopped, 'set_learning_rate', 9, 15).returncode == 143
    train.main([*findings, '--save', str(tmp_path / 'stopped'), '--resume', '--epochs', '4'])
    first, second = (checkpoint.load(tmp_path / name / 'latest.pth')
                     for name in ('whole', 'stopped'))
    torch.testing.assert_close(first['model'], second['model'], rtol=0, atol=0)
    rows = [read_csv(tmp_path / name / 'test.csv') for name in ('whole', 'stopped')]
    assert rows[0] == rows[1] and len(rows[0]) == 4 and 0 <= float(rows[0][0]['auc']) <= 1
    best = max(rows[0], key=lambda row: float(row['auc']))
    assert checkpoint.load(tmp_path / 'whole' / 'best.pth')['epoch'] == int(best['epoch']) + 1


@pytest.mark.parametrize('best_by', ['auc', 'balanced-error'])
def test_a_criterion_that_is_undefined_is_refused_before_training(findings, tmp_path, capsys,
                                                                  best_by):
    table = findings[findings.index('--labels') + 1]
    rows = [row.split(',') for row in open(table).read().splitlines()]
    rows = [[name, '1', '', split, group] if split == 'val' else [name, top, left, split, group]
            for name, top, left, split, group in rows]
    labels = ['--labels', write_csv(tmp_path / 'labels.csv', rows)]
    error = fails(capsys, *findings, *labels, '--best-by', best_by, '--save', tmp_path / 'run')
    assert f'--best-by {best_by} is undefined for the val images' in error
    assert not (tmp_path / 'run').exists()


def test_other_labels_are_noticed_on_resume(findings, tmp_path, capsys):
    run = ['--save', str(tmp_path / 'run')]
    train.main([*findings, '--epochs', '1', *run])
    table = findings[findings.index('--labels') + 1]
    rows = [row.split(',') for row in open(table).read().splitlines()]
    of_val = next(i for i, row in enumerate(rows) if row[3] == 'val')
    rows[of_val][1] = str(1 - int(rows[of_val][1] or 0))
    capsys.readouterr()
    changed = ['--labels', str(write_csv(tmp_path / 'changed.csv', rows))]
    train.main([*findings, *changed, *run, '--resume'])
    said = capsys.readouterr().err
    assert 'the images that choose best.pth are not those' in said and 'the train' not in said
    assert checkpoint.load(tmp_path / 'run' / 'latest.pth')['best_epoch'] == 2
    single = write_csv(tmp_path / 'single.csv', [
        ('file', 'label', 'split'), *((row[0], row[4], row[3]) for row in rows[1:])])
    assert 'was trained on several labels an image, and ' in fails(
        capsys, *findings, '--labels', single, *run, '--resume', lines=2)


def test_a_fold_of_a_run_is_kept_on_resume(findings, tmp_path, capsys):
    table = findings[findings.index('--labels') + 1]
    rows = [row.split(',') for row in open(table).read().splitlines()]
    for row in rows:
        del row[3]
    argv = [*findings, '--labels', str(write_csv(tmp_path / 'x.csv', rows)), '--save',
            str(tmp_path / 'run')]
    train.main([*argv, '--fold', '2/4', '--epochs', '1'])
    assert '30 training and 10 test images' in capsys.readouterr().out
    train.main([*findings, '--labels', str(tmp_path / 'x.csv'), '--save', str(tmp_path / 'run'),
                '--resume', '--seed', '7'])
    said = capsys.readouterr()
    assert '30 training and 10 test images' in said.out and 'not those' not in said.err
    assert 'another --fold: it has 2/4, not 3/4' in fails(
        capsys, *argv, '--resume', '--fold', '3/4', lines=2)
    tested = '--evaluate', '--resume', tmp_path / 'run/best.pth'
    assert "can't be evaluated with another --fold: it has 2/4, not 1/4" in fails(
        capsys, *tested, '--fold', '1/4')
    assert "can't be evaluated with another --val-split: it has 0.0, not 0.25" in fails(
        capsys, *tested, '--val-split', '0.25')
    for wrong in ('0/4', '5/4', '1/1', '2', 'a/b'):
        assert 'is not I/K, such as 1/5' in fails(capsys, '--fold', wrong)


def test_other_held_out_images_are_a_warning(tmp_path, capsys):
    data = write_images(tmp_path / 'data', {'train/a': 8, 'train/b': 8}, (8, 8))
    run = ['--save', str(tmp_path / 'run'), '--epochs']
    train.main(['--dataset', 'folder', '--data', str(data), *SMALL, '--fold', '1/4', *run, '1'])
    tested = ['--evaluate', '--resume', str(tmp_path / 'run/best.pth'), '--device', 'cpu',
              '--save', str(tmp_path / 'test')]
    train.main(tested)
    assert capsys.readouterr().err == ''
    for name in '89':
        shutil.copy(data / 'train/a/0.png', data / f'train/a/{name}.png')
    train.main(tested)
    assert f'the held out images are not those of {tmp_path}/run/best.pth' in (
        capsys.readouterr().err)
    train.main(['--resume', *run, '2'])
    assert 'some that are now held out may have been trained on' in capsys.readouterr().err


def test_another_table_is_tested_whole(findings, tmp_path, capsys):
    """Also if the run held out images of its own table."""
    table = findings[findings.index('--labels') + 1]
    rows = [row.split(',') for row in open(table).read().splitlines()]
    without = [[cell for i, cell in enumerate(row) if i != 3] for row in rows]
    argv = [*findings, '--labels', str(write_csv(tmp_path / 'x.csv', without)), '--save',
            str(tmp_path / 'run'), '--epochs', '1', '--val-split', '0.25']
    train.main(argv)
    data = findings[findings.index('--data') + 1]
    for table, flags, expected in (('x.csv', ['--data', data + '/'], 10),
                                   ('y.csv', [], 13), ('z.csv', [], 16)):
        if table == 'z.csv':  # its own split counts
            kept = [rows[0], *([*row[:3], 'test' if i < 16 else 'train', row[4]]
                               for i, row in enumerate(rows[1:]))]
        else:
            kept = without if table == 'x.csv' else without[:14]
        write_csv(tmp_path / table, kept)
        train.main(['--evaluate', '--resume', str(tmp_path / 'run/best.pth'), '--labels',
                    str(tmp_path / table), '--save', str(tmp_path / 'test'), *flags])
        assert len(read_csv(tmp_path / 'test/predictions.csv')) == expected
        warning = f'{table}: images that {tmp_path}/run/best.pth was trained on, if'
        assert (warning in capsys.readouterr().err) == (table != 'x.csv')  # the run's own
    testing = [rows[0], *([*row[:3], 'test', row[4]] for row in rows[1:])]
    write_csv(tmp_path / 'z.csv', testing)
    assert 'has no train images' in fails(
        capsys, *findings, '--labels', tmp_path / 'z.csv', '--fold', '1/2')


def test_a_repeated_fine_tuning_command_resumes(recipe, uninterrupted, tmp_path):
    argv = [*recipe, '--pretrained', str(uninterrupted / 'best.pth'), '--save', str(tmp_path / 'x'),
            '--resume', '--epochs']
    for epochs in ('1', '2'):
        train.main([*argv, epochs])
        assert len(read_csv(tmp_path / 'x/test.csv')) == int(epochs)
