"""A pytest with the pretended GPU: it collects this folder's tests, and forks for each it is told.

    python server.py

It reads the id of a test from its standard input, a line each, and answers with a line: the exit
status of the process that ran it, and the file that has what there is to say about a failure.
"""

import faulthandler
import json
import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from _pytest.runner import runtestprotocol

HERE = Path(__file__).resolve().parent
LIMIT = 60  # seconds of a test, then all its threads are printed and it ends


class Server:
    """A plugin of pytest: the tests are run on demand, not one after another."""

    def __init__(self, answers):
        self.answers = answers

    def pytest_collection(self):
        # Asking for it, as tests/conftest.py does, makes the GPU unusable after a fork.
        self.original, torch.cuda.is_available = torch.cuda.is_available, lambda: True

    def pytest_runtestloop(self, session):
        torch.cuda.is_available = self.original
        items = {item.nodeid: item for item in session.items}
        for line in sys.stdin:
            answer = run(items[json.loads(line)])
            print(json.dumps(answer), file=self.answers, flush=True)
        return True


def run(item):
    """Run in a forked process; returns the exit status and the file of its output."""
    output, path = tempfile.mkstemp(prefix='pretended_cuda-')
    pid = os.fork()
    if pid == 0:
        for number in (1, 2):
            os.dup2(output, number)
        faulthandler.dump_traceback_later(LIMIT, exit=True)
        failed = [report for report in runtestprotocol(item, log=False) if report.failed]
        for report in failed:
            print(report.longreprtext, *(text for _, text in report.sections), sep='\n')
        sys.stdout.flush()
        os._exit(len(failed))  # no destructors: torch's could hang after a broken test
    os.close(output)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), path


if __name__ == '__main__':
    # pytest's output goes to stderr, because stdout is for the answers.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    pytest.main(['-qqq', '-s', '--tb=short', '-p', 'no:cacheprovider', str(HERE)],
                plugins=[Server(answers)])
