"""What bench.py compares, and how it counts bytes; how fast anything is, it alone can say."""

import csv
import math

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_images
from PIL import Image

import bench
import densenet
import train
from bench import Row, Workload

TINY = ['--depth', '10', '--growth-rate', '4', '--batch-size', '4', '--image-size', '8',
        '--device', 'cpu', '--rounds', '2']
NAMES = ['torchvision plain, NCHW', 'torchvision plain', 'timm plain', 'torchvision checkpointed',
         'ours plain', 'ours checkpointed', 'ours block', 'ours memory-efficient']


def read_csv(path):
    with open(path, newline='') as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize('argv, parameters', [
    (['--depth', '100', '--growth-rate', '12'], 769_162),
    (['--arch', 'densenet121'], 7_978_856), (['--arch', 'densenet161'], 28_681_000)])
def test_all_networks_of_a_table_have_the_same_size(argv, parameters):
    workload = bench.describe_network(bench.make_parser().parse_args(argv))
    for source in ('ours', 'torchvision', 'timm'):
        if source == 'timm':
            pytest.importorskip('timm')
        with torch.device('meta'):
            model = bench.make_model(Row(source, 'plain', 'fp32'), workload)
            logits = model(torch.empty(2, 3, workload.image_size, workload.image_size))
        assert sum(p.numel() for p in model.parameters()) == parameters
        assert logits.shape == (2, 10 if workload.small else 1000)


# ---- bytes -----------------------------------------------------------------------------------

def saved_bytes(model, images):
    """What autograd says that it saves: each storage once, the weights not counted."""
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


@pytest.mark.parametrize('source, mode', [
    ('ours', 'plain'), ('ours', 'block'), ('ours', 'memory-efficient'), ('torchvision', 'plain')])
def test_bytes_held_are_those_that_autograd_saves(source, mode):
    workload = Workload('', 12, (6, 6, 6), 24, 32, 2)
    model = bench.make_model(Row(source, mode, 'fp32'), workload).train()
    images = torch.randn(2, 3, 32, 32)
    _, truth = saved_bytes(model, images)
    # Autograd's count has the images in it, too.
    assert bench.bytes_held(model, images) == pytest.approx(truth - images.nbytes, rel=0.01)


def bytes_of(mode, **network):
    model = bench.make_model(Row('ours', mode, 'fp32'), Workload(**{
        'name': '', 'growth_rate': 12, 'num_init_features': 24, 'image_size': 32, 'batch_size': 2,
        **network}))
    return bench.bytes_held(model.train(), torch.randn(2, 3, 32, 32))


def test_a_block_holds_a_quarter_of_the_plain_bytes_and_memory_efficient_a_seventh():
    held = {mode: bytes_of(mode, block_config=(16, 16, 16)) for mode in bench.MODES}  # BC-100-12
    assert held['block'] <= 0.25 * held['plain']
    assert held['memory-efficient'] <= 0.15 * held['plain']
    assert held['block'] < held['checkpointed'] < 0.6 * held['plain']


def block_bytes(num_layers, linear, efficient=False):
    block = densenet.DenseBlock(num_layers, 24, 12, 4, 0.0, True, efficient).train()
    block.linear_memory = linear
    return bench.bytes_held(block, torch.randn(2, 24, 16, 16))


def test_bytes_grow_linearly_with_the_layers_of_a_block():
    assert block_bytes(32, linear=False) > 3 * block_bytes(16, linear=False)
    for efficient in (False, True):
        assert block_bytes(32, True, efficient) <= 2.2 * block_bytes(16, True, efficient)


# ---- tables ----------------------------------------------------------------------------------

