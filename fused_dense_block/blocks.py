"""The classes of fused dense blocks, transitions and `features`."""

import operator
import threading
from collections import OrderedDict
from operator import attrgetter

import torch
from torch import nn

from . import cpu, eager, inference, modules, selfcheck
from .autograd import DenseBlockFunction, Layer, TransitionFunction

SHAPE, DEVICE = attrgetter('shape'), attrgetter('device')
VERIFYING = threading.Lock()  # it sets torch's threads and, with dropout, the random state


class Fused:
    """The first base class of a fused module; the second is its original class.

    Attributes:
        path: the path of the last forward (see __init__.py), None before the first.
        reason: why it was not a faster one, or None.
    """

    path = reason = None
    _fused = None  # a `State`, set by fuse; a slice of a fused nn.Sequential has none
    unfused_path = 'layers'
    trains = True  # whether training is fused

    def forward(self, x):
        path, reason, plan = self._choose(x)
        self.path, self.reason = path, reason  # another thread may overwrite them
        if path == 'layers':
            return super().forward(x)
        return self.run({'kernels': cpu, 'eager': eager}.get(path), plan, x)

    def _choose(self, x):
        """path, reason and the plan for `run`: a Plan or, for kernels in evaluation, a Packed."""
        if modules.is_traced(x):
            return 'layers', 'torch.compile, export, jit.trace or fx records a graph', None
        if self._fused is None or '_is_replica' in vars(self):
            return 'layers', 'a slice of a fused module, or a replica of nn.DataParallel', None
        reason = modules.transformed_or_hooked() or modules.unusual_class([x])
        # nn.BatchNorm2d raises an error for a single value per channel in training.
        least = x.shape[1] + 1 if self.training and x.dim() == 4 else 1
        if reason is None and (x.dim() != 4 or x.numel() < least):
            reason = f'an input of shape {list(x.shape)}'
        if reason is not None:
            return 'layers', reason, None
        path, reason = self.choose_by_table(x)
        path = self.unfused_path if path == 'layers' else path
        if path == 'layers':
            return path, reason, None
        plan = self._fused.plan(self, self.maps_dtype(x) if path == 'kernels' else None)
        evaluates = path == 'kernels' and not self.training
        packed = plan.current_packed(x) if evaluates else None
        if packed is None:
            obstacle = plan.obstacle(x)
            if obstacle:
                return 'layers', obstacle, None
            obstacle = evaluates and plan.why_no_stem_kernel(x)
            if obstacle:
                return 'eager', obstacle, plan
        return path, reason, (packed or plan.pack(x)) if evaluates else plan

    def choose_by_table(self, x):
        """path and reason according to the table in __init__.py."""
        device = x.device.type
        if not self.training and self.needs_gradients(x):
            return 'layers', 'evaluation with gradients: torch.no_grad() allows faster paths'
        if device == 'cpu':
            reason = cpu.why_not(x) if self._fused.kernels else 'fused with kernels=False'
            if reason is None:
                return 'kernels', None
            return 'eager' if self.training else 'layers', reason
        if self.training and self.recomputes():
            return 'eager', None
        without = 'without memory_efficient ' if self.training else ''
        return 'layers', f'on {device} the layers are fastest {without}'.rstrip()

    def needs_gradients(self, x):
        """Whether autograd would record what is fused; not if its parameters are frozen."""
        return torch.is_grad_enabled() and (x.requires_grad or any(
            parameter.requires_grad for _, module in self.watched(self)
            for parameter in module.parameters(recurse=False)))

    def recomputes(self):
        return self._fused.memory_efficient

    @staticmethod
    def maps_dtype(x):
        """The dtype of the maps that the CPU kernels would read."""
        return x.dtype

    def __reduce_ex__(self, protocol):  # for copy and pickle: the class can't be found by name
        return _rebuild, (kind_of(self), modules.original_class(self)), self.__getstate__()

    def __prepare_scriptable__(self):  # torch.jit.script compiles the plain module
        plain = modules.original_class(self).__new__(modules.original_class(self))
        vars(plain).update(vars(self))
        return plain

    @staticmethod
    def split(module, y):
        """(name, part) pairs of the output, whose shape is `output_shape`."""
        return [('', y)]

    @staticmethod
    def watched(module):
        """(name, module) pairs of the modules that the fused forward replaces."""
        return [*module.named_modules()][1:]

    @staticmethod
    def sample(module):
        """The part of the module that the fused forward replaces."""
        return module


