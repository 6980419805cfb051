"""The data sets, and loaders that yield `(images, labels)` on the device, normalised.

    dataset = data.describe('cifar10', 'work/data')
    loader = data.make_loader(dataset, 'train', batch_size=64, device=device, augment=True)
    loader.set_epoch(1)
    for images, labels in loader: ...              # float32 [B, 3, H, W] and int64 [B]

Small images are decoded once, held on the device as uint8 and augmented there, a batch at a time.
Larger ones are decoded and augmented by worker processes in each epoch. Either way, all that is
random in an epoch depends on nothing but the seed, the epoch and the image's index: an epoch can be
resumed at any batch, and the shards of several processes make up the same batches that one process
has.
"""

import dataclasses
import functools
import hashlib
import itertools
import os
import signal
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from tqdm import tqdm

from errors import UserError

SMALL = 64  # pixels: images up to this size are held in memory, larger ones are read by workers
MAX_SIZE = 4096  # pixels: the largest --image-size
PAD = 4     # pixels: zero padding of small images before the random crop (paper, section 4.1)
NO_LABEL = -100  # the ignore_index of F.cross_entropy
HEATMAP = '.heatmap.png'  # what predict.py adds to an image's name, perhaps in its folder

# Channel means and standard deviations on the scale 0..255, as in the official code
# (attic/channel_stats.py measures them); SVHN is only divided by 255 (paper, section 4.1). Folders
# are normalised as ImageNet, which pretrained weights expect.
IMAGENET_STATISTICS = ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
STATISTICS = {
    'cifar10': ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'cifar100': ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    'svhn': ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    'imagenet': IMAGENET_STATISTICS,
    'folder': IMAGENET_STATISTICS,
    'shapes': ((127.0938, 127.135414, 127.086905), (80.26133, 79.86884, 79.862017)),
}
NAMES = tuple(STATISTICS)
# AlexNet's lighting noise with the constants of fb.resnet.torch, on the scale 0..1: eigenvectors
# (columns) and eigenvalues of ImageNet's RGB values, standard deviation of the random factors.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
LIGHTING_STD = 0.1
ARCHIVES = {'cifar10': 'cifar-10-python.tar.gz', 'cifar100': 'cifar-100-python.tar.gz',
            'svhn': 'train_32x32.mat, extra_32x32.mat, test_32x32.mat'}
# The official binary versions: archive, folder in it, and the MD5 sums of its files. A record is
# the label (in CIFAR-100 the coarse and the fine one), then 1024 red, green and blue values each.
BINARY_VERSIONS = {
    'cifar10': ('cifar-10-binary.tar.gz', 'cifar-10-batches-bin', {
        'train': {'data_batch_1.bin': '5dd7e06a14cb22eb9f671a540d1b7c25',
                  'data_batch_2.bin': '5ea93a67294ea407fff1d09f752e9692',
                  'data_batch_3.bin': '942cd6a4bcdd0dd3c604fbe906cb4421',
                  'data_batch_4.bin': 'ae636b3ba5c66a11e91e8cb52e771fcb',
                  'data_batch_5.bin': '53f37980c15c3d472c316c40844f3f0d'},
        'test': {'test_batch.bin': '803d5f7f4d78ea53de84dbe85f74fb6d'}}),
    'cifar100': ('cifar-100-binary.tar.gz', 'cifar-100-binary', {
        'train': {'train.bin': '6172c7755cfe09b2fe270c85cebc1b15'},
        'test': {'test.bin': '4499cfba6c016c1be1438163640a0898'}}),
}

# In the order of the labels. For imagenet and folder: the sorted names of the class folders.
CLASSES = {
    'shapes': ('disk', 'ring', 'square', 'frame', 'triangle up', 'triangle down', 'plus', 'cross',
               'horizontal bars', 'vertical bars'),
    'svhn': tuple('0123456789'),
    'cifar10': tuple('airplane automobile bird cat deer dog frog horse ship truck'.split()),
    'cifar100': tuple('''
        apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
        butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
        crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
        keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
        mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
        plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
        skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
        television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
        worm'''.split()),
}

