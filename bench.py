"""Time and memory of our training step beside torchvision's and timm's, all in one run.

    python bench.py                                       # DenseNet-BC-100-12, batches of 64
    python bench.py --arch densenet121 --batch-size 256   # images of 224 pixels
    python bench.py --rows 'ours plain' 'ours*' --csv bench.csv --plot bench.png
    python bench.py --inference --precision fp32 bf16     # on a CPU with ONNX Runtime, too

The step is train.py's own, on random images. The rows take turns, a warm-up and a few steps each
in a round, so that what slows the machine down for a while slows them all: a time is the median
over all rounds, with the quartiles beside it. Rows of timm and ONNX Runtime are there if the
packages are. Speed and memory are also given as ratios to the first row. The other columns:

memory: on a GPU the peak of a step (with weights and momentum; of a graph, that of recording it),
    on a CPU what the forward pass holds for backward.
x limit: on a CPU, the time over that of all convolutions of the step at the rate of a large matrix
    product, which is measured in each round as well.
"""

import argparse
import contextlib
import csv
import fnmatch
import functools
import gc
import importlib.util
import math
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn
from torch.profiler import ProfilerActivity
from torch.utils.flop_counter import FlopCounterMode

import data
import densenet
import densenet_cpu
import flags
import machine
import plot
import runlog
import train
from errors import UserError

NETWORK_FLAGS = 'arch', 'depth', 'growth_rate', 'image_size', 'batch_size'  # also train.py's
# How our dense blocks train: the `path` that they take, and memory_efficient.
MODES = {'plain': ('plain', False),
         'checkpointed': ('checkpointed', True),
         'block': ('linear', False),
         'memory-efficient': ('linear', True),
         'block, CPU kernels': ('kernels', False),
         'block, CPU kernels, memory-efficient': ('kernels', True)}
EAGER_MODES = [mode for mode in MODES if 'kernels' not in mode]
MATRICES = (4096, 1024), (1024, 1024)  # whose product has the rate that a step is held against


class Row(NamedTuple):
    source: str           # ours, torchvision, timm or onnxruntime
    mode: str             # a key of MODES; others' models are plain or checkpointed
    precision: str
    channels_last: bool = True
    compiled: bool = False
    graph: bool = False

    @property
    def name(self):
        return (f'{self.source} {self.mode}' + ', NCHW' * (not self.channels_last)
                + ', compiled' * self.compiled + ', CUDA graph' * self.graph)


class Result(NamedTuple):
    times: list               # seconds a step, of each round; empty if the row failed
    memory: float = math.nan  # bytes
    failure: str = ''


# ---- the networks -------------------------------------------------------------------------

def network_flags(**given):
    """The flags of train.py that make the network, the images and the step.

    Of `given`, those in NETWORK_FLAGS count; None stands for the default.
    """
    argv = [f'--{name.replace("_", "-")}={given[name]}' for name in NETWORK_FLAGS
            if given.get(name) is not None]
    # A low rate: weights that run away would meet other numbers, and other speeds.
    args, _ = flags.parse_args([*argv, '--lr=1e-3'])
    return flags.with_network(args, args.image_size or (224 if args.arch else 32))


def make_model(row, args):
    """The network of a row, of the same size for all rows.

    Raises:
        UserError: there is no such network.
    """
    path, memory_efficient = MODES[row.mode]
    num_classes = 10 if args.image_size <= data.SMALL else 1000
    args = argparse.Namespace(**{**vars(args), 'memory_efficient': memory_efficient})
    model = train.build_model(args, num_classes, args.image_size)
    if row.source in ('ours', 'onnxruntime'):
        for module in model.modules():
            if hasattr(module, 'linear_memory'):
                module.linear_memory = path in ('linear', 'kernels')
                module.cpu_kernels = None if path == 'kernels' else False
        return model
    config = model.config
    settings = {name: config[name] for name in (
        'growth_rate', 'block_config', 'num_init_features', 'num_classes', 'memory_efficient')}
    if row.source == 'torchvision':
        model = torchvision.models.DenseNet(**settings)
    else:
        from timm.models.densenet import DenseNet
        del settings['num_init_features']  # its stem always has twice the growth rate
        model = DenseNet(**settings)
    if config['small_inputs']:  # their ImageNet stem makes way for that of the paper for CIFAR
        for name in ('norm0', 'relu0', 'pool0'):
            if hasattr(model.features, name):
                delattr(model.features, name)
        model.features.conv0 = nn.Conv2d(3, config['num_init_features'], 3, padding=1, bias=False)
    return model


