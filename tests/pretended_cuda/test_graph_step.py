"""The recorded step: its kernels are an eager step's, and a call does no more than launch it."""

import contextlib
import itertools
from unittest.mock import patch

import pytest
import torch

import densenet
import pretended_cuda
import train
from fused_dense_block import unfuse
from training import checkpoint, flags, networks
from training.device import choose_precision, make_autocast, set_determinism

CUDA = torch.device('cuda')
SHAPES = [(4, 3, 8, 8), (2, 3, 8, 8)]  # the second is the last batch of an epoch
WORK = 'kernel', 'memset', 'copy', 'graph', 'collective'


def make_training(argv=(), precision='bf16', fused=True):
    """The flags, the state and the autocast of training a small network on the pretended GPU."""
    args = flags.complete(flags.parse(['--dataset', 'shapes', '--depth', '10', '--growth-rate', '4',
                                       '--batch-size', '4', *argv]))
    precision = choose_precision(precision, CUDA)
    set_determinism(args.deterministic)
    model = networks.build(flags.with_network(args, 8), 10, 8)
    model = train.prepare_model(model, args, CUDA)
    if not fused:
        unfuse(model)
    train.set_training_mode(model, args)
    state = train.make_state(args, model, CUDA, precision)
    return args, state, make_autocast(precision, CUDA)


def dense_blocks(model):
    return [module for module in model.modules() if isinstance(module, densenet.DenseBlock)]


def make_step(argv=(), *rest, **kwargs):
    args, state, autocast = make_training(argv, *rest, **kwargs)
    return train.make_step(args, state, SHAPES, autocast), state


def batch(shape):
    return torch.zeros(shape, device=CUDA), torch.zeros(shape[0], dtype=torch.int64, device=CUDA)


def work(operations):
    """The operations of the device as (kind, name), in order."""
    return [(o.kind, o.name) for o in operations if o.kind in WORK]


def host_calls(operations):
    """Operations that block the host: synchronizations, allocations, copies to host memory."""
    return [o for o in operations if o.kind not in WORK or o.name.endswith('host')]


def eager_operations(argv, *rest, **kwargs):
    """The operations of an eager step for each shape, after two warm-up steps each."""
    step, _ = make_step([*argv, '--no-cuda-graph'], *rest, **kwargs)
    batches = [batch(shape) for shape in SHAPES]
    for images_and_labels in 2 * batches:
        step(*images_and_labels)
    return [pretended_cuda.record(lambda one=one: step(*one)) for one in batches]


def check_graph(argv, *rest, **kwargs):
    """All that is to be true of a step that is recorded as a graph for each shape."""
    torch.zeros(1, device=CUDA)
    made = []
    building = pretended_cuda.record(lambda: made.append(make_step(argv, *rest, **kwargs)))
    (step, state), = made
    assert isinstance(step, train.CudaGraphStep)
    assert pretended_cuda.problems() == []
    assert all(operation.ordered for operation in building)

    pools = {segment['segment_pool_id'] for segment in torch.cuda.memory_snapshot()}
    assert len(pools - {(0, 0)}) == 1  # of all graphs; (0, 0) is the one of eager work

    graphs = pretended_cuda.graphs()
    assert all(operation.ordered for nodes in graphs for operation in nodes)
    warmed_up = next(o.stream for o in building if o.name == 'cudnnConvolutionForward')
    assert {operation.stream for nodes in graphs for operation in nodes} == {warmed_up}
    eager = eager_operations(argv, *rest, **kwargs)
    assert [work(nodes) for nodes in graphs] == [work(operations) for operations in eager]
    assert not any(host_calls(operations) for operations in [*graphs, *eager])

    rates = {id(group['lr']): group['lr'].data_ptr() for group in state.optimizer.param_groups}
    rate = pretended_cuda.record(lambda: train.set_learning_rate(state.optimizer, 0.05))
    assert len(work(rate)) == 1 and not host_calls(rate)  # in the memory that the graph reads
    assert rates == {id(group['lr']): group['lr'].data_ptr()
                     for group in state.optimizer.param_groups}
    for number, shape in enumerate(SHAPES):
        one = batch(shape)
        call = pretended_cuda.record(lambda one=one: step(*one))
        names = work(call)
        assert names[:2] == 2 * [('copy', 'device to device')]
        assert names[-1] == ('graph', str(number)) and not host_calls(call)
        # With dropout, the place in the random numbers is written into the graph's memory before.
        assert all('FillFunctor' in name for _, name in names[2:-1]) and len(names) <= 5
        assert all(operation.ordered for operation in call)
    return state