def test_a_table_has_all_rows_in_csv_and_figure(tmp_path, capsys):
    pytest.importorskip('timm')
    bench.main([*TINY, '--baseline', 'ours plain', '--csv', str(tmp_path / 'bench.csv'),
                '--plot', str(tmp_path / 'bench.png')])
    rows = read_csv(tmp_path / 'bench.csv')
    assert [row['row'] for row in rows] == NAMES
    plain = next(row for row in rows if row['row'] == 'ours plain')
    for row in rows:
        ms, memory = float(row['ms']), float(row['memory_bytes'])
        assert float(row['ms_quartile1']) <= ms <= float(row['ms_quartile3'])
        assert float(row['images_per_second']) == pytest.approx(4 / ms * 1e3, rel=1e-4)
        assert float(row['speed_ratio']) == pytest.approx(float(plain['ms']) / ms, rel=1e-4)
        assert float(row['memory_ratio']) == pytest.approx(
            memory / float(plain['memory_bytes']), rel=1e-4)
        assert float(row['first_step_seconds']) > 0 and row['steps'] == '2'
        assert f'torch {torch.__version__}' in row['workload']
    image = np.asarray(Image.open(tmp_path / 'bench.png').convert('L'))
    assert min(image.shape) > 300 and image.std() > 10  # there is ink
    table = capsys.readouterr().out.splitlines()
    assert [line for name in NAMES for line in table if line.startswith(f'{name}  ')] == table[2:-1]


def test_every_row_takes_the_training_step_of_train(monkeypatch):
    models, step = [], train.train_step
    monkeypatch.setattr(train, 'train_step', lambda state, *args, **kwargs: (
        models.append(state.model), step(state, *args, **kwargs)))
    bench.main([*TINY, '--steps', '3', '--rows', 'ours block', 'torchvision plain'])
    ours, theirs = dict.fromkeys(map(id, models))
    # The first step, then in each of two rounds a warm-up and three steps.
    assert [id(model) for model in models] == [ours, theirs] + 2 * (4 * [ours] + 4 * [theirs])
    paths = {block.path for model in models for block in model.modules()
             if isinstance(block, densenet.DenseBlock)}
    assert paths == {'linear'}


def runner(*row, inference=False, device='cpu', **settings):
    return bench.Runner(Row(*row, **settings), Workload('', 4, (2, 2), 8, 8, 4),
                        torch.device(device), inference)


@pytest.mark.parametrize('mode, path', [
    ('plain', 'plain'), ('block', 'linear'), ('memory-efficient', 'linear'),
    ('checkpointed', 'checkpointed')])
def test_a_row_goes_the_way_that_it_is_named_after(mode, path):
    blocks = [module for module in runner('ours', mode, 'fp32').model.modules()
              if isinstance(module, densenet.DenseBlock)]
    assert {block.path for block in blocks} == {path}


def test_a_row_is_what_its_name_says():
    plain, half = runner('torchvision', 'plain', 'fp32'), runner('torchvision', 'plain', 'bf16')
    assert half.memory == pytest.approx(plain.memory / 2, rel=0.1)
    assert runner('torchvision', 'checkpointed', 'fp32').memory < 0.9 * plain.memory
    nchw = runner('torchvision', 'plain', 'fp32', channels_last=False)
    for row, channels_last in ((plain, True), (nchw, False)):
        weight = row.model.features.conv0.weight
        assert weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert plain.model.training and plain.state.interval[0] > 0
    assert not runner('ours', 'plain', 'fp32', inference=True).model.training


def test_each_turn_has_its_own_precision(monkeypatch):
    seen, step = [], train.train_step
    monkeypatch.setattr(train, 'train_step', lambda state, *args, **kwargs: (
        seen.append(torch.backends.cudnn.allow_tf32), step(state, *args, **kwargs)))
    bench.main([*TINY, '--rows', 'ours plain', '--precision', 'fp32', 'bf16'])
    assert seen == [False, True] + 2 * [False, False, True, True]


def test_inference_has_rows_without_memory(tmp_path):
    bench.main([*TINY, '--inference', '--rows', 'ours*', 'torch*', '--precision', 'fp32', 'bf16',
                '--csv', str(tmp_path / 'bench.csv')])
    rows = read_csv(tmp_path / 'bench.csv')
    assert [(row['row'], row['precision']) for row in rows] == [
        ('torchvision plain, NCHW', 'fp32'), ('torchvision plain', 'fp32'), ('ours plain', 'fp32'),
        ('torchvision plain', 'bf16'), ('ours plain', 'bf16')]
    assert all(float(row['ms']) > 0 and row['memory_bytes'] == '' for row in rows)