# Many cameras write truncated EXIF data; the pixels are complete.
warnings.filterwarnings('ignore', 'Corrupt EXIF data', UserWarning)


class DataError(UserError):
    """Data that are missing, broken or not laid out as they should be, said in one line."""


@dataclass(frozen=True)
class Description:
    """What the model needs to know of a data set."""

    name: str
    root: Path
    classes: tuple   # names, in the order of the labels
    image_size: int  # pixels, height and width of the model's input
    mean: tuple      # of each channel, 0..255
    std: tuple
    value_range: tuple = None  # (low, high): what becomes 0 and 255 in images of more than 8 bits
    val_split: float = 0.0     # the share of train/ that is for testing
    split_seed: int = 1

    @property
    def in_memory(self):
        return self.image_size <= SMALL

    def plain(self):
        """Everything but the folder, as plain values: what a checkpoint keeps."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != 'root'}


def describe(name, root='work/data', image_size=None, split='train', *, in_channels=3,
             value_range=None, val_split=0.0, seed=1, workers=0):
    """The classes and the image size of a data set, without loading it.

    Args:
        name: one of `NAMES`; the others are for imagenet and folder alone.
        root: for cifar10, cifar100 and svhn the folder that holds, or is to hold, the downloaded
            files; for imagenet and folder the one with `train/` and `val/` (or `test/`), and in
            each of them a folder of images a class.
        image_size: by default 224 or, for a folder whose first image has at most `SMALL` pixels a
            side, that image's shorter side.
        split: 'train' or 'test', whose folders are the classes.
        in_channels: 1 for grey images, or 3.
        value_range: (low, high) of images of more than 8 bits. By default, if the first training
            image of a folder is one, the lowest and the highest value in all of them.
        val_split: take this share of each class in `train/`, or in the root itself if it has no
            `train/`, for testing; `seed` chooses the images.
        workers: number of processes that look for the values.

    Raises:
        DataError: no such folders, a choice that this data set does not have, or values without a
            natural range.
        OSError: no folders of classes.
    """
    root = Path(root)
    if name in CLASSES:
        if image_size not in (None, 32) or in_channels != 3 or value_range or val_split:
            raise DataError(f'{name} has colour images of 32 pixels: --val-split, --value-range, '
                            f'--in-channels or another --image-size is for folder and imagenet')
        return Description(name, root, CLASSES[name], 32, *STATISTICS[name])
    statistics = STATISTICS[name]
    if in_channels == 1:
        statistics = [(sum(values) / 3,) for values in statistics]
    _, classes = _class_folders(root, split, val_split)
    dataset = Description(name, root, tuple(classes), image_size or 224, *statistics,
                          value_range and tuple(value_range), val_split, seed)
    if name == 'imagenet':
        return dataset
    samples = _list_images(dataset, split)
    first = _decode(samples[0][0])
    height, width, *_ = np.shape(first)
    if image_size is None and max(height, width) <= SMALL:
        dataset = dataclasses.replace(dataset, image_size=min(height, width))
    if value_range is None and split == 'train' and isinstance(first, np.ndarray):
        dataset = dataclasses.replace(dataset, value_range=_measure_range(samples, workers))
    return dataset


def make_loader(dataset, split, batch_size, *, device, augment=False, seed=1, workers=0,
                ten_crop=False, shard=(0, 1)):
    """A loader of the images of 'train', which are shuffled, or 'test', which come in their order.

    It has `len()`, the number of batches in an epoch, of which the last may be smaller;
    `set_epoch(epoch, start=0)`; `num_images`; and `images_in(i)`, the size of batch i.

    Args:
        batch_size: of all processes together.
        workers: number of processes that decode images; 0: this one does it itself.
        ten_crop: images come as [B, 10, 3, H, W], in batches of a tenth of the size, so that a
            batch has `batch_size` crops.
        shard: (rank, number of processes). Each batch is divided evenly over the processes. If a
            small last batch has no image for a process, it gets one labelled `NO_LABEL`, so that
            all processes take the same number of steps.

    Raises:
        DataError: data missing or broken, a failed download, or ten crops of small images.
    """
    if ten_crop and dataset.in_memory:
        raise DataError(f'--ten-crop is for images larger than {SMALL} pixels, and '
                        f'{dataset.name} has images of {dataset.image_size}')
    common = dict(mean=dataset.mean, std=dataset.std, device=device, shuffle=split == 'train',
                  seed=seed, shard=shard)
    if dataset.name in CLASSES:
        read = draw_shapes if dataset.name == 'shapes' else functools.partial(_read_small, dataset)
        images, labels = read(split)
        return MemoryLoader(images, labels, batch_size, augment=augment, **common)
    samples = _list_images(dataset, split)
    if dataset.in_memory:
        files, labels = zip(*samples)
        read = functools.partial(read_pixels, dataset, test_transform(dataset.image_size))
        images = _read_all(samples, read, workers, f'reading {split}')
        return MemoryLoader(images, torch.tensor(labels), batch_size, augment=augment, files=files,
                            **common)
    transform = (_train_transform(dataset.image_size) if augment
                 else test_transform(dataset.image_size, ten_crop))
    return WorkerLoader(samples, functools.partial(read_pixels, dataset, transform),
                        -(-batch_size // 10) if ten_crop else batch_size, workers=workers, **common)


def read_image(path, dataset):
    """An image file as the model's input, float32 [C, H, W].

    Raises:
        DataError: not an image, a broken one, or one of more than 8 bits without a range.
    """
    image = read_pixels(dataset, test_transform(dataset.image_size), path)
    return (image.float() - _channels(dataset.mean, 'cpu')) / _channels(dataset.std, 'cpu')


class _Loader:
    """The order of the images in an epoch, and this process's shard of each batch.

    A subclass has `__iter__`, and `_draw` for what its augmentation needs.

    Args:
        labels: int64 [N].
        files: their names, or nothing for numbers.
    """

    def __init__(self, labels, batch_size, *, mean, std, device, files=(), shuffle=False, seed=1,
                 shard=(0, 1)):
        self.num_images, self.batch_size, self.device = len(labels), batch_size, device
        self.class_counts, self.files = labels.bincount(), files or range(len(labels))
        self.mean, self.std = _channels(mean, device), _channels(std, device)
        self.shuffle, self.seed = shuffle, seed
        self.rank, self.processes = shard
        self.set_epoch(1)

    def set_epoch(self, epoch, start=0):
        """Choose the epoch of the next iteration, and its first batch (counted from 0)."""
        self.start = start
        # The generator uses 32 bits of its seed; the odd factor keeps different seeds different.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        self.permutation = (torch.randperm(self.num_images, generator=generator) if self.shuffle
                            else torch.arange(self.num_images))
        self._draw(generator)

    def __len__(self):
        return -(-self.num_images // self.batch_size)

    def images_in(self, i):
        """The number of images in batch i, of all processes together."""
        return min(self.batch_size, self.num_images - i * self.batch_size)

    def _indices(self, i):
        """Of the images in this process's shard of batch i, int64; at least one."""
        batch = self.permutation[i * self.batch_size:(i + 1) * self.batch_size]
        shard = batch.tensor_split(self.processes)[self.rank]
        return shard if len(shard) else batch[:1]

    def _finish(self, i, images, labels):
        """Images as float32, normalised; `NO_LABEL` for the one that stands in an empty shard."""
        if self.images_in(i) <= self.rank:
            labels = torch.full_like(labels, NO_LABEL)
        return (images.float() - self.mean) / self.std, labels


