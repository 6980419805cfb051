"""Losses and error counts for single-label and multi-label classification.

    loss_sum, error_sum = losses.for_task(multi_label=False)
    loss = loss_sum(logits, labels).div(len(labels))

Both return sums over the images of a batch, as tensors on the device.
"""

import torch
import torch.nn.functional as F


def for_task(multi_label):
    if multi_label:
        return multi_label_loss, multi_label_errors
    return cross_entropy, count_errors


def cross_entropy(logits, labels, class_weights=None, label_smoothing=0.0):
    """Shapes: logits [B, C]; labels int64 [B], or class probabilities [B, C]."""
    return F.cross_entropy(logits, labels, class_weights, reduction='sum',
                           label_smoothing=label_smoothing)


def multi_label_loss(logits, labels, class_weights=None, label_smoothing=0.0):
    """Binary cross-entropy: an image's sum over its known labels, divided by C.

    Args:
        logits: [B, C].
        labels: float [B, C] in 0..1, NaN for unknown.
        class_weights: [C], of the positive labels.
    """
    known = ~labels.isnan()
    targets = labels.nan_to_num() * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, targets, pos_weight=class_weights,
                                                reduction='none')
    return torch.where(known, losses, 0).sum() / labels.shape[1]


def count_errors(logits, labels):
    """The number of images whose most probable class is not the label.

    Shapes: logits [B, C]; labels int64 [B], or class probabilities [B, C].
    """
    if labels.is_floating_point():  # MixUp or CutMix: the class with the largest share counts
        return (logits.argmax(1) != labels.argmax(1)).sum()
    return ((logits.argmax(1) != labels) & (labels >= 0)).sum()  # negative: NO_LABEL


def multi_label_errors(logits, labels):
    """The sum over images of the share of their known labels that are wrong at p = 0.5."""
    known = ~labels.isnan()
    wrong = ((logits >= 0) != (labels > 0.5)) & known
    return (wrong.sum(1) / known.sum(1).clamp(min=1)).sum()


def balanced_class_weights(labels, num_classes):
    """Class weights, float32 [C], that give all classes the same total weight.

    For int64 labels [N], inverse class frequencies, scaled to a mean of 1 over the images, so that
    the same learning rates apply. For float labels [N, C], the ratio of negative to positive
    labels, or 1 where there are none of one kind.
    """
    if labels.dim() == 1:
        counts = labels.bincount(minlength=num_classes)
        return torch.where(counts > 0, counts.sum() / (num_classes * counts), 0.0)
    positive, negative = (labels == 1).sum(0), (labels == 0).sum(0)
    return torch.where(positive * negative > 0, negative / positive.clamp(min=1), 1.0)
