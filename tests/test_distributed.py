"""Several processes against one: the same losses, weights and counts; killed and broken ones."""

import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from conftest import ROOT, write_images
from test_train import SMALL, assert_same_run, interrupted, read_csv

import checkpoint
import train
from densenet import densenet_cifar
from flags import UsageError, parse_args

# What a run of `compare` below does in each process; the last argument is where results go.
TRAINING = f'''
import os, sys
sys.path.insert(0, {str(ROOT)!r})
import torch
import data, densenet, distributed, train
from checkpoint import TrainState
from flags import parse_args

NO_AUTOCAST = torch.autocast('cpu', enabled=False)
torch.set_default_dtype(torch.float64)


def loader(n, batch_size, **kwargs):
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, 8, 8), generator=generator, dtype=torch.uint8)
    loader = data.MemoryLoader(
        images, torch.randint(10, (n,), generator=generator), batch_size, mean=(120.0,) * 3,
        std=(60.0,) * 3, device=torch.device('cpu'),
        shard=(distributed.rank(), distributed.world_size()), **kwargs)
    loader.mean, loader.std = loader.mean.double(), loader.std.double()
    return loader


class Double:  # images of a loader that has float32
    def __init__(self, loader):
        self.loader, self.num_images = loader, loader.num_images

    def __iter__(self):
        return ((images.double(), labels) for images, labels in self.loader)


def train_some(argv, batch_statistics, epochs=2):
    """Two epochs of five batches, the last of which has two images: all that came of them."""
    torch.manual_seed(0)
    model = densenet.densenet_cifar(10, 4)
    model.train()
    if not batch_statistics:
        for norm in [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]:
            norm.eval()
    args = parse_args(['--device', 'cpu', '--lr', '0.05', '--batch-size', '12', *argv])
    state = TrainState(model, train.make_optimizer(args, model),
                       torch.amp.GradScaler('cpu', enabled=False), torch.zeros(4))
    step = train.make_step(args, state, [], NO_AUTOCAST)
    sent = []
    if distributed.world_size() > 1:
        def hook(_, bucket):
            sent.append(bucket.buffer().numel())
            reduced = torch.distributed.all_reduce(bucket.buffer(), async_op=True).get_future()
            return reduced.then(lambda done: done.value()[0] / distributed.world_size())
        step.keywords['forward'].register_comm_hook(None, hook)
    losses, images = [], Double(loader(50, 12, shuffle=True, augment=True))
    for epoch in range(1, epochs + 1):
        images.loader.set_epoch(epoch)
        for i, (batch, labels) in enumerate(images):
            step(batch, labels, images.loader.images_in(i))
            state.count_step(images.loader.images_in(i))
            losses.append(train.check_finite(state))
            state.begin_interval()
    path = model.features.denseblock1.path
    distributed.share_statistics(model)
    statistics = [b.double().sum().item() for b in model.buffers()]
    test = train.evaluate(model, Double(loader(23, 5)), NO_AUTOCAST)
    parameters = sum(p.numel() for p in model.parameters())
    return dict(losses=losses, test=test, weights=dict(model.named_parameters()), path=path,
                sent=sum(sent) / parameters, statistics=distributed.all_gather(statistics))
'''


