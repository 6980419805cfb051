"""Training: flags and recipes, a step, an evaluation, whole runs, and wrong input."""

import contextlib
import copy
import functools
import io
import json
import math
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import forked
import numpy as np
import pytest
import sklearn.metrics
import torch
import torch.nn.functional as F
import torchvision
from conftest import (
    ROOT,
    SMALL,
    assert_same_run,
    cache_densenet121,
    fails,
    parse_flags,
    raise_no_network,
    read_csv,
    write_images,
)
from forked import RUN, interrupted

import densenet
import train
from train import evaluate, learning_rate, train_step
from training import checkpoint, flags, losses, networks, runlog
from training.console import UserError
from training.device import make_autocast
from training.run import Run
from training.runlog import RunLog
from training.train_state import TrainState, initialize_optimizer

NO_AUTOCAST = torch.autocast('cpu', enabled=False)


def flags_of(line=''):
    return parse_flags(line.split())


# ---- where it runs ---------------------------------------------------------------------------

def test_flags_are_parsed_without_torch():
    check = """
import sys
sys.modules['torch'] = None  # importing it is an error
from training import flags
flags.parse(['--depth', '40'])
"""
    subprocess.run([sys.executable, '-c', check], cwd=ROOT, check=True)


def test_scripts_can_be_imported_without_unix(tmp_path):
    """Windows has no fcntl and no SIGUSR1."""
    check = """
import signal, sys
for name in [name for name in sys.modules if name.partition('.')[0] in ('train', 'training')]:
    del sys.modules[name]
sys.modules['fcntl'] = None
del signal.SIGUSR1
import train, predict
from training import distributed, runlog
assert runlog.fcntl is None
with distributed.StopSignals(), runlog.lock_directory(sys.argv[1]):
    pass
"""
    ended = forked.run(check, [tmp_path])
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count('no file locks') == 1


def test_in_a_notebook_a_wrong_flag_is_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--bogus'])
    monkeypatch.setattr(sys, 'stdout', io.StringIO())  # has no reconfigure
    with pytest.raises(SystemExit, match='2'):
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')
    assert capsys.readouterr().err == 'train.py: error: there is no --bogus\n'


# ---- flags -----------------------------------------------------------------------------------

def test_the_classic_repositories_commands():
    args = flags_of('--layers 40 --growth 12 --no-bottleneck --reduce 1.0 --name DenseNet-40-12')
    args = flags.with_network(args, 32)
    model = networks.build(args, 10, 32)
    assert sum(p.numel() for p in model.parameters()) == 1_019_722
    assert flags.run_directory(args).as_posix() == 'work/DenseNet-40-12'

    args = flags_of('--batchSz 64 --nEpochs 300 --opt adam --save somewhere')
    optimizer = train.make_optimizer(args, model)
    assert type(optimizer) is torch.optim.Adam and optimizer.defaults['lr'] == 1e-3
    assert (args.batch_size, args.epochs, args.save) == (64, 300, 'somewhere')
    assert flags_of('--no-cuda --seed 3').device == 'cpu'

    # The official one: th main.lua -netType densenet -dataset imagenet ..., with two dashes.
    args = flags_of('--dataset imagenet --data x --batchSize 256 --nEpochs 90 --depth 121 '
                    '--growthRate 32 --nThreads 16')
    args = flags.with_network(args, 224)
    assert sum(p.numel() for p in networks.build(args, 1000, 224).parameters()) == 7_978_856


@pytest.mark.parametrize('theirs, ours', [
    # bamos/densenet.pytorch and andreasveit/densenet-pytorch
    ('--batchSz 32 --nEpochs 7', '--batch-size 32 --epochs 7'), ('-b 32', '--batch-size 32'),
    ('--layers 40 --growth 24 --reduce 0.7', '--depth 40 --growth-rate 24 --compression 0.7'),
    ('--learning-rate 0.2 --wd 0.01', '--lr 0.2 --weight-decay 0.01'), ('-p 3', '--print-freq 3'),
    ('--droprate 0.1 --opt rmsprop', '--drop-rate 0.1 --optimizer rmsprop'),
    # the official code
    ('--batchSize 32 --LR 0.2 --weightDecay 0.01', '--batch-size 32 --lr 0.2 --weight-decay 0.01'),
    ('--growthRate 24 --reduction 0.7', '--growth-rate 24 --compression 0.7'),
    ('--dropRate 0.1 --lrShape cosine', '--drop-rate 0.1 --lr-schedule cosine'),
    ('--nThreads 3 --manualSeed 5 --tenCrop', '--workers 3 --seed 5 --ten-crop'),
    ('--retrain x.t7 --resetClassifier', '--pretrained x.t7 --reset-classifier'),
    ('--testOnly --retrain x.t7', '--evaluate --pretrained x.t7')])
def test_flags_of_the_classic_repositories(theirs, ours):
    assert flags_of(theirs) == flags_of(ours)


@pytest.mark.parametrize('argv, size, classes, parameters', [
    ('--block-config 12 12 12 --no-bottleneck --compression 1', 32, 10, 1_019_722),
    ('--block-config 16 16 16', 32, 10, 769_162),
    ('--block-config 6 12 24 16', 224, 1000, 7_978_856),
    ('--arch densenet161', 224, 1000, 28_681_000),
])
def test_block_configurations_are_the_named_models(argv, size, classes, parameters):
    args = flags.with_network(flags_of(argv), size)
    model = networks.build(args, classes, size)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_recipes_of_the_paper():
    recipe = flags_of()
    assert (recipe.epochs, recipe.batch_size, recipe.lr, recipe.momentum, recipe.weight_decay,
            recipe.drop_rate, recipe.augment) == (300, 64, 0.1, 0.9, 1e-4, 0.0, True)
    assert flags.with_network(recipe, 32).depth == 100
    optimizer = train.make_optimizer(recipe, torch.nn.Linear(2, 2))
    assert optimizer.defaults['nesterov'] and optimizer.defaults['dampening'] == 0
    assert (optimizer.defaults['weight_decay'], optimizer.defaults['momentum']) == (1e-4, 0.9)
    assert sum(len(group['params']) for group in optimizer.param_groups) == 2

    svhn = flags_of('--dataset svhn')
    assert (svhn.epochs, svhn.drop_rate, svhn.augment) == (40, 0.2, False)
    assert flags_of('--no-augment').drop_rate == 0.2
    # RMSprop and Adam as torch has them, which is how bamos/densenet.pytorch compared them.
    for name, theirs in (('rmsprop', torch.optim.RMSprop), ('adam', torch.optim.Adam)):
        weights = [torch.nn.Parameter(torch.zeros(2))]
        ours = train.make_optimizer(flags_of(f'--opt {name}'), torch.nn.Linear(2, 2))
        its = {**ours.defaults, 'weight_decay': 0, 'fused': None}
        assert its == {**theirs(weights, weight_decay=0).defaults, 'fused': None}
    imagenet = flags_of('--dataset imagenet')
    assert (imagenet.epochs, imagenet.batch_size) == (90, 256)
    given = flags_of('--dataset svhn --epochs 7 --drop-rate 0 --augment')
    assert (given.epochs, given.drop_rate, given.augment) == (7, 0.0, True)


