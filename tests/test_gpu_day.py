"""attic/gpu_day.sh with a script in Python's place that prints its arguments."""

import fnmatch
import re
import shlex
import signal
import subprocess

from conftest import ROOT, parse_flags

import bench

PYTHON = r"""#!/bin/bash
[[ $1 == -c ]] && exit  # prints versions
printf '%q ' "$@"; echo; echo "OMP_NUM_THREADS=${OMP_NUM_THREADS:-}"
[[ $2 == pytest ]] && exit 3
[[ $HANG && $1 == bench.py ]] && exec sleep 100
exit 0
"""
# A second for each part: timeout -s SIGNAL -k SECONDS LIMIT COMMAND...
TIMEOUT = '#!/bin/bash\nexec /usr/bin/timeout -s $2 -k 1 1 "${@:6}"\n'


def gpu_day(folder, path='', **environment):
    """Run the script; returns the summary as {part: result}."""
    for name, script in (('python', PYTHON), ('timeout', TIMEOUT)):
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    environment = {'PATH': f'{path}/usr/bin:/bin', 'PYTHON': folder / 'python', 'DATA': folder,
                   'RUN': folder / 'run', 'HANG': '', **environment}
    ended = subprocess.run(
        ['bash', ROOT / 'attic/gpu_day.sh', folder / 'out'], capture_output=True, text=True,
        timeout=120, env={name: str(value) for name, value in environment.items()},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))  # as in background jobs
    assert ended.returncode == 0 and ended.stderr == ''
    summary = (folder / 'out/summary.txt').read_text()
    assert ended.stdout.endswith('\n\n' + summary)
    return dict(re.findall(r'^([a-z0-9-]+) +(exit.*|skipped.*)$', summary, re.MULTILINE))


def check_bench(part, argv, threads):
    """The flags are valid, and each pattern of --rows finds a row."""
    options = bench.make_parser().parse_args(argv)
    assert options.csv.name == f'{part}.csv'
    on_cuda = not part.startswith('cpu')
    assert options.device == ('cuda' if on_cuda else 'cpu')
    assert on_cuda or threads == part.removeprefix('cpu-')
    rows = [row.name for precision in options.precision
            for row in bench.make_rows(options, precision, on_cuda)]
    for pattern in options.rows:
        needs_compiler = not on_cuda and 'fused' in pattern
        assert needs_compiler or fnmatch.filter(rows, pattern), (part, pattern)


def test_all_parts_have_valid_flags_and_run_after_failures(tmp_path):
    (tmp_path / 'cifar-10-batches-bin').mkdir()
    summary = gpu_day(tmp_path)
    parts = list(summary)
    assert parts[:5] == ['tests-fast', 'tests-slow', 'bench-bc-100', 'bench-121',
                         'compiled-bc-100'] and parts[-1] == 'run'
    assert 'cpu-1' in parts
    for part in parts:
        code = 3 if part.startswith('tests') else 0
        assert re.fullmatch(rf'exit +{code} +\d+ s', summary[part])
        arguments, threads = (tmp_path / f'out/{part}.log').read_text().splitlines()
        script, *argv = shlex.split(arguments)
        if script == 'bench.py':
            check_bench(part, argv, threads.partition('=')[2])
    assert script == 'train.py'
    args = parse_flags(argv)
    assert (args.dataset, args.epochs, args.lr_schedule) == ('cifar10', 100, 'cosine')
    assert args.save == str(tmp_path / 'run') and '--resume' in argv


def test_a_part_that_hangs_is_stopped_and_the_next_one_runs(tmp_path):
    summary = gpu_day(tmp_path, path=f'{tmp_path}:', HANG=1, SMALL=1, ONLY='fast|bench|cpu-1|run')
    assert list(summary) == ['tests-fast', 'bench-bc-100', 'bench-121', 'cpu-1', 'run']
    for part, result in summary.items():
        code = {'tests': 3, 'run': 0}.get(part.partition('-')[0], 124)
        assert re.fullmatch(rf'exit +{code} +\d+ s', result), (part, result)


def test_parts_that_do_not_fit_are_skipped(tmp_path):
    summary = gpu_day(tmp_path, DEADLINE=40)
    assert summary.pop('run') == f'skipped: no CIFAR-10 in {tmp_path}'
    for part, result in summary.items():
        fits = part.startswith(('bench', 'cpu'))  # half of 60 and of 40 seconds
        assert re.fullmatch(r'exit +0 .*' if fits else r'skipped: -?\d+ s left', result)
