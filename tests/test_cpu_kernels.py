"""The CPU kernels against float64 torch, and how they are built.

Some of the comparisons run once more under the address and undefined-behaviour sanitizers, and in a
build for AVX2: `python tests/test_cpu_kernels.py DIRECTORY 5` makes each fifth of them with the
libraries of that directory.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from fused_dense_block import cpu, library  # noqa: E402
from fused_dense_block.autograd import Maps, NormConv  # noqa: E402
from training import networks  # noqa: E402

DTYPES = torch.float32, torch.bfloat16
# images, height, width, outputs, side of the filters, pool: odd ones, one pixel, one image
SHAPES = [(2, 8, 8, 48, 1, False), (1, 7, 5, 12, 3, False), (3, 5, 7, 17, 1, True),
          (2, 1, 1, 5, 1, False), (1, 6, 6, 1, 3, False), (2, 17, 3, 32, 3, False),
          (4, 3, 1, 25, 3, False), (1, 1, 9, 40, 3, False), (2, 10, 10, 24, 1, True)]
# images, height, width, channels, width of the bottleneck or 0, growth rate, layers
BLOCKS = [(3, 8, 8, 64, 128, 32, 2), (1, 7, 7, 400, 128, 32, 1), (2, 5, 9, 7, 20, 5, 3),
          (4, 6, 5, 24, 0, 12, 2), (1, 1, 1, 3, 4, 1, 2), (5, 1, 3, 17, 0, 9, 2),
          (1, 17, 13, 33, 52, 13, 2)]
# images, height, width, channels, outputs
STEMS = [(3, 17, 30, 3, 64), (1, 1, 1, 1, 5), (2, 9, 2, 5, 33), (1, 31, 45, 4, 24)]
CHANNELS = (1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 48, 60, 97, 130, 200, 300)


@pytest.fixture
def kernels():
    if cpu.unavailable_reason():
        pytest.skip(cpu.unavailable_reason())


needs_kernels = pytest.mark.usefixtures('kernels')


def channels_last(n, c, h, w, dtype=torch.float32):
    return torch.randn(n, h, w, c).to(dtype).permute(0, 3, 1, 2)


def per_channel(vector):
    return vector.double().view(1, -1, 1, 1)


def maps_of(data):
    """With a mean and a variance of their own."""
    c = data.shape[1]
    return Maps(data, torch.randn(c), torch.rand(c) + 0.1)


def error(value, reference):
    return ((value.double() - reference).norm() / reference.norm().clamp_min(1e-30)).item()


class Case:
    """One convolution: its arguments, and what float64 says of its results."""

    def __init__(self, n, h, w, outputs, side, pool, channels, dtype, seed=0):
        torch.manual_seed(seed)
        self.pool, self.channels, self.outputs = pool, channels, outputs
        self.wide = channels_last(n, channels + 8, h, w, dtype)
        self.x = self.wide[:, 3:3 + channels]
        self.maps = maps_of(self.x)
        filters = torch.randn(outputs, channels, side, side) / (channels * side**2) ** 0.5
        self.norm_conv = NormConv(*torch.randn(2, channels), filters, 1e-3)
        self.out = channels_last(n, outputs + 7, *((h // 2, w // 2) if pool else (h, w)), dtype)
        self.grad = channels_last(*self.out[:, 7:].shape, dtype)
        self.total = channels_last(n, channels + 8, h, w, dtype)
        self.z, self.gradients = self.reference(torch.float64, self.grad)

    def reference(self, dtype, grad):
        """The result, and (g * weight / std, d_weight, d_bias, d_filters, a, b).

        The convolution is in dtype, all else in float64.
        """
        std = per_channel(self.maps.var + self.norm_conv.eps).sqrt()
        normed = ((self.x.double() - per_channel(self.maps.mean)) / std).requires_grad_()
        weight, bias, filters = (v.double().requires_grad_() for v in self.norm_conv[:3])
        y = F.relu(normed * weight.view(-1, 1, 1) + bias.view(-1, 1, 1))
        y = F.avg_pool2d(y, 2) if self.pool else y
        z = F.conv2d(y.to(dtype), filters.to(dtype), padding=filters.shape[-1] // 2)
        z.backward(grad.to(dtype))
        share = weight.detach() / std.view(-1) / self.x[:, 0].numel()
        return z.detach(), (normed.grad / std, weight.grad, bias.grad, filters.grad,
                            share * bias.grad, share / std.view(-1) * weight.grad)

    def forward(self, **options):
        return cpu.norm_relu_conv(self.maps, self.norm_conv, self.pool, **options)

    def backward(self, **options):
        out, (maps, a, b), gradients = cpu.norm_relu_conv_backward(
            self.grad, self.maps, self.norm_conv, self.pool, **options)
        assert maps is self.maps
        return out, *gradients, a, b


def compare(case, dtype):
    exact = dict(rtol=0, atol=0)
    near = 1e-5 if dtype == torch.float32 else 0.01
    # Written into a slice; its surroundings stay as they are.
    before = case.out.clone()
    z, mean, variance = case.forward(out=case.out[:, 2:2 + case.outputs], with_statistics=True)
    assert error(z, case.z) < near
    variance_of_z, mean_of_z = torch.var_mean(z.double(), (0, 2, 3), correction=0)
    assert error(mean, mean_of_z) < 1e-5 and (variance - variance_of_z).abs().max() < 1e-5
    after = slice(2 + case.outputs, None)
    torch.testing.assert_close(case.out[:, :2], before[:, :2], **exact)
    torch.testing.assert_close(case.out[:, after], before[:, after], **exact)

    before = case.total.clone()
    part = slice(3, 3 + case.channels)
    apart = torch.empty_like(before)
    if not case.pool:  # of odd maps, that leaves a line and a column as they are
        case.backward(before=case.total[:, part], out=apart[:, part])
        torch.testing.assert_close(case.total, before, **exact)
    total, *rest = case.backward(before=case.total[:, part], out=case.total[:, part])
    assert error(total, before[:, part].double() + case.gradients[0]) < near
    if not case.pool:
        torch.testing.assert_close(apart[:, part], total, **exact)
    torch.testing.assert_close(case.total[:, :3], before[:, :3], **exact)
    torch.testing.assert_close(case.total[:, part.stop:], before[:, part.stop:], **exact)
    fresh, *again = case.backward()
    # With a few numbers only, what cancels is not small beside what is left.
    assert (fresh.double() - case.gradients[0]).norm() < near * max(1, case.gradients[0].norm())
    size = case.gradients[0].abs().sum().item()
    for mine, reference in zip(rest, case.gradients[1:]):
        assert (mine.double() - reference).abs().max() < near * max(1, size, reference.abs().max())
    for first, second in zip(rest, again):
        torch.testing.assert_close(first, second, **exact)

    # A gradient that is completed on the way, and one that is completed before.
    z = maps_of(channels_last(*case.grad.shape, dtype))
    case.grad = channels_last(*case.grad.shape, dtype)
    a, b = torch.randn(2, case.outputs) / 4
    completed = cpu.complete(case.grad, z, a, b)
    share = per_channel(a) + (z.data.double() - per_channel(z.mean)) * per_channel(b)
    assert error(completed, case.grad.double() - share) < near
    on_the_way = case.backward(pending=(z, a, b))
    case.grad = completed
    for first, second in zip(on_the_way, case.backward()):
        assert error(first, second.double()) < 3 * near

    # Added to what is there.
    sums = torch.randn(2, case.channels)
    *_, a, b = case.backward()
    *_, first, second = case.backward(add_to=sums.clone())
    torch.testing.assert_close(first, sums[0] + a)
    torch.testing.assert_close(second, sums[1] + b)


def compare_all(dtype, every=1):
    cases = [(*shape, channels) for channels in CHANNELS for shape in SHAPES]
    for i, (*shape, channels) in enumerate(cases[::every]):
        compare(Case(*shape, channels, dtype, seed=i), dtype)
    for i, case in enumerate(BLOCKS):
        compare_evaluation(*case, dtype, seed=i)
    for i, case in enumerate(STEMS):
        compare_stem(*case, dtype, seed=i)


def random_norm_conv(channels, outputs, side):
    """Weight, bias, mean, variance, eps and filters."""
    filters = torch.randn(outputs, channels, side, side) / (channels * side**2) ** 0.5
    return *torch.randn(3, channels), torch.rand(channels) + 0.1, 1e-3, filters


def reference_norm_conv(x, norm_conv, pool=False):
    weight, bias, mean, var, eps, filters = (
        value.double() if torch.is_tensor(value) else value for value in norm_conv)
    y = F.relu(F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps))
    y = F.avg_pool2d(y, 2) if pool else y
    return F.conv2d(y, filters, padding=filters.shape[-1] // 2)


def compare_evaluation(n, h, w, channels, width, growth, layers, dtype, seed=0):
    torch.manual_seed(seed)
    near = 2e-6 if dtype == torch.float32 else 0.006
    x = channels_last(n, channels + 8, h, w, dtype)[:, 3:3 + channels]
    norm_convs, expected = [], x.double()
    for c in range(channels, channels + layers * growth, growth):
        layer = ([random_norm_conv(c, width, 1), random_norm_conv(width, growth, 3)] if width else
                 [random_norm_conv(c, growth, 3)])
        new = expected
        for norm_conv in layer:
            new = reference_norm_conv(new, norm_conv)
        norm_convs, expected = norm_convs + layer, torch.cat([expected, new], 1)
    convs, _owners = cpu.pack(norm_convs, dtype)
    found = cpu.evaluate_block(convs, layers * growth, x)
    assert torch.equal(found[:, :channels], x)
    assert error(found, expected) < near
    for threads in (1, 3):  # how the pixels are shared out does not matter
        with threads_set_to(threads):
            assert torch.equal(cpu.evaluate_block(convs, layers * growth, x), found)
            assert torch.equal(cpu.evaluate_block(convs, layers * growth, x[-1:]), found[-1:])
    if min(h, w) > 1:
        norm_conv = random_norm_conv(channels, growth, 1)
        convs, _owners = cpu.pack([norm_conv], dtype)
        found = cpu.evaluate_transition(convs, x)
        assert error(found, reference_norm_conv(x.double(), norm_conv, pool=True)) < near


def compare_stem(n, h, w, channels, outputs, dtype, seed=0):
    torch.manual_seed(seed)
    x = torch.randn(n, channels, h, w).to(dtype)
    weight, bias, mean, var, eps, _ = random_norm_conv(outputs, 1, 1)
    filters = random_norm_conv(channels, outputs, 7)[-1]
    y = F.conv2d(x.double(), filters.double(), stride=2, padding=3)
    y = F.batch_norm(y, mean.double(), var.double(), weight.double(), bias.double(), eps=eps)
    expected = F.max_pool2d(F.relu(y), 3, 2, 1)
    convs, _owners = cpu.pack([(weight, bias, mean, var, eps, filters)], dtype)
    for threads in (1, 3):
        with threads_set_to(threads):
            found = cpu.evaluate_stem(convs, x)
            assert found.shape == expected.shape
            assert error(found, expected) < (2e-6 if dtype == torch.float32 else 0.006)


@contextlib.contextmanager
def threads_set_to(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize('threads', [1, 2])
@pytest.mark.parametrize('dtype', DTYPES)
@needs_kernels
def test_operations_agree_with_float64(dtype, threads):
    with threads_set_to(threads):
        compare_all(dtype, every=2 if threads == 1 else 1)


@pytest.mark.parametrize('shape', [(4, 16, 16, 48, 1, False, 60), (4, 16, 16, 12, 3, False, 48),
                                   (4, 16, 16, 30, 1, True, 60), (2, 14, 14, 32, 3, False, 128)])
@needs_kernels
def test_bf16_is_as_close_as_torch(shape):
    case = Case(*shape, torch.bfloat16)
    z, gradients = case.reference(torch.bfloat16, case.grad)
    assert error(case.forward()[0], case.z) < 1.1 * error(z, case.z)
    for mine, torchs, exact in zip(case.backward(), gradients, case.gradients):
        assert error(mine, exact) < 1.1 * max(error(torchs, exact), error(exact.bfloat16(), exact))


@pytest.mark.parametrize('dtype', DTYPES)
@needs_kernels
def test_statistics(dtype):
    for n, c, h, w in [(1, 1, 1, 1), (3, 17, 5, 7), (64, 130, 8, 8)]:
        x = channels_last(n, c + 5, h, w, dtype)[:, 2:2 + c]
        mean, variance = cpu.statistics(x)
        expected, expected_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, expected_mean.float(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(variance, expected.float(), rtol=1e-5, atol=1e-6)


@needs_kernels
def test_statistics_far_from_zero():
    x = channels_last(64, 20, 16, 16) + 1000  # a float32 there has steps of 6e-5
    expected, expected_mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    mean, variance = cpu.statistics(x)
    torch.testing.assert_close(mean, expected_mean.float(), rtol=1e-7, atol=0)
    torch.testing.assert_close(variance, expected.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('shape', [(2, 8, 8, 48, 1, False, 20), (2, 8, 8, 12, 3, False, 20),
                                   (2, 8, 8, 9, 1, True, 20)])
@needs_kernels
def test_nan_stays_visible(shape, dtype):
    """As in torch: NaN passes the ReLU, and backward takes the gradient through it."""
    case = Case(*shape, dtype)
    case.x[1, 5, 4, 2] = float('nan')
    z, (_, d_weight, _, d_filters, *_) = case.reference(torch.float64, case.grad)
    mine, mean, _ = case.forward(with_statistics=True)
    torch.testing.assert_close(mine.isnan(), z.isnan())
    assert mean.isnan().all()
    _, my_d_weight, _, my_d_filters, *_ = case.backward()
    torch.testing.assert_close(my_d_weight.isnan(), d_weight.isnan())
    torch.testing.assert_close(my_d_filters.isnan(), d_filters.isnan())


@needs_kernels
def test_the_default_dtype_does_not_matter():
    case = Case(2, 8, 8, 12, 3, False, 20, torch.float32)
    expected = *case.forward(with_statistics=True), *case.backward()
    torch.set_default_dtype(torch.float64)
    try:
        found = *case.forward(with_statistics=True), *case.backward()
    finally:
        torch.set_default_dtype(torch.float32)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@needs_kernels
def test_invalid_inputs_are_rejected():
    assert cpu.why_not(channels_last(2, 3, 4, 5)) is None
    assert cpu.why_not(channels_last(2, 9, 4, 5)[:, 2:5]) is None
    assert cpu.why_not(channels_last(2, 3, 4, 5).double()) == 'no kernels for torch.float64'
    for x in (torch.randn(2, 3, 4, 5), channels_last(2, 3, 4, 5)[:, :, ::2],
              channels_last(2, 3, 4, 5)[..., 1:]):
        assert cpu.why_not(x) == 'the input is not in channels_last'
    with pytest.raises(ValueError, match='channels_last'):
        cpu.statistics(torch.randn(2, 3, 4, 5))


# ---- Building ----

REPORT = ('from fused_dense_block import cpu; '
          'print(cpu.unavailable_reason()); print(cpu.unavailable_reason())')


def report(cache, code=REPORT, **env):
    """Output and errors of the code, in a process that has imported torch already."""
    settings = {'DENSENET_CPU_KERNELS': '1', 'XDG_CACHE_HOME': str(cache), **env}
    ended = forked.run(f'import os; os.environ.update({settings}); {code}', [])
    assert ended.returncode == 0, ended.stderr
    return ended.stdout, ended.stderr


def compiler():
    path = shutil.which('g++')
    if not path:
        pytest.skip('there is no g++')
    return path


def test_without_a_compiler(tmp_path):
    out, err = report(tmp_path, PATH='', CXX='')
    assert out.splitlines() == ['there is no C++ compiler (g++, c++, clang++ or $CXX)'] * 2
    assert err.count('DenseNet goes on without its CPU kernels') == 1


def executable(path, script):
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)


def test_a_compiler_that_fails(tmp_path):
    executable(tmp_path / 'bin/g++', r"printf 'error: \377\n' >&2; exit 1")  # not UTF-8
    out, err = report(tmp_path, PATH=str(tmp_path / 'bin'), CXX='')
    assert out.splitlines() == [out.splitlines()[0]] * 2
    assert re.match('g[+][+] -std=.* fails: error: \ufffd$', out.splitlines()[0])
    assert err.count('DenseNet goes on without its CPU kernels') == 1


# The last argument of a compiler is its output.
WRITES = 'for output; do :; done; echo library > "$output"'


def test_the_next_compiler_is_taken_if_one_is_broken(tmp_path, monkeypatch):
    executable(tmp_path / 'bin/g++', 'exit 1')
    executable(tmp_path / 'bin/c++', r"printf '#define NAME \377\n'; kill $$")
    executable(tmp_path / 'bin/clang++', rf"printf '#define NAME \377\n'; {WRITES}")
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setenv('CXX', 'g++ "')
    monkeypatch.setattr(library, '_open', lambda path: None)
    assert library._build('float').read_text() == 'library\n'
    (tmp_path / 'bin/clang++').unlink()
    with pytest.raises(RuntimeError, match='^CXX=g[+][+] ": No closing quotation$'):
        library._build('float')


def test_a_compiler_of_several_words_compiles_and_links(tmp_path, monkeypatch):
    executable(tmp_path / 'wrapper', 'test "$1" = c++ && shift || exit 1; ' + WRITES)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    path = library._build_with([str(tmp_path / 'wrapper'), 'c++'], 'float')  # as ccache g++
    assert path.read_text() == 'library\n'


def test_a_damaged_library_is_built_again(tmp_path, monkeypatch):
    executable(tmp_path / 'g++', WRITES)
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    path = library._build_with([str(tmp_path / 'g++')], 'float')
    inode = path.stat().st_ino
    assert library._build_with([str(tmp_path / 'g++')], 'float') == path
    assert path.stat().st_ino == inode  # not built again
    for damaged in ('library\n\0', 'lib'):
        path.write_text(damaged)
        assert library._build_with([str(tmp_path / 'g++')], 'float') == path
        assert path.read_text() == 'library\n'
        assert [*path.parent.iterdir()] == [path]


# ---- The fastest product ----

def test_the_first_product_is_taken_unless_another_is_clearly_faster():
    steady, slow_once = [1.0, 1.01, 0.99], [0.9, 5.0, 0.91]
    assert library.fastest({'vdpbf16ps': steady, 'fma': slow_once}) == 'vdpbf16ps'
    assert library.fastest({'vdpbf16ps': steady, 'fma': [0.7, 0.8, 9.0]}) == 'fma'
    assert library.fastest({'vdpbf16ps': [0.5] * 3, 'fma': steady}) == 'vdpbf16ps'


class Timed:
    """Stands for a loaded library."""

    count = 0

    def __init__(self, path):
        self.time = {'bf16-dot': 1.0, 'bf16-fma': 0.6}[path.name]

    def seconds(self, threads):
        Timed.count += 1
        return self.time


def test_products_are_timed_once_for_each_kind_of_cpu(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(library, '_open', Timed)
    paths = {'vdpbf16ps': tmp_path / 'bf16-dot', 'fma': tmp_path / 'bf16-fma'}
    assert library._fastest(paths) == 'fma'
    counted = Timed.count
    assert library._fastest(paths) == 'fma' and Timed.count == counted
    record, = (tmp_path / 'densenet').iterdir()
    record.write_text('')  # as of a full disk
    assert library._fastest(paths) == 'fma' and Timed.count == 2 * counted
    record.write_text('vdpbf16ps')  # another process has found
    assert library._fastest(paths) == 'vdpbf16ps' and Timed.count == 2 * counted
    monkeypatch.setattr(library, '_cpu_name', lambda: 'another CPU')
    assert library._fastest(paths) == 'fma'


def test_processes_agree_on_the_fastest_product(tmp_path, monkeypatch):
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(library, '_open', Timed)
    paths = {'vdpbf16ps': tmp_path / 'bf16-dot', 'fma': tmp_path / 'bf16-fma'}

    def another_process_is_faster(times):
        monkeypatch.setattr(library, 'fastest', lambda times: 'vdpbf16ps')
        assert library._fastest(paths) == 'vdpbf16ps'
        return 'fma'

    monkeypatch.setattr(library, 'fastest', another_process_is_faster)
    assert library._fastest(paths) == 'vdpbf16ps'


@pytest.mark.parametrize('function', ['os.link', 'tempfile.NamedTemporaryFile'])
def test_a_file_system_without_hard_links_or_read_only(function, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(1, 'Operation not permitted')

    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(library, '_open', Timed)
    monkeypatch.setattr(function, refuse)
    assert library._fastest({'fma': tmp_path / 'bf16-fma', 'amx': tmp_path / 'bf16-dot'}) == 'fma'


def test_a_product_can_be_chosen(monkeypatch):
    monkeypatch.delenv('DENSENET_CPU_KERNELS', raising=False)
    macros = '#define __AVX512BF16__ 1'
    assert library._products('bf16', macros) == ['vdpbf16ps', 'fma']
    assert library._products('bf16', f'{macros}\n#define __AMX_BF16__ 1') == [*library.PRODUCTS]
    assert library._products('float', macros) == library._products('bf16', '') == ['fma']
    for product in 'vdpbf16ps', 'fma':
        monkeypatch.setenv('DENSENET_CPU_KERNELS', product)
        assert library._products('bf16', macros) == [product]
    for product in 'amx', 'vdpbf16ps':
        monkeypatch.setenv('DENSENET_CPU_KERNELS', product)
        assert library._products('float', macros) == ['fma']
        with pytest.warns(UserWarning, match=f'={product} is ignored: .* not have it, only fma'):
            assert library._products('bf16', '') == ['fma']


@pytest.mark.parametrize('precision, before, there, taken', [
    ('bf16', 'avx512 vdpbf16ps', ['amx', 'vdpbf16ps', 'fma'], 'vdpbf16ps'),
    ('bf16', 'avx512 fma', ['amx', 'vdpbf16ps', 'fma'], 'fma'),
    ('bf16', 'avx512 amx', ['vdpbf16ps', 'fma'], 'fastest'),  # the system does not permit AMX
    ('bf16', 'avx2 fma', ['vdpbf16ps', 'fma'], 'fastest'),    # bits will differ, whatever is taken
    ('bf16', None, ['vdpbf16ps', 'fma'], 'fastest'),
    ('fp32', 'avx512 fma', ['vdpbf16ps', 'fma'], 'fastest')])
def test_a_resumed_run_multiplies_as_before(precision, before, there, taken, monkeypatch):
    def compile(command, product, *_):
        if product not in there:
            raise RuntimeError('not there')
        return product

    macros = ' '.join(f'__AVX512{part}__' for part in ('F', 'BW', 'DQ', 'VL', 'BF16'))
    monkeypatch.delenv('DENSENET_CPU_KERNELS', raising=False)
    monkeypatch.setattr(library, 'resumed', None)
    networks.choose_kernels({'cpu_kernels': before}, precision)
    monkeypatch.setattr(library, '_run', lambda command: f'{macros} __AMX_BF16__')
    monkeypatch.setattr(library, '_compile', compile)
    monkeypatch.setattr(library, '_open', lambda path: SimpleNamespace(ready=lambda: True))
    monkeypatch.setattr(library, '_fastest', lambda paths: paths.setdefault('fastest', 'fastest'))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert library._build_with(['g++'], 'bf16') == taken


@pytest.mark.parametrize('case', ['ready', 'does not permit AMX', 'no such instruction'])
def test_amx_steps_aside_unless_it_is_ready(case, monkeypatch):
    def compile(command, product, *_):
        if product == 'amx' and case == 'no such instruction':
            raise RuntimeError('g++ fails: Error: no such instruction')
        return product

    ready = case == 'ready'
    monkeypatch.setattr(library, '_run', lambda command: '')
    monkeypatch.setattr(library, '_compile', compile)
    monkeypatch.setattr(library, '_open', lambda path: SimpleNamespace(ready=lambda: ready))
    monkeypatch.setattr(library, '_fastest', lambda paths: [*paths][0])
    monkeypatch.setattr(library, '_products', lambda *_: ['amx', 'vdpbf16ps', 'fma'])
    warns = pytest.warns(match=f'not multiplied by amx.*{case}')
    with contextlib.nullcontext() if ready else warns:
        assert library._build_with(['g++'], 'bf16') == ('amx' if ready else 'vdpbf16ps')
    monkeypatch.setattr(library, '_products', lambda *_: ['amx'])
    with contextlib.nullcontext() if ready else pytest.raises(RuntimeError, match=case):
        assert library._build_with(['g++'], 'bf16') == 'amx'


def test_an_assembler_that_fails_is_quoted(tmp_path):
    executable(tmp_path / 'g++', "echo 'x.s: Error: no such instruction: tdpbf16ps' >&2; exit 1")
    with pytest.raises(RuntimeError, match='fails: x.s: Error: no such instruction: tdpbf16ps$'):
        library._run([str(tmp_path / 'g++')])


@pytest.mark.parametrize('product', ['amx', 'vdpbf16ps'])
def test_a_product_of_bf16(product, tmp_path):
    """Compiled everywhere, and compared where the CPU has it."""
    command = [compiler(), *library.FLAGS, '-O0', '-march=sapphirerapids', '-DMAP=bf16',
               *library.PRODUCTS[product], '-c', str(library.SOURCE), '-o', str(tmp_path / 'o')]
    done = subprocess.run(command, capture_output=True, text=True)
    if 'sapphirerapids' in done.stderr:
        pytest.skip('this g++ does not know the CPU')
    assert done.returncode == 0, done.stderr[-3000:]
    if {'amx': 'amx_bf16', 'vdpbf16ps': 'avx512_bf16'}[product] not in cpu_flags():
        pytest.skip(f'compiled, but this CPU has no {product}')
    code = (f'import os; os.environ["DENSENET_CPU_KERNELS"] = "{product}"; '
            f'import test_cpu_kernels as tests; tests.compare_all(tests.torch.bfloat16, 1); '
            f'print(tests.library.description(tests.torch.bfloat16))')
    done = forked.run(code, [])
    assert done.returncode == 0 and product in done.stdout, done.stderr[-3000:]


@needs_kernels
def test_the_build_says_what_it_uses():
    vectors = 'avx512' if 'avx512dq' in cpu_flags() else 'avx2'
    assert library.description(torch.float32) == f'{vectors} fma'
    macros = '__AVX512BF16__ __AMX_BF16__' if 'avx512_bf16' in cpu_flags() else ''
    assert library.description(torch.bfloat16) in [
        f'{vectors} {product}' for product in library._products('bf16', macros)]


def test_a_cpu_without_avx2(tmp_path):
    out, err = report(tmp_path, CXX=f'{compiler()} -U__AVX2__', PATH='')
    assert out.count('#error the kernels need AVX2') == 2 and 'Warning' in err


def test_switched_off(tmp_path):
    out, err = report(tmp_path, DENSENET_CPU_KERNELS='0')
    assert out.splitlines() == ['DENSENET_CPU_KERNELS=0'] * 2 and err == ''
    assert not list(tmp_path.iterdir())
    _, err = report(tmp_path, DENSENET_CPU_KERNELS='off', PATH='', CXX='')
    assert err.count('DENSENET_CPU_KERNELS=off is ignored: it may be 0 or amx, vdpbf16ps, fma') == 1


def test_an_unsafe_directory(tmp_path):
    compiler()
    (tmp_path / 'densenet').mkdir()
    (tmp_path / 'densenet').chmod(0o777)
    out, _ = report(tmp_path)
    assert 'is owned or writable by other users' in out


def test_the_temporary_directory_stands_in_for_a_cache_that_cannot_be_written(tmp_path):
    """As in containers, for users who have no home."""
    (tmp_path / 'file').touch()
    code = (f'import tempfile; tempfile.tempdir = {str(tmp_path)!r}; '
            'from fused_dense_block import library; print(library._cache_directory())')
    out, _ = report(tmp_path / 'file/home', code)
    found = Path(out.strip())
    assert found.parent == tmp_path and found.stat().st_mode & 0o777 == 0o700


def test_two_processes_build_at_once(tmp_path):
    compiler()
    build = ("from fused_dense_block import library; "  # not optimized, which takes much longer
             "library.FLAGS = [flag.replace('-O3', '-O0') for flag in library.FLAGS]; ") + REPORT
    out, _ = report(tmp_path, f'child = os.fork(); {build}; child and os.waitpid(child, 0)')
    assert out.replace('\n', '') == 4 * 'None'  # lines of two processes
    built, = (tmp_path / 'densenet').iterdir()
    assert built.name.startswith('float-')
    # One OpenMP in the process, torch's; and it is found in the cache without compiling.
    count = ("import re; print(len(set(re.findall(r'\\S*/lib[gi]?omp\\S*\\.so\\S*', "
             "open('/proc/self/maps').read()))))")
    out = subprocess.run([sys.executable, '-c', f'{build}; {count}'], text=True, cwd=ROOT,
                         capture_output=True, env={**os.environ, 'DENSENET_CPU_KERNELS': '1',
                                                   'XDG_CACHE_HOME': str(tmp_path)}).stdout
    if Path('/proc/self/maps').exists():
        assert out.splitlines()[-1] == '1'


def build_with(flags, tmp_path, map_types=('float', 'bf16')):
    """The libraries that `compare_with` takes, compiled with flags."""
    command = [compiler(), '-std=c++17', *flags, '-fopenmp', '-fPIC', '-shared',
               '-ffp-contract=fast', str(ROOT / 'fused_dense_block/cpu.cpp')]
    builds = [subprocess.Popen([*command, f'-DMAP={map_type}', '-o', str(tmp_path / map_type)])
              for map_type in map_types]
    assert not any([build.wait() for build in builds])


def compare_with(directory, every):
    """Every few comparisons, with the libraries of the directory: for a process of its own."""
    libraries = {dtype: ctypes.CDLL(path) for dtype, map_type in cpu.TYPES.items()
                 if os.path.exists(path := f'{directory}/{map_type}')}
    library.load = lambda dtype: (libraries[dtype], None)
    for dtype in libraries:
        compare_all(dtype, int(every))
    print('all agree')


def cpu_flags():
    try:
        return Path('/proc/cpuinfo').read_text()
    except OSError:
        return ''


def test_avx2(tmp_path):
    if 'avx2' not in cpu_flags():
        pytest.skip('this CPU has no AVX2')
    build_with(['-O0', '-march=haswell'], tmp_path)
    done = forked.run('import test_cpu_kernels; test_cpu_kernels.compare_with(*sys.argv[1:])',
                      [tmp_path, 5])
    assert done.returncode == 0 and 'all agree' in done.stdout, done.stderr[-3000:]


@pytest.mark.parametrize('threads', [1, 3])
def test_amx_with_emulated_tiles(threads, tmp_path):
    if 'avx512_bf16' not in cpu_flags():
        pytest.skip('this CPU has no bf16 instructions of AVX-512')
    header = str(ROOT / 'tests/emulated_tiles.h')
    build_with(['-O1', '-march=native', '-DBF16_AMX', '-include', header], tmp_path, ['bf16'])
    done = forked.run(f'import torch, test_cpu_kernels; torch.set_num_threads({threads}); '
                      'test_cpu_kernels.compare_with(*sys.argv[1:])', [tmp_path, 4])
    assert done.returncode == 0 and 'all agree' in done.stdout, done.stderr[-3000:]
    assert ctypes.CDLL(str(tmp_path / 'bf16')).ready() == 1


def test_sanitizers(tmp_path):
    asan = subprocess.run([compiler(), '-print-file-name=libasan.so'], text=True,
                          capture_output=True).stdout.strip()
    if not os.path.isabs(asan):
        pytest.skip('g++ has no address sanitizer here')
    # Without what the address sanitizer or the CPU notices too, and takes long to compile.
    left_out = 'null,alignment,object-size,pointer-overflow,vptr'
    build_with(['-O0', '-march=native', '-fsanitize=address,undefined',
                f'-fno-sanitize={left_out}', '-fno-sanitize-recover=all'], tmp_path)
    done = subprocess.run([sys.executable, __file__, str(tmp_path), '17'], text=True,
                          capture_output=True, cwd=ROOT, env={
                              **os.environ, 'LD_PRELOAD': os.path.realpath(asan),
                              'ASAN_OPTIONS': 'detect_leaks=0'})
    assert done.returncode == 0 and 'all agree' in done.stdout, done.stderr[-3000:]


if __name__ == '__main__':
    compare_with(*sys.argv[1:])
