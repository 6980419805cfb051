"""The table of data sets, and the description of the one in use.

    dataset = datasets.describe('cifar10', 'work/data')
    images, labels = DATASETS['cifar10'].read('train', 'work/data')   # uint8 [N, 3, 32, 32], int64

To add a data set that fits in memory, with images of any size and number of channels, write a
function that reads it and an entry in `DATASETS`. For example STL-10, 96 x 96 pixels, which
torchvision can download (`python attic/channel_stats.py --dataset stl10` measures the statistics):

    def read_stl10(split, root):
        import torchvision

        with _explain_download('stl10_binary.tar.gz', root, 'stl10_binary'):
            part = torchvision.datasets.STL10(root, split, download=True)
        return _tensors(part.data, part.labels)

    DATASETS['stl10'] = Dataset(
        classes=tuple('airplane bird car cat deer dog horse monkey ship truck'.split()),
        image_size=96, read=read_stl10, mean=(114.0, 112.2, 103.6), std=(66.4, 65.6, 69.3),
        recipe=dict(epochs=100))

The images are held, cropped and mirrored in memory; the stem depends on their size (networks.py).
torch and torchvision are imported inside functions, so that flags.py, which needs the names and
recipes, answers at once.
"""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median_low

import numpy as np

from training.console import DataError
from training.folds import hold_out
from training.labels import VAL_FOLDERS, read_table

SMALL = 64       # pixels: up to this size, folders are held in memory and the stem is CIFAR's
MAX_SIZE = 4096  # pixels: the largest --image-size
MAX_CHANNELS = 1024

CIFAR10_CLASSES = tuple('airplane automobile bird cat deer dog frog horse ship truck'.split())
CIFAR100_CLASSES = tuple('''
    apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus
    butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch
    crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo
    keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle mountain
    mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain
    plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk
    skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper table tank telephone
    television tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman
    worm'''.split())
SHAPES = ('disk', 'ring', 'square', 'frame', 'triangle up', 'triangle down', 'plus', 'cross',
          'horizontal bars', 'vertical bars')


@dataclass(frozen=True)
class Description:
    """Classes, image size, statistics and splits of a data set; holds no images."""

    name: str
    root: Path
    classes: tuple   # names, in the order of the labels
    image_size: int  # of the model's input, or (height, width) if they differ
    mean: tuple      # of each channel, 0..255
    std: tuple
    value_range: tuple = None  # (low, high), scaled to 0..255 in images of more than 8 bits
    val_split: float = 0.0     # share of the training images that is held out
    fold: str = None           # 'i/k': the fold that is held out
    split_seed: int = 1
    labels_file: Path = None   # the table of `labels.read_table`; None: classes are folders
    multi_label: bool = False  # labels are float32 [N, C] of 0, 1 and NaN (unknown)
    only_test: bool = False    # all rows of a labels file without a column `split` are 'test'

    @property
    def in_memory(self):
        return DATASETS[self.name].read is not None or is_small(self.image_size)

    @functools.cached_property
    def splits(self):
        """{'train': source, 'test': source, ...}: where the images of each split come from.

        A source is a folder or, in memory and in a labels file, a split. The images that are held
        out come from the source of 'train'.
        """
        return find_splits(self.root, self.name, self.labels_file, self.holds_out, self.only_test)

    @property
    def holds_out(self):
        return bool(self.val_split or self.fold)

    @property
    def selection_split(self):
        """The split that chooses best.pth: 'val' if there are 'val' and 'test', else 'test'."""
        return 'val' if 'val' in self.splits else 'test'

    def is_divided(self, split):
        """True if only a part of the images in the source of `split` belongs to it."""
        return self.holds_out and self.splits[split] == self.splits['train']

    def choose(self, split, labels, names, groups=None):
        """bool [N]: the images of a divided source that belong to `split`."""
        if self.fold:
            i, k = map(int, self.fold.split('/'))
            shares, part = (1 / k,) * k, i - 1
        else:
            shares, part = (self.val_split, 1 - self.val_split), 0
        held_out = hold_out(labels, names, shares, part, self.split_seed, groups)
        return held_out == (split != 'train')

    def plain(self):
        """Everything except paths, as plain values, for a checkpoint."""
        return {key: value for key, value in dataclasses.asdict(self).items()
                if key not in ('root', 'labels_file', 'only_test')}


