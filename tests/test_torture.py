"""attic/torture.py --short: each kind of fault once."""

import forked


def test_the_short_fault_campaign_loses_nothing():
    ended = forked.run('from attic import torture; torture.main(sys.argv[1:])', ['--short'])
    assert ended.returncode == 0, ended.stderr + ended.stdout
    _, *faults = ended.stdout.splitlines()
    for fault in faults:
        name, tried, survived, lost, *_ = fault.split()
        assert int(tried) == int(survived) > 0 == int(lost), fault
    assert len(faults) == 5
