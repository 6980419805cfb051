"""The data sets, and loaders that yield `(images, labels)` on the device, normalised.

    dataset = data.describe('cifar10', 'work/data')
    dataset, train_loader, test_loader = data.make_loaders(dataset, batch_size=64, device=device)
    train_loader.set_epoch(1)
    for images, labels in train_loader: ...        # float32 [B, 3, H, W] and int64 [B]

Small images are held on the device as uint8 and cropped and mirrored there, a batch at a time.
Larger ones are read by worker processes. Either way all that is random in an epoch follows from
the seed, the epoch and the image alone, so any batch of any epoch can be had again, and several
processes that share each batch see together what one alone would.
"""

import dataclasses
import math
import os
import signal
import sys
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets, transforms
from torchvision.transforms import functional as TF
from tqdm import tqdm

SMALL = 64  # pixels: images up to this size are held in memory, larger ones are read by workers
MAX_SIZE = 4096  # pixels: a longer side is taken for a mistake
PAD = 4     # pixels: the paper's crop for CIFAR is of the image with this border of zeros
NO_LABEL = -100  # F.cross_entropy leaves out what is labelled so

HINT = 'to train without any data: --dataset shapes'

# Channel means and standard deviations on the scale 0..255, as in the official code
# (attic/channel_stats.py measures them); SVHN is only divided by 255 (paper, section 4.1). None:
# measured on the training images.
STATISTICS = {
    'cifar10': ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7)),
    'cifar100': ((129.3, 124.1, 112.4), (68.2, 65.4, 70.4)),
    'svhn': ((0.0, 0.0, 0.0), (255.0, 255.0, 255.0)),
    'imagenet': ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375)),
    'folder': None,
    'shapes': None,
}
NAMES = tuple(STATISTICS)

SHAPES = ('disk', 'ring', 'square', 'frame', 'triangle up', 'triangle down', 'plus', 'cross',
          'horizontal bars', 'vertical bars')
