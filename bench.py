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
import csv
import fnmatch
import functools
import gc
import importlib.util
import math
import os
import sys
import tempfile
import time
import timeit
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


# ---- the networks -------------------------------------------------------------------------

def network_flags(inference=False, **given):
    """The flags of train.py that make the network, the images and the step, and `inference`.

    Of `given`, those in NETWORK_FLAGS count; None stands for the default.
    """
    argv = [f'--{name.replace("_", "-")}={given[name]}' for name in NETWORK_FLAGS
            if given.get(name) is not None]
    if inference:
        argv.append('--momentum=0')  # which would take memory
    # A low rate: weights that run away would meet other numbers, and other speeds.
    args, _ = flags.parse_args([*argv, '--lr=1e-3'])
    args.inference = inference
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
    width = model.config['num_init_features']
    settings = {name: model.config[name] for name in (
        'growth_rate', 'block_config', 'num_classes', 'memory_efficient')}
    if row.source == 'torchvision':
        model = torchvision.models.DenseNet(num_init_features=width, **settings)
    else:
        from timm.models.densenet import DenseNet  # whose stem always has twice the growth rate
        model = DenseNet(**settings)
    if args.image_size <= data.SMALL:  # the ImageNet stem makes way for the paper's for CIFAR
        model.features.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        for name in ('norm0', 'relu0', 'pool0'):
            setattr(model.features, name, nn.Identity())
    return model


def make_rows(options, precision, on_cuda):
    """All rows of a precision that the flags and the device admit."""
    has_kernels = not on_cuda and densenet_cpu.unavailable_reason() is None
    theirs = Row('torchvision', 'plain', precision)
    ours = [Row('ours', mode, precision) for mode in (MODES if has_kernels else EAGER_MODES)
            if not options.inference or mode in ('plain', 'block, CPU kernels')]
    rows = []
    if precision in ('fp32', 'tf32'):  # as torchvision's comes, before anybody tunes it
        rows.append(theirs._replace(channels_last=False))
    rows.append(theirs)
    if importlib.util.find_spec('timm'):
        rows.append(theirs._replace(source='timm'))
    if not options.inference:
        rows.append(theirs._replace(mode='checkpointed'))
    compiled = [row._replace(compiled=True) for row in (theirs, ours[0]) if options.compile]
    rows += ours + compiled
    if on_cuda:
        rows += [row._replace(graph=True) for row in ours + compiled if row.mode != 'checkpointed']
    elif (options.inference and precision == 'fp32'
            and all(map(importlib.util.find_spec, ('onnxruntime', 'onnxscript')))):
        rows.append(Row('onnxruntime', 'plain', precision))
    return rows


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
    """A row's model and its step, and what has been measured of it so far.

    `times` has the seconds a step of each round, `memory` the bytes of a step; `failure` says in a
    line why there are no more of them.
    """

    def __init__(self, row, args, device):
        self.row, self.args, self.device = row, args, device
        self.on_cuda = device.type == 'cuda'
        self.times, self.memory, self.failure = [], math.nan, ''

    def take_turn(self, steps):
        """Measure once more, if it goes well; the first turn starts with `start`."""
        if self.failure:
            return
        try:
            if not self.times:
                self.start()
            self.times.append(self.time(steps))
        except Exception as error:
            failure = f'failed: {type(error).__name__}: {error}'.partition('\n')[0]
            self.failure = 'out of memory' if machine.ran_out_of_memory(error) else failure
            self.model = self.state = self.step = self.batch = None  # their memory is for others

    def start(self):
        """Make the model, run the first steps and measure the memory.

        Raises:
            RuntimeError: a block fell back, and would be measured under another's name.
        """
        row, args, device = self.row, self.args, self.device
        print(f'starting {row.name}, {row.precision}', file=sys.stderr)
        allocated = self._free_memory()
        self.batch = (torch.randn(args.batch_size, 3, *2 * [args.image_size]).to(device),
                      torch.randint(10, [args.batch_size]).to(device))
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        self.model = make_model(row, args).train(not args.inference)
        self.model.to(device, memory_format=layout)
        if row.compiled:
            self.model.compile()
        autocast = machine.make_autocast(row.precision, device)
        self.state = train.make_state(args, self.model, device, row.precision)
        if row.source == 'onnxruntime':
            self.step = make_onnxruntime_step(self.model, self.batch[0])
        elif args.inference:
            self.step = torch.inference_mode()(
                lambda images, labels: train.classify(self.model, images, autocast))
        else:
            self.step = functools.partial(train.train_step, self.state, autocast=autocast)
        self.time(1)  # in which libraries try out many convolutions
        if row.source == 'ours' and not row.compiled:
            for block in self.model.modules():
                if isinstance(block, densenet.DenseBlock) and block.path != MODES[row.mode][0]:
                    raise RuntimeError(f'a block went the {block.path} way: '
                                       f'{block.fallback_reason}')
        if self.on_cuda:
            self._free_memory()
            torch.cuda.reset_peak_memory_stats()
            self.time(1)
            self.memory = torch.cuda.max_memory_allocated() - allocated
        elif not args.inference:
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

    def time(self, steps):
        """Seconds a step, the mean of some in a row, after one to warm up."""
        machine.choose_precision(self.row.precision, self.device)
        step = self.step
        if self.row.graph:  # recorded anew each time, since it would hold its memory
            step = train.CudaGraphStep(step, self.state, [self.batch[0].shape])
        for launches in (1, steps):
            started = time.perf_counter()
            for _ in range(launches):
                step(*self.batch)
            if self.on_cuda:
                torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps


def make_onnxruntime_step(model, images):
    """Inference by ONNX Runtime on the exported network, in as many threads as torch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'densenet.onnx')
        torch.onnx.export(model, (images,), path, input_names=['images'], verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images, labels: session.run(None, {'images': images.numpy()})


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


def convolution_flops(args):
    """FLOPs of all convolutions in a step, two for a multiply-add; transitions pool first."""
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model(Row('ours', 'plain', 'fp32'), args).eval()
        model(torch.empty(args.batch_size, 3, args.image_size, args.image_size))
    forward = counter.get_flop_counts()['Global'][torch.ops.aten.convolution]
    return forward if args.inference else 3 * forward  # backward: gradients of input and of weight


def matrix_product_rate(precision):
    """FLOP/s of a large matrix product on the CPU, the median of three after one to warm up."""
    dtype = machine.AUTOCAST_TYPES.get(precision, torch.float32)
    a, b = (torch.randn(shape).to(dtype) for shape in MATRICES)
    product = a @ b
    times = timeit.repeat(lambda: torch.mm(a, b, out=product), number=1, repeat=3)
    return 2 * a.numel() * b.shape[1] / np.median(times)


# ---- showing ------------------------------------------------------------------------------

def tabulate(runners, limits, workload):
    """The rows of the CSV file, in dicts; NaN where something was not measured.

    `speed_ratio` and `memory_ratio` refer to the first; `limits` is {precision: the least
    milliseconds that a step could take}.
    """
    table = []
    for runner in runners:
        low, median, high = 1e3 * np.quantile(runner.times or [math.nan], [0.25, 0.5, 0.75])
        memory = runner.memory / 2**20
        first = table[0] if table else dict(ms=median, memory_mib=memory)
        table.append(dict(
            row=runner.row.name, precision=runner.row.precision, ms=median, ms_quartile1=low,
            ms_quartile3=high, images_per_second=1e3 * runner.args.batch_size / median,
            limit_ratio=median / limits.get(runner.row.precision, math.nan), memory_mib=memory,
            rounds=len(runner.times), failure=runner.failure, workload=workload,
            speed_ratio=first['ms'] / median, memory_ratio=memory / first['memory_mib']))
    return table


def print_table(table):
    width = max(len(numbers['row']) for numbers in table)
    print(f'{"row":<{width}} precision         ms        25%        75%   images/s   speed  x limit'
          f'      MiB  ratio')
    for numbers in table:
        line = ('{row:<{width}} {precision:<9} {ms:10,.2f} {ms_quartile1:10,.2f} '
                '{ms_quartile3:10,.2f} {images_per_second:10,.0f} {speed_ratio:7.2f} '
                '{limit_ratio:8.2f} {memory_mib:8,.0f} {memory_ratio:6.3f}')
        print(line.format(**numbers, width=width).replace('nan', '  -'), numbers['failure'])


def draw_table(path, table, memory_label):
    """Horizontal bars of time and memory, a row each."""
    names = ['{row}, {precision}'.format(**numbers) for numbers in table]
    colors = [plot.COLORS[name.startswith('ours')] for name in names]
    ms, low, high, memory = (np.array([numbers[key] for numbers in table]) for key in (
        'ms', 'ms_quartile1', 'ms_quartile3', 'memory_mib'))
    with rc_context({**plot.STYLE, 'axes.grid.axis': 'x'}):
        figure = Figure(figsize=(10, 1.2 + 0.3 * len(table)), layout='constrained')
        figure.suptitle(table[0]['workload'], fontsize=8, color=plot.GREY)
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(names, ms, color=colors, xerr=[ms - low, high - ms], ecolor=plot.GREY)
        left.set_xlabel('ms per step (median and quartiles)')
        right.barh(names, memory, color=colors)
        right.set(xlabel=memory_label, xlim=(0, None))
        right.invert_yaxis()  # of both: the first row is above
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
    add('--precision', nargs='+', choices=machine.PRECISIONS,
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
    add('--csv', type=output_file('.csv'), metavar='FILE', help='the table')
    add('--plot', type=output_file('.png', '.pdf', '.svg'), metavar='FILE', help='its figure')
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


def describe(rows, args, device):
    """The workload, the machine and the versions, in one line."""
    hardware = (torch.cuda.get_device_name() if device.type == 'cuda'
                else f'CPU, {torch.get_num_threads()} threads')
    packages = dict.fromkeys(['torch', *(row.source for row in rows if row.source != 'ours')])
    versions = [f'{name} {importlib.import_module(name).__version__}' for name in packages]
    return (f'{train.model_name(args)}, {"inference" if args.inference else "training"}, batches '
            f'of {args.batch_size} at {args.image_size} pixels; {hardware}, {", ".join(versions)}')


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
    flops = convolution_flops(args)  # a UserError if there is no such network
    workload = describe(rows, args, device)
    print(workload)
    runners = [Runner(row, args, device) for row in rows]
    rates = {} if on_cuda else {row.precision: [] for row in rows}  # FLOP/s in each round
    try:
        for i in range(options.rounds):
            print(f'round {i + 1} of {options.rounds}', file=sys.stderr)
            for precision, found in rates.items():
                found.append(matrix_product_rate(precision))
            for runner in runners:
                runner.take_turn(options.steps)
    finally:  # what was measured is shown, also after Ctrl-C
        limits = {precision: 1e3 * flops / np.median(found)
                  for precision, found in rates.items() if found}
        table = tabulate(runners, limits, workload)
        print_table(table)
        for precision, limit in limits.items():
            print(f'limit, {precision}: {limit:,.2f} ms, {flops / 1e9:,.1f} GFLOP of convolutions '
                  f'at the {flops / limit / 1e6:,.0f} GFLOP/s of a large matrix product')
        if options.csv:
            with open(options.csv, 'w', newline='') as file:
                writer = csv.DictWriter(file, table[0])
                writer.writeheader()
                writer.writerows(table)
        if options.plot:
            draw_table(options.plot, table,
                       'peak memory, MiB' if on_cuda else 'held for backward, MiB')
    if any(runner.failure.startswith('failed') for runner in runners):
        sys.exit(1)


def main(argv=None):
    try:
        run(make_parser().parse_args(argv))
    except (UserError, OSError) as error:
        runlog.warn(error, 'error', 'bench.py')
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == '__main__':
    main()
