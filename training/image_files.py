"""Image files: finding them, reading and transforming them, in worker processes if they are many.

    images = image_files.list_images(dataset, 'train')            # an ImageList: paths and labels
    transform = image_files.test_transform(dataset)
    pixels = image_files.read_pixels(dataset, transform, 'photo.jpg')   # [3, 224, 224]
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import os
import signal
import threading
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from training import console
from training.console import BadImages, DataError
from training.datasets import no_split, sides
from training.decoding import Levels, SetupError, decode, needs_range
from training.labels import read_table

SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.tif', '.tiff', '.bmp', '.gif', '.webp',
            '.avif', '.jp2', '.j2k', '.ppm', '.pgm', '.pbm', '.pnm', '.npy', '.dcm', '.dicom')
HEATMAP = '.heatmap.png'  # what predict.py adds to an image's name, perhaps in its folder
# Names of classes that suggest a wrong --data.
SPLIT_NAMES = {'train', 'training', 'test', 'testing', 'val', 'valid', 'validation', 'image',
               'images', 'img', 'imgs', 'data', 'dataset'}
MAX_ELONGATION = 4  # images more than 4 times as long as wide lose their ends before a centre crop
MAX_NAMED = 50      # files in an error message
# AlexNet's lighting noise with the constants of fb.resnet.torch, on the scale 0..1: eigenvectors
# (columns) and eigenvalues of ImageNet's RGB values, standard deviation of the random factors.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
LIGHTING_STD = 0.1


# ---- find ------------------------------------------------------------------------------------

def find_images(folder, seen=None):
    """The paths of all images in a folder, sorted, and a Counter of its other files by suffix.

    Hidden files, hidden folders and heat maps are in neither. Links are followed, but each real
    folder is visited once: `seen` has the `folder_id` of those that are not to be visited.

    Raises:
        DataError: a folder that can't be read.
    """
    seen = ids_of_ancestors(folder) if seen is None else seen
    found, others = [], Counter()
    with explain_errors(folder):
        with os.scandir(folder) as entries:
            entries = sorted(entries, key=lambda entry: entry.name)
        for entry in entries:
            if entry.name.startswith('.') or entry.name.endswith(HEATMAP):
                continue
            if entry.is_dir():
                if folder_id(entry.path) not in seen:
                    seen.add(folder_id(entry.path))
                    images, other_files = find_images(entry.path, seen)
                    found += images
                    others += other_files
            elif not entry.is_file() and os.path.exists(entry.path):
                others['no regular file'] += 1  # a pipe; a dangling link is an unreadable image
            elif is_image(entry.name):
                found.append(entry.path)
            else:
                others[os.path.splitext(entry.name)[1].lower() or 'no suffix'] += 1
    return found, others


def is_image(path):
    """Whether a file is to be read, by its name: an image, neither hidden nor a heat map."""
    name = os.path.basename(path)
    return (name.lower().endswith(SUFFIXES) and not name.startswith('.')
            and not name.endswith(HEATMAP))


def ids_of_ancestors(folder):
    """The ids of a folder and of those that contain it, to which no link is followed."""
    folder = Path(folder).resolve()
    return {folder_id(path) for path in (folder, *folder.parents)}


def folder_id(folder):
    """The same for one folder, by whatever links it is reached."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def explain_errors(folder):
    try:
        yield
    except OSError as error:
        raise DataError(f'{error.filename or folder}: {error.strerror}') from error


def describe_unread(folder, others):
    """The line that says which files of `find_images` are not read."""
    kinds = ', '.join(f'{kind} ({count})' for kind, count in others.most_common(5))
    more = ', ...' if len(others) > 5 else ''
    return (f'{folder}: {others.total()} files are not read: {kinds}{more}; images are '
            f'{" ".join(SUFFIXES)}')


def no_formula(path):
    """The path, after ./ if a spreadsheet would take it for a formula: it names the same file."""
    path = str(path)
    return f'./{path}' if path.startswith(('=', '+', '-', '@', '\t', '\r')) else path


def class_names(folder):
    """The sorted names of the folders in a folder, without hidden ones.

    Raises:
        DataError: there are none, or the folder can't be read.
    """
    with explain_errors(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries
                       if not entry.name.startswith('.') and entry.is_dir())
    if not names:
        raise DataError(f'{folder} has no folders in it: it needs a folder of images a class')
    return names


