"""Time and memory of a training step: our DenseNet compared with torchvision's and timm's.

    python bench.py                                       # DenseNet-BC-100-12, batches of 64
    python bench.py --arch densenet121 --batch-size 256   # images of 224 pixels
    python bench.py --rows 'torchvision plain' '*fused*' --csv bench.csv --plot bench.png
    python bench.py --arch densenet121 --inference --batch-size 1 16 --precision fp32 bf16

Runs train.py's step on random images. The rows take turns: each round runs a warm-up and a few
steps of every row, so that slow phases of the machine affect all rows. Times are medians over the
rounds, with quartiles. Rows of timm, ONNX Runtime and OpenVINO (inference on a CPU) need these
packages. Ratios of speed, memory and peak are to the first row with the same batch size. Other
columns:

x limit: on a CPU, the time divided by the time that the step's convolutions would take at the speed
    of a large matrix product, which is measured in each round. Not a bound: fused rows, whose maps
    stay in cache, can be below 1.
first s: seconds of the first call, including ONNX export and compilation (perhaps from a cache).
memory: on a CPU, the bytes that the forward pass holds for backward. On a GPU, the peak of a step,
    with weights and momentum (for a CUDA graph: during its capture).
peak: on a CPU, the peak of a step (forward, loss and backward) in torch's allocator, without
    images, weights and gradients. Does not include the CPU kernels' scratch buffers.
"""

import argparse
import os
import sys
from pathlib import Path

from training import console, flags
from training.parsing import POSITIVE, Parser