class FusedBlock(Fused):
    """A dense block."""

    read = staticmethod(modules.dense_layers)
    norm_convs = staticmethod(lambda layers: sum(layers, []))
    in_channels = staticmethod(lambda layers: layers[0][0].norm.num_features)
    output_shape = staticmethod(lambda layers, x: (
        len(x), x.shape[1] + sum(norm_convs[-1].conv.out_channels for norm_convs in layers),
        *x.shape[2:]))

    def recomputes(self):
        if self._fused.memory_efficient is None:
            return any(map(modules.recomputes, self._modules.values()))
        return self._fused.memory_efficient

    def run(self, ops, plan, x):
        if ops is cpu and not self.training:
            return cpu.evaluate_block(plan.convs, plan.growth, x)
        if not self.training:
            return inference.run_block(plan.parts, x)
        # Grad mode is read here: within a Function it is always off.
        layers = plan.layers if torch.is_grad_enabled() else plan.layers_without_grad
        return DenseBlockFunction.apply(ops, layers, x, *plan.parameters())

    @staticmethod
    def split(block, y):
        sizes = [norm_convs[-1].conv.out_channels for norm_convs in modules.dense_layers(block)]
        return zip(('', *block._modules), y.split([y.shape[1] - sum(sizes), *sizes], 1))