def torchrun(processes, argv, *, script=str(ROOT / 'train.py'), restarts=0, **kwargs):
    """A finished `torchrun` of a script."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node',
               str(processes), '--max-restarts', str(restarts), str(script), *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, 'OMP_NUM_THREADS': '1'}, **kwargs)


def complaints(ended):
    """The lines of train.py itself; torchrun reports at length as well."""
    return [line for line in ended.stderr.splitlines() if line.startswith('train.py: ')]


def run_script(tmp_path, body, processes):
    """What rank 0 of some processes saved, each running TRAINING and `body`."""
    script, results = tmp_path / f'script{processes}.py', tmp_path / f'results{processes}.pth'
    script.write_text(TRAINING + body)
    if processes == 1:
        ended = subprocess.run([sys.executable, script, results], capture_output=True, text=True)
    else:
        ended = torchrun(processes, [results], script=script)
    assert ended.returncode == 0, ended.stderr
    return torch.load(results, weights_only=True)


@pytest.mark.parametrize('processes', [2, 4])
def test_processes_train_and_count_as_one_does(tmp_path, processes):
    # Each process has its own batch statistics, as each part of --grad-accum has.
    body = f'''
alone = 'RANK' not in os.environ
with distributed.process_group():
    results = [train_some([], False), train_some(['--label-smoothing', '0.1'], False),
               train_some(['--grad-accum', '{processes}'] if alone else [], True),
               train_some(['--grad-accum', '{3 * processes}' if alone else '3'], True)]
    if distributed.rank() == 0:
        torch.save(results, sys.argv[1])
'''
    truth, results = (run_script(tmp_path, body, n) for n in (1, processes))
    for i, (found, expected) in enumerate(zip(results, truth, strict=True)):
        assert len(found['losses']) == 10
        for key in ('losses', 'weights'):
            torch.testing.assert_close(found[key], expected[key], rtol=1e-9, atol=1e-12)
        if i < 2:  # the others have running statistics of their own
            assert found['test'][1:] == expected['test'][1:] and found['test'][1] > 0
            assert abs(found['test'][0] - expected['test'][0]) < 1e-9
        assert found['path'] == expected['path'] == ('plain' if i < 2 else 'linear')
        assert found['sent'] == 10  # each gradient once in a step, however many parts that has
        assert found['statistics'] == [found['statistics'][0]] * processes


def test_who_does_what_when(tmp_path):
    body = '''
import time
from distributed import PeerError
log = open(sys.argv[1] + '.log', 'a', buffering=1)
with distributed.process_group():
    rank = distributed.rank()

    def say(text):
        log.write(f'{text} {rank}\\n')

    print('printed')
    distributed.in_turns(lambda: (time.sleep(0.3 * (rank == 0)), say('turn')))
    assert distributed.of_rank_0(lambda: say('only') or 'value') == 'value'
    assert distributed.agree(rank * 10) == 20 and distributed.all_gather(rank) == [0, 1, 2]
    for broken in ({1}, {1, 2}, {0, 1, 2}):
        try:
            with distributed.all_or_none():
                if rank in broken:
                    raise ValueError('broken')
        except (ValueError, PeerError) as error:
            say(f'{sorted(broken)} {type(error).__name__}')
    if rank == 0:
        torch.save(None, sys.argv[1])
'''
    run_script(tmp_path, body, 3)
    lines = (tmp_path / 'results3.pth.log').read_text().splitlines()
    assert lines[0] == 'turn 0' and sorted(lines[1:3]) == ['turn 1', 'turn 2']
    assert lines[3] == 'only 0'
    assert sorted(lines[4:]) == sorted([
        '[1] PeerError 0', '[1] ValueError 1', '[1] PeerError 2',
        '[1, 2] PeerError 0', '[1, 2] ValueError 1', '[1, 2] PeerError 2',
        '[0, 1, 2] ValueError 0', '[0, 1, 2] PeerError 1', '[0, 1, 2] PeerError 2'])


# ---- whole runs ------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    """9 steps an epoch, in all of which something is random; 8 + 1 test images in batches of 4."""
    root = write_images(tmp_path_factory.mktemp('folder'), {
        'train/a': 18, 'train/b': 18, 'val/a': 5, 'val/b': 4}, (8, 8))
    return ['--dataset', 'folder', '--data', str(root), *SMALL, '--epochs', '4', '--lr', '0.05',
            '--drop-rate', '0.2', '--lr-schedule', 'cosine']


@pytest.fixture(scope='module')
def uninterrupted(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp('uninterrupted')
    ended = torchrun(2, [*recipe, '--save', run])
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('final error') == 1 and '; 2 x cpu, fp32' in ended.stdout
    return run


def test_one_of_two_is_told_to_stop_and_both_go_on_where_they_were(
        recipe, uninterrupted, tmp_path):
    script, run = tmp_path / 'script.py', tmp_path / 'run'
    # Twice: a scheduler tells every process, and torchrun, which tells them again.
    script.write_text(interrupted('learning_rate', 14, (
        "[os.kill(os.getpid(), 2) for _ in os.environ['RANK'] * 2]")))
    ended = torchrun(2, [*recipe, '--save', run], script=script)
    assert ended.returncode != 0 and complaints(ended) == []
    assert 'SIGINT: saved in epoch 2 after step 5' in ended.stdout
    drawn = [process['rng']['cpu'] for process in checkpoint.load(run / 'latest.pth')['processes']]
    assert not torch.equal(*drawn)  # each has a dropout of its own
    assert torchrun(2, ['--save', run, '--resume']).returncode == 0
    assert_same_run(run, uninterrupted)


def test_another_number_of_processes_goes_on(recipe, uninterrupted, tmp_path):
    script, run = tmp_path / 'script.py', tmp_path / 'run'
    script.write_text(interrupted('learning_rate', 14, (
        "os.environ['RANK'] == '1' and os.kill(os.getpid(), signal.SIGUSR1)")))
    assert 'SIGUSR1: saved in epoch 2 after step 5' in torchrun(2, [*recipe, '--save', run],
                                                                script=script).stdout
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    for name in ('train.csv', 'test.csv'):
        found, expected = (read_csv(directory / name) for directory in (run, uninterrupted))
        assert [row['epoch'] for row in found] == [row['epoch'] for row in expected]


KILLED = ("os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' and os.environ['RANK'] == '1' "
          'and os.kill(os.getpid(), signal.SIGKILL)')


@pytest.mark.parametrize('flags', [[], ['--resume'], ['--overwrite']])
def test_torchrun_comes_back_from_a_killed_worker(recipe, uninterrupted, tmp_path, flags):
    script, run = tmp_path / 'script.py', tmp_path / 'run'
    script.write_text(interrupted('learning_rate', 14, KILLED))
    if flags == ['--overwrite']:
        train.main([*recipe, '--epochs', '1', '--lr', '0.001', '--save', str(run)])
    ended = torchrun(2, [*recipe, '--save', run, *flags], script=script, restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert 'in epoch 2 after step 0' in ended.stdout
    assert_same_run(run, uninterrupted)


def test_a_restart_goes_back_to_the_epoch_that_was_asked_for(uninterrupted, tmp_path):
    script, run = tmp_path / 'script.py', tmp_path / 'run'
    shutil.copytree(uninterrupted, run)
    script.write_text(interrupted('learning_rate', 5, KILLED))
    ended = torchrun(2, ['--save', run, '--resume', '--start-epoch', 3], script=script, restarts=1)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count('in epoch 3 after step 0') == 2  # from the old run, and its own
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2', '3', '4']


def test_a_restart_does_not_take_over_the_run_of_another_day(recipe, tmp_path):
    run = tmp_path / 'run'
    train.main([*recipe, '--epochs', '1', '--save', str(run)])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    ended = torchrun(2, [*recipe, '--save', run], restarts=1)
    assert ended.returncode != 0
    assert ['holds a run' in line for line in complaints(ended)] == [True, True]  # asked twice
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_an_image_that_cannot_be_read_is_named_once_and_the_epoch_kept(tmp_path):
    write_images(tmp_path, {'train/a': 8, 'train/b': 8, 'val/a': 1, 'val/b': 1}, (65, 65))
    for path in (tmp_path / 'val').glob('*/0.png'):  # each process meets one, in the same step
        path.write_bytes(path.read_bytes()[:500])
    started = time.monotonic()
    ended = torchrun(2, ['--dataset', 'folder', '--data', tmp_path, '--block-config', 1, 1,
                         '--growth-rate', 4, '--batch-size', 4, '--device', 'cpu', '--workers', 1,
                         '--save', tmp_path / 'run', '--no-plot'])
    assert ended.returncode != 0 and time.monotonic() - started < 60
    line, = complaints(ended)
    assert '/val/a/0.png: cannot be read as an image' in line
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert (saved['epoch'], saved['step']) == (1, 4)


def test_wrong_input_to_several_is_said_once(recipe, tmp_path):
    ended = torchrun(3, [*recipe, '--batch-size', 2, '--save', tmp_path / 'run'])
    assert ended.returncode != 0
    line, = complaints(ended)
    assert 'there are 3' in line and line.startswith('train.py: error: --batch-size 2')

    script = tmp_path / 'script.py'
    script.write_text(interrupted('learning_rate', 14, 'pass').replace(
        'sys.argv[1:]', "sys.argv[1:] + ['--lr', '0.' + os.environ['RANK'] + '1']"))
    line, = complaints(torchrun(2, [*recipe, '--save', tmp_path / 'run'], script=script))
    assert 'the processes have different flags: lr is 0.01 in rank 0 and 0.11 in rank 1' in line
    assert not (tmp_path / 'run').exists()

    script.write_text("""import os
def full(_):
    raise OSError(28, 'No space left on device')
os.fsync = full""" + interrupted('learning_rate', 14, 'pass'))
    line, = complaints(torchrun(2, [*recipe, '--save', tmp_path / 'run'], script=script))
    assert 'run/latest.pth cannot be written (No space left on device)' in line
    line, = complaints(torchrun(2, [*recipe, '--lr', '1e30', '--save', tmp_path / 'run2']))
    assert 'the loss is not finite at epoch 1, step 2' in line


def test_batch_statistics_over_all_are_for_cuda(monkeypatch):
    args = parse_args(['--sync-bn'])
    monkeypatch.setattr(train.distributed, 'world_size', lambda: 2)
    with pytest.raises(UsageError, match='--sync-bn: torch has it for cuda alone'):
        train.prepare_model(densenet_cifar(10, 4), args, torch.device('cpu'))
