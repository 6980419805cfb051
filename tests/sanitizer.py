"""Watches what interpreted Triton kernels read and write: what compute-sanitizer does on a GPU.

    with Sanitizer(monkeypatch):
        kernel[grid](...)            # AssertionError at an access out of bounds, or at a race

Out of bounds is what is in none of the tensors that the kernel was given. A race is an element that
one program writes and another one reads or writes in the same launch: on a GPU they run at the same
time, in no order. To make more of that order, the programs of a launch run backwards.
"""

import numpy as np
import torch
from triton.runtime import interpreter


class Sanitizer:
    def __init__(self, monkeypatch):
        self.native = interpreter._interpreter
        self.bounds, self.program, self.loads, self.stores = None, 0, [], []
        monkeypatch.setattr(interpreter, '_interpreter', self)
        executor, builder = interpreter.GridExecutor, interpreter.interpreter_builder
        call, copy_arguments, enter = (executor.__call__, executor._init_args_hst,
                                       builder.set_grid_idx)

        def checked_call(executor, *args, **kwargs):
            self.loads, self.stores = [], []
            call(executor, *args, **kwargs)
            self.check_races(executor.fn.__name__)

        def seen_arguments(executor, *args):
            found = copy_arguments(executor, *args)
            spans = {(storage.data_ptr(), storage.data_ptr() + storage.nbytes())
                     for tensor in found[0] if isinstance(tensor, torch.Tensor)
                     for storage in [tensor.untyped_storage()]}
            self.bounds = np.array(sorted(spans), dtype=np.uint64)
            return found

        def next_program(x, y, z):
            self.program += 1
            size = builder.grid_dim
            enter(size[0] - 1 - x, size[1] - 1 - y, size[2] - 1 - z)

        monkeypatch.setattr(executor, '__call__', checked_call)
        monkeypatch.setattr(executor, '_init_args_hst', seen_arguments)
        monkeypatch.setattr(builder, 'set_grid_idx', next_program)

    def load(self, addresses, mask, other, dtype):
        self.loads.append(self.check_bounds(addresses[mask], np.dtype(dtype).itemsize))
        return self.native.load(addresses, mask, other, dtype)

    def store(self, addresses, values, mask):
        self.stores.append(self.check_bounds(addresses[mask], values.dtype.itemsize))
        return self.native.store(addresses, values, mask)

    def check_bounds(self, addresses, size):
        addresses = addresses.astype(np.uint64).ravel()
        span = np.searchsorted(self.bounds[:, 0], addresses, side='right') - 1
        inside = (span >= 0) & (addresses + np.uint64(size) <= self.bounds[span, 1])
        assert inside.all(), 'out of bounds'
        return np.full(len(addresses), self.program), addresses

    def check_races(self, kernel):
        if not self.stores:
            return
        writers, written = map(np.concatenate, zip(*self.stores))
        order = np.argsort(written, kind='stable')
        writers, written = writers[order], written[order]
        same = written[1:] == written[:-1]
        assert (writers[1:] == writers[:-1])[same].all(), f'two programs of {kernel} write the same'
        readers, read = map(np.concatenate, zip(*self.loads))
        place = np.minimum(np.searchsorted(written, read), len(written) - 1)
        same = written[place] == read
        assert (writers[place] == readers)[same].all(), f'programs of {kernel} race'
