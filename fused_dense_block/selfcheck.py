"""Does a module compute what its fused version does? Tried on small random maps before it is fused.

A copy of the module gets random weights: the answer depends neither on the weights that it has, nor
on its mode, and nothing of it is changed, nor the random state of the process.
"""

import contextlib
import copy

import torch

from . import cpu, eager
from .autograd import no_autocast
from .modules import Difference

# The norm of the difference over that of what the module itself computes. In the first precision
# each output, gradient and statistic is compared by itself; by the kernels, all outputs, all
# gradients and all statistics, since a small one may consist of rounding errors. In bfloat16 these
# switch some ReLUs, which changes gradients by up to a quarter in so small maps; wrong gradients
# differ by 1 or more.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.6}
OUTPUT, GRADIENT, STATISTIC = 'outputs', 'gradients', 'running statistics'


def verify(module, kind, make_plan, with_kernels):
    """Compare the module's own forward with `kind.run`.

    Args:
        kind: a class of blocks.py.
        make_plan: `blocks.Plan`.
        with_kernels: also compare with the CPU kernels, in float32 and bfloat16.

    Returns:
        Whether the layers have a dropout after their first convolution, too.

    Raises:
        Difference: they differ.
    """
    device = next(module.parameters()).device
    device = torch.device('cpu') if device.type == 'meta' else device
    highest = torch.float64 if device.type in ('cpu', 'cuda') else torch.float32
    with _undisturbed(device) as generator:
        trial = _Trial(_copy(module, device), kind, make_plan, generator)
        truth = trial.run(highest)
        for drop_first_half in (False, True):
            try:
                _compare(trial.run(highest, eager, drop_first_half), truth, highest)
                break
            except Difference:
                if drop_first_half or not trial.has_dropout:
                    raise
        if kind.kernels and with_kernels:
            if trial.has_dropout:  # whose masks depend on the layout
                trial.without_dropout()
                truth = trial.run(highest)
            for dtype in (torch.float32, torch.bfloat16):
                _compare_by_kind(trial.run(dtype, cpu), truth, dtype)
    return drop_first_half


class _Trial:
    """A module with random weights, and its input; each run begins in the same state."""

    def __init__(self, module, kind, make_plan, generator):
        self.module, self.kind, self.make_plan = module, kind, make_plan
        self.generator, self.parts = generator, kind.read(module)
        random = torch.Generator().manual_seed(1)

        def draw(tensor, low, high):
            tensor.data.copy_(torch.empty(tensor.shape, device='cpu', dtype=torch.float32)
                              .uniform_(low, high, generator=random))

        for norm, conv in kind.norm_convs(self.parts):
            norm.reset_running_stats()
            draw(norm.weight, -1.0, 1.0)
            draw(norm.bias, -0.5, 0.5)
            draw(norm.running_mean, -0.5, 0.5)
            draw(norm.running_var, 0.5, 1.5)
            bound = (3 / conv.weight[0].numel()) ** 0.5
            draw(conv.weight, -bound, bound)
        if 'drop_rate' in vars(module):  # a transition, which is fused without dropout only
            module.drop_rate = 0.0
        for layer in module.children():  # torchvision's update norm1 twice when they recompute
            for name in {'memory_efficient', 'grad_checkpointing'} & vars(layer).keys():
                setattr(layer, name, False)
        self.buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}
        self.x = torch.empty(2, kind.in_channels(self.parts), 5, 6, dtype=torch.float32,
                             device=conv.weight.device)
        draw(self.x, -2.0, 2.0)

    @property
    def has_dropout(self):
        return any(vars(layer).get('drop_rate') for layer in self.module.children())

    def without_dropout(self):
        for layer in self.module.children():
            layer.drop_rate = 0.0

    def run(self, dtype, ops=None, drop_first_half=False):
        """[(kind of result, name, value)] in training and in evaluation, by the module or by `ops`.
        """
        module = self.module
        module.to(torch.promote_types(dtype, torch.float32)).requires_grad_(True)
        for name, buffer in module.named_buffers():
            buffer.copy_(self.buffers[name])
        layout = torch.channels_last if ops is cpu else torch.contiguous_format
        x = self.x.to(dtype, memory_format=layout).requires_grad_()
        results = []
        for training in (True, False) if self.kind.trains else (False,):
            module.train(training)
            self.generator.manual_seed(2)
            with torch.set_grad_enabled(training):
                if ops is None:
                    y = self._run_module(x)
                else:
                    plan = self.make_plan(module, self.kind, drop_first_half=drop_first_half)
                    y = self.kind.run(module, ops, plan, x)
            results += [(OUTPUT, name, part) for name, part in self.kind.split(module, y)]
            if training:
                names, parameters = zip(*module.named_parameters())
                weights = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape)
                gradients = torch.autograd.grad(y, (x, *parameters), weights.to(y))
                results += [(GRADIENT, name, value) for name, value in
                            zip(('', *names), gradients)]
                results += [(STATISTIC, name, value.clone())
                            for name, value in module.named_buffers()]
        return results

    def _run_module(self, x):
        attributes = [(name, module, set(vars(module)))
                      for name, module in self.module.named_modules()]
        try:
            y = self.module.forward(x)
        except Exception as error:  # the forward of a stranger
            raise Difference('', f'fails on a small random map ({error})') from error
        for name, module, before in attributes:
            for added in set(vars(module)) - before:
                raise Difference(name, f'sets the attribute {added} in its forward')
        return y


