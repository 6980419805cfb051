"""Compare the speed of two checkouts of this repository on a CPU.

    git worktree add ../old 3e27b39
    python attic/compare_commits.py ../old . --depth 100 --batch-size 64 --precision fp32
    python attic/compare_commits.py ../old . --arch densenet121 --batch-size 8 --inference

A process per checkout imports its modules and runs its step on random images. They take turns: one
is blocked on a pipe while the other runs, so that changes in the machine's load affect both. Prints
the median time of a step with quartiles, and those of OLD's time / NEW's time in each round.
"""

import argparse
import contextlib
import importlib
import multiprocessing
import os
import sys
import time
from pathlib import Path

import numpy as np

NETWORK_FLAGS = 'arch', 'depth', 'growth_rate', 'batch_size', 'precision'  # also train.py's
WARMUP = 2  # rounds; the first one compiles the CPU kernels
# modules to search for the functions below, which have moved between commits
MODULES = ('training.networks', 'networks', 'training.flags', 'flags', 'training.device',
           'training.machine', 'machine', 'train')


def find(*names):
    """A function of the checkout in the current directory; other names are its older ones."""
    for module in MODULES:
        if Path(module.replace('.', '/') + '.py').is_file():  # sys.path may lead elsewhere
            found = vars(importlib.import_module(module))
            if name := next(filter(found.get, names), None):
                return found[name]
    raise LookupError(f'no function {" or ".join(names)}')


def make_step(options):
    """One training or inference step, built as the checkout's train.py builds it.

    At 3e27b39, build_model returns dense blocks that are fast by themselves; later, build or
    prepare_model calls fuse().
    """
    argv = [f'--{name.replace("_", "-")}={getattr(options, name)}' for name in NETWORK_FLAGS
            if getattr(options, name) is not None]
    # a low learning rate, because diverging weights would change the speed
    argv.append('--lr=1e-3')
    try:
        args, _ = find('parse_args')(argv)  # before `parse` and `complete`
    except LookupError:
        args = find('complete')(find('parse')(argv))
    import torch  # not before OMP_WAIT_POLICY is set
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(1)
    size, device = options.image_size or (224 if options.arch else 32), torch.device('cpu')
    args, num_classes = find('with_network')(args, size), 10 if size <= 64 else 1000
    model = find('build', 'build_model')(args, num_classes, size)
    model = find('prepare_model')(model, args, device).train(not options.inference)
    with contextlib.suppress(LookupError):
        find('keep_freed_memory')()
    images = torch.randn(args.batch_size, 3, size, size)
    labels = torch.randint(num_classes, [args.batch_size])
    autocast = find('make_autocast')(args.precision, device)
    if options.inference:
        return torch.inference_mode()(autocast(lambda: model(images)))
    state = find('make_state')(args, model, device, args.precision)
    train_step = find('train_step')
    return lambda: train_step(state, images, labels, autocast=autocast)


def serve(pipe, directory, options):
    """The child process: for each message, take a step and send its seconds, or an error."""
    os.environ['OMP_WAIT_POLICY'] = 'passive'  # no spinning threads; read when torch is imported
    os.chdir(directory)
    sys.path.insert(0, os.getcwd())
    step = None
    while True:
        pipe.recv()
        try:
            step = step or make_step(options)
            started = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - started)
        except Exception as error:
            pipe.send(f'{type(error).__name__}: {error}'.partition('\n')[0])


def measure(directories, options):
    """Seconds [rounds, 2], without the warm-up. Raises RuntimeError if one can't be measured."""
    context, pipes, seconds = multiprocessing.get_context('spawn'), [], []
    with contextlib.ExitStack() as children:
        for directory in directories:
            if not Path(directory, 'train.py').is_file():
                raise RuntimeError(f'{directory} is not a checkout of this repository')
            pipe, child_pipe = context.Pipe()
            process = context.Process(target=serve, args=(child_pipe, directory, options))
            process.start()
            children.callback(process.terminate)
            child_pipe.close()  # so that recv() raises EOFError when the child dies
            pipes.append(pipe)
        for i in range(2 * (WARMUP + options.rounds)):
            try:
                pipes[i % 2].send('step')
                reply = pipes[i % 2].recv()
            except (EOFError, OSError):
                reply = 'the process died'
            if isinstance(reply, str):
                raise RuntimeError(f'{directories[i % 2]}: {reply}')
            seconds.append(reply)
    return np.reshape(seconds, (-1, 2))[WARMUP:]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    add = parser.add_argument
    add('old', metavar='OLD', help='directory of a checkout')
    add('new', metavar='NEW', help='directory of the other checkout')
    add('--arch', metavar='NAME', help='an ImageNet network')
    add('--depth', type=int, help='(default: 100)')
    add('--growth-rate', type=int, help='(default: 12, or as --arch has it)')
    add('--image-size', type=int, metavar='PIXELS', help='(default: 32, with --arch 224)')
    add('--batch-size', type=int, default=64, help='(default: %(default)s)')
    add('--precision', choices=('fp32', 'bf16'), default='fp32', help='(default: %(default)s)')
    add('--inference', action='store_true', help='forward in eval mode instead of training')
    add('--rounds', type=int, default=20, help='(default: %(default)s)')
    add('--threads', type=int, help='(default: what torch chooses)')
    options = parser.parse_args(argv)
    directories = options.old, options.new
    try:
        seconds = measure(directories, options)
    except RuntimeError as error:
        parser.exit(2, f'compare_commits.py: error: {error}\n')
    for directory, times in zip(directories, 1e3 * seconds.T):
        low, median, high = np.quantile(times, [0.25, 0.5, 0.75])
        print(f'{directory:<20}{median:>10.2f} ms  ({low:.2f}-{high:.2f})')
    low, median, high = np.quantile(seconds[:, 0] / seconds[:, 1], [0.25, 0.5, 0.75])
    print(f'{"OLD / NEW":<20}{median:>10.3f}     ({low:.3f}-{high:.3f})')


if __name__ == '__main__':
    main()
