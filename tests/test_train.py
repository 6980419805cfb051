"""Whole runs: the recipe's numbers, interrupted and resumed against uninterrupted, wrong input."""

import contextlib
import copy
import csv
import fcntl
import functools
import json
import math
import os
import re
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace
from unittest.mock import Mock

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, cache_densenet121, write_images

import checkpoint
import data
import densenet
import flags
import train
from attic.torture import check_same_run
from checkpoint import TrainState
from flags import parse_args
from train import evaluate, learning_rate, train_step

NO_AUTOCAST = torch.autocast('cpu', enabled=False)
SMALL = ['--depth', '10', '--growth-rate', '4', '--batch-size', '4', '--print-freq', '3',
         '--device', 'cpu', '--no-plot']


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """36 images to train on and 8 to test: 9 steps an epoch in batches of 4."""
    root = tmp_path_factory.mktemp('folder')
    return write_images(root, {f'{split}/{label}': n for split, n in (('train', 9), ('val', 2))
                               for label in 'abcd'}, (8, 8))


@pytest.fixture
def small(folder):
    return ['--dataset', 'folder', '--data', str(folder), *SMALL]


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def fails(capsys, *argv, lines=1):
    """The one line that a wrong command ends with."""
    with pytest.raises(SystemExit) as exit_:
        train.cli(list(map(str, argv)))
    assert exit_.value.code == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors[-1].startswith('train.py: error: ') and len(errors) <= lines, errors
    return errors[-1]


# ---- flags -----------------------------------------------------------------------------------

def test_the_classic_repositories_commands():
    args = parse_args('--layers 40 --growth 12 --no-bottleneck --reduce 1.0 '
                      '--name DenseNet-40-12'.split())
    args = train.choose_model(args, 32)
    model = train.build_model(args, data.describe('cifar10'))
    assert sum(p.numel() for p in model.parameters()) == 1_019_722
    assert flags.run_directory(args).as_posix() == 'work/DenseNet-40-12'

    args = parse_args('--batchSz 64 --nEpochs 300 --opt adam --save somewhere'.split())
    optimizer = train.make_optimizer(args, model)
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults['lr'] == 1e-3
    assert (args.batch_size, args.epochs, args.save) == (64, 300, 'somewhere')
    assert parse_args(['--no-cuda', '--seed', '3']).device == 'cpu'

    # The official one: th main.lua -netType densenet -dataset imagenet ..., with two dashes.
    args = parse_args('--dataset imagenet --data x --batchSize 256 --nEpochs 90 --depth 121 '
                      '--growthRate 32 --nThreads 16'.split())
    args = train.choose_model(args, 224)
    imagenet = data.Description('imagenet', 'x', tuple(range(1000)), 224)
    assert sum(p.numel() for p in train.build_model(args, imagenet).parameters()) == 7_978_856


@pytest.mark.parametrize('flags, size, classes, parameters', [
    ('--block-config 12 12 12 --no-bottleneck --compression 1', 32, 10, 1_019_722),
    ('--block-config 16 16 16', 32, 10, 769_162),
    ('--block-config 6 12 24 16', 224, 1000, 7_978_856),
    ('--arch densenet161', 224, 1000, 28_681_000),
])
def test_block_configurations_are_the_named_models(flags, size, classes, parameters):
    args = train.choose_model(parse_args(flags.split()), size)
    model = train.build_model(args, data.Description('folder', 'x', tuple(range(classes)), size))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_recipes_of_the_paper():
    recipe = parse_args([])
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay,
            recipe.drop_rate, recipe.augment) == (300, 64, 0.1, 0.9, 1e-4, 0.0, True)
    assert train.choose_model(recipe, 32).depth == 100
    optimizer = train.make_optimizer(recipe, torch.nn.Linear(2, 2))
    assert optimizer.defaults['nesterov'] and optimizer.defaults['dampening'] == 0
    assert (optimizer.defaults['weight_decay'], optimizer.defaults['momentum']) == (1e-4, 0.9)
    assert sum(len(group['params']) for group in optimizer.param_groups) == 2

    svhn = parse_args(['--dataset', 'svhn'])
    assert (svhn.epochs, svhn.drop_rate, svhn.augment) == (40, 0.2, False)
    assert parse_args(['--no-augment']).drop_rate == 0.2
    # RMSprop and Adam as torch has them, which is how bamos/densenet.pytorch compared them.
    for name, theirs in (('rmsprop', torch.optim.RMSprop), ('adam', torch.optim.Adam)):
        weights = [torch.nn.Parameter(torch.zeros(2))]
        ours = train.make_optimizer(parse_args(['--opt', name]), torch.nn.Linear(2, 2))
        its = {**ours.defaults, 'weight_decay': 0, 'fused': None}
        assert its == {**theirs(weights, weight_decay=0).defaults, 'fused': None}
    imagenet = parse_args(['--dataset', 'imagenet'])
    assert (imagenet.epochs, imagenet.batch_size) == (90, 256)
    given = parse_args('--dataset svhn --epochs 7 --drop-rate 0 --augment'.split())
    assert (given.epochs, given.drop_rate, given.augment) == (7, 0.0, True)


def test_learning_rate_of_the_recipes():
    args = parse_args([])
    rates = [learning_rate(args, epoch) for epoch in range(1, 301)]
    assert rates == [0.1] * 149 + [0.01] * 75 + [0.001] * 76
    svhn = parse_args(['--dataset', 'svhn'])
    assert [learning_rate(svhn, e) for e in (19, 20, 29, 30, 40)] == [0.1, 0.01, 0.01, 1e-3, 1e-3]
    imagenet = parse_args(['--dataset', 'imagenet'])
    assert [learning_rate(imagenet, e) for e in (30, 31, 60, 61)] == [0.1, 0.01, 0.01, 0.001]
    for dataset in ('cifar10', 'imagenet'):
        short = parse_args(['--dataset', dataset, '--epochs', '1'])
        assert learning_rate(short, 1) == 0.1

    from torch.optim import lr_scheduler
    for warmup in (0, 2.5):
        args = parse_args(['--lr-schedule', 'cosine', '--epochs', '10', '--warmup-epochs',
                           str(warmup)])
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=0.1)
        torchs = lr_scheduler.CosineAnnealingLR(optimizer, 40)
        if warmup:
            torchs = lr_scheduler.ChainedScheduler([
                torchs, lr_scheduler.LinearLR(optimizer, 0.01, total_iters=10)])
        for step in range(40):  # ten epochs of four steps
            ours = learning_rate(args, 1 + step // 4, step % 4 / 4)
            assert math.isclose(ours, optimizer.param_groups[0]['lr'], rel_tol=1e-9)
            optimizer.step()
            torchs.step()
    imagenet = parse_args('--dataset imagenet --lr 0.8 --warmup-epochs 5'.split())
    rates = [learning_rate(imagenet, epoch) for epoch in (1, 6, 30, 31)]
    assert np.allclose(rates, [0.008, 0.8, 0.8, 0.08])


# ---- the step and the evaluation -------------------------------------------------------------

def make_state(seed=0, lr=0.1, depth=10, **kwargs):
    torch.manual_seed(seed)
    model = densenet.densenet_cifar(depth, 4, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    return TrainState(model, optimizer, torch.amp.GradScaler('cpu', enabled=False),
                      interval=torch.zeros(4))


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 3, 8, 8, generator=generator),
            torch.randint(10, (n,), generator=generator))


def test_a_step_is_the_step_written_out():
    state, (images, labels) = make_state(), batch()
    other = copy.deepcopy(state)
    for _ in range(3):
        train_step(state, images, labels, autocast=NO_AUTOCAST, label_smoothing=0.1)
        state.count_step(len(images))
    loss_sum = errors = 0
    for _ in range(3):
        other.optimizer.zero_grad()
        logits = other.model(images)
        target = 0.9 * F.one_hot(labels, 10) + 0.1 / 10
        loss = -(target * logits.log_softmax(1)).sum(1).mean()
        loss.backward()
        other.optimizer.step()
        loss_sum += 8 * loss.item()
        errors += (logits.argmax(1) != labels).sum().item()
    torch.testing.assert_close(state.model.state_dict(), other.model.state_dict())
    assert state.interval[1] == errors and state.interval_images == 24 and state.step == 3
    assert math.isclose(state.interval[0].item(), loss_sum, rel_tol=1e-5)


