"""Time and memory of a step of ours beside torchvision's and timm's DenseNet, all in one run.

    python bench.py                                       # DenseNet-BC-100-12, batches of 64
    python bench.py --arch densenet121 --batch-size 256   # images of 224 pixels
    python bench.py --rows 'ours*' --baseline 'ours plain' --csv bench.csv --plot bench.png
    python bench.py --inference --precision fp32 bf16
    python bench.py --memory-vs-depth --batch-size 8      # draws images/memory-vs-depth.png
    python bench.py --loader /data/imagenet --workers 1 8 # images that are read in a second

The step is train.py's own, on random images. The rows take turns, a warm-up and a few steps each in
a round, so that what slows the machine down for a while slows them all: a time is the median over
all rounds, with the quartiles beside it. Memory is on a GPU the peak of a step (with weights and
momentum; of a graph, that of recording it), on a CPU what the forward pass holds for backward.
"First step" is the time from the model in host memory to the end of its first step, compiling and
recording included; later rows may find that earlier ones have tuned or compiled the same, so for a
number to quote run that row alone.
"""

import argparse
import csv
import fnmatch
import functools
import gc
import importlib.metadata
import math
import os
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torchvision
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn

import data
import densenet
import flags
import memory
import plot
import train

# How our dense blocks train: (linear_memory, memory_efficient) and what `path` then says.
MODES = {'plain': (False, False, 'plain'),
         'checkpointed': (False, True, 'checkpointed'),
         'block': (True, False, 'linear'),
         'memory-efficient': (True, True, 'linear')}
DEPTHS = (22, 40, 70, 100, 130, 160, 190, 220, 250)  # of --memory-vs-depth
# Flags that two modes, which measure something else, leave out of account.
USELESS = {'memory_vs_depth': ('loader', 'arch', 'depth', 'inference', 'compile', 'rows',
                               'baseline', 'rounds', 'steps', 'csv', 'plot'),
           'loader': ('arch', 'depth', 'growth_rate', 'precision', 'inference', 'compile', 'rows',
                      'baseline', 'steps', 'csv', 'plot')}


class Row(NamedTuple):
    source: str           # ours, torchvision or timm
    mode: str             # a key of the MODES; others' models are plain or checkpointed
    precision: str
    channels_last: bool = True
    compiled: bool = False
    graph: bool = False

    @property
    def name(self):
        return (f'{self.source} {self.mode}' + ', NCHW' * (not self.channels_last)
                + ', compiled' * self.compiled + ', CUDA graph' * self.graph)


class Workload(NamedTuple):
    """What is measured: a network, all whose versions have the same size, and its input."""
    name: str
    growth_rate: int
    block_config: tuple
    num_init_features: int
    image_size: int
    batch_size: int

    @property
    def small(self):
        return self.image_size <= data.SMALL


class Result(NamedTuple):
    row: Row
    times: list                # seconds, of each step; empty if it failed
    memory: float = math.nan      # bytes
    first_step: float = math.nan  # seconds
    failure: str = ''

    @property
    def quartiles(self):
        """25%, 50% and 75% of the steps took no longer, in milliseconds."""
        if len(self.times) < 2:
            return [1e3 * self.times[0]] * 3 if self.times else [math.nan] * 3
        return [1e3 * t for t in statistics.quantiles(self.times, n=4, method='inclusive')]


# ---- the networks -------------------------------------------------------------------------

def describe_network(args):
    depth, growth_rate = args.depth or 100, args.growth_rate or 12
    with torch.device('meta'):
        if args.arch:
            model, name = getattr(densenet, args.arch)(), args.arch
        else:
            model = densenet.densenet_cifar(depth, growth_rate)
            name = f'DenseNet-BC k={growth_rate} L={depth}'
    blocks = blocks_of(model)
    return Workload(name, blocks[0].denselayer1.conv2.out_channels,
                    tuple(len(block) for block in blocks), model.features.conv0.out_channels,
                    args.image_size or (224 if args.arch else 32), args.batch_size)


