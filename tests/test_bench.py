"""bench.py: its rows, and how it counts bytes and FLOPs; no timings."""

import contextlib
import csv
import functools
import json
import math
import os
import shutil
import subprocess
import timeit
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import bench
import densenet
import train
from bench import Row
from fused_dense_block import cpu, fuse

TINY = ['--depth', '10', '--growth-rate', '4', '--batch-size', '4', '--image-size', '8',
        '--device', 'cpu', '--rounds', '2']
NAMES = ['torchvision plain, NCHW', 'torchvision plain', 'timm plain', 'torchvision checkpointed',
         'ours plain', 'ours checkpointed', 'ours fused, eager',
         'ours fused, eager, memory-efficient']
FUSED = ['torchvision fused', 'timm fused', 'ours fused']  # in training and inference
OURS = ['--rows', 'ours plain']


@pytest.fixture(autouse=True)
def small_and_without_kernels(monkeypatch):
    monkeypatch.setattr(bench, 'MATRICES', ((64, 32), (32, 16)))
    set_cpu_kernels(monkeypatch, 'no compiler')


def set_cpu_kernels(monkeypatch, unavailable_reason):
    monkeypatch.setattr(bench, 'cpu', SimpleNamespace(
        TYPES=cpu.TYPES, unavailable_reason=lambda dtype: unavailable_reason))


def skip_without_kernels(mode):
    if bench.MODES[mode].cpu == 'kernels' and cpu.unavailable_reason():
        pytest.skip('no CPU kernels here')


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


def blocks_of(model):
    return [module for module in model.modules() if hasattr(module, 'denselayer1')]


def runner(*row, inference=False, depth=10, image_size=8, **settings):
    args = bench.network_flags(inference, depth=depth, growth_rate=4, image_size=image_size,
                               batch_size=4)
    started = bench.Runner(Row(*row, **settings), args, torch.device('cpu'))
    started.start()
    return started


@pytest.mark.parametrize('given, parameters', [
    (dict(depth=40, growth_rate=36), 1_542_682), (dict(arch='densenet161'), 28_681_000)])
def test_all_networks_of_a_table_have_the_same_size(given, parameters):
    args = bench.network_flags(**given, batch_size=2)
    for source in ('ours', 'torchvision', 'timm'):
        if source == 'timm':
            pytest.importorskip('timm')
        with torch.device('meta'):
            model = bench.make_model(Row(source, 'plain', 'fp32'), args)
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert model.classifier.out_features == (1000 if 'arch' in given else 10)
        assert [len(block._modules) for block in blocks_of(model)] == (
            [6, 12, 36, 24] if 'arch' in given else [6, 6, 6])


# ---- FLOPs -----------------------------------------------------------------------------------

