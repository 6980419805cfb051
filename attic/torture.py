"""Break runs of train.py on purpose, at random moments, and count what is lost by it.

    python attic/torture.py                        # every fault in full: minutes on two CPU cores
    python attic/torture.py --short                # each fault a few times, as the test suite does
    python attic/torture.py --only killed stopped  # some of them

The runs are small, on random images in a temporary directory, each in a process of its own that is
forked from one where torch is imported already. A run has survived a fault if, gone on with by
--resume, it ends as one that nothing happened to: the same weights, optimizer, random state and
test.csv to the bit, and the same train.csv but for the columns of speed. The summary has a line for
each fault: tried, survived, lost. What was lost is kept for inspection, and the exit code is 1.
"""

import argparse
import contextlib
import csv
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import checkpoint  # noqa: E402
import train  # noqa: E402
from checkpoint import CheckpointError  # noqa: E402

STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
SPEED_COLUMNS = ('images_per_second', 'data_wait')
WAYS = 'truncated', 'a byte flipped'


class LostError(Exception):
    """What a fault has cost."""


def check(condition, message):
    if not condition:
        raise LostError(message)


# ---- runs ----------------------------------------------------------------------------------

def make_images(root):
    """36 random images to train on and 8 to test, in four classes."""
    rng = np.random.RandomState(0)
    for split, count in (('train', 9), ('val', 2)):
        for label in 'abcd':
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f'{i}.png')


def recipe(images):
    """Flags with all that is random, and all that is carried from step to step, in them."""
    return ['--dataset', 'folder', '--data', str(images), '--depth', '10', '--growth-rate', '4',
            '--batch-size', '4', '--epochs', '6', '--lr', '0.05', '--drop-rate', '0.2',
            '--grad-accum', '2', '--lr-schedule', 'cosine', '--print-freq', '4', '--device', 'cpu']


def _train(argv, output):
    """The whole of a process: train.py with its output in a file."""
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    torch.set_num_threads(1)
    for number in STOP_SIGNALS:  # until train.py handles them
        signal.signal(number, lambda number, _: os._exit(128 + number))
    print('train.py', *argv, flush=True)
    train.cli(argv)


class Life:
    """A process of train.py; multiprocessing's are not to be asked by several threads at once."""

    lock = threading.Lock()

    def __init__(self, process):
        self.process = process
        with self.lock:
            process.start()
        self.pid, self.kill = process.pid, process.kill

    @property
    def exitcode(self):
        with self.lock:
            return self.process.exitcode

    def join(self, seconds=60):
        ends = time.monotonic() + seconds
        wait_for(lambda: time.monotonic() > ends, self)


class Lab:
    """A temporary directory with images and a run that nothing happens to."""

    def __init__(self, directory):
        self.directory, self.images = directory, directory / 'images'
        self.context = multiprocessing.get_context('forkserver')
        self.context.set_forkserver_preload(['train'])
        make_images(self.images)
        self.recipe = recipe(self.images)
        self.untouched = self.new_run()
        started = time.monotonic()
        check(self.finish(self.untouched) == 0, 'a run that nothing happens to')
        self.seconds = time.monotonic() - started
        self.log(self.untouched).unlink()

    def new_run(self):
        return Path(tempfile.mkdtemp(dir=self.directory)) / 'run'

    def log(self, run):
        return run.parent / 'log'

    def start(self, run, *flags, log=None):
        """A process that begins the run, or goes on with it if there is something to go on from."""
        log = log or self.log(run)
        has_begun = any(version.exists() for version in checkpoint.versions(run / 'latest.pth'))
        argv = [*(['--resume'] if has_begun else self.recipe), '--save', str(run), *flags]
        log.touch()
        size = log.stat().st_size
        process = Life(self.context.Process(target=_train, args=(argv, str(log))))
        wait_for(lambda: log.stat().st_size > size, process)
        return process

    def finish(self, run):
        process = self.start(run)
        process.join(120)
        return process.exitcode

    def check_ended(self, process, run):
        """It has ended well or, with one line that says why, by itself."""
        process.join()
        check(process.exitcode in (0, 2), f'exit code {process.exitcode}')
        check(process.exitcode == 0 or is_one_line(self.log(run)), 'more than one line')
        self.log(run).unlink()

    def check_survived(self, run):
        code = self.finish(run)
        check(code == 0, f'going on ended with exit code {code}')
        check_same_run(run, self.untouched)
        check(not list(run.glob('.*')), 'files that are not complete are left')
        check('Traceback' not in self.log(run).read_text(), 'a traceback')


