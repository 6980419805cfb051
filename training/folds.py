"""Hold out a share or one of k folds of the training images, stratified and in whole groups.

    chosen = folds.hold_out(labels, names, shares=(0.2,) * 5, index=0, seed=1)   # fold 1 of 5

Images or groups are ordered by hashes of their names, so that the split is the same on every
machine and, without groups, added or removed images move few others.
"""

import hashlib

import numpy as np


def hold_out(labels, names, shares, index, seed=1, groups=None):
    """bool [N]: the images in part `index` of a split into parts of sizes `shares`, in sum 1.

    Without groups, the sizes per class are exact to within one image. Groups and multi-label images
    are assigned one by one, greedily, to the part that needs their labels most.

    Args:
        labels: int64 [N] classes, or float32 [N, C] of 0, 1 and NaN (unknown).
        names: N names, bytes.
        groups: N names of groups, bytes; or None.
    """
    if groups is None and labels.ndim == 1:
        return _divide_classes(labels, names, shares, seed) == index
    groups = names if groups is None else groups
    unique, group_of = np.unique(groups, return_inverse=True)
    present = labels == 1 if labels.ndim == 2 else labels[:, None] == np.unique(labels)
    has = np.concatenate([present, np.ones((len(labels), 1))], 1)  # the last column counts images
    contents = np.zeros((len(unique), has.shape[1]))
    np.add.at(contents, group_of, has)
    contents /= np.maximum(has.sum(0), 1)                          # share of each column's total
    hashes = [_hash(seed, name) for name in unique]
    lacking = np.repeat(np.array(shares)[:, None], has.shape[1], 1)  # [parts, C + 1]
    part_of_group = np.empty(len(unique), np.int64)
    # Largest and rarest first, so that later groups can balance the parts.
    for group in sorted(range(len(unique)), key=lambda i: (-contents[i].sum().round(9), hashes[i])):
        part = (lacking / lacking.clip(min=0).sum(0).clip(min=1e-9) @ contents[group]).argmax()
        part_of_group[group] = part
        lacking[part] -= contents[group]
    return part_of_group[group_of] == index


def _divide_classes(labels, names, shares, seed):
    """int64 [N]: the part of each image, stratified by class.

    With unequal shares, the first part gets at least one image of each class, but not all.
    """
    parts, dealt = np.empty(len(labels), np.int64), 0
    for label in np.unique(labels):
        images = np.flatnonzero(labels == label)
        images = images[np.argsort([_hash(seed, names[i]) for i in images], kind='stable')]
        if len(set(shares)) == 1:
            # Sizes as in round-robin over all classes, for equal parts; sorted, so that another
            # image moves few.
            parts[images] = np.sort((dealt + np.arange(len(images))) % len(shares))
            dealt += len(images)
            continue
        ends = np.round(np.cumsum(shares) * len(images))
        ends[0] = min(max(1, ends[0]), len(images) - 1)
        ends[-1] = len(images)
        parts[images] = np.searchsorted(ends, np.arange(len(images)), side='right')
    return parts


def _hash(seed, name):
    return hashlib.sha256(f'{seed} '.encode() + name).digest()