def blocks_of(model):
    return [module for module in model.modules() if isinstance(module, densenet.DenseBlock)]


def make_model(row, workload):
    """The network of a row, on the CPU.

    Raises:
        ImportError: it needs a package that is not installed.
    """
    classes = 10 if workload.small else 1000
    linear, efficient, _ = MODES[row.mode]
    settings = dict(growth_rate=workload.growth_rate, block_config=workload.block_config,
                    num_classes=classes, memory_efficient=efficient)
    if row.source == 'ours':
        model = densenet.DenseNet(num_init_features=workload.num_init_features,
                                  small_inputs=workload.small, **settings)
        for module in model.modules():
            if hasattr(module, 'linear_memory'):
                module.linear_memory = linear
        return model
    if row.source == 'torchvision':
        model = torchvision.models.DenseNet(num_init_features=workload.num_init_features,
                                            **settings)
    else:
        from timm.models.densenet import DenseNet  # whose stem is always of twice the growth rate
        model = DenseNet(**settings)
    if workload.small:  # their ImageNet stem makes way for that of the paper's CIFAR networks
        for name in ('norm0', 'relu0', 'pool0'):
            if hasattr(model.features, name):
                delattr(model.features, name)
        model.features.conv0 = nn.Conv2d(3, workload.num_init_features, 3, padding=1, bias=False)
    return model


def make_rows(args, device):
    """All rows that the flags and the device admit; the first is the default baseline."""
    rows = []
    on_cuda = device.type == 'cuda'
    default = ('tf32', 'bf16') if on_cuda else ('fp32',)
    for precision in dict.fromkeys(args.precision or default):
        theirs, timm = (Row(source, 'plain', precision) for source in ('torchvision', 'timm'))
        ours = [Row('ours', mode, precision) for mode in MODES]
        if precision in ('fp32', 'tf32'):  # as torchvision's comes, before anybody tunes it
            rows.append(theirs._replace(channels_last=False))
        if args.inference:
            eager, graphed = [theirs, timm, ours[0]], ours[:1]
        else:
            eager = [theirs, timm, theirs._replace(mode='checkpointed'), *ours]
            graphed = [row for row in ours if row.mode != 'checkpointed']
        rows += eager + [row._replace(graph=True) for row in graphed if on_cuda]
        if args.compile:
            rows += [row._replace(compiled=True, graph=graph) for row in (theirs, ours[0])
                     for graph in ((False, True) if on_cuda else (False,))]
    return rows


# ---- measuring ----------------------------------------------------------------------------

