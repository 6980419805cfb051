"""Compiles the Triton kernels as training would, without a GPU, and prints what the compiler says.

A line of JSON for each: kernel, compute capability, sizes, registers, spilled bytes, bytes of
shared memory, and how many of some machine instructions it has.
"""

import collections
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import densenet_triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / 'backends' / 'nvidia' / 'bin' / 'cuobjdump'
HALVES = ('x_ptr', 'x_grad_ptr', 'y_ptr', 'y_grad_ptr', 'h_ptr', 'out_ptr', 'kernel_ptr')


def compile_kernel(kernel, capability, **tile):
    options = {name: tile.pop(name) for name in ('num_warps', 'num_stages', 'enable_fp_fusion')}
    signature = {name: '*bf16' if name in HALVES else '*fp32' if name.endswith('_ptr')
                 else 'constexpr' if name in tile else 'fp32' if name == 'eps' else 'i32'
                 for name in kernel.arg_names}
    place = kernel.arg_names.index
    source = ASTSource(fn=kernel, signature=signature,
                       constexprs={(place(name),): value for name, value in tile.items()},
                       attrs={(place(name),): [['tt.divisibility', 16]] for name in signature
                              if name.endswith('_ptr')})
    compiled = triton.compile(source, target=GPUTarget('cuda', capability, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix='.cubin') as file:
        file.write(compiled.asm['cubin'])
        file.flush()
        usage, code = (subprocess.run([CUOBJDUMP, flag, file.name], capture_output=True, text=True,
                                      check=True).stdout for flag in ('-res-usage', '-sass'))
    registers, stack = map(int, re.search(r'REG:(\d+) STACK:(\d+)', usage).groups())
    instructions = collections.Counter(re.findall(r'\b(?:LDG|LDGSTS|STG|HMMA|HGMMA)[\w.]*', code))
    return dict(kernel=kernel.__name__, capability=capability, **tile, registers=registers,
                spilled=stack, shared=compiled.metadata.shared, instructions=instructions)


def tiles():
    """(kernel, sizes), each once, of four networks' training on a GPU of 132 processors."""
    found = []
    # Growth rate, UNIT of some block, and the numbers of rows in its feature maps.
    for growth_rate, unit, rows in ((12, 4, 65536), (12, 2, 4096),      # BC-100-12, batch 64
                                    (40, 8, 65536),                     # BC-190-40, batch 64
                                    (32, 8, 802816), (32, 8, 12544)):   # DenseNet-121, batch 256
        for side, out in ((1, 4 * growth_rate), (3, growth_rate)):
            found += [(kernels._conv_kernel, dict(kernels.conv_tile(rows, out, 132), SIDE=side,
                                                  UNIT=unit)),
                      (kernels._conv_backward_kernel, dict(kernels.conv_backward_tile(side, out),
                                                           SIDE=side, UNIT=unit,
                                                           ACCUMULATE=side == 1))]
    unit, accumulate = dict(UNIT=4), dict(ACCUMULATE=True)
    found += [(kernels._copy_kernel, kernels.TILES['copy'] | unit),
              (kernels._merge_kernel, kernels.TILES['merge']),
              (kernels._finish_kernel, kernels.TILES['finish'] | accumulate),
              (kernels._gradient_kernel, kernels.TILES['elementwise'] | unit),
              (kernels._norm_relu_kernel, kernels.TILES['elementwise'] | unit),
              (kernels._norm_relu_backward_kernel,
               kernels.TILES['elementwise'] | unit | accumulate)]
    return [item for i, item in enumerate(found) if item not in found[:i]]


if __name__ == '__main__':
    for kernel, tile in tiles():
        for capability in map(int, sys.argv[1:]):
            print(json.dumps(compile_kernel(kernel, capability, **tile)), flush=True)