# In the order of the labels. The classes of folders are the names of their folders, sorted.
CLASSES = {
    'shapes': SHAPES,
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

# Cameras write tags that end too early; the pixels are all there.
warnings.filterwarnings('ignore', 'Corrupt EXIF data', UserWarning)


class DataError(Exception):
    """Data that are missing, broken or not laid out as they should be, said in one line."""


@dataclass(frozen=True)
class Description:
    """What the model has to know of a data set; nothing but folder names is read for it."""

    name: str
    root: Path
    classes: tuple   # names, in the order of the labels
    image_size: int  # pixels, the side of the square that the model sees
    mean: tuple | None = None  # of each channel, 0..255; None: still to be measured
    std: tuple | None = None

    @property
    def in_memory(self):
        return self.image_size <= SMALL

    def check(self):
        """Raises TypeError if it can't be so; of what comes from a file there is no telling."""
        classes, statistics = self.classes, (self.mean, self.std)
        if not (isinstance(classes, (tuple, list)) and all(isinstance(c, str) for c in classes)):
            raise TypeError('its classes are not names')
        if not (isinstance(self.image_size, int) and 1 <= self.image_size <= MAX_SIZE):
            raise TypeError(f'its image_size is {self.image_size!r}')
        if not (all(isinstance(values, (tuple, list)) and len(values) == 3 and
                    all(isinstance(value, float) and math.isfinite(value) for value in values)
                    for values in statistics) and min(self.std) > 0):
            raise TypeError(f'its mean and std are {statistics}')

    def plain(self):
        """All but the folder, as plain values: what a trained model goes with."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != 'root'}


def describe(name, root='work/data', image_size=None, split='train'):
    """The classes and the image size of a data set, without loading it.

    Args:
        name: one of `NAMES`.
        root: for cifar10, cifar100 and svhn the folder that holds, or is to hold, the downloaded
            files; for imagenet and folder the one with `train/` and `val/` (or `test/`), and in
            each of them a folder of images a class.
        image_size: for folder and imagenet. By default 224 or, for a folder of images of at most
            `SMALL` pixels, their own size.
        split: 'train' or 'test', whose folders are the classes.

    Raises:
        DataError: no such folders, or an image size where there is no choice.
    """
    root = Path(root)
    if name in ('imagenet', 'folder'):
        folder = _split_folder(root, split)
        classes = _class_names(folder)
        if image_size is None and name == 'folder':
            size = _decode(_list_images(folder, classes).samples[0][0]).size
            image_size = min(size) if max(size) <= SMALL else None
        image_size = image_size or 224
        # Large images of any kind are normalised as ImageNet's: models are trained on from its.
        known = STATISTICS[name if image_size <= SMALL else 'imagenet']
        return Description(name, root, classes, image_size, *(known or ()))
    if image_size not in (None, 32):
        raise DataError(f'--image-size is for folder and imagenet: {name} has images of 32 pixels')
    return Description(name, root, CLASSES[name], 32, *(STATISTICS[name] or ()))


def make_loaders(dataset, batch_size, *, device, parts=1, augment=True, seed=1, workers=0,
                 ten_crop=False, shard=(0, 1)):
    """The description with mean and standard deviation, a training loader and a test loader.

    The training images are shuffled, the test images come in their order. A loader has `len()`, the
    number of batches in an epoch, of which the last may be smaller; `set_epoch(epoch, start=0)`,
    which goes to batch `start` of an epoch; `num_images`, and `images_in(i)` of batch i. With
    `ten_crop` the test images come as [B, 10, 3, H, W].

    Args:
        batch_size: of all processes together.
        parts: a batch of test images is that many times smaller, so that testing has no more
            images in memory at once than training has.
        shard: (rank, number of processes). Each process gets its part of each batch, as equal as
            can be. One that has no part of a small last batch gets an image labelled `NO_LABEL`,
            so that all take the same number of steps.

    Raises:
        DataError: data missing or broken, a download impossible, or ten crops of small images.
    """
    common = dict(batch_size=batch_size, shard=shard, device=device)
    drawn = dict(shuffle=True, seed=seed)
    if dataset.in_memory:
        images, labels = _read_split(dataset, 'train')
        if dataset.mean is None:
            mean, std = _measure(images)
            dataset = dataclasses.replace(dataset, mean=mean, std=std)
        train = MemoryLoader(images, labels, mean=dataset.mean, std=dataset.std, augment=augment,
                             **common, **drawn)
    else:
        view = (_train_transform if augment else _test_transform)(dataset.image_size)
        listing = _list_images(_split_folder(dataset.root, 'train'), dataset.classes)
        train = WorkerLoader(listing.samples, view, mean=dataset.mean, std=dataset.std,
                             workers=workers, **common, **drawn)
    common['batch_size'] = -(-batch_size // parts)
    return dataset, train, make_test_loader(dataset, workers=workers, ten_crop=ten_crop, **common)


def make_test_loader(dataset, batch_size, *, device, workers=0, ten_crop=False, shard=(0, 1)):
    """As the last one of `make_loaders`; training images are read only to measure what is unknown.

    With `ten_crop` there is a tenth of the images in a batch, and so as many crops.

    Raises:
        DataError: as `make_loaders`.
    """
    _check_ten_crop(dataset, ten_crop)
    common = dict(batch_size=batch_size, shard=shard, device=device)
    if dataset.in_memory:
        mean, std = (dataset.mean, dataset.std) if dataset.mean is not None else \
            _measure(_read_split(dataset, 'train')[0])
        return MemoryLoader(*_read_split(dataset, 'test'), mean=mean, std=std, **common)
    listing = _list_images(_split_folder(dataset.root, 'test'), dataset.classes)
    if ten_crop:
        common['batch_size'] = -(-batch_size // 10)
    return WorkerLoader(listing.samples, _test_transform(dataset.image_size, ten_crop),
                        mean=dataset.mean, std=dataset.std, workers=workers, **common)


def read_image(path, dataset, ten_crop=False):
    """A file as the model wants to see it, float32 [3, H, W], or [10, 3, H, W] of ten crops.

    Raises:
        DataError: not an image, or a broken one; or ten crops of a model for small images.
    """
    _check_ten_crop(dataset, ten_crop)
    image = _decode(path)
    view = (_square(image, dataset.image_size) if dataset.in_memory
            else _test_transform(dataset.image_size, ten_crop)(image))
    return (view.float() - _channels(dataset.mean, 'cpu')) / _channels(dataset.std, 'cpu')


def _check_ten_crop(dataset, ten_crop):
    if ten_crop and dataset.in_memory:
        raise DataError(f'--ten-crop is for images larger than {SMALL} pixels, and '
                        f'{dataset.name} has images of {dataset.image_size}')


class _Order:
    """Which images a batch of an epoch has, and which of them are this process's."""

    def __init__(self, num_images, batch_size, shard, shuffle, seed):
        self.num_images, self.batch_size, self.shard = num_images, batch_size, shard
        self.shuffle, self.seed = shuffle, seed
        self.num_batches = -(-num_images // batch_size)

    def set_epoch(self, epoch, start):
        """Returns the generator that the rest of what is random in this epoch is drawn from."""
        self.start = start
        # The Mersenne twister looks at 32 bits of the seed; an odd factor keeps all seeds apart.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**32)
        self.permutation = (torch.randperm(self.num_images, generator=generator) if self.shuffle
                            else torch.arange(self.num_images))
        return generator

    def part(self, i):
        """Indices of this process's images of batch i, int64; and whether they are to count."""
        rank, processes = self.shard
        batch = self.permutation[i * self.batch_size:(i + 1) * self.batch_size]
        part = batch.tensor_split(processes)[rank]
        return (part, True) if len(part) else (batch[:1], False)


class _Loader:
    """What loaders have in common; a class of them has `__iter__` as well."""

    def __init__(self, num_images, batch_size, *, mean, std, device, shuffle, seed, shard):
        self.num_images, self.device = num_images, device
        self.mean, self.std = _channels(mean, device), _channels(std, device)
        self.order = _Order(num_images, batch_size, shard, shuffle, seed)

    def __len__(self):
        return self.order.num_batches

    def images_in(self, i):
        """The number of images in batch i, in all processes."""
        batch_size = self.order.batch_size
        return min(batch_size, self.num_images - i * batch_size)


class MemoryLoader(_Loader):
    """Batches of images [N, 3, H, W] that lie on the device as uint8.

    With `augment`, each image is cropped from its zero-padded self and mirrored half of the time
    (paper, section 4.1). The zeros are added after the normalisation, as in the official code.
    """

    def __init__(self, images, labels, batch_size, *, mean, std, device, shuffle=False,
                 augment=False, seed=1, shard=(0, 1)):
        self.images, self.labels = images.to(device), labels.to(device)
        self.augment = augment
        super().__init__(len(images), batch_size, mean=mean, std=std, device=device,
                         shuffle=shuffle, seed=seed, shard=shard)
        self.set_epoch(1)

    def set_epoch(self, epoch, start=0):
        # Drawn for the whole epoch at once and on the CPU: the same on every device, and for an
        # image the same whatever the batch size and the number of processes.
        n, generator = self.num_images, self.order.set_epoch(epoch, start)
        offsets = torch.randint(2 * PAD + 1, (n, 2), generator=generator)
        mirrored = torch.randint(2, (n,), generator=generator, dtype=torch.bool)
        self.offsets, self.mirrored = offsets.to(self.device), mirrored.to(self.device)
        self.order.permutation = self.order.permutation.to(self.device)

    def __iter__(self):
        for i in range(self.order.start, len(self)):
            chosen, counts = self.order.part(i)
            images = (self.images[chosen].float() - self.mean) / self.std
            if self.augment:
                images = crop_and_mirror(images, self.offsets[chosen], self.mirrored[chosen])
            labels = self.labels[chosen]
            yield images, labels if counts else torch.full_like(labels, NO_LABEL)


def crop_and_mirror(images, offsets, mirrored, pad=PAD):
    """Crop each image at its own offset from its zero-padded self, then mirror some.

    Shapes: images [B, C, H, W]; offsets int64 [B, 2], down and right, in 0..2*pad; mirrored bool
    [B]. Returns [B, C, H, W].
    """
    b, c, h, w = images.shape
    arange = lambda n: torch.arange(n, device=images.device)
    columns = torch.where(mirrored[:, None], w - 1 - arange(w), arange(w))
    rows = offsets[:, :1] + arange(h)          # [B, H]
    columns = offsets[:, 1:] + columns         # [B, W]
    padded = F.pad(images, (pad, pad, pad, pad))
    return padded[arange(b)[:, None, None, None], arange(c)[:, None, None],
                  rows[:, None, :, None], columns[:, None, None, :]]


class WorkerLoader(_Loader):
    """Batches of image files that worker processes decode and transform, to uint8.

    On CUDA they are copied from pinned memory on a stream of their own, while the device is still
    at the step before, and normalised there: a quarter of the bytes to send.
    """

    def __init__(self, samples, transform, batch_size, *, mean, std, device, workers=0,
                 shuffle=False, seed=1, shard=(0, 1)):
        super().__init__(len(samples), batch_size, mean=mean, std=std, device=device,
                         shuffle=shuffle, seed=seed, shard=shard)
        on_cuda = device.type == 'cuda'
        self.copies = torch.cuda.Stream(device) if on_cuda else None
        self.work = _WorkList(self.order)
        self.loader = DataLoader(
            _ImageFiles(samples, transform), batch_sampler=self.work, num_workers=workers,
            pin_memory=on_cuda, persistent_workers=workers > 0,
            worker_init_fn=_leave_signals_to_main,
            generator=torch.Generator())  # or it would draw from the one that dropout draws from
        self.set_epoch(1)

    def set_epoch(self, epoch, start=0):
        generator = self.order.set_epoch(epoch, start)
        self.work.seeds = torch.randint(2**31, (self.num_images,), generator=generator)

    def __iter__(self):
        try:
            for i, (images, labels) in enumerate(self.loader, start=self.order.start):
                if not self.order.part(i)[1]:
                    labels.fill_(NO_LABEL)
                images, labels = self._send(images), self._send(labels)
                yield (images.float() - self.mean) / self.std, labels
        except DataError as error:  # out of a worker it comes wrapped in that worker's traceback
            raise DataError(str(error).strip().rpartition('DataError: ')[2]) from None

    def _send(self, batch):
        if self.copies is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.copies):
            batch = batch.to(self.device, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self.copies)
        batch.record_stream(torch.cuda.current_stream())  # its memory is free once that is done
        return batch


class _WorkList:
    """Yields for each batch its (index, seed): a seed an image, for its random transforms."""

    def __init__(self, order):
        self.order = order

    def __iter__(self):
        for i in range(self.order.start, self.order.num_batches):
            chosen, _ = self.order.part(i)
            yield list(zip(chosen.tolist(), self.seeds[chosen].tolist()))


class _ImageFiles(torch.utils.data.Dataset):
    """Files as (uint8 tensor, label), by (index, seed)."""

    def __init__(self, samples, transform):
        self.samples, self.transform = samples, transform

    def __getitem__(self, index_and_seed):
        index, seed = index_and_seed
        path, label = self.samples[index]
        image = _decode(path)
        with torch.random.fork_rng(devices=[]):  # torchvision's transforms draw from torch's own
            torch.default_generator.manual_seed(seed)
            return self.transform(image), label


def _train_transform(size):
    """As fb.resnet.torch, which the official ImageNet models were trained with."""
    return transforms.Compose([transforms.RandomResizedCrop(size),
                               transforms.RandomHorizontalFlip(),
                               transforms.ColorJitter(0.4, 0.4, 0.4),
                               transforms.PILToTensor()])


def _test_transform(size, ten_crop=False):
    resize = transforms.Resize(round(size * 256 / 224))
    if not ten_crop:
        return transforms.Compose([resize, transforms.CenterCrop(size), transforms.PILToTensor()])
    return transforms.Compose([resize, transforms.PILToTensor(), transforms.TenCrop(size),
                               torch.stack])


def _leave_signals_to_main(_):
    # Ctrl-C, and many schedulers' SIGTERM and SIGUSR1, reach the workers too. They must live on for
    # the main process to finish its step: they ignore all but their parent's SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_when_parent_says, daemon=True).start()


def _end_when_parent_says():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class DataClock:
    """How long the device waited for batches.

    A GPU's host runs ahead of it and waits for what the GPU does not miss yet: there, events tell
    when the GPU was done with a step and when it got the next batch.
    """

    def __init__(self, device):
        self.on_cuda = device.type == 'cuda'
        self.restart()

    def restart(self):
        self.waits = []  # pairs of marks
        self.step_is_done()

    def _mark(self):
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def step_is_done(self):
        self.done = self._mark()

    def batch_is_here(self):
        self.waits.append((self.done, self._mark()))

    def seconds(self):
        """Since the last restart; the device must be done with all that it was given."""
        if self.on_cuda:
            return sum(done.elapsed_time(here) for done, here in self.waits) / 1e3
        return sum(here - done for done, here in self.waits)


def _channels(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def _measure(images):
    """Mean and standard deviation of each channel, of uint8 [N, C, H, W], in float64."""
    levels = torch.arange(256, dtype=torch.float64)
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256)
                          for channel in images.transpose(0, 1)]).double()
    counts /= counts.sum(1, keepdim=True)
    mean = counts @ levels
    variance = counts @ levels**2 - mean**2
    std = variance.clamp(min=1).sqrt()  # an empty channel stays finite
    return tuple(mean.tolist()), tuple(std.tolist())