@pytest.mark.parametrize('precision, optimizer', [
    ('fp32', 'sgd'), ('tf32', 'sgd'),  # the optimizer's part of a step is that of bf16
    *itertools.product(['bf16', 'fp16'], ['sgd', 'sgd --momentum 0', 'adam', 'adamw', 'rmsprop',
                                          'rmsprop --momentum 0.9'])])
def test_optimizers(optimizer, precision):
    argv = f'--optimizer {optimizer}'.split()
    if precision == 'fp16' and 'rmsprop' in argv:
        step, _ = make_step(argv, precision)
        assert not isinstance(step, train.CudaGraphStep)
    else:
        check_graph(argv, precision)


@pytest.mark.parametrize('argv, fused, path', [
    ('', True, 'layers'), ('', False, None), ('--memory-efficient', True, 'eager'),
    ('--memory-efficient', False, None), ('--drop-rate 0.2', True, 'layers'),
    ('--drop-rate 0.2 --memory-efficient', True, 'eager'),
    ('--grad-accum 2 --label-smoothing 0.1', True, 'layers'), ('--deterministic', True, 'layers')])
def test_ways_to_train(argv, fused, path):
    state = check_graph(argv.split(), 'fp16', fused=fused)  # with autocast and the scaler
    assert {getattr(block, 'path', None) for block in dense_blocks(state.model)} == {path}


def test_frozen_features(tmp_path):
    checkpoint.save(tmp_path / 'weights.pth', {})
    argv = ['--freeze-features', '--pretrained', str(tmp_path / 'weights.pth')]
    state = check_graph(argv)
    assert not state.model.features.training and state.model.classifier.training
    assert not any('collect_statistics' in o.name or 'Convolution' in o.name and 'Back' in o.name
                   for nodes in pretended_cuda.graphs() for o in nodes)


def test_recording_leaves_no_trace():
    """Of a run that has begun: memory keeps its place and is restored, in order, at the end."""
    args, state, autocast = make_training(['--drop-rate', '0.2', '--optimizer', 'adam'], 'fp16')
    eager_args = flags.complete(flags.parse(['--no-cuda-graph']))
    eager = train.make_step(eager_args, state, SHAPES, autocast)
    eager(*batch(SHAPES[0]))
    tensors = [*state.model.state_dict().values(), state.sums,
               *(value for values in state.optimizer.state.values() for value in values.values())]
    before = ([tensor.data_ptr() for tensor in tensors], torch.cuda.get_rng_state().tolist(),
              state.scaler.state_dict(), torch.cuda.current_stream())
    with patch.object(state.scaler, 'load_state_dict', wraps=state.scaler.load_state_dict) as load:
        building = pretended_cuda.record(lambda: train.make_step(args, state, SHAPES, autocast))
    load.assert_called_with(before[2])
    assert before == ([tensor.data_ptr() for tensor in tensors],
                      torch.cuda.get_rng_state().tolist(), state.scaler.state_dict(),
                      torch.cuda.current_stream())
    last_step = max(i for i, o in enumerate(building)
                    if o.kind == 'graph' or o.name == 'cudnnConvolutionBackwardFilter')
    restoring = building[last_step:]
    assert sum(o.name == 'device to device' for o in restoring) >= len(tensors)
    assert all(operation.ordered for operation in building)
    nothing, = pretended_cuda.record(lambda: state.sums.add_(1))
    assert nothing.ordered  # what the caller does next comes after it


def test_each_graph_is_tried_out_when_it_is_recorded():
    building = pretended_cuda.record(lambda: make_step())
    assert [o.name for o in building if o.kind == 'graph'] == ['0', '1']


# ---- captures that fail ----------------------------------------------------------------------

def on_the_python_side(state):
    raise RuntimeError('a check of torch on the host')


def out_of_memory(state):
    torch.empty(2**40, dtype=torch.uint8, device=CUDA)


def read_back(state):
    state.sums.sum().item()


def wait(state):
    torch.cuda.synchronize()


@contextlib.contextmanager
def step_with(action):
    """A context in which a step that is being recorded does something else as well."""
    original = train.train_step

    def step(state, *args, **kwargs):
        original(state, *args, **kwargs)
        if torch.cuda.is_current_stream_capturing():
            action(state)

    with patch.object(train, 'train_step', step):
        yield