@dataclass(frozen=True)
class ImageList:
    """Image files and their labels, in arrays: the memory of a worker process stays shared.

    (Of a list of paths it would get its own copy, page by page, as reference counts change.)
    """

    folder: str
    names: np.ndarray   # bytes [N], paths in the folder
    labels: np.ndarray  # int64 [N], or float32 [N, C] of 0, 1 and NaN (unknown)
    groups: np.ndarray = None  # bytes [N]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, chosen):
        """The images that a mask selects, bool [N]."""
        groups = None if self.groups is None else self.groups[chosen]
        return ImageList(self.folder, self.names[chosen], self.labels[chosen], groups)

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.names[i]))

    def digest(self):
        """Hexadecimal; it changes with the names, the labels and their order."""
        names = b'\0'.join(self.names.tolist())
        return hashlib.sha256(names + b'\0' + self.labels.tobytes()).hexdigest()


def list_images(dataset, split, warn=None):
    """The ImageList of a split: of folders sorted by class and name, of a labels file as it is.

    Args:
        dataset: a Description of a folder of images.
        split: 'train', or 'val' or 'test', in which classes may be missing.
        warn: called with each line about what looks like a mistake.

    Raises:
        DataError: no such split, no images in it or in a class to train on, classes that the data
            set doesn't have, or files and folders that can't be read.
    """
    if split not in dataset.splits:
        raise no_split(dataset.root, split, dataset.labels_file)
    list_all = images_of_table if dataset.labels_file else images_of_folder
    images = list_all(dataset, split, warn)
    if dataset.is_divided(split):
        images = images[dataset.choose(split, images.labels, images.names, images.groups)]
    if not len(images):
        raise DataError(f'{images.folder} has no images to {split} on')
    return images


def images_of_folder(dataset, split, warn):
    folder = str(dataset.splits[split])
    labels = {name: i for i, name in enumerate(dataset.classes)}
    names = class_names(folder)
    unknown = set(names) - set(labels)
    if unknown:
        raise DataError(f'{folder}: {min(unknown)} is not among the classes trained on')
    found, others = images_by_class(folder, names)
    empty = [name for name in names if not found[name]]
    if split == 'train' and empty:
        raise DataError(f'{folder}: no images for {", ".join(empty[:5])}; images are '
                        f'{" ".join(SUFFIXES)}')
    if warn is not None and split == 'train':
        warn_of_structure(folder, found, warn)
    if warn is not None and others and (split == 'train' or not dataset.is_divided(split)):
        warn(describe_unread(folder, others))
    start = len(os.path.join(folder, ''))
    return ImageList(
        folder, np.array([os.fsencode(path[start:]) for name in names for path in found[name]],
                         dtype=np.bytes_),
        np.repeat(np.array([labels[name] for name in names]), [len(found[name]) for name in names]))


def images_of_table(dataset, split, warn):
    """The images of a labels file: see `training/labels.py`."""
    folder, whole = str(dataset.root), read_table(dataset.labels_file)
    table = whole.of_split(dataset.splits[split])
    table.check('file', [os.path.isfile(os.path.join(folder, name)) for name in table.files],
                f'is not in --data {folder}')
    names, groups = (column and np.array([os.fsencode(name) for name in column])
                     for column in (table.files, table.groups))
    table.check_classes(split, warn)
    if warn is not None and split == 'train':
        whole.warn_of_shared_groups(warn)
    return ImageList(folder, names, table.label_array(dataset.classes), groups)


def images_by_class(folder, names):
    """The paths of each class's images, in a dictionary, and a Counter of other files."""
    with explain_errors(folder):
        ids = [folder_id(os.path.join(folder, name)) for name in names]
        with os.scandir(folder) as entries:
            loose = sum(is_image(entry.name) and entry.is_file() for entry in entries)
    first = {}
    for name, i in zip(names, ids):
        if first.setdefault(i, name) != name:
            raise DataError(f'{folder}: {first[i]} and {name} are the same folder')
    seen, found, others = {*ids_of_ancestors(folder), *ids}, {}, Counter()
    if loose:
        others['images outside of the folders of the classes'] = loose
    for name in names:
        found[name], other_files = find_images(os.path.join(folder, name), seen)
        others += other_files
    return found, others


def warn_of_structure(folder, found, warn):
    """Warn of classes that look like splits, and of images in none but deeper folders."""
    odd = [name for name in found if name.lower() in SPLIT_NAMES]
    if odd:
        warn(f'{folder}: classes are called {", ".join(odd)}: is --data a folder too high?')
    deeper = [os.path.dirname(path) for name, paths in found.items() for path in paths
              if os.path.dirname(path) != os.path.join(folder, name)]
    if len(deeper) == sum(map(len, found.values())):
        warn(f'{folder}: all images of its {len(found)} classes lie in deeper folders, such as '
             f'{deeper[0]}: if those are the classes, --data is too high')


