"""Compares a module with its fused version on small random maps.

Works on a copy with random weights; the module is unchanged. The global random generator is used
only with dropout, and then restored. Does not detect behaviour that depends on sizes, batches or
steps.
"""

import contextlib
import copy
import random
import sys

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from . import cpu, eager
from .autograd import no_autocast
from .modules import Difference, StemModules, original_class, unusual_stem

# Relative to the norm of the module's own results. In float64, results are compared one by one; the
# kernels' results by kind, because small ones may consist of rounding errors. In deep blocks,
# rounding flips some ReLUs, which changes gradients by up to 0.002 in float32 and 0.2 in bfloat16;
# wrong gradients differ by 1 or more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 0.03, torch.bfloat16: 0.6}
RANDOM, OUTPUT, GRADIENT, STATISTIC = (
    'random numbers', 'outputs', 'gradients', 'running statistics')


def verify(module, kind, make_plan, dtype=None):
    """Compare the module's own forward with `kind.run`.

    Args:
        kind: a class of blocks.py.
        make_plan: `blocks.Plan`.
        dtype: also compare with the CPU kernels for maps of this dtype, which has a library.

    Returns:
        True if there is also dropout after the first convolution of each layer.

    Raises:
        Difference: they differ.
    """
    parameter = next(module.parameters(), None)
    if parameter is None:
        raise Difference('', 'has no parameters')
    device = torch.device('cpu') if parameter.device.type == 'meta' else parameter.device
    highest = torch.float64 if device.type in ('cpu', 'cuda') else torch.float32
    with _undisturbed():
        trial = _Trial(_copy(module, device), kind, make_plan)
        with trial.restored_random_state():
            return trial.compare(highest, dtype)


class _Draws(TorchDispatchMode):
    """Notes whether operations of this thread draw random numbers."""

    found = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.found |= torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


class _Trial:
    """A module with random weights, and its input; each run starts from the same state."""

    def __init__(self, module, kind, make_plan):
        self.module, self.kind, self.make_plan = module, kind, make_plan
        self.parts = kind.read(module)
        used = {id(tensor) for norm, conv in kind.norm_convs(self.parts) for part in (norm, conv)
                for tensor in (*part.parameters(), *part.buffers())}
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if id(tensor) not in used:
                raise Difference(name, 'is not part of a norm or a convolution')
        source = torch.Generator().manual_seed(1)

        def draw(tensor, low, high):
            tensor.data.copy_(torch.empty(tensor.shape, device='cpu', dtype=torch.float32)
                              .uniform_(low, high, generator=source))

        for norm, conv in kind.norm_convs(self.parts):
            norm.reset_running_stats()
            draw(norm.weight, -8.0, 8.0)  # large enough to tell ReLU from ReLU6
            draw(norm.bias, -4.0, 4.0)
            draw(norm.running_mean, -0.5, 0.5)
            draw(norm.running_var, 0.5, 1.5)
            bound = (3 / conv.weight[0].numel()) ** 0.5
            draw(conv.weight, -bound, bound)
        if 'drop_rate' in vars(module):  # a transition, which is fused without dropout only
            module.drop_rate = 0.0
        for layer in module.children():  # torchvision's recomputation updates norm1 twice
            for name in {'memory_efficient', 'grad_checkpointing'} & vars(layer).keys():
                setattr(layer, name, False)
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self.x = torch.empty(3, kind.in_channels(self.parts), 5, 6, dtype=torch.float32,
                             device=conv.weight.device)
        draw(self.x, -2.0, 2.0)
        self.generator = torch.default_generator
        if self.x.is_cuda:
            self.generator = torch.cuda.default_generators[self.x.get_device()]

    @contextlib.contextmanager
    def restored_random_state(self):
        """Without dropout the global generator is not used: other threads may draw from it."""
        state = self.generator.get_state() if self.has_dropout else None
        try:
            yield
        finally:
            if state is not None:
                self.generator.set_state(state)

    @property
    def is_unusual_stem(self):  # it has no kernels
        return isinstance(self.parts, StemModules) and unusual_stem(self.parts)

    @property
    def has_dropout(self):
        return any(vars(layer).get('drop_rate') for layer in self.module.children())

    def without_dropout(self):
        for layer in self.module.children():
            layer.drop_rate = 0.0

    def compare(self, highest, dtype):
        """As `verify`, in the dtype `highest`."""
        truth = self.run(highest)
        for drops_after_conv1 in (False, True):
            try:
                _compare(self.run(highest, eager, drops_after_conv1), truth, highest)
                break
            except Difference:
                if drops_after_conv1 or not self.has_dropout:
                    raise
        if dtype is not None and not self.is_unusual_stem:
            if self.has_dropout:  # dropout masks depend on the layout
                self.without_dropout()
                truth = self.run(highest)
            _compare_by_kind(self.run(dtype, cpu), truth, dtype)
        return drops_after_conv1

    def run(self, dtype, ops=None, drops_after_conv1=False):
        """[(kind of result, name, value)] in training and evaluation, of the module or of `ops`."""
        module = self.module
        module.to(torch.promote_types(dtype, torch.float32)).requires_grad_(True)
        for name, buffer in module.named_buffers():
            buffer.copy_(self.buffers[name])
        layout = torch.channels_last if ops is cpu else torch.contiguous_format
        x = self.x.to(dtype, memory_format=layout).requires_grad_()
        results = []
        for training in (True, False) if self.kind.trains else (False,):
            module.train(training)
            if self.has_dropout:
                self.generator.manual_seed(2)
            with torch.set_grad_enabled(training):
                if ops is None:
                    y = self._run_module(x)
                else:
                    plan = self.make_plan(module, self.kind, drops_after_conv1=drops_after_conv1)
                    if ops is cpu and not training:
                        plan = plan.pack(x)
                    y = self.kind.run(module, ops, plan, x)
            if self.has_dropout:  # both must draw the same amount of random numbers
                results.append((RANDOM, '', self.generator.get_state().to(torch.float64)))
            results += [(OUTPUT, name, part) for name, part in self.kind.split(module, y)]
            if training:
                names, parameters = zip(*module.named_parameters())
                weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
                gradients = torch.autograd.grad(y, (x, *parameters), weights.to(y),
                                                allow_unused=True)
                for name, value in zip(('', *names), gradients):
                    if value is None:
                        raise Difference(name, 'is not used by the layer')
                    results.append((GRADIENT, name, value))
                results += [(STATISTIC, name, value.clone())
                            for name, value in module.named_buffers()]
        return results

    def _run_module(self, x):
        before = [(name, module, dict(vars(module)))
                  for name, module in self.module.named_modules()]
        numpy, draws, torch_state = sys.modules.get('numpy'), _Draws(), self.generator.get_state()
        state, numpy_state = random.getstate(), numpy and numpy.random.get_state(legacy=False)
        try:
            with draws:
                y = self.module.forward(x)
        except Exception as error:  # any user code
            raise Difference('', f'fails on a small random map ({error})') from error
        other_draws = random.getstate() != state or (  # as text: it has arrays
            numpy and str(numpy.random.get_state(legacy=False)) != str(numpy_state))
        if other_draws:
            random.setstate(state)
            if numpy:
                numpy.random.set_state(numpy_state)
        draws_without_dropout = draws.found and not self.has_dropout
        if draws_without_dropout:
            self.generator.set_state(torch_state)
        if other_draws or draws_without_dropout:
            raise Difference('', 'draws random numbers in its forward')
        for name, module, attributes in before:
            for key, value in vars(module).items():
                if attributes.get(key) is not value:
                    raise Difference(name, f'sets the attribute {key} in its forward')
        shape = self.kind.output_shape(self.parts, x)
        if not torch.is_tensor(y) or y.shape != shape:
            raise Difference('', f'does not return one tensor of shape {list(shape)}')
        return y


