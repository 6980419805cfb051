"""Run scripts in processes forked from one that has imported train.py, which saves seconds.

    ended = forked.run(forked.RUN, ['--help'])
    ended = forked.run(forked.interrupted('evaluate', 3, 'os.kill(os.getpid(), 15)'), argv)
"""

import gc
import multiprocessing
import os
import sys
import tempfile
import warnings
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context('forkserver')
# torch.optim imports torch._dynamo, and image files torchvision, when they are first needed.
CONTEXT.set_forkserver_preload(['train', 'torch._dynamo', 'torchvision', 'forked'])
gc.freeze()  # the forked processes never search what was imported before
RUN = 'import train; train.cli(sys.argv[1:])'


def start_server():
    """Start the process that CONTEXT forks from, unless it runs."""
    with patch.dict(os.environ, PYTHONPATH=f'{HERE.parent}{os.pathsep}{HERE}'):
        forkserver.ensure_running()


def run(script, argv, while_it_runs=lambda pid: None):
    """Run a script; returns `returncode`, `stdout` and `stderr`, as subprocess.run.

    `while_it_runs` is called with its process id, which is that of its process group, too.
    """
    import torch

    start_server()
    with tempfile.TemporaryDirectory() as directory:
        process = CONTEXT.Process(target=_run, args=(script, list(map(str, argv)), directory,
                                                    torch.cuda.is_available()))
        process.start()
        try:
            while_it_runs(process.pid)
            process.join(300)
            assert process.exitcode is not None, f'not ended after 300 seconds: {argv}'
        finally:
            process.kill()
            process.join()
        printed = [(Path(directory) / name).read_text() for name in ('stdout', 'stderr')]
    return SimpleNamespace(returncode=process.exitcode, stdout=printed[0], stderr=printed[1])


def _run(script, argv, directory, with_gpu):
    os.setsid()
    if not with_gpu:
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    # With one core, torch advises against the two workers of some tests.
    warnings.filterwarnings('ignore', 'This DataLoader will create')
    multiprocessing.set_start_method(None, force=True)  # Python's default, as in a new process
    for number, name in enumerate(('stdout', 'stderr'), start=1):
        os.dup2(os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = argv
    exec(script, {'__name__': '__main__', 'sys': sys})


def interrupted(function, when, action):
    """A script: train.py with an `action` at the `when`th call of one of its functions."""
    return f'''
import os, signal, sys
import train
calls, function = 0, train.{function}
def counted(*args, **kwargs):
    global calls
    calls += 1
    if calls == {when}:
        {action}
    return function(*args, **kwargs)
train.{function} = counted
train.cli(sys.argv[1:])
'''


def run_interrupted(argv, function, when, signum):
    return run(interrupted(function, when, f'os.kill(os.getpid(), {int(signum)})'), argv)