def test_flops_of_a_step_equal_torchs_flop_counter():
    args = bench.network_flags(depth=22, growth_rate=8, batch_size=2)
    with torch.device('meta'), FlopCounterMode(display=False) as counter:
        model = bench.make_model(Row('ours', 'plain', 'fp32'), args)
        model(torch.empty(2, 3, args.image_size, args.image_size)).sum().backward()
    counts = counter.get_flop_counts()['Global']
    truth = counts[torch.ops.aten.convolution] + counts[torch.ops.aten.convolution_backward]
    truth += 2 * 2 * 32**2 * model.features.conv0.weight.numel()  # images have no gradient here
    for size, transition in ((32, model.features.transition1), (16, model.features.transition2)):
        # Pooled first, it does a quarter of the work, in forward and twice in backward.
        truth -= 3 * 2 * 2 * (size**2 - (size // 2)**2) * transition.conv.weight.numel()
    assert bench.convolution_flops(args) == truth
    args = bench.network_flags(inference=True, depth=22, growth_rate=8, batch_size=2)
    assert bench.convolution_flops(args) == truth / 3


def test_flops_of_a_small_network_by_hand():
    args = bench.network_flags(inference=True, depth=10, growth_rate=4, image_size=8, batch_size=3)
    by_pixels = {64: 3 * 8 * 9 + 8 * 16 + 16 * 4 * 9,  # stem, and a layer of 8 channels
                 16: 12 * 6 + 6 * 16 + 16 * 4 * 9,     # transition, pooled first, and a layer
                 4: 10 * 5 + 5 * 16 + 16 * 4 * 9}
    by_hand = 2 * 3 * sum(pixels * products for pixels, products in by_pixels.items())
    assert bench.convolution_flops(args) == by_hand


def test_the_limit_is_flops_over_the_matrix_product_rate(tmp_path, monkeypatch, capsys):
    turns, time = [], bench.Runner.time
    monkeypatch.setattr(bench, 'matrix_product_rate', lambda precision: (
        turns.append(precision), {'fp32': 2e9, 'bf16': 4e9}[precision])[1])
    monkeypatch.setattr(bench.Runner, 'time', lambda self, steps: (
        turns.append(self.row.name), time(self, steps))[1])
    bench.main([*TINY, *OURS, '--precision', 'fp32', 'bf16', '--csv', str(tmp_path / 'x.csv')])
    starts = 2 * ['ours plain', 'ours plain']  # two rows, each with a start and a turn
    assert turns == ['fp32', 'bf16', *starts, 'fp32', 'bf16', 'ours plain', 'ours plain']
    flops = bench.convolution_flops(bench.network_flags(
        depth=10, growth_rate=4, image_size=8, batch_size=4))  # of a step
    table = capsys.readouterr().out
    for row, rate in zip(read_csv(tmp_path / 'x.csv'), (2e9, 4e9)):
        limit = float(row['ms']) / float(row['limit_ratio'])
        assert limit == pytest.approx(1e3 * flops / rate, rel=1e-4)
        assert f'limit, {row["precision"]}: {limit / 4:.4f} ms per image' in table


def test_the_rate_of_the_matrix_product(monkeypatch):
    products, mm, repeat = [], torch.mm, timeit.repeat
    monkeypatch.setattr(torch, 'mm', lambda a, b, out: (
        products.append(a.dtype), mm(a, b, out=out)))
    now = iter([0.0, 1.0, 10.0, 14.0, 20.0, 22.0])  # three products, of 1, 4 and 2 seconds
    monkeypatch.setattr(bench.timeit, 'repeat', functools.partial(repeat, timer=lambda: next(now)))
    assert bench.matrix_product_rate('bf16') == 2 * 64 * 32 * 16 / 2
    assert products == 3 * [torch.bfloat16]


# ---- bytes -----------------------------------------------------------------------------------

def saved_bytes(model, images):
    """Bytes that autograd saves for backward, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(images)  # held on to, so that no memory is used twice
        return output, sum(saved.values())


def model_and_images(source, mode, depth):
    args = bench.network_flags(depth=depth)
    return bench.make_model(Row(source, mode, 'fp32'), args).train(), torch.randn(2, 3, 32, 32)


@pytest.mark.parametrize('source, mode', [
    ('ours', 'plain'), ('ours', 'fused, eager'), ('ours', 'fused, eager, memory-efficient'),
    ('torchvision', 'plain')])
def test_bytes_held_equal_the_bytes_that_autograd_saves(source, mode):
    model, images = model_and_images(source, mode, depth=40)
    _, truth = saved_bytes(model, images)
    # Autograd's count includes the images.
    assert bench.bytes_held(model, images) == pytest.approx(truth - images.nbytes, rel=0.01)


def test_fused_blocks_hold_a_quarter_and_memory_efficient_ones_a_seventh():
    held = {mode: bench.bytes_held(*model_and_images('ours', mode, depth=100))
            for mode in bench.EAGER_MODES}
    assert held['fused, eager'] <= 0.25 * held['plain']
    assert held['fused, eager, memory-efficient'] <= 0.15 * held['plain']
    assert held['fused, eager'] < held['checkpointed'] < 0.6 * held['plain']


def block_bytes(num_layers, fused, efficient=False):
    block = densenet.DenseBlock(num_layers, 24, 12, 4, 0.0, True, efficient).train()
    if fused:
        fuse(block, kernels=False)
    return bench.bytes_held(block, torch.randn(2, 24, 16, 16))


def test_bytes_grow_linearly_with_the_layers_of_a_block():
    assert block_bytes(32, fused=False) > 3 * block_bytes(16, fused=False)
    for efficient in (False, True):
        assert block_bytes(32, True, efficient) <= 2.2 * block_bytes(16, True, efficient)


def test_allocations_by_hand():
    old = torch.zeros(1000)

    def compute():
        a = old + 1                 # 4,000 bytes
        b = torch.cat([a, a])       # 8,000 bytes
        view = b[:10]
        a.add_(1)
        old.mul_(2)
        del a
        c = torch.zeros(500)        # 2,000 bytes
        del b, c
        return view  # holds the memory of b

    view, held, peak = bench.allocations(compute)
    # PyTorch makes tensors of the scalars 1 and 2, of 8 bytes or less.
    assert len(view) == 10 and held == 8_000 and 12_000 <= peak <= 12_032
    assert bench.allocations(lambda: torch.zeros(2500) is None) == (False, 0, 10_000)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operations return: `now` alive, and the `peak`.

    Without the given tensors, and without scratch buffers inside an operation.
    """

    def __init__(self, *tensors):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}  # by address
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(outputs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, storage._cdata)
        return outputs

    def _remove(self, address):
        self.now -= self.sizes.pop(address)


@pytest.mark.parametrize('source, mode', [('torchvision', 'plain'), *(
    ('ours', mode) for mode in bench.MODES)])
def test_the_peak_equals_the_bytes_of_live_tensors(source, mode):
    skip_without_kernels(mode)
    model, images = model_and_images(source, mode, depth=22)
    model.to(memory_format=torch.channels_last)
    labels = torch.tensor([3, 5])
    with LiveBytes(images, labels, *model.parameters(), *model.buffers()) as live:
        peak = bench.peak_bytes(model, images, labels, contextlib.nullcontext())
    live.peak -= sum(p.grad.nbytes for p in model.parameters())  # not counted by peak_bytes
    # Under a dispatch mode fused blocks run by PyTorch's operations, of which the allocator also
    # counts the scratch buffers.
    scratch = 1.15 if 'fused' in mode else 1.01
    assert live.peak / 1.01 <= peak <= live.peak * scratch


@functools.cache
def step_peak(source, mode):
    """Bytes for DenseNet-BC-100-12, and the paths of the dense blocks."""
    model = bench.make_model(Row(source, mode, 'fp32'), bench.network_flags()).train()
    model.to(memory_format=torch.channels_last)
    images, labels = torch.randn(8, 3, 32, 32), torch.arange(8)
    peak = bench.peak_bytes(model, images, labels, contextlib.nullcontext())
    return peak, {getattr(block, 'path', 'layers') for block in blocks_of(model)}


@pytest.mark.parametrize('mode, share', [
    ('fused, eager', 0.25), ('fused, eager, memory-efficient', 0.15),
    ('fused', 0.18), ('fused, memory-efficient', 0.10)])
def test_the_peak_of_a_step_is_a_small_share_of_torchvisions(mode, share):
    skip_without_kernels(mode)
    theirs, _ = step_peak('torchvision', 'plain')
    ours, paths = step_peak('ours', mode)
    assert ours <= share * theirs and paths == {bench.MODES[mode].cpu}


# ---- rows ------------------------------------------------------------------------------------

def test_a_table_has_all_rows_in_csv_and_figure(tmp_path, capsys):
    pytest.importorskip('timm')
    bench.main([*TINY, '--csv', str(tmp_path / 'bench.csv'),
                '--plot', str(tmp_path / 'bench.png')])
    rows = read_csv(tmp_path / 'bench.csv')
    assert [row['row'] for row in rows] == NAMES
    for row in rows:
        ms, memory, peak = (float(row[key]) for key in ('ms', 'memory_mib', 'peak_mib'))
        assert float(row['ms_quartile1']) <= ms <= float(row['ms_quartile3'])
        assert float(row['images_per_second']) == pytest.approx(4 / ms * 1e3, rel=1e-4)
        assert float(row['speed_ratio']) == pytest.approx(float(rows[0]['ms']) / ms, rel=1e-4)
        assert float(row['memory_ratio']) == pytest.approx(
            memory / float(rows[0]['memory_mib']), rel=1e-4)
        assert peak > memory
        assert float(row['peak_ratio']) == pytest.approx(
            peak / float(rows[0]['peak_mib']), rel=1e-4)
        assert row['rounds'] == '2' and row['batch_size'] == '4'
        assert float(row['first_call_s']) > 0
        assert f'torch {torch.__version__.partition("+")[0]}' in row['workload']
    image = np.asarray(Image.open(tmp_path / 'bench.png').convert('L'))
    assert min(image.shape) > 300 and image.std() > 10  # there is ink
    table = capsys.readouterr().out.splitlines()
    assert [line for name in NAMES for line in table if line.startswith(f'{name} ')] == table[2:-1]


def test_rows_keep_the_order_of_the_flags():
    options = bench.make_parser().parse_args(
        ['--precision', 'bf16', 'fp32', '--rows', 'ours plain', 'torchvision*', 'ours*'])
    rows = bench.select_rows(options, on_cuda=False)
    assert [row.name for row in rows] == [
        'ours plain', 'torchvision plain', 'torchvision checkpointed', *NAMES[5:],
        'ours plain', *NAMES[:2], 'torchvision checkpointed', *NAMES[5:]]
    assert [row.precision for row in rows] == 6 * ['bf16'] + 7 * ['fp32']


def test_every_row_takes_the_training_step_of_train(monkeypatch):
    models, step = [], train.train_step
    monkeypatch.setattr(train, 'train_step', lambda state, *args, **kwargs: (
        models.append(state.model), step(state, *args, **kwargs)))
    bench.main([*TINY, '--steps', '3', '--rows', 'ours fused, eager', 'torchvision plain'])
    ours, theirs = dict.fromkeys(map(id, models))
    # At the start a warm-up and a step, then in each of two rounds a warm-up and three steps.
    assert [id(model) for model in models] == (
        (2 + 4) * [ours] + (2 + 4) * [theirs] + 4 * [ours] + 4 * [theirs])


def test_several_batch_sizes_take_turns_in_one_run(tmp_path, monkeypatch):
    turns, time = [], bench.Runner.time
    monkeypatch.setattr(bench.Runner, 'time', lambda self, steps: (
        turns.append((self.batch[0].shape, self.row.mode)), time(self, steps))[1])
    bench.main([*TINY, '--batch-size', '1', '3', '1', '--rows', 'ours plain', 'ours fused, eager',
                '--csv', str(tmp_path / 'bench.csv')])
    round_ = [((n, 3, 8, 8), mode) for n in (1, 3) for mode in ('plain', 'fused, eager')]
    assert turns == [turn for turn in round_ for _ in range(2)] + round_
    rows = read_csv(tmp_path / 'bench.csv')
    assert [row['batch_size'] for row in rows] == ['1', '1', '3', '3']
    flops = bench.convolution_flops(bench.network_flags(
        depth=10, growth_rate=4, image_size=8, batch_size=1))
    rates = set()
    for row, first in zip(rows, [rows[0], rows[0], rows[2], rows[2]]):
        ms, n, ratio = (float(row[key]) for key in ('ms', 'batch_size', 'limit_ratio'))
        assert float(row['speed_ratio']) == pytest.approx(float(first['ms']) / ms, rel=1e-4)
        assert float(row['memory_ratio']) == pytest.approx(
            float(row['memory_mib']) / float(first['memory_mib']), rel=1e-4)
        assert float(row['images_per_second']) == pytest.approx(n / ms * 1e3, rel=1e-4)
        assert 'batches of 1, 3 at 8 pixels' in row['workload']
        rates.add(round(n * flops * ratio / ms))
    assert max(rates) <= 1.001 * min(rates)  # of the matrix product


def test_the_first_call_is_timed_apart(monkeypatch):
    now, seconds = [0.0], iter([100.0, 6.0])
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])
    monkeypatch.setattr(train, 'train_step', lambda *_, **__: now.__setitem__(
        0, now[0] + next(seconds)))
    assert runner('ours', 'plain', 'fp32').first_call == 100.0


