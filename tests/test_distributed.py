"""Several processes against one: the same losses, weights and counts; killed and broken ones.

These start torchrun's agent in a process forked from one that has torch imported, and its workers
are forked from that. `test_the_command_torchrun` runs the command itself.
"""

import json
import math
import os
import re
import shutil
import subprocess
import sys

import forked
import pytest
import torch
from conftest import ROOT, SMALL, assert_same_run, read_csv, write_images
from forked import interrupted

import train
from fused_dense_block import cpu
from training import checkpoint

# torchrun's agent for a script given as text; arguments: processes, restarts, script, its own.
TORCHRUN = '''
import signal, sys, uuid, torch
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

def work(script, argv):
    torch.set_num_threads(1)
    sys.argv[1:] = argv
    exec(script, {'__name__': '__main__'})

processes, restarts, script, *argv = sys.argv[1:]
config = LaunchConfig(1, 1, int(processes), run_id=str(uuid.uuid4()), rdzv_backend='c10d',
                      rdzv_endpoint='localhost:0', max_restarts=int(restarts),
                      monitor_interval=0.05, start_method='fork')
elastic_launch(config, work)(script, argv)
'''

TRAIN = f'import sys\n{forked.RUN}'
LOST = 'train.py: error: the connection to another process was lost; its error may be above'
FULL_DISK = '''
import os
def full(_):
    raise OSError(28, 'No space left on device')
os.fsync = full
'''

# Definitions for the scripts of `run_script`; their last argument is the file for the results.
TRAINING = '''
import os, sys
import torch
import densenet, train
from training import distributed, flags, loaders
from training.augmentation import Augmentation
from fused_dense_block import fuse
from training.train_state import TrainState
from training.run import Run

NO_AUTOCAST = torch.autocast('cpu', enabled=False)
torch.set_default_dtype(torch.float64)


def loader(n, batch_size, **kwargs):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    loader = loaders.MemoryLoader(
        images, torch.randint(10, (n,), generator=generator), batch_size, mean=(120.0,) * 3,
        std=(60.0,) * 3, device=torch.device('cpu'),
        shard=(distributed.rank(), distributed.world_size()), **kwargs)
    loader.mean, loader.std = loader.mean.double(), loader.std.double()
    return loader


class DefaultType:  # images of a loader that has float32
    def __init__(self, loader):
        self.loader, self.num_images = loader, loader.num_images

    def __iter__(self):
        return ((images.to(torch.get_default_dtype()), labels) for images, labels in self.loader)


def train_some(argv, batch_statistics, epochs=2):
    """Train two epochs of five batches, the last with two images; returns losses, weights etc."""
    torch.manual_seed(0)
    model = densenet.densenet_cifar(10, 4).to(memory_format=torch.channels_last).train()
    fuse(model)
    if not batch_statistics:
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
            norm.eval()
    args = flags.complete(flags.parse(
        ['--device', 'cpu', '--lr', '0.05', '--batch-size', '12', *argv]))
    state = TrainState(model, train.make_optimizer(args, model),
                       torch.amp.GradScaler('cpu', enabled=False), torch.zeros(2))
    step = train.make_step(args, state, [(4, 3, 8, 8)], NO_AUTOCAST)
    sent = []
    if distributed.world_size() > 1:
        def hook(_, bucket):
            sent.append(bucket.buffer().numel())
            reduced = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return reduced.then(lambda done: done.value()[0] / distributed.world_size())
        step.keywords['forward'].register_comm_hook(None, hook)
    run = Run(args, stop=None)
    run.state = state
    losses, images = [], DefaultType(loader(50, 12, shuffle=True, augmentation=Augmentation()))
    for epoch in range(1, epochs + 1):
        images.loader.set_epoch(epoch)
        for i, (batch, labels) in enumerate(images):
            step(batch, labels, images.loader.images_in(i))
            state.count_step(images.loader.images_in(i))
            losses.append(run.interval_means()[0])
    path = model.features.denseblock1.path
    distributed.share_statistics(state)
    statistics = [b.double().sum().item() for b in model.buffers()]
    test = tuple(train.evaluate(model, DefaultType(loader(23, 5)), NO_AUTOCAST, auc=True))
    parameters = sum(p.numel() for p in model.parameters())
    return dict(losses=losses, test=test, weights=dict(model.named_parameters()), path=path,
                sent=sum(sent) / parameters, statistics=distributed.all_gather(statistics))
'''


def torchrun(processes, argv, script=TRAIN, max_restarts=0):
    """Run a script in several processes under torchrun; returns exit code and output."""
    return forked.run(TORCHRUN, [processes, max_restarts, script, *argv])


def complaints(ended):
    """The error lines of train.py, without torchrun's report."""
    return sorted(line for line in ended.stderr.splitlines() if line.startswith('train.py: '))


def run_script(path, body, processes):
    """Run TRAINING and `body` in some processes; returns what rank 0 saved in the file path."""
    if processes == 1:
        ended = forked.run(TRAINING + body, [path])
    else:
        ended = torchrun(processes, [path], TRAINING + body)
    assert ended.returncode == 0, ended.stderr
    return torch.load(path, weights_only=True)


