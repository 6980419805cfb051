"""Train a DenseNet on CIFAR-10, CIFAR-100, SVHN, ImageNet, a folder of images, or drawn shapes.

    python train.py                                          # the paper's DenseNet-BC-100-12, C10+
    python train.py --depth 40 --no-bottleneck --compression 1 --name densenet-40-12
    python train.py --name densenet-40-12 --resume           # continue where it stopped
    python train.py --dataset imagenet --data /imagenet --arch densenet121 --workers 16
    torchrun --nproc-per-node 4 train.py --dataset imagenet --data /imagenet --arch densenet121
    python train.py --evaluate --resume work/densenet-40-12/best.pth

A run writes args.json, train.csv, test.csv, latest.pth, best.pth and its figures into its
directory, work/<name>. The defaults are the paper's: https://arxiv.org/abs/1608.06993, section 4.2.
"""

import argparse
import sys

from training import console, flags

if __name__ == '__main__':  # --help and wrong flags answer before torch is imported
    console.exit_on_user_error(flags.parse, 'train.py')

import functools
import math
import signal
import warnings

import torch

from training import (
    checkpoint,
    datasets,
    distributed,
    evaluation,
    image_files,
    loaders,
    losses,
    networks,
    weights,
)
from training.augmentation import Augmentation
from training.averages import WeightAverages
from training.console import BadImages, DataError, UserError, say
from training.cuda_graph import ONE_CLASS, CudaGraphStep
from training.device import (
    choose_device,
    choose_precision,
    keep_freed_memory,
    make_autocast,
    set_determinism,
)
from training.distributed import StopSignals
from training.errors import explanation
from training.evaluation import at_least_fp32, evaluate
from training.run import Run
from training.train_state import TrainState, initialize_optimizer

# ---- build: optimizer, learning rate ---------------------------------------------------------

def prepare_model(model, args, device):
    """Freeze parameters according to the flags, fuse the dense blocks, and move to the device.

    Sets `model.not_fused` to the reason why they are not fused, or None.
    """
    if args.freeze_features:
        model.features.requires_grad_(False)
    if args.freeze_norm:
        for norm in norms(model):
            norm.requires_grad_(False)
    model.not_fused = 'compiled' if args.compile else networks.fuse(model, device)
    if args.compile and device.type == 'cpu' and distributed.rank() == 0:
        console.warn('with --compile, dense blocks run without fuse and its CPU kernels, in more '
                     'memory')
    # Convolutions are faster in channels_last, also on CPUs, and activations get the weights'
    # layout. MPS is untested, so it keeps the default.
    layout = torch.contiguous_format if device.type == 'mps' else torch.channels_last
    return model.to(device, memory_format=layout)


def set_training_mode(model, args):
    model.train()
    if args.freeze_features:  # neither their weights nor their running statistics change
        model.features.eval()
    if args.freeze_norm:
        for norm in norms(model):
            norm.eval()


def norms(model):
    return [module for module in model.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def make_optimizer(args, model):
    """To add an optimizer, add a branch here, and its learning rate to flags.LEARNING_RATES."""
    parameters = parameter_groups(args, model)
    first = parameters[0]['params'][0]
    on_cuda = first.is_cuda
    fused = first.device.type in ('cpu', 'cuda')  # one pass over all parameters
    common = dict(lr=args.lr, weight_decay=args.weight_decay)
    if args.optimizer == 'sgd':
        optimizer = torch.optim.SGD(parameters, momentum=args.momentum, fused=fused,
                                    nesterov=args.momentum > 0, **common)
        if args.momentum:
            # torch creates it in the first step, which the fp16 scaler may skip: a CUDA graph
            # captured in that step would have no momentum.
            for group in parameters:
                for parameter in group['params']:
                    optimizer.state[parameter]['momentum_buffer'] = torch.zeros_like(parameter)
    elif args.optimizer == 'rmsprop':
        optimizer = torch.optim.RMSprop(parameters, momentum=args.momentum, capturable=on_cuda,
                                        **common)
    elif args.optimizer == 'adam':
        optimizer = torch.optim.Adam(parameters, fused=fused, capturable=on_cuda, **common)
    elif args.optimizer == 'adamw':
        optimizer = torch.optim.AdamW(parameters, fused=fused, capturable=on_cuda, **common)
    initialize_optimizer(optimizer)
    return optimizer


def parameter_groups(args, model):
    """One group of trainable parameters, or with --head-lr a second one for the classifier.

    A group's learning rate is the schedule's, multiplied by its `lr_scale`.
    """
    groups = [(model.parameters(), 1.0)]
    if args.head_lr is not None:
        groups = [(model.features.parameters(), 1.0),
                  (model.classifier.parameters(), args.head_lr / args.lr)]
    result = []
    for parameters, scale in groups:
        parameters = [parameter for parameter in parameters if parameter.requires_grad]
        # On CUDA the rate is a tensor on the device, so that a CUDA graph reads the current one.
        lr = torch.tensor(args.lr * scale, device=parameters[0].device)
        result.append(dict(params=parameters, lr_scale=scale,
                           lr=lr if lr.is_cuda else args.lr * scale))
    return result


def make_state(args, model, device, precision):
    """A new TrainState; `model` must be on its device."""
    if distributed.rank():  # different dropout on each rank
        torch.manual_seed((args.seed + 1_000_003 * distributed.rank()) % 2**32)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == 'fp16')
    return TrainState(model, make_optimizer(args, model), scaler,
                      sums=torch.zeros(2, device=device),
                      averages=WeightAverages(model, args.ema) if args.ema else None)