def _read_split(dataset, split):
    """uint8 images [N, 3, H, W] and int64 labels [N] of 'train' or 'test'."""
    if dataset.name == 'shapes':
        return draw_shapes(split)
    if dataset.name in ('imagenet', 'folder'):
        return _read_folder(dataset, split)
    return _read_torchvision(dataset, split)


def _read_torchvision(dataset, split):
    """cifar10, cifar100, svhn: through torchvision, which also downloads them."""
    root, train = dataset.root, split == 'train'
    try:
        if dataset.name == 'svhn':  # the paper trains on both sets, 604,388 images
            parts = [datasets.SVHN(root, part, download=True)
                     for part in (('train', 'extra') if train else ('test',))]
            images = np.concatenate([part.data for part in parts])
            labels = np.concatenate([part.labels for part in parts])
        else:
            kind = datasets.CIFAR100 if dataset.name == 'cifar100' else datasets.CIFAR10
            part = kind(root, train, download=True)
            images, labels = part.data.transpose(0, 3, 1, 2), np.array(part.targets)
    except Exception as error:  # no network, no disk, a broken archive: torchvision raises anything
        raise DataError(_how_to_get(dataset, error)) from error
    return torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels).long()


def _how_to_get(dataset, error):
    files = {'cifar10': ['cifar-10-python.tar.gz'], 'cifar100': ['cifar-100-python.tar.gz'],
             'svhn': ['train_32x32.mat', 'extra_32x32.mat', 'test_32x32.mat']}[dataset.name]
    missing = [name for name in files if not (dataset.root / name).exists()]
    state = 'missing from' if missing else 'broken in'
    reason = ' '.join(str(error).split()) or type(error).__name__
    return (f'{", ".join(missing or files)} {state} {dataset.root} and not to be downloaded '
            f'({reason}): put it there, or name the folder that has it by --data; {HINT}')