def _compare(results, truth, dtype):
    """Raises Difference for the first result that differs."""
    largest, sizes = {}, _sizes(truth).tolist()
    for (kind, *_), size in zip(truth, sizes):
        largest[kind] = max(largest.get(kind, 1e-30), size)
    # Results that should be 0 consist of the rounding errors of others of their kind.
    sizes = [max(size, 1e-6 * largest[kind]) for (kind, *_), size in zip(truth, sizes)]
    errors = _sizes(results, truth) / torch.tensor(sizes, dtype=torch.float64)
    for (kind, name, _), error in zip(results, errors.tolist(), strict=True):
        if not error <= TOLERANCE[dtype]:
            raise Difference(name, f'computes something else than the fused layers: its {kind} '
                                   f'have a relative difference of {error:.2g}')


def _compare_by_kind(results, truth, dtype):
    truth = [result for result in truth if result[0] != RANDOM]
    differences, sizes = _sizes(results, truth).square(), _sizes(truth).square()
    for kind in dict.fromkeys(kind for kind, *_ in results):
        chosen = torch.tensor([k == kind for k, *_ in results])
        error = (differences[chosen].sum() / sizes[chosen].sum()).sqrt().item()
        if not error <= TOLERANCE[dtype]:
            raise Difference('', f'has other {kind} by the CPU kernels in {dtype} (relative '
                                 f'difference {error:.2g}); fuse(model, kernels=False) does '
                                 f'without them')


def _sizes(results, others=None):
    """Norms of the values or, with `others`, of the differences; float64 [len(results)]."""
    values = [value.detach().double() for _, _, value in results]
    if others is not None:
        values = [value - other if value.shape == other.shape else value.fill_(torch.nan)
                  for value, (_, _, other) in zip(values, others, strict=True)]
    return torch.stack(torch._foreach_norm(values)).cpu()


def _copy(module, device):
    """A copy without hooks, which might have side effects."""
    no_hooks = {id(value): type(value)() for part in module.modules()
                for name, value in vars(part).items()
                if name.endswith('_hooks') and isinstance(value, dict)}
    try:
        twin = copy.deepcopy(module, no_hooks)
    except Exception as error:  # for example non-leaf tensors
        raise Difference('', f'cannot be copied ({error})') from error
    twin.__class__ = original_class(twin)
    # Contiguous, because dropout masks depend on the layout.
    return twin.to_empty(device=device).to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _undisturbed():
    """Gradients on, autocast off, hooks on saved tensors (as of torch's checkpoint) off.

    One thread: where the cores are busy, several would mostly wait for each other on small maps.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with (torch.inference_mode(False), torch.enable_grad(), no_autocast(torch.empty(0)),
              torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)):
            yield
    finally:
        torch.set_num_threads(threads)
