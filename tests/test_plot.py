"""plot.py against brute-force definitions, and as people run it: in a process of its own."""

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import plot

PLOT = Path(plot.__file__).resolve()
MAGIC = {'png': b'\x89PNG\r\n\x1a\n', 'pdf': b'%PDF-', 'svg': b'<?xml'}
TRAIN_HEADER = 'epoch,loss,error,lr,images_per_second'


def write_run(directory, train=None, test=None):
    """A run directory with these lines in its files."""
    directory.mkdir(parents=True)
    for name, lines in (('train.csv', train), ('test.csv', test)):
        if lines is not None:
            (directory / name).write_text('\n'.join(lines) + '\n')
    return directory


def some_run(directory, epochs=3, best=4.65):
    """A short run whose last test error is 4.73 and whose best one came the epoch before."""
    train = [f'{i / 4},{2 / i:.4f},{60 / i:.4f},0.1,5000' for i in range(1, 4 * epochs + 1)]
    errors = [20.0 + epoch for epoch in range(epochs - 2)] + [best, 4.73]
    test = [f'{epoch},{error / 20:.4f},{error},0.2' for epoch, error in enumerate(errors, 1)]
    return write_run(directory, [TRAIN_HEADER, *train], ['epoch,loss,error,error5', *test])


def run_plot(*arguments, cwd=None):
    return subprocess.run([sys.executable, PLOT, *map(str, arguments)], cwd=cwd, text=True,
                          capture_output=True, timeout=60)


def draw(directory, column='error'):
    """The axes of one figure of one run."""
    return plot.make_figure(plot.read_runs([directory]), [column]).axes[0]


def legend_of(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


def lines_of(axes, *colors):
    return [line for line in axes.lines if line.get_color() in colors]


# ---- running mean, learning rate, decimation ----------------------------------------------

def brute_force_mean(epochs, values):
    spans = [b - a for a, b in zip(epochs, epochs[1:])]
    weights = [spans[0], *spans] if spans and min(spans) > 0 else [1] * len(epochs)
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
    np.arange(1, 100) / 16,                                         # even
    np.sort(np.random.default_rng(0).uniform(0, 9, 200)),           # uneven
    np.array([0.5, 1.0, 7.0, 7.1, 7.2, 8.0, 8.1, 8.2, 30.0]),       # gaps longer than the window
    np.repeat(np.arange(1.0, 6.0), 4),                              # many rows with one epoch
    np.round(np.arange(1, 60) * 25 / 391, 3),                       # rounded, as in a file
    np.array([0.25]),
], ids=['even', 'uneven', 'gaps', 'repeated', 'rounded', 'single'])
def test_running_mean_is_the_definition(epochs):
    values = np.random.default_rng(1).normal(size=len(epochs))
    np.testing.assert_allclose(plot.running_mean(epochs, values),
                               brute_force_mean(epochs, values), rtol=1e-12, atol=1e-14)


def test_running_mean_of_a_whole_epoch_leaves_out_the_epoch_before():
    # 0.1 * 3 and its like are not exact in binary: a window of 11 rows would show here.
    epochs = np.arange(1, 101) / 10
    values = np.repeat(np.arange(10.0), 10)  # constant within an epoch
    ends = plot.running_mean(epochs, values)[9::10]
    np.testing.assert_allclose(ends, np.arange(10.0), rtol=1e-12)


def test_running_mean_recovers_from_a_huge_spike():
    epochs = np.arange(1, 101) / 10
    values = np.full(100, 0.125)
    values[20] = 1e30
    mean = plot.running_mean(epochs, values)
    np.testing.assert_allclose(mean[31:], 0.125, rtol=1e-12)
    assert mean[25] > 1e28


def test_lr_drops_of_the_papers_schedule():
    epochs = np.arange(1, 300 * 16 + 1) / 16
    # Counted from 1, epoch 150 is the first at 0.01: it runs from progress 149 to 150.
    lr = np.select([epochs <= 149, epochs <= 224], [0.1, 0.01], 0.001)
    assert plot.lr_drops(epochs, lr).tolist() == [149.0, 224.0]