class FusedTransition(Fused):
    """A transition.

    Where no fused path is faster, it runs its own modules, with the pooling before the convolution:
    the two commute, and the convolution then has a quarter of the work.
    """

    unfused_path = 'pooled first'
    read = staticmethod(modules.transition)
    norm_convs = staticmethod(lambda norm_conv: [norm_conv])
    in_channels = staticmethod(lambda norm_conv: norm_conv.norm.num_features)
    output_shape = staticmethod(lambda norm_conv, x: (
        len(x), norm_conv.conv.out_channels, x.shape[2] // 2, x.shape[3] // 2))

    def _choose(self, x):
        if self.training and getattr(self, 'drop_rate', 0):
            return 'layers', 'dropout between convolution and pooling', None
        if not modules.is_traced(x) and min(x.shape[2:], default=0) < 2:
            return 'layers', f'an input of shape {list(x.shape)}', None  # the pooling will raise
        return super()._choose(x)

    def run(self, ops, plan, x):
        if ops is None:
            *norm_and_relu, conv, pool = self._modules.values()
            for module in (*norm_and_relu, pool, conv):
                x = module(x)
            return x
        if ops is cpu and not self.training:
            return cpu.evaluate_transition(plan.convs, x)
        if not self.training:
            return inference.run_norm_conv(plan.parts, x, pool=True)
        return TransitionFunction.apply(ops, plan.parts.norm, x, *plan.parameters())


class FusedFeatures(Fused):
    """An nn.Sequential that begins with ImageNet's stem."""

    trains = False
    read = staticmethod(modules.stem)
    norm_convs = staticmethod(lambda stem: [modules.NormConvModules(stem.norm, stem.conv)])
    in_channels = staticmethod(lambda stem: stem.conv.in_channels)
    output_shape = staticmethod(lambda stem, x: stem.pool(stem.conv(x)).shape)

    def choose_by_table(self, x):
        if self.training or self.needs_gradients(x) or x.device.type != 'cpu':
            return 'layers', 'the stem is fused in evaluation without gradients on a CPU'
        if not self._fused.kernels:
            return 'eager', 'fused with kernels=False'
        reason = cpu.why_not_dtype(self.maps_dtype(x))
        return 'kernels' if reason is None else 'eager', reason

    @staticmethod
    def maps_dtype(x):
        return autocast_dtype(x.device.type) or x.dtype

    def run(self, ops, plan, x):
        if ops is cpu:
            x = cpu.evaluate_stem(plan.convs, x.to(plan.dtype))
        else:
            x = inference.run_stem(plan.parts, x)
        for name, module in self._modules.items():
            if name not in modules.STEM:
                x = module(x)
        return x

    @staticmethod
    def sample(module):
        return nn.Sequential(OrderedDict((name, child) for name, child in module._modules.items()
                                         if name in modules.STEM))

    @staticmethod
    def watched(module):
        return Fused.watched(FusedFeatures.sample(module))


def kind_of(module):
    return type(module)._kind


def unfuse(module):
    module.__class__ = modules.original_class(module)
    for name in {'_fused', 'path', 'reason'} & vars(module).keys():
        delattr(module, name)
    return module


def autocast_dtype(device):
    """The dtype of autocast on this type of device, or None."""
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


_classes = {}


def fused_class(kind, base):
    if (kind, base) not in _classes:
        _classes[kind, base] = type(f'Fused{base.__name__}', (kind, base),
                                     {'_kind': kind, '_base': base})
    return _classes[kind, base]


def _rebuild(kind, base):
    cls = fused_class(kind, base)
    return cls.__new__(cls)


class State:
    """The options of a fused module, what has been verified, and a plan for each mode.

    `signature` identifies the verified version of the module. `dtypes` are those of maps for which
    the CPU kernels were verified, too: each has its own library, which takes long to compile.

    Copies keep the signature. Pickles drop it, because the code may differ where they are loaded.
    """

    def __init__(self, memory_efficient, kernels, verified=None):
        self.memory_efficient, self.kernels = memory_efficient, kernels
        self.signature, self.dtypes, self.drops_after_conv1 = verified or (None, set(), False)
        self.plans = {}

    def __deepcopy__(self, memo):
        return State(self.memory_efficient, self.kernels,
                     (self.signature, {*self.dtypes}, self.drops_after_conv1))

    def __reduce__(self):
        return State, (self.memory_efficient, self.kernels)

    def verify(self, module, kind, dtype=None):
        """Compare a module with its fused version, unless it is unchanged since the last time.

        Args:
            module: accepted by `kind.read`.
            dtype: also compare with the CPU kernels for maps of this dtype.

        Raises:
            Difference: the results differ.
        """
        signature = modules.signature(module, kind.watched(module))
        if self.signature != signature or not self.is_verified(dtype):
            self.drops_after_conv1 = selfcheck.verify(kind.sample(module), kind, Plan, dtype)
            self.dtypes = {dtype} | (self.dtypes if self.signature == signature else set())
            self.signature = signature

    def is_verified(self, dtype):
        return dtype is None or dtype in self.dtypes

    def plan(self, module, dtype=None):
        """The verified plan for the current mode of the module; `dtype` as for `verify`."""
        if module.training and False in self.plans:
            self.plans[False].packed.clear()  # training may need the memory
        plan = self.plans.get(module.training)
        if plan is None or not plan.snapshot.holds(module) or (
                plan.reason is None and not self.is_verified(dtype)):
            kind = kind_of(module)
            try:
                kind.read(module)
                reason = modules.obstacle(module, kind.watched(module))
                if reason is None:
                    with VERIFYING:
                        self.verify(module, kind, dtype)
            except Exception as error:  # of any class: the layers are right whatever it is
                reason = str(error) or type(error).__name__
            plan = Plan(module, kind, self.memory_efficient, self.drops_after_conv1, reason)
            self.plans[module.training] = plan
        return plan


class Plan:
    """The parts and tensors of a module in one mode; rebuilt when something has changed.

    Attributes:
        reason: why the modules must run one by one, or None.
        parts: the result of `kind.read`.
        layers: autograd.Layer for each layer of a dense block.
    """

    def __init__(self, module, kind, memory_efficient=None, drops_after_conv1=False, reason=None):
        self.snapshot = modules.Snapshot(module, kind.watched(module))
        self.reason, self.packed = reason, {}
        if reason:
            return
        self.parts = kind.read(module)
        norm_convs = kind.norm_convs(self.parts)
        self.channels = kind.in_channels(self.parts)
        self.kind, self.is_stem = kind, kind is FusedFeatures
        # Six tensors for each NormConv, as (dict, name), because torch.func.functional_call swaps
        # the tensors.
        self.places = [place for norm, conv in norm_convs for place in (
            (norm._parameters, 'weight'), (norm._parameters, 'bias'), (conv._parameters, 'weight'),
            (norm._buffers, 'running_mean'), (norm._buffers, 'running_var'),
            (norm._buffers, 'num_batches_tracked'))]
        self.shapes = [torch.Size(shape) for norm, conv in norm_convs for shape in (
            *[[norm.num_features]] * 2, [conv.out_channels, conv.in_channels, *conv.kernel_size],
            *[[norm.num_features]] * 2, [])]
        self.parameter_places = [place for i in range(0, len(self.places), 6)
                                 for place in self.places[i:i + 3]]
        self.conv_parameters = [conv._parameters for _, conv in norm_convs]
        self.eps = [norm.eps for norm, _ in norm_convs]
        if kind is FusedBlock:
            self.layers = [
                self._layer(layer, [norm for norm, _ in pair], memory_efficient, drops_after_conv1)
                for layer, pair in zip(module._modules.values(), self.parts)]
            self.layers_without_grad = [layer._replace(recompute=True) for layer in self.layers]
            if any(rate >= 1 for layer in self.layers for rate in layer.drop_rates):
                self.reason = 'a drop_rate of 1'

    @staticmethod
    def _layer(layer, norms, memory_efficient, drops_after_conv1):
        rate = vars(layer).get('drop_rate', 0.0)
        if memory_efficient is None:
            memory_efficient = modules.recomputes(layer)
        return Layer(norms, [norm.eps for norm in norms],
                     [rate if drops_after_conv1 else 0.0, rate][-len(norms):], memory_efficient)

    def parameters(self):
        """Norm weight, norm bias and filters of each NormConv."""
        return [tensors[name] for tensors, name in self.parameter_places]

    def current_packed(self, x):
        """The Packed for inputs like x if it is up to date, otherwise None.

        If it is, there is no obstacle, since there was none when it was packed.
        """
        packed = None if self.reason else self.packed.get(self._key(x))
        return packed if packed and packed.is_current() else None

    def pack(self, x):
        packed = inference.Packed(self.places, self.eps, self.kind.maps_dtype(x))
        self.packed[self._key(x)] = packed
        return packed

    def _key(self, x):
        """The properties of x and of autocast that a Packed depends on: the keys of `packed`."""
        return x.dtype, x.shape[1], autocast_dtype('cpu'), self.is_stem and is_channels_last(x)

    def obstacle(self, x):
        """Why x can't take a fused path, or None."""
        if self.reason:
            return self.reason
        try:
            tensors = [tensors[name] for tensors, name in self.places]
            same_shapes = all(map(operator.eq, map(SHAPE, tensors), self.shapes))
        except (KeyError, AttributeError):  # removed, or None
            return 'a weight, a running statistic or num_batches_tracked is missing'
        if any(parameters.get('bias') is not None for parameters in self.conv_parameters):
            return 'a convolution with bias'
        unusual = modules.unusual_class(tensors)
        if unusual:
            return unusual
        if not same_shapes:
            return 'a weight or a running statistic has another shape'
        if x.shape[1] != self.channels:
            return f'an input of {x.shape[1]} channels instead of {self.channels}'
        if {*map(DEVICE, tensors)} != {x.device}:
            return 'weights on another device'
        if self.is_stem:  # under autocast, its convolution takes any precision
            return None
        dtypes = {tensor.dtype for tensor in tensors if tensor.is_floating_point()}
        autocast = autocast_dtype(x.device.type)
        precision = {torch.float32: autocast or torch.float32, torch.float64: torch.float64}
        if len(dtypes) != 1 or x.dtype != precision.get(*dtypes):
            return f'input of {x.dtype}, weights of {", ".join(map(str, dtypes))}'
        return None

    def why_no_stem_kernel(self, x):
        """Why the stem, if this is one, runs without kernels, or None. `obstacle` is None."""
        if not self.is_stem:
            return None
        reason = modules.unusual_stem(self.parts)
        if reason:
            return reason
        weight = self.parts.conv.weight
        if not is_channels_last(x) and not is_channels_last(weight):
            return 'the images and the weights are not in channels_last'
        dtypes = {tensors[name].dtype for tensors, name in self.places} - {torch.int64}
        if dtypes != {torch.float32} or x.dtype not in (torch.float32, autocast_dtype('cpu')):
            return f'images of {x.dtype}, weights of {", ".join(map(str, dtypes))}'
        return None


def is_channels_last(x):
    return x.is_contiguous(memory_format=torch.channels_last)