class MemoryLoader(_Loader):
    """Batches of images [N, C, H, W] that are held on the device, as uint8 or float32.

    With `augment`, each image is cropped at random after zero padding, and mirrored half of the
    time (paper, section 4.1). The padding comes after the normalisation, as in the official code.
    """

    def __init__(self, images, labels, batch_size, *, device, augment=False, **kwargs):
        self.images, self.labels = images.to(device), labels.to(device)
        self.augment = augment
        super().__init__(labels, batch_size, device=device, **kwargs)

    def _draw(self, generator):
        # On the CPU and for the whole epoch: the same numbers for an image on every device, with
        # any batch size and any number of processes.
        offsets = torch.randint(2 * PAD + 1, (self.num_images, 2), generator=generator)
        mirrored = torch.randint(2, (self.num_images,), generator=generator, dtype=torch.bool)
        self.offsets, self.mirrored = offsets.to(self.device), mirrored.to(self.device)
        self.permutation = self.permutation.to(self.device)

    def __iter__(self):
        for i in range(self.start, len(self)):
            indices = self._indices(i)
            images, labels = self._finish(i, self.images[indices], self.labels[indices])
            if self.augment:
                images = crop_and_mirror(images, self.offsets[indices], self.mirrored[indices])
            yield images, labels


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

    They are normalised on the device: a quarter of the bytes to copy.
    """

    def __init__(self, samples, read, batch_size, *, device, workers=0, **kwargs):
        self.batches = []  # filled by `_draw`
        files, labels = zip(*samples)
        super().__init__(torch.tensor(labels), batch_size, device=device, files=files, **kwargs)
        self.loader = _file_loader(samples, read, self.batches, num_workers=workers,
                                   persistent_workers=workers > 0, pin_memory=device.type == 'cuda')

    def _draw(self, generator):
        # Each image has a seed, for its random transforms; a batch is rows of (index, seed).
        seeds = torch.randint(2**31, (self.num_images,), generator=generator)
        shards = map(self._indices, range(self.start, len(self)))
        # NumPy, for a tensor that is sent to a worker occupies shared memory as long as it lives.
        self.batches[:] = [torch.stack([shard, seeds[shard]], 1).numpy() for shard in shards]

    def __iter__(self):
        for i, batch in enumerate(_checked(self.loader), start=self.start):
            yield self._finish(i, *(part.to(self.device, non_blocking=True) for part in batch))


def _file_loader(samples, read, batches, **kwargs):
    """A DataLoader, for `_checked`, of what `read` makes of image files, and of int64 labels.

    Samples are (path, label), and a batch is rows of (index, seed), int64 [B, 2].
    """
    return DataLoader(_ImageFiles(samples, read), batch_size=None, sampler=batches,
                      worker_init_fn=_leave_signals_to_main,
                      generator=torch.Generator(),  # not the global one, which dropout draws from
                      **kwargs)


def _checked(loader):
    """The batches of a `_file_loader`; raises the DataError that stands in a batch's place."""
    for batch in loader:
        if isinstance(batch, DataError):
            raise DataError(*batch.args)
        yield batch


