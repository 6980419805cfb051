"""What a run leaves behind and says: its directory, CSV files, TensorBoard, figures, console.

    with claim('work/x') as directory:
        log = RunLog(directory, steps_per_epoch=782, epochs=300)
        log.train_row(0.064, loss=2.1, error=78.2, lr=0.1, images_per_second=5100, data_wait=3)
        log.test_row(epoch=1, loss=1.4, error=50.2, error5=6.4)
        log.close()
"""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from datetime import timedelta
from pathlib import Path

from tqdm import tqdm

TRAIN_COLUMNS = ('epoch', 'loss', 'error', 'lr', 'images_per_second', 'data_wait')
TEST_COLUMNS = ('epoch', 'loss', 'error', 'error5')
FIGURES = ('loss', 'error', 'loss-error')  # that plot.py draws
RUN_FILES = ('args.json', 'train.csv', 'test.csv', 'latest.pth', 'latest.pth.1', 'best.pth')


class RunDirectoryError(Exception):
    """A directory that this run must not write to, said in one line."""


def say(*words):
    """Print a line; that nobody can read it any more (`| head`, a full disk) does not end a run."""
    error = _print(*words, file=sys.stdout)
    if error:
        warn(f'nothing more is printed: {error.strerror}')


def warn(message, kind='warning'):
    """One line, whatever the names in it: a file may be called a\\nb."""
    line = ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in str(message))
    _print(f'train.py: {kind}: {line}', file=sys.stderr)


def _print(*words, file):
    try:
        print(*words, file=file, flush=True)
    except OSError as error:
        with open(os.devnull, 'w') as nowhere:  # or Python would try again at its exit, and fail
            os.dup2(nowhere.fileno(), file.fileno())
        return error


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
        for path in directory.glob('.*.tmp'):  # what a killed run has not completed
            path.unlink()
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
            say(f'epoch {self.epoch}/{self.epochs}  step {self.step}/{self.steps_per_epoch}  '
                f'loss {loss:.4f}  error {error:.2f}%  lr {lr:g}  {speed}  {left} left')

    def _seconds_left(self):
        steps_left = (self.epochs - self.epoch + 1) * self.steps_per_epoch - self.step
        return (time.monotonic() - self.started) / max(1, self.steps_here) * steps_left

    def test_row(self, epoch, loss, error, error5):
        """A row of test.csv; `epoch` whole, errors in percent."""
        self.test_csv.write(epoch, f'{loss:.6g}', f'{error:.6g}', f'{error5:.6g}')

    def end_epoch(self, train, test, best):
        """Sum up an epoch: train (loss, error), test (loss, error, error5), best (error, epoch)."""
        self.bar.close()
        say(f'epoch {self.epoch}/{self.epochs}  '
            f'train loss {train[0]:.4f}, error {train[1]:.2f}%  '
            f'test loss {test[0]:.4f}, error {test[1]:.2f}%, top-5 {test[2]:.2f}%  '
            f'best {best[0]:.2f}% (epoch {best[1]})')
        with self._events() as tensorboard:
            for tag, value in (('train_loss', train[0]), ('train_acc', 100 - train[1]),
                               ('val_loss', test[0]), ('val_acc', 100 - test[1])):
                tensorboard.add_scalar(tag, value, self.epoch)
        if self.figures:
            self.figures.redraw()

    @contextlib.contextmanager
    def _events(self):
        """Its writer, or if there is none, or none any more, what takes everything in its place."""
        try:
            yield self.tensorboard or NoLog()
        except OSError as error:  # of its thread, which has then ended
            warn(f'no more is written for TensorBoard: {error.strerror}')
            self.tensorboard = None

    def graph(self, model, images):
        """For TensorBoard: the operations of a model in eval mode on images [N, C, H, W]."""
        with self._events() as tensorboard, warnings.catch_warnings():
            warnings.simplefilter('ignore')  # it traces, and torch would have us export
            tensorboard.add_graph(model, images)

    def end_run(self, hyper_parameters, errors):
        """For TensorBoard's HParams tab: {name: value}, and final and best error in percent."""
        known = {name: value if isinstance(value, (bool, int, float)) else str(value)
                 for name, value in hyper_parameters.items() if value is not None}
        with self._events() as tensorboard:
            # '.': by default it would be a run beside this one, named by the time.
            tensorboard.add_hparams(known, dict(zip(('final_error', 'best_error'), errors)),
                                    run_name='.', global_step=self.epochs)

    def sync(self):
        """Have all rows on the disk before a checkpoint that counts on them."""
        self.train_csv.sync()
        self.test_csv.sync()

    def finish_figures(self):
        """Wait for the last drawing, and say where it is."""
        if self.figures and self.figures.finish():
            say('figures:', *(self.directory / f'{name}.png' for name in FIGURES))

    def close(self):
        if self.bar:
            self.bar.close()
        if self.tensorboard:
            with contextlib.suppress(OSError):
                self.tensorboard.close()
        self.train_csv.close()
        self.test_csv.close()