def test_a_time_is_the_mean_of_the_steps_in_a_round(monkeypatch):
    row = runner('ours', 'plain', 'fp32')
    now = [0.0]
    row.step = lambda images, labels: now.__setitem__(0, now[0] + 6.0)
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: now[0])
    assert row.time(steps=3) == 6.0


@pytest.mark.parametrize('mode', bench.MODES)
def test_each_row_takes_the_path_in_its_name(mode):
    skip_without_kernels(mode)
    model = runner('ours', mode, 'fp32').model
    recomputes = mode == 'checkpointed' or 'memory-efficient' in mode
    if 'fused' in mode:
        path = 'eager' if 'eager' in mode else 'kernels'
        fused = [module for module in model.modules() if hasattr(module, 'path')]
        assert len(fused) == 3 + 2  # blocks and transitions
        assert {module.path for module in fused} == {path}
        assert {block.recomputes() for block in blocks_of(model)} == {recomputes}
    else:
        assert not any(hasattr(module, 'path') for module in model.modules())
        assert {layer.memory_efficient for block in blocks_of(model)
                for layer in block.children()} == {recomputes}


@pytest.mark.parametrize('inference', [False, True])
@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('source', ['torchvision', 'timm', 'ours'])
def test_fused_rows_take_the_kernels(source, precision, inference):
    skip_without_kernels('fused')
    if source == 'timm':
        pytest.importorskip('timm')
    model = runner(source, 'fused', precision, inference=inference).model
    assert type(model).__module__.partition('.')[0] == {'ours': 'densenet'}.get(source, source)
    blocks = blocks_of(model)
    assert [(block.path, block.reason) for block in blocks] == 3 * [('kernels', None)]


