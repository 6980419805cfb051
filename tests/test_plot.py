"""plot.py against brute-force definitions, and as people run it."""

import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pytest

import plot

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
    """Three epochs, whose last test error is 4.73 and whose best one came the epoch before."""
    train = [f'{i / 4},{2 / i:.4f},{60 / i:.4f},0.1,5000,0.3' for i in range(1, 13)]
    test = [f'{epoch},{error / 20:.4f},{error},0.2'
            for epoch, error in enumerate([20.0, best, 4.73], start=1)]
    return write_run(directory, [TRAIN_HEADER, *train], ['epoch,loss,error,error5', *test])


def read(tmp_path, content):
    """What read_table makes of a file of this content, as lists."""
    path = tmp_path / 'log.csv'
    path.write_bytes(content)
    return {name: values.tolist() for name, values in plot.read_table(path).items()}


def draw(directory, column='error'):
    """The axes of one figure of one run."""
    return plot.make_figure(plot.read_runs([directory]), [column]).axes[0]


def legend_of(axes):
    return [text.get_text().strip() for text in axes.get_legend().get_texts()]


def lines_of(axes, color):
    return [line for line in axes.lines if line.get_color() == color]


# ---- running mean -------------------------------------------------------------------------

def brute_force_mean(epochs, values):
    spans = [b - a for a, b in zip(epochs, epochs[1:])]
    weights = [spans[0], *spans] if spans else [1]
    means = []
    for i, end in enumerate(epochs):
        window = [j for j in range(i + 1) if epochs[j] - (end - 1) > 1e-6]
        means.append(math.fsum(values[j] * weights[j] for j in window)
                     / math.fsum(weights[j] for j in window))
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
def test_running_mean_is_the_definition(epochs):
    values = np.random.default_rng(1).normal(size=len(epochs))
    np.testing.assert_allclose(plot.running_mean(epochs, values),
                               brute_force_mean(epochs, values), rtol=1e-12, atol=1e-14)


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
def test_a_row_that_is_not_whole_is_left_out(tmp_path, capsys, row):
    rows = [b'epoch,loss,error,error5', b'1,2,30,4', b'2,1,20,3', row]
    assert read(tmp_path, b'\n'.join(rows)) == {
        'epoch': [1, 2], 'loss': [2, 1], 'error': [30, 20], 'error5': [4, 3]}
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith('plot.py: warning: ') and 'log.csv: left out' in warning
    rows.insert(2, rows.pop())  # in the middle, too
    assert read(tmp_path, b'\n'.join(rows))['epoch'] == [1, 2]


def test_a_run_that_goes_on_with_a_column_more_than_its_header_has(tmp_path):
    assert read(tmp_path, b'epoch,loss,error,error5\n1,2,30,4\n2,1,20,3,21\n')['error'] == [30, 20]


def test_a_file_cut_off_anywhere_gives_its_whole_rows(tmp_path):
    rows = [f'{i / 3:.5f},{2 / i:.6g},{60 / i:.6g},0.1,500.0,1.5' for i in range(1, 5)]
    content = '\n'.join([TRAIN_HEADER, *rows, ''])
    for size in range(len(TRAIN_HEADER), len(content) + 1):
        cut = content[:size]
        whole = [row for row in rows if row[:-2] in cut]  # of data_wait a digit is enough
        assert read(tmp_path, cut.encode())['error'] == [float(row.split(',')[2]) for row in whole]


# ---- figures ------------------------------------------------------------------------------

def test_legend_says_final_and_best(tmp_path):
    axes = draw(some_run(tmp_path / 'run'))
    # 60/9 .. 60/12, the mean over the last epoch
    mean = sum(round(60 / i, 4) for i in range(9, 13)) / 4
    assert legend_of(axes) == [f'train (mean over an epoch), final {mean:.2f}%',
                               'test, final 4.73%, best 4.65% (epoch 2)']
    assert axes.get_xlabel() == 'epoch' and axes.get_ylabel() == 'error (%)'
    loss = draw(tmp_path / 'run', 'loss')
    assert loss.get_ylabel() == 'cross-entropy loss'
    assert legend_of(loss)[1] == 'test, final 0.236, best 0.233 (epoch 2)'


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