class _ImageFiles(torch.utils.data.Dataset):
    def __init__(self, samples, read):
        self.samples, self.read = samples, read

    def __getitem__(self, batch):
        """Images and labels, or a DataError for the main process to raise.

        A worker must not raise it itself: it would arrive as the text of its traceback.
        """
        images = []
        try:
            with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
                for index, seed in batch.tolist():
                    torch.default_generator.manual_seed(seed)
                    images.append(self.read(self.samples[index][0]))
        except DataError as error:
            return error
        return torch.stack(images), torch.tensor([self.samples[index][1] for index in batch[:, 0]])


def _train_transform(size):
    """The augmentation of fb.resnet.torch, which the official ImageNet models were trained with.

    Crop, resize and colour jitter are torchvision's and differ in details that
    attic/imagenet-recipe.md lists.
    """
    return transforms.Compose([transforms.RandomResizedCrop(size),
                               transforms.RandomHorizontalFlip(),
                               transforms.ColorJitter(0.4, 0.4, 0.4),
                               to_tensor,
                               add_lighting])


def add_lighting(image):
    """AlexNet's lighting noise (section 4.1): add the same random colour to all pixels.

    Shapes: uint8 or float32 (0..1) [C, H, W]; the result is clamped to the same range. Images with
    one channel are returned unchanged.
    """
    if len(image) == 1:
        return image
    factors = LIGHTING_STD * torch.randn(3) * torch.tensor(PCA_VALUES)
    colour = (torch.tensor(PCA_VECTORS) * factors).sum(1).view(3, 1, 1)
    if image.is_floating_point():
        return (image + colour).clamp(0, 1)
    steps = (255 * colour).round().to(torch.int16)
    # contiguous: PIL's images are channels last, which is slower
    return (image.contiguous() + steps).clamp(0, 255).to(torch.uint8)