@pytest.mark.parametrize('source', ['torchvision', 'timm', 'ours'])
def test_on_a_gpu_the_fused_mode_is_eager_and_memory_efficient(source, monkeypatch):
    if source == 'timm':
        pytest.importorskip('timm')
    monkeypatch.setattr(cpu, 'unavailable_reason', lambda dtype=None: pytest.fail('not needed'))
    args = bench.network_flags(depth=10, growth_rate=4, image_size=8)
    row = Row(source, 'fused, memory-efficient', 'fp32')
    model = bench.make_model(row, args, 'cuda').train()
    model(torch.randn(2, 3, 8, 8))
    for block in blocks_of(model):
        assert block.path == 'eager' and block.recomputes()


@pytest.mark.parametrize('argv, on_cpu, on_cuda', [
    *((['--precision', precision], [*FUSED, 'ours fused, memory-efficient'],
       [f'{name}, memory-efficient' for name in FUSED]
       + ['ours fused, memory-efficient, CUDA graph']) for precision in ('fp32', 'bf16')),
    (['--precision', 'fp32', '--inference'], FUSED, []),
    (['--precision', 'fp16'], [], [f'{name}, memory-efficient' for name in FUSED]
     + ['ours fused, memory-efficient, CUDA graph'])])
def test_rows_with_kernels_are_for_cpus(argv, on_cpu, on_cuda, monkeypatch):
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: name)
    set_cpu_kernels(monkeypatch, None)
    options = bench.make_parser().parse_args(argv)
    for expected, device_is_cuda in ((on_cpu, False), (on_cuda, True)):
        rows = [row.name for row in bench.select_rows(options, device_is_cuda)]
        assert [name for name in rows if 'fused' in name and 'eager' not in name] == expected
        assert not (device_is_cuda and any('eager' in name for name in rows))


