"""Runs that are stopped, killed, damaged or out of disk space, and resumed without loss."""

import fcntl
import functools
import itertools
import json
import math
import os
import re
import resource
import shutil
import signal
import time

import forked
import numpy as np
import pytest
import torch
from conftest import SMALL, assert_same_run, fails, read_csv, write_images
from forked import RUN, interrupted, run_interrupted

import densenet
import train
from fused_dense_block import library
from training import checkpoint, runlog
from training.flags import num_workers, parse


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
    """The directory of a run of two epochs with the flags of `small`."""
    run = tmp_path_factory.mktemp('finished') / 'run'
    train.main(['--dataset', 'folder', '--data', str(folder), *SMALL, '--epochs', '2', '--save',
                str(run)])
    return run


@pytest.fixture
def two_epochs(finished, tmp_path):
    """A copy of `finished` that a test may change."""
    return shutil.copytree(finished, tmp_path / 'run')


# ---- stopped and killed ----------------------------------------------------------------------

@pytest.mark.parametrize('function, when, signum, code, epoch, step', [
    ('learning_rate', 14, signal.SIGTERM, 143, 2, 5),   # within a print interval
    ('learning_rate', 18, signal.SIGINT, 130, 2, 9),    # the last step of an epoch
    ('evaluate', 3, signal.SIGTERM, 143, 3, 9),
    ('evaluate', 4, signal.SIGTERM, 143, 4, 9),         # after the last step of all
    ('make_step', 1, signal.SIGTERM, 143, 1, 1),        # warming up
    ('loaders.MemoryLoader.set_epoch', 3, signal.SIGUSR1, 138, 1, 1),  # starting to load data
    ('Run.after_epoch', 2, signal.SIGUSR1, 138, 3, 1),
    ('learning_rate', 23, signal.SIGKILL, -9, 3, 0),    # back to what was saved after epoch 2
    ('Run.after_epoch', 2, signal.SIGKILL, -9, 2, 0),
    ('learning_rate', 4, signal.SIGKILL, -9, 1, 0),     # before the first epoch was done
    ('checkpoint.os.replace', 4, signal.SIGKILL, -9, 1, 0),  # latest.pth is latest.pth.1, alone
])
def test_interrupted_and_resumed_equals_uninterrupted(
        recipe, uninterrupted, tmp_path, function, when, signum, code, epoch, step):
    run = tmp_path / 'run'
    ended = run_interrupted([*recipe, '--save', str(run)], function, when, signum)
    assert ended.returncode == code, ended.stderr
    assert 'Traceback' not in ended.stderr
    _, saved = checkpoint.load_newest(run / 'latest.pth')
    assert (saved['epoch'], saved['step']) == (epoch, step)
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])  # the other flags are kept
    assert_same_run(run, uninterrupted)


def test_a_signal_ends_the_last_test(tmp_path):
    run = tmp_path / 'run'
    folders = {f'{split}/{name}': 4 for split in ('train', 'val', 'test') for name in 'ab'}
    data = write_images(tmp_path / 'data', folders)
    argv = ['--dataset', 'folder', '--data', str(data), *SMALL, '--save', str(run), '--epochs', '1']
    ended = run_interrupted(argv, 'evaluation.report', 1, signal.SIGTERM)
    assert ended.returncode == 143 and 'testing best.pth' in ended.stdout
    assert not (run / 'metrics.json').exists()
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    assert (run / 'metrics.json').exists()


@pytest.mark.parametrize('function, signum', [
    ('networks.build', signal.SIGTERM), ('networks.build', signal.SIGINT),
    ('loaders.make_loader', signal.SIGUSR1)])
def test_a_signal_before_there_is_anything_to_save(recipe, tmp_path, function, signum):
    ended = run_interrupted([*recipe, '--save', str(tmp_path / 'run')], function, 1, signum)
    assert (ended.returncode, ended.stdout, ended.stderr) == (128 + signum, '', '')
    assert not (tmp_path / 'run').exists()


def test_a_second_sigint_stops_at_once(recipe, tmp_path):
    script = interrupted('learning_rate', 5, 'os.kill(os.getpid(), 2); os.kill(os.getpid(), 2)')
    ended = forked.run(script, [*recipe, '--save', tmp_path / 'run'])
    assert ended.returncode == -signal.SIGINT
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert (saved['epoch'], saved['step']) == (1, 0)