class Runner:
    """A row's model and its step, ready to be timed. Making one runs the first steps."""

    def __init__(self, row, workload, device, inference):
        self.row, self.device, self.inference = row, device, inference
        gc.collect()
        allocated = torch.cuda.memory_allocated() if device.type == 'cuda' else 0
        images = torch.randn(workload.batch_size, 3, workload.image_size, workload.image_size)
        labels = torch.randint(10, (workload.batch_size,))
        self.batch = images.to(device), labels.to(device)
        self.model = make_model(row, workload)
        started = time.perf_counter()
        self._set_up()
        self._launch(self._ready_step())
        self.first_step = time.perf_counter() - started
        self._check_path()
        self.memory = self._measure_memory(allocated)

    def _set_up(self):
        layout = torch.channels_last if self.row.channels_last else torch.contiguous_format
        self.model.to(self.device, memory_format=layout).train(not self.inference)
        if self.row.compiled:
            self.model.compile()
        self.autocast = train.make_autocast(self.row.precision, self.device)
        # A low rate: weights that run away would meet other numbers, and other speeds. Inference
        # has no use for the optimizer's momentum, and so for its memory.
        args = flags.parse_args(['--lr', '1e-3', '--momentum', '0' if self.inference else '0.9'])
        self.state = train.make_state(args, self.model, self.device, self.row.precision)
        if self.inference:
            self.step = functools.partial(infer, self.model, self.autocast)
        else:
            self.step = functools.partial(train.train_step, self.state, autocast=self.autocast)

    def _ready_step(self):
        """The step, or a graph of it: recorded anew each time, since it would hold its memory."""
        train.choose_precision(self.row.precision, self.device)
        if not self.row.graph:
            return self.step
        return train.CudaGraphStep(self.step, self.state, [self.batch[0].shape])

    def _launch(self, step):
        step(*self.batch)
        if self.device.type == 'cuda':
            torch.cuda.synchronize()

    def _check_path(self):
        """Nothing is measured under another's name because a block fell back."""
        if self.row.source == 'ours' and not (self.row.compiled or self.inference):
            expected = MODES[self.row.mode][2]
            for block in blocks_of(self.model):
                if block.path != expected:
                    raise RuntimeError(f'a block went the {block.path} way: '
                                       f'{block.fallback_reason}')

    def _measure_memory(self, allocated):
        """Bytes: on a GPU the peak beyond `allocated`, on a CPU what is held for backward."""
        if self.device.type != 'cuda':
            if self.inference or self.row.compiled:  # nothing held, or out of sight of a count
                return math.nan
            with self.autocast:
                return bytes_held(self.model, self.batch[0])
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()  # each row is to pay for its own
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()  # the first step tried out many convolutions
        self._launch(self._ready_step())
        return torch.cuda.max_memory_allocated() - allocated

    def time(self, steps):
        """Seconds that each of some steps in a row took, after one to warm up."""
        step = self._ready_step()
        self._launch(step)
        if self.device.type != 'cuda':
            times = []
            for _ in range(steps):
                started = time.perf_counter()
                step(*self.batch)
                times.append(time.perf_counter() - started)
            return times
        events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
        events[0].record()
        for event in events[1:]:
            step(*self.batch)
            event.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in zip(events, events[1:])]


@torch.inference_mode()
def infer(model, autocast, images, labels):
    with autocast:
        model(images)


def bytes_held(model, images):
    """The memory that a training forward holds for backward, weights and logits left out.

    Counted by allocation (what operations have made and is still there when the model is done),
    since the inputs that checkpointing holds on to are not among autograd's saved tensors.
    """
    with memory.Allocations() as allocations:
        logits = model(images)
    return allocations.held(but=(images, logits, *model.state_dict().values()))


def describe_failure(error):
    """What a row that failed says instead of numbers; running out of memory is no surprise."""
    text = str(error)
    if memory.ran_out(error):
        return 'out of memory'
    if isinstance(error, ImportError):
        return f'needs a package: {text}'
    return f'failed: {type(error).__name__}: {text.splitlines()[0] if text else ""}'


def measure(rows, workload, device, inference, rounds, steps, results):
    """Fills in `results`, a Result for each row; one that fails says why, and the others go on."""
    runners = {}
    for row in rows:
        print(f'starting {row.name}, {row.precision}', file=sys.stderr)
        try:
            runners[row] = Runner(row, workload, device, inference)
            results[row] = Result(row, [], runners[row].memory, runners[row].first_step)
        except Exception as error:
            results[row] = Result(row, [], failure=describe_failure(error))
    for i in range(rounds):
        print(f'round {i + 1} of {rounds}', file=sys.stderr)
        for row, runner in list(runners.items()):
            try:
                results[row].times.extend(runner.time(steps))
            except Exception as error:
                results[row] = Result(row, [], failure=describe_failure(error))
                del runners[row]


def memory_vs_depth(args, device, precision):
    """{mode: bytes at each of DEPTHS}, NaN where memory ran out."""
    curves = {mode: [] for mode in MODES}
    for depth in DEPTHS:
        workload = describe_network(argparse.Namespace(**{**vars(args), 'depth': depth}))
        for mode, curve in curves.items():
            print(f'depth {depth}, {mode}', file=sys.stderr)
            try:
                curve.append(Runner(Row('ours', mode, precision), workload, device, False).memory)
            except Exception as error:
                if describe_failure(error) != 'out of memory':
                    raise
                curve.append(math.nan)
    return curves


