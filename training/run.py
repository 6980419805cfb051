"""One training run: its directory, log, checkpoints, and stop signals.

    with Run(args, stop) as run:
        run.start(state, dataset, train_loader, eval_loader, precision, step)
        for images, labels in run.batches(train_loader):
            step(images, labels)
            run.after_step(batch_size, lr)  # over all ranks
        run.after_epoch(evaluate(...))
        run.finish()
"""

import contextlib
import math
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch

from training import checkpoint, datasets, distributed, evaluation, flags, networks, runlog
from training.console import UserError, say, warn
from training.cuda_graph import CudaGraphStep
from training.distributed import Stopped


class Run:
    """A training run. Each rank has a Run, and rank 0 writes the files.

    The context locks the run directory. When a signal stops the run, leaving the context saves a
    checkpoint and exits with 128 + the signal number.

    Raises:
        UserError: the directory is in use or holds another run; a loss or weight is not finite.
        OSError: a file can't be written. Files saved before are complete.
    """

    def __init__(self, args, stop):
        self.args, self.stop = args, stop
        self.directory = flags.run_directory(args)
        self.resumed = Path(args.resume).resolve() if args.resume else None
        self.log, self.lock = None, contextlib.ExitStack()

    def __enter__(self):
        if distributed.rank() == 0:
            resumed_here = self.resumed and self.resumed.parent == self.directory.resolve()
            self.lock.enter_context(runlog.lock_directory(
                self.directory, exist_ok=resumed_here or self.args.overwrite))
        return self

    def __exit__(self, kind, error, traceback):
        with self.lock:
            try:
                if kind is Stopped:
                    self._save_and_exit(error)
            finally:
                if self.log:
                    self.log.close()

    def _save_and_exit(self, stopped):
        if self.log:
            self.log.sync()
        self.save('latest.pth', keep_previous=True)
        say(f'{stopped}: saved in epoch {self.state.epoch} after step {self.state.step}; --resume '
            f'continues from {self.directory / "latest.pth"}')
        sys.exit(128 + stopped.signum)

    def start(self, state, dataset, train_loader, eval_loader, precision, step):
        """Write args.json and start the log; from now on, a stop signal saves a checkpoint.

        With --overwrite, the old run is deleted here, after all that can be wrong with the flags
        and the images.
        """
        args, device = self.args, state.sums.device
        by_class = args.best_by == 'auc' or dataset.multi_label and args.best_by == 'balanced-error'
        if by_class and not evaluation.has_auc(eval_loader.all_labels):
            raise UserError(f'--best-by {args.best_by} is undefined for the '
                            f'{dataset.selection_split} images: no class has images both with and '
                            f'without it; --best-by loss needs none')
        if args.overwrite and distributed.rank() == 0:
            runlog.clear(self.directory)
        self.state, self.dataset, self.loader = state, dataset, train_loader
        self.split = dataset.selection_split  # chooses best.pth
        self.with_auc = dataset.multi_label or args.best_by == 'auc'
        self.digests = checkpoint.digests(train_loader, eval_loader)
        self.started = time.monotonic() - state.seconds
        self.first_epoch = state.epoch
        self.cpu_kernels = networks.cpu_kernels(state.model, device, precision)
        has_best = distributed.from_rank_0((self.directory / 'best.pth').exists)
        if self.resumed and not has_best and state.best_epoch:
            if state.epoch <= args.epochs:
                state.reset_best()
            if distributed.rank() == 0:
                warn(f'{self.directory} has no best.pth: '
                     + ('it is chosen anew' if state.epoch <= args.epochs else
                        'copy it from where the run has been'))
        latest = self.directory.resolve() / 'latest.pth'
        if self.resumed != latest or args.start_epoch:
            # For --resume, even if the run is killed in the first epoch. If latest.pth is damaged
            # and latest.pth.1 was resumed, that one is kept.
            self.save('latest.pth', keep_previous=self.resumed != Path(f'{latest}.1'))
        hardware = torch.cuda.get_device_name() if device.type == 'cuda' else device.type
        graphed = isinstance(step, CudaGraphStep)
        processes = distributed.world_size()
        if distributed.rank() == 0:
            runlog.write_record(
                self.directory, args, precision=precision, cuda_graph=graphed,
                cpu_kernels=self.cpu_kernels, not_fused=state.model.not_fused,
                selection_split=self.split, device=hardware, processes=processes,
                threads=torch.get_num_threads())
            self.log = runlog.RunLog(
                self.directory, steps_per_epoch=len(train_loader), epochs=args.epochs,
                start=(state.epoch, state.step), tensorboard=args.tensorboard, figures=args.plot,
                split=self.split, auc=self.with_auc)
        say(f'{networks.name(args)}: {sum(p.numel() for p in state.model.parameters()):,} '
            f'parameters; {self._describe_data(eval_loader.num_images)}; '
            f'{f"{processes} x " if processes > 1 else ""}{hardware}, {precision}'
            f'{", CUDA graph" if graphed else ""}')
        if args.pretrained is not None:
            say(f'fine-tuning for {args.epochs} epochs from a learning rate of {args.lr:g}, '
                f'{args.lr_schedule}')

    def _describe_data(self, num_eval_images):
        args, dataset = self.args, self.dataset
        values = ''
        if dataset.value_range:
            values = ' with values from {:g} to {:g}'.format(*dataset.value_range)
        if args.in_channels not in (1, 3):
            values += f', {args.in_channels} channels'
            if args.mean is None:
                values += ', normalised with repeated ImageNet statistics'
        return (f'{dataset.name}: {self.loader.num_images:,} training and {num_eval_images:,} '
                f'{self.split} images of {datasets.show_size(dataset.image_size)} pixels{values}, '
                f'{len(dataset.classes)} {"labels" if dataset.multi_label else "classes"}')

    def out_of_patience(self):
        """True, with a message, if the last --patience epochs have brought no improvement."""
        state, patience = self.state, self.args.patience
        since = state.best_epoch or self.first_epoch - 1  # best_epoch is 0 after a reset
        if patience is None or state.epoch - 1 - since < patience:
            return False
        say(f'no improvement for {state.epoch - 1 - since} epochs: --patience {patience} ends the '
            f'run')
        return True

    def batches(self, loader):
        """The remaining batches of an epoch."""
        if self.log is None:
            return loader
        self.log.start_epoch(self.state.epoch, self.state.step)
        return self.log.watch(loader)

    def after_step(self, num_images, lr):
        """Count a step of `num_images`, over all ranks; every --print-freq steps, log a row.

        Raises:
            Stopped: a signal arrived.
        """
        state = self.state
        state.count_step(num_images)
        if self.log:
            self.log.advance(num_images)
        if state.step % self.args.print_freq == 0 or state.step == len(self.loader):
            loss, error = self.interval_means()
            if self.log:
                self.log.train_row(loss, error, lr)
        self.stop.check()

    def interval_means(self):
        """Mean loss and error (percent) since the last row of train.csv. GPU sync."""
        state = self.state
        loss, errors = map(sum, zip(*distributed.all_gather(state.sums.tolist())))
        if not math.isfinite(loss):
            first = state.step - (state.step - 1) % self.args.print_freq
            raise self._not_finite(f'the loss of steps {first} to {state.step}')
        images = state.interval_images
        state.epoch_sums = tuple(map(sum, zip(state.epoch_sums, (loss, errors, images))))
        state.begin_interval()
        return loss / images, 100 * errors / images

    def after_epoch(self, test):
        """Log an epoch's evaluation.TestResult; save latest.pth and, if improved, best.pth."""
        state = self.state
        if not math.isfinite(test.loss):
            raise self._not_finite(f'the {self.split} loss')
        state.last_error = test.error
        best_by = self.args.best_by
        score = -test.auc if best_by == 'auc' else getattr(test, best_by.replace('-', '_'))
        improved = score < state.best_score
        if improved:
            state.best_score, state.best_error, state.best_epoch = score, test.error, state.epoch
        if self.log:
            loss, errors, images = state.epoch_sums
            self.log.end_epoch((loss / images, 100 * errors / images), test, self._best_so_far())
        state.begin_epoch(state.epoch + 1)  # the checkpoints resume in the next epoch
        if improved:
            self.save('best.pth')
        if self.log:
            self.log.sync()
        self.save('latest.pth', keep_previous=True)

    def save(self, name, keep_previous=False):
        """Save a checkpoint of all ranks; raises UserError if a value is not finite."""
        state = self.state
        state.seconds = time.monotonic() - self.started
        state.peak_memory = max(state.peak_memory, torch.cuda.max_memory_allocated())
        rank_states = distributed.all_gather(state.rank_state())
        if distributed.rank() > 0:
            return
        if not all(each['interval'].isfinite().all() for each in rank_states):
            raise self._not_finite('the loss')
        if checkpoint.first_not_finite(state.model):
            raise self._not_finite('a weight')
        checkpoint.save(self.directory / name, {
            **state.state_dict(rank_states), 'args': vars(self.args),
            'num_images': self.loader.num_images, 'digests': self.digests,
            'dataset': self.dataset.plain(), 'cpu_kernels': self.cpu_kernels,
            'config': state.model.config,
        }, keep_previous)

    def finish(self):
        """Draw the last figures, and print the final and best results."""
        if self.log:
            self.log.end_run()
        state = self.state
        used = str(timedelta(seconds=round(state.seconds)))
        if state.peak_memory:
            used += f' with at most {state.peak_memory / 2**30:.2f} GiB on the GPU'
        which = '' if self.split == 'test' else f'{self.split} '
        say(f'final {which}error {state.last_error:.2f}% (epoch {state.epoch - 1}), '
            f'{self._best_so_far()}, chosen on the {self.split} images, after {used}; everything '
            f'is in {self.directory}')

    def _best_so_far(self):
        state, best_by = self.state, self.args.best_by
        by = '' if best_by == 'error' else f', by the {best_by} of {abs(state.best_score):.4g}'
        return f'best {state.best_error:.2f}%{by} (epoch {state.best_epoch})'

    def _not_finite(self, what):
        state = self.state
        name = checkpoint.first_not_finite(state.model)
        culprit = f', and the first bad parameter is {name}' if name else ''
        if state.epoch == 1 and state.step == 0:
            return UserError(f'{what} is not finite before the first step{culprit}')
        return UserError(f'{what} in epoch {state.epoch} is not finite{culprit}: try a lower --lr; '
                         f'the last checkpoint is unchanged')