def test_the_recipe_of_fine_tuning():
    given = '--pretrained --arch densenet121 --dataset imagenet'
    args = flags_of(given)
    assert (args.epochs, args.lr_schedule, args.lr) == (30, 'cosine', 0.1)
    args = flags_of(f'{given} --epochs 7 --lr-schedule multistep')
    assert (args.epochs, args.lr_schedule) == (7, 'multistep')


def test_one_worker_for_each_available_core(monkeypatch):
    monkeypatch.setattr(os, 'sched_getaffinity', lambda pid: range(6), raising=False)
    for processes, workers in ((1, 6), (2, 3), (8, 1)):
        monkeypatch.setenv('LOCAL_WORLD_SIZE', str(processes))
        assert flags.num_workers(flags_of()) == workers
    assert flags.num_workers(flags_of('--workers 5')) == 5


def test_learning_rate_of_the_recipes():
    args = flags_of()
    rates = [learning_rate(args, epoch) for epoch in range(1, 301)]
    assert rates == [0.1] * 149 + [0.01] * 75 + [0.001] * 76
    svhn = flags_of('--dataset svhn')
    assert [learning_rate(svhn, e) for e in (19, 20, 29, 30, 40)] == [0.1, 0.01, 0.01, 1e-3, 1e-3]
    imagenet = flags_of('--dataset imagenet')
    assert [learning_rate(imagenet, e) for e in (30, 31, 60, 61)] == [0.1, 0.01, 0.01, 0.001]
    # fb.resnet.torch: a power of floor((epoch - 1) / 30), for any number of epochs
    for epochs in (20, 90, 120):
        args = flags_of(f'--dataset imagenet --epochs {epochs}')
        rates = [learning_rate(args, epoch) for epoch in range(1, epochs + 1)]
        steps = [0.1] * 30 + [0.01] * 30 + [0.001] * 30 + [0.0001] * 30
        np.testing.assert_allclose(rates, steps[:epochs], rtol=1e-12)
    for dataset in ('cifar10', 'imagenet'):
        short = flags_of(f'--dataset {dataset} --epochs 1')
        assert learning_rate(short, 1) == 0.1

    from torch.optim import lr_scheduler
    for warmup in (0, 2.5):
        args = flags_of(f'--lr-schedule cosine --epochs 10 --warmup-epochs {warmup}')
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
    imagenet = flags_of('--dataset imagenet --lr 0.8 --warmup-epochs 5')
    rates = [learning_rate(imagenet, epoch) for epoch in (1, 6, 30, 31)]
    assert np.allclose(rates, [0.008, 0.8, 0.8, 0.08])


# ---- the step and the evaluation -------------------------------------------------------------

def make_state(seed=0, lr=0.1, depth=10, **kwargs):
    torch.manual_seed(seed)
    model = densenet.densenet_cifar(depth, 4, **kwargs)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True)
    return TrainState(model, optimizer, torch.amp.GradScaler('cpu', enabled=False),
                      sums=torch.zeros(2))


def make_run(state, line=''):
    run = Run(flags_of(line), stop=None)
    run.state = state
    return run


def batch(n=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(n, 3, 8, 8, generator=generator),
            torch.randint(10, (n,), generator=generator))


def test_a_step_equals_the_step_written_out():
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
    assert state.step == 3 and state.interval_images == 24
    loss, error = make_run(state).interval_means()
    assert error == 100 * errors / 24 and math.isclose(loss, loss_sum / 24, rel_tol=1e-5)
    assert state.epoch_sums == (24 * loss, errors, 24)
    assert state.sums.tolist() == [0, 0] and state.interval_images == 0


