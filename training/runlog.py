"""Files and console output of a run: directory, CSV files, TensorBoard, figures.

    with lock_directory('work/x') as directory:
        log = RunLog(directory, steps_per_epoch=782, epochs=300)
        log.start_epoch(1)
        for images, labels in log.watch(loader):
            log.advance(len(images))
        log.train_row(loss=2.1, error=78.2, lr=0.1)
        log.end_epoch(train=(1.6, 58.1), test=test_result, best='best 50.2% (epoch 1)')
        log.close()
"""

import contextlib
import math
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import timedelta
from importlib import metadata
from pathlib import Path

import torch
from tqdm import tqdm

from training.console import UserError, say, warn
from training.files import remove_temporary_files, write_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

TRAIN_COLUMNS = ('epoch', 'loss', 'error', 'lr', 'images_per_second', 'data_wait')
TEST_COLUMNS = ('epoch', 'loss', 'error', 'error5', 'balanced_error')
FIGURES = ('loss', 'error', 'loss-error')  # drawn by plot.py
RUN_FILES = ('args.json', 'train.csv', 'test.csv', 'latest.pth', 'latest.pth.1', 'best.pth')
REPORT_FILES = ('metrics.json', 'confusion.csv', 'mistakes.npz', 'predictions.csv',
                'predictions-val.csv', 'predictions.npz', 'predictions-val.npz', 'report.html',
                *(f'{name}.png' for name in ('confusion', 'roc', 'precision-recall', 'reliability',
                                             'recall', 'mistakes')))  # of --evaluate


# ---- the directory ------------------------------------------------------------------------

@contextlib.contextmanager
def lock_directory(directory, *, exist_ok=False):
    """Create and lock the run directory; the lock is released if the process dies.

    Args:
        exist_ok: the directory may already hold a run, which is resumed or overwritten.

    Raises:
        UserError: it is in use, or holds a run.
        OSError: it can't be created.
    """
    directory = Path(directory)
    is_new, lock = not directory.exists(), contextlib.ExitStack()  # closing it twice is a no-op
    directory.mkdir(parents=True, exist_ok=True)
    try:
        if fcntl is None:
            warn(f'no file locks on this system: start no second run in {directory}')
        else:
            _lock(directory, lock)
        held = [name for name in RUN_FILES if (directory / name).exists()]
        if held and not exist_ok:
            raise UserError(f'{directory} holds a run ({", ".join(held)}): --resume continues it, '
                            f'--overwrite replaces it, and --save or --name choose another '
                            f'directory')
        remove_temporary_files(directory)
        yield directory
    finally:
        lock.close()
        if is_new:
            with contextlib.suppress(OSError):  # if not empty, keep it
                directory.rmdir()


def _lock(directory, lock):
    """Lock the directory until `lock`, an ExitStack, is closed or the process dies."""
    file = os.open(directory, os.O_RDONLY)
    lock.callback(os.close, file)
    os.register_at_fork(after_in_child=lock.close)  # workers may outlive a killed run
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f'{directory} is in use by another run: wait for it, or choose another '
                        f'directory by --save or --name') from error
    except OSError:
        pass  # a file system without locks


def clear(directory):
    """Delete the files of an earlier run; its training curves will be overwritten."""
    for pattern in (*RUN_FILES, *REPORT_FILES, *(f'on-*/{name}' for name in REPORT_FILES),
                    'tensorboard/events.out.tfevents.*'):
        for path in directory.glob(pattern):
            path.unlink()


def write_record(directory, args, **settings):
    """Write args.json: flags, settings and versions."""
    try:
        commit = subprocess.run(['git', 'describe', '--always', '--dirty', '--abbrev=40'],
                                cwd=Path(__file__).parent, capture_output=True,
                                text=True).stdout.strip() or None
    except OSError:  # git is not installed
        commit = None
    record = {'args': vars(args), **settings, 'git_commit': commit,
              'versions': {'python': platform.python_version(), 'torch': torch.__version__,
                           'torchvision': metadata.version('torchvision'),
                           'cuda': torch.version.cuda}}
    write_json(directory / 'args.json', record)


# ---- the log ------------------------------------------------------------------------------