def test_lr_drops_after_warmup_and_by_exactly_half():
    epochs = np.arange(1.0, 11.0)
    lr = np.array([0.02, 0.06, 0.1, 0.1, 0.1, 0.05, 0.05, 0.05, 0.025, 0.025])
    assert plot.lr_drops(epochs, lr).tolist() == [5.0, 8.0]


@pytest.mark.parametrize('rows', [1, 16])
def test_no_lr_drops_for_cosine(rows):
    progress = np.arange(300 * rows) / (300 * rows)
    lr = 0.05 * (1 + np.cos(np.pi * progress))
    lr = np.append(lr, 0.0)  # its end, where it more than halves from row to row
    assert (lr[-3:-1] / 2 >= lr[-2:]).all()
    assert len(plot.lr_drops(np.arange(len(lr)) / rows, lr)) == 0


def test_no_lr_drops_for_a_constant_or_missing_lr():
    assert len(plot.lr_drops(np.arange(5.0), np.full(5, 0.1))) == 0
    assert len(plot.lr_drops(np.empty(0), np.empty(0))) == 0


def test_decimate_keeps_the_envelope():
    epochs = np.linspace(0, 300, 100_003)
    values = np.random.default_rng(2).normal(size=len(epochs))
    fewer_epochs, fewer = plot.decimate(epochs, values, limit=2000)
    assert len(fewer_epochs) == len(fewer) == 2000
    assert (np.diff(fewer_epochs) >= 0).all()
    assert fewer.min() == values.min() and fewer.max() == values.max()
    np.testing.assert_array_equal(plot.decimate(epochs[:2000], values[:2000])[1], values[:2000])


# ---- reading ------------------------------------------------------------------------------

def test_columns_are_found_by_name(tmp_path):
    path = tmp_path / 'train.csv'
    path.write_bytes(b'\xef\xbb\xbferror,"note",lr,epoch,loss\r\n'  # as a spreadsheet writes it
                     b'50,x,0.1,1,2.5\r\n25,,0.1,2,1.5\r\n')
    table = plot.read_table(path)
    assert {name: values.tolist() for name, values in table.items()} == {
        'epoch': [1, 2], 'loss': [2.5, 1.5], 'error': [50, 25], 'lr': [0.1, 0.1]}


def test_classic_file_without_a_header(tmp_path):
    path = tmp_path / 'test.csv'
    path.write_text('1,2.5,50\n2,1.5,25')
    table = plot.read_table(path)
    assert {name: values.tolist() for name, values in table.items()} == {
        'epoch': [1, 2], 'loss': [2.5, 1.5], 'error': [50, 25]}


def test_rows_done_again_after_resuming_replace_the_first_ones(tmp_path):
    path = tmp_path / 'train.csv'
    path.write_text('0.5,9,90\n1,8,80\n1.5,7,70\n1.75,1,10\n1.5,6,60\n2,5,50\n')
    table = plot.read_table(path)
    assert table['epoch'].tolist() == [0.5, 1, 1.5, 1.5, 2]
    assert table['loss'].tolist() == [9, 8, 7, 6, 5]


@pytest.mark.parametrize('line, reason', [
    (b'1.5,0.3', 'expected 3 columns, found 2'),
    (b'1.5,0.3,4,5', 'expected 3 columns, found 4'),
    (b'1.5,what,4', "'what'"),
    (b'1.5,,4', "''"),
    (b'\x00\xff\xfe"\x80,\x01', 'expected 3 columns, found 2'),
    (b'"1.5,0.3\r"', 'expected 3 columns, found 2'),
])
def test_a_bad_row_is_skipped_with_its_line_number(tmp_path, capsys, line, reason):
    path = tmp_path / 'train.csv'
    path.write_bytes(b'epoch,loss,error\n1,2,3\n\n' + line + b'\n2,3,4\n')
    assert plot.read_table(path)['loss'].tolist() == [2, 3]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert warnings[0].startswith(f'plot.py: warning: {path}, line 4: skipped: ')
    assert reason in warnings[0]