def make_parser():
    parser = Parser(prog='bench.py', description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('network, as for train.py').add_argument
    add('--arch', metavar='NAME', help='an ImageNet network')
    add('--depth', help='(default: 100)')
    add('--growth-rate', help='(default: 12; with --arch, the network\'s)')
    add('--image-size', nargs='+', metavar='PIXELS', help='one number, or height and width '
        '(default: 32, with --arch 224)')
    add('--batch-size', '-b', nargs='+', help='(default: 64)')
    add = parser.add_argument_group('rows').add_argument
    add('--precision', nargs='+', choices=flags.PRECISIONS,
        help='(default: tf32 bf16 on cuda, fp32 elsewhere)')
    add('--compile', action='store_true',
        help='also torch.compile, on cuda also with mode reduce-overhead (minutes for each)')
    add('--inference', action='store_true', help='evaluation instead of training')
    add('--rows', nargs='+', metavar='PATTERN', default=['*'],
        help='only rows with these names, such as \'ours*\'; ratios are to the first')
    add = parser.add_argument_group('measuring').add_argument
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    add('--rounds', type=POSITIVE, default=10, help='(default: %(default)s)')
    add('--steps', type=POSITIVE,
        help='steps per row and round, which are averaged (default: 20 on cuda, 1 on a CPU)')
    add('--csv', type=output_file('.csv'), metavar='FILE', help='the table')
    add('--plot', type=output_file('.png', '.pdf', '.svg'), metavar='FILE', help='its figure')
    return parser


def output_file(*suffixes):
    """An argparse type: a writable path, checked before measuring."""
    def parse(text):
        path = Path(text)
        if path.suffix not in suffixes or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(
                f'{text!r} is not a {", ".join(suffixes)} file in a directory that can be written')
        return path
    return parse


if __name__ == '__main__':  # --help and wrong flags answer before torch is imported
    console.exit_on_user_error(make_parser().parse_args, 'bench.py')

import csv
import fnmatch
import functools
import gc
import importlib.util
import math
import platform
import tempfile
import time
import timeit
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torch.autograd import profiler
from torch.utils.flop_counter import FlopCounterMode

import plot
import train
from fused_dense_block import cpu, fuse
from fused_dense_block.library import cpu_field
from training import datasets, evaluation, networks
from training.console import UserError
from training.device import (
    AUTOCAST_TYPES,
    choose_device,
    choose_precision,
    keep_freed_memory,
    make_autocast,
    ran_out_of_memory,
)

NETWORK_FLAGS = 'arch', 'depth', 'growth_rate', 'image_size', 'batch_size'  # of train.py, too


class Mode(NamedTuple):
    cpu: str  # the `path` of the dense blocks on a CPU; 'layers': not fused
    cuda: str | None  # on a GPU; None: not measured there
    memory_efficient: bool


MODES = {'plain': Mode('layers', 'layers', False),
         'checkpointed': Mode('layers', 'layers', True),
         'fused, eager': Mode('eager', None, False),
         'fused, eager, memory-efficient': Mode('eager', None, True),
         'fused': Mode('kernels', None, False),
         'fused, memory-efficient': Mode('kernels', 'eager', True)}
EAGER_MODES = [name for name, mode in MODES.items() if mode.cpu != 'kernels']
MATRICES = (4096, 1024), (1024, 1024)  # shapes of the large matrix product
EXPORTED = {'onnxruntime': ['fp32'], 'openvino': ['fp32', 'bf16']}  # precisions
INSTRUCTION_SETS = 'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16'  # as in /proc/cpuinfo


class Row(NamedTuple):
    source: str           # ours, torchvision, timm, onnxruntime or openvino
    mode: str             # a key of MODES
    precision: str
    channels_last: bool = True
    compiled: str = ''    # mode of torch.compile
    graph: bool = False

    @property
    def name(self):
        parts = {f'{self.source} {self.mode}': True, 'NCHW': not self.channels_last,
                 f'compiled ({self.compiled})': self.compiled, 'CUDA graph': self.graph}
        return ', '.join(part for part, present in parts.items() if present)


# ---- the networks -------------------------------------------------------------------------

def network_flags(inference=False, **given):
    """train.py's flags for network, images and step, and `inference`.

    Flags in `given` other than NETWORK_FLAGS are ignored, and None means the default.
    """
    argv = []
    for name in NETWORK_FLAGS:
        if given.get(name) is not None:
            values = given[name] if isinstance(given[name], (list, tuple)) else [given[name]]
            argv += [f'--{name.replace("_", "-")}', *map(str, values)]
    if inference:
        argv.append('--momentum=0')  # saves the memory of its buffers
    # A low learning rate: diverging weights would change the speed.
    args = flags.complete(flags.parse([*argv, '--lr=1e-3']))
    args.inference = inference
    return flags.with_network(args, args.image_size or (224 if args.arch else 32))


def make_model(row, args, device_type='cpu'):
    """The network of a row, on the CPU; all rows have the same size."""
    mode = MODES[row.mode]
    path = getattr(mode, device_type)
    num_classes = 10 if datasets.is_small(args.image_size) else 1000
    args = argparse.Namespace(**vars(args))
    # For fused blocks it is an argument of `fuse`.
    args.memory_efficient = mode.memory_efficient and path == 'layers'
    model = networks.build(args, num_classes, args.image_size)
    if row.source in ('torchvision', 'timm'):
        width = model.config['num_init_features']
        settings = {name: model.config[name] for name in (
            'growth_rate', 'block_config', 'num_classes', 'memory_efficient')}
        if row.source == 'torchvision':
            model = torchvision.models.DenseNet(num_init_features=width, **settings)
        else:
            from timm.models.densenet import DenseNet  # its stem has width 2 * growth_rate
            model = DenseNet(**settings)
        if datasets.is_small(args.image_size):  # the paper's stem for CIFAR instead of ImageNet's
            model.features.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            for name in ('norm0', 'relu0', 'pool0'):
                setattr(model.features, name, nn.Identity())
    if path != 'layers':
        fuse(model, memory_efficient=mode.memory_efficient, kernels=path == 'kernels')
    return model


def make_rows(options, precision, on_cuda):
    """All rows of a precision that the flags and the device allow."""
    dtype = AUTOCAST_TYPES.get(precision, torch.float32)
    paths = ['layers', 'eager']
    if not on_cuda and dtype in cpu.TYPES and cpu.unavailable_reason(dtype) is None:
        paths.append('kernels')
    modes = [name for name, mode in MODES.items() if (mode.cuda if on_cuda else mode.cpu) in paths]
    if options.inference:
        modes = [name for name in modes if name in ('plain', 'fused')]
    ours = [Row('ours', mode, precision) for mode in modes]
    theirs = Row('torchvision', 'plain', precision)
    plain = [theirs._replace(source=source) for source in ('torchvision', 'timm')
             if importlib.util.find_spec(source)]
    rows = []
    if precision in ('fp32', 'tf32'):  # torchvision's defaults
        rows.append(theirs._replace(channels_last=False))
    rows += plain
    if not options.inference:
        rows.append(theirs._replace(mode='checkpointed'))
    fused = 'fused, memory-efficient' if on_cuda else 'fused'
    if fused in modes:
        rows += [row._replace(mode=fused) for row in plain]
    compiled = [row._replace(compiled='default') for row in (theirs, ours[0]) if options.compile]
    rows += ours + compiled
    if on_cuda:
        rows += [row._replace(compiled='reduce-overhead') for row in compiled]
        rows += [row._replace(graph=True) for row in ours + compiled if row.mode != 'checkpointed']
    elif options.inference and importlib.util.find_spec('onnxscript'):
        has_bf16 = any('bf16' in name for name in instruction_sets())
        rows += [Row(source, 'plain', precision) for source, precisions in EXPORTED.items()
                 if precision in precisions and importlib.util.find_spec(source)
                 and (precision == 'fp32' or has_bf16)]
    return rows


def select_rows(options, on_cuda):
    """The rows for --precision and --rows, in the order of these flags."""
    table = [make_rows(options, precision, on_cuda) for precision in options.precision]
    found = [row for rows in table for pattern in options.rows for row in rows
             if fnmatch.fnmatchcase(row.name, pattern)]
    if not found:
        names = ', '.join(dict.fromkeys(f"'{row.name}'" for rows in table for row in rows))
        raise UserError(f'--rows matches no row; the rows here are {names}')
    return list(dict.fromkeys(found))


# ---- measuring ----------------------------------------------------------------------------

class Runner:
    """The model, the step and the measurements of a row.

    Attributes:
        times: seconds per step, one for each round.
        first_call, memory, peak: the columns, in seconds and bytes.
        failure: one line that says why the row was aborted, or ''.
    """

    def __init__(self, row, args, device):
        self.row, self.args, self.device = row, args, device
        self.on_cuda = device.type == 'cuda'
        self.times, self.failure = [], ''
        self.first_call = self.memory = self.peak = math.nan

    def run_round(self, steps):
        """Measure once, after `start` in the first round; a no-op if the row has failed."""
        if self.failure:
            return
        try:
            if not self.times:
                self.start()
            self.times.append(self.time(steps))
        except Exception as error:
            failure = f'failed: {type(error).__name__}: {error}'.partition('\n')[0]
            self.failure = 'out of memory' if ran_out_of_memory(error) else failure
            self.model = self.state = self.step = self.batch = None  # frees their memory

    def start(self):
        """Build the model, run the first steps and measure the memory.

        Raises:
            RuntimeError: a dense block took another path than expected for this row.
        """
        row, args, device = self.row, self.args, self.device
        print(f'starting {row.name}, {row.precision}, {args.batch_size}', file=sys.stderr)
        allocated = self._free_memory()
        size = datasets.sides(args.image_size)
        self.batch = (torch.randn(args.batch_size, 3, *size).to(device),
                      torch.randint(10, [args.batch_size]).to(device))
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        self.model = make_model(row, args, device.type).train(not args.inference)
        self.model.to(device, memory_format=layout)
        started = time.perf_counter()
        if row.compiled:
            self.model.compile(mode=row.compiled)
        autocast = make_autocast(row.precision, device)
        self.state = train.make_state(args, self.model, device, row.precision)
        if row.source in EXPORTED:
            self.step = make_exported_step(row, self.model, self.batch[0])
        elif args.inference:
            self.step = torch.inference_mode()(
                lambda images, labels: evaluation.classify(self.model, images, autocast))
        else:
            self.step = functools.partial(train.train_step, self.state, autocast=autocast)
        second_call = self.time(1)
        self.first_call = time.perf_counter() - started - second_call
        expected = getattr(MODES[row.mode], device.type)
        for name, block in self.model.named_modules():
            if hasattr(block, 'denselayer1') and getattr(block, 'path', 'layers') != expected:
                raise RuntimeError(f'{name} took the path {block.path!r} instead of '
                                   f'{expected!r}: {block.reason}')
        if self.on_cuda:
            self._free_memory()
            torch.cuda.reset_peak_memory_stats()
            self.time(1)
            self.memory = torch.cuda.max_memory_allocated() - allocated
        elif not args.inference:
            with autocast:
                self.memory = bytes_held(self.model, self.batch[0])
            self.peak = peak_bytes(self.model, *self.batch, autocast)

    def _free_memory(self):
        """Free unused memory. Returns the bytes that stay allocated on the GPU."""
        gc.collect()
        if not self.on_cuda:
            return 0
        torch._C._cuda_clearCublasWorkspaces()  # one for each row and each capture
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def time(self, steps):
        """Seconds per step, the mean over `steps` steps after a warm-up step."""
        choose_precision(self.row.precision, self.device)
        step = self.step
        if self.row.graph:  # captured each time, because a graph would hold its memory
            step = train.CudaGraphStep(step, self.state, [self.batch[0].shape])
        for launches in (1, steps):
            started = time.perf_counter()
            for _ in range(launches):
                step(*self.batch)
            if self.on_cuda:
                torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps


def make_exported_step(row, model, images):
    """Inference by ONNX Runtime or OpenVINO, with torch's number of threads."""
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'densenet.onnx')
        torch.onnx.export(model, (images,), path, input_names=['images'], verbose=False)
        if row.source == 'openvino':  # from ONNX: its conversion from torch sends telemetry
            import openvino
            compiled = openvino.compile_model(path, 'CPU', {
                'INFERENCE_PRECISION_HINT': 'f32' if row.precision == 'fp32' else 'bf16',
                'INFERENCE_NUM_THREADS': threads})
            return lambda images, labels: compiled(images.numpy(), share_inputs=True)[0]
        import onnxruntime
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images, labels: session.run(None, {'images': images.numpy()})[0]


