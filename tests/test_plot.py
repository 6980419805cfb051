"""plot.py against brute-force definitions, and as people run it."""

import csv
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from conftest import ROOT

import plot
from training import report_figures

MAGIC = {'png': b'\x89PNG\r\n\x1a\n', 'pdf': b'%PDF-', 'svg': b'<?xml'}
TRAIN_HEADER = 'epoch,loss,error,lr,images_per_second,data_wait'


@pytest.fixture(autouse=True)
def no_change_of_matplotlibs_settings():
    before = {name: matplotlib.rcParams[name] for name in plot.STYLE}
    yield
    assert before == {name: matplotlib.rcParams[name] for name in plot.STYLE}


def write_run(directory, train=None, test=None):
    """A run directory with these lines in its files, and a header if they have none."""
    directory.mkdir(parents=True)
    for name, lines in (('train.csv', train), ('test.csv', test)):
        if lines is not None:
            header = [] if lines[0].startswith('epoch') else ['epoch,loss,error']
            (directory / name).write_text('\n'.join(header + lines) + '\n')
    return directory


def some_run(directory, best=4.65):
    """Three epochs; the last test error is 4.73, the best one comes an epoch before."""
    train = [f'{i / 4},{2 / i:.4f},{60 / i:.4f},0.1,5000,0.3' for i in range(1, 13)]
    test = [f'{epoch},{error / 20:.4f},{error},0.2'
            for epoch, error in enumerate([20.0, best, 4.73], start=1)]
    return write_run(directory, [TRAIN_HEADER, *train], ['epoch,loss,error,error5', *test])


def read(tmp_path, content):
    """The columns that read_table finds in a file with this content, as lists."""
    path = tmp_path / 'log.csv'
    path.write_bytes(content)
    return {name: values.tolist() for name, values in plot.read_table(path).items()}


def draw(directory, column='error'):
    """The axes of one figure of one run."""
    return plot.curve_figure(plot.read_runs([directory]), [column]).axes[0]


def legend_of(axes):
    return [text.get_text().strip() for text in axes.get_legend().get_texts()]


def lines_of(axes, color):
    return [line for line in axes.lines if line.get_color() == color]


# ---- running mean -------------------------------------------------------------------------

def brute_force_mean(epochs, values, window=1.0):
    spans = [b - a for a, b in zip(epochs, epochs[1:])]
    weights = [spans[0], *spans] if spans else [1]
    means = []
    for i, end in enumerate(epochs):
        rows = [j for j in range(i + 1) if epochs[j] - (end - window) > 1e-6]
        means.append(math.fsum(values[j] * weights[j] for j in rows)
                     / math.fsum(weights[j] for j in rows))
    return means


def test_running_mean_at_the_end_of_an_epoch_is_the_mean_of_its_steps():
    steps = np.random.default_rng(2).normal(size=(3, 94))           # 3 epochs of 94 steps
    bounds = [*range(0, 94, 10), 94]                                # a row every 10, the last of 4
    rows = [(epoch + end / 94, steps[epoch, begin:end].mean())
            for epoch in range(3) for begin, end in zip(bounds, bounds[1:])]
    means = plot.running_mean(*np.array(rows).T)
    np.testing.assert_allclose(means[9::10], steps.mean(1), rtol=1e-9)


@pytest.mark.parametrize('epochs', [
    np.arange(1, 101) / 10,                                         # 1.1 - 1 is not 0.1 in binary
    np.sort(np.random.default_rng(0).uniform(0, 9, 200)),           # uneven
    np.array([0.5, 1.0, 7.0, 7.1, 7.2, 8.0, 8.1, 8.2, 30.0]),       # gaps longer than the window
    np.round(np.arange(1, 60) * 25 / 391, 3),                       # rounded, as in a file
    np.array([0.25]),
], ids=['even', 'uneven', 'gaps', 'rounded', 'single'])
@pytest.mark.parametrize('window', [1.0, 0.15])
def test_running_mean_is_the_definition(epochs, window):
    values = np.random.default_rng(1).normal(size=len(epochs))
    np.testing.assert_allclose(plot.running_mean(epochs, values, window),
                               brute_force_mean(epochs, values, window), rtol=1e-12, atol=1e-14)


def test_running_mean_of_20_000_rows_in_an_epoch():
    values = np.random.default_rng(3).normal(size=20_000)
    mean = plot.running_mean(np.arange(1, 20_001) / 20_000, values)
    np.testing.assert_allclose(mean, np.cumsum(values) / np.arange(1, 20_001), atol=1e-12)