def test_transform(size, ten_crop=False):
    """The centre of the image, 224/256 of its shorter side; of small images all of it."""
    resize = transforms.Resize(size if size <= SMALL else round(size * 256 / 224))
    crop = [transforms.TenCrop(size), torch.stack] if ten_crop else [transforms.CenterCrop(size)]
    return transforms.Compose([resize, to_tensor, *crop])


def to_tensor(image):
    return image if torch.is_tensor(image) else transforms.functional.pil_to_tensor(image)


def _leave_signals_to_main(_):
    # Ctrl-C, and many schedulers' SIGTERM and SIGUSR1, are sent to workers too. The main process
    # needs them to finish its step, so they ignore all but a SIGTERM from their parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_says, daemon=True).start()


def _exit_when_parent_says():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


def _channels(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _read_small(dataset, split):
    """CIFAR and SVHN: uint8 images [N, 3, 32, 32] and int64 labels [N].

    torchvision reads and downloads them. CIFAR's binary version is read if it is the one there.
    """
    binary = None
    if dataset.name in BINARY_VERSIONS:
        _, binary, _ = BINARY_VERSIONS[dataset.name]
        kind = getattr(datasets, dataset.name.upper())
        if (dataset.root / binary).is_dir() and not (dataset.root / kind.base_folder).is_dir():
            return _read_binary_cifar(dataset, split)
    try:
        if dataset.name == 'svhn':  # the paper trains on both sets, 604,388 images
            parts = [datasets.SVHN(dataset.root, part, download=True)
                     for part in (('train', 'extra') if split == 'train' else ('test',))]
            images = np.concatenate([part.data for part in parts])
            labels = np.concatenate([part.labels for part in parts])
        else:
            part = kind(dataset.root, split == 'train', download=True)
            images, labels = part.data.transpose(0, 3, 1, 2).copy(), np.array(part.targets)
    except Exception as error:  # no network, no disk, a broken archive: it raises anything
        raise DataError(
            f'{ARCHIVES[dataset.name]}: missing from {dataset.root} or broken, and not to be '
            f'downloaded ({error}): put it{f" or the folder {binary}" if binary else ""} there, or '
            f'name the folder that has it by --data; '
            f'--dataset folder reads a folder of images, --dataset shapes needs no data') from error
    return torch.from_numpy(images), torch.from_numpy(labels).long()


def _read_binary_cifar(dataset, split):
    archive, folder, files = BINARY_VERSIONS[dataset.name]
    content = b''
    for name, md5 in files[split].items():
        path = dataset.root / folder / name
        try:
            batch = path.read_bytes()
        except OSError as error:
            raise DataError(f'{path}: {error.strerror}: unpack {archive} in {dataset.root}, or '
                            f'remove {folder} there') from error
        if hashlib.md5(batch, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f'{path} is not the official file, whose MD5 sum is {md5}: unpack '
                            f'{archive} in {dataset.root} again')
        content += batch
    label_bytes = 1 if dataset.name == 'cifar10' else 2
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32)
    return torch.tensor(images), torch.tensor(records[:, label_bytes - 1]).long()


def _class_folders(root, split, val_split):
    """The folder of a split, and the sorted names of the class folders in it.

    It is `train/` or, for 'test', `val/` or without one `test/`; where a part of `train/` is for
    testing, `train/` or without one the root itself.
    """
    names = ('train', '.') if val_split else ('train',) if split == 'train' else ('val', 'test')
    folder = next((root / name for name in names if (root / name).is_dir()), None)
    if folder is None:
        raise DataError(f'no {" or ".join(names)} in {root}: --data must name a folder with train/ '
                        f'and val/ (or test/), and in each a folder of images a class; --val-split '
                        f'0.1 does without val/; --dataset shapes needs no data')
    names = datasets.folder.find_classes(folder)[0]
    return folder, [name for name in names if not name.startswith('.')]  # .ipynb_checkpoints


