"""Read the weights in a model file of Lua Torch, `.t7`, as the official DenseNet code saves it.

    modules = lua_torch.load_modules('densenet-264.t7')

Follows torch7's File.lua, in the binary format of 64-bit little-endian machines. Functions in the
file are skipped, never run.
"""

import math
import mmap
import struct

import numpy as np
import torch

NIL, NUMBER, STRING, TABLE, OBJECT, BOOLEAN = range(6)
OLD_FUNCTION, *FUNCTIONS = 6, 7, 8
# 'torch.CudaStorage' and 'torch.CudaTensor' hold floats; others are named by their element type.
DTYPES = {'Byte': 'u1', 'Char': 'i1', 'Short': 'i2', 'Int': 'i4', 'Long': 'i8', 'Half': 'f2',
          'Float': 'f4', 'Double': 'f8', '': 'f4'}


def load_modules(path):
    """The convolutions, norms and linear layers of a model, in the order in which they run.

    Returns:
        A list with a dict for each: tensors `weight` and, if it has them, `bias`, `running_mean`,
        `running_var`.

    Raises:
        ValueError: the file holds no model.
        Exception: any, if the file is damaged.
    """
    with open(path, 'rb') as file:
        # Copy on write, so that NumPy takes it as writable; nothing writes.
        model = _Reader(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)).object()
    table = model if isinstance(model, dict) else {}
    model = table.get('model', table)
    if 'modules' not in model:
        keys = ', '.join(str(key) for key in [*table][:5])
        raise ValueError(f'it holds no model, but {keys}')
    return [_tensors(module) for module in _leaves(model, set()) if 'weight' in module]


def _leaves(module, seen):
    """Modules without children, depth first.

    Only `modules` counts: optMemory 3 and 4 keep the same modules in `net1` and `net2`, too.
    """
    if id(module) in seen:
        return
    seen.add(id(module))
    if 'modules' not in module:
        yield module
        return
    children = module['modules']
    for i in range(1, len(children) + 1):
        yield from _leaves(children[i], seen)


def _tensors(module):
    values = {key: _tensor(*module[key]) for key in ('weight', 'bias', 'running_mean',
                                                     'running_var', 'running_std')
              if module.get(key) is not None}
    if 'running_std' in values:  # nn.BatchNormalization before version 2: 1 / sqrt(var + eps)
        values['running_var'] = values.pop('running_std').double().pow(-2).sub(module['eps'])
    return {key: value.float() for key, value in values.items()}


def _tensor(storage, offset, size, stride):
    if math.prod(size) > len(storage):
        raise ValueError(f'a tensor of {size} in {len(storage)} numbers')
    return torch.as_strided(torch.from_numpy(storage), size, stride, offset).clone()


class _Reader:
    """Tables become dicts, tensors (storage, offset, size, stride), functions None."""

    def __init__(self, data):
        self.data, self.position, self.objects = data, 0, {}

    def number(self, code):
        value, = struct.unpack_from(f'<{code}', self.data, self.position)
        self.position += struct.calcsize(f'<{code}')
        return value

    def string(self):
        return self.array('u1', self.number('i')).tobytes().decode('latin-1')

    def array(self, dtype, count):
        """A view of the file, so that a wrong count takes no memory."""
        array = np.frombuffer(self.data, f'<{dtype}', count, self.position) if count else (
            np.empty(0, dtype))
        self.position += array.nbytes
        return array

    def object(self):
        kind = self.number('i')
        if kind == NIL:
            return None
        if kind == NUMBER:
            return self.number('d')
        if kind == STRING:
            return self.string()
        if kind == BOOLEAN:
            return bool(self.number('i'))
        if kind == OLD_FUNCTION:
            self.string(), self.object()  # bytecode, upvalues
            return None
        if kind not in (TABLE, OBJECT, *FUNCTIONS):
            raise ValueError(f'unknown type {kind} at byte {self.position - 4}')
        index = self.number('i')
        if index not in self.objects:
            if kind == TABLE:
                self.table(index)
            elif kind == OBJECT:
                self.torch_object(index)
            else:
                self.objects[index] = None
                self.string(), self.object()
        return self.objects[index]

    def table(self, index):
        table = self.objects[index] = {}
        for _ in range(self.number('i')):
            key, value = self.object(), self.object()
            table[key if isinstance(key, (str, float)) else id(key)] = value

    def torch_object(self, index):
        name = self.string()
        if name.startswith('V '):  # a version; files older than versions have the name alone
            name = self.string()
        element = name.removeprefix('torch.').removeprefix('Cuda')
        if element.endswith('Storage'):
            dtype = DTYPES[element.removesuffix('Storage')]
            self.objects[index] = self.array(dtype, self.number('q'))
        elif element.endswith('Tensor'):
            dimensions = self.number('i')
            size, stride = (self.array('i8', dimensions).tolist() for _ in range(2))
            offset, storage = self.number('q') - 1, self.object()
            self.objects[index] = (np.empty(0, 'f4') if storage is None else storage,
                                   max(offset, 0), size, stride)
        else:  # an nn module: a table
            self.objects[index] = {}
            self.objects[index].update(self.object())