@pytest.mark.parametrize('parts', [3, 8])
def test_gradient_accumulation_equals_the_gradient_of_the_batch(parts):
    whole, accumulated = make_state(), make_state()
    for state, n in ((whole, 1), (accumulated, parts)):
        state.model.eval()  # so that the parts share their statistics
        train_step(state, *batch(8), autocast=NO_AUTOCAST, grad_accum=n)
    torch.testing.assert_close([p.grad for p in accumulated.model.parameters()],
                               [p.grad for p in whole.model.parameters()], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(accumulated.sums, whole.sums)


SHAPES = [(8, 3, 8, 8), (5, 3, 8, 8)]  # of the batches below


def step_and_state(argv=(), device='cpu', precision='fp32', **model):
    """The step and the state that train.py makes from flags."""
    args = parse_flags([*argv, '--device', device])
    torch.manual_seed(args.seed)
    net = densenet.densenet_cifar(10, 4, **{'drop_rate': 0.2, **model}).to(device).train()
    state = train.make_state(args, net, torch.device(device), precision)
    autocast = make_autocast(precision, torch.device(device))
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
def test_a_dry_run_changes_nothing(optimizer, precision):
    argv = ['--optimizer', optimizer]
    (step, state), (other_step, other) = (step_and_state(argv, precision=precision)
                                          for _ in range(2))
    places = [tensor.data_ptr() for tensor in state.model.state_dict().values()]
    for _ in range(2):  # before there is any state, and again
        with state.dry_run():
            for _ in range(3):
                step(*batch(8, seed=9))
        assert places == [tensor.data_ptr() for tensor in state.model.state_dict().values()]
        torch.testing.assert_close(train_some(step, state), train_some(other_step, other),
                                   rtol=0, atol=0)


@pytest.mark.parametrize('name', [
    'Adadelta', 'Adafactor', 'Adagrad', 'Adam', 'Adamax', 'AdamW', 'ASGD', 'NAdam', 'RAdam',
    'RMSprop', 'Rprop'])
def test_initialization_and_a_dry_run_leave_torchs_optimizers_unchanged(name):
    weights = []
    for rehearsed in (True, False):
        state = make_state()
        state.optimizer = getattr(torch.optim, name)(state.model.parameters())
        if rehearsed:
            initialize_optimizer(state.optimizer)
            with state.dry_run():
                for seed in (5, 6):
                    train_step(state, *batch(seed=seed), autocast=NO_AUTOCAST)
        for seed in range(3):
            train_step(state, *batch(seed=seed), autocast=NO_AUTOCAST)
        weights.append(state.model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


def test_the_generator_of_another_type_of_device_is_saved_and_restored(monkeypatch):
    seeds, state = [], make_state()
    mps = SimpleNamespace(get_rng_state=lambda: torch.tensor([7]), set_rng_state=seeds.append)
    monkeypatch.setattr(torch, 'get_device_module', {'mps': mps}.get)
    state.sums = SimpleNamespace(device=torch.device('mps'))
    saved, cpu = state.random_state(), torch.get_rng_state()
    torch.rand(1)
    state.set_random_state(saved)
    assert [seed.tolist() for seed in seeds] == [[7]] and torch.equal(torch.get_rng_state(), cpu)
    state.set_random_state({'cpu': cpu, 'cuda': None})  # of a run on a CPU, also an older one
    assert len(seeds) == 1


def test_the_sums_survive_a_change_of_the_number_of_processes(monkeypatch):
    saved = []
    for rank, sums in enumerate(([3.0, 2.0], [4.0, 1.0])):
        state = make_state()
        state.sums.copy_(torch.tensor(sums))
        torch.manual_seed(rank)
        saved.append(state.rank_state())
    saved = make_state().state_dict(saved)
    for processes, expected in ((1, [[7, 3]]), (2, [[3, 2], [4, 1]]),
                                (3, [[7, 3], [0, 0], [0, 0]])):
        for rank in range(processes):
            state = make_state()
            torch.manual_seed(9)
            monkeypatch.setattr(checkpoint.distributed, 'rank', lambda rank=rank: rank)
            monkeypatch.setattr(checkpoint.distributed, 'world_size', lambda n=processes: n)
            loader = SimpleNamespace(num_images=0, digest='')
            checkpoint.resume(state, {**saved, 'args': {}, 'dataset': {'image_size': 32}},
                              flags_of('--image-size 32'), loader, loader)
            assert state.sums.tolist() == expected[rank]
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
    """A stand-in for CUDA graphs: capturing runs the step, and replaying does nothing."""
    for name in ('CUDAGraph', 'Stream', 'current_stream', 'graph_pool_handle'):
        monkeypatch.setattr(torch.cuda, name, Mock(side_effect=lambda: Mock()))
    for name in ('stream', 'graph'):
        monkeypatch.setattr(torch.cuda, name, lambda *args, **kwargs: contextlib.nullcontext())


def pretended_state_on_cuda():
    return SimpleNamespace(model=Mock(), sums=SimpleNamespace(device=torch.device('cuda')),
                           scaler=torch.amp.GradScaler('cpu', enabled=False))


def test_each_shape_has_a_graph_and_a_static_batch(pretended_cuda):
    step, state = step_and_state()
    truth = train_some(*step_and_state())
    graphed = train.CudaGraphStep(step, state, SHAPES)
    for shape, graph in graphed.graphs.items():
        graph.replay.side_effect = functools.partial(step, *graphed.batches[shape])
    torch.testing.assert_close(train_some(graphed, state), truth, rtol=0, atol=0)
    assert [graphed.graphs[shape].replay.call_count for shape in SHAPES] == [4, 1]


@pytest.mark.parametrize('message, kind, said', [
    ('operation not permitted when stream is capturing', UserError,
     r'^the step can\'t be captured as a CUDA graph \(operation not permitted when stream is '
     r'capturing\): give --no-cuda-graph$'),
    ('CUDA out of memory.', torch.OutOfMemoryError, '^CUDA out of memory')])
def test_a_failed_capture_reports_the_first_error(pretended_cuda, monkeypatch, message,
                                                              kind, said):
    class Graph:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            pass

        def __exit__(self, *_):
            raise RuntimeError('operation failed due to a previous error during capture')

    def step(images, labels):
        calls.append(images)
        if len(calls) > 6:  # after the warm-up
            raise (torch.OutOfMemoryError if 'memory' in message else RuntimeError)(
                f'{message}\nMore about it.')

    calls = []
    monkeypatch.setattr(torch.cuda, 'graph', Graph)
    _, state = step_and_state()
    with pytest.raises(kind, match=said):
        train.CudaGraphStep(step, state, SHAPES)


def replays_nothing(step, state, batch):
    pass


def replays_the_step(step, state, batch):
    step(*batch)


def replays_another_rate(step, state, batch):
    train.set_learning_rate(state.optimizer, 0.08)
    step(*batch)
    train.set_learning_rate(state.optimizer, 0.1)


def replays_in_eval_mode(step, state, batch):
    state.model.eval()
    step(*batch)
    state.model.train()


def replays_other_images(step, state, batch):
    step(batch[0] / 2, batch[1])


def replays_without_sums(step, state, batch):
    sums = state.sums.clone()
    step(*batch)
    state.sums.copy_(sums)


@pytest.mark.parametrize('replay', [
    replays_the_step, replays_nothing, replays_another_rate, replays_in_eval_mode,
    replays_other_images, replays_without_sums])
def test_a_graph_is_compared_with_the_step(pretended_cuda, replay):
    step, state = step_and_state()
    graphed = train.CudaGraphStep(step, state, SHAPES)
    before, random_state = copy.deepcopy(state.state_dict()), torch.get_rng_state()
    first, last = (functools.partial(function, step, state, graphed.batches[shape])
                   for function, shape in zip((replays_the_step, replay), SHAPES))
    graphed.graphs[SHAPES[0]].replay.side_effect = first
    graphed.graphs[SHAPES[1]].replay.side_effect = last  # a wrong graph is found for any shape
    assert graphed.agrees() == (replay is replays_the_step)
    torch.testing.assert_close(state.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), random_state)


def test_a_graph_that_differs_from_the_step_is_not_used(monkeypatch, capsys):
    for agrees in (True, False):
        graphed = Mock(agrees=Mock(return_value=agrees))
        monkeypatch.setattr(train, 'CudaGraphStep', Mock(return_value=graphed))
        step = train.make_step(flags_of(), pretended_state_on_cuda(), SHAPES, NO_AUTOCAST)
        assert step is graphed if agrees else step.func is train_step
    said = capsys.readouterr().out
    assert 'no CUDA graph: its results differ from those of an eager step' in said


def test_a_missing_graph_is_explained_if_one_was_requested(capsys):
    step, _ = step_and_state(['--cuda-graph'])
    assert not isinstance(step, train.CudaGraphStep)
    assert capsys.readouterr().out == 'no CUDA graph: the device is cpu\n'
    for argv in ([], ['--no-cuda-graph']):
        step_and_state(argv)
        assert capsys.readouterr().out == ''


def test_no_graph_for_several_processes(capsys, monkeypatch):
    monkeypatch.setattr(train.distributed, 'world_size', lambda: 2)
    monkeypatch.setattr(train.distributed, 'wrap', lambda model: model)
    monkeypatch.setattr(train, 'warm_up_ddp', lambda *_: None)
    step = train.make_step(flags_of(), pretended_state_on_cuda(), SHAPES, NO_AUTOCAST)
    assert step.func is train_step
    assert 'no CUDA graph: several processes' in capsys.readouterr().out


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
    outputs = []
    loss, error, error5, balanced_error, num_classes, auc = evaluate(model, batches, NO_AUTOCAST,
                                                                     outputs=outputs, auc=True)
    truth = []
    for images, labels in batches:
        for image, label in zip(images, labels):
            with torch.no_grad():
                logits = model(image.view(-1, 3, 8, 8)).mean(0).double().numpy()
            rank = (logits > logits[label]).sum()
            truth.append((np.log(np.exp(logits).sum()) - logits[label], rank > 0, rank > 4))
    expected = np.mean(truth, 0) * (1, 100, 100)
    np.testing.assert_allclose((loss, error, error5), expected, rtol=1e-5)
    labels, logits = map(torch.cat, zip(*outputs))
    areas = [sklearn.metrics.roc_auc_score(labels == c, logits.softmax(1)[:, c])
             for c in labels.unique()]
    assert math.isclose(auc, np.mean(areas), rel_tol=1e-6)
    losses = -logits.log_softmax(1)[range(11), labels]
    np.testing.assert_allclose(losses, [loss for loss, *_ in truth], rtol=1e-4)
    of_classes = [[wrong for (_, wrong, _), label in zip(truth, labels) if label == c]
                  for c in range(classes)]
    assert num_classes == classes
    assert math.isclose(balanced_error, 100 * np.mean([np.mean(c) for c in of_classes if c]),
                        rel_tol=1e-5)


def test_balanced_weights_count_a_rare_class_as_often_as_a_frequent_one():
    counts = torch.tensor([90, 9, 1])
    labels = torch.arange(3).repeat_interleave(counts)
    logits = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    weights = losses.balanced_class_weights(labels, 3)
    ours = F.cross_entropy(logits, labels, weights, reduction='sum') / 100
    of_classes = F.cross_entropy(logits, labels, reduction='none').split(counts.tolist())
    torch.testing.assert_close(ours, torch.stack([loss.mean() for loss in of_classes]).mean())


@pytest.mark.parametrize('multi_label', [False, True])
def test_class_weights_reach_the_gradients(multi_label):
    state, (images, labels) = make_state(), batch()
    weights = torch.linspace(0.1, 5, 10)
    if multi_label:
        labels = F.one_hot(labels, 10).float()
        loss = torch.nn.BCEWithLogitsLoss(pos_weight=weights)
    else:  # not the mean of torch, which divides by the sum of the weights
        loss = lambda logits, labels: torch.nn.CrossEntropyLoss(
            weights, reduction='sum')(logits, labels) / len(labels)
    model = copy.deepcopy(state.model)
    loss(model(images), labels).backward()
    step = train.make_step(flags_of('--device cpu'), state, [images.shape], NO_AUTOCAST, weights,
                           multi_label)
    step(images, labels)
    for name, parameter in state.model.named_parameters():
        torch.testing.assert_close(parameter.grad, model.get_parameter(name).grad, rtol=1e-4,
                                   atol=1e-6)


def test_a_loss_that_is_not_finite_is_noticed_when_a_row_is_written():
    state, (images, labels) = make_state(), batch()
    run = make_run(state, '--print-freq 3')
    state.epoch, state.step = 4, 69
    for i in range(6):
        scale = math.inf if i == 4 else 1.0
        train_step(state, images * scale, labels, autocast=NO_AUTOCAST)
        state.count_step(len(images))
        if i == 2:
            run.interval_means()
    with pytest.raises(UserError, match='the loss of steps 73 to 75 in epoch 4 is not finite, and '
                                        'the first bad parameter is features.conv0.weight: try a '
                                        'lower --lr'):
        run.interval_means()


def test_the_first_bad_parameter_is_named():
    model = make_state().model
    for weight in model.parameters():
        weight.data.mul_(1e20)
    assert checkpoint.first_not_finite(model) is None  # however large, if their squares overflow
    names = ['features.denseblock2.denselayer1.conv1.weight', 'features.denseblock1.denselayer1.'
             'norm1.running_var']
    for name, value in zip(names, (math.inf, math.nan)):
        model.state_dict()[name].view(-1)[1] = value
        assert checkpoint.first_not_finite(model) == name


def test_gradients_that_overflow_in_fp16_are_handled_by_the_scaler():
    state = make_state()
    state.scaler = torch.amp.GradScaler('cpu', init_scale=1024.0)
    calls = iter(range(9))
    state.model.classifier.bias.register_hook(lambda grad: grad / (next(calls) > 0))
    before = copy.deepcopy(dict(state.model.named_parameters()))
    train_step(state, *batch(), autocast=NO_AUTOCAST)
    assert state.scaler.get_scale() == 512
    torch.testing.assert_close(dict(state.model.named_parameters()), before, rtol=0, atol=0)
    for _ in range(2):
        train_step(state, *batch(), autocast=NO_AUTOCAST)
    assert state.sums.isfinite().all()
    assert (state.model.classifier.bias != before['classifier.bias']).any()


# ---- whole runs ------------------------------------------------------------------------------

@pytest.mark.parametrize('precision', ['bf16', 'fp16'])
def test_autocast_precisions_keep_fp32_weights(small, tmp_path, precision):
    train.main([*small, '--epochs', '1', '--precision', precision, '--save', str(tmp_path / 'x')])
    saved = checkpoint.load(tmp_path / 'x/latest.pth')
    assert {p.dtype for p in saved['model'].values()} == {torch.float32, torch.int64}
    assert ('scale' in saved['scaler']) == (precision == 'fp16')
    assert json.loads((tmp_path / 'x/args.json').read_text())['precision'] == precision


def test_memorizes_64_images(tmp_path):
    data, run = tmp_path / 'data', tmp_path / 'run'
    write_images(data, {f'train/label{i}': 16 for i in range(4)})  # of noise: nothing to generalize
    shutil.copytree(data / 'train', data / 'val')
    train.main(['--dataset', 'folder', '--data', str(data), '--no-augment', '--depth', '10',
                '--epochs', '30', '--batch-size', '8', '--save', str(run), '--no-plot',
                '--device', 'cpu'])
    for name in ('train.csv', 'test.csv'):
        assert float(read_csv(run / name)[-1]['error']) == 0


def test_a_small_net_learns_the_shapes(tmp_path):
    train.main(['--dataset', 'shapes', '--depth', '10', '--growth-rate', '8', '--epochs', '1',
                '--batch-size', '32', '--lr-schedule', 'cosine', '--save', str(tmp_path),
                '--device', 'cpu', '--no-plot'])
    row = read_csv(tmp_path / 'test.csv')[-1]
    assert float(row['error']) < 70  # chance: 90; linear classifiers: over 70 (tests/test_data.py)
    rows = read_csv(tmp_path / 'train.csv')
    assert [row['epoch'] for row in rows] == ['0.26596', '0.53191', '0.79787', '1.00000']


ON_A_TERMINAL = '''
import fcntl, os, pty, struct, sys, termios
pid, terminal = pty.fork()
if pid == 0:
    try:
        fcntl.ioctl(1, termios.TIOCSWINSZ, struct.pack('4H', 24, 200, 0, 0))  # lines, columns
        import train
        train.cli(sys.argv[1:])
    finally:
        os._exit(0)
try:
    while chunk := os.read(terminal, 1000):
        os.write(1, chunk)
except OSError:  # the end
    pass
os.waitpid(pid, 0)
'''


def test_on_a_terminal_a_bar_stands_in_for_the_log_lines(small, tmp_path):
    shown = [forked.run(script, [*small, '--epochs', '2', '--save', tmp_path / name]).stdout
             for name, script in (('terminal', ON_A_TERMINAL), ('file', RUN))]
    assert re.search(r'epoch 2/2 .*9/9.* loss \d\.\d+, error .* images/s', shown[0])
    assert 'step 9/9' in shown[1] and '%|' not in shown[1] and 'step 9/9' not in shown[0]
    for text in shown:
        assert len(re.findall(r'epoch \d/2  train loss .* test loss', text)) == 2
        assert re.search(r'final error .*; everything is in ', text.splitlines()[-1])
    rows = [[(row['epoch'], row['loss'], row['error']) for row in read_csv(
        tmp_path / name / 'train.csv')] for name in ('terminal', 'file')]
    assert rows[0] == rows[1] and len(rows[0]) == 6


def test_the_lowest_loss_can_choose_the_best_weights(small, tmp_path):
    train.main([*small, '--epochs', '6', '--lr', '0.3', '--best-by', 'loss', '--save',
                str(tmp_path)])
    rows = read_csv(tmp_path / 'test.csv')
    best = [min(rows, key=lambda row: float(row[name]))['epoch'] for name in ('loss', 'error')]
    assert best[0] != best[1]  # or this run would prove nothing
    assert checkpoint.load(tmp_path / 'best.pth')['best_epoch'] == int(best[0])


def test_a_compiled_run_is_not_fused_and_says_so(small, tmp_path, monkeypatch, capsys):
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, 'compile', functools.partialmethod(
        compile, backend='aot_eager'))  # inductor takes minutes
    argv = [*small, '--no-augment', '--epochs', '1', '--save']
    train.main([*argv, str(tmp_path / 'compiled'), '--compile'])
    assert 'run without fuse' in capsys.readouterr().err
    train.main([*argv, str(tmp_path / 'fused')])
    records = [json.loads((tmp_path / name / 'args.json').read_text())
               for name in ('compiled', 'fused')]
    assert records[0]['cpu_kernels'] is None and records[0]['not_fused'] == 'compiled'
    losses = [[float(row['loss']) for row in read_csv(tmp_path / name / 'train.csv')]
              for name in ('compiled', 'fused')]
    np.testing.assert_allclose(*losses, rtol=1e-3)
    assert {*checkpoint.load(tmp_path / 'compiled/latest.pth')['model']} == {
        *checkpoint.load(tmp_path / 'fused/latest.pth')['model']}