def make_rows(options, precision, on_cuda):
    """All rows of a precision that the flags and the device admit."""
    has_kernels = not on_cuda and densenet_cpu.unavailable_reason() is None
    modes = MODES if has_kernels else EAGER_MODES
    if options.inference:
        modes = [mode for mode in modes if mode in ('plain', 'block, CPU kernels')]
    theirs = Row('torchvision', 'plain', precision)
    ours = [Row('ours', mode, precision) for mode in modes]
    rows = [theirs]
    if precision in ('fp32', 'tf32'):  # as torchvision's comes, before anybody tunes it
        rows.insert(0, theirs._replace(channels_last=False))
    if is_installed('timm'):
        rows.append(theirs._replace(source='timm'))
    if not options.inference:
        rows.append(theirs._replace(mode='checkpointed'))
    compiled = [row._replace(compiled=True) for row in (theirs, ours[0]) if options.compile]
    rows += ours + compiled
    if on_cuda:
        rows += [row._replace(graph=True) for row in ours + compiled if row.mode != 'checkpointed']
    elif (options.inference and precision == 'fp32'
            and is_installed('onnxruntime') and is_installed('onnxscript')):
        rows.append(Row('onnxruntime', 'plain', precision))
    return rows


def is_installed(package):
    return importlib.util.find_spec(package) is not None


def select_rows(options, on_cuda):
    """The rows that --precision and --rows name, in the order of both."""
    table = [make_rows(options, precision, on_cuda) for precision in options.precision]
    found = [row for rows in table for pattern in options.rows for row in rows
             if fnmatch.fnmatchcase(row.name, pattern)]
    if not found:
        names = ', '.join(dict.fromkeys(f"'{row.name}'" for rows in table for row in rows))
        raise UserError(f'--rows: no row is called that; here there are {names}')
    return list(dict.fromkeys(found))


# ---- measuring ----------------------------------------------------------------------------

class Runner:
    """A row's model and its step, ready to be timed. Making one runs the first steps.

    Raises:
        RuntimeError: a block fell back, and would be measured under another's name.
    """

    def __init__(self, row, args, device, inference=False):
        self.row, self.device = row, device
        self.on_cuda = device.type == 'cuda'
        allocated = self._free_memory()
        self.batch = (torch.randn(args.batch_size, 3, *2 * [args.image_size]).to(device),
                      torch.randint(10, [args.batch_size]).to(device))
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        self.model = make_model(row, args).train(not inference).to(device, memory_format=layout)
        if row.compiled:
            self.model.compile()
        autocast = machine.make_autocast(row.precision, device)
        if inference:  # which has no use for momentum, and so for its memory
            args = argparse.Namespace(**{**vars(args), 'momentum': 0.0})
        self.state = train.make_state(args, self.model, device, row.precision)
        if row.source == 'onnxruntime':
            self.step = make_onnxruntime_step(self.model, self.batch[0])
        elif inference:
            self.step = torch.inference_mode()(
                lambda images, labels: train.classify(self.model, images, autocast))
        else:
            self.step = functools.partial(train.train_step, self.state, autocast=autocast)
        self._launch(self._ready_step())
        if row.source == 'ours' and not row.compiled:
            for block in self.model.modules():
                if isinstance(block, densenet.DenseBlock) and block.path != MODES[row.mode][0]:
                    raise RuntimeError(f'a block went the {block.path} way: '
                                       f'{block.fallback_reason}')
        self.memory = math.nan
        if self.on_cuda:
            self._free_memory()
            torch.cuda.reset_peak_memory_stats()  # the first step tried out many convolutions
            self._launch(self._ready_step())
            self.memory = torch.cuda.max_memory_allocated() - allocated
        elif not inference:
            with autocast:
                self.memory = bytes_held(self.model, self.batch[0])

    def _free_memory(self):
        """Bytes that stay allocated on the GPU when all that can be freed is."""
        gc.collect()
        if not self.on_cuda:
            return 0
        torch._C._cuda_clearCublasWorkspaces()  # each row, and each recording, makes its own
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def _ready_step(self):
        """The step, or a graph of it: recorded anew each time, since it would hold its memory."""
        machine.choose_precision(self.row.precision, self.device)
        if not self.row.graph:
            return self.step
        return train.CudaGraphStep(self.step, self.state, [self.batch[0].shape])

    def _launch(self, step, times=1):
        for _ in range(times):
            step(*self.batch)
        if self.on_cuda:
            torch.cuda.synchronize()

    def time(self, steps):
        """Seconds a step, the mean of some in a row, after one to warm up."""
        step = self._ready_step()
        self._launch(step)
        started = time.perf_counter()
        self._launch(step, steps)
        return (time.perf_counter() - started) / steps