# ---- read ------------------------------------------------------------------------------------

def read_image(path, dataset):
    """An image file as the model's input, float32 [C, H, W].

    Raises:
        DataError: as `decode`, or more than 8 bits without a range.
    """
    image = read_pixels(dataset, test_transform(dataset), path)
    return (image.float() - channels(dataset.mean, 'cpu')) / channels(dataset.std, 'cpu')


def channels(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def read_pixels(dataset, transform, path):
    """An image file, transformed: uint8 [C, H, W] or, in a data set with a value range, float32.

    Both are on the scale 0..255.
    """
    num_channels, value_range = len(dataset.mean), dataset.value_range
    image = decode(path, num_channels)
    if not isinstance(image, Levels):
        return transform(image) if value_range is None else transform(image).float()
    if needs_range(image):
        if value_range is None:
            raise DataError(f'{path} has more than 8 bits, of a range that is not known: train.py '
                            f'is told it by --value-range LOW HIGH')
        image = dataclasses.replace(image, low=value_range[0], high=value_range[1])
    pixels = 255 * transform(dataclasses.replace(image, channels=num_channels))
    return pixels.round().to(torch.uint8) if value_range is None else pixels


def first_readable(images, channels):
    """The first file of an ImageList that can be decoded; a DataError if there is none."""
    errors = []
    for i in range(len(images)):
        try:
            return decode(images.path(i), channels)
        except SetupError:
            raise
        except DataError as error:
            errors.append(str(error))
    raise unreadable(errors)


def measure_range(images, channels, workers):
    """The lowest and the highest value in the images of more than 8 bits."""
    values = read_all(images, functools.partial(_extremes, channels), workers, 'measuring')
    low, high = values.min().item(), values.max().item()
    if low == high:
        raise DataError(f'all values in {images.folder} are {low:g}')
    return low, high


def _extremes(channels, path):
    image = decode(path, channels)
    if not needs_range(image):
        raise DataError(f'{path} has 8 bits, and the first training image has more: give '
                        f'--value-range LOW HIGH, for those of more')
    low, high = image.values.min(), image.values.max()
    if image.values.dtype.kind == 'f' and low < 0:
        raise DataError(f'{path}: floats as low as {low:g} have no natural range: give '
                        f'--value-range LOW HIGH')
    return torch.tensor([low, high], dtype=torch.float64)


def read_all(images, read, workers, what):
    """What `read` makes of N files, as one tensor [N, ...]; if they are many, processes do it."""
    count, done, result = len(images), 0, None
    rows = np.array([(index, 0) for index in range(count)])  # nothing is random: seed 0
    loader = file_loader(images, read, np.split(rows, range(100, count, 100)),
                         num_workers=workers if count > 2000 else 0)
    with tqdm(desc=what, total=count, leave=False, disable=None) as bar:
        for batch, _ in checked(loader):
            if result is None:  # not a tensor: torch would start its threads for each copy
                result = np.empty((count, *batch.shape[1:]), batch.numpy().dtype)
            result[done:done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return torch.from_numpy(result)


def file_loader(images, read, batches, **kwargs):
    """A DataLoader, for `checked`, over the files of an ImageList.

    It yields what `read` makes of the files, stacked, and their labels, int64 [B]. Of the list
    `batches`, each is rows of (index, seed), int64 [B, 2].
    """
    return DataLoader(_ImageFiles(images, read), batch_size=None, sampler=batches,
                      worker_init_fn=_leave_signals_to_main,
                      generator=torch.Generator(),  # not the global one, which dropout draws from
                      **kwargs)


def checked(loader):
    """The batches of a `file_loader`.

    After an image that can't be read, the rest of the batches are only checked, so that the
    DataError names all of these images at once.
    """
    errors = []
    for batch in loader:
        if isinstance(batch, DataError):
            if not errors:
                console.say(f'{batch.args[0]}; looking for others')
            errors += batch.args
        elif not errors:
            yield batch
    if errors:
        raise unreadable(errors)


def unreadable(errors):
    if len(errors) == 1:
        return BadImages(errors[0])
    more = f'; and {len(errors) - MAX_NAMED} more' if len(errors) > MAX_NAMED else ''
    return BadImages(f'{len(errors)} images cannot be used: {"; ".join(errors[:MAX_NAMED])}{more}')


class _ImageFiles(torch.utils.data.Dataset):
    def __init__(self, images, read):
        self.images, self.read = images, read

    def __getitem__(self, batch):
        """Pixels and labels or, if images can't be read, a DataError with a message for each.

        A worker must not raise it itself: it would arrive as the text of its traceback.
        """
        pixels, errors = [], []
        with torch.random.fork_rng(devices=[]):  # the transforms draw from the global generator
            for index, seed in batch.tolist():
                torch.default_generator.manual_seed(seed)
                try:
                    pixels.append(self.read(self.images.path(index)))
                except DataError as error:
                    errors.append(str(error))
        if errors:
            return DataError(*errors)
        return torch.stack(pixels), torch.from_numpy(self.images.labels[batch[:, 0]])


def _leave_signals_to_main(_):
    # Ctrl-C, and many schedulers' SIGTERM and SIGUSR1, are sent to workers too. The main process
    # needs them to finish its step, so they ignore all but a SIGTERM from their parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'SIGUSR1'):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_when_parent_says, daemon=True).start()


def _exit_when_parent_says():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


# ---- transform -------------------------------------------------------------------------------

def torchvision_transforms():
    from torchvision import transforms  # here, because torchvision takes seconds to import

    return transforms


class RandomResizedCrop(torch.nn.Module):
    """torchvision's, which also takes `Levels`.

    The aspect ratio of the crop, 3/4 to 4/3, is relative to the output's.
    """

    def __init__(self, size):
        super().__init__()
        height, width = sides(size)
        ratio = width / height
        self.crop = torchvision_transforms().RandomResizedCrop(
            (height, width), ratio=(3 / 4 * ratio, 4 / 3 * ratio))

    def forward(self, image):
        return image.map(self.crop) if isinstance(image, Levels) else self.crop(image)


class Resize(torch.nn.Module):
    """Resize a PIL image or `Levels` to the smallest size that covers `size`, undistorted.

    Cuts off the ends of elongated images: resized to 256 pixels, an
    image of 2 x 20,000 would have 2.6 million in the other direction.
    """

    def __init__(self, size):
        super().__init__()
        self.size = sides(size)

    def forward(self, image):
        width, height = image.size
        new_height, new_width = self.size
        kept_width = min(width, math.ceil(MAX_ELONGATION * height * new_width / new_height))
        kept_height = min(height, math.ceil(MAX_ELONGATION * width * new_height / new_width))
        if (kept_width, kept_height) != image.size:
            left, top = (width - kept_width) // 2, (height - kept_height) // 2
            image = image.crop((left, top, left + kept_width, top + kept_height))
        if kept_width * new_height <= kept_height * new_width:
            new_height = int(new_width * kept_height / kept_width)
        else:
            new_width = int(new_height * kept_width / kept_height)
        resize = torchvision_transforms().Resize((new_height, new_width))
        return image.map(resize) if isinstance(image, Levels) else resize(image)


def train_transform(dataset, augmentation):
    """The augmentation of fb.resnet.torch, which the official ImageNet models were trained with.

    Images of neither 1 nor 3 channels are cropped, resized and mirrored only.

    Crop, resize and colour jitter are torchvision's and differ in details that
    attic/imagenet-recipe.md lists.
    """
    transforms = torchvision_transforms()
    steps = [RandomResizedCrop(dataset.image_size)]
    if augmentation.mirror:
        steps.append(transforms.RandomHorizontalFlip())
    if augmentation.color_jitter and len(dataset.mean) in (1, 3):
        steps += [transforms.ColorJitter(0.4, 0.4, 0.4), to_tensor, add_lighting]
    else:
        steps.append(to_tensor)
    others = augmentation.of_image(dataset.mean)
    return transforms.Compose([*steps, others] if others else steps)


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


def test_transform(dataset, ten_crop=False):
    """The centre of an image, 224/256 of its shorter side; all of it if held in memory.

    If height and width differ, it is 224/256 of the largest part with that aspect ratio.
    """
    transforms, size = torchvision_transforms(), sides(dataset.image_size)
    crop = [transforms.TenCrop(size), torch.stack] if ten_crop else [transforms.CenterCrop(size)]
    larger = [round(side * 256 / 224) for side in size]
    return transforms.Compose([Resize(size if dataset.in_memory else larger), to_tensor, *crop])


def to_tensor(image):
    """uint8 [C, H, W] of a PIL image, or float32 of `Levels`; a tensor is returned as it is."""
    if isinstance(image, Levels):
        return image.map(lambda channel: channel)
    if torch.is_tensor(image):
        return image
    return torchvision_transforms().functional.pil_to_tensor(image)