def _split_folder(root, split):
    """`train/` or, for 'test', `val/` or without one `test/`."""
    names = ('train',) if split == 'train' else ('val', 'test')
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(f'no {" or ".join(names)} in {root}: --data must name a folder with train/ and '
                    f'val/ (or test/), and in each a folder of images a class; {HINT}')


def _class_names(folder):
    try:
        return tuple(datasets.folder.find_classes(folder)[0])
    except OSError as error:
        raise DataError(f'{folder}: {error}') from error


def _list_images(folder, classes):
    """torchvision's ImageFolder, whose folders must be those of the classes trained on."""
    odd = set(_class_names(folder)) ^ set(classes)
    if odd:
        raise DataError(f'{folder}: the class folders are not those trained on: {min(odd)} is in '
                        f'only one of the two')
    try:
        return datasets.ImageFolder(folder)
    except OSError as error:  # a class folder without images
        raise DataError(f'{folder}: {error}') from error


def _read_folder(dataset, split):
    listing = _list_images(_split_folder(dataset.root, split), dataset.classes)
    paths, labels = zip(*listing.samples)
    images = torch.empty(len(paths), 3, dataset.image_size, dataset.image_size, dtype=torch.uint8)
    pool = ThreadPoolExecutor()
    try:
        views = pool.map(lambda path: _square(_decode(path), dataset.image_size), paths)
        bar = tqdm(views, f'reading {split}', len(paths), leave=False,
                   disable=not sys.stdout.isatty())
        for i, view in enumerate(bar):
            images[i] = view
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C doesn't wait for the rest
    return images, torch.tensor(labels)