@pytest.fixture(scope='module')
def large(tmp_path_factory):
    """Flags of a run on images that are read by workers: ten steps an epoch."""
    root = write_images(tmp_path_factory.mktemp('large'), {
        'train/a': 10, 'train/b': 10, 'val/a': 1, 'val/b': 1}, (66, 66))
    return ['--dataset', 'folder', '--data', root, '--image-size', 66, '--block-config', 1, 1,
            '--growth-rate', 4, '--batch-size', 2, '--device', 'cpu', '--no-plot']


@pytest.mark.parametrize('flags', [
    ['--optimizer', 'adam', '--precision', 'bf16'],
    ['--optimizer', 'adamw', '--label-smoothing', '0.1', '--warmup-epochs', '2'],
    ['--optimizer', 'rmsprop', '--momentum', '0.9', '--memory-efficient']])
def test_other_optimizers_and_bf16_resume_with_the_same_bits(recipe, tmp_path, flags):
    one, other = tmp_path / 'one', tmp_path / 'other'
    argv = [*recipe, '--lr', '0.002', *flags, '--save']
    train.main([*argv, str(one)])
    ended = run_interrupted([*argv, str(other)], 'learning_rate', 14, signal.SIGTERM)
    assert ended.returncode == 143, ended.stderr
    train.main(['--save', str(other), '--resume', '--device', 'cpu'])
    assert_same_run(one, other)


def test_a_run_on_images_that_workers_read_resumes_with_the_same_bits(large, tmp_path):
    one, other = tmp_path / 'one', tmp_path / 'other'
    argv = [*large, '--epochs', 3, '--workers', 2, '--auto-augment', 'randaugment',
            '--random-erasing', '0.5', '--print-freq', 4, '--save']
    train.main([*map(str, argv), str(one)])
    ended = run_interrupted([*argv, other], 'learning_rate', 16, signal.SIGTERM)
    assert ended.returncode == 143 and 'in epoch 2 after step 6' in ended.stdout, ended.stderr
    train.main(['--save', str(other), '--resume', '--device', 'cpu', '--workers', '1'])
    assert_same_run(one, other, rows=3 * 3)  # steps 4, 8 and 10


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_lets_the_workers_finish(large, tmp_path, signum):
    rows = tmp_path / 'run/train.csv'

    def signal_the_group(pid):
        while not rows.exists() or len(rows.read_text().splitlines()) < 6:
            os.kill(pid, 0)  # raises if it has ended
            time.sleep(0.01)
        os.killpg(pid, signum)

    argv = [*large, '--workers', 2, '--epochs', 500, '--print-freq', 1, '--save', tmp_path / 'run']
    ended = forked.run(RUN, argv, signal_the_group)
    assert (ended.returncode, ended.stderr) == (128 + signum, '')
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert 10 * (saved['epoch'] - 1) + saved['step'] >= 5


# ---- resumed ---------------------------------------------------------------------------------

def test_resuming_from_the_best_epoch_repeats_the_rest(
        recipe, uninterrupted, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(uninterrupted, run)
    (run / 'latest.pth').unlink()
    train.main(['--resume', str(run / 'best.pth'), '--device', 'cpu'])
    assert_same_run(run, uninterrupted)


def test_a_finished_run_can_be_resumed_for_more_epochs(small, tmp_path, capsys):
    run = ['--save', str(tmp_path / 'run')]
    train.main([*small, *run, '--epochs', '2'])
    before = (tmp_path / 'run/train.csv').read_text()
    last = capsys.readouterr().out.splitlines()[-1]
    train.main([*run, '--resume'])
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (tmp_path / 'run/train.csv').read_text() == before
    train.main([*run, '--resume', '--epochs', '3'])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1', '2', '3']


def test_a_resumed_run_takes_this_machines_workers_and_switches_flags_off(two_epochs, monkeypatch):
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '1000')  # one worker
    saved = checkpoint.load(two_epochs / 'latest.pth')
    assert saved['args']['workers'] is None
    on = dict(memory_efficient=True, ten_crop=True, deterministic=True, compile=True,
              tensorboard=True, class_weights='balanced', auto_augment='randaugment')
    saved['args'].update(on)
    checkpoint.save(two_epochs / 'latest.pth', saved)
    off = [f'--no-{flag.replace("_", "-")}' for flag in on if on[flag] is True]
    given = ['--resume', str(two_epochs), *off, '--class-weights', 'none', '--auto-augment', 'none']
    args, _ = checkpoint.with_saved_flags(parse(given))
    assert not any(getattr(args, flag) for flag in on) and num_workers(args) == 1
    kept, _ = checkpoint.with_saved_flags(parse(given[:2]))
    assert {flag: getattr(kept, flag) for flag in on} == on


