"""Compiles the Triton kernels that training launches, without a GPU.

    PYTHONPATH=. python tests/compile_kernels.py 90                  # compute capability 9.0
    PYTHONPATH=. python tests/compile_kernels.py 80 BC-100-12        # for this network alone

Steps of some networks are taken on torch's meta device, where nothing is computed, and what they
would launch is compiled. A line of JSON for each: kernel, sizes, registers, spilled bytes, bytes of
shared memory, how many of some machine instructions it has, and how often a step launches it.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import bench
import densenet_triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
NETWORKS = {'BC-100-12': (['--batch-size', '64'], '3x3'),
            'BC-190-40': (['--depth', '190', '--growth-rate', '40', '--batch-size', '64'], '3x3'),
            'DenseNet-121': (['--arch', 'densenet121', '--batch-size', '256'], '3x3'),
            'BC-22-64': (['--depth', '22', '--growth-rate', '64', '--batch-size', '64'], '3x3'),
            'BC-100-12, library': (['--batch-size', '64'], 'elementwise')}


def launches(argv, level):
    """(kernel, arguments by name) of each launch in the dense blocks of a training step."""
    workload = bench.describe_network(bench.make_parser().parse_args(argv))
    growth_rate, found = workload.growth_rate, []
    triton.JITFunction.run = lambda kernel, *args, grid, warmup, **settings: found.append(
        (kernel, dict(zip(kernel.arg_names, args)) | settings))
    with torch.device('meta'):
        for shape, num_layers in zip(bench.block_inputs(workload), workload.block_config):
            x = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
            weights = []
            for c in range(shape[1], shape[1] + num_layers * growth_rate, growth_rate):
                weights.append((torch.empty(c), torch.empty(c),
                                torch.empty(4 * growth_rate, c, 1, 1),
                                torch.empty(4 * growth_rate), torch.empty(4 * growth_rate),
                                torch.empty(growth_rate, 4 * growth_rate, 3, 3)))
            features, bottlenecks = kernels.forward(x, weights, 1e-5, True, level)
            kernels.backward(features.data, features, bottlenecks, weights, shape[1], 1e-5, level)
    return found


def specialise(kernel, arguments):
    """What Triton compiles for these arguments: signature, constants, attributes and options."""
    signature, constants, attributes, options = {}, {}, {}, {}
    types = {torch.bfloat16: '*bf16', torch.float32: '*fp32'}
    for name, value in arguments.items():
        place = kernel.arg_names.index(name) if name in kernel.arg_names else None
        if place is None:
            options[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = types[value.dtype]
            if value.storage_offset() * value.itemsize % 16 == 0:
                attributes[place,] = [['tt.divisibility', 16]]
        elif value is None or kernel.params[place].is_constexpr:
            signature[name], constants[place,] = 'constexpr', value
        else:
            signature[name] = 'fp32' if isinstance(value, float) else 'i32'
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return source, options


def inspect_code(cubin):
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(cubin)
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ('-res-usage', '-sass'))
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    found = re.findall(r'\b(?:LDG|LDGSTS|STG|HMMA|HGMMA)[\w.]*', code)
    return dict(registers=registers, spilled=stack, instructions=collections.Counter(found))


def main(capability, *networks):
    kernels.num_processors = lambda device: 132
    for network in networks or NETWORKS:
        counts = {}
        for kernel, arguments in launches(*NETWORKS[network]):
            source, options = specialise(kernel, arguments)
            key = source.hash() + str(options)
            counts[key] = source, options, counts.get(key, (0,))[-1] + 1
        for source, options, count in counts.values():
            compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32),
                                      options=options)
            sizes = {source.fn.arg_names[place]: value
                     for (place,), value in source.constants.items()}
            print(json.dumps(dict(network=network, kernel=source.fn.__name__, **sizes,
                                  shared=compiled.metadata.shared, launches=count,
                                  **inspect_code(compiled.asm['cubin']))), flush=True)


if __name__ == '__main__':
    main(int(sys.argv[1]), *sys.argv[2:])
