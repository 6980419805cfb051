"""Exponential moving averages of the weights, which are tested and saved instead of the weights.

    averages = WeightAverages(model, decay=0.999)
    averages.update()           # after each step
    with averages.in_use():     # the model has the averages
        evaluate(model, ...)
"""

import contextlib

import torch


class WeightAverages:
    """Averages of a model's parameters and running statistics, on its device.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that early weights lose their
    influence even in short runs.
    """

    def __init__(self, model, decay):
        self.model, self.decay, self.updates = model, decay, 0
        self.tensors = [tensor for tensor in model.state_dict().values()
                        if tensor.is_floating_point()]
        self.averages = [tensor.clone() for tensor in self.tensors]

    @torch.no_grad()
    def update(self):
        """Update the averages after a step. No GPU sync."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.averages, self.tensors, 1 - decay)

    @contextlib.contextmanager
    def in_use(self):
        """A context in which the model has the averages, in place of its weights."""
        weights = [tensor.clone() for tensor in self.tensors]
        self._set(self.averages)
        try:
            yield
        finally:
            self._set(weights)

    @torch.no_grad()
    def _set(self, values):
        torch._foreach_copy_(self.tensors, values)

    def state_dict(self):
        """The model's state dict with the averages instead of the weights."""
        state = self.model.state_dict()
        names = [name for name, tensor in state.items() if tensor.is_floating_point()]
        return {**state, **dict(zip(names, self.averages))}

    @torch.no_grad()
    def load(self, state_dict, updates):
        self.updates = updates
        values = [value for value in state_dict.values() if value.is_floating_point()]
        torch._foreach_copy_(self.averages, values)