def loader_speed(root, image_size, batch_size, device, workers, rounds):
    """Images per second of each pass through the training images in `root`, after one to start."""
    dataset = data.describe('imagenet', root, image_size)
    _, loader, _ = data.make_loaders(dataset, batch_size, device=device, workers=workers)
    speeds = []
    for epoch in range(rounds + 1):
        loader.set_epoch(epoch)
        started = time.perf_counter()
        for _ in loader:
            pass
        if device.type == 'cuda':
            torch.cuda.synchronize()
        speeds.append(loader.num_images / (time.perf_counter() - started))
    return speeds[1:]


# ---- showing ------------------------------------------------------------------------------

COLUMNS = ('row', 'precision', 'ms', 'quartiles', 'images/s', 'speed', 'memory', 'ratio',
           'first step')


def table_rows(results, workload, baseline):
    """Numbers of each result: ms, its quartiles, images/s, speed, bytes, memory ratio, seconds."""
    base = next((result for result in results if result.row == baseline), Result(baseline, []))
    for result in results:
        low, median, high = result.quartiles
        yield result, (median, low, high, 1e3 * workload.batch_size / median,
                       base.quartiles[1] / median, result.memory, result.memory / base.memory,
                       result.first_step)


def print_table(results, workload, baseline):
    def cell(pattern, value):
        return '-' if math.isnan(value) else pattern.format(value)

    lines = [COLUMNS]
    for result, numbers in table_rows(results, workload, baseline):
        median, low, high, rate, speed, memory, memory_ratio, first = numbers
        cells = [cell('{:,.2f}', median), f'{low:,.2f}-{high:,.2f}', cell('{:,.0f}', rate),
                 cell('{:.2f}x', speed), cell('{:,.0f} MiB', memory / 2**20),
                 cell('{:.3f}', memory_ratio), cell('{:.1f} s', first)]
        lines.append((result.row.name, result.row.precision,
                      *([result.failure] if result.failure else cells)))
    widths = [max(len(line[i]) for line in lines if i < 2 or len(line) == len(COLUMNS))
              for i in range(len(COLUMNS))]
    for line in lines:
        texts = [text.ljust(width) if i < 2 or len(line) == 3 else text.rjust(width)
                 for i, (text, width) in enumerate(zip(line, widths))]
        print('  '.join(texts).rstrip())
    print(f'speed and memory are relative to {baseline.name}, {baseline.precision}')


def print_loader_speed(args, device):
    for workers in args.workers:
        speeds = loader_speed(args.loader, args.image_size, args.batch_size, device, workers,
                              args.rounds or 10)
        median = statistics.median(speeds)
        print(f'--workers {workers}: {median:.0f} images/s ({min(speeds):.0f}-{max(speeds):.0f}), '
              f'{median / max(1, workers):.0f} for each of them', flush=True)


def write_csv(path, results, workload, baseline, title):
    with open(path, 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['row', 'precision', 'ms', 'ms_quartile1', 'ms_quartile3',
                         'images_per_second', 'speed_ratio', 'memory_bytes', 'memory_ratio',
                         'first_step_seconds', 'failure', 'steps', 'workload'])
        for result, numbers in table_rows(results, workload, baseline):
            writer.writerow([result.row.name, result.row.precision,
                             *('' if math.isnan(number) else f'{number:.6g}' for number in numbers),
                             result.failure, len(result.times), title])


