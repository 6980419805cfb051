"""Whole runs of train.py on the pretended GPU: their output, files and operations."""

import contextlib
import functools
import json
import multiprocessing
import os
import signal
import socket
from unittest.mock import patch

import pytest
import torch
from conftest import fails, read_csv, write_images

import pretended_cuda
import train
from training import checkpoint

from .test_graph_step import (
    host_calls,
    on_the_python_side,
    out_of_memory,
    read_back,
    step_with,
    wait,
)

SMALL = ['--depth', '10', '--growth-rate', '4', '--batch-size', '4', '--print-freq', '3',
         '--no-plot']


@pytest.fixture
def small(folder, tmp_path):
    """Flags of a run of 9 steps an epoch."""
    return ['--dataset', 'folder', '--data', str(folder), *SMALL, '--save', str(tmp_path / 'run')]


@contextlib.contextmanager
def before_step(number, action):
    """A context in which something happens before a step, counted from 1."""
    original, calls = train.learning_rate, []

    def learning_rate(*args):
        calls.append(args)
        if len(calls) == number:
            action()
        return original(*args)

    with patch.object(train, 'learning_rate', learning_rate):
        yield


@pytest.mark.usefixtures('no_figures')
@pytest.mark.parametrize('argv', [
    [], ['--no-cuda-graph'], ['--precision', 'fp16', '--drop-rate', '0.2', '--optimizer', 'adam'],
    ['--memory-efficient', '--deterministic', '--batch-size', '5']])
def test_a_run_that_is_stopped_resumed_and_evaluated(argv, small, tmp_path, capsys):
    run = tmp_path / 'run'
    with before_step(14, lambda: os.kill(os.getpid(), signal.SIGTERM)):
        with pytest.raises(SystemExit) as exit_:
            train.main([*small, *argv, '--epochs', '2'])
    assert exit_.value.code == 143
    assert ('CUDA graph' in capsys.readouterr().out) == ('--no-cuda-graph' not in argv)
    before = checkpoint.load(run / 'latest.pth')
    assert before['step'] == 14 - (8 if '5' in argv else 9)
    random_states = []
    with before_step(1, lambda: random_states.append(torch.cuda.get_rng_state())):
        train.main(['--resume', '--save', str(run)])
    saved, = (process['rng']['cuda'] for process in before['processes'])
    assert torch.equal(random_states[0], saved)
    assert [row['epoch'] for row in read_csv(run / 'test.csv')] == ['1', '2']
    train.main(['--evaluate', '--resume', str(run / 'best.pth')])
    assert capsys.readouterr().out.endswith(f'predictions.csv and their figures are in {run}\n')
    assert pretended_cuda.problems() == []


@pytest.mark.parametrize('flag', ['--cuda-graph', '--no-cuda-graph'])
def test_no_sync_between_rows_of_the_log(flag, small):
    """From before step 3 to before step 6 no row is due, nor is anything tried out any more."""
    operations = []
    with before_step(3, pretended_cuda.start_recording), \
            before_step(6, lambda: operations.extend(pretended_cuda.end_recording())):
        train.main([*small, flag, '--print-freq', '9', '--epochs', '1'])
    assert [o.kind for o in operations].count('graph') == (3 if flag == '--cuda-graph' else 0)
    assert len(operations) > 20 and not host_calls(operations)
    assert all(o.ordered for o in operations)


def test_frozen_features_are_recorded_in_the_mode_they_are_trained_in(small, tmp_path):
    checkpoint.save(tmp_path / 'weights.pth', {
        'model': train.networks.build(train.flags.with_network(
            train.flags.complete(train.flags.parse(small)), 8), 4, 8).state_dict()})
    train.main([*small, '--epochs', '1', '--freeze-features', '--pretrained',
                str(tmp_path / 'weights.pth')])
    graphs = pretended_cuda.graphs()
    assert graphs and not any('collect_statistics' in o.name for nodes in graphs for o in nodes)


def test_photographs_are_copied_from_pinned_memory_while_the_gpu_works(tmp_path):
    root = write_images(tmp_path, {f'{split}/{label}': 6 for split in ('train', 'val')
                                   for label in 'ab'}, (90, 80))
    argv = ['--dataset', 'imagenet', '--data', str(root), '--image-size', '72', '--block-config',
            '1', '1', '--growth-rate', '4', '--batch-size', '4', '--epochs', '1', '--workers', '2',
            '--no-plot', '--save', str(tmp_path / 'run')]
    operations = []
    with before_step(2, pretended_cuda.start_recording), \
            before_step(3, lambda: operations.extend(pretended_cuda.end_recording())):
        train.main(argv)
    from_host = [o.name for o in operations if o.name.endswith('host to device')]
    assert from_host == 2 * ['pinned host to device']  # the third batch, and its labels
    assert not host_calls(operations)
    # The stream of copies need not wait; a batch is used after its copy.
    assert all(o.ordered for o in operations if o.name not in from_host)


