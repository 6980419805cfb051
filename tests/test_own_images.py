"""The commands of attic/own-images.md, and a rare class that differs by a few grey levels."""

import csv
import functools
import importlib
import json
import re
import shlex
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from conftest import ROOT, SMALL, cache_densenet121, fails, read_csv, write_images
from PIL import Image

import densenet
import plot
import predict
import train
from training import checkpoint, datasets, image_files, loaders, weights

SCANS = {'gesund': 1030, 'Läsion groß': 1270}  # the level of a spot, among 0..4095


def write_scans(root, counts, ending):
    """Noise with a spot in it, of odd sizes: 12 bits in 16-bit PNG, or as floats in TIFF."""
    rng = np.random.RandomState(0)
    for split, share in counts.items():
        for name, count in zip(SCANS, (10 * share, share)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                height, width = rng.randint(25, 45, 2)
                scan = rng.normal(1030, 60, (height, width))
                y, x = rng.randint(height - 14), rng.randint(width - 14)
                scan[y:y + 14, x:x + 14] += SCANS[name] - 1030
                scan[0, 0], scan[0, 1] = 0, 4095
                scan = scan.astype(np.uint16) if ending == 'png' else scan.astype(np.float32) - 1024
                Image.fromarray(scan).save(folder / f'{i}.{ending}')


@pytest.mark.parametrize('ending, flags', [
    ('png', []), ('tif', ['--value-range', '-1024', '3071'])])
@pytest.mark.usefixtures('no_figures')
def test_a_rare_class_that_differs_by_a_few_levels_is_learned(tmp_path, capsys, ending, flags):
    write_scans(tmp_path, {'train': 24, 'val': 6}, ending)
    run = tmp_path / 'run'
    train.main(['--dataset', 'folder', '--data', str(tmp_path), '--in-channels', '1', *flags,
                '--image-size', '24', '--depth', '10', '--growth-rate', '8', '--epochs', '8',
                '--lr-schedule', 'cosine', '--batch-size', '32', '--class-weights', 'balanced',
                '--best-by', 'balanced-error', '--device', 'cpu', '--no-plot', '--save', str(run)])
    rows = read_csv(run / 'test.csv')
    saved = checkpoint.load(run / 'best.pth')
    scores = [float(row['balanced_error']) for row in rows]
    assert min(scores) < 2 and saved['best_epoch'] == 1 + np.argmin(scores)
    assert saved['dataset']['value_range'] == ((-1024, 3071) if flags else (0, 4095))

    said = capsys.readouterr().out
    assert f'with values from {"-1024 to 3071" if flags else "0 to 4095"}' in said
    assert f'by the balanced-error of {min(scores):.4g} (epoch {saved["best_epoch"]})' in said
    train.main(['--evaluate', '--resume', str(run / 'best.pth'), '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert f'balanced error {min(scores):.2f}%' in printed and 'ROC AUC' in printed
    assert re.search(r'Läsion groß +6 ', printed)
    rows = read_csv(run / 'predictions.csv')
    assert len(rows) == 66 and rows[0]['file'] == str(tmp_path / f'val/Läsion groß/0.{ending}')
    predict.main([str(tmp_path / 'val'), '--checkpoint', str(run / 'best.pth'), '--csv',
                  str(tmp_path / 'x.csv'), '--device', 'cpu'])
    found = {row['file']: row for row in reversed(read_csv(tmp_path / 'x.csv'))}  # the likeliest
    assert len(found) == 66
    for row in rows:
        assert row['predicted'] == found[row['file']]['class']
        assert abs(float(row['probability']) - float(found[row['file']]['probability'])) < 1e-4


def test_the_commands_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    torch.manual_seed(0)
    small = dict(growth_rate=8, block_config=(2, 2, 2, 2), num_init_features=16)
    monkeypatch.setattr(densenet, 'densenet121', functools.partial(densenet.DenseNet, **small))
    cache_densenet121(tmp_path, torchvision.models.DenseNet(**small))
    write_images(tmp_path, {'scans/normal': 20, 'scans/lesion': 10}, (70, 80), mode='L')
    write_images(tmp_path, {'new': 2, 'xrays': 40}, (90, 70), mode='L')
    write_xray_table(tmp_path / 'xrays.csv', 40)
    save_reports = plot.save_reports
    page = re.sub(r'\\\n +', '', (ROOT / 'attic/own-images.md').read_text())
    commands = re.findall(r'^    python (.*)$', page, re.MULTILINE)
    assert len(commands) == 12
    for command in commands:
        is_evaluation = '--evaluate' in command  # the figures of training take seconds, too
        monkeypatch.setattr(plot, 'save_reports', save_reports if is_evaluation else no_report)
        if command.startswith('train.py --dataset'):  # smaller, shorter
            command += ' --epochs 1 --no-plot --image-size 65 -b 9 --workers 0'
        for i in '12' if '$i' in command else '1':
            script, *argv = shlex.split(command.replace('--epochs 60', '--epochs 2')
                                        .replace('$i', i))
            argv = [flag for flag in argv if not re.fullmatch('work/xrays-[345]', flag)]
            importlib.import_module(script.removesuffix('.py').replace('/', '.')).main(argv)
    assert [row['epoch'] for row in read_csv('work/scans/test.csv')] == ['1', '2']
    for run, names in (('scans', ('confusion.png', 'new.csv')), ('xrays', ('roc.pdf',))):
        for name in ('loss-error.pdf', 'predictions.csv', 'report.html', *names):
            size = (tmp_path / 'work' / run / name).stat().st_size
            assert size > (5000 if name.endswith('.png') else 0)
        assert len(list((tmp_path / 'work' / run / 'heatmaps').rglob('*.heatmap.png'))) == 2
    assert len(read_csv('work/scans/predictions.csv')) == 2 + 1
    said = capsys.readouterr().out
    assert '30 training' not in said and re.search(r'  auc +0\.\d+ \+- ', said)
    held_out = [read_csv(f'work/xrays-{i}/test.csv') for i in '12']
    assert held_out[0] != held_out[1]


def no_report(directory):
    return []


def write_xray_table(path, count):
    """Two findings, of which some are unknown; two images a patient; the last ten for testing."""
    rng = np.random.RandomState(0)
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', 'effusion', 'nodule', 'split', 'group'])
        for i in range(count):
            found = [rng.choice(['0', '1', ''], p=(0.5, 0.4, 0.1)) for _ in range(2)]
            split = 'train' if i < count - 10 else 'test'
            writer.writerow([f'{i}.png', *found, split, f'p{i // 2}'])


@pytest.mark.parametrize('build, size', [
    (densenet.densenet121, 96), (functools.partial(densenet.densenet_cifar, 10, 4), 32)])
def test_one_channel_gives_the_same_logits_as_three_equal_ones(tmp_path, build, size):
    torch.manual_seed(0)
    three, one = build(num_classes=3).eval(), build(num_classes=3, in_channels=1).eval()
    torch.save(three.state_dict(), tmp_path / 'three.pth')
    weights.load_pretrained(one, Namespace(pretrained=str(tmp_path / 'three.pth'), arch=None,
                                           reset_classifier=False, evaluate=False))
    grey = torch.randn(2, 1, size, size)
    with torch.no_grad():
        torch.testing.assert_close(one(grey), three(grey.expand(-1, 3, -1, -1)),
                                   rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures('no_figures')
@pytest.mark.parametrize('given', [['--data'], ['--data', '--labels']])
def test_a_run_is_evaluated_on_its_own_images_in_another_place(tmp_path, monkeypatch, given):
    """As on another machine: with the run's split, and thresholds from its validation images."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path, {'xrays': 40}, (8, 8), mode='L')
    write_xray_table('xrays.csv', 40)
    train.main(['--dataset', 'folder', '--data', 'xrays', '--labels', 'xrays.csv', '--in-channels',
                '1', '--val-split', '0.3', *SMALL, '--epochs', '1', '--save', 'run'])
    predicted = Path('run/predictions.csv').read_text()
    here = json.loads(Path('run/metrics.json').read_text())
    shutil.copytree('xrays', 'moved/xrays')
    shutil.copy('xrays.csv', 'moved')
    values = {'--data': 'moved/xrays', '--labels': 'moved/xrays.csv'}
    train.main(['--evaluate', '--resume', 'run/latest.pth', '--device', 'cpu',
                *(word for flag in given for word in (flag, values[flag]))])
    report, = Path('run').glob('on-*')
    there = json.loads((report / 'metrics.json').read_text())
    assert there['splits'] == here['splits'] and there['threshold_rule'] == 'youden'
    assert (report / 'predictions.csv').read_text().replace('moved/', '') == predicted


@pytest.mark.usefixtures('no_figures')
def test_wrong_test_images_are_an_error_before_training(tmp_path, capsys):
    data = write_images(tmp_path / 'data', {
        **{f'{split}/{name}': 4 for split in ('train', 'val', 'test') for name in 'ab'},
        'test/zzz': 1}, (8, 8))
    assert 'zzz is not one of the training classes' in fails(
        capsys, '--dataset', 'folder', '--data', data, *SMALL, '--save', tmp_path / 'run')
    assert not (tmp_path / 'run/latest.pth').exists()


def test_names_do_not_depend_on_the_system(tmp_path, monkeypatch):
    """The images that are held out are chosen by them."""
    monkeypatch.setattr(image_files.os, 'sep', '\\')
    assert image_files.name_of('a\\1.png') == b'a/1.png'


def test_a_resumed_run_keeps_its_split_and_other_data_are_all_tested(tmp_path, capsys):
    scans = write_images(tmp_path / 'scans', {'a': 20, 'b': 10}, (8, 8))
    argv = ['--dataset', 'folder', '--data', str(scans), '--val-split', '0.2', '--depth', '10',
            '--growth-rate', '4', '--epochs', '1', '--device', 'cpu', '--no-plot', '--save']
    train.main([*argv, str(tmp_path / 'run')])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert saved['num_images'] == 24
    given = train.flags.parse(['--resume', str(tmp_path / 'run/latest.pth'), '--seed', '5'])
    args, _ = checkpoint.with_saved_flags(given)
    again = checkpoint.describe_data(args, saved)
    first = datasets.Description(root=scans, **saved['dataset'])
    files = [loaders.make_loader(dataset, 'test', 4, device=torch.device('cpu')).files
             for dataset in (first, again)]
    assert files[0] == files[1] and len(files[0]) == 6
    assert 'another --val-split: it has 0.2, not 0.1' in fails(
        capsys, '--save', tmp_path / 'run', '--resume', '--val-split', '0.1')
    more = write_images(tmp_path / 'more', {'test/a': 3, 'test/b': 4}, (8, 8))
    train.main(['--evaluate', '--resume', str(tmp_path / 'run/best.pth'), '--data', str(more),
                '--device', 'cpu'])
    assert len(read_csv(tmp_path / 'run/on-more/predictions.csv')) == 7
    warning = f'ignoring --val-split of {tmp_path}/run/best.pth, because more has not the images'
    assert warning in capsys.readouterr().err