def test_running_mean_recovers_from_a_huge_spike():
    values = np.full(100, 0.125)
    values[20] = 1e30
    mean = plot.running_mean(np.arange(1, 101) / 10, values)
    np.testing.assert_allclose(mean[31:], 0.125, rtol=1e-12)
    assert mean[25] > 1e28


# ---- reading ------------------------------------------------------------------------------

def test_columns_are_found_by_name(tmp_path):
    spreadsheet = b'\xef\xbb\xbferror,data_wait, lr,epoch,loss\r\n50,7,0.1,1,2.5\r\n25,7,0.1,2,1.5'
    assert read(tmp_path, spreadsheet) == {
        'error': [50, 25], 'data_wait': [7, 7], 'lr': [0.1, 0.1], 'epoch': [1, 2],
        'loss': [2.5, 1.5]}


@pytest.mark.parametrize('row', [b'3,0.3,5', b'3,0.3', b'3,what,4,5', b'\x00\xff'])
def test_incomplete_rows_are_left_out(tmp_path, capsys, row):
    rows = [b'epoch,loss,error,error5', b'1,2,30,4', b'2,1,20,3', row]
    assert read(tmp_path, b'\n'.join(rows)) == {
        'epoch': [1, 2], 'loss': [2, 1], 'error': [30, 20], 'error5': [4, 3]}
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith('plot.py: warning: ') and 'log.csv: left out' in warning
    rows.insert(2, rows.pop())  # in the middle, too
    assert read(tmp_path, b'\n'.join(rows))['epoch'] == [1, 2]


def test_a_resumed_run_may_add_a_column(tmp_path):
    assert read(tmp_path, b'epoch,loss,error,error5\n1,2,30,4\n2,1,20,3,21\n')['error'] == [30, 20]


def test_a_truncated_file_gives_its_complete_rows(tmp_path):
    rows = [f'{i / 3:.5f},{2 / i:.6g},{60 / i:.6g},0.1,500.0,1.5' for i in range(1, 5)]
    content = '\n'.join([TRAIN_HEADER, *rows, ''])
    for size in range(len(TRAIN_HEADER), len(content) + 1):
        cut = content[:size]
        whole = [row for row in rows if row[:-2] in cut]  # of data_wait a digit is enough
        assert read(tmp_path, cut.encode())['error'] == [float(row.split(',')[2]) for row in whole]


def test_a_row_without_a_finite_epoch_or_value_is_not_drawn(tmp_path):
    run = write_run(tmp_path / 'run', ['1,2,50', 'inf,1,40', 'nan,1,30', '2,inf,20'])
    axes = draw(run)
    assert [line.get_xydata().tolist() for line in axes.lines] == 2 * [[[1, 50], [2, 20]]]
    assert draw(run, 'loss').lines[0].get_xydata().tolist() == [[1, 2]]


# ---- training curves ----------------------------------------------------------------------

def test_legend_says_what_each_line_is_with_final_and_best(tmp_path):
    axes = draw(some_run(tmp_path / 'run'))
    # 60/9 .. 60/12, the mean over the last epoch
    mean = sum(round(60 / i, 4) for i in range(9, 13)) / 4
    assert legend_of(axes) == [f'train (mean over an epoch), final {mean:.2f}%',
                               'train (as logged)', 'test, final 4.73%, best 4.65% (epoch 2)']
    assert axes.get_xlabel() == 'epoch' and axes.get_ylabel() == 'error (%, log scale)'
    loss = draw(tmp_path / 'run', 'loss')
    assert loss.get_ylabel() == 'cross-entropy loss (log scale)'
    assert legend_of(loss)[2] == 'test, final 0.236, best 0.233 (epoch 2)'


def test_curves_are_the_files_numbers(tmp_path):
    axes = draw(some_run(tmp_path / 'run'))
    mean, raw = lines_of(axes, plot.COLORS[0])
    [test] = lines_of(axes, plot.COLORS[1])
    assert raw.get_ydata().tolist() == [round(60 / i, 4) for i in range(1, 13)]
    assert raw.get_alpha() < 0.5 and mean.get_alpha() is None
    np.testing.assert_allclose(mean.get_ydata(),
                               brute_force_mean(raw.get_xdata(), raw.get_ydata()))
    assert test.get_xdata().tolist() == [1, 2, 3]
    assert test.get_ydata().tolist() == [20.0, 4.65, 4.73]
    assert test.get_marker() == 'o'  # three points only