def draw_results(path, results, title, memory_label):
    """Horizontal bars of time and memory, a row each."""
    results = [result for result in results if not result.failure][::-1]
    names = [f'{result.row.name}, {result.row.precision}' for result in results]
    colors = [plot.COLORS[1 if result.row.source == 'ours' else 0] for result in results]
    with rc_context({**plot.STYLE, 'axes.grid.axis': 'x'}):
        figure = Figure(figsize=(10, 1.2 + 0.3 * len(results)), layout='constrained')
        left, right = figure.subplots(1, 2, sharey=True)
        medians = [result.quartiles[1] for result in results]
        spread = [[middle - low, high - middle] for low, middle, high
                  in (result.quartiles for result in results)]
        left.barh(names, medians, color=colors, xerr=list(zip(*spread)), ecolor=plot.GREY)
        left.set_xlabel('ms per step (median and quartiles)')
        right.barh(names, [result.memory / 2**20 for result in results], color=colors)
        right.set(xlabel=memory_label, xlim=(0, None))
        figure.suptitle(title, fontsize=9, color=plot.GREY)
    plot.save_figure(figure, path)


def draw_memory_vs_depth(path, curves, title, memory_label):
    with rc_context(plot.STYLE):
        figure = Figure(figsize=(6, 4), layout='constrained')
        axes = figure.subplots()
        for color, (mode, curve) in zip(plot.COLORS, curves.items()):
            axes.plot(DEPTHS, [size / 2**20 for size in curve], color=color, marker='o', label=mode)
        axes.set(xlabel='depth', ylabel=memory_label, xlim=(0, None), ylim=(0, None))
        axes.legend(loc='upper left')
        figure.suptitle(title, fontsize=9, color=plot.GREY)
    plot.save_figure(figure, path)


# ---- command line -------------------------------------------------------------------------