def allocations(function, *args):
    """The result of a call on a CPU, the bytes still allocated after it, and their peak."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # keep the profiler's own messages off stderr
    gc.collect()  # or freeing older garbage during the call would count
    with profiler.profile(profile_memory=True) as profile:
        result = function(*args)
    events = [event for event in profile.kineto_results.events() if event.name() == '[memory]']
    events.sort(key=lambda event: event.start_ns())
    totals = np.cumsum([event.nbytes() for event in events])
    return result, totals[-1], totals.max()


def bytes_held(model, images):
    """Bytes that a training forward on a CPU holds for backward, without weights and logits."""
    logits, held, _ = allocations(model, images)
    return held - logits.untyped_storage().nbytes()


def peak_bytes(model, images, labels, autocast):
    """The peak of a training step on a CPU, without images, weights and their gradients."""
    def step():
        with autocast:
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()

    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return allocations(step)[2]


def convolution_flops(args):
    """FLOPs of all convolutions in a step; a multiply-add counts as two.

    Transitions are counted with the pooling before the convolution, which is a quarter of the work
    for the same result.
    """
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model(Row('ours', 'plain', 'fp32'), args).eval()
        for module in model.modules():
            if hasattr(module, 'pool'):
                module._modules['conv'] = module._modules.pop('conv')  # move it to the end
        model(torch.empty(args.batch_size, 3, *datasets.sides(args.image_size)))
    forward = counter.get_flop_counts()['Global'][torch.ops.aten.convolution]
    return forward if args.inference else 3 * forward  # backward: gradients of input and of weight


def matrix_product_rate(precision):
    """FLOP/s of a large matrix product on the CPU: the median of three, after a warm-up."""
    dtype = AUTOCAST_TYPES.get(precision, torch.float32)
    a, b = (torch.randn(shape).to(dtype) for shape in MATRICES)
    product = a @ b
    times = timeit.repeat(lambda: torch.mm(a, b, out=product), number=1, repeat=3)
    return 2 * a.numel() * b.shape[1] / np.median(times)


# ---- showing ------------------------------------------------------------------------------

def tabulate(runners, limits, workload):
    """The rows of the CSV file as dicts, with NaN for what was not measured.

    Args:
        limits: {precision: milliseconds per image of the convolutions at the speed of a matrix
            product}.
    """
    table, first = [], {}
    for runner in runners:
        row, batch_size = runner.row, runner.args.batch_size
        low, median, high = 1e3 * np.quantile(runner.times or [math.nan], [0.25, 0.5, 0.75])
        numbers = dict(
            row=row.name, precision=row.precision, batch_size=batch_size, ms=median,
            ms_quartile1=low, ms_quartile3=high, images_per_second=1e3 * batch_size / median,
            limit_ratio=median / (batch_size * limits.get(row.precision, math.nan)),
            first_call_s=runner.first_call, memory_mib=runner.memory / 2**20,
            peak_mib=runner.peak / 2**20, rounds=len(runner.times), failure=runner.failure,
            workload=workload)
        base = first.setdefault(batch_size, numbers)
        numbers.update(speed_ratio=base['ms'] / median,
                       memory_ratio=numbers['memory_mib'] / base['memory_mib'],
                       peak_ratio=numbers['peak_mib'] / base['peak_mib'])
        table.append(numbers)
    return table


def print_table(table):
    width = max(len(numbers['row']) for numbers in table)
    print(f'{"row":<{width}} precision batch         ms        25%        75%   images/s   speed  '
          f'x limit  first s   memory  ratio     peak  ratio')
    for numbers in table:
        line = ('{row:<{width}} {precision:<9} {batch_size:5} {ms:10,.2f} {ms_quartile1:10,.2f} '
                '{ms_quartile3:10,.2f} {images_per_second:10,.0f} {speed_ratio:7.2f} '
                '{limit_ratio:8.2f} {first_call_s:8.1f} {memory_mib:8,.0f} {memory_ratio:6.3f} '
                '{peak_mib:8,.0f} {peak_ratio:6.3f}')
        print(line.format(**numbers, width=width).replace('nan', '  -'), numbers['failure'])


# ---- command line -------------------------------------------------------------------------

def instruction_sets():
    present = cpu_field('flags').split()
    return [name for name in INSTRUCTION_SETS if name in present]


def describe(rows, batches, device):
    """The workload, the machine and the versions, in one line."""
    args, sizes = batches[0], ', '.join(str(args.batch_size) for args in batches)
    if device.type == 'cuda':
        hardware = torch.cuda.get_device_name()
    else:
        name = cpu_field('model name') or platform.processor()
        hardware = (f'{name} ({" ".join(instruction_sets())}; '
                    f'torch: {torch.backends.cpu.get_cpu_capability()}), '
                    f'{torch.get_num_threads()} threads')
    packages = dict.fromkeys(['torch', *(row.source for row in rows if row.source != 'ours')])
    versions = [f'{name} {importlib.import_module(name).__version__}' for name in packages]
    return (f'{networks.name(args)}, {"inference" if args.inference else "training"}, batches '
            f'of {sizes} at {datasets.show_size(args.image_size)} pixels; {hardware}, '
            f'{", ".join(versions)}')


def run(options):
    """Measure and print all rows. Exits with 1 if one failed for another reason than memory."""
    device = choose_device(options.device)
    on_cuda = device.type == 'cuda'
    options.steps = options.steps or (20 if on_cuda else 1)
    options.precision = options.precision or (['tf32', 'bf16'] if on_cuda else ['fp32'])
    for precision in options.precision:
        choose_precision(precision, device)  # raises if the device does not support it
    batches = [network_flags(**{**vars(options), 'batch_size': size})
               for size in dict.fromkeys(options.batch_size or [None])]
    rows = select_rows(options, on_cuda)
    flops = convolution_flops(batches[0]) / batches[0].batch_size  # also checks the network
    workload = describe(rows, batches, device)
    print(workload)
    keep_freed_memory()  # as train.py does; all rows profit
    runners = [Runner(row, args, device) for args in batches for row in rows]
    rates = {} if on_cuda else {row.precision: [] for row in rows}  # FLOP/s in each round
    try:
        for i in range(options.rounds):
            print(f'round {i + 1} of {options.rounds}', file=sys.stderr)
            for precision, found in rates.items():
                found.append(matrix_product_rate(precision))
            for runner in runners:
                runner.run_round(options.steps)
    finally:  # print the measurements even after Ctrl-C
        limits = {precision: 1e3 * flops / np.median(found)
                  for precision, found in rates.items() if found}
        table = tabulate(runners, limits, workload)
        print_table(table)
        for precision, limit in limits.items():
            print(f'limit, {precision}: {limit:,.4f} ms per image, {flops / 1e9:,.3f} GFLOP of '
                  f'convolutions at {flops / limit / 1e6:,.0f} GFLOP/s, as a matrix product')
        if options.csv:
            with open(options.csv, 'w', newline='') as file:
                writer = csv.DictWriter(file, table[0])
                writer.writeheader()
                writer.writerows(table)
        if options.plot:
            plot.save_figure(plot.speed_figure(table), options.plot)
    if any(runner.failure.startswith('failed') for runner in runners):
        sys.exit(1)


def main(argv=None):
    try:
        console.exit_on_user_error(lambda: run(make_parser().parse_args(argv)), 'bench.py')
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