class NoLog:
    """The log of a process that is to leave nothing behind: of several, rank 0 alone writes."""

    def __getattr__(self, name):
        return lambda *args, **kwargs: None


class CsvFile:
    """Appends rows; of those of an earlier process it keeps what `keep` says of their epoch.

    The others, and what is no row, are taken out with the first new row and not before: a run that
    fails to go on leaves the files as they were. What can't be written, because the disk is full,
    waits in memory and is tried again with each further row.
    """

    def __init__(self, path, columns, keep):
        self.path, self.columns, self.keep = path, columns, keep
        self.file, self.size, self.waiting, self.failed = None, 0, b'', False

    def write(self, *values):
        self.waiting += _line(values)
        self._write_what_waits()

    def _write_what_waits(self):
        try:
            if self.file is None:
                self._open()
            elif self.failed:  # what may be there of a row
                self.file.truncate(self.size)
            _write_all(self.file, self.waiting)
            self.size += len(self.waiting)
            self.waiting = b''
        except OSError as error:
            if not self.failed:
                warn(f'{self.path}: {error.strerror}; its rows wait in memory until they can be '
                     f'written')
            self.failed = True

    def _open(self):
        kept = b''.join(map(_line, [self.columns, *self._rows_to_keep()]))
        temporary = self.path.with_name(f'.{self.path.name}.tmp')
        with open(temporary, 'wb', buffering=0) as file:
            _write_all(file, kept)
            os.fsync(file.fileno())
        os.replace(temporary, self.path)  # the file is never without the rows to keep
        # Without a buffer: a row that is written stays written when the process is killed.
        self.file, self.size = open(self.path, 'ab', buffering=0), len(kept)

    def _rows_to_keep(self):
        if not self.path.exists():
            return []
        # Not by the csv module, to which a stray quote makes one field of the rest of the file.
        with open(self.path, errors='replace', newline='\n') as file:
            rows = [line.split(',') for line in file.read().split('\n') if line]
        # As wide as most rows, for the header may be damaged, and an older version had fewer.
        widths = Counter(len(row) for row in rows
                         if _is_row(row, len(row)) or tuple(row) == self.columns[:len(row)])
        width = max(widths, key=lambda width: (widths[width], width), default=0)
        missing = ['nan'] * (len(self.columns) - width)
        return [row[:len(self.columns)] + missing for row in rows
                if _is_row(row, width) and self.keep(float(row[0]))]

    def sync(self):
        if self.waiting:
            self._write_what_waits()
        if self.file is not None:
            with contextlib.suppress(OSError):
                os.fsync(self.file.fileno())

    def close(self):
        if self.waiting:
            self._write_what_waits()
        if self.file is not None:
            self.file.close()


def _line(values):
    return (','.join(map(str, values)) + '\n').encode()


def _write_all(file, content):
    """To an unbuffered file, which writes what there is room for and fails the next time."""
    while content:
        content = content[file.write(content):]


def _is_row(row, columns):
    """Not what a killed process left of a row, or what became of one on a bad disk."""
    try:
        return len([float(value) for value in row]) == columns
    except ValueError:
        return False


class FigureDrawer:
    """Runs plot.py in the background; a plot that fails is one warning."""

    def __init__(self, directory):
        script = Path(__file__).with_name('plot.py')
        self.command = [sys.executable, str(script), str(directory)]
        self.thread, self.drawn, self.warned = None, False, False

    def redraw(self):
        """Draw, unless the last drawing is not done yet: then the next call will."""
        if self.thread is None or not self.thread.is_alive():
            self.thread = threading.Thread(target=self._draw, daemon=True)
            self.thread.start()

    def finish(self):
        """Draw what there is now, and say whether it is drawn."""
        if self.thread is not None:
            self.thread.join()
        self._draw()
        return self.drawn

    def _draw(self):
        self.drawn, complaint = False, ''
        try:  # in a session of its own: Ctrl-C is for the training
            ended = subprocess.run(self.command, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=60,
                                   text=True, errors='replace', start_new_session=True)
            self.drawn, complaint = ended.returncode == 0, ended.stderr
        except (OSError, subprocess.TimeoutExpired) as error:
            complaint = str(error)
        if not self.drawn and not self.warned:
            last = (complaint.strip().splitlines() or ['no reason given'])[-1]
            warn(f'the figures were not drawn: {last}')
            self.warned = True
