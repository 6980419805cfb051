"""The training loss and what counts as an error, of one class an image or of several findings.

    loss_sum, error_sum = losses.choose(multi_label=False)
    loss = loss_sum(logits, labels).div(len(labels))

Both are sums over the images of a batch, as tensors on the device.
"""

import torch
import torch.nn.functional as F


def choose(multi_label):
    if multi_label:
        return multi_label_loss, multi_label_errors
    return cross_entropy, count_errors


def cross_entropy(logits, labels, class_weights=None, label_smoothing=0.0):
    """Shapes: logits [B, C]; labels int64 [B], or shares of the classes, [B, C]."""
    return F.cross_entropy(logits, labels, class_weights, reduction='sum',
                           label_smoothing=label_smoothing)


def multi_label_loss(logits, labels, class_weights=None, label_smoothing=0.0):
    """Binary cross-entropy, the sum over the known labels of an image divided by C.

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

    Shapes: logits [B, C]; labels int64 [B], or shares of the classes, [B, C].
    """
    if labels.is_floating_point():  # shares of several classes (MixUp): the largest counts
        return (logits.argmax(1) != labels.argmax(1)).sum()
    return ((logits.argmax(1) != labels) & (labels >= 0)).sum()  # negative: NO_LABEL


def multi_label_errors(logits, labels):
    """The sum over the images of the share of their known labels that are decided wrongly.

    A label is decided at a probability of 0.5.
    """
    known = ~labels.isnan()
    wrong = ((logits >= 0) != (labels > 0.5)) & known
    return (wrong.sum(1) / known.sum(1).clamp(min=1)).sum()


def balanced_class_weights(labels, num_classes):
    """Weights that give rare classes the influence of frequent ones.

    Of int64 labels [N], inverse class frequencies, scaled so that their mean over the images is 1:
    the loss of a batch is still divided by the number of its images, so that the learning rate
    means the same. Of float labels [N, C], the ratio of negative to positive labels, or 1 where
    there are none. Returns float32 [C].
    """
    if labels.dim() == 1:
        counts = labels.bincount(minlength=num_classes)
        return torch.where(counts > 0, counts.sum() / (num_classes * counts), 0.0)
    positive, negative = (labels == 1).sum(0), (labels == 0).sum(0)
    return torch.where(positive * negative > 0, negative / positive.clamp(min=1), 1.0)