def sides(image_size):
    """(height, width) of an image size: one number, or a pair."""
    return (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)


def is_small(image_size):
    return max(sides(image_size)) <= SMALL


def show_size(image_size):
    """'224', or '320 x 256': height x width, as for --image-size."""
    return ' x '.join(map(str, dict.fromkeys(sides(image_size))))


def describe(name, root='work/data', image_size=None, split='train', *, in_channels=3,
             value_range=None, labels_file=None, val_split=0.0, fold=None, seed=1, workers=0):
    """The Description of a data set, without loading it.

    Args:
        name: a key of `DATASETS`.
        root: where the files are, or are downloaded to; for imagenet and folder, the folder with
            the splits (`find_splits`), each with a folder of images per class.
        image_size, in_channels, value_range, labels_file, workers: for folders of images only.
        image_size: one number or (height, width). By default 224 or, if the median image has at
            most `SMALL` pixels a side, the median shorter side.
        split: 'train' or 'test', whose folders are the classes.
        in_channels: 1 for grey, 3 for colours, or any other number, which all images must then
            have.
        value_range: (low, high) of images of more than 8 bits. By default, if the first training
            image is one, the lowest and highest value in the training images.
        labels_file: a CSV file (labels.py) with paths relative to `root`.
        val_split, fold: hold out this share of the training images, or fold 'i/k', of each class;
            `seed` chooses them.
        workers: number of processes that measure the value range.

    Raises:
        DataError: no such data, a single class to train on, an option that does not apply to this
            data set, or values without a natural range.
    """
    root, entry = Path(root), DATASETS[name]
    held_out = dict(val_split=val_split, fold=fold, split_seed=seed)
    if entry.read is not None:
        size, channels = entry.image_size, len(entry.mean)
        if image_size not in (None, size) or in_channels != channels or value_range or labels_file:
            raise DataError(f'{name} has images of {size} pixels and {channels} channels: '
                            f'--labels, --value-range, and another --in-channels or --image-size '
                            f'are only for folder and imagenet')
        return Description(name, root, entry.classes, size, entry.mean, entry.std, **held_out)
    from training import image_files  # imports torch

    labels_file = labels_file and Path(labels_file)
    only_test = split == 'test'
    splits = find_splits(root, name, labels_file, bool(val_split or fold), only_test)
    if split not in splits:
        raise missing_split(root, split, labels_file)
    classes, multi_label = read_classes(splits[split], split, labels_file)
    mean, std = (for_channels(values, in_channels) for values in (entry.mean, entry.std))
    dataset = Description(name, root, tuple(classes), image_size or 224, mean, std,
                          value_range and tuple(value_range), **held_out, labels_file=labels_file,
                          multi_label=multi_label, only_test=only_test)
    if name == 'imagenet':
        return dataset
    samples = image_files.list_images(dataset, split)
    # Several, where their size is not known.
    images = image_files.some_readable(samples, in_channels, count=7 if image_size is None else 1)
    if image_size is None:
        dataset = dataclasses.replace(dataset, image_size=small_size(images) or 224)
    if value_range is None and split == 'train' and image_files.needs_range(images[0]):
        value_range = image_files.measure_range(samples, in_channels, workers)
        dataset = dataclasses.replace(dataset, value_range=value_range)
    return dataset


def for_channels(values, channels):
    """Values of red, green and blue: averaged for 1 channel, repeated for other numbers."""
    if channels == 1:
        return (sum(values) / 3,)
    return (values * channels)[:channels]  # as in weights.adapt_channels