def test_rows_match_their_names():
    plain, half, checkpointed = (
        runner('torchvision', *row, depth=16, image_size=16)
        for row in (('plain', 'fp32'), ('plain', 'bf16'), ('checkpointed', 'fp32')))
    assert half.memory == pytest.approx(plain.memory / 2, rel=0.1)
    assert checkpointed.memory < 0.9 * plain.memory
    nchw = runner('torchvision', 'plain', 'fp32', channels_last=False)
    for row, channels_last in ((plain, True), (nchw, False)):
        weight = row.model.features.conv0.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert plain.model.training and plain.state.sums[0] > 0
    assert not runner('ours', 'plain', 'fp32', inference=True).model.training


def test_each_round_sets_its_own_precision(monkeypatch):
    seen, step = [], train.train_step
    monkeypatch.setattr(train, 'train_step', lambda state, *args, **kwargs: (
        seen.append(torch.backends.cudnn.allow_tf32), step(state, *args, **kwargs)))
    bench.main([*TINY, *OURS, '--precision', 'fp32', 'bf16'])
    assert seen == 4 * [False] + 4 * [True] + [False, False, True, True]


def test_inference_has_rows_without_memory(tmp_path):
    bench.main([*TINY, '--inference', '--rows', 'torch*', 'ours*', '--precision', 'fp32', 'bf16',
                '--csv', str(tmp_path / 'bench.csv')])
    rows = read_csv(tmp_path / 'bench.csv')
    assert [(row['row'], row['precision']) for row in rows] == [
        ('torchvision plain, NCHW', 'fp32'), ('torchvision plain', 'fp32'), ('ours plain', 'fp32'),
        ('torchvision plain', 'bf16'), ('ours plain', 'bf16')]
    for row in rows:
        assert float(row['ms']) > 0 and row['memory_mib'] == row['peak_mib'] == 'nan'


