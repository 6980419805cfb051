"""attic/torture.py, briefly: nothing is lost."""

import subprocess
import sys

from conftest import ROOT


def test_the_short_fault_campaign_loses_nothing():
    ended = subprocess.run([sys.executable, ROOT / 'attic/torture.py', '--short'],
                           capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr + ended.stdout
    _, *faults = ended.stdout.splitlines()
    for fault in faults:
        name, tried, survived, lost, *_ = fault.split()
        assert int(tried) == int(survived) > 0 == int(lost), fault
    assert len(faults) == 5