def is_image(path):
    """Whether a file is to be read, by its name: an image, neither hidden nor a heatmap of one."""
    name = os.path.basename(path)
    return (name.lower().endswith(datasets.folder.IMG_EXTENSIONS)
            and not name.startswith('.') and not name.endswith(HEATMAP))


def _list_images(dataset, split):
    """(path, label) of each image, sorted; in the test images, classes may be missing."""
    folder, found = _class_folders(dataset.root, split, dataset.val_split)
    labels = {name: label for label, name in enumerate(dataset.classes)}
    unknown = set(found) - set(labels)
    if unknown:
        raise DataError(f'{folder}: {min(unknown)} is not among the classes trained on')
    try:
        samples = datasets.folder.make_dataset(folder, labels, is_valid_file=is_image,
                                               allow_empty=split == 'test')
    except FileNotFoundError as error:  # a class folder without images
        raise DataError(f'{folder}: {error}') from error
    if dataset.val_split:
        samples = _split(samples, folder, split, dataset)
    if not samples:
        raise DataError(f'{folder} has no images to {split} on')
    return samples


def _split(samples, folder, split, dataset):
    """Of each class a share for 'test', at least one image and never all, or the rest.

    By hashes of their names in the folder: images that come or go move few of the others.
    """
    def random_number(path):
        name = f'{dataset.split_seed} {os.path.relpath(path, folder)}'
        return hashlib.sha256(name.encode(errors='surrogateescape')).digest()

    chosen = set()
    for _, images in itertools.groupby(samples, lambda sample: sample[1]):
        paths = sorted((path for path, _ in images), key=random_number)
        count = min(max(1, round(dataset.val_split * len(paths))), len(paths) - 1)
        chosen.update(paths[:count])
    return [sample for sample in samples if (sample[0] in chosen) == (split == 'test')]


def _measure_range(samples, workers):
    """The lowest and the highest value in the images of more than 8 bits."""
    values = _read_all(samples, _extremes, workers, 'measuring')
    low, high = values.min().item(), values.max().item()
    if low == high:
        raise DataError(f'all values in {Path(samples[0][0]).parents[1]} are {low:g}')
    return low, high


def _extremes(path):
    values = _decode(path)
    if not isinstance(values, np.ndarray):
        raise DataError(f'{path} has 8 bits, and the first training image has more: give '
                        f'--value-range LOW HIGH, for those of more')
    if values.dtype.kind == 'f' and values.min() < 0:
        raise DataError(f'{path}: floats as low as {values.min():g} have no natural range: give '
                        f'--value-range LOW HIGH')
    return torch.tensor([values.min(), values.max()], dtype=torch.float64)