@pytest.mark.parametrize('source, precision', [
    ('onnxruntime', 'fp32'), ('openvino', 'fp32'), ('openvino', 'bf16')])
def test_exported_rows_compute_what_the_network_does(source, precision, monkeypatch):
    for package in (source, 'onnxscript'):
        pytest.importorskip(package)
    configs = []
    if source == 'openvino':
        import openvino
        compile_model = openvino.compile_model
        monkeypatch.setattr(openvino, 'compile_model', lambda model, device, config: (
            configs.append(config), compile_model(model, device, config))[1])
    row = runner(source, 'plain', precision, inference=True)
    assert not row.model.training and math.isnan(row.memory)
    tolerance = 1e-5 if precision == 'fp32' else 0.1  # a CPU without bf16 computes in fp32
    torch.testing.assert_close(torch.from_numpy(row.step(*row.batch)), row.model(row.batch[0]),
                               atol=tolerance, rtol=tolerance)
    assert row.time(steps=1) > 0
    for config in configs:
        assert config == {'INFERENCE_PRECISION_HINT': {'fp32': 'f32', 'bf16': 'bf16'}[precision],
                          'INFERENCE_NUM_THREADS': torch.get_num_threads()}


@pytest.mark.parametrize('precision', ['fp32', 'bf16'])
@pytest.mark.parametrize('cpu_flags, sets', [
    ('fma avx2', ['avx2']), ('avx2 avx512f avx512_vnni amx_int8', ['avx2', 'avx512f']),
    ('avx512_bf16 avx512f', ['avx512f', 'avx512_bf16']), ('avx512_fp16 amx_bf16', ['amx_bf16'])])
def test_openvino_has_a_row_in_bf16_on_cpus_with_bf16(precision, cpu_flags, sets, monkeypatch):
    monkeypatch.setattr(bench, 'cpu_field', {'flags': cpu_flags, 'model name': 'Fast 1'}.get)
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: name)
    options = bench.make_parser().parse_args(['--inference', '--precision', precision])
    names = [row.name for row in bench.select_rows(options, on_cuda=False)]
    assert ('openvino plain' in names) == (precision == 'fp32' or 'bf16' in cpu_flags)
    assert ('onnxruntime plain' in names) == (precision == 'fp32')
    workload = bench.describe([], [bench.network_flags(depth=10)], torch.device('cpu'))
    assert f'; Fast 1 ({" ".join(sets)}; torch: ' in workload


