"""Dense blocks with memory linear in depth and, on CPUs, compiled kernels, for any DenseNet.

    from fused_dense_block import fuse
    model = fuse(torchvision.models.densenet121())       # or ours, timm's, torchxrayvision's, ...
    model.to(memory_format=torch.channels_last)          # the layout that the CPU kernels take
    print(model.features.denseblock1.path, model.features.denseblock1.reason)

Parameters, buffers, state-dict keys, hooks and `isinstance` are unchanged, and an existing
optimizer keeps working. The path of a dense block or transition depends on the device, layout and
precision of its input, and on the mode; the first matching row applies (evaluation is with
gradients if the input or a parameter requires them):

    device  layout         precision           training  evaluation  evaluation with gradients
    cpu     channels_last  float32, bfloat16   kernels   kernels     layers
    cpu     any            any                 eager     layers      layers
    other   any            any                 eager*    layers      layers

    kernels  one autograd function in linear memory, with the kernels of cpu.cpp
    eager    the same with PyTorch operations. * Only with memory_efficient; otherwise 'layers' is
             faster
    layers   the model's own forward. Also the fallback for hooks, replaced modules, norms in
             another mode, tensor subclasses, torch.compile, export, fx and torch.func.
             Transitions instead run 'pooled first': their own modules, with the pooling before
             the convolution

ImageNet's stem is fused in evaluation without gradients on CPUs: by the kernels, if the images or
the weights are in channels_last, otherwise 'eager'.
"""

import torch
from torch import nn

from . import blocks, cpu
from .blocks import Fused, FusedBlock, FusedFeatures, FusedTransition, State, fused_class
from .modules import Difference, recomputes

__all__ = ['fuse', 'unfuse']


def fuse(model, *, memory_efficient=None, kernels=True):
    """Fuse the dense blocks, the transitions and ImageNet's stem of a DenseNet, in place.

    Each module gets a subclass of its own class, whose forward takes one of the paths above. Its
    attribute `path` is the path of the last forward, and `reason` why it was not a faster one, or
    None.

    First, each module is compared with its fused version on small random maps: outputs, gradients
    and running statistics, in training and evaluation. (With the CPU kernels for bfloat16 it is
    compared when they are first used; if they differ, the module runs unfused and `reason` says
    so.) Behaviour that depends on sizes, batches or steps is not detected. Transitions and stems
    with other modules than DenseNet's are not fused.

    In evaluation, the CPU kernels keep a packed copy of the weights until the next forward in
    training. It is updated when a weight or statistic changes, but changes of a few values through
    `.data` or NumPy, which torch does not track, may be missed: call `fuse` again after these.

    Args:
        model: contains dense blocks as described in modules.py; any mode, precision and device.
        memory_efficient: recompute the outputs of the 1x1 convolutions in backward. None: use each
            layer's own flag (torchvision's `memory_efficient`, whose own recomputation updates the
            statistics of norm1 twice, this once; timm's `grad_checkpointing`).
        kernels: allow the CPU kernels, which are compiled at first use.

    Returns:
        model.

    Raises:
        ValueError: there is no dense block, or one computes something else. The message names the
            layer and the difference, and nothing is fused.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError('not fused: this is a TorchScript model; fuse it before')
    found = list(_find(unfuse(model)))
    if not any(kind is FusedBlock for _, _, kind in found):
        raise ValueError(f'not fused: this {type(model).__name__} has no dense block (a module '
                         f'with the children denselayer1, denselayer2, ...)')
    # Transitions have no such flag. On GPUs they are fused only if a layer is memory-efficient.
    any_recomputes = memory_efficient if memory_efficient is not None else any(
        recomputes(module) for module in model.modules())
    states = []
    for name, module, kind in found:
        state = State(any_recomputes if kind is FusedTransition else memory_efficient, kernels)
        on_cpu = all(parameter.device.type in ('cpu', 'meta') for parameter in module.parameters())
        has_kernels = kernels and on_cpu and cpu.unavailable_reason() is None
        try:
            with blocks.VERIFYING:
                state.verify(module, kind, torch.float32 if has_kernels else None)
        except Difference as difference:
            raise ValueError(f'not fused: {difference.inside(name)}') from difference
        states.append(state)
    for state, (_, module, kind) in zip(states, found):
        module.__class__ = fused_class(kind, type(module))
        module._fused = state
    return model


def unfuse(model):
    """The inverse of `fuse`, in place. Returns model."""
    for module in model.modules():
        if isinstance(module, Fused):
            blocks.unfuse(module)
    return model


def _find(model):
    """Yield (name, module, kind) for all that can be fused; raises ValueError as `fuse`."""
    for name, module in model.named_modules():
        if 'denselayer1' in module._modules:
            kind = FusedBlock
        elif {'norm', 'conv', 'pool'} <= module._modules.keys():
            kind = FusedTransition
        elif 'pool0' in module._modules and type(module).forward is nn.Sequential.forward:
            kind = FusedFeatures
        else:
            continue
        try:
            kind.read(module)
        except Difference as difference:
            if kind is FusedBlock:
                raise ValueError(f'not fused: {difference.inside(name)}') from difference
            continue
        yield name, module, kind