@pytest.mark.parametrize('parts', [3, 8])
def test_gradient_accumulation_is_the_gradient_of_the_batch(parts):
    whole, accumulated = make_state(), make_state()
    for state, n in ((whole, 1), (accumulated, parts)):
        state.model.eval()  # so that the parts share their statistics
        train_step(state, *batch(8), autocast=NO_AUTOCAST, grad_accum=n)
    torch.testing.assert_close([p.grad for p in accumulated.model.parameters()],
                               [p.grad for p in whole.model.parameters()], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(accumulated.interval, whole.interval)


SHAPES = [(8, 3, 8, 8), (5, 3, 8, 8)]  # of the batches below


def step_and_state(argv=(), device='cpu', precision='fp32', **model):
    """What `train` makes of flags, but for the loop."""
    args = parse_args([*argv, '--device', device])
    torch.manual_seed(args.seed)
    net = densenet.densenet_cifar(10, 4, **{'drop_rate': 0.2, **model}).to(device).train()
    state = train.make_state(args, net, torch.device(device), precision)
    autocast = train.make_autocast(precision, torch.device(device))
    return train.make_step(args, state, SHAPES, autocast), state


def train_some(step, state, device='cpu'):
    """Five steps at changing rates, the third on a smaller batch; ends with the whole state."""
    torch.manual_seed(1)
    for i, n in enumerate((8, 8, 5, 8, 8)):
        train.set_learning_rate(state.optimizer, 0.1 / (i + 1))
        images, labels = batch(n, seed=i)
        step(images.to(device), labels.to(device))
    saved = copy.deepcopy(state.state_dict())
    return {key: saved[key] for key in ('model', 'optimizer', 'scaler', 'processes')}


@pytest.mark.parametrize('precision', ['fp32', 'fp16'])
@pytest.mark.parametrize('optimizer', ['sgd', 'adam', 'adamw', 'rmsprop'])
def test_a_rehearsal_leaves_no_trace(optimizer, precision):
    argv = ['--optimizer', optimizer]
    (step, state), (other_step, other) = (step_and_state(argv, precision=precision)
                                          for _ in range(2))
    places = [tensor.data_ptr() for tensor in state.model.state_dict().values()]
    for _ in range(2):  # before there is any state, and again
        with state.rehearsal():
            for _ in range(3):
                step(*batch(8, seed=9))
        assert places == [tensor.data_ptr() for tensor in state.model.state_dict().values()]
        torch.testing.assert_close(train_some(step, state), train_some(other_step, other),
                                   rtol=0, atol=0)


def test_a_rehearsal_that_fails_leaves_no_trace_either():
    step, state = step_and_state(['--optimizer', 'adam'])
    step(*batch(8))
    before, random_state = copy.deepcopy(state.state_dict()), torch.get_rng_state()
    with pytest.raises(torch.OutOfMemoryError), state.rehearsal():
        step(*batch(8))
        raise torch.OutOfMemoryError
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_other_processes_take_over_the_sums_of_all():
    saved = []
    for rank, sums in enumerate(([3.0, 2.0, 5.0, 0.0], [4.0, 1.0, 4.0, 0.0])):
        state = make_state()
        state.interval.copy_(torch.tensor(sums))
        torch.manual_seed(rank)
        saved.append(state.own_state())
    saved = make_state().state_dict(saved)
    for processes, expected in ((1, [[7, 3, 4, 0]]), (2, [[3, 2, 5, 0], [4, 1, 4, 0]]),
                                (3, [[7, 3, 4, 0], [0, 0, 4, 0], [0, 0, 4, 0]])):
        for rank in range(processes):
            state = make_state()
            torch.manual_seed(9)
            state.load_state_dict(saved, rank=rank, world_size=processes)
            assert state.interval.tolist() == expected[rank]
            assert torch.initial_seed() == (rank if rank < 2 else 9)


def test_the_step_has_the_flags():
    step, state = step_and_state(['--grad-accum', '3', '--label-smoothing', '0.2'])
    other_step, other = step_and_state()
    torch.manual_seed(2)
    step(*batch(8))
    torch.manual_seed(2)
    train_step(other, *batch(8), autocast=NO_AUTOCAST, grad_accum=3, label_smoothing=0.2)
    torch.testing.assert_close(state.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    assert step.func is other_step.func is train_step


@pytest.fixture
def pretended_cuda(monkeypatch):
    """torch.cuda's graphs, in which what is recorded is run, and replaying does nothing."""
    for name in ('CUDAGraph', 'Stream', 'current_stream', 'graph_pool_handle'):
        monkeypatch.setattr(torch.cuda, name, Mock(side_effect=lambda: Mock()))
    for name in ('stream', 'graph'):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: contextlib.nullcontext())


def test_a_graph_of_each_shape_has_the_batch_in_its_own_memory(pretended_cuda):
    step, state = step_and_state()
    truth = train_some(*step_and_state())
    graphed = train.CudaGraphStep(step, state, SHAPES)
    for shape, graph in graphed.graphs.items():
        graph.replay.side_effect = functools.partial(step, *graphed.batches[shape])
    torch.testing.assert_close(train_some(graphed, state), truth, rtol=0, atol=0)
    assert [graphed.graphs[shape].replay.call_count for shape in SHAPES] == [4, 1]


def test_a_recording_that_fails_says_what_the_first_error_was(pretended_cuda, capsys, monkeypatch):
    class Graph:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            pass

        def __exit__(self, kind, *_):
            if kind is not None:
                raise RuntimeError('operation failed due to a previous error during capture')

    def step(images, labels):
        calls.append(len(images))
        if len(calls) > 6:  # after the warm-up
            raise RuntimeError('operation not permitted when stream is capturing\nMore about it.')

    calls = []
    monkeypatch.setattr(torch.cuda, 'graph', Graph)
    _, state = step_and_state()
    with pytest.raises(train.CaptureError, match='^operation not permitted when stream is captur'):
        train.CudaGraphStep(step, state, SHAPES)
    assert calls == [8, 8, 8, 5, 5, 5, 8]

    monkeypatch.setattr(train, 'CudaGraphStep', Mock(side_effect=train.CaptureError('a sync')))
    on_cuda = SimpleNamespace(model=None, interval=SimpleNamespace(device=torch.device('cuda')),
                              scaler=torch.amp.GradScaler('cpu', enabled=False))
    step = train.make_step(parse_args([]), on_cuda, SHAPES, NO_AUTOCAST)
    assert step.func is train_step
    assert capsys.readouterr().out.endswith('is launched by itself: a sync\n')


def test_without_a_graph_it_says_why_if_one_was_asked_for(capsys):
    step, _ = step_and_state(['--cuda-graph'])
    assert not isinstance(step, train.CudaGraphStep)
    assert capsys.readouterr().out == ('no CUDA graph, each kernel is launched by itself: '
                                       'the device is cpu\n')
    for argv in ([], ['--no-cuda-graph']):
        step_and_state(argv)
        assert capsys.readouterr().out == ''


def test_no_graph_for_several_processes(capsys, monkeypatch):
    args = parse_args([])
    monkeypatch.setattr(train.distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(train.distributed, 'wrap', lambda model: model)
    state = SimpleNamespace(model=None, interval=SimpleNamespace(device=torch.device('cuda')),
                            scaler=torch.amp.GradScaler('cpu', enabled=False))
    assert train.make_step(args, state, SHAPES, NO_AUTOCAST).func is train_step
    assert 'by itself: several processes' in capsys.readouterr().out


def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', Mock())
    monkeypatch.setattr(train.distributed, 'world_size', lambda: 4)
    for rank, device in ((0, 'cuda:0'), (1, 'cuda:1')):
        monkeypatch.setattr(train.distributed, 'local_rank', Mock(return_value=rank))
        assert train.choose_device('auto') == torch.device(device)
        torch.cuda.set_device.assert_called_with(rank)
    monkeypatch.setattr(train.distributed, 'local_rank', Mock(return_value=2))
    with pytest.raises(flags.UsageError, match='than it has GPUs: --nproc-per-node 2'):
        train.choose_device('cuda')


class Batches(list):
    num_images = property(lambda self: sum(len(labels) for _, labels in self))


@pytest.mark.parametrize('crops', [1, 10])
@pytest.mark.parametrize('classes', [10, 3])
def test_evaluation_counts_as_a_loop_over_images(crops, classes):
    model = make_state(num_classes=classes).model
    generator = torch.Generator().manual_seed(0)
    batches = Batches()
    for n in (7, 4):
        shape = (n, 10, 3, 8, 8) if crops == 10 else (n, 3, 8, 8)
        batches.append((torch.randn(shape, generator=generator),
                        torch.randint(classes, (n,), generator=generator)))
    loss, error, error5 = evaluate(model, batches, NO_AUTOCAST)
    truth = []
    for images, labels in batches:
        for image, label in zip(images, labels):
            with torch.no_grad():
                logits = model(image.view(-1, 3, 8, 8)).mean(0).double().numpy()
            rank = (logits > logits[label]).sum()
            truth.append((np.log(np.exp(logits).sum()) - logits[label], rank > 0, rank > 4))
    expected = np.mean(truth, 0) * (1, 100, 100)
    np.testing.assert_allclose((loss, error, error5), expected, rtol=1e-5)


def test_the_first_step_without_a_finite_loss_is_named():
    state, (images, labels) = make_state(), batch()
    state.epoch, state.step = 4, 70
    for i in range(6):
        scale = math.inf if i == 3 else 1.0
        train_step(state, images * scale, labels, autocast=NO_AUTOCAST)
        state.count_step(len(images))
    with pytest.raises(train.TrainingError, match='epoch 4, step 74'):
        train.check_finite(state)


def take_steps(state, steps, spoil):
    """Steps of which `spoil(i)` may change what the i-th finds."""
    state.epoch, state.step = 2, 10
    for i in range(steps):
        spoil(i)
        train_step(state, *batch(), autocast=NO_AUTOCAST)
        state.count_step(8)


def test_the_first_bad_parameter_is_named():
    name = 'features.denseblock2.denselayer1.conv1.weight'
    state = make_state()
    weight = dict(state.model.named_parameters())[name]

    def spoil_weight(i):
        if i == 2:
            with torch.no_grad():
                weight[1, 1] = math.inf

    take_steps(state, 5, spoil_weight)
    with pytest.raises(train.TrainingError, match=f'the loss is not finite at epoch 2, step 13: '
                                                  f'the first bad parameter is {name}, by its val'):
        train.check_finite(state)

    state = make_state()  # backward comes to the one after `name` first, and it is well
    calls = iter(range(9))
    dict(state.model.named_parameters())[name].register_hook(
        lambda grad: grad * (math.nan if next(calls) == 1 else 1))
    take_steps(state, 2, lambda i: None)
    with pytest.raises(train.TrainingError, match=f'a gradient is not finite at epoch 2, step 12: '
                                                  f'the first bad parameter is {name}, by its gra'):
        train.check_finite(state)
    take_steps(state, 2, lambda i: None)  # it is remembered when all have become bad


def test_gradients_that_overflow_in_fp16_are_the_scalers_business():
    state = make_state()
    state.scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    calls = iter(range(9))
    state.model.classifier.bias.register_hook(lambda grad: grad / (next(calls) > 0))
    before = copy.deepcopy(dict(state.model.named_parameters()))
    take_steps(state, 1, lambda i: None)
    assert state.scaler.get_scale() == 512
    torch.testing.assert_close(dict(state.model.named_parameters()), before, rtol=0, atol=0)
    take_steps(state, 2, lambda i: None)
    train.check_finite(state)
    assert (state.model.classifier.bias != before['classifier.bias']).any()


@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_precisions_that_autocast(small, tmp_path, precision):
    train.main([*small, '--epochs', '1', '--precision', precision, '--save', str(tmp_path / 'x')])
    saved = checkpoint.load(tmp_path / 'x/latest.pth')
    assert {p.dtype for p in saved['model'].values()} == {torch.float32, torch.int64}
    assert ('scale' in saved['scaler']) == (precision == 'fp16')
    assert json.loads((tmp_path / 'x/args.json').read_text())['precision'] == precision


# ---- whole runs ------------------------------------------------------------------------------

def test_learns_64_photographs_by_heart(photographs, tmp_path):
    train.main(['--dataset', 'folder', '--data', str(photographs), '--no-augment', '--depth', '10',
                '--epochs', '100', '--batch-size', '16', '--save', str(tmp_path), '--no-plot',
                '--save-every', '100', '--device', 'cpu'])
    assert float(read_csv(tmp_path / 'train.csv')[-1]['error']) == 0
    assert float(read_csv(tmp_path / 'test.csv')[-1]['error']) == 0


def test_a_small_net_learns_the_shapes_and_says_where_everything_is(tmp_path, capsys):
    run = tmp_path / 'demo'
    train.main(['--dataset', 'shapes', '--depth', '10', '--growth-rate', '8', '--epochs', '5',
                '--save', str(run), '--device', 'cpu'])
    rows = read_csv(run / 'test.csv')
    assert [row['epoch'] for row in rows] == ['1', '2', '3', '4', '5']
    assert float(rows[-1]['error']) < 15  # by chance 90; linear classifiers: tests/test_data.py
    train_rows = read_csv(run / 'train.csv')
    assert [row['epoch'] for row in train_rows[:3]] == ['0.53191', '1.00000', '1.53191']
    assert set(os.listdir(run)) == {'args.json', 'train.csv', 'test.csv', 'latest.pth',
                                    'latest.pth.1', 'best.pth', 'loss.png', 'error.png',
                                    'loss-error.png'}
    output = capsys.readouterr().out.splitlines()
    best = min(rows, key=lambda row: float(row['error']))
    errors, rest = output[-1].split(', after 0:0')
    assert errors == (f'final error {float(rows[-1]["error"]):.2f}% (epoch 5), best '
                      f'{float(best["error"]):.2f}% (epoch {best["epoch"]})')
    assert re.fullmatch(rf'\d:\d\d; everything is in {run}', rest)
    assert output[-2].split()[1:] == [str(run / f'{name}.png')
                                      for name in ('loss', 'error', 'loss-error')]

    train.main(['--evaluate', '--resume', str(run / 'latest.pth'), '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert f'error {float(rows[-1]["error"]):.2f}%, top-5 error' in printed


def interrupted(function, when, action):
    """A train.py that does something at a known moment: the `when`th call of a function of it."""
    return f'''
import os, signal, sys
sys.path.insert(0, {str(ROOT)!r})
import train
from attic.torture import check_same_run
calls, function = 0, train.{function}
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == {when}:
        {action}
    return function(*args, **kwargs)
train.{function} = counted
train.cli(sys.argv[1:])
'''


def run_interrupted(argv, function, when, signum):
    return forked.run(interrupted(function, when, f'os.kill(os.getpid(), {int(signum)})'), argv)


def assert_same_run(one, other):
    """The same weights, optimizer, counters and random state to the bit; the same CSV rows."""
    check_same_run(one, other)
    assert len(read_csv(one / 'train.csv')) == 3 * 4


@pytest.fixture(scope='module')
def recipe(folder):
    """All that is random and all that is carried from step to step is in it."""
    return ['--dataset', 'folder', '--data', str(folder), *SMALL, '--epochs', '4', '--lr', '0.05',
            '--drop-rate', '0.2', '--grad-accum', '2', '--lr-schedule', 'cosine']


@pytest.fixture(scope='module')
def uninterrupted(recipe, tmp_path_factory):
    run = tmp_path_factory.mktemp('uninterrupted')
    train.main([*recipe, '--save', str(run)])
    return run


@pytest.mark.parametrize('function, when, signum, code, epoch, step', [
    ('learning_rate', 14, signal.SIGTERM, 143, 2, 5),   # within a print interval
    ('learning_rate', 18, signal.SIGINT, 130, 2, 9),    # the last step of an epoch
    ('evaluate', 3, signal.SIGTERM, 143, 3, 9),
    ('evaluate', 4, signal.SIGTERM, 143, 4, 9),         # after the last step of all
    ('make_step', 1, signal.SIGTERM, 143, 1, 0),        # warming up
    ('batches', 1, signal.SIGUSR1, 138, 1, 0),          # starting to load data
    ('end_epoch', 2, signal.SIGUSR1, 138, 3, 0),
    ('learning_rate', 23, signal.SIGKILL, -9, 3, 0),    # back to what was saved after epoch 2
    ('end_epoch', 2, signal.SIGKILL, -9, 2, 0),
    ('learning_rate', 4, signal.SIGKILL, -9, 1, 0),     # before the first epoch was done
])
def test_interrupted_and_resumed_equals_uninterrupted(
        recipe, uninterrupted, tmp_path, function, when, signum, code, epoch, step):
    run = tmp_path / 'run'
    ended = run_interrupted([*recipe, '--save', str(run)], function, when, signum)
    assert ended.returncode == code, ended.stderr
    assert 'Traceback' not in ended.stderr
    saved = checkpoint.load(run / 'latest.pth')
    assert (saved['epoch'], saved['step']) == (epoch, step)
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])  # the other flags are kept
    assert_same_run(run, uninterrupted)


@pytest.mark.parametrize('function', ['build_model', 'data.make_loaders'])
@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
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


def test_a_damaged_checkpoint_costs_no_more_than_an_epoch(recipe, uninterrupted, tmp_path, capsys):
    run = tmp_path / 'run'
    ended = run_interrupted([*recipe, '--save', str(run)], 'learning_rate', 23, signal.SIGKILL)
    assert ended.returncode == -signal.SIGKILL
    latest = run / 'latest.pth'
    latest.write_bytes(latest.read_bytes()[:-1])
    assert f'{latest} is damaged' in fails(capsys, *recipe, '--pretrained', latest, '--save',
                                           tmp_path / 'other')
    train.main(['--save', str(run), '--resume', '--device', 'cpu'])
    printed = capsys.readouterr()
    assert printed.err == (f'train.py: warning: {latest} is damaged: its checksum is not where it '
                           f'should be; going on from the one before, {latest}.1\n')
    assert f'resuming {latest}.1 in epoch 2 after step 0' in printed.out
    assert_same_run(run, uninterrupted)
    assert latest.with_name('latest.pth.damaged').exists()
    for version in checkpoint.versions(latest):
        version.write_bytes(b'')
    assert 'nor is any of the 1 before it sound' in fails(capsys, '--save', run, '--resume')


def test_how_often_to_save_and_how_much_to_keep(small, tmp_path):
    run = ['--save', str(tmp_path / 'run')]
    train.main([*small, *run, '--epochs', '5', '--save-every', '2', '--keep', '2'])
    versions = checkpoint.versions(tmp_path / 'run/latest.pth')
    assert [checkpoint.load(version)['epoch'] for version in versions] == [6, 5, 3]
    train.main([*small, *run, '--epochs', '1', '--overwrite', '--keep', '0'])
    assert checkpoint.versions(tmp_path / 'run/latest.pth') == [tmp_path / 'run/latest.pth']


@pytest.mark.parametrize('signum', [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_lets_the_workers_finish(tmp_path, signum):
    write_images(tmp_path, {f'{split}/{c}': n for split, n in (('train', 40), ('val', 2))
                            for c in 'ab'}, (70, 70))
    command = [sys.executable, str(ROOT / 'train.py'), '--dataset', 'folder', '--data',
               str(tmp_path), '--image-size', '66', '--block-config', '1', '1', '--growth-rate',
               '4', '--batch-size', '2', '--workers', '2', '--epochs', '50', '--print-freq', '1',
               '--save', str(tmp_path / 'run'), '--no-plot', '--device', 'cpu']
    process = subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True,
                               stdout=subprocess.DEVNULL)
    rows = tmp_path / 'run' / 'train.csv'
    deadline = time.monotonic() + 60
    while not (rows.exists() and len(rows.read_text().splitlines()) > 5):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signum)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + signum and errors == ''
    saved = checkpoint.load(tmp_path / 'run' / 'latest.pth')
    assert 40 * (saved['epoch'] - 1) + saved['step'] >= 5


def test_a_worker_that_outlives_its_run_does_not_hold_the_directory(tmp_path):
    script = f'''
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import runlog
with runlog.claim({str(tmp_path)!r}):
    started, start = os.pipe()
    if os.fork() == 0:
        os.write(start, b'.')
        time.sleep(30)
        os._exit(0)
    os.read(started, 1)  # killed sooner, it could end before the child has let go of the lock
    os.kill(os.getpid(), 9)
'''
    # Its output goes nowhere: the child would keep a pipe open.
    ended = subprocess.run([sys.executable, '-c', script], stdout=subprocess.DEVNULL,
                           stderr=subprocess.DEVNULL)
    assert ended.returncode == -signal.SIGKILL
    with train.runlog.claim(tmp_path):
        pass


def test_resuming_a_finished_run_only_says_so_and_more_epochs_go_on(small, tmp_path, capsys):
    run = ['--save', str(tmp_path / 'run')]
    train.main([*small, *run, '--epochs', '2'])
    before = (tmp_path / 'run/train.csv').read_text()
    last = capsys.readouterr().out.splitlines()[-1]
    train.main([*run, '--resume'])
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert (tmp_path / 'run/train.csv').read_text() == before
    train.main([*run, '--resume', '--epochs', '3'])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1', '2', '3']


def test_the_time_of_a_run_is_that_of_all_its_stretches(small, tmp_path):
    run, before, spent = ['--save', str(tmp_path / 'run')], 0, 0
    for argv in ([*small, '--epochs', '2'], ['--resume', '--epochs', '3']):
        started = time.monotonic()
        train.main([*argv, *run])
        spent += time.monotonic() - started
        saved = checkpoint.load(tmp_path / 'run/latest.pth')
        assert before < saved['seconds'] < spent
        before = saved['seconds']
    older = checkpoint.load(tmp_path / 'run/latest.pth')
    del older['seconds'], older['peak_memory']  # as before there were any
    checkpoint.save(tmp_path / 'run/latest.pth', older)
    started = time.monotonic()
    train.main(['--resume', '--epochs', '4', *run])
    seconds = checkpoint.load(tmp_path / 'run/latest.pth')['seconds']
    assert 0 < seconds < time.monotonic() - started


def test_resuming_elsewhere_leaves_the_old_run_alone(small, tmp_path):
    train.main([*small, '--epochs', '2', '--save', str(tmp_path / 'old')])
    before = {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()}
    train.main(['--resume', str(tmp_path / 'old'), '--save', str(tmp_path / 'new'), '--epochs',
                '4', '--start-epoch', '3', '--lr', '0.01'])
    assert {path.name: path.read_bytes() for path in (tmp_path / 'old').iterdir()} == before
    assert [row['epoch'] for row in read_csv(tmp_path / 'new/test.csv')] == ['3', '4']


def test_pretrained_weights_and_a_new_classifier(folder, small, tmp_path, capsys):
    write_images(tmp_path / 'two', {f'{split}/{c}': 4 for split in ('train', 'val') for c in 'ab'},
                 (8, 8))
    train.main([*small, '--epochs', '1', '--save', str(tmp_path / 'old')])
    two = ['--dataset', 'folder', '--data', tmp_path / 'two', *SMALL, '--epochs', 1, '--pretrained',
           tmp_path / 'old/best.pth', '--save', tmp_path / 'new']
    assert '--reset-classifier' in fails(capsys, *two)
    assert not (tmp_path / 'new').exists()
    train.main([*map(str, two), '--reset-classifier', '--lr', '1e-12'])
    old, new = (checkpoint.load(tmp_path / run)['model'] for run in ('old/best.pth',
                                                                     'new/latest.pth'))
    assert new['classifier.weight'].shape == (2, old['classifier.weight'].shape[1])
    torch.testing.assert_close(new['features.conv0.weight'], old['features.conv0.weight'])
    capsys.readouterr()
    train.main([*small, '--evaluate', '--pretrained', str(tmp_path / 'old/best.pth')])
    error = read_csv(tmp_path / 'old/test.csv')[0]['error']
    assert f'error {float(error):.2f}%' in capsys.readouterr().out


def test_torchvisions_weights_through_its_own_cache(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, 'download_url_to_file', raise_no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    large = ['--dataset', 'folder', '--data', folder, '--image-size', 65, '--arch', 'densenet121',
             '--pretrained', '--evaluate', '--reset-classifier', '--batch-size', 4, '--workers', 0]
    # torch before 2.7 also says what it downloads.
    assert 'could not download' in fails(capsys, *large, lines=2)
    cache_densenet121(tmp_path, torchvision.models.densenet121())
    train.main(list(map(str, large)))
    assert 'top-5 error 0.00%' in capsys.readouterr().out  # of four classes


def raise_no_network(*_, **__):
    raise OSError('no network')


def test_best_is_the_best_and_no_worse_model_takes_its_place(recipe, uninterrupted, tmp_path):
    errors = [float(row['error']) for row in read_csv(uninterrupted / 'test.csv')]
    best = checkpoint.load(uninterrupted / 'best.pth')
    assert best['epoch'] - 1 == best['best_epoch'] == 1 + int(np.argmin(errors))
    assert math.isclose(best['best_error'], min(errors), rel_tol=1e-5)
    run = tmp_path / 'run'
    shutil.copytree(uninterrupted, run)
    # Too small a learning rate to learn anything in, and all that was learnt is dropped.
    train.main(['--save', str(run), '--resume', '--start-epoch', str(best['best_epoch']),
                '--drop-rate', '0.99', '--lr', '1'])
    after = checkpoint.load(run / 'best.pth')
    assert after['best_error'] <= best['best_error']
    assert after['best_error'] == after['last_error']


def test_flags_win_over_the_resumed_checkpoint(small, tmp_path):
    run = ['--save', str(tmp_path / 'run')]
    train.main([*small, *run, '--epochs', '1'])
    train.main([*run, '--resume', '--epochs', '2', '--weight-decay', '0.5', '--momentum', '0.1'])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    group, = saved['optimizer']['param_groups']
    assert (group['weight_decay'], group['momentum']) == (0.5, 0.1)
    assert (saved['args']['weight_decay'], saved['args']['batch_size']) == (0.5, 4)


def test_a_depth_that_names_a_model_can_be_resumed_by_the_same_command(tmp_path):
    write_images(tmp_path, {'train/a': 4, 'val/a': 1}, (65, 65))
    argv = ['--dataset', 'folder', '--data', str(tmp_path), '--depth', '121', '--batch-size', '2',
            '--growth-rate', '4', '--workers', '0', '--device', 'cpu', '--no-plot', '--save',
            str(tmp_path / 'run')]
    train.main([*argv, '--epochs', '1'])
    train.main([*argv, '--epochs', '2', '--resume'])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1', '2']


def test_the_seed_decides_the_weights_and_the_order(small, tmp_path):
    weights = {}
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        train.main([*small, '--epochs', '1', '--seed', seed, '--save', str(tmp_path / name)])
        weights[name] = checkpoint.load(tmp_path / name / 'latest.pth')['model']
    torch.testing.assert_close(weights['a'], weights['b'], rtol=0, atol=0)
    start = weights['a']['features.conv0.weight'] - weights['c']['features.conv0.weight']
    assert start.abs().max() > 0.1  # further apart than nine steps can bring them


def test_overwriting_begins_anew(small, tmp_path):
    run = ['--save', str(tmp_path / 'run')]
    train.main([*small, *run, '--epochs', '2'])
    train.main([*small, *run, '--epochs', '1', '--overwrite'])
    assert len(read_csv(tmp_path / 'run/test.csv')) == 1
    assert checkpoint.load(tmp_path / 'run/latest.pth')['epoch'] == 2


# ---- wrong input -----------------------------------------------------------------------------

@pytest.mark.parametrize('argv, message', [
    (['--dataset', 'mnist'], r"invalid choice: 'mnist' \(choose from .*shapes"),
    (['--arch', 'resnet50'], 'resnet50.*densenet121'),
    (['--nonsense', '3'], 'unrecognized arguments: --nonsense'),
    (['--depth', '99'], 'nearest 94 and 100'),
    (['--depth', '41', '--no-bottleneck'], 'nearest 40 and 43'),
    (['--depth', '40', '--arch', 'densenet121'], 'exclude each other'),
    (['--growth-rate', '0'], r'0.* is not a whole number in \[1, 1000000000\]'),
    (['--growth-rate', '1.5'], 'not a whole number'),
    (['--batch-size', '0'], 'not a whole number'),
    (['--batch-size', '6001', '--dataset', 'shapes'], '--batch-size 6001 is larger .* 6000'),
    (['--epochs', '-3'], 'not a whole number'),
    (['--workers', '-1'], 'not a whole number'),
    (['--drop-rate', '1'], r'not a number in \[0, 1\)'),
    (['--drop-rate', 'nan'], r'not a number in \[0, 1\)'),
    (['--compression', '0'], r'not a number in \(0, 1\]'),
    (['--lr', 'inf'], 'not a number'),
    (['--seed', str(2**32)], 'not a whole number'),
    (['--grad-accum', '65'], 'more parts than a batch of 64'),
    (['--warmup-epochs', '301'], 'longer than --epochs 300'),
    (['--freeze-features'], '--freeze-features needs a model: --resume .* or --pretrained'),
    (['--pretrained', '--arch', 'densenet264'], 'which are for --arch densenet121, densenet161'),
    (['--start-epoch', '301'], 'after the last of 300'),
    (['--image-size', '48'], '--image-size is for folder and imagenet'),
    (['--dataset', 'shapes', '--ten-crop'], '--ten-crop is for'),
    (['--evaluate'], 'needs a model'),
    (['--reset-classifier'], 'for the weights of --pretrained'),
    (['--pretrained'], 'torchvision.s weights, .* images of more than 64 pixels'),
    (['--resume', '--overwrite'], 'not allowed with'),
    (['--resume', 'nowhere.pth'], 'nowhere.pth is not there'),
    (['--dataset', 'shapes', '--block-config', '1', '1', '1', '1', '1', '1', '1'], 'at least 64'),
    (['--dataset', 'shapes', '--growth-rate', '100000'], 'no such model: .* memory'),
    (['--precision', 'tf32', '--device', 'cpu'], 'tf32 is for cuda'),
    (['--name', 'a\nb'], r'a\\nb has letters that cannot be printed'),
    (['--save', 'caf\udce9'], r'caf\\udce9 has letters that cannot'),
])
def test_wrong_flags(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(capsys, *argv))
    assert not any((tmp_path / 'work').glob('*'))


@pytest.mark.skipif(torch.cuda.is_available(), reason='needs a machine without CUDA')
def test_cuda_where_there_is_none(capsys):
    assert '--device cuda' in fails(capsys, '--device', 'cuda')


def test_data_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('urllib.request.urlopen', raise_no_network)
    error = fails(capsys, '--dataset', 'cifar10')
    assert 'cifar-10-python.tar.gz' in error and '--dataset shapes' in error
    assert 'no train in nowhere' in fails(capsys, '--dataset', 'imagenet', '--data', 'nowhere')


def test_a_run_that_is_there_is_left_alone(small, tmp_path, capsys):
    run = tmp_path / 'run'
    train.main([*small, '--save', str(run), '--epochs', '1'])
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert 'holds a run' in fails(capsys, *small, '--save', run)
    other = [*small, '--save', run, '--resume']
    assert re.search('depth is 10, not 16', fails(capsys, *other, '--depth', 16))
    assert re.search('growth_rate is 4, not 8', fails(capsys, *other, '--growth-rate', 8))
    write_images(tmp_path / 'two', {'train/a': 4, 'train/b': 4, 'val/a': 1, 'val/b': 1}, (8, 8))
    assert 'other classes than' in fails(capsys, *other, '--data', tmp_path / 'two')
    assert re.search('optimizer is sgd, not adam', fails(capsys, *other, '--optimizer', 'adam'))
    lock = os.open(run, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    assert 'in use' in fails(capsys, *other)
    assert 'in use' in fails(capsys, *small, '--save', run, '--overwrite')
    os.close(lock)
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before


def test_files_that_are_no_run(small, tmp_path, capsys):
    (tmp_path / 'text.pth').write_text('not a checkpoint')
    assert 'is not a checkpoint' in fails(capsys, *small, '--resume', tmp_path / 'text.pth')
    train.main([*small, '--epochs', '1', '--save', str(tmp_path / 'run')])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    optimizer = saved['optimizer']
    for key, value in (
            ('dataset', {}), ('args', {}),
            *(('args', {**saved['args'], key: value}) for key, value in (
                ('workers', 10**9), ('lr', []), ('lr', None), ('epochs', None),
                ('block_config', 3), ('optimizer', 'x'))),
            ('processes', None), ('epoch', 'x'), ('epoch', -5), ('epoch', math.inf),
            ('step', 10**9), ('epoch_sums', None), ('epoch_sums', (1,)), ('epoch_sums', 'abc'),
            ('optimizer', {**optimizer, 'state': 5}),
            ('optimizer', {**optimizer, 'state': {0: {'momentum_buffer': 'x'}}}),
            ('optimizer', {**optimizer, 'state': {0: {'momentum_buffer': torch.ones(7)}}})):
        torch.save({**saved, key: value}, tmp_path / 'damaged.pth')
        assert re.search('damaged|cannot be resumed|another architecture', fails(
            capsys, '--resume', tmp_path / 'damaged.pth', '--save', tmp_path / 'new', '--epochs',
            2)), (key, value)
    torch.save(densenet.densenet_cifar(10, 4).state_dict(), tmp_path / 'weights.pth')
    assert '--pretrained' in fails(capsys, *small, '--resume', tmp_path / 'weights.pth')
    (tmp_path / 'file').write_text('')
    assert 'cannot make' in fails(capsys, *small, '--save', tmp_path / 'file')


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(small, tmp_path, capsys):
    run = tmp_path / 'run'
    train.main([*small, '--save', str(run), '--epochs', '1'])
    before = (run / 'latest.pth').read_bytes()
    error = fails(capsys, '--save', run, '--resume', '--epochs', 3, '--lr', 1e30)
    assert re.search(r'the loss is not finite at epoch 2, step [23]:', error)
    assert (run / 'latest.pth').read_bytes() == before
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1']


def test_a_signal_does_not_save_a_loss_that_is_not_finite(small, tmp_path):
    run = tmp_path / 'run'
    train.main([*small, '--save', str(run), '--epochs', '1'])
    before = (run / 'latest.pth').read_bytes()
    argv = ['--save', str(run), '--resume', '--epochs', '3', '--lr', '1e30', '--print-freq', '9']
    ended = run_interrupted(argv, 'learning_rate', 5, signal.SIGTERM)
    assert ended.returncode == 2 and 'not finite at epoch 2' in ended.stderr
    assert (run / 'latest.pth').read_bytes() == before
    assert len(read_csv(run / 'train.csv')) == 3  # nor are rows lost that nothing replaces


@pytest.mark.parametrize('what', ['weight', 'running_var'])
def test_a_model_that_is_not_finite_is_not_saved(small, tmp_path, monkeypatch, capsys, what):
    evaluate, run = train.evaluate, tmp_path / 'run'

    def spoil(model, *args):
        results = evaluate(model, *args)
        if model.training is False and (run / 'best.pth').exists():
            getattr(model.features.norm5, what).data[1] = math.inf
        return results

    monkeypatch.setattr(train, 'evaluate', spoil)
    error = fails(capsys, *small, '--save', run, '--epochs', 3)
    assert (f'the model is not finite in epoch 3 after step 0: the first bad parameter is '
            f'features.norm5.{what};') in error
    assert checkpoint.load(run / 'latest.pth')['epoch'] == 2


def test_a_signal_does_not_save_weights_that_have_just_gone_wrong(small, tmp_path):
    run = tmp_path / 'run'
    ended = run_interrupted([*small, '--save', str(run), '--lr', '1e15', '--weight-decay', '1e30'],
                            'learning_rate', 1, signal.SIGTERM)
    assert ended.returncode == 2 and 'in epoch 1 after step 1: the first bad' in ended.stderr
    weights = checkpoint.load(run / 'latest.pth')['model'].values()
    assert all(weight.isfinite().all() for weight in weights)


def test_finite_weights_are_not_blamed_however_large():
    state = make_state()
    for weight in state.model.parameters():
        weight.data.mul_(1e20)
    with torch.no_grad():  # the normalisation makes them small again
        loss = F.cross_entropy(state.model(batch()[0]), batch()[1])
    assert loss.isfinite() and not torch.stack([
        weight.norm() for weight in state.model.parameters()]).isfinite().all()
    take_steps(state, 1, lambda i: None)
    train.check_finite(state)


def test_a_broken_test_image_does_not_cost_the_epoch(tmp_path, capsys):
    write_images(tmp_path, {'train/a': 4, 'train/b': 4, 'val/a': 1, 'val/b': 1}, (65, 65))
    broken = tmp_path / 'val/b/0.png'
    whole = broken.read_bytes()
    broken.write_bytes(whole[:500])
    argv = ['--dataset', 'folder', '--data', tmp_path, '--block-config', 1, 1, '--growth-rate', 4,
            '--batch-size', 4, '--epochs', 1, '--device', 'cpu', '--save', tmp_path / 'run',
            '--no-plot', '--workers', 0]
    assert 'val/b/0.png: cannot be read' in fails(capsys, *argv)
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert (saved['epoch'], saved['step']) == (1, 2)
    broken.write_bytes(whole)
    train.main(['--save', str(tmp_path / 'run'), '--resume'])
    assert len(read_csv(tmp_path / 'run/test.csv')) == 1


def test_an_epoch_is_not_continued_on_other_data(recipe, folder, tmp_path, capsys):
    other = tmp_path / 'folder'
    shutil.copytree(folder, other)
    argv = [str(other) if flag == str(folder) else flag for flag in recipe]
    run = tmp_path / 'run'
    assert run_interrupted([*argv, '--save', str(run)], 'learning_rate', 14, signal.SIGTERM) \
        .returncode == 143
    assert 'in batches of 4, and cannot' in fails(capsys, '--save', run, '--resume', '-b', 2)
    (other / 'train/a/0.png').unlink()
    error = fails(capsys, '--save', run, '--resume')
    assert 'an epoch of 36 images' in error and '--start-epoch 2' in error
    train.main(['--save', str(run), '--resume', '--start-epoch', '2'])
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2', '3', '4']


def test_a_single_value_per_channel(tmp_path, capsys):
    write_images(tmp_path, {'train/a': 3, 'val/a': 1}, (8, 8))
    error = fails(capsys, '--dataset', 'folder', '--data', tmp_path, '--block-config', 1, 1, 1, 1,
                  '--batch-size', 2, '--device', 'cpu', '--save', tmp_path / 'run', '--no-plot')
    assert '--batch-size or --grad-accum' in error


def test_a_disk_that_cannot_be_written_to(small, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, 'No space left on device', 'latest.pth')

    monkeypatch.setattr(torch, 'save', full)
    error = fails(capsys, *small, '--save', tmp_path / 'run', '--epochs', 1)
    assert error == (f'train.py: error: {tmp_path}/run/latest.pth cannot be written (No space left '
                     f'on device); what was saved before is untouched')


@pytest.mark.parametrize('what, message', [
    ('gone', 'run is gone: it was deleted or moved'),
    ('a folder', r'latest.pth cannot be written \(Is a directory\)')])
def test_a_run_whose_files_are_taken_away(small, tmp_path, monkeypatch, capsys, what, message):
    run, end_epoch = tmp_path / 'run', train.end_epoch

    def take_away(state, *args):
        if state.epoch == 3:
            if what == 'gone':
                shutil.rmtree(run)
            else:
                (run / 'latest.pth').unlink()
                (run / 'latest.pth').mkdir()
        return end_epoch(state, *args)

    monkeypatch.setattr(train, 'end_epoch', take_away)
    assert re.search(message, fails(capsys, *small, '--save', run, '--epochs', 9))
    if what == 'a folder':
        monkeypatch.undo()
        (run / 'latest.pth').rmdir()
        train.main(['--save', str(run), '--resume', '--epochs', '4'])
        assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2', '3', '4']


def test_rows_wait_for_room_on_the_disk(tmp_path, capsys):
    csv_file = train.runlog.CsvFile(tmp_path / 'x.csv', ('epoch', 'loss'), keep=lambda _: True)
    csv_file.write(1, 0.5)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, before[1]))  # in the middle of the second row
    try:
        csv_file.write(2, 0.25)
        csv_file.write(3, 0.125)
        assert (tmp_path / 'x.csv').read_text() == 'epoch,loss\n1,0.5\n2,0'
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    csv_file.write(4, 0.0)
    csv_file.close()
    assert (tmp_path / 'x.csv').read_text() == 'epoch,loss\n1,0.5\n2,0.25\n3,0.125\n4,0.0\n'
    assert capsys.readouterr().err == (f'train.py: warning: {tmp_path}/x.csv: File too large; its '
                                       f'rows wait in memory until they can be written\n')


def test_output_that_nobody_reads_does_not_end_a_run(small, tmp_path):
    command = [sys.executable, str(ROOT / 'train.py'), *small, '--epochs', '2', '--save']
    closed = f'{shlex.join(command)} {tmp_path}/r1 1>&- 2>&-'
    ended = subprocess.run(['sh', '-c', closed])
    assert ended.returncode == 0 and len(read_csv(tmp_path / 'r1/test.csv')) == 2
    with open('/dev/full', 'w') as full:
        ended = subprocess.run([*command, tmp_path / 'run'], stdout=full, stderr=subprocess.PIPE,
                               text=True)
        assert ended.stderr == ('train.py: warning: nothing more is printed: No space left on '
                                'device\n')
        assert ended.returncode == 0 and len(read_csv(tmp_path / 'run/test.csv')) == 2
        assert subprocess.run([*command, tmp_path / 'run'], stdout=full, stderr=full) \
            .returncode == 2  # it is there already


def test_tensorboard_has_the_curves_the_graph_and_the_hyper_parameters(small, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    run, plain = tmp_path / 'run', tmp_path / 'plain'
    argv = [*small, '--epochs', '2', '--drop-rate', '0.2']
    train.main([*argv, '--tensorboard', '--tensorboard-graph', '--lr', '0.05', '--save', str(run)])
    train.main([*argv, '--lr', '0.05', '--save', str(plain)])
    check_same_run(run, plain)  # no random number is spent on the graph

    events = EventAccumulator(str(run / 'tensorboard')).Reload()
    curves = {'train_loss', 'train_acc', 'val_loss', 'val_acc'}
    assert set(events.Tags()['scalars']) == curves | {'final_error', 'best_error'}
    rows = read_csv(run / 'test.csv')
    errors = [float(row['error']) for row in rows]
    np.testing.assert_allclose([e.value for e in events.Scalars('val_loss')],
                               [float(row['loss']) for row in rows], rtol=1e-4)
    np.testing.assert_allclose([100 - e.value for e in events.Scalars('val_acc')], errors,
                               rtol=1e-4)
    assert math.isclose(events.Scalars('final_error')[-1].value, errors[-1], rel_tol=1e-4)
    assert math.isclose(events.Scalars('best_error')[-1].value, min(errors), rel_tol=1e-4)

    operations = [node.op for node in events.Graph().node]
    model = densenet.DenseNet(**torch.load(run / 'latest.pth', weights_only=True)['config'])
    assert operations.count('aten::_convolution') == sum(
        isinstance(module, torch.nn.Conv2d) for module in model.modules())
    content = events.SummaryMetadata('_hparams_/session_start_info').plugin_data.content
    values = HParamsPluginData.FromString(content).session_start_info.hparams
    assert values['lr'].number_value == 0.05 and values['optimizer'].string_value == 'sgd'
    assert 'save' not in values and 'workers' not in values


def test_tensorboard_on_a_full_disk_does_not_end_a_run(small, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, 'add_scalar', Mock(side_effect=OSError(28, 'No space')))
    train.main([*small, '--epochs', '2', '--tensorboard', '--save', str(tmp_path / 'run')])
    assert capsys.readouterr().err == ('train.py: warning: no more is written for TensorBoard: '
                                       'No space\n')


def test_what_a_killed_run_has_not_completed_is_taken_out(small, tmp_path):
    run = tmp_path / 'run'
    run.mkdir()
    for name in ('.latest.pth.tmp', '.train.csv.tmp', '.loss.png.123.tmp'):
        (run / name).write_text('half')
    train.main([*small, '--epochs', '1', '--save', str(run)])
    assert not list(run.glob('.*'))


def test_no_drawing_process_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(train.runlog, '__file__', str(tmp_path / 'runlog.py'))
    (tmp_path / 'plot.py').write_text('import sys; sys.stderr.write("x" * 1_000_000)')
    drawer = train.runlog.FigureDrawer(tmp_path)
    drawer.redraw()
    drawer.thread.join(30)  # more than a pipe holds does not stop it
    assert drawer.drawn and subprocess.run(['ps', '--ppid', str(os.getpid()), '-o', 'stat='],
                                           capture_output=True, text=True).stdout.count('Z') == 0


def test_running_out_of_memory_says_what_would_fit(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, 'fit', Mock(side_effect=torch.OutOfMemoryError('CUDA out of memory.'
                                                                              '\nTried to')))
    monkeypatch.setattr(train.memory, 'available', lambda device: 10**6)
    error = fails(capsys, *small, '--depth', 22, '--batch-size', 36, '--save', tmp_path / 'run')
    found = re.fullmatch(r'train.py: error: out of memory: lower --batch-size, raise --grad-accum '
                         r'or give --memory-efficient; by estimate (\d+) images fit at once '
                         r'\(--grad-accum (\d+)\), with --memory-efficient (\d+)', error)
    n, parts, with_flag = map(int, found.groups())
    assert n < 36 <= n * parts and n < with_flag
    state = make_state(num_classes=4, depth=22)
    with train.memory.Allocations() as allocations:
        train_step(state, *(tensor[:, :3] if tensor.dim() > 1 else tensor % 4
                            for tensor in batch(n)), autocast=NO_AUTOCAST)
    assert 0.7e6 < allocations.peak < 1e6

    for error in (MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")):
        monkeypatch.setattr(train, 'evaluate', Mock(side_effect=error))
        assert fails(capsys, '--evaluate', '--resume', tmp_path / 'run/latest.pth').endswith(
            'out of memory: lower --batch-size')
        monkeypatch.setattr(train, 'build_model', Mock(side_effect=error))
        assert 'out of memory before' in fails(capsys, *small, '--save', tmp_path / 'other')
        monkeypatch.undo()


def test_an_image_reader_that_is_killed_is_one_line(tmp_path):
    write_images(tmp_path, {'train/a': 40, 'val/a': 2}, (70, 70))
    script = interrupted('learning_rate', 3, """
        for child in open(f'/proc/self/task/{os.getpid()}/children').read().split():
            os.kill(int(child), 9)""")
    argv = ['--dataset', 'folder', '--data', tmp_path, '--block-config', '1', '1', '--growth-rate',
            '4', '--batch-size', '2', '--workers', '2', '--device', 'cpu', '--no-plot', '--save',
            tmp_path / 'run']
    ended = forked.run(script, argv)
    assert ended.returncode == 2, ended.stderr
    line, = ended.stderr.splitlines()
    assert 'a process that reads images has died' in line and 'fewer --workers than 2' in line


def test_deterministic_runs_are_the_same(recipe, uninterrupted, tmp_path, monkeypatch):
    monkeypatch.delenv('CUBLAS_WORKSPACE_CONFIG', raising=False)
    run = tmp_path / 'run'
    try:
        train.main([*recipe, '--deterministic', '--save', str(run)])
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.backends.cudnn.benchmark
        assert os.environ['CUBLAS_WORKSPACE_CONFIG'] == ':4096:8'
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(run, uninterrupted)


def test_a_plot_that_fails_is_one_warning(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train.runlog, '__file__', str(tmp_path / 'runlog.py'))
    (tmp_path / 'plot.py').write_text('raise ValueError("no ink")')
    argv = [flag for flag in small if flag != '--no-plot']
    train.main([*argv, '--save', str(tmp_path / 'run'), '--epochs', '3'])
    output, warnings = capsys.readouterr()
    assert 'figures:' not in output
    warnings = warnings.splitlines()
    assert warnings == ['train.py: warning: the figures were not drawn: ValueError: no ink']


def test_a_torn_row_is_mended_on_resuming(small, tmp_path):
    run = tmp_path / 'run'
    train.main([*small, '--save', str(run), '--epochs', '2'])
    whole = (run / 'train.csv').read_text()
    with open(run / 'train.csv', 'a') as file:
        file.write('2.3333,1.9')
    train.main(['--save', str(run), '--resume', '--epochs', '3'])
    assert (run / 'train.csv').read_text().startswith(whole)
    assert len(read_csv(run / 'train.csv')) == 3 * 3


def test_rows_under_a_damaged_header_are_kept(small, tmp_path):
    run = tmp_path / 'run'
    train.main([*small, '--save', str(run), '--epochs', '2'])
    before = {name: (run / name).read_text() for name in ('train.csv', 'test.csv')}
    for name, text in before.items():
        (run / name).write_text(text.replace(',error', '\nerror', 1))
    train.main(['--save', str(run), '--resume', '--epochs', '3'])
    for name, text in before.items():
        assert (run / name).read_text().startswith(text)


def test_rows_of_an_older_version_are_kept(small, tmp_path):
    run = tmp_path / 'run'
    train.main([*small, '--save', str(run), '--epochs', '1'])
    old = [line.rpartition(',')[0] for line in (run / 'train.csv').read_text().splitlines()]
    (run / 'train.csv').write_text('\n'.join(old) + '\n')
    for epochs in ('2', '3'):
        train.main(['--save', str(run), '--resume', '--epochs', epochs])
    lines = (run / 'train.csv').read_text().splitlines()
    assert lines[1:4] == [f'{line},nan' for line in old[1:]] and len(lines) == 1 + 3 * 3


# ---- CUDA ------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16', 'fp16'])
def test_cuda_learns_the_shapes(tmp_path, precision):
    train.main(['--dataset', 'shapes', '--depth', '16', '--growth-rate', '8', '--epochs', '5',
                '--precision', precision, '--save', str(tmp_path / 'run'), '--no-plot'])
    assert float(read_csv(tmp_path / 'run/test.csv')[-1]['error']) < 10


@pytest.mark.cuda
def test_the_most_memory_of_a_run_is_that_of_all_its_stretches(tmp_path, capsys):
    run = ['--dataset', 'shapes', '--depth', '10', '--no-plot', '--save', str(tmp_path / 'run')]
    torch.cuda.reset_peak_memory_stats()
    train.main([*run, '--epochs', '1', '--batch-size', '1000'])
    peak = torch.cuda.max_memory_allocated()
    train.main([*run, '--epochs', '2', '--batch-size', '10', '--resume'])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    assert saved['peak_memory'] == peak > 1000 * 32 * 32 * 24 * 2  # bytes of a block's first maps
    assert f'at most {peak / 2**30:.2f} GiB on the GPU' in capsys.readouterr().out


@pytest.mark.cuda
def test_interrupted_on_cuda_goes_on_in_the_same_place(recipe, tmp_path):
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
    script = 'import train; train.cli(sys.argv[1:])'
    ended = forked.run(script, [*argv, tmp_path / 'one'])
    assert ended.returncode == 0, ended.stderr
    ended = run_interrupted([*argv, str(tmp_path / 'two')], 'learning_rate', 14, signal.SIGUSR1)
    assert ended.returncode == 138, ended.stderr
    ended = forked.run(script, ['--save', tmp_path / 'two', '--resume'])
    assert ended.returncode == 0, ended.stderr
    assert_same_run(tmp_path / 'one', tmp_path / 'two')


@pytest.mark.cuda
@pytest.mark.parametrize('flag', ['--cuda-graph', '--no-cuda-graph'])
def test_a_gpu_without_room_says_what_would_fit(tmp_path, flag):
    script = ('import torch, train; torch.cuda.set_per_process_memory_fraction(0.02); '
              'train.cli(sys.argv[1:])')
    ended = forked.run(script, ['--dataset', 'shapes', '--batch-size', '3000', flag, '--no-plot',
                                '--save', tmp_path / 'run'])
    assert ended.returncode == 2
    assert re.fullmatch(r'train.py: error: out of memory: lower --batch-size, .*; by estimate \d+ '
                        r'images fit at once .*\n', ended.stderr)


@pytest.fixture
def repeatable_kernels():
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = True, False
    yield
    torch.backends.cudnn.deterministic = False


@pytest.mark.cuda
@pytest.mark.parametrize('argv, precision, model', [
    ([], 'fp32', {}), ([], 'bf16', {'memory_efficient': True}), ([], 'fp16', {}),
    (['--grad-accum', '2', '--label-smoothing', '0.1'], 'fp16', {'memory_efficient': True}),
    (['--optimizer', 'adam'], 'fp32', {}), (['--optimizer', 'adamw'], 'fp16', {}),
    (['--optimizer', 'rmsprop'], 'bf16', {})])
def test_a_cuda_graph_trains_as_the_step_does(argv, precision, model, repeatable_kernels):
    results = []
    for flag in ('--cuda-graph', '--no-cuda-graph'):
        step, state = step_and_state([*argv, flag], 'cuda', precision, **model)
        assert isinstance(step, train.CudaGraphStep) == (flag == '--cuda-graph')
        results.append(train_some(step, state, 'cuda'))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_a_rate_of_zero_stops_a_graph():
    step, state = step_and_state(device='cuda')
    assert isinstance(step, train.CudaGraphStep)
    before = copy.deepcopy(dict(state.model.named_parameters()))
    train.set_learning_rate(state.optimizer, 0.0)
    step(*(tensor.cuda() for tensor in batch()))
    torch.testing.assert_close(dict(state.model.named_parameters()), before, rtol=0, atol=0)
    assert state.interval[0] > 0


@pytest.mark.cuda
def test_no_graph_where_the_optimizer_waits_for_the_host(capsys):
    step, _ = step_and_state(['--optimizer', 'rmsprop'], 'cuda', 'fp16')
    assert not isinstance(step, train.CudaGraphStep)
    assert 'rmsprop waits for the host' in capsys.readouterr().out


@pytest.mark.cuda
@pytest.mark.parametrize('optimizer', ['sgd', 'adam'])
def test_a_run_of_the_cpu_goes_on_on_cuda(recipe, tmp_path, optimizer):
    argv = [*recipe, '--optimizer', optimizer, '--save', str(tmp_path / 'run')]
    train.main([*argv, '--epochs', '1'])
    train.main(['--save', str(tmp_path / 'run'), '--resume', '--epochs', '2', '--device', 'cuda'])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1', '2']