def test_the_cpu_of_this_machine_is_named(tmp_path):
    lscpu = shutil.which('lscpu') or pytest.skip('needs lscpu')
    bench.main([*TINY, *OURS, '--rounds', '1', '--csv', str(tmp_path / 'x.csv')])
    row, = read_csv(tmp_path / 'x.csv')
    known = json.loads(subprocess.run([lscpu, '--json'], env={**os.environ, 'LC_ALL': 'C'},
                                      check=True, capture_output=True).stdout)['lscpu']
    known = {field['field']: field['data'] for field in known}
    sets = [name for name in bench.INSTRUCTION_SETS if name in known['Flags:'].split()]
    assert (f'{known["Model name:"]} ({" ".join(sets)}; torch: '
            f'{torch.backends.cpu.get_cpu_capability()}), ') in row['workload']


def test_compiled_rows_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self, mode: (
        compiled.append((type(self), mode))))  # minutes
    bench.main([*TINY, '--compile', '--rows', '*compiled*'])
    assert compiled == [(torchvision.models.DenseNet, 'default'), (densenet.DenseNet, 'default')]


@pytest.mark.parametrize('argv', [[], ['--inference']])
def test_on_a_gpu_there_are_two_modes_of_compilation(argv):
    options = bench.make_parser().parse_args(['--compile', '--precision', 'bf16', *argv])
    assert [(row.name, row.compiled) for row in bench.select_rows(options, on_cuda=True)
            if row.compiled] == [
        ('torchvision plain, compiled (default)', 'default'),
        ('ours plain, compiled (default)', 'default'),
        ('torchvision plain, compiled (reduce-overhead)', 'reduce-overhead'),
        ('ours plain, compiled (reduce-overhead)', 'reduce-overhead'),
        ('torchvision plain, compiled (default), CUDA graph', 'default'),
        ('ours plain, compiled (default), CUDA graph', 'default')]


# ---- errors ----------------------------------------------------------------------------------

def test_out_of_memory_is_a_row(capsys, tmp_path, monkeypatch):
    time = bench.Runner.time

    def out_of_memory_if_plain(self, steps):
        if self.row.mode == 'plain':
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return time(self, steps)

    monkeypatch.setattr(bench.Runner, 'time', out_of_memory_if_plain)
    bench.main([*TINY, '--rows', 'ours*', '--csv', str(tmp_path / 'bench.csv')])
    table = capsys.readouterr().out
    assert table.count('out of memory') == 1 and 'nan' not in table
    assert [row['failure'] for row in read_csv(tmp_path / 'bench.csv')] == ['out of memory'] + \
        3 * ['']
    # For real, 49 TB of images:
    bench.main([*TINY, *OURS, '--image-size', '64', '--batch-size', '1000000000'])
    assert capsys.readouterr().out.count('out of memory') == 1


def test_a_failing_row_is_reported_and_the_others_are_shown(capsys, monkeypatch):
    def refuse(*_, **__):
        raise ValueError('not fused: features.denseblock1 computes something else')

    monkeypatch.setattr(bench, 'fuse', refuse)
    with pytest.raises(SystemExit) as exit_:
        bench.main([*TINY, '--rows', 'ours plain', 'ours fused, eager'])
    table = capsys.readouterr().out
    assert exit_.value.code == 1 and ' 1.00 ' in table
    assert 'failed: ValueError: not fused: features.denseblock1 computes something' in table