def test_a_row_of_few_images_is_averaged_with_the_row_before(tmp_path):
    """391 steps an epoch, a row every 130: the last row of an epoch covers one step."""
    steps = [130, 260, 390, 391, 521, 651, 781, 782]
    errors = [50, 40, 30, 0, 30, 25, 20, 0]
    run = write_run(tmp_path / 'run', [f'{step / 391:.5f},1,{error}'
                                       for step, error in zip(steps, errors)])
    _, raw = draw(run).lines
    merged = [30 * 130 / 131, 20 * 130 / 131]
    np.testing.assert_allclose(raw.get_ydata(), [50, 40, 30, merged[0], 30, 25, 20, merged[1]],
                               rtol=1e-4)


@pytest.mark.parametrize('column, ticks', [('error', ['0.5', '1', '2', '5', '10', '20', '50']),
                                           ('loss', ['1', '2'])])
def test_every_value_axis_is_logarithmic_with_plain_ticks(tmp_path, column, ticks):
    run = write_run(tmp_path / 'run', test=['1,2,60', '2,1.5,5', '3,1,0.4', '4,0.9,0.5'])
    axes = draw(run, column)
    low, high = axes.get_ylim()
    axes.get_figure().draw_without_rendering()
    assert axes.get_yscale() == 'log'
    assert all(low < value < high for line in axes.lines for value in line.get_ydata())
    assert [label.get_text() for label in axes.get_yticklabels()
            if low <= label.get_position()[1] <= high] == ticks


@pytest.mark.parametrize('values, limits, off_scale', [
    ([60, 50, 1e6, 40, 30, 20], (20, 120), 'max 1000000.00%'),
    ([60, 50, 40, 1e-6, 30, 20], (10, 60), 'min 0.00%'),
    ([60, 50, 40, 30, 20, 0], (20, 60), 'min 0.00%'),   # 0 has no place on the axis
    ([60, 50, 100, 40, 30, 20], (20, 100), None),       # in reach
    ([60, 50, 40, 30, 2, 1], (1, 60), None)],           # no spike: it ends there
    ids=['up', 'down', 'zero', 'small', 'end'])
def test_a_spike_does_not_squeeze_the_rest_and_is_in_the_legend(
        tmp_path, values, limits, off_scale):
    run = write_run(tmp_path / 'run', test=[f'{i},1,{value}' for i, value in enumerate(values, 1)])
    axes = draw(run)
    np.testing.assert_allclose(axes.get_ylim(), limits, rtol=0.2)
    assert axes.get_ylim()[0] < limits[0] and axes.get_ylim()[1] > limits[1]
    [label] = legend_of(axes)
    assert label.partition('\noff scale: ')[2] == (off_scale or '')
    assert np.isfinite(axes.transData.transform((4, 0))).all()  # the curve goes down to its zero


@pytest.mark.parametrize('rows', [['1,0,0', '2,0,0'], ['1,-2,5', '2,50,-90', '3,1,900'], ['1,2,5'],
                                  ['1,nan,inf', '2,2,5'], ['1,0,0', '2,9,9', '3,0,0']],
                         ids=['zeros', 'negative', 'single', 'not finite', 'mostly zero'])
@pytest.mark.filterwarnings('error')
def test_odd_values_are_drawn(tmp_path, rows):
    figure = plot.curve_figure(plot.read_runs([write_run(tmp_path / 'run', rows, rows)]),
                               ['loss', 'error'])
    figure.draw_without_rendering()
    for axes in figure.axes:
        low, high = axes.get_ylim()
        assert 0 < low < high < 1e4
        assert all(np.isfinite(line.get_xydata()).all() for line in axes.lines)
        assert len(legend_of(axes)) == 3


def test_a_final_nan_is_in_the_legend(tmp_path):
    run = write_run(tmp_path / 'run', test=['1,2,50', '2,1,40', '3,nan,nan'])
    assert legend_of(draw(run)) == ['test, final nan%, best 40.00% (epoch 2)']


@pytest.mark.parametrize('progress, last', [(0.064, 1), (1.0, 1), (5.0, 5)])
def test_epoch_axis_has_whole_epochs(tmp_path, progress, last):
    rows = [f'{progress * (i + 1) / 16},1,50' for i in range(16)]
    axes = draw(write_run(tmp_path / 'run', rows))
    left, right = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if left <= tick <= right] == list(range(last + 1))