def test_each_step_has_its_own_learning_rate(small, tmp_path, monkeypatch):
    def spy(state, *args, **kwargs):
        steps.append((state.optimizer.param_groups[0]['lr'], state.model.training))
        return train_step(state, *args, **kwargs)

    steps, argv = [], ['--epochs', '2', '--lr-schedule', 'cosine', '--warmup-epochs', '1']
    monkeypatch.setattr(train, 'train_step', spy)
    train.main([*small, *argv, '--save', str(tmp_path / 'run')])
    args = parse_flags([*small, *argv])
    rates = [learning_rate(args, 1 + i // 9, i % 9 / 9) for i in range(18)]
    assert steps == [(rate, True) for rate in rates]
    assert [row['lr'] for row in read_csv(tmp_path / 'run/train.csv')] == [
        f'{rate:.6g}' for rate in rates[2::3]]


def test_evaluation_uses_micro_batches(small, tmp_path, monkeypatch):
    make_loader = Mock(wraps=train.loaders.make_loader)
    monkeypatch.setattr(train.loaders, 'make_loader', make_loader)
    train.main([*small, '--epochs', '1', '--grad-accum', '3', '--save', str(tmp_path / 'run')])
    assert [(call.args[1], call.kwargs['batch_size']) for call in make_loader.call_args_list] == [
        ('train', 4), ('test', 2)]


def test_the_seed_decides_the_weights_and_the_order(small, tmp_path):
    weights = {}
    for name, seed in (('a', '1'), ('b', '1'), ('c', '2')):
        train.main([*small, '--epochs', '1', '--seed', seed, '--save', str(tmp_path / name)])
        weights[name] = checkpoint.load(tmp_path / name / 'latest.pth')['model']
    torch.testing.assert_close(weights['a'], weights['b'], rtol=0, atol=0)
    start = weights['a']['features.conv0.weight'] - weights['c']['features.conv0.weight']
    assert start.abs().max() > 0.1  # further apart than nine steps can bring them


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


@pytest.mark.usefixtures('no_figures')
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
    train.main([*small, '--evaluate', '--pretrained', str(tmp_path / 'old/best.pth'), '--save',
                str(tmp_path / 'tested')])
    error = read_csv(tmp_path / 'old/test.csv')[0]['error']
    assert f'error {float(error):.2f}%' in capsys.readouterr().out


def test_negative_values_in_scientific_notation():
    args = flags.complete(flags.parse(['--value-range', '-3e-5', '-1E-05']))
    assert args.value_range == [-3e-5, -1e-5]


def test_a_report_on_other_weights_or_data_has_a_directory_of_its_own():
    def directory(*argv, **saved):
        given, saved = flags.parse(argv), {'dataset': 'folder', 'data': 'a', **saved}
        return checkpoint.other_data(given, saved), flags.run_directory(flags.complete(given))

    assert directory('--evaluate', '--pretrained', '--dataset', 'imagenet')[1] == Path(
        'work/imagenet.pretrained')
    for argv, others in (([], ''), (['--data', './a'], ''), (['--data', '/x/b.c/'], 'b.c'),
                         (['--labels', 'x/y.csv'], 'y'), (['--dataset', 'svhn'], 'svhn'),
                         (['--labels', 'y.csv', '--data', 'b.c'], 'b.c-y')):
        assert directory('--resume', 'r/best.pth', '--evaluate', *argv)[0] == others


@pytest.mark.usefixtures('no_figures')
def test_other_data_do_not_replace_the_report_of_a_run(folder, small, tmp_path):
    run = tmp_path / 'run'
    train.main([*small, '--epochs', '1', '--save', str(run)])
    train.main(['--evaluate', '--save', str(run), '--resume'])
    before = (run / 'metrics.json').read_bytes()
    shutil.copytree(folder, tmp_path / 'hospital2')
    train.main(['--evaluate', '--resume', str(run / 'best.pth'), '--data',
                str(tmp_path / 'hospital2')])
    assert (run / 'metrics.json').read_bytes() == before
    assert 'hospital2' in (run / 'on-hospital2/metrics.json').read_text()


@pytest.mark.usefixtures('no_figures')
def test_torchvisions_weights_through_its_own_cache(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, 'download_url_to_file', raise_no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    large = ['--dataset', 'folder', '--data', folder, '--image-size', 65, '--arch', 'densenet121',
             '--pretrained', '--evaluate', '--batch-size', 4, '--workers', 0, '--save', tmp_path]
    # torch before 2.7 also says what it downloads.
    assert 'could not download' in fails(capsys, *large, lines=2)
    cache_densenet121(tmp_path, torchvision.models.densenet121(num_classes=4))
    train.main(list(map(str, large)))
    assert 'balanced error' in capsys.readouterr().out


# ---- output of a run -------------------------------------------------------------------------

@pytest.mark.usefixtures('no_figures')
def test_a_run_prints_where_its_files_are(small, tmp_path, capsys):
    run, argv = tmp_path / 'run', [flag for flag in small if flag != '--no-plot']
    train.main([*argv, '--epochs', '2', '--save', str(run)])
    assert set(os.listdir(run)) == {'args.json', 'train.csv', 'test.csv', 'latest.pth',
                                    'latest.pth.1', 'best.pth', 'loss.png', 'error.png',
                                    'loss-error.png'}
    output = capsys.readouterr().out.splitlines()
    rows = read_csv(run / 'test.csv')
    best = min(rows, key=lambda row: float(row['error']))
    errors, rest = output[-1].split(', after 0:0')
    assert errors == (f'final error {float(rows[-1]["error"]):.2f}% (epoch 2), best '
                      f'{float(best["error"]):.2f}% (epoch {best["epoch"]}), chosen on the test '
                      f'images')
    assert re.fullmatch(rf'\d:\d\d; everything is in {run}', rest)
    assert output[-2].split()[1:] == [str(run / f'{name}.png')
                                      for name in ('loss', 'error', 'loss-error')]
    train.main(['--evaluate', '--resume', str(run / 'latest.pth'), '--device', 'cpu'])
    printed = capsys.readouterr().out
    assert f'error {float(rows[-1]["error"]):.2f}%\n' in printed
    assert printed.endswith(f'predictions.csv and their figures are in {run}\n')
    wrong = [int(row['error']) for row in read_csv(run / 'predictions.csv')]
    assert math.isclose(100 * np.mean(wrong), float(rows[-1]['error']), rel_tol=1e-5)


def test_the_time_that_the_loop_waits_for_its_loader(tmp_path, monkeypatch, capsys):
    def sleeping_loader():
        for seconds in (3.0, 3.0, 0.0, 0.0):
            clock.sleep(seconds)
            yield torch.zeros(4, 3, 8, 8), torch.zeros(4)

    clock = Clock()
    monkeypatch.setattr(runlog, 'time', clock)
    log = RunLog(tmp_path, steps_per_epoch=4, epochs=10, figures=False)
    for epoch in (1, 2):
        log.start_epoch(epoch)
        for step, (images, _) in enumerate(log.watch(sleeping_loader())):
            clock.sleep(1.0)  # the step
            log.advance(len(images))
            if step in (1, 3):
                log.train_row(2.5, 75.0, 0.1)
        clock.sleep(50.0)  # the evaluation
    log.close()
    assert (tmp_path / 'train.csv').read_text().splitlines()[1:] == [
        '0.50000,2.5,75,0.1,1.0,75.0', '1.00000,2.5,75,0.1,4.0,0.0',
        '1.50000,2.5,75,0.1,1.0,75.0', '2.00000,2.5,75,0.1,4.0,0.0']
    assert capsys.readouterr().out.splitlines()[0] == (
        'epoch 1/10  step 2/4  loss 2.5000  error 75.00%  lr 0.1  1 images/s, 75% waiting for '
        'data  0:02:32 left')


class Clock:
    """Stands in for the module `time`; only `sleep` advances it."""

    now = 0.0

    def sleep(self, seconds):
        self.now += seconds

    def perf_counter(self):
        return self.now

    monotonic = perf_counter


def test_a_run_survives_a_closed_output(small, tmp_path):
    full = 'import os; os.dup2(os.open("/dev/full", os.O_WRONLY), 1); os.dup2(1, 2)\n' + RUN
    argv = [*small, '--epochs', 2, '--save', tmp_path / 'run']
    assert forked.run(full, argv).returncode == 0
    assert len(read_csv(tmp_path / 'run/test.csv')) == 2
    assert forked.run(full, argv).returncode == 2  # it is there already


def test_tensorboard_has_the_curves(recipe, uninterrupted, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / 'run'
    train.main([*recipe, '--tensorboard', '--save', str(run)])
    assert_same_run(run, uninterrupted)
    events = EventAccumulator(str(run / 'tensorboard')).Reload()
    assert set(events.Tags()['scalars']) == {'train_loss', 'train_acc', 'val_loss', 'val_acc'}
    rows = read_csv(run / 'test.csv')
    errors = [float(row['error']) for row in rows]
    np.testing.assert_allclose([e.value for e in events.Scalars('val_loss')],
                               [float(row['loss']) for row in rows], rtol=1e-4)
    np.testing.assert_allclose([100 - e.value for e in events.Scalars('val_acc')], errors,
                               rtol=1e-4)
    columns = [[float(row[name]) for row in read_csv(run / 'train.csv')]
               for name in ('loss', 'error')]
    loss, error = np.reshape(columns, (2, 4, 3)).mean(2)  # of the three rows of an epoch
    np.testing.assert_allclose([e.value for e in events.Scalars('train_loss')], loss, rtol=1e-4)
    np.testing.assert_allclose([100 - e.value for e in events.Scalars('train_acc')], error,
                               rtol=1e-4)


def test_tensorboard_on_a_full_disk_is_one_line(small, tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    monkeypatch.setattr(SummaryWriter, 'add_scalar', Mock(side_effect=OSError(28, 'No space')))
    argv = [*small, '--epochs', '2', '--tensorboard', '--save', tmp_path / 'run']
    assert fails(capsys, *argv) == 'train.py: error: No space'


def test_a_failing_plot_is_one_warning(small, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runlog, '__file__', str(tmp_path / 'training' / 'runlog.py'))
    (tmp_path / 'plot.py').write_text('raise ValueError("no ink")')
    argv = [flag for flag in small if flag != '--no-plot']
    train.main([*argv, '--save', str(tmp_path / 'run'), '--epochs', '3'])
    output, errors = capsys.readouterr()
    assert 'figures:' not in output
    warning, command = errors.splitlines()[0].removesuffix(' says why').split(' drawn: ')
    assert warning == 'train.py: warning: the figures were not' and errors.count('\n') == 1
    ended = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert 'ValueError: no ink' in ended.stderr


# ---- wrong input -----------------------------------------------------------------------------

@pytest.mark.parametrize('argv, message', [
    (['--dataset', 'mnist'], r"invalid choice: 'mnist' \(choose from .*shapes"),
    (['--arch', 'resnet50'], 'resnet50.*densenet121'),
    (['--nonsense', '3'], 'error: there is no --nonsense$'),
    (['--num-workers=4'], 'there is no --num-workers: did you mean --workers'),
    (['--gpu', '0'], 'there is no --gpu: did you mean --device cuda, on the GPU that CUDA_VIS'),
    (['--depth', '99'], 'nearest 94 and 100'),
    (['--depth', '41', '--no-bottleneck'], 'nearest 40 and 43'),
    (['--depth', '40', '--arch', 'densenet121'], '--arch: not allowed with argument --depth'),
    (['--depth', '1000000000'], r'not a whole number in \[1, 10000\]'),
    (['--growth-rate', '0'], r'0.* is not a whole number in \[1, 1000000000\]'),
    (['--growth-rate', '1.5'], 'not a whole number'),
    (['--batch-size', '0'], 'not a whole number'),
    (['--epochs', '-3'], 'not a whole number'),
    (['--workers', '-1'], 'not a whole number'),
    (['--drop-rate', '1'], r'not a number in \[0, 1\)'),
    (['--drop-rate', 'nan'], r'not a number in \[0, 1\)'),
    (['--compression', '0'], r'not a number in \(0, 1\]'),
    (['--lr', 'inf'], 'not a number'),
    (['--seed', str(2**32)], 'not a whole number'),
    (['--grad-accum', '65'], 'at least --grad-accum 65 times 1 processes'),
    (['--freeze-features'], '--freeze-features needs a model: --resume .* or --pretrained'),
    (['--pretrained', '--arch', 'densenet264'], 'which are for --arch densenet121, densenet161'),
    (['--start-epoch', '301'], 'after the last, 300'),
    (['--image-size', '48'], '--image-size are only for folder and imagenet'),
    (['--evaluate', '--name', 'x'], '--evaluate needs a model: --resume for the one in work/x, '),
    (['--value-range', '5', '5'], 'LOW must be less than HIGH'),
    (['--value-range', '0', 'nan'], "'nan' is not a number"),
    (['--evaluate', '--resume'], 'work/cifar10.base/latest.pth is not there'),
    (['--reset-classifier'], '--reset-classifier needs --pretrained'),
    (['--evaluate', '--pretrained', '--reset-classifier'], 'a classifier without training'),
    (['--pretrained'], 'torchvision.s weights, .* images of more than 64 pixels'),
    (['--resume', '--overwrite'], 'not allowed with'),
    (['--resume', 'nowhere.pth'], 'nowhere.pth is not there'),
    (['--dataset', 'shapes', '--block-config', '1', '1', '1', '1', '1', '1', '1'], 'at least 64'),
    (['--dataset', 'shapes', '--growth-rate', '1000', '--bn-size', '1000000000'],  # petabytes
     'no such model: .* memory'),
    (['--precision', 'tf32', '--device', 'cpu'], 'tf32 is for cuda'),
])
def test_wrong_flags(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert re.search(message, fails(capsys, *argv))
    assert not any((tmp_path / 'work').glob('*'))


def test_cuda_where_there_is_none(capsys):
    assert '--device cuda' in fails(capsys, '--device', 'cuda')


def test_missing_data_sets_say_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('urllib.request.urlopen', raise_no_network)
    error = fails(capsys, '--dataset', 'cifar10')
    assert 'cifar-10-python.tar.gz' in error and '--dataset shapes' in error
    assert 'no train in nowhere' in fails(capsys, '--dataset', 'imagenet', '--data', 'nowhere')


@pytest.mark.parametrize('error', [
    torch.OutOfMemoryError('CUDA out of memory.\nTried to'), MemoryError(),
    RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_running_out_of_memory_names_the_flags_that_need_less(
        small, tmp_path, monkeypatch, capsys, error):
    expected = ('train.py: error: out of memory: give --memory-efficient, a lower --batch-size, a '
                'higher --grad-accum, --precision bf16, fewer --workers, smaller images or a '
                'smaller network')
    monkeypatch.setattr(train, 'train_step', Mock(side_effect=error))
    assert fails(capsys, *small, '--save', tmp_path / 'run') == expected
    monkeypatch.setattr('training.evaluation.evaluate', Mock(side_effect=error))
    assert fails(capsys, '--evaluate', '--resume', tmp_path / 'run/latest.pth') == expected
    monkeypatch.setattr(networks, 'build', Mock(side_effect=error))
    assert fails(capsys, *small, '--save', tmp_path / 'other') == expected


def test_bugs_keep_their_traceback(small, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'train_step', Mock(side_effect=RuntimeError('a defect')))
    with pytest.raises(RuntimeError, match='a defect'):
        train.cli([*small, '--save', str(tmp_path / 'run')])


def test_a_killed_worker_is_a_one_line_error(tmp_path):
    write_images(tmp_path, {'train/a': 20, 'train/b': 20, 'val/a': 1}, (66, 66))
    script = interrupted('learning_rate', 3, """
        for child in open(f'/proc/self/task/{os.getpid()}/children').read().split():
            os.kill(int(child), 9)""")
    argv = ['--dataset', 'folder', '--data', tmp_path, '--image-size', 66, '--block-config', 1, 1,
            '--growth-rate', 4, '--batch-size', 2, '--workers', 2, '--device', 'cpu', '--no-plot',
            '--save', tmp_path / 'run']
    ended = forked.run(script, argv)
    assert ended.returncode == 2, ended.stderr
    line, = ended.stderr.splitlines()
    assert 'a worker process has died' in line and 'fewer --workers' in line


@pytest.mark.parametrize('error', [ConnectionResetError(104, 'reset by peer'), EOFError()])
@pytest.mark.parametrize('reader', [
    'loaders.MemoryLoader.__iter__', 'image_files.checked'])  # in a step, at the start
def test_a_worker_that_dies_during_a_read_is_a_one_line_error(
        small, tmp_path, monkeypatch, capsys, reader, error):
    monkeypatch.setattr(f'training.{reader}', Mock(side_effect=error))
    assert 'a worker process has died' in fails(
        capsys, *small, '--save', tmp_path / 'run')


def test_a_second_dying_worker_does_not_interrupt_the_message(
        capsys, monkeypatch):
    before = signal.signal(signal.SIGCHLD, Mock(side_effect=RuntimeError('DataLoader worker')))
    monkeypatch.setattr(train, 'main', Mock(side_effect=ConnectionResetError(104, 'reset by peer')))
    try:
        assert 'a worker process has died' in fails(capsys)
        os.kill(os.getpid(), signal.SIGCHLD)
    finally:
        signal.signal(signal.SIGCHLD, before)


# ---- CUDA ------------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize('precision', ['fp32', 'tf32', 'bf16', 'fp16'])
def test_cuda_learns_the_shapes(tmp_path, precision):
    train.main(['--dataset', 'shapes', '--depth', '16', '--growth-rate', '8', '--epochs', '5',
                '--precision', precision, '--save', str(tmp_path / 'run'), '--no-plot'])
    assert float(read_csv(tmp_path / 'run/test.csv')[-1]['error']) < 10


@pytest.mark.cuda
@pytest.mark.parametrize('flag', ['--cuda-graph', '--no-cuda-graph'])
def test_out_of_gpu_memory_is_a_one_line_error(tmp_path, flag):
    script = f'import torch; torch.cuda.set_per_process_memory_fraction(0.02); {RUN}'
    ended = forked.run(script, ['--dataset', 'shapes', '--batch-size', '3000', flag, '--no-plot',
                                '--save', tmp_path / 'run'])
    assert ended.returncode == 2
    assert re.fullmatch('train.py: error: out of memory: give --memory-efficient, .*\n',
                        ended.stderr)


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
def test_a_cuda_graph_trains_like_the_eager_step(argv, precision, model, repeatable_kernels):
    results = []
    for flag in ('--cuda-graph', '--no-cuda-graph'):
        step, state = step_and_state([*argv, flag], 'cuda', precision, **model)
        assert isinstance(step, train.CudaGraphStep) == (flag == '--cuda-graph')
        results.append(train_some(step, state, 'cuda'))
    torch.testing.assert_close(results[0], results[1], rtol=1e-5, atol=1e-6)


@pytest.mark.cuda
def test_a_learning_rate_of_zero_stops_a_graph():
    step, state = step_and_state(device='cuda')
    assert isinstance(step, train.CudaGraphStep)
    before = copy.deepcopy(dict(state.model.named_parameters()))
    train.set_learning_rate(state.optimizer, 0.0)
    step(*(tensor.cuda() for tensor in batch()))
    torch.testing.assert_close(dict(state.model.named_parameters()), before, rtol=0, atol=0)
    assert state.sums[0] > 0


@pytest.mark.cuda
def test_no_graph_if_the_optimizer_syncs_with_the_host(capsys):
    step, _ = step_and_state(['--optimizer', 'rmsprop'], 'cuda', 'fp16')
    assert not isinstance(step, train.CudaGraphStep)
    assert 'rmsprop with fp16 synchronizes with the GPU' in capsys.readouterr().out
