"""A training step as one CUDA graph, and a check that its results are those of an eager step."""

import torch

from training.console import UserError
from training.device import ran_out_of_memory

ONE_CLASS = torch.zeros((), dtype=torch.int64)  # a single-label image's label


class CudaGraphStep:
    """A step captured once as a CUDA graph, and replayed for each batch.

    Args:
        step: a function of images and labels, such as a partial of `train_step`.
        state: the TrainState that the step changes; capturing restores it.
        shapes: of images, [B, C, H, W], the largest first. Each has its own graph; the graphs share
            a memory pool.
        label: a tensor with the shape and dtype of one image's label.

    Raises:
        UserError: the capture failed. The process can't continue, because generators and allocator
            are still in capture mode.
    """

    def __init__(self, step, state, shapes, label=ONE_CLASS):
        device = state.sums.device
        self.step, self.state = step, state
        self.batches = {shape: (torch.zeros(shape, device=device),
                                torch.zeros(shape[0], *label.shape, dtype=label.dtype,
                                            device=device))
                        for shape in shapes}
        self.graphs, pool = {}, torch.cuda.graph_pool_handle()
        stream, caller = torch.cuda.Stream(), torch.cuda.current_stream()
        stream.wait_stream(caller)
        try:
            with torch.cuda.stream(stream), state.dry_run():
                for batch in self.batches.values():
                    for _ in range(3):  # warm-up: libraries choose kernels
                        step(*batch)
                state.optimizer.zero_grad()  # so that capturing allocates gradients in the pool
                for shape, batch in self.batches.items():
                    self.graphs[shape] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graphs[shape], pool=pool, stream=stream):
                        step(*batch)
        except RuntimeError as error:
            while error.__context__ is not None:  # ending a failed capture raises again
                error = error.__context__
            if ran_out_of_memory(error):
                raise error
            raise UserError(f'the step can\'t be captured as a CUDA graph '
                            f'({str(error).splitlines()[0]}): give --no-cuda-graph') from error
        caller.wait_stream(stream)

    def __call__(self, images, labels, batch_size=None):
        """`batch_size` is len(images), because there are no graphs with several ranks."""
        static_images, static_labels = self.batches[images.shape]
        static_images.copy_(images)
        static_labels.copy_(labels)
        self.graphs[images.shape].replay()

    def agrees(self):
        """True if a replay of each graph changes the state like an eager step.

        Compares the changes of loss, weights and running statistics: rounding makes them differ by
        1% or less, and an operation missing from the graph by about 100%. Restores the state.
        """
        for batch in self.batches.values():
            eager, replayed = (self._changes(step, batch) for step in (self.step, self))
            if not all((a - b).norm() <= 0.1 * a.norm() for a, b in zip(eager, replayed)):
                return False
        return True

    def _changes(self, step, batch):
        """The changes of sums, weights and running statistics by a step on random images."""
        model = self.state.model
        groups = ([self.state.sums], list(model.parameters()),
                  [buffer for buffer in model.buffers() if buffer.is_floating_point()])

        def values():
            return [torch.cat([tensor.detach().flatten() for tensor in group]) for group in groups]

        with self.state.dry_run():
            batch[0].normal_()
            before = values()
            step(*batch)
            return [after - value for after, value in zip(values(), before)]