class RunLog:
    """Logs a run to CSV files, TensorBoard and the console.

    Args:
        directory: the run's.
        steps_per_epoch, epochs: for the progress bar and the time left.
        start: (epoch, step) at which the run is resumed; later rows are removed.
        tensorboard: also write event files into `tensorboard/`.
        figures: redraw the figures in the background after each epoch.
        split: 'val' or 'test', the split of test.csv.
        auc: add a column for the AUC to test.csv.
    """

    def __init__(self, directory, *, steps_per_epoch, epochs, start=(1, 0), tensorboard=False,
                 figures=True, split='test', auc=False):
        self.directory, self.steps_per_epoch, self.epochs = directory, steps_per_epoch, epochs
        epoch, step = start
        self.first_step, self.started = (epoch - 1) * steps_per_epoch + step, time.perf_counter()
        self.train_csv = CsvFile(directory / 'train.csv', TRAIN_COLUMNS,
                                 last_epoch=epoch - 1 + step / steps_per_epoch)
        self.test_columns = (*TEST_COLUMNS, 'auc') if auc else TEST_COLUMNS
        self.test_csv = CsvFile(directory / 'test.csv', self.test_columns, last_epoch=epoch - 1)
        self.split = split
        self.figures = figures
        plot = Path(__file__).resolve().parents[1] / 'plot.py'
        self.plot_command = [sys.executable, str(plot), str(directory)]
        self.tensorboard = self.bar = self.plotting = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import

            self.tensorboard = SummaryWriter(directory / 'tensorboard', purge_step=epoch)

    def start_epoch(self, epoch, step=0):
        self.epoch, self.step = epoch, step
        self._begin_row()
        self.bar = tqdm(desc=f'epoch {epoch}/{self.epochs}', total=self.steps_per_epoch,
                        initial=step, leave=False, disable=not sys.stderr.isatty(),
                        bar_format='{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}')

    def _begin_row(self):
        self.images, self.waited, self.row_started = 0, 0.0, time.perf_counter()

    def watch(self, loader):
        """Yield the batches of a loader, and measure the time spent waiting for them."""
        batches = iter(loader)
        while True:
            started = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - started
            if batch is None:
                return
            yield batch

    def advance(self, num_images):
        """Count a step."""
        self.step += 1
        self.images += num_images
        self.bar.update()

    def train_row(self, loss, error, lr):
        """Write a row of train.csv for the steps since the last one; `error` in percent.

        Its column `data_wait` is the time spent waiting for batches, in percent.
        """
        now, steps = time.perf_counter(), (self.epoch - 1) * self.steps_per_epoch + self.step
        seconds = now - self.row_started
        images_per_second, data_wait = self.images / seconds, 100 * self.waited / seconds
        self._begin_row()
        self.train_csv.write(f'{steps / self.steps_per_epoch:.5f}', f'{loss:.6g}', f'{error:.6g}',
                             f'{lr:.6g}', f'{images_per_second:.1f}', f'{data_wait:.1f}')
        seconds_per_step = (now - self.started) / (steps - self.first_step)
        steps_left = self.epochs * self.steps_per_epoch - steps
        left = timedelta(seconds=round(seconds_per_step * steps_left))
        speed = f'{images_per_second:.0f} images/s, {data_wait:.0f}% waiting for data'
        self.bar.set_postfix_str(f'loss {loss:.4f}, error {error:.2f}%, {speed}, {left} left')
        if not sys.stdout.isatty():
            say(f'epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps_per_epoch}  '
                f'loss {loss:.4f}  error {error:.2f}%  lr {lr:g}  {speed}  {left} left')

    def end_epoch(self, train, test, best):
        """Write a row of test.csv, and print it.

        Args:
            train: (loss, error in percent).
            test: an evaluation.TestResult.
            best: text about the best epoch so far.
        """
        self.test_csv.write(self.epoch, *(f'{getattr(test, name):.6g}'
                                          for name in self.test_columns[1:]))
        self.bar.close()
        same = abs(test.balanced_error - test.error) < 0.005
        more = '' if same else f', balanced {test.balanced_error:.2f}%'
        more += f', top-5 {test.error5:.2f}%' if test.has_top5 else ''
        more += '' if math.isnan(test.auc) else f', AUC {test.auc:.4f}'
        say(f'epoch {self.epoch}/{self.epochs}  '
            f'train loss {train[0]:.4f}, error {train[1]:.2f}%  '
            f'{self.split} loss {test.loss:.4f}, error {test.error:.2f}%{more}  {best}')
        if self.tensorboard:
            for tag, value in (('train_loss', train[0]), ('train_acc', 100 - train[1]),
                               ('val_loss', test.loss), ('val_acc', 100 - test.error)):
                self.tensorboard.add_scalar(tag, value, self.epoch)
        if self.figures and (self.plotting is None or self.plotting.poll() is not None):
            self.start_plot()

    def start_plot(self):
        """Draw the figures in the background."""
        with contextlib.suppress(OSError):  # no memory to fork: the next epoch draws them
            self.plotting = subprocess.Popen(
                self.plot_command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL, start_new_session=True)  # not stopped by Ctrl-C

    def end_run(self):
        """Draw the last figures and print their paths; a failure is only a warning."""
        if not self.figures:
            return
        if self.plotting:
            self.plotting.wait()
        self.start_plot()
        if self.plotting and self.plotting.wait() == 0:
            say('figures:', *(self.directory / f'{name}.png' for name in FIGURES))
        else:
            warn(f'the figures were not drawn: {shlex.join(self.plot_command)} says why')

    def sync(self):
        """Flush all rows to disk before a checkpoint that relies on them."""
        for table in (self.train_csv, self.test_csv):
            os.fsync(table.file.fileno())

    def close(self):
        if self.bar:
            self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        self.train_csv.close()
        self.test_csv.close()


class CsvFile:
    """Appends rows to a file, after removing rows later than `last_epoch`."""

    def __init__(self, path, columns, last_epoch):
        self.file = open(path, 'a')
        lines = path.read_bytes().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b'\n'):  # a killed process may leave half a row
            del lines[-1]
        header, *rows = lines or [b'']
        try:
            epochs = [float(row.partition(b',')[0]) for row in rows]
            if header and not header.startswith(b'epoch,') or epochs != sorted(epochs):
                raise ValueError
        except ValueError:
            raise UserError(f'{path} is not as train.py has written it; if it was edited, move it '
                            f'away, and --resume begins a new one') from None
        kept = [row for row, epoch in zip(rows, epochs) if epoch < last_epoch + 1e-5]
        if not self.file.truncate(len(header) + sum(map(len, kept))):
            self.write(*columns)

    def write(self, *values):
        try:
            print(*values, sep=',', file=self.file, flush=True)
        except OSError as error:
            error.filename = self.file.name
            raise

    def close(self):
        with contextlib.suppress(OSError):  # `write` has already raised it
            self.file.close()