def _read_all(samples, read, workers, what):
    """What `read` makes of N files, as one tensor [N, ...]; if they are many, processes do it."""
    count, done, result = len(samples), 0, None
    rows = np.array([(index, 0) for index in range(count)])  # nothing is random: seed 0
    loader = _file_loader(samples, read, np.split(rows, range(100, count, 100)),
                          num_workers=workers if count > 2000 else 0)
    with tqdm(desc=what, total=count, leave=False, disable=None) as bar:
        for batch, _ in _checked(loader):
            if result is None:  # not a tensor: torch would start its threads for each copy
                result = np.empty((count, *batch.shape[1:]), batch.numpy().dtype)
            result[done:done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return torch.from_numpy(result)


def read_pixels(dataset, transform, path):
    """An image file, transformed: uint8 [C, H, W] or, in a data set with a value range, float32.

    Both are on the scale 0..255.
    """
    channels, value_range = len(dataset.mean), dataset.value_range
    image = _decode(path, 'RGB' if channels == 3 else 'L')
    if not isinstance(image, np.ndarray):
        return transform(image) if value_range is None else transform(image).float()
    if value_range is None:
        raise DataError(f'{path} has more than 8 bits, of a range that is not known: train.py is '
                        f'told it by --value-range LOW HIGH')
    low, high = value_range
    values = ((image.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)
    # 0..1, as the transforms expect floats.
    return 255 * transform(torch.from_numpy(values).expand(channels, -1, -1))


def _decode(path, mode='RGB'):
    """An image file as a PIL image of that mode or, of more than 8 bits, as an array [H, W]."""
    try:
        with Image.open(path) as image:
            if not image.mode.startswith(('I', 'F')):
                if 'transparency' in image.info:
                    image = image.convert('RGBA')
                return image.convert(mode)
            values = np.asarray(image)  # grey, for PIL has no others of 16 or 32 bits, or floats
    except Exception as error:  # PIL raises anything for a broken file, or one that is too large
        raise DataError(f'{path}: cannot be read as an image ({error})') from error
    if not np.isfinite(values).all():
        raise DataError(f'{path} has values that are not finite')
    return values


def draw_shapes(split):
    """The built-in data set: one of ten shapes in each image, drawn from a fixed seed.

    Place, size, colours and contrast are random and the shape may be lighter or darker than what
    is behind it, so that no pixel tells anything by itself: a linear classifier fails on them.
    Returns uint8 images [N, 3, 32, 32] and int64 labels [N]; 'train' has 6,000, 'test' 1,000.
    """
    count, seed = {'train': (6000, 1), 'test': (1000, 2)}[split]
    rng = np.random.RandomState(seed)  # the one generator of NumPy whose stream is frozen
    labels = np.arange(count) % 10
    radius = rng.uniform(4, 12, (count, 1, 1))
    # Distances of each pixel from the centre, in units of the radius: right and down.
    centre = 15.5 + rng.uniform(-1, 1, (2, count, 1, 1)) * (15 - radius)
    x = (np.arange(32)[None, None, :] - centre[0]) / radius
    y = (np.arange(32)[None, :, None] - centre[1]) / radius
    depth = np.empty((count, 32, 32))
    for i, shape in enumerate(CLASSES['shapes']):
        depth[labels == i] = _shape_depth(shape, x[labels == i], y[labels == i])
    mask = np.clip(depth * radius + 0.5, 0, 1)[:, None]      # edges smoothed over a pixel
    dark, light = (rng.uniform(low, high, (count, 3, 1, 1)) for low, high in ((0, 110), (145, 255)))
    swap = rng.uniform(size=(count, 1, 1, 1)) < 0.5
    front, back = np.where(swap, dark, light), np.where(swap, light, dark)
    noise = rng.normal(0, 30, (count, 3, 32, 32))
    images = np.clip(back + (front - back) * mask + noise, 0, 255).astype(np.uint8)
    return torch.from_numpy(images), torch.from_numpy(labels)


def _shape_depth(shape, x, y):
    """How far inside the shape a point lies, negative outside; the shape has radius 1."""
    ax, ay = np.abs(x), np.abs(y)
    disk, square = 1 - np.hypot(x, y), 0.85 - np.maximum(ax, ay)
    triangle = lambda y: np.minimum(0.7 - y, (y + 1) / 2 - ax) * 0.9
    arm = lambda u, v: np.minimum(0.28 - u, 1 - v)
    bars = lambda u, v: np.minimum(0.25 - np.abs(u - 0.6), 0.9 - v)
    diagonal, other = np.abs(x + y) / 2**0.5, np.abs(x - y) / 2**0.5
    return {
        'disk': disk, 'ring': np.minimum(disk, 0.4 - disk),
        'square': square, 'frame': np.minimum(square, 0.35 - square),
        'triangle up': triangle(y), 'triangle down': triangle(-y),
        'plus': np.maximum(arm(ax, ay), arm(ay, ax)),
        'cross': np.maximum(arm(diagonal, other), arm(other, diagonal)),
        'horizontal bars': bars(ay, ax), 'vertical bars': bars(ax, ay),
    }[shape]