@pytest.mark.parametrize('header', ['epxch,loss,error,lr,speed,wait', '', 'epoch,loss,error',
                                    '\x00\x00,epoch,,,,,,', 'epoch loss error'])
def test_rows_are_drawn_under_a_damaged_header(tmp_path, capsys, header):
    path = tmp_path / 'train.csv'
    path.write_text(header + '\n1,2,30,0.1,500,1\n2,1,20,0.01,500,1\n')
    assert {name: values.tolist() for name, values in plot.read_table(path).items()} == {
        'epoch': [1, 2], 'loss': [2, 1], 'error': [30, 20], 'lr': [0.1, 0.01]}
    assert ('line 1: skipped' in capsys.readouterr().err) == bool(header)


@pytest.mark.parametrize('epochs, kept, named', [
    ([1, 2, 3, 40, 5, 6], [1, 2, 3, 5, 6], [4]),
    ([7, 8, 9, 1, 11, 12], [7, 8, 9, 11, 12], [4]),
    ([900, 2, 3], [2, 3], [1]),
    ([1, 2, 3, 4, 2.5, 3.5, 5], [1, 2, 2.5, 3.5, 5], []),         # resumed after 2
    ([1, 1.5, 2, 2.5, 2.25, 2.75], [1, 1.5, 2, 2.25, 2.75], []),  # resumed at another interval
])
def test_a_row_out_of_order_is_named_and_a_resumed_run_is_not(
        tmp_path, capsys, epochs, kept, named):
    path = tmp_path / 'test.csv'
    path.write_text('epoch,loss,error\n' + ''.join(f'{epoch},1,2\n' for epoch in epochs))
    assert plot.read_table(path)['epoch'].tolist() == kept
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == len(named)
    for line, i in zip(lines, named):
        assert f'test.csv, line {i + 1}: skipped: epoch {epochs[i - 1]} is out of order' in line


def test_many_bad_rows_are_summed_up(tmp_path, capsys):
    path = tmp_path / 'train.csv'
    path.write_text('epoch,loss,error\n1,2,3\n' + 'x\n' * 40)
    assert plot.read_table(path)['error'].tolist() == [3]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 6
    assert 'line 3:' in warnings[0] and 'line 7:' in warnings[4]
    assert '35 more lines' in warnings[5] and 'line 42' in warnings[5]


def test_run_names_tell_equal_directories_apart():
    assert plot.run_names([Path('work/a'), Path('work/b')]) == ['a', 'b']
    assert plot.run_names([Path('x/a'), Path('y/a'), Path('y/b')]) == ['x/a', 'y/a', 'b']


# ---- figures ------------------------------------------------------------------------------

def test_legend_says_final_and_best(tmp_path):
    axes = draw(some_run(tmp_path / 'run'))
    assert 'test, final 4.73%, best 4.65% (epoch 2)' in legend_of(axes)
    # 60/9 .. 60/12, the mean over the last epoch
    mean = sum(round(60 / i, 4) for i in range(9, 13)) / 4
    assert f'train (mean over an epoch), final {mean:.2f}%' in legend_of(axes)
    assert axes.get_xlabel() == 'epoch' and axes.get_ylabel() == 'error (%)'
    assert draw(tmp_path / 'run', 'loss').get_ylabel() == 'cross-entropy loss'


def test_curves_are_the_files_numbers(tmp_path):
    axes = draw(some_run(tmp_path / 'run'))
    raw, mean = lines_of(axes, plot.COLORS[0])
    [test] = lines_of(axes, plot.COLORS[1])
    assert raw.get_ydata().tolist() == [round(60 / i, 4) for i in range(1, 13)]
    assert raw.get_alpha() < 0.5 and mean.get_alpha() is None
    np.testing.assert_allclose(mean.get_ydata(),
                               brute_force_mean(raw.get_xdata(), raw.get_ydata()))
    assert test.get_xdata().tolist() == [1, 2, 3]
    assert test.get_ydata().tolist() == [20.0, 4.65, 4.73]
    assert test.get_marker() == 'o'  # three points only


