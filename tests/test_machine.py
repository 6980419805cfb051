"""Choosing the device, one-line errors for GPUs that can't be used, and OpenMP's threads."""

import os
import platform
import re
import subprocess
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT

from training import networks
from training.console import UserError
from training.device import choose_device


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setattr(torch.cuda, 'set_device', Mock())
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: (8, 6))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda _: 'GPU')
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: ['sm_80', 'sm_90', 'sm_100'])


def test_each_process_has_its_own_gpu(monkeypatch, two_gpus):
    for rank, device in ((0, 'cuda:0'), (1, 'cuda:1')):
        monkeypatch.setenv('LOCAL_RANK', str(rank))
        assert choose_device('auto') == torch.device(device)
        torch.cuda.set_device.assert_called_with(rank)
    monkeypatch.setenv('LOCAL_RANK', '2')
    with pytest.raises(UserError, match='than it has GPUs: --nproc-per-node 2'):
        choose_device('cuda')


@pytest.mark.parametrize('capability, built, runs', [
    ((8, 6), ['sm_80', 'sm_90'], True), ((8, 0), ['sm_86'], False), ((7, 0), ['sm_80'], False),
    ((12, 0), ['sm_90'], False), ((12, 0), ['sm_90', 'compute_90'], True),
    ((10, 0), ['sm_100a'], True), ((9, 0), ['sm_90a', 'compute_120'], True),
    ((9, 0), ['gfx90a'], True), ((5, 2), ['compute_75'], False)])
def test_a_gpu_that_torch_was_not_built_for_is_a_one_line_error(
        monkeypatch, two_gpus, capability, built, runs):
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda _: capability)
    monkeypatch.setattr(torch.cuda, 'get_arch_list', lambda: built)
    assert choose_device('cpu') == torch.device('cpu')
    if runs:
        assert choose_device('auto') == torch.device('cuda:0')
        return
    major, minor = capability
    with pytest.raises(UserError, match=f'capability {major}.{minor}, and torch .* was built for '
                                        f'{built[0]}'):
        choose_device('auto')


def test_an_old_driver_is_an_error_not_a_silent_run_on_the_cpu(monkeypatch, two_gpus):
    def is_available():
        warnings.warn('CUDA initialization: The NVIDIA driver on your system is too old\n(found '
                      'version 11040).', stacklevel=2)
        return False

    monkeypatch.setattr(torch.cuda, 'is_available', is_available)
    for name in ('auto', 'cuda'):
        with pytest.raises(UserError, match=r'driver on your system is too old \(found version '
                                            r'11040\).\); --device cpu runs without'):
            choose_device(name)
    assert choose_device('cpu') == torch.device('cpu')
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert choose_device('auto') == torch.device('cpu')


def test_the_gpu_of_a_mac_is_used_only_if_asked_for(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    monkeypatch.setattr(torch.backends.mps, 'is_available', lambda: True)
    assert choose_device('auto') == torch.device('cpu')
    assert choose_device('mps') == torch.device('mps')


def python(code, **given):
    """A Python process without our settings of OpenMP and malloc, except those given."""
    env = {name: value for name, value in os.environ.items()
           if not name.startswith(('OMP_WAIT_POLICY', 'GOMP_SPINCOUNT', 'MALLOC_', 'GLIBC_'))}
    return subprocess.run([sys.executable, '-c', code], env={**env, **given}, cwd=ROOT, check=True,
                          text=True, capture_output=True)


@pytest.mark.parametrize('given, faults', [({}, False), ({'MALLOC_TOP_PAD_': '0'}, True)])
def test_memory_is_kept_unless_the_user_wants_otherwise(given, faults):
    if platform.libc_ver()[0] != 'glibc':
        pytest.skip('other C libraries have no mallopt')
    ended = python("""
import resource, torch
from training.device import keep_freed_memory
keep_freed_memory()
large = [torch.ones(2**24) for _ in range(4)]  # 64 MB
del large
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
small = [torch.ones(2**22) for _ in range(4)]
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
""", **given)
    # new pages, 16,384 small or 32 huge ones, or none
    assert (int(ended.stdout) > 16) == faults


def test_each_script_sets_the_wait_policy_before_torch_is_imported():
    ended = python("""
import importlib, os, sys
sys.modules['torch'] = None  # importing it is an error
for script in ('train', 'predict', 'bench', 'make_graph'):
    os.environ.pop('OMP_WAIT_POLICY', None)
    sys.modules.pop('training', None)
    try:
        importlib.import_module(script)
    except ImportError as error:
        print(script, error.name, os.environ['OMP_WAIT_POLICY'])
""")
    assert ended.stdout.splitlines() == [
        f'{script} torch passive' for script in ('train', 'predict', 'bench', 'make_graph')]


@pytest.mark.parametrize('given, policy, spins', [
    ({}, 'passive', '0'), ({'OMP_WAIT_POLICY': 'active'}, 'active', r'\d{9,}'),
    ({'GOMP_SPINCOUNT': '1234'}, 'passive', '1234')])
def test_openmp_threads_wait_passively_unless_the_user_wants_otherwise(given, policy, spins):
    # torch's OpenMP alone, where torch brings one: importing torch takes seconds.
    openmp = [*map(str, Path(torch.__file__).parent.glob('lib/libgomp*'))]
    load = f'ctypes.CDLL({openmp[0]!r})' if openmp else 'import torch'
    ended = python(f'import ctypes, training; {load}', OMP_DISPLAY_ENV='verbose', **given)
    policies = re.findall(r"OMP_WAIT_POLICY ?= ?'(\w+)'", ended.stderr)
    assert policies and set(policies) == {policy.upper()}
    for count in re.findall(r"GOMP_SPINCOUNT = '(\w+)'", ended.stderr):
        assert re.fullmatch(spins, count)


@pytest.mark.parametrize('kernels, instructions, precision, warns', [
    ('avx2 fma', False, 'bf16', False), (None, True, 'bf16', False), (None, False, 'fp32', False),
    (None, False, 'bf16', True)])
def test_bf16_without_kernels_and_instructions_is_a_warning(
        kernels, instructions, precision, warns, monkeypatch, capsys):
    monkeypatch.setattr(networks, 'cpu_kernels', lambda *_: kernels)
    monkeypatch.setattr(torch.ops.mkldnn, '_is_mkldnn_bf16_supported', lambda: instructions)
    networks.warn_of_slow_bf16(None, torch.device('cpu'), precision)
    assert ('--precision fp32' in capsys.readouterr().err) == warns