def learning_rate(args, epoch, done=0.0):
    """The learning rate in `epoch`, counted from 1, after the fraction `done` of its steps.

    cosine: from --lr to 0 over all epochs.
    multistep: divided by 10 at 50% and 75% of the epochs (of 300: from epochs 150 and 225 on, as in
    the official code), but not before epoch 2. ImageNet: every 30 epochs (from epochs 31, 61, ...
    on, as in the official code). It changes between epochs only.
    In warm-up epochs, either is multiplied by a factor that rises linearly from 0.01 to 1 (Goyal et
    al.: Accurate, Large Minibatch SGD, 2017, section 2.2).
    """
    epochs_done = epoch - 1 + done
    lr = args.lr
    if epochs_done < args.warmup_epochs:
        lr *= 0.01 + 0.99 * epochs_done / args.warmup_epochs
    if args.lr_schedule == 'cosine':
        return lr * (1 + math.cos(math.pi * epochs_done / args.epochs)) / 2
    every = datasets.DATASETS[args.dataset].lr_drop_every
    if every:
        return lr / 10 ** ((epoch - 1) // every)
    drops = args.epochs / 2, args.epochs * 3 / 4
    return lr / 10 ** sum(epoch >= max(2, drop) for drop in drops)


def set_learning_rate(optimizer, lr):
    for group in optimizer.param_groups:
        rate = lr * group.get('lr_scale', 1.0)
        if torch.is_tensor(group['lr']):
            group['lr'].fill_(rate)
        else:
            group['lr'] = rate


def warn_of_new_rate(args, saved_flags, state):
    """Warn if changed flags change the learning rate of a resumed run, or leave no epochs."""
    if distributed.rank():
        return
    if state.epoch > args.epochs:
        console.warn(f'{state.epoch - 1} epochs are done: --epochs {args.epochs} leaves nothing to '
                     f'train')
        return
    names = 'dataset', 'epochs', 'lr', 'lr_schedule', 'warmup_epochs'
    before = argparse.Namespace(**{**vars(args), **{
        name: saved_flags[name] for name in names if saved_flags.get(name) is not None}})
    rates = [learning_rate(f, min(state.epoch, f.epochs)) for f in (before, args)]
    if not math.isclose(*rates):
        console.warn(f'the learning rate is now {rates[1]:g}, and was {rates[0]:g}: it follows '
                     f'--lr, --epochs, --lr-schedule and --warmup-epochs')


# ---- step -----------------------------------------------------------------------------------

def train_step(state, images, labels, batch_size=None, *, autocast, grad_accum=1,
               label_smoothing=0.0, class_weights=None, multi_label=False, forward=None):
    """One optimizer step on a batch of images, float32 [B, C, H, W], and a loader's labels.

    Adds the loss and the number of errors to `state.sums`. No GPU sync, except in fp16 with an
    optimizer that is not fused. With several processes, images and labels are this rank's shard of
    a batch of `batch_size` images, and `forward` is the model wrapped by `distributed.wrap`.
    """
    forward = state.model if forward is None else forward
    loss_sum, error_sum = losses.for_task(multi_label)
    # DDP averages gradients, so divide by the per-rank batch size.
    divisor = batch_size / distributed.world_size() if batch_size else len(images)
    state.optimizer.zero_grad()
    micro_batches = list(zip(images.chunk(grad_accum), labels.chunk(grad_accum)))
    for i, (part, part_labels) in enumerate(micro_batches, start=1):
        with distributed.no_sync(forward, last=i == len(micro_batches)):
            with autocast:
                logits = at_least_fp32(forward(part))
            loss = loss_sum(logits, part_labels, class_weights, label_smoothing)
            state.scaler.scale(loss / divisor).backward()
        state.sums[0].add_(loss.detach())
        state.sums[1].add_(error_sum(logits.detach(), part_labels))
    state.scaler.step(state.optimizer)
    state.scaler.update()


def make_step(args, state, shapes, autocast, class_weights=None, multi_label=False,
              label=ONE_CLASS):
    """The training step, a function of images and labels; as a CUDA graph where possible.

    Args:
        shapes: of a full and of the last batch, [B, C, H, W].
        class_weights: float32 [classes] on the device, or None.
        label: a tensor with the shape and dtype of one image's label.

    Raises:
        UserError: as in `CudaGraphStep`.
    """
    step = functools.partial(
        train_step, state, autocast=autocast, grad_accum=args.grad_accum,
        label_smoothing=args.label_smoothing, class_weights=class_weights,
        multi_label=multi_label, forward=distributed.wrap(state.model))
    if distributed.world_size() > 1:
        warm_up_ddp(step, state, shapes[0], label)
    device = state.sums.device.type
    if args.cuda_graph is False or (args.cuda_graph is None and device != 'cuda'):
        return step
    if device != 'cuda':
        reason = f'the device is {device}'
    elif state.scaler.is_enabled() and not state.optimizer.defaults.get('fused'):
        reason = f'{args.optimizer} with fp16 synchronizes with the GPU in each step'
    elif distributed.world_size() > 1:
        reason = 'several processes exchange gradients'
    else:
        graphed = CudaGraphStep(step, state, shapes, label)
        if graphed.agrees():
            return graphed
        reason = 'its results differ from those of an eager step; please report this'
    say(f'no CUDA graph: {reason}')
    return step


def warm_up_ddp(step, state, shape, label=ONE_CLASS):
    """Take a step and undo it, with batches of `shape`, [B, C, H, W].

    DDP rebuilds its gradient buckets after the first step, which changes the order of summation.
    Without a warm-up, a resumed run would differ from an uninterrupted one in its first step.
    """
    n, *image = shape
    images = torch.zeros(math.ceil(n / distributed.world_size()), *image, device=state.sums.device)
    with state.dry_run():
        step(images, torch.zeros(len(images), *label.shape, dtype=label.dtype,
                                 device=images.device))


# ---- main ------------------------------------------------------------------------------------

def main(argv=None):
    with StopSignals() as stop, distributed.process_group():
        # saved: the checkpoint of --resume, or None
        args, saved = distributed.from_rank_0(
            lambda: checkpoint.with_saved_flags(flags.parse(argv)))
        device = choose_device(args.device)
        precision = choose_precision(args.precision, device)
        autocast = make_autocast(precision, device)
        set_determinism(args.deterministic)
        dataset = distributed.from_rank_0(lambda: checkpoint.describe_data(args, saved))
        args = flags.with_network(args, dataset.image_size)
        build = functools.partial(networks.build, args, len(dataset.classes), dataset.image_size)
        if saved:
            checkpoint.check_fixed_flags(args, saved['args'], flags.MODEL_FLAGS)
            checkpoint.check_network(build, saved['model'], args.resume)
            networks.choose_kernels(saved, precision)
        torch.manual_seed(args.seed)
        model = build()
        if args.pretrained is not None:
            weights.load_pretrained(model, args, dataset)
        elif args.evaluate:
            model.load_state_dict(saved['model'])
        if args.evaluate:
            checkpoint.check_finite(model, args.resume or args.pretrained or args.arch)
        with distributed.rank_0_first():  # compiles the CPU kernels, if they are not in the cache
            model = prepare_model(model, args, device)
            networks.warn_of_slow_bf16(model, device, precision)
        if args.evaluate:
            source = (f'{args.resume}, {checkpoint.progress(saved)}' if saved else
                      args.pretrained or f'torchvision\'s {args.arch}')
            evaluate_and_report(model, dataset, device, autocast, args, source)
            return

        with Run(args, stop) as run:
            train_loader, eval_loader = make_loaders(args, dataset, device)
            stop.deferred = True  # from now on, a signal lets the step end
            state = make_state(args, model, device, precision)
            if saved:
                checkpoint.resume(state, saved, args, train_loader, eval_loader)
                say(f'resuming {args.resume} in epoch {state.epoch} after step {state.step}')
                warn_of_new_rate(args, saved['args'], state)
                networks.warn_of_other_kernels(
                    saved, networks.cpu_kernels(model, device, precision))
            elif args.start_epoch:
                state.begin_epoch(args.start_epoch)
            if args.compile:
                model.compile(dynamic=False)  # once for each batch size, as for CUDA graphs
            set_training_mode(model, args)  # before a CUDA graph is captured
            image = args.in_channels, *datasets.sides(dataset.image_size)
            sizes = args.batch_size, train_loader.num_images % args.batch_size  # full, last batch
            class_weights = None
            if args.class_weights:
                class_weights = losses.balanced_class_weights(
                    train_loader.all_labels, len(dataset.classes)).to(device)
            keep_freed_memory()
            step = make_step(args, state, [(n, *image) for n in sizes if n], autocast,
                             class_weights, dataset.multi_label, train_loader.label)
            run.start(state, dataset, train_loader, eval_loader, precision, step)
            for epoch in range(state.epoch, args.epochs + 1):
                if run.out_of_patience():
                    break
                set_training_mode(model, args)
                train_loader.set_epoch(epoch, start=state.step)  # a resumed run starts mid-epoch
                for images, labels in run.batches(train_loader):
                    lr = learning_rate(args, epoch, state.step / len(train_loader))
                    set_learning_rate(state.optimizer, lr)
                    batch_size = train_loader.images_in(state.step)  # of all processes
                    step(images, labels, batch_size)
                    if state.averages:
                        state.averages.update()
                    run.after_step(batch_size, lr)
                distributed.share_statistics(state)
                with state.tested_weights():
                    result = evaluate(model, eval_loader, autocast, stop, auc=run.with_auc)
                run.after_epoch(result)
            run.finish()
            if dataset.selection_split == 'val':
                stop.deferred = False  # everything is saved
                stop.check()
                evaluate_best(run, model, dataset, device, autocast, args)


def evaluate_and_report(model, dataset, device, autocast, args, source):
    """Test the model of `source`, and write tables and figures into the run directory."""
    directory = evaluation.report(model, dataset, device, autocast, args, source)
    if distributed.rank() == 0:
        import plot  # imports matplotlib, which is slow and which training doesn't need

        plot.save_reports(directory)
        say(f'report.html, metrics.json, predictions.csv and their figures are in {directory}')


def evaluate_best(run, model, dataset, device, autocast, args):
    """Test best.pth, which was chosen on the validation images, on the test images."""
    path = run.directory / 'best.pth'
    best = distributed.from_rank_0(lambda: checkpoint.load(path)['model'])
    model.load_state_dict(best)
    say(f'testing best.pth, of epoch {run.state.best_epoch}, which was chosen on val:')
    evaluate_and_report(model, dataset, device, autocast, args,
                        f'{path}, after epoch {run.state.best_epoch}')


def make_loaders(args, dataset, device):
    """Returns train_loader and eval_loader.

    eval_loader has the images that are evaluated after each epoch and choose best.pth: the
    validation images, or the test images if there are no validation images.
    """
    common = dict(device=device, workers=flags.num_workers(args),
                  shard=(distributed.rank(), distributed.world_size()))
    augmentation = Augmentation.of_flags(args) if args.augment else None
    settings = {'train': dict(batch_size=args.batch_size, augmentation=augmentation,
                              seed=args.seed),
                dataset.selection_split: dict(  # in micro-batches, to need no more memory
                    batch_size=math.ceil(args.batch_size / args.grad_accum),
                    ten_crop=args.ten_crop)}
    result, errors = [], []
    if dataset.selection_split == 'val' and datasets.DATASETS[dataset.name].read is None:
        image_files.list_images(dataset, 'test')  # mistakes in it are an error now, not at the end
    with distributed.rank_0_first():  # downloads the data
        for split, options in settings.items():
            try:
                result.append(loaders.make_loader(dataset, split, **options, **common))
            except BadImages as error:  # go on, to name those of both splits
                errors.append(str(error))
    if errors:
        raise DataError('; '.join(errors))
    return result


def cli(argv=None):
    """Run `main`; user mistakes are one line on stderr and exit code 2."""
    try:
        main(argv)
    except (UserError, OSError, EOFError, RuntimeError, MemoryError) as error:
        if hasattr(signal, 'SIGCHLD'):  # torch's handler would raise for each worker that exits now
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        message = explanation(error, 'give --memory-efficient, a lower --batch-size, a higher '
                              '--grad-accum, --precision bf16, fewer --workers, smaller images '
                              'or a smaller network')
        if message is None:
            raise
        rank = distributed.rank()
        console.warn(f'rank {rank}: {message}' if rank else message, 'error')
        distributed.exit_now(1 if distributed.lost_a_peer(error) else 2)


if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        sys.stdout.reconfigure(errors='backslashreplace')  # class names may not be valid UTF-8
    warnings.showwarning = lambda message, *_: console.warn(message)
    cli()
