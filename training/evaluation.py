"""What a trained model gets wrong on its test images: the report of `train.py --evaluate`.

    print(*evaluation.lines(confusion, classes, scores, labels), sep='\\n')
    evaluation.save_confusion(run / 'confusion.png', confusion, classes)
    evaluation.save_predictions(run / 'predictions.csv', files, labels, probabilities, classes)

A confusion matrix is an int64 tensor [C, C] of numbers of images: rows are the true classes,
columns the predicted ones. `classes` holds the C names, in the order of the labels.
"""

import csv
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from training import distributed, flags, loaders
from training.console import say

# matplotlib and scipy are slow to import, and training needs balanced_error alone: the functions
# that use them import them.

MAX_CLASSES = 20       # that are all in the table, and whose cells have numbers in the figure
NUM_WORST = 10         # classes in the table, if there are more
MAX_TICK_LABELS = 200


def at_least_fp32(logits):
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def count_errors(hit, labels):
    return (~hit & (labels != loaders.NO_LABEL)).sum()


def classify(model, images, autocast):
    """Logits [B, classes] of images [B, C, H, W], or means over crops [B, 10, C, H, W]."""
    with autocast:
        logits = at_least_fp32(model(images.flatten(0, -4)))
    return logits if images.dim() == 4 else logits.view(*images.shape[:2], -1).mean(1)


class TestResult(NamedTuple):
    """Errors in percent; the balanced error is the mean over the classes that have images."""

    loss: float
    error: float
    error5: float
    balanced_error: float
    num_classes: int


@torch.no_grad()
def evaluate(model, loader, autocast, stop=None, outputs=None):
    """The TestResult of a loader's images; the logits of ten crops are averaged.

    `outputs`, a list, gets labels [B] and probabilities [B, C] of each batch.
    """
    model.eval()
    sums = 0         # of losses and of top-5 errors
    per_class = None  # int64 [2, C]: images and errors
    for images, labels in loader:
        logits = classify(model, images, autocast)
        top = logits.topk(min(5, logits.shape[1])).indices
        wrong, is_image = top[:, 0] != labels, labels != loaders.NO_LABEL
        if per_class is None:
            per_class = labels.new_zeros(2, logits.shape[1])
        per_class.index_add_(1, labels.clamp(min=0),
                             torch.stack([is_image, wrong & is_image]).long())
        sums = sums + torch.stack([F.cross_entropy(logits, labels, reduction='sum'),
                                   count_errors((top == labels[:, None]).any(1), labels)])
        if outputs is not None:
            outputs.append((labels.cpu(), logits.softmax(1).cpu()))
        if stop is not None:
            stop.check()
    loss, errors5 = (distributed.all_reduce(sums) / loader.num_images).tolist()
    images, errors = distributed.all_reduce(per_class).cpu().double()  # MPS has no float64
    balanced_error = 100 * (errors / images).nanmean().item()
    return TestResult(loss, 100 * errors.sum().item() / loader.num_images, 100 * errors5,
                      balanced_error, len(images))


def report_errors(model, dataset, device, autocast, args):
    """Print loss and errors on the test images; write confusion.png and predictions.csv."""
    loader = loaders.make_loader(dataset, 'test', args.batch_size, device=device,
                              workers=args.workers, ten_crop=args.ten_crop,
                              shard=(distributed.rank(), distributed.world_size()))
    outputs = []
    test = evaluate(model, loader, autocast, outputs=outputs)
    shards = zip(*distributed.all_gather(outputs))  # of each batch
    labels, probabilities = map(torch.cat, zip(*(shard for batch in shards for shard in batch)))
    if distributed.rank() > 0:
        return
    top5 = f', top-5 error {test.error5:.2f}%' if test.num_classes > 5 else ''
    say(f'test loss {test.loss:.4f}, error {test.error:.2f}%{top5}')
    real = labels != loaders.NO_LABEL
    labels, probabilities = labels[real], probabilities[real]
    count = len(dataset.classes)
    confusion = (labels * count + probabilities.argmax(1)).bincount(minlength=count**2)
    confusion = confusion.view(count, count)
    say('\n'.join(lines(confusion, dataset.classes, probabilities[:, -1], labels)))
    directory = flags.run_directory(args)
    directory.mkdir(parents=True, exist_ok=True)
    save_confusion(directory / 'confusion.png', confusion, dataset.classes)
    save_predictions(directory / 'predictions.csv', loader.files, labels, probabilities,
                            dataset.classes)
    say(f'confusion.png and predictions.csv are in {directory}')


def balanced_error(confusion):
    """Mean over the classes of the share of errors, in percent, as a float.

    Classes without images are left out; if there are no others, it is nan.
    """
    counts = confusion.cpu().double()  # on the CPU, for MPS has no float64
    images = counts.sum(1)
    return 100 * ((images - counts.diagonal()) / images).nanmean().item()