def test_a_single_row_can_be_seen(tmp_path):
    axes = draw(write_run(tmp_path / 'run', ['0.1,2,80'], ['1,1,50']))
    mean, _ = lines_of(axes, plot.COLORS[0])
    assert (mean.get_marker(), lines_of(axes, plot.COLORS[1])[0].get_marker()) == ('o', 'o')


def test_legend_covers_no_curve(tmp_path):
    figure = plot.curve_figure(plot.read_runs([some_run(tmp_path / 'run')]), ['loss', 'error'])
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1 - 1
        assert legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.bbox.x1


def test_comparison_has_a_colour_and_a_marker_for_each_run(tmp_path):
    runs = plot.read_runs([some_run(tmp_path / 'work' / 'a'),
                           some_run(tmp_path / 'work' / 'b', best=4.5),
                           some_run(tmp_path / 'elsewhere' / 'a', best=4.1)])
    axes = plot.curve_figure(runs, ['error']).axes[0]
    assert legend_of(axes) == ['work/a, final 4.73%, best 4.65% (epoch 2)',
                               'work/b, final 4.73%, best 4.50% (epoch 2)',
                               'elsewhere/a, final 4.73%, best 4.10% (epoch 2)']
    for color, marker in zip(plot.COLORS[:3], 'os^'):
        train, test = lines_of(axes, color)
        assert train.get_linewidth() < test.get_linewidth() and test.get_marker() == marker
        assert len(train.get_xdata()) == 12 and len(test.get_xdata()) == 3


def test_comparison_mentions_a_spike_in_training(tmp_path):
    rows = [f'{epoch},1,50' for epoch in range(1, 31)]
    runs = plot.read_runs([write_run(tmp_path / 'a', rows, rows), some_run(tmp_path / 'b')])
    spike = [f'{epoch},{1e4 if epoch == 9 else 1},50' for epoch in range(1, 31)]
    runs.append(plot.read_runs([write_run(tmp_path / 'c', spike, rows)])[0])
    labels = legend_of(plot.curve_figure(runs, ['loss']).axes[0])
    assert ['off scale' in label for label in labels] == [False, False, True]
    assert labels[2].endswith('\noff scale: train max 1.00e+04')


def test_comparison_of_runs_that_only_trained(tmp_path):
    runs = plot.read_runs([write_run(tmp_path / 'a', ['0.5,2,80']),
                           write_run(tmp_path / ('b' * 30), ['0.5,2,81', '1,2,71'])])
    axes = plot.curve_figure(runs, ['error']).axes[0]
    assert legend_of(axes) == ['a, train, final 80.00%',
                               'bbbbbbbbbb…bbbbbbbbbbb, train, final 76.00%']
    assert axes.lines[0].get_marker() == 'o'


# ---- confusion.png ------------------------------------------------------------------------

def write_confusion(directory, counts, names):
    directory.mkdir(exist_ok=True)
    with open(directory / 'confusion.csv', 'w', newline='', errors='surrogateescape') as file:
        csv.writer(file).writerows([['', *names], *([name, *row] for name, row in
                                                    zip(names, counts))])
    return directory


def confusion_figure(directory, counts, names):
    [(name, figure)] = report_figures.figures(write_confusion(directory, counts, names))
    assert name == 'confusion'
    return figure


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('num_classes, numbers, labels', [
    (1, 1, 1), (2, 4, 2), (20, 400, 20), (21, 0, 21), (100, 0, 100), (201, 0, 0)])