def test_lr_drops_are_marked_and_labelled_once(tmp_path):
    rows = [f'{i / 2},1,5,{0.1 if i <= 8 else 0.01 if i <= 12 else 0.001},9' for i in range(1, 17)]
    axes = draw(write_run(tmp_path / 'run', [TRAIN_HEADER, *rows]))
    marks = lines_of(axes, plot.GREY)
    assert [mark.get_xdata()[0] for mark in marks] == [4.0, 6.0]
    assert legend_of(axes).count('learning rate drops') == 1


def test_without_an_lr_column_nothing_is_marked(tmp_path):
    axes = draw(write_run(tmp_path / 'run', ['1,1,50', '2,1,40'], ['1,1,50', '2,1,40']))
    assert lines_of(axes, plot.GREY) == []
    assert len(legend_of(axes)) == 2


def test_log_axis_over_a_decade_with_plain_ticks_and_zeros(tmp_path):
    run = write_run(tmp_path / 'run', test=['1,2,60', '2,1.5,5', '3,1,0.4', '4,0.9,0'])
    axes = draw(run)
    low, high = axes.get_ylim()
    assert axes.get_yscale() == 'log' and 0 < low <= 0.4 and high >= 60
    figure = axes.get_figure()
    figure.canvas.draw()
    shown = [label.get_text() for label in axes.get_yticklabels()
             if low <= label.get_position()[1] <= high]
    assert shown == ['0.5', '1', '2', '5', '10', '20', '50']
    assert draw(run, 'loss').get_yscale() == 'linear'  # 2 to 0.9


@pytest.mark.parametrize('rows', [
    ['1,0,0', '2,0,0'], ['1,-2,5', '2,50,-90'], ['1,2,5'], ['1,nan,inf', '2,2,5', 'nan,3,4'],
    ['1,1e300,-1e99', '2,2,5', '1e99,3,4'],
], ids=['zeros', 'negative', 'single', 'nan', 'huge'])
@pytest.mark.filterwarnings('error')
def test_odd_values_are_drawn_on_a_linear_axis(tmp_path, rows):
    figure = plot.make_figure(plot.read_runs([write_run(tmp_path / 'run', rows, rows)]),
                              ['loss', 'error'])
    figure.canvas.draw()
    for axes in figure.axes:
        assert axes.get_yscale() == 'linear'
        assert all((np.abs(line.get_xydata()) <= 90).all() for line in axes.lines)
        assert len(legend_of(axes)) == 2


def test_a_final_nan_is_said(tmp_path):
    run = write_run(tmp_path / 'run', test=['1,2,50', '2,1,40', '3,nan,nan'])
    assert legend_of(draw(run)) == ['test, final nan%, best 40.00% (epoch 2)']


@pytest.mark.parametrize('progress, last', [(0.064, 1), (1.0, 1), (5.0, 5)])
def test_epoch_axis_has_whole_epochs(tmp_path, progress, last):
    rows = [f'{progress * (i + 1) / 16},1,50' for i in range(16)]
    axes = draw(write_run(tmp_path / 'run', rows))
    axes.get_figure().canvas.draw()
    left, right = axes.get_xlim()
    ticks = [tick for tick in axes.get_xticks() if left <= tick <= right]
    assert ticks == list(range(last + 1))


def test_a_single_row_can_be_seen(tmp_path):
    axes = draw(write_run(tmp_path / 'run', ['0.1,2,80'], ['1,1,50']))
    assert [line.get_marker() for line in axes.lines if len(line.get_label()) > 6
            and not line.get_label().startswith('_')] == ['o', 'o']


def test_legend_covers_no_curve(tmp_path):
    figure = plot.make_figure(plot.read_runs([some_run(tmp_path / 'run')]), ['loss', 'error'])
    figure.canvas.draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.get_window_extent().y1 - 1
        assert legend.y1 <= figure.bbox.y1 and legend.x1 <= figure.bbox.x1


