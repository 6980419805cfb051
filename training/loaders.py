"""Data loaders that yield `(images, labels)` on the device, normalised.

    loader = loaders.make_loader(dataset, 'train', batch_size=64, device=device,
                                 augmentation=Augmentation())
    loader.set_epoch(1)
    for images, labels in loader: ...              # float32 [B, C, H, W] and int64 [B]

Labels are int64 [B] or, multi-label, float32 [B, C] of 0, 1 and NaN (unknown).

Small images are decoded once, and held and augmented on the device, one batch at a time. Larger
ones are decoded and augmented by worker processes in each epoch. Everything random depends only on
the seed, the epoch and the image's index, so an epoch can be resumed at any batch, and the shards
of several ranks make up the batches of a single process.
"""

import functools
import hashlib
import math
import os

import numpy as np
import torch
import torch.nn.functional as F

from training import console, image_files, image_transforms
from training.console import DataError
from training.datasets import DATASETS, show_size

PAD = 4          # pixels: zero padding of small images before the random crop (paper, section 4.1)
NO_LABEL = -100  # the ignore_index of F.cross_entropy


def make_loader(dataset, split, batch_size, *, device, augmentation=None, seed=1, workers=0,
                ten_crop=False, shard=(0, 1)):
    """The loader of a split: 'train' in random order, 'val' and 'test' in the order of the files.

    Args:
        split: 'train', 'test' or, if `dataset.selection_split` is 'val', 'val'.
        batch_size: of all ranks together.
        augmentation: an Augmentation, which includes random crops, or None.
        workers: number of worker processes that decode images; 0: decode in this process.
        ten_crop: yield images [B, 10, C, H, W], in batches of `batch_size` crops.
        shard: (rank, world size). Each batch is divided evenly among the ranks. If the last batch
            is too small, a rank gets an image without a label (`NO_LABEL` or NaN), so that all
            ranks take the same number of steps.

    Returns:
        A loader with `len()`, the number of batches in an epoch (the last batch may be smaller);
        `set_epoch(epoch, start=0)`; `num_images`; `images_in(i)`, the size of batch i; `files`, the
        names of the images (or indices); `groups`, the names of their groups, or None;
        `all_labels`, on the CPU; and `digest`, a hash of names, labels and their order.

    Raises:
        DataError: data missing or broken, a failed download, or ten crops of images in memory.
    """
    if ten_crop and dataset.in_memory:
        raise DataError(f'--ten-crop needs images larger than the network\'s input, and those of '
                        f'{dataset.name} are held in memory at its size, '
                        f'{show_size(dataset.image_size)} pixels')
    common = dict(mean=dataset.mean, std=dataset.std, device=device, shuffle=split == 'train',
                  seed=seed, shard=shard, num_classes=len(dataset.classes),
                  augmentation=augmentation)
    entry = DATASETS[dataset.name]
    if entry.read is not None:
        images, labels = entry.read(dataset.splits[split], dataset.root)
        if dataset.is_divided(split):
            names = np.arange(len(labels)).astype(np.bytes_)
            chosen = torch.from_numpy(dataset.choose(split, labels.numpy(), names))
            images, labels = images[chosen], labels[chosen]
        return MemoryLoader(images, labels, batch_size, **common)
    found = image_files.list_images(dataset, split, console.warn if shard[0] == 0 else None)
    if dataset.in_memory:
        transform = image_transforms.test_transform(dataset)
        read = functools.partial(image_files.read_pixels, dataset, transform)
        images = image_files.read_all(found, read, workers, f'reading {split}')
        return MemoryLoader(images, torch.from_numpy(found.labels), batch_size, image_list=found,
                            **common)
    transform = (image_transforms.train_transform(dataset, augmentation) if augmentation
                 else image_transforms.test_transform(dataset, ten_crop))
    return WorkerLoader(found, functools.partial(image_files.read_pixels, dataset, transform),
                        math.ceil(batch_size / 10) if ten_crop else batch_size, workers=workers,
                        **common)