def test_figure_shows_the_matrix(tmp_path, num_classes, numbers, labels):
    counts = np.random.default_rng(0).poisson(0.5, (num_classes, num_classes)) + 1
    counts[num_classes // 2] *= num_classes == 1  # a class without images
    names = [f'class {i}' for i in range(num_classes)]
    figure = confusion_figure(tmp_path / 'run', counts, names)
    wrong = sum(counts[i, j] for i, j in np.ndindex(counts.shape) if i != j) / counts.sum()
    assert figure.get_suptitle() == f'run\n{counts.sum():,} images, error {100 * wrong:.2f}%'
    [axes] = figure.axes
    [bar] = axes.child_axes
    drawn = axes.images[0].get_array()
    for i, row in enumerate(counts):
        if row.sum():
            np.testing.assert_allclose(drawn[i], 100 * row / row.sum())
        else:
            assert drawn.mask[i].all()
    for axis in (axes.xaxis, axes.yaxis):  # row 0 is at the top
        assert [label.get_text() for label in axis.get_ticklabels()] == names[:labels]
        assert axis.get_ticklocs().tolist() == list(range(labels))
    low, high = axes.get_ylim()
    assert low > high
    shown = {text.get_position(): text.get_text() for text in axes.texts}
    assert shown == {(j, i): str(counts[i, j]) for i in range(num_classes)
                     for j in range(num_classes) if numbers}
    assert len(axes.texts) == numbers
    assert (axes.get_xlabel(), axes.get_ylabel()) == ('predicted class', 'true class')
    assert bar.get_ylabel() == 'share of the row (%, square-root scale)'
    assert bar.transData.transform((0, 25))[1] == pytest.approx(  # half-way between 0 and 100
        sum(bar.transData.transform([(0, 0), (0, 100)])[:, 1]) / 2)


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('names', [
    ['Gänseblümchen, weiß', 'a "rose"', 'tulip $5 to $6', 'Straße', 'x' * 255,
     os.fsdecode(b'caf\xe9'), '$\\no formula$', 'golden retriever puppy', '1'],
    [f'sweet pepper {i}' for i in range(100)], [f'class {i}' for i in range(20)],
    ['healthy', 'not healthy']], ids=['odd names', '100', '20', '2'])
def test_labels_and_numbers_overlap_nothing_and_stay_inside(tmp_path, names):
    counts = np.full((len(names), len(names)), 1234567)
    figure = confusion_figure(tmp_path / ('a run with a long name' * 5), counts, names)
    figure.draw_without_rendering()
    [axes] = figure.axes
    [bar] = axes.child_axes
    for axis, edges in ((axes.xaxis, ('x0', 'x1')), (axes.yaxis, ('y0', 'y1'))):
        boxes = [label.get_window_extent() for label in axis.get_ticklabels()]
        spans = sorted([getattr(box, edge) for edge in edges] for box in boxes)
        assert all(stop <= start for (_, stop), (start, _) in zip(spans, spans[1:]))
    cell = axes.get_window_extent().width / len(names)
    assert all(text.get_window_extent().width <= cell for text in axes.texts)
    extents = [artist.get_tightbbox() for artist in (axes, bar)]
    extents.append(figure._suptitle.get_window_extent())
    assert min(box.x0 for box in extents) >= 0 and min(box.y0 for box in extents) >= 0
    assert max(box.x1 for box in extents) <= figure.bbox.x1
    assert max(box.y1 for box in extents) <= figure.bbox.y1
    assert axes.get_window_extent().width > 0.4 * figure.bbox.width  # not squeezed by its labels


def test_confusion_is_drawn_whenever_its_file_is_there(tmp_path, capsys):
    alone = write_confusion(tmp_path / 'evaluated', [[5, 1], [0, 4]], ['a', 'b'])
    plot.main([str(alone)])
    assert capsys.readouterr().out == f'{alone / "confusion.png"}\n'
    trained = write_confusion(some_run(tmp_path / 'trained'), [[5, 1], [0, 4]], ['a', 'b'])
    plot.main([str(trained), '--format', 'svg'])
    names = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert names == ['loss.svg', 'error.svg', 'loss-error.svg', 'confusion.svg']


# ---- speed.png ----------------------------------------------------------------------------

def bench_rows(**columns):
    """Three rows as bench.py writes them; a column given as a list has a value for each."""
    rows = []
    for i, name in enumerate(['torchvision plain', 'ours plain', 'ours fused']):
        row = dict(row=name, precision='fp32', batch_size='64', ms=[200, 190, 100][i],
                   ms_quartile1=[190, 180, 95][i], ms_quartile3=[220, 200, 101][i],
                   memory_mib=[500, 490, 120][i], peak_mib=[600, 590, 200][i], failure='',
                   workload='DenseNet, batches of 64; a CPU, torch')
        rows.append({**row, **{key: values[i] for key, values in columns.items()}})
    return rows


def test_speed_is_drawn_from_the_table_of_bench(tmp_path, capsys):
    rows = bench_rows(ms=['nan', 190, 100], failure=['out of memory', '', ''])
    with open(tmp_path / 'speed.csv', 'w', newline='') as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    figure = plot.speed_figure(plot.read_rows(tmp_path / 'speed.csv', plot.BENCH_COLUMNS))
    time, memory = figure.axes
    assert [bar.get_width() for bar in time.patches] == [0, 190, 100]
    assert [bar.get_width() for bar in memory.patches] == [500, 490, 120]
    assert [text.get_text() for text in time.texts] == ['out of memory', '190', '100']
    assert [label.get_text() for label in time.get_yticklabels()] == [
        'torchvision plain', 'ours plain', 'ours fused']
    assert figure.get_suptitle() == 'DenseNet, batches of 64, fp32\na CPU, torch'
    assert memory.get_xlabel() == 'memory held for backward (MiB)'
    low, high = time.get_ylim()
    assert low > high  # the first row is at the top
    plot.main([str(tmp_path / 'speed.csv')])
    assert capsys.readouterr().out == f'{tmp_path / "speed.png"}\n'


def test_rows_of_several_precisions_and_batch_sizes_say_so():
    rows = bench_rows(precision=['fp32', 'bf16', 'bf16'], batch_size=[1, 16, 16],
                      memory_mib=['nan'] * 3, peak_mib=['nan'] * 3)
    [time] = plot.speed_figure(rows).axes  # without memory: inference
    assert [label.get_text() for label in time.get_yticklabels()] == [
        'torchvision plain, fp32, batch 1', 'ours plain, bf16, batch 16',
        'ours fused, bf16, batch 16']
    _, memory = plot.speed_figure(bench_rows(peak_mib=['nan'] * 3)).axes
    assert memory.get_xlabel() == 'peak memory (MiB)'  # a GPU's


# ---- command line -------------------------------------------------------------------------

def test_writes_every_format_and_leaves_nothing_else(tmp_path, capsys):
    run = some_run(tmp_path / 'run')
    plot.main([str(run), '--format', *MAGIC])
    figures = {f'{name}.{suffix}' for name in ('loss', 'error', 'loss-error') for suffix in MAGIC}
    assert set(os.listdir(run)) == figures | {'train.csv', 'test.csv'}
    output = capsys.readouterr()
    assert output.err == ''
    assert set(output.out.splitlines()) == {str(run / name) for name in figures}
    for name in figures:
        assert (run / name).read_bytes().startswith(MAGIC[name[-3:]])
    again = tmp_path / 'new' / 'folder'
    plot.main([str(run), '--output', str(again)])
    for name in ('loss.png', 'error.png', 'loss-error.png'):  # figures repeat to the byte
        assert (again / name).read_bytes() == (run / name).read_bytes()


def test_a_viewer_keeps_the_figure_it_has_opened(tmp_path):
    path = tmp_path / 'loss.png'
    path.write_bytes(b'old')
    with open(path, 'rb') as viewer:
        plot.save_figure(matplotlib.figure.Figure(), path)
        assert viewer.read() == b'old'
    assert path.read_bytes().startswith(MAGIC['png'])


def test_a_failed_write_keeps_the_old_figure(tmp_path, capsys, monkeypatch):
    run = some_run(tmp_path / 'run')
    (run / 'loss.png').write_bytes(b'old')

    def full(self, path, **_):
        path.write_bytes(MAGIC['png'])
        raise OSError(28, 'No space left on device', str(path))

    monkeypatch.setattr(matplotlib.figure.Figure, 'savefig', full)
    assert 'No space left on device' in refused(capsys, run)
    assert (run / 'loss.png').read_bytes() == b'old'
    assert set(os.listdir(run)) == {'train.csv', 'test.csv', 'loss.png'}


@pytest.mark.parametrize('missing', ['train.csv', 'test.csv'])
@pytest.mark.parametrize('header_only', [False, True])
def test_one_file_is_enough(tmp_path, missing, header_only):
    path = some_run(tmp_path / 'run') / missing
    path.write_text('epoch,loss,error\n') if header_only else path.unlink()
    labels = legend_of(draw(tmp_path / 'run'))
    assert {label[:5] for label in labels} == {'test,' if missing == 'train.csv' else 'train'}


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        plot.main([str(argument) for argument in argv])
    output = capsys.readouterr()
    assert (stop.value.code, output.out) == (2, '')
    [line] = output.err.splitlines()
    assert line.startswith('plot.py: error: ')
    return line


@pytest.mark.parametrize('files, reason', [
    (None, 'nothing to draw'),
    ({}, 'nothing to draw'),
    ({'train.csv': TRAIN_HEADER + '\n', 'test.csv': ''}, 'nothing to draw'),
    ({'train.csv': 'epoch,loss,error\n1,nan,nan\n'}, 'nothing to draw'),
    ({'train.csv/x': ''}, 'Is a directory'),
    ({'train.csv': 'ID3\x04 a song\n\x00\n'}, 'train.csv is not a CSV file of a run'),
    ({'train.csv': 'time,temperature\n1,20\n'}, 'train.csv is not a CSV file of a run'),
    ({'confusion.csv': ''}, 'confusion.csv is not a confusion matrix'),
    ({'confusion.csv': ',a,b\na,1,2\n'}, 'confusion.csv is not a confusion matrix'),
    ({'confusion.csv': ',a,b\na,1,2\nb,x,2\n'}, 'confusion.csv is not a confusion matrix'),
    ({'confusion.csv': ',a,b\na,1,2\nb,1\n'}, 'confusion.csv is not a confusion matrix'),
], ids=['no directory', 'empty', 'headers only', 'nan only', 'folder', 'binary', 'another CSV',
        'no matrix', 'not square', 'no number', 'torn'])
def test_nothing_to_draw_is_one_line_and_exit_code_2(tmp_path, capsys, files, reason):
    run = tmp_path / 'run'
    for name, content in (files or {}).items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text(content)
    line = refused(capsys, run)
    assert reason in line and str(run) in line
    assert files is not None or not run.exists()


@pytest.mark.parametrize('argv', [['--format', 'gif'], ['--nonsense'], ['--output'], []])
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)  # where the default, work/cifar10.base, does not exist
    assert argv or 'work/cifar10.base' in refused(capsys)
    if argv:
        refused(capsys, *argv)


