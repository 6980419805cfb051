"""Testing a model, and the report of `train.py --evaluate` about its errors.

    test = evaluation.evaluate(model, loader, autocast)                # a TestResult
    evaluation.report_errors(model, dataset, device, autocast, args)   # text, CSV files

A confusion matrix is an int64 tensor [C, C] of numbers of images: rows are true classes, columns
predicted ones. `classes` holds the C names, in the order of the labels. The CSV files are in UTF-8,
with undecodable bytes of file names written as they are, and ./ before file names that a
spreadsheet would take for a formula.
"""

import csv
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from training import distributed, flags, image_files, loaders, losses
from training.console import say

MAX_CLASSES = 20  # up to this number the table has all classes
NUM_WORST = 10    # classes in the table if there are more


def at_least_fp32(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def classify(model, images, autocast):
    """Logits [B, classes] of images [B, C, H, W], or means over crops [B, 10, C, H, W]."""
    with autocast:
        logits = at_least_fp32(model(images.flatten(0, -4)))
    return logits if images.dim() == 4 else logits.view(*images.shape[:2], -1).mean(1)


class TestResult(NamedTuple):
    """Errors in percent; the balanced error is the mean over the classes that have images.

    With multi-label data, the error is the mean over the images of the share of their known labels
    that are decided wrongly at a probability of 0.5. The balanced error is the mean over the labels
    of (1 - sensitivity + 1 - specificity) / 2, and there is no top-5 error (NaN).
    """

    loss: float
    error: float
    error5: float
    balanced_error: float
    num_classes: int
    auc: float = math.nan  # mean over the classes, if asked for

    @property
    def has_top5(self):
        return self.num_classes > 5 and not math.isnan(self.error5)


@torch.no_grad()
def evaluate(model, loader, autocast, stop=None, outputs=None, auc=False):
    """The TestResult of a loader's images; the logits of ten crops are averaged.

    Args:
        outputs: a list that gets labels and logits [B, C] of each batch of this process, on the
            CPU.
        auc: compute the area under the ROC curve, too.
    """
    model.eval()
    outputs = [] if auc and outputs is None else outputs
    sums = 0          # of losses, errors and top-5 errors
    per_class = None  # float64 [4, C]: images and errors and, multi-label, those of negative labels
    for images, labels in loader:
        logits = classify(model, images, autocast)
        multi_label = labels.dim() == 2
        loss_sum, _ = losses.choose(multi_label)
        error_counts = _multi_label_counts if multi_label else _error_counts
        counts, errors, errors5 = error_counts(logits, labels)
        sums = sums + torch.stack([loss_sum(logits, labels), errors, errors5])
        per_class = counts if per_class is None else per_class + counts
        if outputs is not None:
            outputs.append((labels.cpu(), logits.cpu()))
        if stop is not None:
            stop.check()
    loss, error, error5 = (value / loader.num_images
                           for value in distributed.all_reduce(sums).tolist())
    counts = distributed.all_reduce(per_class).cpu().double()  # MPS has no float64
    balanced = mean_class_error(counts[1], counts[0])
    if multi_label:
        balanced = 100 * (counts[1::2] / counts[::2]).mean(0).nanmean().item()
    area = mean_auc(*gather(outputs, loader.num_images)) if auc else math.nan
    return TestResult(loss, 100 * error, 100 * error5, balanced, counts.shape[1], area)


def _error_counts(logits, labels):
    """int64 [2, C], images and errors of each class; errors and top-5 errors of all."""
    top = logits.topk(min(5, logits.shape[1])).indices
    is_image, hit = labels != loaders.NO_LABEL, top == labels[:, None]
    counts = labels.new_zeros(2, logits.shape[1])
    counts.index_add_(1, labels.clamp(min=0),
                      torch.stack([is_image, is_image & ~hit[:, 0]]).long())
    return counts, counts[1].sum(), (is_image & ~hit.any(1)).sum()


def _multi_label_counts(logits, labels):
    """int64 [4, C]: of the positive labels of each class number and errors, of the negative too."""
    positive, negative, decided = labels == 1, labels == 0, logits > 0
    counts = torch.stack([positive, positive & ~decided, negative, negative & decided]).sum(1)
    errors = losses.multi_label_errors(logits, labels)
    return counts, errors, torch.full_like(errors, math.nan)


def gather(outputs, num_images):
    """Labels and logits of all images, in their order, from the `outputs` of all processes."""
    shards = zip(*distributed.all_gather(outputs))  # of each batch
    labels, logits = map(torch.cat, zip(*(shard for batch in shards for shard in batch)))
    return labels[:num_images], logits[:num_images]  # those without a label are the last


def mean_auc(labels, logits):
    """The mean over the classes of the area under the ROC curve, one class against the others.

    Shapes: labels int64 [N] or float [N, C] of 0, 1 and NaN (unknown); logits [N, C]. A class
    without positive or without negative labels does not count; NaN if there is no other.
    """
    scores = logits if labels.dim() == 2 else logits.softmax(1)
    truth = labels if labels.dim() == 2 else F.one_hot(labels, logits.shape[1])
    areas = [roc_auc(scores[known, c], truth[known, c])
             for c, known in enumerate(~truth.isnan().T)]
    return torch.tensor(areas, dtype=torch.float64).nanmean().item()


def report_errors(model, dataset, device, autocast, args):
    """Print loss and errors on the test images; write predictions.csv and confusion.csv.

    Returns the directory of the two files (of ranks above 0: None).
    """
    loader = loaders.make_loader(dataset, 'test', args.batch_size, device=device,
                                 workers=args.workers, ten_crop=args.ten_crop,
                                 shard=(distributed.rank(), distributed.world_size()))
    outputs = []
    test = evaluate(model, loader, autocast, outputs=outputs)
    labels, logits = gather(outputs, loader.num_images)
    if distributed.rank() > 0:
        return None
    top5 = f', top-5 error {test.error5:.2f}%' if test.has_top5 else ''
    say(f'test loss {test.loss:.4f}, error {test.error:.2f}%{top5}')
    probabilities = logits.softmax(1)
    count = len(dataset.classes)
    confusion = (labels * count + probabilities.argmax(1)).bincount(minlength=count**2)
    confusion = confusion.view(count, count)
    say('\n'.join(lines(confusion, dataset.classes, probabilities[:, -1], labels)))
    directory = flags.run_directory(args)
    directory.mkdir(parents=True, exist_ok=True)
    save_predictions(directory / 'predictions.csv', loader.files, labels, probabilities,
                     dataset.classes)
    save_confusion(directory / 'confusion.csv', confusion, dataset.classes)
    return directory


def mean_class_error(errors, images):
    """Mean over the classes of their errors, in percent; classes without images do not count."""
    return 100 * (errors / images).nanmean().item()


def balanced_error(confusion):
    counts = confusion.cpu().double()  # MPS has no float64
    images = counts.sum(1)
    return mean_class_error(images - counts.diagonal(), images)


def lines(confusion, classes, scores=None, labels=None):
    """The report as a list of lines: a table of the classes, balanced error, ROC AUC.

    The table has the images, recall and precision of each class, or of the NUM_WORST classes with
    the lowest recall if there are more than MAX_CLASSES. '-' is an undefined value, such as the
    precision of a class that was never predicted.

    Args:
        scores: float [N], probabilities of the second of two classes, for the ROC AUC.
        labels: int64 [N], the true classes of the same images.
    """
    counts = confusion.cpu().double()
    images = counts.sum(1)
    recall, precision = (100 * counts.diagonal() / whole for whole in (images, counts.sum(0)))
    output, listed = [], list(range(len(classes)))
    if len(classes) > MAX_CLASSES:
        output = [f'the {NUM_WORST} of {len(classes)} classes with the lowest recall:']
        listed = recall.argsort(stable=True)[:NUM_WORST].tolist()  # nan (no images) comes last
    width = max(len('class'), *(len(classes[label]) for label in listed))
    output.append(f'{"class":<{width}}   images  recall %  precision %')
    for label in listed:
        shares = [f'{share:.2f}'.replace('nan', '-') for share in (recall[label], precision[label])]
        output.append(f'{classes[label]:<{width}}  {images[label]:>7.0f}  {shares[0]:>8}  '
                      f'{shares[1]:>11}')
    output.append(f'balanced error {balanced_error(confusion):.2f}% '
                  f'(the mean over classes of the share of errors)')
    if len(classes) == 2 and scores is not None:
        output.append(f'ROC AUC {roc_auc(scores, labels):.4f}'.replace('nan', '-'))
    return output


def roc_auc(scores, labels):
    """Area under the ROC curve of scores [N] for class 1; nan if a class has no images."""
    from sklearn.metrics import roc_auc_score  # slow to import

    if labels.unique().numel() < 2:
        return math.nan
    return roc_auc_score(labels.cpu().numpy(), scores.cpu().numpy())


def save_predictions(path, files, labels, probabilities, classes):
    """Writes a CSV file with one row per image: its class and the three most probable ones.

    Args:
        files: names of N images.
        labels: int64 [N].
        probabilities: float32 [N, C].
    """
    shares, found = (part.tolist() for part in probabilities.topk(min(3, len(classes))))
    columns = ['predicted', 'probability', 'second', 'second_probability', 'third',
               'third_probability'][:2 * len(classes)]
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.writer(file)  # see save_confusion
        writer.writerow(['file', 'class', 'error', *columns])
        for i, (name, label) in enumerate(zip(files, labels.tolist(), strict=True)):
            row = [image_files.no_formula(name), classes[label], int(found[i][0] != label)]
            for other, share in zip(found[i], shares[i]):
                row += [classes[other], f'{share:.6f}']
            writer.writerow(row)


def save_confusion(path, confusion, classes):
    """Writes a CSV file with the class names in the header and at the start of each row."""
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.writer(file)  # lines end in \r\n, so that it quotes both in names
        writer.writerow(['true / predicted', *classes])
        writer.writerows([name, *row] for name, row in zip(classes, confusion.tolist()))
