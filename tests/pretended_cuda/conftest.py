"""Each test in this folder runs in a process of its own that has the pretended GPU."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import pretended_cuda

INSIDE = pretended_cuda.LIBRARY in os.environ


@pytest.fixture(scope='session')
def server(tmp_path_factory):
    """The process that forks for each test; the library is built once for all of pytest-xdist."""
    reason = pretended_cuda.unavailable_reason()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        folder = folder.parent
    with open(folder / 'pretended_cuda.lock', 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        library = pretended_cuda.build(folder)
    process = subprocess.Popen(
        [sys.executable, Path(__file__).with_name('server.py')], cwd=ROOT, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env={**pretended_cuda.environment(library), 'PYTEST_DISABLE_PLUGIN_AUTOLOAD': '1'})
    yield process
    process.stdin.close()
    process.wait()


def pytest_collection_modifyitems(items):
    if not INSIDE:  # the other fixtures are made over there
        for item in items:
            if Path(__file__).parent in item.path.parents:
                item.fixturenames[:] = ['server']


@pytest.fixture(autouse=True)
def no_gpu():
    """There is the pretended one."""


@pytest.fixture(autouse=True)
def comparisons_are_those_of_zeros():
    pretended_cuda.compare_as_zeros()


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    """Has the test called over there."""
    if INSIDE:
        return None
    process = pyfuncitem.funcargs['server']
    print(json.dumps(pyfuncitem.nodeid), file=process.stdin, flush=True)
    status, path = json.loads(process.stdout.readline())
    output = Path(path).read_text(errors='replace')
    os.unlink(path)
    if status:
        pytest.fail(f'exit status {status}\n{output}', pytrace=False)
    return True