def test_several_processes_train_and_count_like_one(tmp_path):
    # Each process has its own batch statistics, as each part of --grad-accum has. Of the last two
    # images of an epoch the third process has none.
    processes = 3
    body = f'''
alone = 'RANK' not in os.environ
with distributed.process_group():
    results = [train_some([], False), train_some(['--label-smoothing', '0.1'], False),
               train_some(['--grad-accum', '{processes}'] if alone else [], True),
               train_some(['--grad-accum', '{2 * processes}' if alone else '2'], True)]
    if distributed.rank() == 0:
        torch.save(results, sys.argv[1])
'''
    truth, results = (run_script(tmp_path / f'{n}.pth', body, n) for n in (1, processes))
    for i, (found, expected) in enumerate(zip(results, truth, strict=True)):
        assert len(found['losses']) == 10
        for key in ('losses', 'weights'):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
        if i < 2:  # the others have running statistics of their own
            assert found['test'][1:] == expected['test'][1:] and found['test'][1] > 0
            assert abs(found['test'][0] - expected['test'][0]) < 1e-9
        assert found['path'] == expected['path'] == ('layers' if i < 2 else 'eager')
        assert found['sent'] == 10  # each gradient once in a step, however many parts that has
        assert found['statistics'] == [found['statistics'][0]] * processes


def test_the_cpu_kernels_train_in_several_processes_like_in_one(tmp_path):
    if reason := cpu.unavailable_reason():
        pytest.skip(f'no kernels: {reason}')
    body = '''
torch.set_default_dtype(torch.float32)
alone = 'RANK' not in os.environ
with distributed.process_group():
    result = train_some(['--grad-accum', '2'] if alone else [], True)
    if distributed.rank() == 0:
        torch.save(result, sys.argv[1])
'''
    expected, found = (run_script(tmp_path / f'{n}.pth', body, n) for n in (1, 2))
    assert found['path'] == expected['path'] == 'kernels'
    for key in ('losses', 'weights'):
        torch.testing.assert_close(found[key], expected[key], rtol=1e-3, atol=1e-5)


def test_ranks_synchronize_and_stop_together(tmp_path):
    script = '''
import sys, time
from training import distributed
from training.distributed import Stopped, StopSignals
log = open(sys.argv[1], 'a', buffering=1)
with distributed.process_group():
    rank, stop = distributed.rank(), StopSignals()

    def say(text):
        log.write(f'{text} {rank}\\n')

    print('printed')
    with distributed.rank_0_first():
        time.sleep(0.3 * (rank == 0))
        say('turn')
    assert distributed.from_rank_0(lambda: say('only') or 'value') == 'value'
    assert distributed.all_gather(rank) == [0, 1, 2]
    stop.check()
    stop.received = (0, 15, 2)[rank]
    try:
        stop.check()
    except Stopped as stopped:
        say(stopped)
'''
    ended = torchrun(3, [tmp_path / 'log'], script)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == 'printed\n'
    lines = (tmp_path / 'log').read_text().splitlines()
    assert lines[0] == 'turn 0' and sorted(lines[1:4]) == ['only 0', 'turn 1', 'turn 2']
    assert sorted(lines[4:]) == ['SIGTERM 0', 'SIGTERM 1', 'SIGTERM 2']


# ---- whole runs ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """9 steps an epoch, with augmentation and dropout; 8 + 1 test images in batches of 4."""
    root = write_images(tmp_path_factory.mktemp('folder'), {
        'train/a': 18, 'train/b': 18, 'val/a': 5, 'val/b': 4}, (8, 8))
    return ['--dataset', 'folder', '--data', str(root), *SMALL, '--epochs', '4', '--lr', '0.05',
            '--drop-rate', '0.2', '--lr-schedule', 'cosine']


@pytest.fixture(scope='module')
def uninterrupted(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp('uninterrupted')
    ended = torchrun(3, [*recipe, '--save', run])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('final error') == 1 and '; 3 x cpu, fp32' in ended.stdout
    return run


def test_the_command_torchrun(uninterrupted, tmp_path):
    run = shutil.copytree(uninterrupted, tmp_path / 'run')  # all its epochs are done
    command = ['-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', 2, 'train.py',
               '--resume', '--save', run]
    ended = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True,
                           text=True, timeout=120, env={
                               **os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''})
    assert ended.returncode == 0, ended.stderr
    assert '; 2 x cpu, fp32' in ended.stdout
    error = float(read_csv(uninterrupted / 'test.csv')[-1]['error'])
    assert ended.stdout.count(f'final error {error:.2f}% (epoch 4)') == 1
    assert (run / 'train.csv').read_bytes() == (uninterrupted / 'train.csv').read_bytes()