def test_the_time_of_a_run_includes_the_time_before_resuming(small, tmp_path):
    run, before, spent = ['--save', str(tmp_path / 'run')], 0, 0
    for argv in ([*small, '--epochs', '2'], ['--resume', '--epochs', '3']):
        started = time.monotonic()
        train.main([*argv, *run])
        spent += time.monotonic() - started
        saved = checkpoint.load(tmp_path / 'run/latest.pth')
        assert before < saved['seconds'] < spent
        before = saved['seconds']


def test_resuming_elsewhere_leaves_the_old_run_alone(two_epochs, tmp_path):
    old, new = two_epochs, tmp_path / 'new'
    # The new directory has no best.pth yet, so its best error starts anew.
    checkpoint.save(old / 'latest.pth', {**checkpoint.load(old / 'latest.pth'), 'best_error': 0.0})
    before = {path.name: path.read_bytes() for path in old.iterdir()}
    train.main(['--resume', str(old), '--save', str(new), '--epochs', '4', '--start-epoch', '3',
                '--lr', '0.01'])
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    rows = read_csv(new / 'test.csv')
    assert [row['epoch'] for row in rows] == ['3', '4']
    best = checkpoint.load(new / 'best.pth')['best_error']
    assert math.isclose(best, min(float(row['error']) for row in rows), rel_tol=1e-5)


def test_the_fp16_loss_scale_is_resumed(small, tmp_path):
    argv = [*small, '--precision', 'fp16', '--save']
    train.main([*argv, str(tmp_path / 'once'), '--epochs', '2'])
    train.main([*argv, str(tmp_path / 'twice'), '--epochs', '1'])
    train.main([*argv, str(tmp_path / 'twice'), '--epochs', '2', '--resume'])
    scalers = [checkpoint.load(tmp_path / run / 'latest.pth')['scaler']
               for run in ('once', 'twice')]
    assert scalers[0] == scalers[1] and scalers[0]['_growth_tracker'] > 9


def test_a_run_is_resumed_with_and_without_fp16(small, tmp_path, capsys):
    run = tmp_path / 'run'
    train.main([*small, '--epochs', '1', '--precision', 'fp32', '--save', str(run)])
    capsys.readouterr()
    for epochs, precision in ((2, 'fp16'), (3, 'fp32')):
        train.main(['--save', str(run), '--resume', '--epochs', str(epochs), '--precision',
                    precision, '--lr', '0.01', '--device', 'cpu'])
        said = 'was not trained in fp16: the loss scale starts at 65536'
        assert (said in capsys.readouterr().err) == (precision == 'fp16')
        saved = checkpoint.load(run / 'latest.pth')
        assert saved['epoch'] == epochs + 1 and bool(saved['scaler']) == (precision == 'fp16')


def test_rows_are_flushed_before_the_checkpoint_is_saved(
        small, tmp_path, monkeypatch):
    """A power failure could otherwise leave a checkpoint without its rows."""
    def spy(owner, name, event):
        call = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: (
            events.append(event(*args)), call(*args, **kwargs))[1])

    events = []
    spy(runlog.RunLog, 'sync', lambda log: 'rows')
    spy(checkpoint, 'save', lambda path, *_: path.name)
    train.main([*small, '--epochs', '1', '--save', str(tmp_path / 'run')])
    assert events == ['latest.pth', 'best.pth', 'rows', 'latest.pth']


def test_best_pth_is_not_replaced_by_a_worse_model(recipe, uninterrupted, tmp_path):
    errors = [float(row['error']) for row in read_csv(uninterrupted / 'test.csv')]
    best = checkpoint.load(uninterrupted / 'best.pth')
    assert best['epoch'] - 1 == best['best_epoch'] == 1 + int(np.argmin(errors))
    assert math.isclose(best['best_error'], min(errors), rel_tol=1e-5)
    run = tmp_path / 'run'
    shutil.copytree(uninterrupted, run)
    # Dropout and learning rate so high that the model gets worse.
    train.main(['--save', str(run), '--resume', '--start-epoch', str(best['best_epoch']),
                '--drop-rate', '0.99', '--lr', '1'])
    after = checkpoint.load(run / 'best.pth')
    assert after['best_error'] <= best['best_error']
    assert after['best_error'] == after['last_error']


