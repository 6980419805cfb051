"""Time and memory of a training step: our DenseNet beside torchvision's and timm's, in one run.

    python bench.py                                       # DenseNet-BC-100-12, batches of 64
    python bench.py --arch densenet121 --batch-size 256   # images of 224 pixels
    python bench.py --rows 'torchvision plain' '*fused*' --csv bench.csv --plot bench.png
    python bench.py --inference --precision fp32 bf16     # on a CPU also with ONNX Runtime

The step is that of train.py, on random images. The rows take turns: in each round, each row has a
warm-up and a few steps, so a slow phase of the machine hits all of them. A time is the median over
the rounds, with the quartiles beside it. Rows of timm and ONNX Runtime need these packages. Speed,
memory and peak are also given as ratios to the first row. The other columns:

memory: on a CPU, what the forward pass holds for backward. On a GPU, the peak of a step, with
    weights and momentum (for a CUDA graph: while recording it).
peak: on a CPU, the peak of a whole step (forward, loss and backward), without the images, the
    weights and their gradients. Scratch buffers inside an operation are not counted, neither
    PyTorch's nor those of the CPU kernels.
x limit: on a CPU, the time divided by the time that all convolutions of the step would take at the
    rate of a large matrix product, which is measured in each round.
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
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from matplotlib import rc_context
from matplotlib.figure import Figure
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import data
import flags
import machine
import networks
import plot
import runlog
import train
from errors import UserError
from fused_dense_block import cpu, fuse

NETWORK_FLAGS = 'arch', 'depth', 'growth_rate', 'image_size', 'batch_size'  # also train.py's


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


class Row(NamedTuple):
    source: str           # ours, torchvision, timm or onnxruntime
    mode: str             # a key of MODES
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
    """The flags of train.py for network, images and step, and `inference`.

    `given` may contain more than NETWORK_FLAGS, which is ignored; None stands for the default.
    """
    argv = [f'--{name.replace("_", "-")}={given[name]}' for name in NETWORK_FLAGS
            if given.get(name) is not None]
    if inference:
        argv.append('--momentum=0')  # its buffers would take memory
    # A low learning rate: diverging weights would change the speed.
    args, _ = flags.parse_args([*argv, '--lr=1e-3'])
    args.inference = inference
    return flags.with_network(args, args.image_size or (224 if args.arch else 32))


def make_model(row, args, device_type='cpu'):
    """The network of a row, on the CPU; the same size for all rows.

    Raises:
        UserError: there is no such network.
        ValueError: it cannot be fused.
    """
    mode = MODES[row.mode]
    path = getattr(mode, device_type)
    num_classes = 10 if args.image_size <= data.SMALL else 1000
    args = argparse.Namespace(**vars(args))
    # `fuse` refuses others' checkpointed layers: they update the running statistics twice.
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
        if args.image_size <= data.SMALL:  # the paper's stem for CIFAR instead of ImageNet's
            model.features.conv0 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            for name in ('norm0', 'relu0', 'pool0'):
                setattr(model.features, name, nn.Identity())
    if path != 'layers':
        fuse(model, memory_efficient=mode.memory_efficient, kernels=path == 'kernels')
    return model


def make_rows(options, precision, on_cuda):
    """All rows of a precision that the flags and the device allow."""
    dtype = machine.AUTOCAST_TYPES.get(precision, torch.float32)
    paths = ['layers', 'eager']
    if not on_cuda and dtype in cpu.TYPES and cpu.unavailable_reason(dtype) is None:
        paths.append('kernels')
    modes = [name for name, mode in MODES.items() if (mode.cuda if on_cuda else mode.cpu) in paths]
    if options.inference:
        modes = [name for name in modes if name in ('plain', 'fused')]
    ours = [Row('ours', mode, precision) for mode in modes]
    theirs = Row('torchvision', 'plain', precision)
    plain = [theirs]
    if importlib.util.find_spec('timm'):
        plain.append(theirs._replace(source='timm'))
    rows = []
    if precision in ('fp32', 'tf32'):  # torchvision's defaults
        rows.append(theirs._replace(channels_last=False))
    rows += plain
    if not options.inference:
        rows.append(theirs._replace(mode='checkpointed'))
    fused = 'fused, memory-efficient' if on_cuda else 'fused'
    if fused in modes:
        rows += [row._replace(mode=fused) for row in plain]
    compiled = [row._replace(compiled=True) for row in (theirs, ours[0]) if options.compile]
    rows += ours + compiled
    if on_cuda:
        rows += [row._replace(graph=True) for row in ours + compiled if row.mode != 'checkpointed']
    elif (options.inference and precision == 'fp32'
            and all(map(importlib.util.find_spec, ('onnxruntime', 'onnxscript')))):
        rows.append(Row('onnxruntime', 'plain', precision))
    return rows


def select_rows(options, on_cuda):
    """The rows for --precision and --rows, in the order of these flags."""
    table = [make_rows(options, precision, on_cuda) for precision in options.precision]
    found = [row for rows in table for pattern in options.rows for row in rows
             if fnmatch.fnmatchcase(row.name, pattern)]
    if not found:
        names = ', '.join(dict.fromkeys(f"'{row.name}'" for rows in table for row in rows))
        raise UserError(f'--rows: no row is called that; here there are {names}')
    return list(dict.fromkeys(found))


# ---- measuring ----------------------------------------------------------------------------

class Runner:
    """A row's model, its step, and what has been measured so far.

    `times` are seconds per step, one for each round; `memory` and `peak` are bytes, as in the
    columns; `failure` is a line that says why the row ended early.
    """

    def __init__(self, row, args, device):
        self.row, self.args, self.device = row, args, device
        self.on_cuda = device.type == 'cuda'
        self.times, self.memory, self.peak, self.failure = [], math.nan, math.nan, ''

    def take_turn(self, steps):
        """Measure once more, unless the row has failed; the first turn begins with `start`."""
        if self.failure:
            return
        try:
            if not self.times:
                self.start()
            self.times.append(self.time(steps))
        except Exception as error:
            failure = f'failed: {type(error).__name__}: {error}'.partition('\n')[0]
            self.failure = 'out of memory' if machine.ran_out_of_memory(error) else failure
            self.model = self.state = self.step = self.batch = None  # frees their memory

    def start(self):
        """Make the model, run the first steps and measure the memory.

        Raises:
            ValueError: `fuse` refused the model.
            RuntimeError: a dense block took another path than the row's name says.
        """
        row, args, device = self.row, self.args, self.device
        print(f'starting {row.name}, {row.precision}', file=sys.stderr)
        allocated = self._free_memory()
        self.batch = (torch.randn(args.batch_size, 3, *2 * [args.image_size]).to(device),
                      torch.randint(10, [args.batch_size]).to(device))
        layout = torch.channels_last if row.channels_last else torch.contiguous_format
        self.model = make_model(row, args, device.type).train(not args.inference)
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
        self.time(1)  # cuDNN tries out many convolutions
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
        """Free what can be freed. Returns the bytes that stay allocated on the GPU."""
        gc.collect()
        if not self.on_cuda:
            return 0
        torch._C._cuda_clearCublasWorkspaces()  # one for each row and each recording
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def time(self, steps):
        """Seconds per step, the mean over `steps` steps after one to warm up."""
        machine.choose_precision(self.row.precision, self.device)
        step = self.step
        if self.row.graph:  # recorded each time: a graph that is kept would keep its memory
            step = train.CudaGraphStep(step, self.state, [self.batch[0].shape])
        for launches in (1, steps):
            started = time.perf_counter()
            for _ in range(launches):
                step(*self.batch)
            if self.on_cuda:
                torch.cuda.synchronize()
        return (time.perf_counter() - started) / steps


def make_onnxruntime_step(model, images):
    """Inference by ONNX Runtime on the exported network, with as many threads as torch has."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, 'densenet.onnx')
        torch.onnx.export(model, (images,), path, input_names=['images'], verbose=False)
        session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    return lambda images, labels: session.run(None, {'images': images.numpy()})