def test_comparison_has_a_colour_a_run(tmp_path):
    runs = plot.read_runs([some_run(tmp_path / 'a'), some_run(tmp_path / '_$b$', best=4.5)])
    axes = plot.make_figure(runs, ['error']).axes[0]
    assert [text.strip() for text in legend_of(axes)] == [
        'a, final 4.73%, best 4.65% (epoch 2)', '_$b$, final 4.73%, best 4.50% (epoch 2)']
    assert not any(text.get_parse_math() for text in axes.get_legend().get_texts())
    for color in plot.COLORS[:2]:
        train, test = lines_of(axes, color)
        assert train.get_linewidth() < test.get_linewidth()
        assert len(train.get_xdata()) == 12 and len(test.get_xdata()) == 3


def test_comparison_of_runs_that_only_trained(tmp_path):
    runs = plot.read_runs([write_run(tmp_path / 'a', ['0.5,2,80']),
                           write_run(tmp_path / 'b', ['0.5,2,81', '1,2,71'])])
    axes = plot.make_figure(runs, ['error']).axes[0]
    assert legend_of(axes) == ['a, train, final 80.00%', 'b, train, final 76.00%']
    assert axes.lines[0].get_marker() == 'o'


def test_importing_and_drawing_leaves_matplotlib_alone(tmp_path):
    # Asking for rcParams['backend'] would itself import pyplot and choose one.
    code = ('import sys; from matplotlib import rcParams; '
            'settings = lambda: {k: rcParams[k] for k in rcParams if k != "backend"};'
            f'before = settings(); import plot; plot.main([{str(some_run(tmp_path / "run"))!r}]);'
            'assert settings() == before; assert "matplotlib.pyplot" not in sys.modules')
    done = subprocess.run([sys.executable, '-c', code], cwd=PLOT.parent, capture_output=True,
                          text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, '')


# ---- command line -------------------------------------------------------------------------

def test_writes_every_format_and_leaves_nothing_else(tmp_path):
    run = some_run(tmp_path / 'run')
    done = run_plot(run, '--format', 'png', 'pdf', 'svg')
    assert (done.returncode, done.stderr) == (0, '')
    figures = {f'{name}.{suffix}' for name in ('loss', 'error', 'loss-error') for suffix in MAGIC}
    assert set(os.listdir(run)) == figures | {'train.csv', 'test.csv'}
    assert sorted(done.stdout.splitlines()) == sorted(str(run / name) for name in figures)
    for name in figures:
        content = (run / name).read_bytes()
        assert content.startswith(MAGIC[name[-3:]]) and len(content) > 5000


def test_figures_repeat_to_the_byte(tmp_path):
    run = some_run(tmp_path / 'run')
    for output in ('once', 'twice'):
        plot.main([str(run), '--output', str(tmp_path / output), '--format', 'png', 'pdf', 'svg'])
    for path in (tmp_path / 'once').iterdir():
        assert path.read_bytes() == (tmp_path / 'twice' / path.name).read_bytes(), path.name
    assert len(os.listdir(tmp_path / 'once')) == 9


def test_a_viewer_keeps_the_figure_it_has_opened(tmp_path):
    run = some_run(tmp_path / 'run')
    (run / 'loss.png').write_bytes(b'old')
    with open(run / 'loss.png', 'rb') as viewer:
        plot.main([str(run)])
        assert viewer.read() == b'old'
    assert (run / 'loss.png').read_bytes().startswith(MAGIC['png'])


def test_a_failed_write_keeps_the_old_figure(tmp_path, monkeypatch):
    run = some_run(tmp_path / 'run')
    (run / 'loss.png').write_bytes(b'old')

    def full(self, content):
        with open(self, 'wb') as file:
            file.write(content[:10])
        raise OSError(28, 'No space left on device', str(self))

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(SystemExit) as stop:
        plot.main([str(run)])
    assert stop.value.code == 2
    assert (run / 'loss.png').read_bytes() == b'old'
    assert set(os.listdir(run)) == {'train.csv', 'test.csv', 'loss.png'}