def make_parser():
    parser = flags.Parser(prog='bench.py', description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group('network')
    group.add_argument('--arch', choices=flags.ARCHITECTURES, metavar='NAME',
                       help='an ImageNet network instead of DenseNet-BC for CIFAR')
    group.add_argument('--depth', type=flags.POSITIVE, help='(default: 100)')
    group.add_argument('--growth-rate', type=flags.POSITIVE, help='(default: 12)')
    group.add_argument('--image-size', type=flags.POSITIVE, metavar='PIXELS',
                       help='(default: 32, with --arch 224)')
    group.add_argument('--batch-size', '-b', type=flags.POSITIVE, default=64,
                       help='(default: %(default)s)')
    group = parser.add_argument_group('rows')
    group.add_argument('--precision', nargs='+', choices=('fp32', 'tf32', 'bf16', 'fp16'),
                       help='(default: tf32 bf16 on cuda, else fp32)')
    group.add_argument('--compile', action='store_true',
                       help='also torch.compile: minutes for each network')
    group.add_argument('--inference', action='store_true', help='not training: evaluation')
    group.add_argument('--rows', nargs='+', metavar='PATTERN',
                       help='only rows of such names, such as \'ours*\' \'torchvision plain\'')
    group.add_argument('--baseline', metavar='NAME',
                       help='the row that ratios refer to (default: the first)')
    group = parser.add_argument_group('measuring')
    group.add_argument('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    group.add_argument('--rounds', type=flags.POSITIVE, help='(default: 10)')
    group.add_argument('--steps', type=flags.POSITIVE,
                       help='steps of each row in a round (default: 20 on cuda, 1 on a CPU)')
    group.add_argument('--csv', type=Path, metavar='FILE')
    group.add_argument('--plot', type=Path, metavar='FILE', help='a figure of the table')
    group.add_argument('--memory-vs-depth', nargs='?', type=Path, metavar='FILE',
                       const=Path('images/memory-vs-depth.png'),
                       help='only draw memory against depth (default: %(const)s)')
    group = parser.add_argument_group('input pipeline')
    group.add_argument('--loader', type=Path, metavar='DIR',
                       help='only read, crop and jitter the images in DIR/train')
    group.add_argument('--workers', type=flags.number(int, '[0, inf)'), nargs='+', default=[1],
                       help='numbers of processes that read (default: 1)')
    return parser


def choose_rows(args, device):
    """The rows to measure, and the one that the others are compared with."""
    rows = make_rows(args, device)

    def named(patterns, flag, rows):
        found = [row for row in rows if any(fnmatch.fnmatchcase(row.name, p) for p in patterns)]
        if not found:
            names = ', '.join(dict.fromkeys(f"'{row.name}'" for row in rows))
            raise flags.UsageError(f'{flag}: no row is called that; here there are {names}')
        return found

    if args.rows:
        rows = named(args.rows, '--rows', rows)
    return rows, named([args.baseline], '--baseline', rows)[0] if args.baseline else rows[0]


def check_flags(args):
    paths = [path for path in (args.csv, args.plot, args.memory_vs_depth) if path is not None]
    for path in paths:
        if path.is_dir() or not os.access(path.parent, os.W_OK) or paths.count(path) > 1:
            raise flags.UsageError(f'{path}: no file of its own can be written there')
        if path is not args.csv and path.suffix not in ('.png', '.pdf', '.svg'):
            raise flags.UsageError(f'{path}: a figure is a .png, .pdf or .svg file')
    if args.arch and (args.depth or args.growth_rate):
        raise flags.UsageError('--arch has a depth and a growth rate of its own')
    for mode, others in USELESS.items():
        if getattr(args, mode):
            for flag in others:
                if getattr(args, flag) not in (None, False):
                    raise flags.UsageError(f'--{mode.replace("_", "-")} has no use for --'
                                           f'{flag.replace("_", "-")}')
    if args.memory_vs_depth and len(args.precision or ()) > 1:
        raise flags.UsageError('--memory-vs-depth draws one --precision')


def check_workload(workload, inference):
    """Raises what such a network says to such a batch; takes no time and no memory."""
    with torch.device('meta'):
        model = make_model(Row('ours', 'plain', 'fp32'), workload).train(not inference)
        model(torch.empty(workload.batch_size, 3, workload.image_size, workload.image_size))


def main(argv=None):
    parser = make_parser()
    try:
        args = parser.parse_args(argv)
        check_flags(args)
        device = train.choose_device(args.device)
        precisions = [train.choose_precision(name, device) for name in args.precision or ['auto']]
        if args.loader:
            print_loader_speed(args, device)
            return
        rows, baseline = choose_rows(args, device)
        workload = describe_network(args)
        check_workload(workload, args.inference)
    except (flags.UsageError, data.DataError, ValueError, RuntimeError, TypeError) as error:
        parser.exit(2, f'bench.py: error: {str(error).splitlines()[0]}\n')
    on_cuda = device.type == 'cuda'
    hardware = (torch.cuda.get_device_name() if on_cuda
                else f'CPU, {torch.get_num_threads()} threads')
    batches = f'batches of {args.batch_size} at {workload.image_size} pixels'
    memory_label = 'peak memory, MiB' if on_cuda else 'held for backward, MiB'
    if args.memory_vs_depth:
        title = (f'DenseNet-BC k={workload.growth_rate}, {batches}, {precisions[0]}; {hardware}, '
                 f'torch {torch.__version__}')
        draw_memory_vs_depth(args.memory_vs_depth, memory_vs_depth(args, device, precisions[0]),
                             title, memory_label)
        print(args.memory_vs_depth)
        return
    title = (f'{workload.name}, {"inference" if args.inference else "training"}, {batches}; '
             f'{hardware}, {versions()}')
    print(title)
    results = {}
    try:
        measure(rows, workload, device, args.inference, args.rounds or 10,
                args.steps or (20 if on_cuda else 1), results)
    finally:  # what was measured is shown, also after Ctrl-C
        measured = list(results.values())
        print_table(measured, workload, baseline)
        if args.csv:
            write_csv(args.csv, measured, workload, baseline, title)
        if args.plot:
            draw_results(args.plot, measured, title, memory_label)
    if any(result.failure.startswith('failed') for result in measured):
        sys.exit(1)


def versions():
    names = [f'torch {torch.__version__}', f'torchvision {torchvision.__version__}']
    try:
        names.append(f'timm {importlib.metadata.version("timm")}')
    except importlib.metadata.PackageNotFoundError:
        pass  # its rows say so
    return ', '.join(names)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
