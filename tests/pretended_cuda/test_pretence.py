"""The pretended GPU: it breaks captures that a GPU breaks, and has the same counts."""

import collections
import ctypes

import pytest
import torch

import bench
import pretended_cuda
from attic import count_kernels


def tensor_on_cuda():
    return torch.ones(4, device='cuda')


def capture(function):
    """Record a function of a tensor as a graph, on torch's side stream."""
    tensor = tensor_on_cuda()
    tensor @ tensor  # the library's handle and workspace are made before
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(tensor)
    return graph


def kinds(operations):
    return collections.Counter(operation.kind for operation in operations)


def test_what_is_read_from_the_device_is_zeros():
    assert tensor_on_cuda().tolist() == [0, 0, 0, 0] and not tensor_on_cuda().any()


def test_work_is_noted_in_its_order():
    tensor = tensor_on_cuda()
    other = torch.empty_like(tensor)
    operations = pretended_cuda.record(lambda: (tensor.mul_(2), other.copy_(tensor), tensor.cpu()))
    assert [(o.kind, o.name) for o in operations[1:]] == [
        ('copy', 'device to device'), ('copy', 'device to pageable host'),
        ('synchronize', 'cudaStreamSynchronize')]
    assert operations[0].kind == 'kernel' and 'MulFunctor' in operations[0].name


def test_a_graph_is_launched_as_one():
    graph = capture(lambda tensor: tensor.mul_(2).add_(1))
    assert kinds(pretended_cuda.graphs()[0]) == {'kernel': 2}
    assert kinds(pretended_cuda.record(graph.replay)) == {'graph': 1}
    assert pretended_cuda.problems() == []


def wait_for_an_event_of_outside(tensor):
    torch.cuda.current_stream().wait_event(torch.cuda.default_stream().record_event())


def use_a_stream_without_joining_it(tensor):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensor.mul_(2)


def runtime(function, *args):
    """Calls the CUDA runtime itself, where torch would refuse before it comes to that."""
    if getattr(ctypes.CDLL(None), function)(*args):
        raise RuntimeError(function)


def copy(to, source):
    runtime('cudaMemcpyAsync', *map(ctypes.c_void_p, (to.data_ptr(), source.data_ptr(), 16, 4,
                                                      torch.cuda.current_stream().cuda_stream)))


def allocate(tensor):
    runtime('cudaMalloc', ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(1))


@pytest.mark.parametrize('function, problem', [
    (lambda tensor: tensor.sum().item(), ''),
    (lambda tensor: copy(torch.ones(4), tensor), 'copy from device to pageable host'),
    (lambda tensor: copy(tensor, torch.ones(4)), 'copy from pageable host to device'),
    (lambda tensor: torch.cuda.synchronize(), 'cudaDeviceSynchronize'),
    (lambda tensor: torch.cuda.current_stream().synchronize(), 'cudaStreamSynchronize'),
    (lambda tensor: torch.cuda.current_stream().query(), 'cudaStreamQuery'),
    (lambda tensor: torch.cuda.default_stream().record_event().query(), 'cudaEventQuery'),
    (lambda tensor: torch.cuda.current_stream().record_event().synchronize(), 'asking for an ev'),
    (lambda tensor: torch.conv2d(tensor.view(1, 1, 2, 2), tensor.view(1, 1, 2, 2)), 'cudnnCreate'),
    (wait_for_an_event_of_outside, 'waiting for an event of outside'),
    (allocate, 'cudaMalloc'),
    (use_a_stream_without_joining_it, None),
])
def test_what_breaks_a_capture(function, problem):
    with pytest.raises(RuntimeError):
        capture(function)
    assert pretended_cuda.graphs() == []
    found = pretended_cuda.problems()
    assert problem is None or any(line.startswith(problem) for line in found), found


def copy_from_pinned_memory(tensor):
    tensor.copy_(PINNED, non_blocking=True)


def use_another_stream(tensor):
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        tensor.mul_(2)
    torch.cuda.current_stream().wait_stream(stream)


PINNED = None


@pytest.mark.parametrize('function', [copy_from_pinned_memory, use_another_stream,
                                      lambda tensor: tensor.new_empty(2**28)])
def test_what_a_capture_admits(function):
    global PINNED
    PINNED = torch.ones(4).pin_memory()
    capture(function)
    assert len(pretended_cuda.graphs()) == 1 and pretended_cuda.problems() == []


def test_work_that_a_capture_leaves_out_is_a_problem():
    def on_another_stream(tensor):
        with torch.cuda.stream(torch.cuda.default_stream()):
            tensor.mul_(2)
    with pytest.warns(UserWarning, match='The CUDA Graph is empty'):
        capture(on_another_stream)
    problem, = pretended_cuda.problems()
    assert 'MulFunctor' in problem and problem.endswith(' was left out of a capture')


@pytest.mark.parametrize('how, ordered', [
    (lambda stream: None, False),
    (lambda stream: stream.wait_stream(torch.cuda.current_stream()), True),
    (lambda stream: torch.cuda.current_stream().wait_stream(stream), False),
    (lambda stream: torch.cuda.synchronize(), True)])
def test_order_is_what_waits_and_events_give(how, ordered):
    tensor, stream = tensor_on_cuda(), torch.cuda.Stream()
    how(stream)
    with torch.cuda.stream(stream):
        operation, = pretended_cuda.record(lambda: tensor.mul_(2))
    assert operation.ordered == ordered


def test_the_gpu_is_the_one_of_the_environment(monkeypatch):
    monkeypatch.setenv('PRETENDED_CUDA_GIB', '2')
    monkeypatch.setenv('PRETENDED_CUDA_DEVICES', '3')
    monkeypatch.setenv('PRETENDED_CUDA_CAPABILITY', '75')
    assert torch.cuda.device_count() == 3 and torch.cuda.get_device_capability() == (7, 5)
    torch.empty(2**30, dtype=torch.uint8, device='cuda')
    with pytest.raises(torch.OutOfMemoryError):
        torch.empty(2**31 + 1, dtype=torch.uint8, device='cuda')


def test_a_step_has_the_kernels_that_it_has_on_a_gpu():
    """On an H100, torch 2.11 made about 2,600 operations of it.

    The rest are those of the libraries: a convolution or a product, one operation here, is there
    one or several kernels and often a memset.
    """
    row = bench.Row('ours', 'plain', 'bf16')
    operations, _ = count_kernels.count(row, bench.network_flags())
    convolutions = [o.name for o in operations if o.name.startswith('cudnnConvolution')]
    assert collections.Counter(convolutions) == {
        'cudnnConvolutionForward': 99, 'cudnnConvolutionBackwardFilter': 99,
        'cudnnConvolutionBackwardData': 98}  # the images need no gradient
    assert 2600 - 3 * len(convolutions) < len(operations) < 2600