def test_flags_win_over_the_resumed_checkpoint(two_epochs):
    train.main(['--save', str(two_epochs), '--resume', '--epochs', '3', '--weight-decay', '0.5',
                '--momentum', '0.1'])
    saved = checkpoint.load(two_epochs / 'latest.pth')
    group, = saved['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.5, 0.1)
    assert (saved['args']['weight_decay'], saved['args']['batch_size']) == (0.5, 4)


def test_a_depth_that_names_a_model_can_be_resumed_by_the_same_command(tmp_path, monkeypatch):
    monkeypatch.setattr(densenet, 'densenet121', functools.partial(
        densenet.DenseNet, block_config=(1, 1, 1, 1), num_init_features=8))
    write_images(tmp_path, {'train/a': 2, 'train/b': 2, 'val/a': 1}, (65, 65))
    argv = ['--dataset', 'folder', '--data', str(tmp_path), '--depth', '121', '--batch-size', '2',
            '--growth-rate', '4', '--workers', '0', '--device', 'cpu', '--no-plot', '--save',
            str(tmp_path / 'run')]
    train.main([*argv, '--epochs', '1'])
    train.main([*argv, '--epochs', '2', '--resume'])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1', '2']


def test_other_cpu_kernels_are_noticed(two_epochs, small, tmp_path, capsys):
    """A checkpoint says which instructions it was trained with, and a resumed run whether they are
    the same: only then can it end with the same bits."""
    latest = two_epochs / 'latest.pth'
    saved = checkpoint.load(latest)
    args = json.loads((two_epochs / 'args.json').read_text())
    now = saved['cpu_kernels']
    assert now == args['cpu_kernels'] == (
        None if library.unavailable_reason() else library.description(torch.float32))
    for before in (now, 'avx1024 fma'):
        checkpoint.save(latest, {**saved, 'cpu_kernels': before})
        train.main([*small, '--save', str(two_epochs), '--resume', '--epochs', '3'])
        warning = f'CPU kernels for avx1024 fma, and from now on for {now or "none"}: results will'
        assert (warning in capsys.readouterr().err) == (before != now)


def test_an_epoch_is_not_continued_on_other_data(recipe, folder, tmp_path, capsys):
    other = tmp_path / 'folder'
    shutil.copytree(folder, other)
    argv = [str(other) if flag == str(folder) else flag for flag in recipe]
    run = tmp_path / 'run'
    assert run_interrupted([*argv, '--save', str(run)], 'learning_rate', 14, signal.SIGTERM) \
        .returncode == 143
    for flag in ('--batch-size', '--seed'):
        error = fails(capsys, '--save', run, '--resume', flag, 2)
        assert 'in batches of 4 with --seed 1, and can\'t' in error
    (other / 'train/a/0.png').unlink()
    error = fails(capsys, '--save', run, '--resume', lines=2)
    assert 'an epoch of 36 images' in error and '--start-epoch 2' in error
    train.main(['--save', str(run), '--resume', '--start-epoch', '2'])
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2', '3', '4']


def change_checkpoint(path, change):
    saved = checkpoint.load(path)
    change(saved)
    checkpoint.save(path, saved)


def test_state_gets_the_memory_layout_of_the_parameters(recipe, uninterrupted, tmp_path):
    """torch's fused optimizers on the CPU assume that weights and momenta have equal strides."""
    def make_contiguous(saved):
        for values in saved['optimizer']['state'].values():
            values['momentum_buffer'] = values['momentum_buffer'].contiguous()

    run = tmp_path / 'run'
    run_interrupted([*recipe, '--save', str(run)], 'learning_rate', 14, signal.SIGTERM)
    change_checkpoint(run / 'latest.pth', make_contiguous)
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    weights = [checkpoint.load(path / 'latest.pth')['model'] for path in (run, uninterrupted)]
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def damage_momentum(saved):
    values = saved['optimizer']['state'][0]
    values['momentum_buffer'] = torch.zeros(values['momentum_buffer'].numel() + 1)


@pytest.mark.parametrize('change, message', [
    (damage_momentum, 'the state of its optimizer does not fit'),
    (lambda saved: saved['optimizer']['state'].pop(0), 'the state of its optimizer does not fit'),
    (lambda saved: saved['optimizer'].pop('state'), "can't be resumed: 'state'"),
    (lambda saved: saved.pop('processes'), "can't be resumed: 'processes'"),
    (lambda saved: saved['args'].update(growth_rate=10**9), 'does not fit the model: '),
    (lambda saved: saved['dataset'].update(extra=1), 'checkpoint of this version of train.py'),
    (lambda saved: saved['model'].popitem(), 'does not fit the model')])
def test_a_checkpoint_that_does_not_fit_is_a_one_line_error(two_epochs, capsys, change, message):
    change_checkpoint(two_epochs / 'latest.pth', change)
    assert re.search(message, fails(capsys, '--save', two_epochs, '--resume', '--epochs', 3))


def test_a_changed_schedule_is_a_warning_on_resuming(two_epochs, capsys):
    train.main(['--save', str(two_epochs), '--resume', '--epochs', '1'])
    assert capsys.readouterr().err == ('train.py: warning: 2 epochs are done: --epochs 1 leaves '
                                       'nothing to train\n')
    train.main(['--save', str(two_epochs), '--resume', '--epochs', '3', '--lr', '0.01'])
    assert 'the learning rate is now 0.0001, and was 0.001: ' in capsys.readouterr().err


def test_the_normalisation_is_kept(small, tmp_path, capsys):
    run = tmp_path / 'run'
    train.main([*small, '--epochs', '1', '--save', str(run), '--mean', '.1', '.2', '.3'])
    saved = checkpoint.load(run / 'latest.pth')
    np.testing.assert_allclose(saved['dataset']['mean'], [25.5, 51, 76.5])
    train.main(['--save', str(run), '--resume', '--epochs', '2'])
    assert checkpoint.load(run / 'latest.pth')['dataset'] == saved['dataset']
    assert 'another --std' in fails(capsys, '--save', run, '--resume', '--std', 1, 1, 1, lines=2)
    assert 'a value for each of 3' in fails(capsys, *small, '--mean', '.1', '.2')


def test_an_incomplete_row_is_removed_on_resuming(two_epochs):
    run = two_epochs
    whole = (run / 'train.csv').read_text()
    with open(run / 'train.csv', 'a') as file:
        file.write('2.3333,1.9')
    train.main(['--save', str(run), '--resume', '--epochs', '3'])
    assert (run / 'train.csv').read_text().startswith(whole)
    assert len(read_csv(run / 'train.csv')) == 3 * 3


@pytest.mark.parametrize('edit', [
    lambda text: '\ufeff' + text, lambda text: text.replace(',', ';'), lambda text: text + ',,,\n',
    lambda text: '\n'.join([*text.splitlines()[::-1], ''])])
def test_rows_that_a_spreadsheet_has_changed_are_one_line(two_epochs, capsys, edit):
    path = two_epochs / 'test.csv'
    path.write_text(edit(path.read_text()), encoding='utf-8')
    before = path.read_bytes()
    error = fails(capsys, '--save', two_epochs, '--resume', '--epochs', 3)
    assert f'{path} is not as train.py has written it' in error and path.read_bytes() == before


def test_another_image_size_chooses_best_pth_anew(two_epochs, capsys):
    train.main(['--save', str(two_epochs), '--resume', '--epochs', '3', '--image-size', '24'])
    assert 'best.pth is chosen anew' in capsys.readouterr().err
    assert checkpoint.load(two_epochs / 'best.pth')['best_epoch'] == 3


def test_a_finished_run_keeps_its_best_pth(two_epochs, capsys):
    before = checkpoint.load(two_epochs / 'best.pth')
    train.main(['--save', str(two_epochs), '--resume', '--image-size', '24'])
    captured = capsys.readouterr()
    assert 'anew' not in captured.err and f'(epoch {before["best_epoch"]})' in captured.out


def test_a_header_that_was_cut_is_written_again(two_epochs):
    for text in ('', 'epo', 'epoch,lo'):
        (two_epochs / 'test.csv').write_text(text)
        train.main(['--save', str(two_epochs), '--resume', '--epochs', '3', '--start-epoch', '3'])
        assert [row['epoch'] for row in read_csv(two_epochs / 'test.csv')] == ['3']


def test_a_missing_best_pth_is_a_warning(two_epochs, capsys):
    (two_epochs / 'best.pth').unlink()
    for epochs, message in (('2', 'has no best.pth: copy it from'),
                            ('3', 'has no best.pth: it is chosen anew')):
        train.main(['--save', str(two_epochs), '--resume', '--epochs', epochs])
        assert message in capsys.readouterr().err
    assert checkpoint.load(two_epochs / 'best.pth')['best_epoch'] == 3


# ---- the run directory -----------------------------------------------------------------------

def test_overwrite_begins_a_new_run(two_epochs, small):
    train.main([*small, '--save', str(two_epochs), '--epochs', '1', '--overwrite'])
    assert len(read_csv(two_epochs / 'test.csv')) == 1
    assert checkpoint.load(two_epochs / 'latest.pth')['epoch'] == 2


def test_overwrite_leaves_no_report_of_the_old_run(two_epochs, small):
    train.main(['--evaluate', '--save', str(two_epochs), '--resume'])
    old = {path.name for path in two_epochs.iterdir()}
    assert {'report.html', 'metrics.json', 'roc.png', 'confusion.png', 'mistakes.png'} <= old
    runlog.clear(two_epochs)
    left = {path.name for path in two_epochs.iterdir()}
    assert left == {f'{name}.png' for name in runlog.FIGURES}


def test_overwrite_deletes_nothing_if_the_new_run_cannot_start(two_epochs, small, capsys):
    before = {path.name: path.read_bytes() for path in two_epochs.iterdir()}
    for flags in (['--ten-crop'], ['--data', '/nowhere'], ['--pretrained', '/nowhere.pth']):
        fails(capsys, *small, '--save', two_epochs, '--overwrite', *flags)
        assert {path.name: path.read_bytes() for path in two_epochs.iterdir()} == before


def test_an_existing_run_is_not_changed_by_an_error(two_epochs, small, tmp_path, capsys):
    run = two_epochs
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert 'holds a run' in fails(capsys, *small, '--save', run)
    other = [*small, '--save', run, '--resume']
    assert 'another --depth: it has 10, not 16' in fails(capsys, *other, '--depth', 16)
    assert '--growth-rate: it has 4, not 8' in fails(capsys, *other, '--growth-rate', 8)
    write_images(tmp_path / 'two', {'train/a': 4, 'train/b': 4, 'val/a': 1, 'val/b': 1}, (8, 8))
    assert 'other classes than' in fails(capsys, *other, '--data', tmp_path / 'two')
    assert 'optimizer: it has sgd, not adam' in fails(capsys, *other, '--optimizer', 'adam')
    lock = os.open(run, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert 'in use' in fails(capsys, *other)
    assert 'in use' in fails(capsys, *small, '--save', run, '--overwrite')
    os.close(lock)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_a_worker_that_outlives_its_run_does_not_hold_the_directory(tmp_path):
    script = f'''
import os, time; from training import runlog
with runlog.lock_directory({str(tmp_path)!r}):
    started, start = os.pipe()
    if os.fork() == 0:
        os.write(start, b'.')
        time.sleep(30)
        os._exit(0)
    os.read(started, 1)  # killed sooner, it could end before the child has let go of the lock
    os.kill(os.getpid(), 9)
'''
    groups = []
    ended = forked.run(script, [], groups.append)
    assert ended.returncode == -signal.SIGKILL
    with runlog.lock_directory(tmp_path):
        os.killpg(groups[0], signal.SIGKILL)  # raises if the child is not there


def test_temporary_files_of_a_killed_run_are_removed(small, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    for name in ('.latest.pth.1234.tmp', '.args.json.7.tmp', '.loss.png.123.tmp'):
        (run / name).write_text('half')
    train.main([*small, '--epochs', '1', '--save', str(run)])
    assert not list(run.glob('.*'))


def test_files_that_cannot_be_resumed(two_epochs, small, tmp_path, capsys):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    assert 'is not a checkpoint' in fails(capsys, *small, '--resume', tmp_path / 'text.pth')
    saved = checkpoint.load(two_epochs / 'latest.pth')
    for key in ('args', 'dataset', 'model'):
        torch.save({**saved, key: None}, tmp_path / 'other.pth')
        error = fails(capsys, '--resume', tmp_path / 'other.pth', '--save', tmp_path / 'new')
        assert 'holds no run to resume' in error, key
    torch.save(densenet.densenet_cifar(10, 4).state_dict(), tmp_path / 'weights.pth')
    assert '--pretrained' in fails(capsys, *small, '--resume', tmp_path / 'weights.pth')
    (tmp_path / 'file').write_text('')
    assert f'{tmp_path}/file: File exists' in fails(capsys, *small, '--save', tmp_path / 'file')


# ---- damage ----------------------------------------------------------------------------------

def test_a_damaged_checkpoint_loses_at_most_an_epoch(recipe, uninterrupted, tmp_path, capsys):
    run = tmp_path / 'run'
    ended = run_interrupted([*recipe, '--save', str(run)], 'learning_rate', 23, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    latest = run / 'latest.pth'
    latest.write_bytes(latest.read_bytes()[:-1])
    assert f'{latest} is not a checkpoint, or a damaged one' in fails(
        capsys, *recipe, '--pretrained', latest, '--save', tmp_path / 'other')
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    printed = capsys.readouterr()
    assert printed.err == (f'train.py: warning: {latest} is damaged or missing: resuming '
                           f'the previous one, {latest}.1\n')
    assert f'resuming {latest}.1 in epoch 2 after step 0' in printed.out
    assert_same_run(run, uninterrupted)
    latest.write_bytes(b'')
    # With its epochs done, the run only saves what it has resumed: not over the complete file.
    train.main(['--save', str(run), '--resume', '--device', 'cpu', '--epochs', '1'])
    for path in (latest, f'{latest}.1'):
        assert checkpoint.load(path)['epoch'] == 4
    capsys.readouterr()
    for name in ('latest.pth', 'latest.pth.1'):
        (run / name).write_bytes(b'')
    assert f'{latest} is not a checkpoint' in fails(capsys, '--save', run, '--resume')


def test_the_previous_checkpoint_can_be_resumed(recipe, uninterrupted, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(uninterrupted, run)
    train.main(['--resume', str(run / 'latest.pth.1'), '--device', 'cpu'])
    assert_same_run(run, uninterrupted)
    assert checkpoint.load(run / 'latest.pth.1')['epoch'] == 4


def test_resuming_from_an_older_checkpoint_survives_a_kill(recipe, uninterrupted, tmp_path):
    run = tmp_path / 'run'
    shutil.copytree(uninterrupted, run)
    shutil.copy(run / 'latest.pth.1', run / 'best.pth')
    ended = run_interrupted(['--resume', str(run / 'best.pth'), '--device', 'cpu'],
                            'learning_rate', 3, signal.SIGKILL)
    assert ended.returncode == -9, ended.stderr
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    rows = [float(row['epoch']) for row in read_csv(run / 'train.csv')]
    assert rows == [float(row['epoch']) for row in read_csv(uninterrupted / 'train.csv')]
    assert checkpoint.load(run / 'latest.pth')['epoch'] == 5


@pytest.mark.parametrize('function, when, file', [
    ('evaluate', 1, 'best.pth'), ('Run.after_epoch', 2, 'test.csv'),
    ('Run.interval_means', 8, 'train.csv')])
def test_a_full_disk_ends_a_run_that_can_be_resumed(
        recipe, uninterrupted, tmp_path, monkeypatch, capsys, function, when, file):
    run, calls = tmp_path / 'run', itertools.count(1)
    owner, name = (train.Run, function[4:]) if '.' in function else (train, function)
    call = getattr(owner, name)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill_disk(*args, **kwargs):
        if next(calls) == when:
            size = (run / file).stat().st_size if file.endswith('csv') else 2000
            resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, before[1]))
        return call(*args, **kwargs)

    monkeypatch.setattr(owner, name, fill_disk)
    try:
        error = fails(capsys, *recipe, '--save', run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        monkeypatch.undo()
    assert error == f'train.py: error: {run / file}: File too large'
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize('what, message', [
    ('gone', r'run/(best|latest).pth: No such file or directory'),
    ('a folder', 'run/latest.pth: Not a directory')])
def test_a_run_whose_files_are_removed(small, tmp_path, monkeypatch, capsys, what, message):
    directory, after_epoch = tmp_path / 'run', train.Run.after_epoch

    def take_away(run, test):
        if run.state.epoch == 3:
            if what == 'gone':
                shutil.rmtree(directory)
            else:
                (directory / 'latest.pth').unlink()
                (directory / 'latest.pth').mkdir()
        return after_epoch(run, test)

    monkeypatch.setattr(train.Run, 'after_epoch', take_away)
    assert re.search(message, fails(capsys, *small, '--save', directory, '--epochs', 9))
    if what == 'a folder':
        monkeypatch.undo()
        (directory / 'latest.pth').rmdir()
        train.main(['--save', str(directory), '--resume', '--epochs', '4'])
        assert [row['epoch'] for row in read_csv(directory / 'test.csv')] == ['1', '2', '3', '4']


def test_a_broken_test_image_is_a_one_line_error(tmp_path, capsys):
    data, run = tmp_path / 'folder', tmp_path / 'run'
    write_images(data, {'train/a': 4, 'train/b': 4, 'val/a': 1, 'val/b': 1}, (66, 66))
    broken = data / 'val/b/0.png'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:500])
    argv = ['--dataset', 'folder', '--data', data, '--block-config', 1, 1, '--growth-rate', 4,
            '--batch-size', 4, '--epochs', 1, '--workers', 0, '--device', 'cpu', '--no-plot',
            '--save', run]
    assert 'val/b/0.png: cannot be read' in fails(capsys, *argv)
    broken.write_bytes(whole)
    train.main(['--save', str(run), '--resume'])
    assert len(read_csv(run / 'test.csv')) == 1


# ---- numbers that are not finite -------------------------------------------------------------

def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(two_epochs, capsys):
    run = two_epochs
    before = (run / 'latest.pth').read_bytes()
    error = fails(capsys, '--save', run, '--resume', '--epochs', 4, '--lr', 1e30, lines=2)
    assert re.search('the loss of steps 1 to 3 in epoch 3 is not finite', error)
    assert (run / 'latest.pth').read_bytes() == before
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2']


def test_a_signal_does_not_save_a_loss_that_is_not_finite(recipe, tmp_path):
    """In fp16 a loss can overflow and leave the weights well, for the scaler skips such a step."""
    run = tmp_path / 'run'
    script = interrupted('train_step', 13, """args[0].sums.fill_(float('inf'))
        os.kill(os.getpid(), 15)""")
    ended = forked.run(script, [*recipe, '--precision', 'fp16', '--save', run])
    assert ended.returncode == 2 and 'the loss in epoch 2 is not finite' in ended.stderr
    saved = checkpoint.load(run / 'latest.pth')
    assert (saved['epoch'], saved['step']) == (2, 0)
    assert len(read_csv(run / 'train.csv')) == 4


@pytest.mark.parametrize('what', ['weight', 'running_var'])
def test_a_model_that_is_not_finite_is_not_saved(small, tmp_path, monkeypatch, capsys, what):
    evaluate, run = train.evaluate, tmp_path / 'run'

    def spoil(model, *args, **kwargs):
        results = evaluate(model, *args, **kwargs)
        if model.training is False and (run / 'best.pth').exists():
            getattr(model.features.norm5, what).data[1] = math.inf
        return results

    monkeypatch.setattr(train, 'evaluate', spoil)
    error = fails(capsys, *small, '--save', run, '--epochs', 3)
    assert (f'a weight in epoch 3 is not finite, and the first bad parameter is '
            f'features.norm5.{what}: ') in error
    assert checkpoint.load(run / 'latest.pth')['epoch'] == 2


def test_a_signal_does_not_save_weights_that_are_not_finite(small, tmp_path):
    run = tmp_path / 'run'
    ended = run_interrupted([*small, '--save', str(run), '--lr', '1e15', '--weight-decay', '1e30'],
                            'learning_rate', 1, signal.SIGTERM)
    assert ended.returncode == 2 and 'in epoch 1 is not finite, and the first bad' in ended.stderr
    weights = checkpoint.load(run / 'latest.pth')['model'].values()
    assert all(weight.isfinite().all() for weight in weights)


# ---- CUDA ------------------------------------------------------------------------------------

@pytest.mark.cuda
def test_the_peak_memory_of_a_run_includes_the_time_before_resuming(tmp_path, capsys):
    run = ['--dataset', 'shapes', '--depth', '10', '--no-plot', '--save', str(tmp_path / 'run')]
    torch.cuda.reset_peak_memory_stats()
    train.main([*run, '--epochs', '1', '--batch-size', '1000'])
    peak = torch.cuda.max_memory_allocated()
    train.main([*run, '--epochs', '2', '--batch-size', '10', '--resume'])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert saved['peak_memory'] == peak > 1000 * 32 * 32 * 24 * 2  # bytes of a block's first maps
    assert f'at most {peak / 2**30:.2f} GiB on the GPU' in capsys.readouterr().out


@pytest.mark.cuda
def test_interrupted_on_cuda_resumes_at_the_same_step(recipe, tmp_path):
    argv = [flag for flag in recipe if flag not in ('--device', 'cpu')]
    run = tmp_path / 'run'
    ended = run_interrupted([*argv, '--save', str(run)], 'learning_rate', 14, signal.SIGTERM)
    assert ended.returncode == 143, ended.stderr
    train.main(['--save', str(run), '--resume'])
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2', '3', '4']
    assert len(read_csv(run / 'train.csv')) == 3 * 4


@pytest.mark.cuda
@pytest.mark.parametrize('flags', [[], ['--no-cuda-graph'], ['--precision', 'fp16'],
                                   ['--memory-efficient', '--precision', 'fp32']])
def test_deterministic_runs_on_cuda_end_with_the_same_bits(recipe, tmp_path, flags):
    argv = [flag for flag in recipe if flag not in ('--device', 'cpu')]
    argv += ['--deterministic', *flags, '--save']
    ended = forked.run(RUN, [*argv, tmp_path / 'one'])
    assert ended.returncode == 0, ended.stderr
    ended = run_interrupted([*argv, str(tmp_path / 'two')], 'learning_rate', 14, signal.SIGUSR1)
    assert ended.returncode == 138, ended.stderr
    ended = forked.run(RUN, ['--save', tmp_path / 'two', '--resume'])
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.cuda
@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
def test_a_cpu_run_can_be_resumed_on_cuda(recipe, tmp_path, optimizer):
    argv = [*recipe, '--optimizer', optimizer, '--save', str(tmp_path / 'run')]
    train.main([*argv, '--epochs', '1'])
    train.main(['--save', str(tmp_path / 'run'), '--resume', '--epochs', '2', '--device', 'cuda'])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1', '2']