def test_a_csv_file_that_is_not_benchs(tmp_path, capsys):
    (tmp_path / 'x.csv').write_text('epoch,loss\n1,2\n')
    assert 'x.csv is not a table with rows and the columns row,' in refused(
        capsys, tmp_path / 'x.csv')
    assert 'No such file' in refused(capsys, tmp_path / 'y.csv')


@pytest.mark.filterwarnings('error')
@pytest.mark.parametrize('name', [b'caf\xe9', b'from $5 to $6', b'$\\frac'])
def test_any_name_of_a_run_folder(tmp_path, name):
    figure = draw(some_run(tmp_path / os.fsdecode(name))).get_figure()
    assert figure.get_suptitle() == name.decode(errors='replace')
    figure.draw_without_rendering()


def test_a_folder_whose_name_is_not_utf_8_as_a_program(tmp_path):
    run = write_confusion(some_run(tmp_path / os.fsdecode(b'caf\xe9')), [[1]], ['a'])
    done = subprocess.run([sys.executable, plot.__file__, run], capture_output=True, timeout=60)
    names = ['loss.png', 'error.png', 'loss-error.png', 'confusion.png']
    assert done.returncode == 0 and len(done.stdout.splitlines()) == len(names)
    assert {name for name in os.listdir(run) if name.endswith('.png')} == {*names}


