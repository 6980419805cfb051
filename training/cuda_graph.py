"""A training step as one CUDA graph, and the check that it does what the step does."""

import torch

from training.console import UserError
from training.device import ran_out_of_memory

ONE_CLASS = torch.zeros((), dtype=torch.int64)  # the label of an image that has one class


class CudaGraphStep:
    """A step recorded once as a CUDA graph, and launched as a whole for each batch.

    Args:
        step: a function of images and labels, such as `train_step` with all else given.
        state: what the step changes; recording leaves it as it was.
        shapes: of images, [B, C, H, W], the largest first. Each has a graph of its own, in the
            same memory.
        label: a tensor of the shape and type of one image's label.

    Raises:
        UserError: the recording failed. The process can't go on: generators and allocator are
            still in the mode of recording.
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
                    for _ in range(3):  # libraries choose kernels, the optimizer makes its state
                        step(*batch)
                state.optimizer.zero_grad()  # so that recording allocates them in the graph's pool
                for shape, batch in self.batches.items():
                    self.graphs[shape] = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(self.graphs[shape], pool=pool, stream=stream):
                        step(*batch)
        except RuntimeError as error:
            while error.__context__ is not None:  # ending a failed recording raises, too
                error = error.__context__
            if ran_out_of_memory(error):
                raise error
            raise UserError(f'the step can\'t be recorded as a CUDA graph '
                            f'({str(error).splitlines()[0]}): give --no-cuda-graph') from error
        caller.wait_stream(stream)

    def __call__(self, images, labels, batch_size=None):
        """`batch_size` is len(images): with several processes there is no graph."""
        static_images, static_labels = self.batches[images.shape]
        static_images.copy_(images)
        static_labels.copy_(labels)
        self.graphs[images.shape].replay()

    def agrees(self):
        """Whether a replay of each graph changes the state as an eager step does.

        Whatever GPU and libraries this runs on, it has been checked there. Loss, weights and
        running statistics are compared with what a step changes in them: rounding makes two steps
        differ by a hundredth of that or less, a graph that has frozen or forgotten something by
        about all of it. Nothing is changed.
        """
        for batch in self.batches.values():
            eager, replayed = (self._changes(step, batch) for step in (self.step, self))
            if not all((a - b).norm() <= 0.1 * a.norm() for a, b in zip(eager, replayed)):
                return False
        return True

    def _changes(self, step, batch):
        """How a step on random images changes sums, weights and running statistics."""
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