def test_what_is_recorded_of_compiled_code_was_compiled_for_that_batch_size(small):
    def compile_with_a_note(graph, inputs):
        def run(*args):
            if torch.cuda.is_current_stream_capturing():
                recorded.append([value for value in inputs if isinstance(value, torch.SymInt)])
            return graph(*args)
        return run

    recorded = []
    with patch.object(torch.nn.Module, 'compile', functools.partialmethod(
            torch.nn.Module.compile, backend=compile_with_a_note)):
        train.main([*small, '--compile', '--epochs', '1', '--batch-size', '8'])  # the last has 4
    assert recorded and not any(recorded), recorded


# ---- user mistakes ---------------------------------------------------------------------------

@pytest.mark.parametrize('action, reason', [
    (read_back, '--no-cuda-graph'), (wait, '--no-cuda-graph'),
    (on_the_python_side, 'a check of torch on the host'), (out_of_memory, 'out of memory: give ')])
def test_a_failed_recording_ends_the_run(action, reason, small, capsys):
    """With torch 2.11 dropout fails then, and memory of other streams is never free again."""
    with step_with(action):
        assert reason in fails(
            capsys, *small, '--drop-rate', '0.2', '--epochs', '1')


def test_out_of_gpu_memory_is_a_one_line_error(small, capsys, monkeypatch):
    monkeypatch.setenv('PRETENDED_CUDA_GIB', '0.004')
    assert 'out of memory' in fails(capsys, *small, '--epochs', '1')


@pytest.mark.parametrize('capability, precision', [('75', 'tf32'), ('80', 'bf16')])
def test_bf16_is_the_default_on_gpus_that_have_it(capability, precision, small, tmp_path,
                                                  monkeypatch):
    monkeypatch.setenv('PRETENDED_CUDA_CAPABILITY', capability)
    train.main([*small, '--epochs', '1'])
    assert json.loads((tmp_path / 'run/args.json').read_text())['precision'] == precision


def test_a_gpu_that_torch_is_not_built_for_is_one_line(small, capsys, monkeypatch):
    monkeypatch.setenv('PRETENDED_CUDA_CAPABILITY', '61')
    line = fails(capsys, *small, '--epochs', '1')
    assert ('6.1' in line or 'sm_61' in line) and 'torch' in line


def test_a_driver_that_is_too_old_is_one_line(small, capsys, monkeypatch):
    monkeypatch.setenv('PRETENDED_CUDA_DRIVER', '12040')
    monkeypatch.setattr(torch.cuda, '_device_count_nvml', lambda: 1)  # with any driver
    assert 'driver' in fails(capsys, *small, '--device', 'cuda')


# ---- several processes -----------------------------------------------------------------------

def train_in_process(rank, port, argv, results):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE='2', LOCAL_WORLD_SIZE='2',
                      MASTER_ADDR='localhost', MASTER_PORT=str(port), TORCHELASTIC_RUN_ID='test',
                      TORCHELASTIC_RESTART_COUNT='0', PRETENDED_CUDA_DEVICES='2')
    # Both read the zeros that the processes have sent each other.
    with patch('torch.nn.parallel.distributed._verify_param_shape_across_processes'), \
            patch('torch.distributed.Reducer._rebuild_buckets', lambda _: False):
        operations = pretended_cuda.record(lambda: train.main(argv))
    results.put([o.name for o in operations if o.kind == 'collective'])


def test_two_processes_exchange_gradients_by_nccl(small, tmp_path):
    """As far as it goes: nothing is sent."""
    with socket.socket() as free:
        free.bind(('localhost', 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context('fork')
    results = context.Queue()
    argv = [*small, '--epochs', '1', '--no-augment', '--grad-accum', '2']
    processes = [context.Process(target=train_in_process, args=(rank, port, argv, results),
                                 daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        # The gradients, in one bucket, with the last micro-batch of each of 9 steps and of the one
        # before them that is undone; test results.
        assert results.get(timeout=50).count('ncclAllReduce') == 9 + 1 + 2
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/test.csv')] == ['1']