def small_size(images):
    """The median shorter side of images; None if the median image is larger than `SMALL`."""
    longer, shorter = (median_low(side(image.size) for image in images) for side in (max, min))
    return shorter if longer <= SMALL else None


def with_statistics(dataset, mean=None, std=None):
    """Replace the statistics of a Description by those that are given, on the scale 0..1.

    Raises:
        DataError: neither one value nor one for each channel.
    """
    channels = len(dataset.mean)
    for name, values in (('mean', mean), ('std', std)):
        if values is None:
            continue
        if len(values) not in (1, channels):
            raise DataError(f'--{name} takes a value for each of {channels} channels, or one for '
                            f'all')
        values = tuple(255 * value for value in values) * (channels // len(values))
        dataset = dataclasses.replace(dataset, **{name: values})
    return dataset


def read_classes(source, split, labels_file=None):
    """The class names in the source of a split, and True if the labels are multi-label.

    Raises:
        DataError: there is only one class to train on.
    """
    if labels_file:
        table = read_table(labels_file).of_split(source)
        classes, multi_label = table.classes(), table.labels is None
        problem = f'{labels_file} has only one class for training'
    else:
        from training import image_files  # imports torch

        classes, multi_label = image_files.class_names(source), False
        problem = f'{source} has only one class'
    if split == 'train' and len(classes) == 1 and not multi_label:
        advice = '' if labels_file else (': its subfolders are the classes; is --data a folder '
                                         'too high?')
        raise DataError(f'{problem}, {classes[0]}{advice}')
    return classes, multi_label


def find_splits(root, name, labels_file=None, holds_out=False, only_test=False):
    """{split: source}, see `Description.splits`.

    If there are both 'val' and 'test', 'val' chooses best.pth and 'test' is reported at the end; if
    there is only one of them, it is called 'test'. Images that are held out of 'train' are 'val'.
    Images without splits (a root without `train/`, a table without that column) are 'train'.

    Raises:
        DataError: there are validation images already, and others are to be held out.
    """
    if DATASETS[name].read is not None:
        sources = {split: split for split in DATASETS[name].splits}
    elif labels_file:
        only = 'test' if only_test and not holds_out else 'train'
        names = read_table(labels_file).splits or [only]
        sources = {split: split for split in ('train', 'val', 'test') if split in names}
    else:
        found = [split for split in ('train', *VAL_FOLDERS, 'test') if (root / split).is_dir()]
        vals = [split for split in found if split in VAL_FOLDERS]
        if len(vals) > 1:
            raise DataError(f'{root} has {" and ".join(vals)}: keep one of them')
        sources = {'val' if split in vals else split: root / split for split in found}
        if holds_out and 'train' not in sources:
            sources = {'train': root}
    if holds_out:
        if 'train' not in sources:
            raise missing_split(root, 'train', labels_file)
        if 'val' in sources:
            raise DataError(f'{labels_file or root} has images for validation, {sources["val"]}: '
                            f'leave out --val-split and --fold, or move them into train')
        sources['val'] = sources['train']
    if 'val' in sources and 'test' not in sources:
        sources['test'] = sources.pop('val')
    return sources


def missing_split(root, split, labels_file=None):
    """The DataError for a missing split; names the folders found instead."""
    if labels_file:
        return DataError(f'{labels_file} has no {split} images: its column split says train, '
                         f'val or test; without one, --val-split 0.1 or --fold 1/5 divides them')
    names = {'train': 'train', 'val': 'val beside test', 'test': 'val or test'}[split]
    found = []
    try:
        found = sorted(f'{path.name}/' for path in root.iterdir() if path.is_dir())
    except FileNotFoundError:
        pass
    except OSError as error:
        return DataError(f'{root}: {error.strerror}')
    found = f' (only {", ".join(found[:5])}{", ..." if len(found) > 5 else ""})' if found else ''
    return DataError(f'no {names} in {root}{found}: --data must name a folder with train/ and '
                     f'val/ or test/, and in each a folder of images per class; --val-split 0.1 '
                     f'replaces val/; --dataset shapes needs no data')


# ---- readers: uint8 images [N, C, H, W] and int64 labels [N] of 'train' or 'test' ----------------

def read_cifar(version, split, root):
    """CIFAR-10 or CIFAR-100, from torchvision's Python version or from the binary version.

    `version` is a `CifarVersion`. Downloads the Python version if neither is there.
    """
    import torchvision

    torchvision_class = getattr(torchvision.datasets, version.name)
    has_binary = (root / version.binary_folder).is_dir()
    if has_binary and not (root / torchvision_class.base_folder).is_dir():
        return read_binary_cifar(version, split, root)
    with _explain_download(torchvision_class.filename, root, version.binary_folder):
        part = torchvision_class(root, split == 'train', download=True)
    images = part.data.transpose(0, 3, 1, 2).copy()  # [N, H, W, C]
    return _tensors(images, part.targets)


def read_binary_cifar(version, split, root):
    """The official binary version of CIFAR, checked against its MD5 sums.

    A record is the label (in CIFAR-100 a coarse and a fine one) and 3 x 32 x 32 values.
    """
    content = b''
    for name, md5 in version.files[split].items():
        path = root / version.binary_folder / name
        try:
            batch = path.read_bytes()
        except OSError as error:
            raise DataError(f'{path}: {error.strerror}: unpack {version.archive} in {root}, or '
                            f'remove {version.binary_folder} there') from error
        if hashlib.md5(batch, usedforsecurity=False).hexdigest() != md5:
            raise DataError(f'{path} is not the official file, whose MD5 sum is {md5}: unpack '
                            f'{version.archive} in {root} again')
        content += batch
    label_bytes = version.label_bytes
    records = np.frombuffer(content, np.uint8).reshape(-1, label_bytes + 3 * 32 * 32)
    images = records[:, label_bytes:].reshape(-1, 3, 32, 32).copy()
    return _tensors(images, records[:, label_bytes - 1])


def read_svhn(split, root):
    """SVHN; 'train' is train and extra, 604,388 images (paper, section 4.1)."""
    import torchvision

    with _explain_download('train_32x32.mat, extra_32x32.mat, test_32x32.mat', root):
        parts = [torchvision.datasets.SVHN(root, part, download=True)
                 for part in (('train', 'extra') if split == 'train' else ('test',))]
    return _tensors(np.concatenate([part.data for part in parts]),
                    np.concatenate([part.labels for part in parts]))


def _tensors(images, labels):
    import torch

    return torch.from_numpy(images), torch.tensor(labels, dtype=torch.int64)


@contextlib.contextmanager
def _explain_download(files, root, alternative=None):
    """Turn any error of torchvision (network, disk, a broken archive) into a DataError."""
    try:
        yield
    except Exception as error:
        what = f'{files} or the folder {alternative}' if alternative else files
        raise DataError(
            f'{files}: missing from {root} or broken, and the download failed ({error}): put '
            f'{what} there, or name its folder by --data; --dataset folder reads a folder of '
            f'images, --dataset shapes needs no data') from error


@dataclass(frozen=True)
class CifarVersion:
    """The official binary version of CIFAR-10 or CIFAR-100: its archive and files."""

    name: str            # of torchvision's class
    archive: str
    binary_folder: str
    label_bytes: int
    files: dict          # MD5 sums of the files, by split and name


CIFAR10 = CifarVersion('CIFAR10', 'cifar-10-binary.tar.gz', 'cifar-10-batches-bin', 1, {
    'train': {'data_batch_1.bin': '5dd7e06a14cb22eb9f671a540d1b7c25',
              'data_batch_2.bin': '5ea93a67294ea407fff1d09f752e9692',
              'data_batch_3.bin': '942cd6a4bcdd0dd3c604fbe906cb4421',
              'data_batch_4.bin': 'ae636b3ba5c66a11e91e8cb52e771fcb',
              'data_batch_5.bin': '53f37980c15c3d472c316c40844f3f0d'},
    'test': {'test_batch.bin': '803d5f7f4d78ea53de84dbe85f74fb6d'}})
CIFAR100 = CifarVersion('CIFAR100', 'cifar-100-binary.tar.gz', 'cifar-100-binary', 2, {
    'train': {'train.bin': '6172c7755cfe09b2fe270c85cebc1b15'},
    'test': {'test.bin': '4499cfba6c016c1be1438163640a0898'}})


def draw_shapes(split, root=None):
    """The built-in data set: one of ten shapes in each image, drawn from a fixed seed.

    Position, size, colours and contrast are random, and the shape may be lighter or darker than the
    background, so that single pixels carry no information: a linear classifier fails.
    Returns uint8 images [N, 3, 32, 32] and int64 labels [N]; 'train' has 6,000, 'test' 1,000.
    """
    count, seed = {'train': (6000, 1), 'test': (1000, 2)}[split]
    rng = np.random.RandomState(seed)  # NumPy guarantees that its stream never changes
    labels = np.arange(count) % 10
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
    return _tensors(images, labels)


def _shape_depth(shape, x, y):
    """Approximate signed distance to the edge of a shape of radius 1, positive inside."""
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


# ---- the table ------------------------------------------------------------------------------

@dataclass(frozen=True)
class Dataset:
    """An entry of the table. Means and standard deviations are per channel, in 0..255."""

    mean: tuple
    std: tuple
    classes: tuple = ()         # in the order of the labels; (): sorted folder names
    image_size: int = None      # pixels, height and width
    read: Callable = None       # (split, root) -> images, labels; None: folders of images
    splits: tuple = ('train', 'test')  # of `read`; 'val', if included, chooses best.pth
    augment: bool = True        # crop and mirror by default
    recipe: dict = dataclasses.field(default_factory=dict)  # defaults of flags
    recipe_without_augment: dict = dataclasses.field(default_factory=dict)
    lr_drop_every: int = None   # epochs; None: at half and three quarters of the epochs


# The statistics are the official code's (attic/channel_stats.py measures them). SVHN is only
# divided by 255 (paper, section 4.1). Folders have ImageNet's, which pretrained weights expect.
IMAGENET_STATISTICS = dict(mean=(123.675, 116.28, 103.53), std=(58.395, 57.12, 57.375))
DATASETS = {
    'cifar10': Dataset(
        classes=CIFAR10_CLASSES, image_size=32, read=functools.partial(read_cifar, CIFAR10),
        mean=(125.3, 123.0, 113.9), std=(63.0, 62.1, 66.7),
        recipe_without_augment=dict(drop_rate=0.2)),
    'cifar100': Dataset(
        classes=CIFAR100_CLASSES, image_size=32, read=functools.partial(read_cifar, CIFAR100),
        mean=(129.3, 124.1, 112.4), std=(68.2, 65.4, 70.4),
        recipe_without_augment=dict(drop_rate=0.2)),
    'svhn': Dataset(
        classes=tuple('0123456789'), image_size=32, read=read_svhn,
        mean=(0.0,) * 3, std=(255.0,) * 3, augment=False,
        recipe=dict(epochs=40, drop_rate=0.2, mirror=False)),
    'imagenet': Dataset(
        **IMAGENET_STATISTICS, recipe=dict(epochs=90, batch_size=256), lr_drop_every=30),
    'folder': Dataset(**IMAGENET_STATISTICS),
    'shapes': Dataset(
        classes=SHAPES, image_size=32, read=draw_shapes,
        mean=(127.0938, 127.135414, 127.086905), std=(80.26133, 79.86884, 79.862017)),
}