def lines(confusion, classes, scores=None, labels=None):
    """Recall and precision of each class, balanced error and, of two classes, the ROC AUC.

    Args:
        scores: float [N], the probability of the second of two classes; None leaves out the AUC.
        labels: int64 [N], the true classes of the same images.

    Returns the lines to print, a list of strings. '-' is what is undefined: the recall of a class
    without images, the precision of one that was never predicted.
    """
    counts = confusion.cpu().double()
    images = counts.sum(1)
    recall, precision = (100 * counts.diagonal() / whole for whole in (images, counts.sum(0)))
    output, listed = [], list(range(len(classes)))
    if len(classes) > MAX_CLASSES:
        output = [f'the {NUM_WORST} of {len(classes)} classes with the lowest recall:']
        listed = recall.argsort(stable=True)[:NUM_WORST].tolist()  # nan, of no images, comes last
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
    """Probability that an image of class 1 scores higher than one of class 0, ties counted half.

    That is the area under the curve (Hanley and McNeil, Radiology 143, 1982); nan if one of the
    classes has no images.
    """
    from scipy.stats import mannwhitneyu

    first, second = (scores[labels == label].cpu().numpy() for label in (0, 1))
    if not len(first) or not len(second):
        return math.nan
    # By default, an exact p-value for a class of up to 8 images, which can take a minute.
    pairs = mannwhitneyu(second, first, method='asymptotic').statistic
    return pairs / (len(first) * len(second))


def save_predictions(path, files, labels, probabilities, classes):
    """Writes a CSV file with a row an image: its class and the three most probable ones.

    Of N files, with int64 labels [N] and float32 probabilities [N, C]; an error is 0 or 1.
    """
    shares, found = (part.tolist() for part in probabilities.topk(min(3, len(classes))))
    columns = ['predicted', 'probability', 'second', 'second_probability', 'third',
               'third_probability'][:2 * len(classes)]
    # surrogateescape: the name of a file need not be text, and is written byte for byte.
    with open(path, 'w', newline='', encoding='utf-8', errors='surrogateescape') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(['file', 'class', 'error', *columns])
        for i, (name, label) in enumerate(zip(files, labels.tolist(), strict=True)):
            row = [name, classes[label], int(found[i][0] != label)]
            for other, share in zip(found[i], shares[i]):
                row += [classes[other], f'{share:.6f}']
            writer.writerow(row)


# ---- figure -------------------------------------------------------------------------------

def save_confusion(path, confusion, classes):
    """Writes the confusion matrix as a figure, in the format of the path's suffix (a Path)."""
    from plot import save_figure

    save_figure(confusion_figure(confusion, classes), path)


def confusion_figure(confusion, classes):
    """A matplotlib Figure: colours are shares of a row, in percent; numbers are images."""
    from matplotlib import rc_context
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm
    from matplotlib.figure import Figure

    from plot import COLORS, GREY, STYLE

    counts = confusion.cpu().double()
    shares = 100 * counts / counts.sum(1, keepdim=True)  # of no images: nan, drawn grey
    names = [label_text(name) for name in classes] if len(classes) <= MAX_TICK_LABELS else []
    # Inches. Letters are as high as a cell allows, from 6 points (100 classes) to 9 (20).
    side = max(2.5, min(0.5 * len(classes), 8), 0.11 * len(classes)) if names else 11
    cell = side / len(classes)
    font_size = min(9, 72 * cell / 1.3)
    margin = 0.6 + 0.6 * font_size / 72 * max(map(len, names), default=0)
    is_vertical = margin - 0.6 > 0.9 * cell
    colors = LinearSegmentedColormap.from_list('', ['white', COLORS[0]])
    with rc_context({**STYLE, 'axes.grid': False}):
        figure = Figure((side + margin + 1, side + (margin if is_vertical else 0.8)),
                        layout='constrained')
        axes = figure.add_subplot(xlabel='predicted class', ylabel='true class')
        # The square root shows the errors of a good model, which are a few percent of a row.
        image = axes.imshow(shares.numpy(), norm=PowerNorm(0.5, 0, 100), interpolation='nearest',
                            cmap=colors.with_extremes(bad=STYLE['grid.color']))
        ticks = range(len(names))
        style = {'fontsize': font_size, 'parse_math': False}  # a name may have dollars in it
        axes.set_xticks(ticks, names, rotation=90 if is_vertical else 0, **style)
        axes.set_yticks(ticks, names, **style)
        borders = [tick + 0.5 for tick in ticks[:-1]]
        axes.set_xticks(borders, minor=True)
        axes.set_yticks(borders, minor=True)
        axes.grid(which='minor')
        axes.tick_params(which='both', length=0)
        if len(classes) <= MAX_CLASSES:
            digits = len(str(confusion.max().item()))
            number_size = min(9, 72 * 0.9 * cell / (0.64 * digits))
            for (i, j), count in np.ndenumerate(confusion.cpu().numpy()):
                color = 'white' if shares[i, j] > 50 else 'black' if count else GREY
                axes.text(j, i, count, ha='center', va='center', color=color, fontsize=number_size)
        # An inset of the axes, which keep their shape, so that the bar is as high as they are.
        figure.colorbar(image, cax=axes.inset_axes([1 + 0.1 / side, 0, 0.15 / side, 1]),
                        ticks=[0, 1, 5, 10, 20, 40, 60, 80, 100], label='share of the row (%)')
    return figure


def label_text(name):
    """A class's name or, over 40 letters, its ends; bytes that are no text are question marks."""
    name = name.encode(errors='surrogateescape').decode(errors='replace')
    return name if len(name) <= 40 else f'{name[:19]}…{name[-20:]}'