class LiveBytes(TorchDispatchMode):
    """Follows the storages that operations allocate: bytes `now` alive, and the `peak`.

    Without those of the given tensors, and without scratch buffers inside an operation.
    """

    def __init__(self, *tensors):
        super().__init__()
        self.sizes = {tensor.untyped_storage()._cdata: 0 for tensor in tensors}  # by address
        self.now = self.peak = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        for tensor in filter(torch.is_tensor, tree_leaves(outputs)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self.sizes:
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._remove, storage._cdata)
        return outputs

    def _remove(self, address):
        self.now -= self.sizes.pop(address)


def bytes_held(model, images):
    """Bytes that a training forward on a CPU holds for backward, without weights and logits."""
    with LiveBytes(*model.parameters(), *model.buffers(), images) as live:
        logits = model(images)
    return live.now - logits.untyped_storage().nbytes()


def peak_bytes(model, images, labels, autocast):
    """The peak of `LiveBytes` in forward, loss and backward of a training step on a CPU."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with LiveBytes(*model.parameters(), *model.buffers(), images, labels,
                   *(parameter.grad for parameter in model.parameters())) as live:
        with autocast:
            logits = model(images)
        F.cross_entropy(logits.float(), labels).backward()
    return live.peak


def convolution_flops(args):
    """FLOPs of all convolutions in a step, two for a multiply-add.

    Transitions pool before they convolve, which gives the same with a quarter of the work.
    """
    with torch.device('meta'), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = make_model(Row('ours', 'plain', 'fp32'), args).eval()
        for module in model.modules():
            if hasattr(module, 'pool'):
                module._modules['conv'] = module._modules.pop('conv')  # now it is the last
        model(torch.empty(args.batch_size, 3, args.image_size, args.image_size))
    forward = counter.get_flop_counts()['Global'][torch.ops.aten.convolution]
    return forward if args.inference else 3 * forward  # backward: gradients of input and of weight


def matrix_product_rate(precision):
    """FLOP/s of a large matrix product on the CPU, the median of three after a warm-up."""
    dtype = machine.AUTOCAST_TYPES.get(precision, torch.float32)
    a, b = (torch.randn(shape).to(dtype) for shape in MATRICES)
    product = a @ b
    times = timeit.repeat(lambda: torch.mm(a, b, out=product), number=1, repeat=3)
    return 2 * a.numel() * b.shape[1] / np.median(times)


# ---- showing ------------------------------------------------------------------------------

def tabulate(runners, limits, workload):
    """The rows of the CSV file, in dicts; NaN if something was not measured.

    Ratios are to the first row; `limits` is {precision: the milliseconds of all convolutions at
    the rate of a matrix product}.
    """
    table = []
    for runner in runners:
        low, median, high = 1e3 * np.quantile(runner.times or [math.nan], [0.25, 0.5, 0.75])
        numbers = dict(
            row=runner.row.name, precision=runner.row.precision, ms=median, ms_quartile1=low,
            ms_quartile3=high, images_per_second=1e3 * runner.args.batch_size / median,
            limit_ratio=median / limits.get(runner.row.precision, math.nan),
            memory_mib=runner.memory / 2**20, peak_mib=runner.peak / 2**20,
            rounds=len(runner.times), failure=runner.failure, workload=workload)
        table.append(numbers)
        first = table[0]
        numbers.update(speed_ratio=first['ms'] / median,
                       memory_ratio=numbers['memory_mib'] / first['memory_mib'],
                       peak_ratio=numbers['peak_mib'] / first['peak_mib'])
    return table


def print_table(table):
    width = max(len(numbers['row']) for numbers in table)
    print(f'{"row":<{width}} precision         ms        25%        75%   images/s   speed  x limit'
          f'   memory  ratio     peak  ratio')
    for numbers in table:
        line = ('{row:<{width}} {precision:<9} {ms:10,.2f} {ms_quartile1:10,.2f} '
                '{ms_quartile3:10,.2f} {images_per_second:10,.0f} {speed_ratio:7.2f} '
                '{limit_ratio:8.2f} {memory_mib:8,.0f} {memory_ratio:6.3f} '
                '{peak_mib:8,.0f} {peak_ratio:6.3f}')
        print(line.format(**numbers, width=width).replace('nan', '  -'), numbers['failure'])


def draw_table(path, table, memory_label):
    """Horizontal bars of time and memory, one for each row."""
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
        right.invert_yaxis()  # also the left one's: the first row is at the top
    plot.save_figure(figure, path)


# ---- command line -------------------------------------------------------------------------

def make_parser():
    parser = flags.Parser(prog='bench.py', description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument_group('network, as for train.py').add_argument
    add('--arch', metavar='NAME', help='an ImageNet network')
    add('--depth', help='(default: 100)')
    add('--growth-rate', help='(default: 12, or as --arch has it)')
    add('--image-size', metavar='PIXELS', help='(default: 32, with --arch 224)')
    add('--batch-size', '-b', help='(default: 64)')
    add = parser.add_argument_group('rows').add_argument
    add('--precision', nargs='+', choices=machine.PRECISIONS,
        help='(default: tf32 bf16 on cuda, else fp32)')
    add('--compile', action='store_true', help='also torch.compile: minutes for each network')
    add('--inference', action='store_true', help='evaluation instead of training')
    add('--rows', nargs='+', metavar='PATTERN', default=['*'],
        help='only rows with these names, such as \'ours*\'; ratios are to the first')
    add = parser.add_argument_group('measuring').add_argument
    add('--device', choices=('auto', 'cpu', 'cuda'), default='auto')
    add('--rounds', type=flags.POSITIVE, default=10, help='(default: %(default)s)')
    add('--steps', type=flags.POSITIVE,
        help='of each row in a round, which counts their mean (default: 20 on cuda, 1 on a CPU)')
    add('--csv', type=output_file('.csv'), metavar='FILE', help='the table')
    add('--plot', type=output_file('.png', '.pdf', '.svg'), metavar='FILE', help='its figure')
    return parser


def output_file(*suffixes):
    """An argparse type: a path that can be written, checked before anything is measured."""
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
    return (f'{networks.name(args)}, {"inference" if args.inference else "training"}, batches '
            f'of {args.batch_size} at {args.image_size} pixels; {hardware}, {", ".join(versions)}')


def run(options):
    """Measure all rows and show them. Exits with 1 if one failed other than by lack of memory."""
    device = machine.choose_device(options.device)
    on_cuda = device.type == 'cuda'
    options.steps = options.steps or (20 if on_cuda else 1)
    options.precision = options.precision or (['tf32', 'bf16'] if on_cuda else ['fp32'])
    for precision in options.precision:
        machine.choose_precision(precision, device)  # an error if the device lacks it
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
    finally:  # show what was measured, also after Ctrl-C
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