def _decode(path):
    """A file as an RGB picture, wholly read."""
    try:
        with Image.open(path) as image:
            if max(image.size) > 1000 * min(image.size):  # scaled by its shorter side it were huge
                raise ValueError(f'{image.width} x {image.height} pixels')
            if image.mode.startswith('I'):  # 16 bits of grey, which PIL would clip at 255
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            elif 'transparency' in image.info:
                image = image.convert('RGBA')
            return image.convert('RGB')
    except Exception as error:  # a broken file may make PIL stumble on anything; or it is a bomb
        reason = ' '.join(str(error).split())
        raise DataError(f'{path}: cannot be read as an image ({reason})') from error


def _square(image, size):
    """A picture as uint8 [3, size, size]: the shorter side scaled to size, the middle cropped."""
    if image.size != (size, size):
        image = TF.center_crop(TF.resize(image, size), size)
    return TF.pil_to_tensor(image)


def draw_shapes(split):
    """The built-in data set: one of ten shapes in each image, drawn from a fixed seed.

    Place, size, colours and contrast are random and the shape may be lighter or darker than what
    is behind it, so that no pixel tells anything by itself: a linear classifier fails on them.
    Returns uint8 images [N, 3, 32, 32] and int64 labels [N]; 'train' has 6,000, 'test' 1,000.
    """
    count, seed = {'train': (6000, 1), 'test': (1000, 2)}[split]
    rng = np.random.RandomState(seed)  # the one generator of NumPy whose stream is frozen
    labels = np.arange(count) % len(SHAPES)
    radius = rng.uniform(4, 12, (count, 1, 1))
    # Distances of each pixel from the centre, in units of the radius: right and down.
    centre = 15.5 + rng.uniform(-1, 1, (2, count, 1, 1)) * (15 - radius)
    x = (np.arange(32)[None, None, :] - centre[0]) / radius
    y = (np.arange(32)[None, :, None] - centre[1]) / radius
    depth = np.empty((count, 32, 32))
    for i, shape in enumerate(SHAPES):
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
    triangle_up = np.minimum(0.7 - y, (y + 1) / 2 - ax) * 0.9
    triangle_down = np.minimum(0.7 + y, (1 - y) / 2 - ax) * 0.9
    arm = lambda u, v: np.minimum(0.28 - u, 1 - v)
    bars = lambda u, v: np.minimum(0.25 - np.abs(u - 0.6), 0.9 - v)
    diagonal, other = np.abs(x + y) / 2**0.5, np.abs(x - y) / 2**0.5
    return {
        'disk': disk, 'ring': np.minimum(disk, 0.4 - disk),
        'square': square, 'frame': np.minimum(square, 0.35 - square),
        'triangle up': triangle_up, 'triangle down': triangle_down,
        'plus': np.maximum(arm(ax, ay), arm(ay, ax)),
        'cross': np.maximum(arm(diagonal, other), arm(other, diagonal)),
        'horizontal bars': bars(ay, ax), 'vertical bars': bars(ax, ay),
    }[shape]
