"""The library of CPU kernels: compile cpu.cpp at first use, cache the library, and load it.

There is a library for each type of map. Compiling one takes 4 to 20 seconds and needs a C++
compiler, preferably g++. Libraries are kept in the user's cache directory,
`$XDG_CACHE_HOME/densenet` or `~/.cache/densenet`, or where that can't be written, in the temporary
directory. Without a compiler, or on a CPU without AVX2, a warning says so once.

bf16 can be multiplied in three ways, whose results differ in the last bits: by the matrix
instructions AMX, `amx`; by `vdpbf16ps`, an instruction of some CPUs with AVX-512; or widened to
fp32 and then as fp32 is, `fma`. Which one is fastest depends on the CPU, so those that it has are
timed once, and the result is kept beside the libraries.

DENSENET_CPU_KERNELS=amx, =vdpbf16ps or =fma chooses one of them, if the CPU has it;
DENSENET_CPU_KERNELS=0 turns the kernels off.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name('cpu.cpp')
HEADERS = sorted(SOURCE.parent.glob('kernels/*.h'))
FLAGS = '-std=c++17 -O3 -march=native -ffp-contract=fast -fopenmp -fPIC'.split()
TYPES = {torch.float32: 'float', torch.bfloat16: 'bf16'}
# The flags of each way to multiply, in order of preference.
PRODUCTS = {'amx': ['-DBF16_AMX'], 'vdpbf16ps': ['-DBF16_DOT'], 'fma': []}
resumed = None  # the `description` of a run that is resumed; DENSENET_CPU_KERNELS comes first
MARGIN = 1.2  # the first product is taken unless another one is faster by more than this


def unavailable_reason(dtype=torch.float32):
    """Why there are no kernels for maps of dtype, or None. Compiles them if necessary."""
    if os.environ.get('DENSENET_CPU_KERNELS') == '0':
        return 'DENSENET_CPU_KERNELS=0'
    return load(dtype)[1]


def description(dtype):
    """The instructions that the kernels use, such as 'avx512 vdpbf16ps'; None without kernels.

    Results are bit-identical only with the same description.
    """
    if dtype not in TYPES or unavailable_reason(dtype):
        return None
    return load(dtype)[0].description().decode()


@functools.cache
def load(dtype):
    """(library for maps of dtype, None) or, after a warning, (None, why there is none)."""
    chosen = os.environ.get('DENSENET_CPU_KERNELS')
    if chosen not in (None, '', '0', '1', *PRODUCTS):
        warnings.warn(f'DENSENET_CPU_KERNELS={chosen} is ignored: it may be 0 or '
                      f'{", ".join(PRODUCTS)}', stacklevel=2)
    try:
        return _open(_build(TYPES[dtype])), None
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        warnings.warn(f'DenseNet goes on without its CPU kernels, slower: {error}', stacklevel=2)
        return None, str(error)


def _build(map_type):
    """The path of the library, compiled now by the first compiler that can, if not in the cache."""
    errors = []
    for name in (os.environ.get('CXX', ''), 'g++', 'c++', 'clang++'):
        try:
            command = shlex.split(name)
            if command and shutil.which(command[0]):
                path = _build_with(command, map_type)
                _open(path)  # clang's needs another OpenMP than torch's
                return path
        except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
            errors.append(f'CXX={name}: {error}' if isinstance(error, ValueError) else str(error))
    raise RuntimeError(errors[0] if errors else
                       'there is no C++ compiler (g++, c++, clang++ or $CXX)')


def _build_with(compiler, map_type):
    command = [*compiler, *FLAGS, f'-DMAP={map_type}']
    # Predefined macros identify the compiler's version and what -march=native enables here.
    macros = _run([*command, '-dM', '-E', '-x', 'c++', os.devnull])
    products = _products(map_type, macros)
    with ThreadPoolExecutor() as pool:  # each thread waits for its compiler
        builds = {product: pool.submit(_compile, command, product, map_type, macros)
                  for product in products}
    paths = {}
    for product, build in builds.items():
        try:
            path = build.result()
            if product == 'amx' and not _open(path).ready():
                raise RuntimeError('the system does not permit AMX, or its products are wrong')
            paths[product] = path
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            if product == products[-1]:
                raise
            warnings.warn(f'bf16 is not multiplied by {product}: {error}', stacklevel=2)
    same_bits = _resumed_product(macros)
    if same_bits in paths:
        return paths[same_bits]
    return paths[_fastest(paths) if len(paths) > 1 else products[-1]]


def _products(map_type, macros):
    """The ways to multiply that this CPU and the compiler have, in order of preference."""
    needed = {'amx': ['__AMX_BF16__', '__AVX512BF16__'], 'vdpbf16ps': ['__AVX512BF16__'], 'fma': []}
    products = [product for product in PRODUCTS
                if not needed[product] or
                map_type == 'bf16' and all(macro in macros for macro in needed[product])]
    chosen = os.environ.get('DENSENET_CPU_KERNELS')
    if chosen in products:
        return [chosen]
    if chosen in PRODUCTS and map_type == 'bf16':
        warnings.warn(f'DENSENET_CPU_KERNELS={chosen} is ignored: this CPU or compiler does not '
                      f'have it, only {", ".join(products)}', stacklevel=2)
    return products


def _resumed_product(macros):
    """The product of the run that is resumed, or None.

    None also if that run had other vectors (see vectors.h): bits will differ with any product.
    """
    avx512 = all(f'__AVX512{part}__' in macros for part in ('F', 'BW', 'DQ', 'VL'))
    vectors, _, product = (resumed or '').partition(' ')
    return product if vectors == ('avx512' if avx512 else 'avx2') else None


def _compile(command, product, map_type, macros):
    """The path of the library that multiplies this way, from the cache if it is there."""
    command = [*command, *PRODUCTS[product]]
    code = [file.read_bytes() for file in (SOURCE, *HEADERS)]
    flags = [word for word in command if word.startswith('-')]  # the macros name the compiler
    key = hashlib.sha256(repr((code, flags, macros)).encode()).hexdigest()
    cache, name = _cache_directory(), f'{map_type}-{key[:32]}'
    # The name ends with the digest: loading a damaged library would end the process by a signal.
    for library in cache.glob(f'{name}-*.so'):
        if library.stem == f'{name}-{_digest(library)}':
            return library
        library.unlink(missing_ok=True)
    print(f'fused_dense_block: compiling the CPU kernels for {map_type} maps ({product}), once; '
          f'this takes 4 to 20 seconds', file=sys.stderr, flush=True)
    # Several processes may do this at once: each in its own directory, and the last one wins.
    with tempfile.TemporaryDirectory(dir=cache) as build:
        compiled, linked = f'{build}/kernels.o', Path(build, 'kernels.so')
        _run([*command, '-c', str(SOURCE), '-o', compiled])
        # Linked without -fopenmp: its functions are those of the library that torch has loaded.
        link = [part for part in command if part != '-fopenmp']
        _run([*link, '-shared', compiled, '-o', str(linked)])
        with open(linked, 'rb+') as file:
            os.fsync(file.fileno())
        return linked.replace(cache / f'{name}-{_digest(linked)}.so')


def _fastest(paths):
    """The fastest of {product: library file} on this model of CPU; timed only once."""
    kind = repr((_cpu_name(), *(path.name for path in paths.values())))
    record = _cache_directory() / f'fastest-{hashlib.sha256(kind.encode()).hexdigest()[:32]}'
    found = _read(record)
    if found not in paths:
        libraries = {product: _open(path) for product, path in paths.items()}
        times = {product: [] for product in paths}
        for _ in range(7):  # interleaved, because other processes come and go
            for product, library in libraries.items():
                times[product].append(library.seconds(ctypes.c_long(torch.get_num_threads())))
        chosen = fastest(times)
        # OSError: the record exists, or the file system is read-only or has no hard links.
        with contextlib.suppress(OSError):
            if found is not None:  # the record is damaged
                record.unlink(missing_ok=True)
            with tempfile.NamedTemporaryFile('w', dir=record.parent) as file:
                file.write(chosen)
                file.flush()
                # The first of several processes wins: all have to use the same.
                os.link(file.name, record)
        found = _read(record) or chosen
    return found


def fastest(times):
    """The first of {product: [seconds]}, unless another one is clearly faster."""
    medians = {product: statistics.median(seconds) for product, seconds in times.items()}
    return next(product for product, seconds in medians.items()
                if seconds <= MARGIN * min(medians.values()))


def cpu_field(name):
    """A field of /proc/cpuinfo, or ''."""
    info = Path('/proc/cpuinfo')
    found = info.exists() and re.search(rf'^{name}\s*: (.*)', info.read_text(), re.MULTILINE)
    return found[1] if found else ''


def _cpu_name():
    return cpu_field('model name') or platform.processor()


def _read(file):
    return file.read_text() if file.exists() else None


def _digest(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True, errors='replace', timeout=300)
    if done.returncode:
        lines = done.stderr.splitlines() or ['']
        errors = [line for line in lines if 'error' in line.lower()] or lines[-1:]
        raise RuntimeError(f'{" ".join(command)} fails: {errors[0]}')
    return done.stdout


def _cache_directory():
    """Where compiled libraries are kept: a directory that only this user can write to."""
    try:
        directory = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache', 'densenet')
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = os.access(directory, os.W_OK) or any(directory.glob('*.so'))
    except (OSError, RuntimeError):  # RuntimeError: the user has no home
        usable = False
    if not usable:  # as for any user of a container
        user = os.geteuid() if hasattr(os, 'geteuid') else ''
        directory = Path(tempfile.gettempdir(), f'densenet-{user}')
        directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.stat()
    if hasattr(os, 'geteuid') and (status.st_uid != os.geteuid() or status.st_mode & 0o022):
        raise RuntimeError(f'{directory} is owned or writable by other users')
    return directory


def _open(path):
    # Make the OpenMP library that torch has loaded visible: needed, and possible, on Linux only.
    if os.path.exists('/proc/self/maps'):
        maps = Path('/proc/self/maps').read_text()
        for name in set(re.findall(r'\S*/lib[gi]?omp[^/\s]*\.so\S*', maps)):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.pack.restype = library.sample.restype = ctypes.c_long
    library.seconds.restype, library.description.restype = ctypes.c_double, ctypes.c_char_p
    return library
