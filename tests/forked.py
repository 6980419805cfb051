"""Scripts in processes of their own, forked from one that has imported train.py: no waiting for it.

    ended = forked.run('import train; train.cli(sys.argv[1:])', ['--help'])
"""

import multiprocessing
import os
import sys
import tempfile
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

HERE = Path(__file__).resolve().parent
CONTEXT = multiprocessing.get_context('forkserver')
CONTEXT.set_forkserver_preload(['train', 'forked'])


def run(script, argv):
    """`returncode`, `stdout` and `stderr` of a script, as of subprocess.run."""
    with patch.dict(os.environ, PYTHONPATH=f'{HERE.parent}{os.pathsep}{HERE}'):
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as directory:
        process = CONTEXT.Process(target=_run, args=(script, list(map(str, argv)), directory))
        process.start()
        process.join()
        printed = [(Path(directory) / name).read_text() for name in ('stdout', 'stderr')]
    return SimpleNamespace(returncode=process.exitcode, stdout=printed[0], stderr=printed[1])


def _run(script, argv, directory):
    for number, name in enumerate(('stdout', 'stderr'), start=1):
        os.dup2(os.open(os.path.join(directory, name), os.O_WRONLY | os.O_CREAT), number)
    sys.argv[1:] = argv
    exec(script, {'__name__': '__main__', 'sys': sys})