def test_compiled_rows_are_compiled(monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, 'compile', lambda self: compiled.append(self))  # minutes
    bench.main([*TINY, '--compile', '--rows', '*compiled*'])
    assert [type(model) for model in compiled] == [torchvision.models.DenseNet, densenet.DenseNet]


def test_out_of_memory_is_a_row(capsys, tmp_path):
    time = bench.Runner.time

    def out_of_memory_if_plain(self, steps):
        if self.row.mode == 'plain':
            raise torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
        return time(self, steps)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench.Runner, 'time', out_of_memory_if_plain)
        bench.main([*TINY, '--rows', 'ours*', '--csv', str(tmp_path / 'bench.csv')])
    table = capsys.readouterr().out
    assert table.count('out of memory') == 1 and 'nan' not in table
    assert [row['failure'] for row in read_csv(tmp_path / 'bench.csv')] == ['out of memory'] + \
        3 * ['']
    bench.main([*TINY, '--rows', 'ours*', '--batch-size', '1000000000'])  # for real
    assert capsys.readouterr().out.count('out of memory') == 4


def test_a_failing_row_is_said_and_the_others_are_shown(capsys, monkeypatch):
    monkeypatch.setitem(bench.MODES, 'block', ())
    with pytest.raises(SystemExit) as exit_:
        bench.main([*TINY, '--rows', 'ours plain', 'ours block'])
    table = capsys.readouterr().out
    assert exit_.value.code == 1 and 'failed: ValueError' in table and '1.00x' in table


def test_what_was_measured_before_an_interruption_is_shown(capsys, monkeypatch):
    time, calls = bench.Runner.time, []

    def interrupted(self, steps):
        calls.append(self.row)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return time(self, steps)

    monkeypatch.setattr(bench.Runner, 'time', interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main([*TINY, '--rows', 'ours plain', 'ours block', '--rounds', '5'])
    assert len([line for line in capsys.readouterr().out.splitlines() if ' MiB ' in line]) == 2


def test_without_timm_its_row_says_so(capsys, monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'timm.models.densenet', None)
    bench.main([*TINY, '--rows', 'timm*', 'ours plain'])
    assert 'needs a package' in capsys.readouterr().out


def test_memory_against_depth(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, 'DEPTHS', (10, 22, 40))
    drawn = {}
    monkeypatch.setattr(bench, 'draw_memory_vs_depth', lambda path, curves, *labels, draw=(
        bench.draw_memory_vs_depth): (drawn.update(curves), draw(path, curves, *labels)))
    bench.main(['--growth-rate', '4', '--batch-size', '4', '--image-size', '8', '--device', 'cpu',
                '--memory-vs-depth', str(tmp_path / 'memory.png')])
    assert (tmp_path / 'memory.png').stat().st_size > 10_000
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / 'memory.png')
    plain, block, efficient, checkpointed = (drawn[mode] for mode in (
        'plain', 'block', 'memory-efficient', 'checkpointed'))
    for curve in drawn.values():
        assert len(curve) == 3 and curve == sorted(curve)
    assert efficient[-1] < block[-1] < checkpointed[-1] < plain[-1]


def test_the_loader_is_timed_by_the_images_that_arrive(tmp_path, monkeypatch, capsys):
    write_images(tmp_path, {'train/a': 5, 'train/b': 4, 'val/a': 1, 'val/b': 1}, (70, 70))
    now = iter(range(0, 10**6, 3))  # seconds: three between any two looks at the clock
    monkeypatch.setattr(bench.time, 'perf_counter', lambda: float(next(now)))
    bench.main(['--loader', str(tmp_path), '--workers', '0', '2', '--rounds', '3', '--batch-size',
                '4', '--image-size', '66', '--device', 'cpu'])
    assert capsys.readouterr().out.splitlines() == [
        '--workers 0: 3 images/s (3-3), 3 for each of them',
        '--workers 2: 3 images/s (3-3), 2 for each of them']


