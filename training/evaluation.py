"""Test a model, and the report of `train.py --evaluate`.

    test = evaluation.evaluate(model, loader, autocast)         # a TestResult
    evaluation.report(model, dataset, device, autocast, args)   # text, and the files of
                                                                # predictions.py
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from training import (
    distributed,
    flags,
    image_files,
    image_transforms,
    loaders,
    losses,
    metrics,
    predictions,
    report_text,
)
from training.console import say
from training.files import escape_formula, write_json
from training.predictions import Predictions

MAX_MISTAKES = 24  # pictures of the most confident mistakes


def at_least_fp32(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def classify(model, images, autocast):
    """Logits [B, classes] of images [B, C, H, W], or means over crops [B, 10, C, H, W]."""
    with autocast:
        logits = at_least_fp32(model(images.flatten(0, -4)))
    return logits if images.dim() == 4 else logits.view(*images.shape[:2], -1).mean(1)


class TestResult(NamedTuple):
    """Loss, and errors in percent; the balanced error is the mean over classes with images.

    For multi-label data, the error is the share of an image's known labels that are wrong at a
    threshold of p = 0.5, averaged over images. The balanced error is the mean over labels of
    (1 - sensitivity + 1 - specificity) / 2, and there is no top-5 error (NaN).
    """

    loss: float
    error: float
    error5: float
    balanced_error: float
    num_classes: int
    auc: float = math.nan  # mean over the classes, if requested

    @property
    def has_top5(self):
        return self.num_classes > 5 and not math.isnan(self.error5)


@torch.no_grad()
def evaluate(model, loader, autocast, stop=None, outputs=None, auc=False):
    """The TestResult of a loader's images; the logits of ten crops are averaged.

    Args:
        outputs: a list to which (labels, logits [B, C]) of each batch of this rank are appended, on
            the CPU.
        auc: also compute the area under the ROC curve.
    """
    model.eval()
    outputs = [] if auc and outputs is None else outputs
    sums = 0          # of losses, errors and top-5 errors
    per_class = None  # int64 [2 or 4, C], of _error_counts or _multi_label_counts
    for images, labels in loader:
        logits = classify(model, images, autocast)
        multi_label = labels.dim() == 2
        loss_sum, _ = losses.for_task(multi_label)
        error_counts = _multi_label_counts if multi_label else _error_counts
        counts, errors, errors5 = error_counts(logits, labels)
        sums = sums + torch.stack([loss_sum(logits, labels), errors, errors5])
        per_class = counts if per_class is None else per_class + counts
        if outputs is not None:
            outputs.append((labels.cpu(), logits.float().cpu()))
        if stop is not None:
            stop.check()
    loss, error, error5 = (value / loader.num_images
                           for value in distributed.all_reduce(sums).tolist())
    counts = distributed.all_reduce(per_class).cpu().double()  # MPS has no float64
    balanced = 100 * (counts[1::2] / counts[::2]).mean(0).nanmean().item()
    area = mean_auc(*gather(outputs, loader.num_images)) if auc else math.nan
    return TestResult(loss, 100 * error, 100 * error5, balanced, counts.shape[1], area)


def _error_counts(logits, labels):
    """int64 [2, C], the number of images and errors per class; total errors and top-5 errors."""
    top = logits.topk(min(5, logits.shape[1])).indices
    is_image, hit = labels != loaders.NO_LABEL, top == labels[:, None]
    counts = labels.new_zeros(2, logits.shape[1])
    counts.index_add_(1, labels.clamp(min=0),
                      torch.stack([is_image, is_image & ~hit[:, 0]]).long())
    return counts, counts[1].sum(), (is_image & ~hit.any(1)).sum()


def _multi_label_counts(logits, labels):
    """int64 [4, C], per class: positive labels, errors in them, negative labels, errors in them.

    Also the sum of the images' errors, and NaN for top-5 errors.
    """
    positive, negative, decided = labels == 1, labels == 0, logits >= 0
    counts = torch.stack([positive, positive & ~decided, negative, negative & decided]).sum(1)
    errors = losses.multi_label_errors(logits, labels)
    return counts, errors, torch.full_like(errors, math.nan)


def gather(outputs, num_images):
    """Labels and logits of all images, in order, from the `outputs` of all ranks."""
    shards = zip(*distributed.all_gather(outputs))  # for each batch
    labels, logits = map(torch.cat, zip(*(shard for batch in shards for shard in batch)))
    return labels[:num_images], logits[:num_images]  # images without a label come last


def has_auc(labels):
    """True if the area under the ROC curve is defined for some class; labels as in `mean_auc`."""
    if labels.dim() == 1:
        return len(labels.unique()) > 1
    return ((labels == 1).any(0) & (labels == 0).any(0)).any().item()


def mean_auc(labels, logits):
    """The area under the ROC curve, one class against the others, averaged over classes.

    Classes without positive or without negative labels are left out; NaN if no other is left.

    Shapes: labels int64 [N] or float [N, C] of 0, 1 and NaN (unknown); logits [N, C].
    """
    result = Predictions(labels.numpy(), logits.numpy(), range(logits.shape[1]))
    scores, ones = metrics.log_odds(result.logits, result.multi_label), np.ones((len(labels), 1))
    areas = [metrics.rank_metrics(*columns, ones)[0] for columns in zip(scores.T, result.truth.T)]
    return metrics.mean_over_classes(np.stack(areas)).item()


# ---- report -------------------------------------------------------------------------------

class SplitResult(NamedTuple):
    """The results of a model on a split."""

    loader: object
    test: TestResult
    predictions: Predictions


def report(model, dataset, device, autocast, args, source):
    """Test the model of `source`: print the metrics, and write the files of predictions.py.

    If there is a validation split that chose best.pth, thresholds and temperature are fitted on it.
    Returns the directory of the files (None on ranks above 0).
    """
    splits = ['test', 'val'] if dataset.selection_split == 'val' else ['test']
    results = {split: evaluate_split(model, dataset, split, device, autocast, args)
               for split in splits}
    if distributed.rank() > 0:
        return None
    directory = flags.run_directory(args)
    directory.mkdir(parents=True, exist_ok=True)
    write_report(results, dataset, directory, source)
    return directory


def write_report(results, dataset, directory, source):
    """Print and write the metrics of `results`, {'test': SplitResult} and perhaps 'val'.

    `source` says which model this is: in a run that went on, best.pth may now be another one.
    """
    multi_label = results['test'].predictions.multi_label
    chosen = choose_on_val(results['val'].predictions) if 'val' in results else {}
    record = {
        'model': source,
        'data': f'{dataset.name} in {dataset.labels_file or dataset.root}',
        'multi_label': multi_label,
        'threshold_rule': 'youden' if chosen else '0.5' if multi_label else 'argmax',
        'temperature': chosen.get('temperature'),
        'intervals': {'level': metrics.LEVEL, 'resamples': metrics.RESAMPLES, 'seed': 0},
        'splits': {split: summarize(result, **chosen) for split, result in results.items()}}
    for split, summary in reversed(record['splits'].items()):
        say('\n'.join(report_text.lines(split, summary, record)))
        save_split(directory, split, results[split])
    save_mistakes(directory / 'mistakes.npz', results['test'], dataset, chosen.get('thresholds'))
    write_json(directory / 'metrics.json', record)


def evaluate_split(model, dataset, split, device, autocast, args):
    loader = loaders.make_loader(dataset, split, args.batch_size, device=device,
                                 workers=flags.num_workers(args), ten_crop=args.ten_crop,
                                 shard=(distributed.rank(), distributed.world_size()))
    outputs = []
    test = evaluate(model, loader, autocast, outputs=outputs)
    labels, logits = gather(outputs, loader.num_images)
    return SplitResult(loader, test, Predictions(labels.numpy(), logits.numpy(), dataset.classes))


def choose_on_val(val):
    """Thresholds and temperature for `metrics.summarize`, fitted on the validation images."""
    scores = metrics.log_odds(val.logits, val.multi_label)
    return {'thresholds': metrics.youden_thresholds(scores, val.truth),
            'temperature': metrics.fit_temperature(val.truth, val.logits, val.multi_label)}


def summarize(result, **chosen):
    """The metrics of a SplitResult, as in metrics.json."""
    loader, test, found = result
    summary = {'loss': test.loss, 'error': test.error}
    if test.has_top5:
        summary['error5'] = test.error5
    return summary | metrics.summarize(found.truth, found.logits, found.classes, found.multi_label,
                                       groups=loader.groups, **chosen)


def save_split(directory, split, result):
    """Write predictions.csv and, for single-label test images, confusion.csv."""
    loader, _, found = result
    files = [escape_formula(name) for name in loader.files]
    predictions.save_predictions(directory, split, files, found, loader.groups)
    if split == 'test' and not found.multi_label:
        count = len(found.classes)
        pairs = found.labels * count + found.logits.argmax(1)
        confusion = np.bincount(pairs, minlength=count**2).reshape(count, count)
        predictions.save_confusion(directory / 'confusion.csv', confusion, found.classes)


# ---- mistakes -----------------------------------------------------------------------------

def save_mistakes(path, result, dataset, thresholds=None):
    """Write the most confident mistakes with their pictures, uint8 [M, H, W, C], as .npz."""
    loader, _, found = result
    mistakes = predictions.most_confident_mistakes(found, MAX_MISTAKES, thresholds)
    indices, files = mistakes.pop('indices'), loader.files
    np.savez(path, pictures=read_pictures(loader, dataset, indices),
             files=[str(files[i]) for i in indices], **mistakes)


def read_pictures(loader, dataset, indices):
    """The model's input images, not normalized: uint8 [M, H, W, C]."""
    if dataset.in_memory:
        pictures = [loader.images[i] for i in indices]
    else:
        transform, files = image_transforms.test_transform(dataset), loader.files
        pictures = [image_files.read_pixels(dataset, transform, files[i]) for i in indices]
    if not pictures:
        return np.zeros((0, 1, 1, 1), np.uint8)
    pictures = torch.stack(pictures).cpu().float().clamp(0, 255).round().byte()
    return pictures.permute(0, 2, 3, 1).numpy()