@pytest.mark.usefixtures('no_figures')
def test_three_processes_evaluate_like_one(uninterrupted, tmp_path):
    argv = ['--evaluate', '--resume', uninterrupted / 'best.pth', '--device', 'cpu', '--save']
    train.main([*map(str, argv), str(tmp_path / 'one')])
    without_figures = 'import plot\nplot.save_reports = lambda directory: []\n'
    ended = torchrun(3, [*argv, tmp_path / 'three'], without_figures + TRAIN)
    assert ended.returncode == 0, ended.stderr
    one, three = (read_csv(tmp_path / name / 'predictions.csv') for name in ('one', 'three'))
    assert len(one) == 9
    for row, expected in zip(three, one, strict=True):  # the same images in the same order
        for name, value in expected.items():
            is_number = name.startswith('logit:') or 'probability' in name
            assert row[name] == value or is_number and math.isclose(
                float(row[name]), float(value), abs_tol=1e-5), name
    metrics = [json.loads((tmp_path / name / 'metrics.json').read_text())['splits']['test']
               for name in ('one', 'three')]
    assert metrics[0]['error'] == metrics[1]['error']
    assert math.isclose(metrics[0]['loss'], metrics[1]['loss'], rel_tol=1e-5)


def test_a_signal_to_one_of_three_processes_stops_all_and_the_run_can_be_resumed(
        recipe, uninterrupted, tmp_path):
    run = tmp_path / 'run'
    # Twice: a scheduler tells every process, and torchrun, which tells them again.
    script = interrupted('learning_rate', 14, (
        "[os.kill(os.getpid(), 2) for _ in os.environ['RANK'] * 2]"))
    ended = torchrun(3, [*recipe, '--save', run], script)
    assert ended.returncode != 0 and complaints(ended) == []
    assert 'SIGINT: saved in epoch 2 after step 5' in ended.stdout
    drawn = [process['rng']['cpu'] for process in checkpoint.load(run / 'latest.pth')['processes']]
    assert not torch.equal(*drawn[:2])  # each rank draws its own dropout masks
    assert torchrun(3, ['--save', run, '--resume']).returncode == 0
    assert_same_run(run, uninterrupted)


def test_a_run_can_be_resumed_with_fewer_processes(recipe, uninterrupted, tmp_path):
    run = tmp_path / 'run'
    script = interrupted('learning_rate', 14, (
        "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGUSR1)"))
    ended = torchrun(2, [*recipe, '--save', run], script)
    assert 'SIGUSR1: saved in epoch 2 after step 5' in ended.stdout
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    for name in ('train.csv', 'test.csv'):
        found, expected = (read_csv(directory / name) for directory in (run, uninterrupted))
        assert [row['epoch'] for row in found] == [row['epoch'] for row in expected]


def test_torchrun_restarts_a_killed_worker(recipe, uninterrupted, tmp_path):
    run = tmp_path / 'run'
    script = interrupted('learning_rate', 14, (
        "os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1' "
        'and os.kill(os.getpid(), signal.SIGKILL)'))
    ended = torchrun(3, [*recipe, '--save', run, '--resume'], script, max_restarts=1)
    assert ended.returncode == 0, ended.stderr
    found = [line for line in ended.stdout.splitlines() if 'resum' in line]
    assert found == [f'nothing to resume in {run}: starting a new run',
                     f'resuming {run / "latest.pth"} in epoch 2 after step 0']
    assert_same_run(run, uninterrupted)


def test_an_unreadable_image_is_named_and_the_epoch_is_kept(tmp_path):
    write_images(tmp_path, {'train/a': 8, 'train/b': 8, 'val/a': 1, 'val/b': 1}, (65, 65))
    path = tmp_path / 'val/b/0.png'  # the second process meets it
    path.write_bytes(path.read_bytes()[:500])
    ended = torchrun(2, ['--dataset', 'folder', '--data', tmp_path, '--block-config', 1, 1,
                         '--growth-rate', 4, '--batch-size', 4, '--device', 'cpu', '--workers', 1,
                         '--save', tmp_path / 'run', '--no-plot'])
    assert ended.returncode != 0
    said, *others = complaints(ended)  # of others, unless torchrun was faster
    assert said.startswith(f'train.py: error: rank 1: {path}: cannot be read as an image')
    assert others in ([], [LOST])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert (saved['epoch'], saved['step']) == (1, 0)


@pytest.mark.parametrize('flags, before, said, ranks', [
    (['--batch-size', 2], '', 'at least --grad-accum 1 times 3 processes', 1),
    (['--lr', 1e30], '', 'the loss of steps 1 to 3 in epoch 1 is not finite', 3),
    ([], FULL_DISK, 'run/latest.pth: No space left on device', 1)])
def test_errors_of_processes_are_one_line_each(recipe, tmp_path, flags, before, said, ranks):
    ended = torchrun(3, [*recipe, '--save', tmp_path / 'run', *flags], before + TRAIN)
    assert ended.returncode != 0 and 'train.py' not in ended.stdout
    lines = complaints(ended)
    assert 1 <= sum(said in line for line in lines) <= ranks and len(lines) <= 3
    for line in lines:  # of the others, unless torchrun was faster
        assert said in line or re.fullmatch(LOST.replace('error: ', 'error: (rank [12]: )?'), line)
    assert not (tmp_path / 'run/latest.pth').exists() or 'loss' in said