def make_onnxruntime_step(model, images):
    """Inference by ONNX Runtime on the exported network, in as many threads as torch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'densenet.onnx')
        torch.onnx.export(model, (images,), path, verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    name = session.get_inputs()[0].name
    return lambda images, labels: session.run(None, {name: images.numpy()})


def bytes_held(model, images):
    """The memory that a training forward holds for backward on a CPU, without the logits.

    That is what it allocates and does not free: the inputs that checkpointing holds on to are not
    among autograd's saved tensors.
    """
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler's own log of when it is on
    with torch.profiler.profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profile:
        logits = model(images)
    allocated = sum(event.self_cpu_memory_usage for event in profile.key_averages())
    return allocated - logits.untyped_storage().nbytes()


def convolution_flops(args, inference):
    """FLOPs of all convolutions in a step, two for a multiply-add; transitions pool first."""
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model(Row('ours', 'plain', 'fp32'), args).eval()
        model(torch.empty(args.batch_size, 3, args.image_size, args.image_size))
    forward = counter.get_flop_counts()['Global'][torch.ops.aten.convolution]
    return forward if inference else 3 * forward  # backward: gradients of input and of weight


def matrix_product_rate(precision):
    """FLOP/s of a large matrix product on the CPU, the median of three after one to warm up."""
    dtype, times = machine.AUTOCAST_TYPES.get(precision, torch.float32), []
    a, b = (torch.randn(shape).to(dtype) for shape in MATRICES)
    product = a @ b
    for _ in range(3):
        started = time.perf_counter()
        torch.mm(a, b, out=product)
        times.append(time.perf_counter() - started)
    return 2 * a.numel() * b.shape[1] / statistics.median(times)


def measure(rows, args, device, options, results, rates):
    """Fills in `results`, {row: Result}, and on a CPU `rates`, {precision: FLOP/s in each round}.

    A row that fails says why, and the others go on.
    """
    runners = {}

    @contextlib.contextmanager
    def failing_alone(row):
        try:
            yield
        except Exception as error:
            failure = f'failed: {type(error).__name__}: {error}'.partition('\n')[0]
            results[row] = Result([], failure='out of memory' if machine.ran_out_of_memory(error)
                                  else failure)
            runners.pop(row, None)

    for row in rows:
        print(f'starting {row.name}, {row.precision}', file=sys.stderr)
        with failing_alone(row):
            runners[row] = Runner(row, args, device, options.inference)
            results[row] = Result([], runners[row].memory)
    for i in range(options.rounds):
        print(f'round {i + 1} of {options.rounds}', file=sys.stderr)
        if device.type == 'cpu':
            for precision in dict.fromkeys(row.precision for row in runners):
                rates.setdefault(precision, []).append(matrix_product_rate(precision))
        for row, runner in list(runners.items()):
            with failing_alone(row):
                results[row].times.append(runner.time(options.steps))


# ---- showing ------------------------------------------------------------------------------

CELLS = {'row': '{row}', 'precision': '{precision}',
         'ms (quartiles)': '{ms:,.2f} ({ms_quartile1:,.2f}-{ms_quartile3:,.2f})',
         'images/s': '{images_per_second:,.0f}', 'speed': '{speed_ratio:.2f}x',
         'x limit': '{limit_ratio:.2f}', 'memory': '{memory_mib:,.0f} MiB',
         'ratio': '{memory_ratio:.3f}'}


def tabulate(results, batch_size, limits, title):
    """The rows of the CSV file, in dicts; NaN where something was not measured.

    Args:
        results: {row: Result}; `speed_ratio` and `memory_ratio` refer to the first.
        limits: {precision: the least milliseconds that a step could take}.
        title: the workload and the machine.
    """
    table = []
    for row, result in results.items():
        low, median, high = 1e3 * np.quantile(result.times or [math.nan], [0.25, 0.5, 0.75])
        table.append(dict(
            row=row.name, precision=row.precision, ms=median, ms_quartile1=low, ms_quartile3=high,
            images_per_second=1e3 * batch_size / median,
            limit_ratio=median / limits.get(row.precision, math.nan),
            memory_mib=result.memory / 2**20, rounds=len(result.times),
            failure=result.failure, workload=title))
    for numbers in table:
        numbers['speed_ratio'] = table[0]['ms'] / numbers['ms']
        numbers['memory_ratio'] = numbers['memory_mib'] / table[0]['memory_mib']
    return table


def print_table(table):
    lines = [list(CELLS)]
    for numbers in table:
        cells = [text.format(**numbers) for text in CELLS.values()]
        lines.append(['-' if 'nan' in cell else cell for cell in cells])
    widths = [max(map(len, column)) for column in zip(*lines)]
    for line in lines:
        print('  '.join(cell.ljust(width) if i < 2 else cell.rjust(width)
                        for i, (cell, width) in enumerate(zip(line, widths))))
    for numbers in table:
        if numbers['failure']:
            print('{row}, {precision}: {failure}'.format(**numbers))


def draw_table(path, table, title, memory_label):
    """Horizontal bars of time and memory, a row each."""
    table = [numbers for numbers in table if not numbers['failure']][::-1]
    names = ['{row}, {precision}'.format(**numbers) for numbers in table]
    colors = [plot.COLORS[numbers['row'].startswith('ours')] for numbers in table]
    ms, low, high, memory = (np.array([numbers[key] for numbers in table]) for key in (
        'ms', 'ms_quartile1', 'ms_quartile3', 'memory_mib'))
    with rc_context({**plot.STYLE, 'axes.grid.axis': 'x'}):
        figure = Figure(figsize=(10, 1.2 + 0.3 * len(table)), layout='constrained')
        figure.suptitle(title, fontsize=8, color=plot.GREY)
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(names, ms, color=colors, xerr=[ms - low, high - ms], ecolor=plot.GREY)
        left.set_xlabel('ms per step (median and quartiles)')
        right.barh(names, memory, color=colors)
        right.set(xlabel=memory_label, xlim=(0, None))
    plot.save_figure(figure, path)


# ---- command line -------------------------------------------------------------------------

def make_parser():
    parser = flags.Parser(prog='bench.py', description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('network, as for train.py').add_argument
    add('--arch', metavar='NAME', help='an ImageNet network')
    add('--depth', help='(default: 100)')
    add('--growth-rate', help='(default: 12, or that of the --arch)')
    add('--image-size', metavar='PIXELS', help='(default: 32, with --arch 224)')
    add('--batch-size', '-b', help='(default: 64)')
    add = parser.add_argument_group('rows').add_argument
    add('--precision', nargs='+', choices=('fp32', 'tf32', 'bf16', 'fp16'),
        help='(default: tf32 bf16 on cuda, else fp32)')
    add('--compile', action='store_true', help='also torch.compile: minutes for each network')
    add('--inference', action='store_true', help='not training: evaluation')
    add('--rows', nargs='+', metavar='PATTERN', default=['*'],
        help='only rows of such names, as \'ours*\'; the first is what ratios refer to')
    add = parser.add_argument_group('measuring').add_argument
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    add('--rounds', type=flags.POSITIVE, default=10, help='(default: %(default)s)')
    add('--steps', type=flags.POSITIVE,
        help='of each row in a round, where their mean counts (default: 20 on cuda, 1 on a CPU)')
    add('--csv', type=output_file('.csv'), metavar='FILE', help='the table, a .csv file')
    add('--plot', type=output_file('.png', '.pdf', '.svg'), metavar='FILE',
        help='its figure, a .png, .pdf or .svg file')
    return parser


def output_file(*suffixes):
    """An argparse type; refuses, before anything is measured, what could not be written then."""
    def parse(text):
        path = Path(text)
        if path.suffix not in suffixes or not os.access(path.parent, os.W_OK):
            raise argparse.ArgumentTypeError(
                f'{text!r} is not a {", ".join(suffixes)} file in a directory that can be written')
        return path
    return parse


def describe(rows, args, device, inference):
    """The workload, the machine and the versions, in one line."""
    machine = (torch.cuda.get_device_name() if device.type == 'cuda'
               else f'CPU, {torch.get_num_threads()} threads')
    packages = dict.fromkeys(['torch', *(row.source for row in rows)])
    versions = [f'{name} {importlib.import_module(name).__version__}' for name in packages
                if name != 'ours']
    return (f'{train.model_name(args)}, {"inference" if inference else "training"}, batches of '
            f'{args.batch_size} at {args.image_size} pixels; {machine}, {", ".join(versions)}')


def run(options):
    """Measures all rows and shows them; exits with 1 if one failed, but for lack of memory."""
    device = machine.choose_device(options.device)
    on_cuda = device.type == 'cuda'
    options.steps = options.steps or (20 if on_cuda else 1)
    options.precision = options.precision or (['tf32', 'bf16'] if on_cuda else ['fp32'])
    for precision in options.precision:
        machine.choose_precision(precision, device)  # refuses what the device has not
    args = network_flags(**vars(options))
    rows = select_rows(options, on_cuda)
    flops = convolution_flops(args, options.inference)  # a UserError if there is no such network
    title = describe(rows, args, device, options.inference)
    print(title)
    results, rates = {}, {}
    try:
        measure(rows, args, device, options, results, rates)
    finally:  # what was measured is shown, also after Ctrl-C
        rates = {precision: statistics.median(values) for precision, values in rates.items()}
        limits = {precision: 1e3 * flops / rate for precision, rate in rates.items()}
        table = tabulate(results, args.batch_size, limits, title)
        print_table(table)
        print(f'speed and memory are relative to {rows[0].name}, {rows[0].precision}')
        for precision, limit in limits.items():
            print(f'limit, {precision}: {limit:,.2f} ms, {flops / 1e9:,.1f} GFLOP of convolutions '
                  f'at the {rates[precision] / 1e9:,.0f} GFLOP/s of a large matrix product')
        if options.csv and table:
            with open(options.csv, 'w', newline='') as file:
                writer = csv.DictWriter(file, table[0])
                writer.writeheader()
                writer.writerows(table)
        if options.plot and table:
            memory_label = 'peak memory, MiB' if on_cuda else 'held for backward, MiB'
            draw_table(options.plot, table, title, memory_label)
    if any(result.failure.startswith('failed') for result in results.values()):
        sys.exit(1)


def main(argv=None):
    try:
        run(make_parser().parse_args(argv))
    except (UserError, OSError) as error:
        runlog.warn(error, 'error', 'bench.py')
        sys.exit(2)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