def test_log_axis_over_a_decade_with_plain_ticks_and_zeros(tmp_path):
    run = write_run(tmp_path / 'run', test=['1,2,60', '2,1.5,5', '3,1,0.4', '4,0.9,0'])
    axes = draw(run)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == 'log' and 0 < low <= 0.4 and high >= 60
    axes.get_figure().canvas.draw()
    shown = [label.get_text() for label in axes.get_yticklabels()
             if low <= label.get_position()[1] <= high]
    assert shown == ['0.5', '1', '2', '5', '10', '20', '50']
    assert np.isfinite(axes.transData.transform((4, 0))).all()  # the curve goes down to its zero
    assert draw(run, 'loss').get_yscale() == 'linear'  # 2 to 0.9


def test_one_spike_does_not_squeeze_the_rest(tmp_path):
    run = write_run(tmp_path / 'run', test=['1,2,60', '2,1e30,60', '3,1,50', '4,0.9,40'])
    low, high = draw(run, 'loss').get_ylim()
    assert 0.1 < low < 0.9 and 2 < high < 1e4


@pytest.mark.parametrize('rows', [['1,0,0', '2,0,0'], ['1,-2,5', '2,50,-90', '3,1,900'], ['1,2,5'],
                                  ['1,nan,inf', '2,2,5']],
                         ids=['zeros', 'negative', 'single', 'not finite'])
@pytest.mark.filterwarnings('error')
def test_odd_values_are_drawn_on_a_linear_axis(tmp_path, rows):
    figure = plot.make_figure(plot.read_runs([write_run(tmp_path / 'run', rows, rows)]),
                              ['loss', 'error'])
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_yscale() == 'linear'
        assert all(np.isfinite(line.get_xydata()).all() for line in axes.lines)
        assert len(legend_of(axes)) == 2


def test_a_final_nan_is_said(tmp_path):
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
    figure = plot.make_figure(plot.read_runs([some_run(tmp_path / 'run')]), ['loss', 'error'])
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1 - 1
        assert legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.bbox.x1


def test_comparison_has_a_colour_a_run(tmp_path):
    runs = plot.read_runs([some_run(tmp_path / 'work' / 'a'),
                           some_run(tmp_path / 'work' / 'b', best=4.5),
                           some_run(tmp_path / 'elsewhere' / 'a', best=4.1)])
    axes = plot.make_figure(runs, ['error']).axes[0]
    assert legend_of(axes) == ['work/a, final 4.73%, best 4.65% (epoch 2)',
                               'work/b, final 4.73%, best 4.50% (epoch 2)',
                               'elsewhere/a, final 4.73%, best 4.10% (epoch 2)']
    for color in plot.COLORS[:3]:
        train, test = lines_of(axes, color)
        assert train.get_linewidth() < test.get_linewidth()
        assert len(train.get_xdata()) == 12 and len(test.get_xdata()) == 3


def test_comparison_of_runs_that_only_trained(tmp_path):
    runs = plot.read_runs([write_run(tmp_path / 'a', ['0.5,2,80']),
                           write_run(tmp_path / ('b' * 30), ['0.5,2,81', '1,2,71'])])
    axes = plot.make_figure(runs, ['error']).axes[0]
    assert legend_of(axes) == ['a, train, final 80.00%',
                               'bbbbbbbbbb…bbbbbbbbbbb, train, final 76.00%']
    assert axes.lines[0].get_marker() == 'o'


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
    [label] = legend_of(draw(tmp_path / 'run'))
    assert label.startswith('test' if missing == 'train.csv' else 'train')


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
], ids=['no directory', 'empty', 'headers only', 'nan only', 'folder', 'binary', 'another CSV'])
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