def check_same_run(one, other):
    """The same weights, optimizer, counters and random state to the bit; the same CSV rows."""
    first, second = (checkpoint.load(run / 'latest.pth') for run in (one, other))
    for saved in (first, second):
        for own in ('args', 'dataset', 'config', 'launcher', 'seconds', 'peak_memory'):
            del saved[own]
    try:
        torch.testing.assert_close(first, second, rtol=0, atol=0)
    except AssertionError as error:
        raise LostError(f'the state differs: {error}') from error
    check((one / 'test.csv').read_bytes() == (other / 'test.csv').read_bytes(), 'test.csv differs')
    first, second = (rows_without_speed(run / 'train.csv') for run in (one, other))
    check(first == second, 'train.csv differs')


def rows_without_speed(path):
    with open(path, newline='') as file:
        return [{name: value for name, value in row.items() if name not in SPEED_COLUMNS}
                for row in csv.DictReader(file)]


def wait_for(condition, process):
    """Until it is so, or the process is not any more."""
    while process.exitcode is None and not condition():
        time.sleep(0.002)


def is_one_line(log, reason=''):
    """Does a run's output end with one line of an error, and nothing like it before?"""
    text = log.read_text()
    return (text.count('train.py: error: ') == 1 and 'Traceback' not in text
            and re.match(f'train.py: error: .*{reason}', text.splitlines()[-1]))


# ---- faults --------------------------------------------------------------------------------
# Each is one try, and raises LostError.

def killed(lab, rng):
    """SIGKILL: at start-up, in a step, in evaluation, while saving, while plotting."""
    run = lab.new_run()
    for _ in range(4):
        process = lab.start(run)
        process.join(rng.uniform(0, lab.seconds))
        process.kill()
        process.join()
    lab.check_survived(run)


def stopped(lab, rng):
    """SIGTERM, SIGINT or SIGUSR1: the step is finished, all is saved, the exit code says it."""
    run = lab.new_run()
    for _ in range(4):
        process = lab.start(run)
        process.join(rng.uniform(0, lab.seconds))
        if process.exitcode is None:
            number = rng.choice(STOP_SIGNALS)
            os.kill(process.pid, number)
            process.join()
            check(process.exitcode in (128 + number, 0), f'exit code {process.exitcode}')
        if process.exitcode == 0:  # the signal came too late
            break
    lab.check_survived(run)