def test_comparison_goes_to_the_common_parent(tmp_path):
    """Run as a program: from another directory, and with a run that has just begun."""
    some_run(tmp_path / 'work' / 'a')
    some_run(tmp_path / 'work' / 'group' / 'b')
    write_run(tmp_path / 'work' / 'begun', [TRAIN_HEADER])
    script = Path(plot.__file__).resolve()
    done = subprocess.run([sys.executable, script, 'work/a', 'work/group/b', 'work/begun'],
                          cwd=tmp_path, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0
    assert done.stderr == 'plot.py: warning: work/begun: left out, nothing to draw yet\n'
    names = ['compare-loss.png', 'compare-error.png', 'compare-loss-error.png']
    assert done.stdout.splitlines() == [str(tmp_path / 'work' / name) for name in names]
    for name in names:
        assert (tmp_path / 'work' / name).read_bytes().startswith(MAGIC['png'])
    assert set(os.listdir(tmp_path / 'work' / 'a')) == {'train.csv', 'test.csv'}


def test_a_run_whose_name_ends_in_csv(tmp_path):
    run = shutil.copytree(ROOT / 'work/optimizers/sgd', tmp_path / 'run.csv')
    (run / 'loss-error.png').unlink()
    plot.main([str(run)])
    assert (run / 'loss-error.png').exists()