def test_torn_and_garbage_rows_are_warned_about(tmp_path):
    run = some_run(tmp_path / 'run')
    with open(run / 'train.csv', 'ab') as file:  # a header and 12 rows so far
        file.write(b'\xff\xfe\x00garbage\n3.25,0.1,5,0.1,5000\n3.5,0.1,')
    done = run_plot('run', cwd=tmp_path)
    assert done.returncode == 0
    assert [line.split(': skipped')[0] for line in done.stderr.splitlines()] == [
        'plot.py: warning: run/train.csv, line 14', 'plot.py: warning: run/train.csv, line 16']
    assert (run / 'loss-error.png').exists()


@pytest.mark.parametrize('missing', ['train.csv', 'test.csv'])
@pytest.mark.parametrize('header_only', [False, True])
def test_one_file_is_enough(tmp_path, missing, header_only):
    path = some_run(tmp_path / 'run') / missing
    path.write_text('epoch,loss,error\n') if header_only else path.unlink()
    [label] = legend_of(draw(tmp_path / 'run'))
    assert label.startswith('test' if missing == 'train.csv' else 'train')


@pytest.mark.parametrize('files', [
    None, {}, {'train.csv': TRAIN_HEADER + '\n', 'test.csv': ''}, {'train.csv': '1,nan,nan\n'},
    {'train.csv/': ''},
], ids=['no directory', 'empty directory', 'headers only', 'nan only', 'directory for a file'])
def test_nothing_to_draw_is_one_line_and_exit_code_2(tmp_path, files):
    if files is not None:
        run = write_run(tmp_path / 'run')
        for name, content in files.items():
            (run / name).mkdir() if name.endswith('/') else (run / name).write_text(content)
    done = run_plot('run', cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, '')
    [line] = done.stderr.splitlines()
    assert line.startswith('plot.py: error: ') and 'run' in line


@pytest.mark.parametrize('arguments', [['--format', 'gif'], ['--nonsense'], ['--output'], []])
def test_bad_arguments_are_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)  # where the default, work/cifar10.base, does not exist
    with pytest.raises(SystemExit) as stop:
        plot.main(arguments)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith('plot.py: error: ')
    assert arguments or 'work/cifar10.base' in line


def test_comparison_goes_to_the_common_parent(tmp_path):
    some_run(tmp_path / 'work' / 'a')
    some_run(tmp_path / 'work' / 'group' / 'b')
    write_run(tmp_path / 'work' / 'begun', [TRAIN_HEADER])
    done = run_plot('work/a', 'work/group/b', 'work/begun', cwd=tmp_path)
    names = ['compare-loss.png', 'compare-error.png', 'compare-loss-error.png']
    assert done.returncode == 0
    assert done.stdout.splitlines() == [str(tmp_path / 'work' / name) for name in names]
    assert done.stderr == 'plot.py: warning: work/begun: left out, nothing to draw yet\n'
    for name in names:
        assert (tmp_path / 'work' / name).read_bytes().startswith(MAGIC['png'])
    assert set(os.listdir(tmp_path / 'work' / 'a')) == {'train.csv', 'test.csv'}


def test_the_same_run_twice_is_one_run(tmp_path, capsys):
    run = some_run(tmp_path / 'run')
    plot.main([str(run), f'{run}/', '--output', str(tmp_path / 'figures')])
    assert set(os.listdir(tmp_path / 'figures')) == {'loss.png', 'error.png', 'loss-error.png'}
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_row_a_batch_stays_small_and_quick(tmp_path):
    batches = np.arange(1, 200_001) / 667
    noise = np.random.default_rng(3).uniform(0.5, 1.5, len(batches))
    rows = [f'{epoch},{value / 10},{value}' for epoch, value in zip(batches, 30 * noise)]
    run = write_run(tmp_path / 'run', rows)
    done = run_plot(run, '--format', 'pdf', 'svg')
    assert (done.returncode, done.stderr) == (0, '')
    assert (run / 'error.pdf').stat().st_size < 200_000
    assert (run / 'error.svg').stat().st_size < 500_000
