"""What a run leaves behind and says: its directory, CSV files, TensorBoard, figures, console.

    with claim('work/x') as directory:
        log = RunLog(directory, steps_per_epoch=782, epochs=300)
        log.train_row(0.064, loss=2.1, error=78.2, lr=0.1, images_per_second=5100, data_wait=3)
        log.test_row(epoch=1, loss=1.4, error=50.2, error5=6.4)
        log.close()
"""

import contextlib
import csv
import fcntl
import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

TRAIN_COLUMNS = ('epoch', 'loss', 'error', 'lr', 'images_per_second', 'data_wait')
TEST_COLUMNS = ('epoch', 'loss', 'error', 'error5')
FIGURES = ('loss', 'error', 'loss-error')  # that plot.py draws
RUN_FILES = ('args.json', 'train.csv', 'test.csv', 'latest.pth', 'best.pth')


class RunDirectoryError(Exception):
    """A directory that this run must not write to, said in one line."""


@contextlib.contextmanager
def claim(directory, *, may_hold_run=False):
    """Make a run's directory and keep other runs out of it; a dead process keeps out nobody.

    Args:
        may_hold_run: a run's files may be there already, because it goes on or is overwritten.

    Raises:
        RunDirectoryError: in use, holding a run, or not to be made.
    """
    directory = Path(directory)
    was_there, locks = directory.exists(), []

    def unlock():
        while locks:
            os.close(locks.pop())

    try:
        directory.mkdir(parents=True, exist_ok=True)
        locks.append(os.open(directory, os.O_RDONLY))
    except OSError as error:
        raise RunDirectoryError(f'cannot make {directory}: {error.strerror}; name another one by '
                                f'--save or --name') from error
    os.register_at_fork(after_in_child=unlock)  # workers that outlive a killed run must not hold it
    try:
        fcntl.flock(locks[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        unlock()
        raise RunDirectoryError(f'{directory} is in use by another run: wait for it, or name '
                                f'another directory by --save or --name') from error
    except OSError:
        pass  # a file system without locks
    try:
        held = [name for name in RUN_FILES if (directory / name).exists()]
        if held and not may_hold_run:
            raise RunDirectoryError(f'{directory} holds a run ({", ".join(held)}): go on by '
                                    f'--resume, replace it by --overwrite, or name another '
                                    f'directory by --save or --name')
        yield directory
    finally:
        unlock()
        if not was_there:
            with contextlib.suppress(OSError):  # not empty: otherwise, no litter after an error
                directory.rmdir()


def clear(directory):
    """Take out the files of an earlier run; figures are left until they are drawn again."""
    for path in (*(directory / name for name in RUN_FILES),
                 *directory.glob('tensorboard/events.out.tfevents.*')):
        path.unlink(missing_ok=True)


class RunLog:
    """Writes the rows of a run to CSV and TensorBoard and tells its progress on the console.

    Args:
        directory: the run's.
        steps_per_epoch, epochs: for the progress bar and the time left.
        start: (epoch, step) that the run goes on from; the CSV files lose the rows after it, once
            there are new ones to take their place.
        tensorboard: also write event files, into `tensorboard/`.
        figures: redraw the figures in the background after each epoch.
    """

    def __init__(self, directory, *, steps_per_epoch, epochs, start=(1, 0), tensorboard=False,
                 figures=True):
        self.directory, self.steps_per_epoch, self.epochs = directory, steps_per_epoch, epochs
        self.steps_here, self.started = 0, time.monotonic()
        epoch, step = start
        done = epoch - 1 + step / steps_per_epoch
        self.train_csv = CsvFile(directory / 'train.csv', TRAIN_COLUMNS,
                                 keep=lambda row: row < done + 1e-5)
        self.test_csv = CsvFile(directory / 'test.csv', TEST_COLUMNS,
                                keep=lambda row: row < epoch)
        self.figures = FigureDrawer(directory) if figures else None
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # here, for it is slow to import

            self.tensorboard = SummaryWriter(directory / 'tensorboard', purge_step=epoch)
        self.bar = None

    def start_epoch(self, epoch, step=0):
        self.epoch, self.step = epoch, step
        self.bar = tqdm(desc=f'epoch {epoch}/{self.epochs}', total=self.steps_per_epoch,
                        initial=step, leave=False, disable=not sys.stderr.isatty(),
                        bar_format='{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}')

    def advance(self):
        """One more step is done."""
        self.step += 1
        self.steps_here += 1
        self.bar.update()

    def train_row(self, epoch, loss, error, lr, images_per_second, data_wait):
        """A row of train.csv; `epoch` fractional, `error` and `data_wait` in percent.

        `data_wait` is the share of time in which the device waited for data.
        """
        self.train_csv.write(f'{epoch:.5f}', f'{loss:.6g}', f'{error:.6g}', f'{lr:.6g}',
                             f'{images_per_second:.1f}', f'{data_wait:.1f}')
        left = timedelta(seconds=round(self._seconds_left()))
        speed = f'{images_per_second:.0f} images/s, {data_wait:.0f}% waiting for data'
        self.bar.set_postfix_str(f'loss {loss:.4f}, error {error:.2f}%, {speed}, {left} left')
        if not sys.stdout.isatty():
            print(f'epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps_per_epoch}  '
                  f'loss {loss:.4f}  error {error:.2f}%  lr {lr:g}  {speed}  {left} left',
                  flush=True)

    def _seconds_left(self):
        steps_left = (self.epochs - self.epoch + 1) * self.steps_per_epoch - self.step
        return (time.monotonic() - self.started) / max(1, self.steps_here) * steps_left

    def test_row(self, epoch, loss, error, error5):
        """A row of test.csv; `epoch` whole, errors in percent."""
        self.test_csv.write(epoch, f'{loss:.6g}', f'{error:.6g}', f'{error5:.6g}')

    def end_epoch(self, train, test, best):
        """Sum up an epoch: train (loss, error), test (loss, error, error5), best (error, epoch)."""
        self.bar.close()
        print(f'epoch {self.epoch}/{self.epochs}  '
              f'train loss {train[0]:.4f}, error {train[1]:.2f}%  '
              f'test loss {test[0]:.4f}, error {test[1]:.2f}%, top-5 {test[2]:.2f}%  '
              f'best {best[0]:.2f}% (epoch {best[1]})', flush=True)
        if self.tensorboard:
            for tag, value in (('train_loss', train[0]), ('train_acc', 100 - train[1]),
                               ('val_loss', test[0]), ('val_acc', 100 - test[1])):
                self.tensorboard.add_scalar(tag, value, self.epoch)
        if self.figures:
            self.figures.redraw()

    def finish_figures(self):
        """Wait for the last drawing, and say where it is."""
        if self.figures and self.figures.finish():
            print('figures:', *(self.directory / f'{name}.png' for name in FIGURES))

    def close(self):
        if self.bar:
            self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        self.train_csv.close()
        self.test_csv.close()


class NoLog:
    """The log of a process that is to leave nothing behind: of several, rank 0 alone writes."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class CsvFile:
    """Appends rows; of those of an earlier process it keeps what `keep` says of their epoch.

    The others are taken out with the first new row and not before: a run that fails to go on
    leaves the files as they were.
    """

    def __init__(self, path, columns, keep):
        self.path, self.columns, self.keep, self.file = path, columns, keep, None

    def write(self, *values):
        if self.file is None:
            self._open()
        csv.writer(self.file, lineterminator='\n').writerow(values)
        self.file.flush()  # a row that is written stays written when the process is killed

    def _open(self):
        rows = []
        if self.path.exists():
            with open(self.path, newline='', errors='replace') as file:
                lines = list(csv.reader(file)) or [self.columns]
            missing = ['nan'] * (len(self.columns) - len(lines[0]))  # an older version had fewer
            rows = [row + missing for row in lines[1:]
                    if _is_row(row, lines[0]) and self.keep(float(row[0]))]
        temporary = self.path.with_name(f'.{self.path.name}.tmp')
        with open(temporary, 'w', newline='') as file:
            csv.writer(file, lineterminator='\n').writerows([self.columns, *rows])
        os.replace(temporary, self.path)  # the file is never without the rows to keep
        self.file = open(self.path, 'a', newline='')

    def close(self):
        if self.file is not None:
            self.file.close()


def _is_row(row, columns):
    """Not what a killed process left of a row."""
    try:
        return len([float(value) for value in row]) == len(columns)
    except ValueError:
        return False


class FigureDrawer:
    """Runs plot.py in the background; a plot that fails is one warning."""

    def __init__(self, directory):
        script = Path(__file__).with_name('plot.py')
        self.command = [sys.executable, str(script), str(directory)]
        self.process, self.warned = None, False

    def redraw(self):
        """Draw, unless the last drawing is not done yet: then the next call will."""
        if self.process is not None and self.process.poll() is None:
            return
        self._collect()
        try:  # in a session of its own: Ctrl-C is for the training
            self.process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL,
                                            stderr=subprocess.PIPE, text=True,
                                            start_new_session=True)
        except OSError as error:
            self._warn(str(error))

    def finish(self):
        """Draw what there is now, wait for it, and say whether it is drawn."""
        self._collect()
        self.redraw()
        return self._collect()

    def _collect(self):
        if self.process is None:
            return False
        try:
            _, complaint = self.process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            _, complaint = self.process.communicate()
        drawn = self.process.returncode == 0
        if not drawn:
            self._warn(complaint)
        self.process = None
        return drawn

    def _warn(self, complaint):
        if not self.warned:
            last = (complaint.strip().splitlines() or ['no reason given'])[-1]
            print(f'train.py: warning: the figures were not drawn: {last}', file=sys.stderr)
        self.warned = True
