"""attic/compare_commits.py: a checkout against itself, and directories that fail."""

import re

import forked
import pytest
from conftest import ROOT

from attic import compare_commits

TINY = ['--depth', '10', '--growth-rate', '4', '--batch-size', '4', '--rounds', '2']


def test_compares_a_checkout_with_itself(monkeypatch, capfd):
    forked.start_server()  # which has imported what both would import
    monkeypatch.setattr(compare_commits.multiprocessing, 'get_context', lambda _: forked.CONTEXT)
    compare_commits.main([str(ROOT), str(ROOT), *TINY])
    *checkouts, ratio = capfd.readouterr().out.splitlines()
    for line in checkouts:
        low, high = map(float, re.search(r'\(([\d.]+)-([\d.]+)\)$', line).groups())
        assert line.startswith(str(ROOT)) and 0 < low <= float(line.split()[1]) <= high
    assert len(checkouts) == 2 and ratio.startswith('OLD / NEW')


@pytest.mark.parametrize('content, reason', [
    (None, ' is not a checkout of this repository'),
    ('raise ValueError("two\\nlines")', ': ValueError: two'),
    ('parse_flags = None', ': LookupError: no function complete'),
    ('import os; os._exit(1)', ': the process died')])
def test_failures_are_one_line_errors(content, reason, tmp_path, capfd):
    if content is not None:
        (tmp_path / 'train.py').write_text(content)
    with pytest.raises(SystemExit, match='2'):
        compare_commits.main([str(tmp_path), str(ROOT), *TINY])
    # capfd, because a child must not print a traceback either
    assert capfd.readouterr().err == f'compare_commits.py: error: {tmp_path}{reason}\n'