def test_a_row_whose_blocks_fall_back_is_no_row(monkeypatch):
    make_model = bench.make_model

    def hooked(row, workload):
        model = make_model(row, workload)
        model.features.denseblock2.denselayer1.norm1.register_forward_hook(lambda *_: None)
        return model

    assert {block.path for block in bench.blocks_of(runner('ours', 'block', 'fp32').model)} == {
        'linear'}
    monkeypatch.setattr(bench, 'make_model', hooked)
    with pytest.raises(RuntimeError, match='a block went the plain way: .*norm1 has hooks'):
        runner('ours', 'block', 'fp32')


@pytest.mark.parametrize('argv, complaint', [
    (['--rows', 'mine'], "no row is called that; here there are 'torchvision plain, NCHW'"),
    (['--rows', 'ours*', '--baseline', 'timm plain'], "--baseline: no row is called that; here"),
    (['--precision', 'tf32', '--device', 'cpu'], 'tf32 is for cuda'),
    (['--depth', '41'], 'nearest 40 and 46'),
    (['--rounds', '0'], "'0' is not a whole number"),
    (['--csv', 'no/such/folder/x.csv'], 'no/such/folder/x.csv: no file of its own can be'),
    (['--plot', '.'], 'no file of its own can be written there'),
    (['--plot', 'x.png', '--csv', 'x.png'], 'no file of its own can be written there'),
    (['--arch', 'densenet121', '--depth', '40'], '--arch has a depth and a growth rate of its own'),
    (['--batch-size', '1', '--image-size', '4'], 'more than 1 value per channel'),
    (['--batch-size', '99999999999999999999999'], 'bench.py: error: '),
    (['--growth-rate', '999999999'], 'bench.py: error: '),
    (['--plot', 'x.xyz'], 'x.xyz: a figure is a .png, .pdf or .svg file'),
    (['--memory-vs-depth', '--arch', 'densenet121'], 'has no use for --arch'),
    (['--memory-vs-depth', 'x.png', '--rounds', '3'], 'has no use for --rounds'),
    (['--memory-vs-depth', 'x.png', '--precision', 'fp32', 'bf16'], 'draws one --precision'),
    (['--loader', 'nowhere'], 'no train in nowhere'),
    (['--loader', 'nowhere', '--arch', 'densenet121'], '--loader has no use for --arch'),
    (['--image-size', '2'], 'H and W at least 4'),
    (['--arch', 'densenet121', '--image-size', '65', '--precision', 'fp8'], 'invalid choice'),
    (['--arch', 'resnet50'], 'invalid choice')])
def test_bad_input_is_one_line(argv, complaint, capsys):
    with pytest.raises(SystemExit) as exit_:
        bench.main(argv)
    assert exit_.value.code == 2
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith('bench.py: error: ') and complaint in error


@pytest.mark.cuda
@pytest.mark.parametrize('inference', [False, True])
def test_all_rows_run_on_cuda(inference, tmp_path):
    argv = [flag if flag != 'cpu' else 'cuda' for flag in TINY]
    bench.main([*argv, '--precision', 'fp32', 'tf32', 'bf16', 'fp16', '--csv',
                str(tmp_path / 'bench.csv'), *['--inference'] * inference])
    rows = read_csv(tmp_path / 'bench.csv')
    graphed = 4 * 1 if inference else 4 * 3 + 2 * len(bench.KERNEL_MODES)
    assert sum('CUDA graph' in row['row'] for row in rows) == graphed
    assert all(not row['failure'] or 'needs a package' in row['failure'] for row in rows)
    for row in rows:
        if not row['failure']:
            assert math.isfinite(float(row['ms'])) and float(row['memory_bytes']) > 0