class _Loader:
    """The order of the images in an epoch, and this rank's shard of each batch.

    Subclasses define `__iter__`, and `_draw` for the random numbers of an epoch.

    Args:
        labels: of N images, on the CPU.
        image_list: the ImageList, if the images are files.
        augmentation: an Augmentation, or None. Mixed labels are float32 [B, num_classes].
    """

    def __init__(self, labels, batch_size, *, mean, std, device, image_list=None, shuffle=False,
                 seed=1, shard=(0, 1), augmentation=None, num_classes=None):
        self.num_images, self.batch_size, self.device = len(labels), batch_size, device
        self.all_labels, self.image_list = labels, image_list
        self.mean, self.std = (image_files.per_channel(values, device) for values in (mean, std))
        self.shuffle, self.seed, self.num_classes = shuffle, seed, num_classes
        self.augmentation = augmentation
        self.rank, self.processes = shard
        self.set_epoch(1)

    @property
    def files(self):
        """The paths of the images, or their indices."""
        if self.image_list is None:
            return range(self.num_images)
        return [self.image_list.path(i) for i in range(self.num_images)]

    @property
    def label(self):
        """A tensor with the shape and dtype of one image's label in a batch."""
        return torch.zeros(self.num_classes) if self.unit == 2 else self.all_labels[0]

    @property
    def groups(self):
        if self.image_list is None or self.image_list.groups is None:
            return None
        return [os.fsdecode(name) for name in self.image_list.groups]

    @functools.cached_property
    def digest(self):
        if self.image_list is None:
            return hashlib.sha256(self.all_labels.numpy().tobytes()).hexdigest()
        return self.image_list.digest()

    def set_epoch(self, epoch, start=0):
        """Set the epoch of the next iteration, and its first batch (counted from 0)."""
        self.epoch, self.start = epoch, start
        # The generator uses 32 bits of its seed; an odd factor keeps different seeds different.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        self.permutation = (torch.randperm(self.num_images, generator=generator) if self.shuffle
                            else torch.arange(self.num_images))
        self._draw(generator)

    def __len__(self):
        return math.ceil(self.num_images / self.batch_size)

    def images_in(self, i):
        """The number of images in batch i, over all ranks."""
        return min(self.batch_size, self.num_images - i * self.batch_size)

    def _indices(self, i):
        """Indices of the images in this rank's shard of batch i, int64; at least one."""
        batch = self.permutation[i * self.batch_size:(i + 1) * self.batch_size]
        pieces = torch.arange(math.ceil(len(batch) / self.unit))
        own = pieces.tensor_split(self.processes)[self.rank].tolist()
        return batch[own[0] * self.unit:(own[-1] + 1) * self.unit] if own else batch[:1]

    @property
    def unit(self):
        """2 if neighbours in a batch are mixed, and must be in the same shard; otherwise 1."""
        return 2 if self.augmentation and self.augmentation.mixes else 1

    def _is_empty(self, i):
        """True if this rank's shard of batch i is empty."""
        return math.ceil(self.images_in(i) / self.unit) <= self.rank

    def _finish(self, i, images, labels):
        """Normalise images to float32; remove the label of the image in an empty shard."""
        if self._is_empty(i):
            labels = torch.full_like(labels, math.nan if labels.is_floating_point() else NO_LABEL)
        return (images.float() - self.mean) / self.std, labels

    def _mix(self, i, images, labels):
        """MixUp or CutMix of batch i, the same on each rank; a no-op without them."""
        if self.unit == 1 or self._is_empty(i):
            return images, labels
        rng = np.random.default_rng((self.seed, self.epoch, i))
        return self.augmentation.mix(images, labels, self.num_classes, rng)