def _compare(results, truth, dtype):
    """Raises Difference for the first result that is not as it should be."""
    errors = _sizes(results, truth) / _sizes(truth).clamp_min(1e-30)
    for (kind, name, _), error in zip(results, errors.tolist(), strict=True):
        if not error <= TOLERANCE[dtype]:
            raise Difference(name, f'computes something else than the fused layers: its {kind} '
                                   f'differ by {error:.2g} of their size')


def _compare_by_kind(results, truth, dtype):
    differences, sizes = _sizes(results, truth).square(), _sizes(truth).square()
    for kind in (OUTPUT, GRADIENT, STATISTIC):
        chosen = torch.tensor([k == kind for k, *_ in results])
        error = (differences[chosen].sum() / sizes[chosen].sum()).sqrt().item()
        if not error <= TOLERANCE[dtype]:
            raise Difference('', f'has other {kind} by the CPU kernels in {dtype} (by {error:.2g} '
                                 f'of their size); fuse(model, kernels=False) does without them')


def _sizes(results, others=None):
    """The norms of the values or, with others, of the differences; float64 [len(results)]."""
    values = [value.detach().double() for _, _, value in results]
    if others is not None:
        values = [value - other if value.shape == other.shape else value.fill_(torch.nan)
                  for value, (_, _, other) in zip(values, others, strict=True)]
    return torch.stack(torch._foreach_norm(values)).cpu()


def _copy(module, device):
    """A copy without hooks, which might run or copy anything."""
    no_hooks = {id(value): type(value)() for part in module.modules()
                for name, value in vars(part).items() if '_hooks' in name}
    try:
        twin = copy.deepcopy(module, no_hooks)
    except Exception as error:  # such as weights that are computed, which cannot be copied
        raise Difference('', f'cannot be copied ({error})') from error
    if hasattr(twin, '_fused'):
        twin.__class__ = type(twin).__bases__[1]
    # In one layout: the same random numbers would make other dropout masks in another.
    return twin.to_empty(device=device).to(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def _undisturbed(device):
    """Gradients on, autocast off, and the random state restored; yields its generator."""
    on_cuda = device.type == 'cuda'
    index = torch.cuda.current_device() if on_cuda and device.index is None else device.index
    generator = torch.cuda.default_generators[index] if on_cuda else torch.default_generator
    state = generator.get_state()
    try:
        with torch.inference_mode(False), torch.enable_grad(), no_autocast(torch.empty(0)):
            yield generator
    finally:
        generator.set_state(state)
