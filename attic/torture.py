"""Break runs of train.py on purpose, at random moments, and count what is lost by it.

    python attic/torture.py            # in full: 2 to 10 minutes on two CPU cores
    python attic/torture.py --short    # each fault once, as the tests do

The runs are small, on random images in a temporary directory. A run has survived a fault if, after
resuming, it ends like an undisturbed one: bit-identical weights, optimizer, random state and
test.csv, and the same train.csv except for the columns of speed. Otherwise its directory is kept,
and the exit code is 1.
"""

import argparse
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch._dynamo  # once, and not in each process for its optimizer
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from training import checkpoint
from training.console import UserError

# All that is random, and all that is carried from step to step, has a part in these runs.
RECIPE = ['--dataset', 'folder', '--depth', '10', '--growth-rate', '4', '--batch-size', '4',
          '--lr', '0.05', '--drop-rate', '0.2', '--grad-accum', '2',
          '--lr-schedule', 'cosine', '--print-freq', '4', '--device', 'cpu']
STOP_SIGNALS = signal.SIGTERM, signal.SIGINT, signal.SIGUSR1
OF_ONE_PROCESS = 'args', 'dataset', 'config', 'seconds', 'peak_memory'  # two equal runs differ here
FORK = multiprocessing.get_context('fork')  # of this process, which has imported train.py already


def check_same_run(one, other):
    """The same weights, optimizer, counters and random state to the bit; the same CSV rows."""
    first, second = (checkpoint.load(run / 'latest.pth') for run in (one, other))
    for text in ('digests', 'cpu_kernels'):
        assert first.pop(text) == second.pop(text), f'the {text} differ'
    for saved in (first, second):
        del saved['optimizer']['param_groups'][0]['lr']  # set before each step
    torch.testing.assert_close(*({key: value for key, value in saved.items()
                                  if key not in OF_ONE_PROCESS} for saved in (first, second)),
                               rtol=0, atol=0)
    assert (one / 'test.csv').read_bytes() == (other / 'test.csv').read_bytes(), 'test.csv differs'
    first, second = ([line.rsplit(',', 2)[0] for line in open(run / 'train.csv')]
                     for run in (one, other))  # without images_per_second and data_wait
    assert first == second, 'train.csv differs'


def run_train(argv, output):
    """The whole of a process: train.py with its output in a file."""
    sys.stdout = sys.stderr = open(output, 'a')
    torch.set_num_threads(1)
    train.cli(argv)


class Lab:
    """A temporary directory with images, and runs in it."""

    def __init__(self, epochs):
        self.epochs, self.rng = epochs, random.Random(1)
        self.directory = Path(tempfile.mkdtemp(prefix='torture-'))
        for folder, count in {'train/a': 18, 'train/b': 18, 'val/a': 4, 'val/b': 4}.items():
            (self.directory / folder).mkdir(parents=True)
            for i in range(count):
                Image.effect_noise((8, 8), 100).save(self.directory / folder / f'{i}.png')
        self.untouched, started = self.directory / 'run', time.monotonic()
        self.finish(self.untouched)
        self.seconds = time.monotonic() - started

    def start(self, run, *flags):
        """A process of the run, whose output is in `log` beside the run's directory."""
        argv = [*RECIPE, '--epochs', str(self.epochs), '--data', str(self.directory),
                '--save', str(run), *flags]
        if self.rng.random() < 0.8:  # figures take longer than all else
            argv.append('--no-plot')
        process = FORK.Process(target=run_train, args=(argv, run.parent / 'log'))
        process.start()
        return process

    def disturb(self, run, call, *arguments):
        """Resume the run and, at any moment of the time that a whole one takes, call(pid, ...).

        Returns the exit code: 0 if the moment was after its end.
        """
        process = self.start(run, '--resume')
        process.join(self.rng.uniform(0, self.seconds))
        if process.exitcode is None:
            call(process.pid, *arguments)
            process.join()
        return process.exitcode

    def finish(self, run):
        """Resume the run, which is to end as if nothing had happened."""
        process = self.start(run, '--resume')
        process.join()
        assert process.exitcode == 0, f'resuming ended with exit code {process.exitcode}'
        assert 'Traceback' not in (run.parent / 'log').read_text(), 'a traceback'
        # Except figures, which a stopped process may still be drawing.
        left = [path.name for path in run.glob('.*') if '.png.' not in path.name]
        assert not left, f'incomplete files are left: {left}'
        check_same_run(run, self.untouched)


# ---- faults: each is one try, and raises AssertionError ------------------------------------------

def killed(lab, run):
    """SIGKILL four times: at start-up, in a step, in evaluation, in a save, while plotting."""
    for _ in range(4):
        lab.disturb(run, os.kill, signal.SIGKILL)
    lab.finish(run)


def stopped(lab, run):
    """Four signals: the step is finished, all is saved, the exit code says it."""
    for number in lab.rng.choices(STOP_SIGNALS, k=4):
        code = lab.disturb(run, os.kill, number)
        assert code in (0, 128 + number), f'exit code {code}'
    lab.finish(run)


def disk_full(lab, run):
    """Twice, from a moment on no file may grow beyond some bytes: one line, and exit code 2."""
    for _ in range(2):
        limit = int(10 ** lab.rng.uniform(0, 5)), resource.RLIM_INFINITY
        code = lab.disturb(run, resource.prlimit, resource.RLIMIT_FSIZE, limit)
        assert code in (0, 2), f'exit code {code}'
    lab.finish(run)


def damaged(lab, run):
    """A killed run's latest.pth is cut off, or a byte of it changed: it resumes the one before."""
    while not (run / 'latest.pth.1').exists():
        lab.disturb(run, os.kill, signal.SIGKILL)
    latest = run / 'latest.pth'
    if latest.exists():
        content = bytearray(latest.read_bytes())
        place = lab.rng.randrange(len(content))
        if lab.rng.random() < 0.5:
            del content[place:]
        else:
            content[place] ^= lab.rng.randrange(1, 256)
        latest.write_bytes(content)
    lab.finish(run)


def two_at_once(lab, run):
    """Two processes begin the same run: one has it, and the other says so in a line."""
    processes = [lab.start(run) for _ in range(2)]
    for process in processes:
        process.join()
    codes = sorted(process.exitcode for process in processes)
    assert codes == [0, 2], f'exit codes {codes}'
    said = re.findall('error: .*', (run.parent / 'log').read_text())
    assert len(said) == 1 and re.search('(in use by another|holds a) run', said[0]), said
    lab.finish(run)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--short', action='store_true', help='each fault once')
    args = parser.parse_args(argv)
    for number in STOP_SIGNALS:  # of the processes, too, until train.py handles them
        signal.signal(number, lambda number, _: os._exit(128 + number))
    lab, tries, all_lost = Lab(3 if args.short else 6), 1 if args.short else 25, 0
    print(f'{"fault":<15}{"tried":>6}{"survived":>10}{"lost":>6}', flush=True)
    for fault in (killed, stopped, disk_full, damaged, two_at_once):
        lost = 0
        for _ in range(tries):
            run = Path(tempfile.mkdtemp(dir=lab.directory)) / 'run'
            try:
                fault(lab, run)
            except (AssertionError, UserError) as error:
                lost += 1
                print(f'{run}: {error}', file=sys.stderr)
        print(f'{fault.__name__:<15}{tries:>6}{tries - lost:>10}{lost:>6}', flush=True)
        all_lost += lost
    if all_lost:
        sys.exit(f'what was lost is in {lab.directory}')
    shutil.rmtree(lab.directory)


if __name__ == '__main__':
    main()