class MemoryLoader(_Loader):
    """Batches of images [N, C, H, W] held on the device, as uint8 or float32.

    With an augmentation, images are zero-padded, cropped at random, and half of them mirrored
    (paper, section 4.1). Padding follows normalisation, as in the official code.
    """

    def __init__(self, images, labels, batch_size, *, device, **kwargs):
        self.images, self.labels = images.to(device), labels.to(device)
        super().__init__(labels, batch_size, device=device, **kwargs)
        self.augment_image = self.augmentation and self.augmentation.of_image(
            self.mean.flatten().tolist())

    def _draw(self, generator):
        # On the CPU and for the whole epoch, so that an image gets the same numbers on any device,
        # with any batch size and world size.
        offsets = torch.randint(2 * PAD + 1, (self.num_images, 2), generator=generator)
        mirrored = torch.randint(2, (self.num_images,), generator=generator, dtype=torch.bool)
        self.offsets, self.mirrored = offsets.to(self.device), mirrored.to(self.device)
        self.permutation = self.permutation.to(self.device)
        self.seeds = torch.randint(2**31, (self.num_images,), generator=generator)

    def __iter__(self):
        for i in range(self.start, len(self)):
            indices = self._indices(i)
            images, labels = self.images[indices], self.labels[indices]
            augmentation = self.augmentation
            if self.augment_image:
                images = augment_each(images, self.seeds[indices.cpu()], self.augment_image)
            images, labels = self._finish(i, images, labels)
            if augmentation:
                mirrored = self.mirrored[indices] & augmentation.mirror
                images = crop_and_mirror(images, self.offsets[indices], mirrored)
            yield self._mix(i, images, labels)


def augment_each(images, seeds, augment):
    """Apply `augment` to each image of a batch, with its own seed.

    Shapes: images uint8 or float32 [B, C, H, W], in 0..255; seeds int64 [B].
    """
    scale = 255 if images.is_floating_point() else 1  # torchvision's floats are in 0..1
    with torch.random.fork_rng(devices=[]):
        results = []
        for image, seed in zip(images, seeds.tolist()):
            torch.default_generator.manual_seed(seed)
            results.append(augment(image / scale) * scale if scale > 1 else augment(image))
    return torch.stack(results)


def crop_and_mirror(images, offsets, mirrored):
    """Crop each image at its own offset after zero padding, then mirror some.

    Shapes: images [B, C, H, W]; offsets int64 [B, 2], down and right, in 0..2*PAD; mirrored bool
    [B]. Returns [B, C, H, W].
    """
    b, c, h, w = images.shape
    arange = lambda n: torch.arange(n, device=images.device)
    columns = torch.where(mirrored[:, None], w - 1 - arange(w), arange(w))
    rows = offsets[:, :1] + arange(h)          # [B, H]
    columns = offsets[:, 1:] + columns         # [B, W]
    padded = F.pad(images, (PAD,) * 4)
    return padded[arange(b)[:, None, None, None], arange(c)[:, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]


class WorkerLoader(_Loader):
    """Batches of image files that worker processes read and augment, as uint8 if they have 8 bits.

    Normalising on the device makes the copy to it four times smaller.
    """

    def __init__(self, image_list, read, batch_size, *, device, workers=0, **kwargs):
        self.batches = []  # filled by `_draw`
        super().__init__(torch.from_numpy(image_list.labels), batch_size, device=device,
                         image_list=image_list, **kwargs)
        self.loader = image_files.file_loader(
            image_list, read, self.batches, num_workers=workers, persistent_workers=workers > 0,
            pin_memory=device.type == 'cuda')

    def _draw(self, generator):
        # Rows of (index, seed); the seed is for the image's random transforms.
        seeds = torch.randint(2**31, (self.num_images,), generator=generator)
        shards = map(self._indices, range(self.start, len(self)))
        # NumPy, because a tensor sent to a worker would stay in shared memory while it exists.
        self.batches[:] = [torch.stack([shard, seeds[shard]], 1).numpy() for shard in shards]

    def __iter__(self):
        for i, batch in enumerate(image_files.checked(self.loader), start=self.start):
            batch = (part.to(self.device, non_blocking=True) for part in batch)
            yield self._mix(i, *self._finish(i, *batch))