def disk_full(lab, rng):
    """No file may grow beyond some bytes any more, from a moment on, and sometimes it may again."""
    run = lab.new_run()
    for _ in range(2):
        process = lab.start(run)
        process.join(rng.uniform(0, lab.seconds))
        limit = int(10 ** rng.uniform(0, 5))
        with contextlib.suppress(ProcessLookupError):  # it has ended
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            process.join(rng.uniform(0, lab.seconds))
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE,
                             (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        process.join()
        check(process.exitcode in (0, 2), f'exit code {process.exitcode}')
        lab.log(run).unlink()  # which could not grow, either
    lab.check_survived(run)


def moved_away(lab, rng):
    """The directory is renamed under the run: it ends with one line, and goes on where it was."""
    run = lab.new_run()
    process = lab.start(run)
    wait_for((run / 'latest.pth').exists, process)
    process.join(rng.uniform(0, lab.seconds))
    os.rename(run, run.parent / 'moved')
    lab.check_ended(process, run)
    shutil.rmtree(run, ignore_errors=True)  # a figure may have made it again
    os.rename(run.parent / 'moved', run)
    lab.check_survived(run)


def folder_instead(lab, rng):
    """A folder is put in the place of latest.pth: the one before is there to go on from."""
    run = lab.new_run()
    process = lab.start(run)
    wait_for((run / 'latest.pth.1').exists, process)
    process.join(rng.uniform(0, lab.seconds))
    while not (run / 'latest.pth').is_dir():
        (run / 'latest.pth').unlink(missing_ok=True)
        with contextlib.suppress(FileExistsError):  # the run has written it again
            (run / 'latest.pth').mkdir()
    lab.check_ended(process, run)
    (run / 'latest.pth').rmdir()
    lab.check_survived(run)


def damage(path, way, rng):
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    if way == 'truncated':
        del content[place:]
    else:
        content[place] ^= rng.randrange(1, 256)
    path.write_bytes(content)


def damaged(lab, rng):
    """A checkpoint cut off, or one byte of it changed: noticed, and named."""
    path = lab.new_run().parent / 'latest.pth'
    shutil.copy(lab.untouched / 'latest.pth', path)
    damage(path, rng.choice(WAYS), rng)
    try:
        checkpoint.load(path)
    except CheckpointError as error:
        check(str(path) in str(error) and '\n' not in str(error), f'not named: {error}')
    else:
        raise LostError('the damage went unnoticed')
    shutil.rmtree(path.parent)


def damaged_and_resumed(lab, rng):
    """The same, in a run that was killed: it goes on from the checkpoint before."""
    run = lab.new_run()
    process = lab.start(run)
    wait_for((run / 'latest.pth.1').exists, process)
    process.kill()
    process.join()
    damage(run / 'latest.pth', rng.choice(WAYS), rng)
    lab.check_survived(run)
    check('latest.pth.1\n' in lab.log(run).read_text(), 'it does not say where it goes on from')


def two_at_once(lab, rng):
    """Two processes begin the same run: one has it, and the other says so in a line."""
    run = lab.new_run()
    logs = run.parent / 'log', run.parent / 'log2'
    with ThreadPoolExecutor(2) as pool:
        processes = list(pool.map(lambda log: lab.start(run, '--no-plot', log=log), logs))
    for process in processes:
        process.join()
    (won, _), (lost, log) = sorted((process.exitcode, log) for process, log in zip(processes, logs))
    check((won, lost) == (0, 2), f'exit codes {won} and {lost}')
    check(is_one_line(log, '(is in use by another|holds a) run'), 'more than one line')
    check_same_run(run, lab.untouched)


def long_run(lab, rng, epochs=2000):
    """Memory and open files stay as they are after the first 100 epochs, and no process is left."""
    run = lab.new_run()
    process = lab.start(run, '--epochs', str(epochs))
    memory, files, zombies = {}, {}, {}
    proc = Path(f'/proc/{process.pid}')
    while process.exitcode is None:
        time.sleep(0.2)
        with contextlib.suppress(OSError):
            epoch = (run / 'test.csv').read_bytes().count(b'\n')
            if epoch <= epochs:  # and not at its end
                memory[epoch] = int((proc / 'statm').read_text().split()[1])
                files[epoch] = len(os.listdir(proc / 'fd'))
            for child in (proc / 'task' / proc.name / 'children').read_text().split():
                if Path(f'/proc/{child}/stat').read_text().rpartition(')')[2].split()[0] == 'Z':
                    zombies[child] = zombies.get(child, 0) + 1
    check(process.exitcode == 0, f'exit code {process.exitcode}')
    early = statistics.median(size for epoch, size in memory.items() if 100 <= epoch <= 200)
    late = statistics.median(size for epoch, size in memory.items() if epoch > epochs - 100)
    print(f'{early / 256:.1f} MiB in epochs 100 to 200, {late / 256:.1f} MiB in the last 100 of '
          f'{epochs}; {files[min(files)]} to {max(files.values())} open files:')
    check(late < 1.02 * early, f'memory grew from {early} to {late} pages')
    check(max(files[epoch] for epoch in files if epoch > epochs - 100)
          <= max(files[epoch] for epoch in files if 100 <= epoch <= 200), 'open files')
    check(max(zombies.values(), default=0) < 2, 'a zombie was there for more than a moment')
    rows = rows_without_speed(run / 'test.csv')
    check([row['epoch'] for row in rows] == [str(i + 1) for i in range(epochs)], 'test.csv')


# name: (function, tries in full, tries in short)
FAULTS = {
    'killed': (killed, 25, 2), 'stopped': (stopped, 25, 2), 'disk-full': (disk_full, 25, 1),
    'moved-away': (moved_away, 20, 1), 'folder-instead': (folder_instead, 20, 1),
    'damaged': (damaged, 400, 60), 'damaged-and-resumed': (damaged_and_resumed, 20, 1),
    'two-at-once': (two_at_once, 20, 1), 'long-run': (long_run, 1, 0),
}


def make_parser():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--short', action='store_true', help='each fault a few times')
    parser.add_argument('--only', nargs='+', choices=FAULTS, default=[*FAULTS], metavar='FAULT',
                        help=f'some of {", ".join(FAULTS)}')
    parser.add_argument('--seed', type=int, default=1, help='(default: %(default)s)')
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    directory, lost = Path(tempfile.mkdtemp(prefix='torture-')), 0
    os.environ['PYTHONPATH'] = str(ROOT)  # for the process that all others are forked from
    lab = Lab(directory)

    def one_try(function, seed):
        try:
            function(lab, random.Random(seed))
        except Exception as error:
            return f'{type(error).__name__}: {error}'

    print(f'{"fault":<20}{"tried":>6}{"survived":>10}{"lost":>6}', flush=True)
    for name in args.only:
        function, *counts = FAULTS[name]
        tries, started = counts[args.short], time.monotonic()
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            results = list(pool.map(one_try, [function] * tries,
                                    [f'{args.seed} {name} {i}' for i in range(tries)]))
        failures = [result for result in results if result]
        for failure in failures:
            print(f'{name}: {failure}', file=sys.stderr)
        lost += len(failures)
        if tries:
            print(f'{name:<20}{tries:>6}{tries - len(failures):>10}{len(failures):>6}'
                  f'{time.monotonic() - started:>8.0f} s', flush=True)
    if lost:
        sys.exit(f'what was lost is in {directory}')
    shutil.rmtree(directory)


if __name__ == '__main__':
    main()