def test_an_interrupted_benchmark_shows_what_it_has_measured(capsys, monkeypatch):
    time, calls = bench.Runner.time, []

    def interrupted(self, steps):
        calls.append(self.row)
        if len(calls) == 6:  # each row has two at its start and one in each round
            raise KeyboardInterrupt
        return time(self, steps)

    monkeypatch.setattr(bench.Runner, 'time', interrupted)
    with pytest.raises(SystemExit) as exit_:
        bench.main([*TINY, '--rows', 'ours plain', 'ours fused, eager', '--rounds', '5'])
    assert exit_.value.code == 130
    _, _, plain, block, _ = capsys.readouterr().out.splitlines()
    for line in plain, block:
        name, _, numbers = line.partition(' fp32 ')
        assert name.startswith('ours ') and float(numbers.split()[1]) > 0


@pytest.mark.parametrize('package', ['timm', 'onnxruntime', 'openvino', 'onnxscript'])
def test_rows_of_missing_packages_are_left_out(package, monkeypatch):
    options = bench.make_parser().parse_args(['--inference', '--precision', 'fp32'])
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: name)
    rows = bench.select_rows(options, on_cuda=False)
    monkeypatch.setattr(bench.importlib.util, 'find_spec', lambda name: name != package or None)
    sources = ['onnxruntime', 'openvino'] if package == 'onnxscript' else [package]
    expected = [row for row in rows if row.source not in sources]
    assert bench.select_rows(options, on_cuda=False) == expected and len(expected) < len(rows)


def test_a_row_whose_blocks_fall_back_is_left_out(monkeypatch):
    make_model = bench.make_model

    def hooked(*args):
        model = make_model(*args)
        model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *_: None)
        return model

    monkeypatch.setattr(bench, 'make_model', hooked)
    with pytest.raises(RuntimeError, match="denseblock2 took the path 'layers' instead of 'eager': "
                                           '.*norm1 has hooks'):
        runner('ours', 'fused, eager', 'fp32')


@pytest.mark.parametrize('argv, complaint', [
    (['--rows', 'mine'], "--rows matches no row; the rows here are 'torchvision plain, NCHW'"),
    (['--precision', 'tf32', '--device', 'cpu'], 'tf32 is for cuda'),
    (['--depth', '41'], 'nearest 40 and 46'),
    (['--depth', '100', '--image-size', '128'], 'for images of 128 pixels there are --arch'),
    (['--rounds', '0'], "'0' is not a whole number"),
    (['--csv', 'no/such/folder/x.csv'], "'no/such/folder/x.csv' is not a .csv file in a directory"),
    (['--plot', '.'], 'is not a .png, .pdf, .svg file'),
    (['--arch', 'densenet121', '--depth', '40'], 'not allowed with argument'),
    (['--batch-size', '99999999999999999999999'], 'bench.py: error: '),
    (['--growth-rate', '999999999'], 'bench.py: error: '),
    (['--plot', 'x.xyz'], 'is not a .png, .pdf, .svg file'),
    (['--image-size', '2'], 'images of at least 4 pixels'),
    (['--arch', 'densenet121', '--image-size', '65', '--precision', 'fp8'], 'invalid choice'),
    (['--arch', 'resnet50'], 'invalid choice')])
def test_bad_input_is_a_one_line_error(argv, complaint, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(argv)
    assert exit_.value.code == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith('bench.py: error: ') and complaint in error


# ---- on a GPU --------------------------------------------------------------------------------

@pytest.mark.cuda
@pytest.mark.parametrize('argv, graphs', [(['--precision', 'fp16'], 2),
                                          (['--inference', '--precision', 'tf32'], 1)])
def test_all_rows_run_on_cuda(argv, graphs, tmp_path, monkeypatch):
    """fp16 has autocast and the gradient scaler; tf32 has the NCHW row.

    tests/test_train.py has steps and graphs in all precisions.
    """
    # Trying out convolutions takes most of the time; of each, one is tried here.
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark_limit', 1)
    bench.main([*TINY, '--device', 'cuda', '--steps', '2', *argv,
                '--csv', str(tmp_path / 'bench.csv')])
    rows = read_csv(tmp_path / 'bench.csv')
    assert sum('CUDA graph' in row['row'] for row in rows) == graphs
    for row in rows:
        assert row['failure'] == '' and math.isfinite(float(row['ms']))
        assert float(row['memory_mib']) > 0
