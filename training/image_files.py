"""Find image files and read them, in worker processes if there are many.

    images = image_files.list_images(dataset, 'train')            # an ImageList: paths and labels
    transform = image_transforms.test_transform(dataset)
    pixels = image_files.read_pixels(dataset, transform, 'photo.jpg')   # [3, 224, 224]
"""

import contextlib
import dataclasses
import functools
import hashlib
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

from training import console, image_transforms
from training.console import BadImages, DataError
from training.datasets import missing_split
from training.decoding import ArrayImage, SetupError, decode, needs_range
from training.labels import read_table

SUFFIXES = ('.jpg', '.jpeg', '.jpe', '.jfif', '.png', '.tif', '.tiff', '.bmp', '.gif', '.webp',
            '.avif', '.jp2', '.j2k', '.ppm', '.pgm', '.pbm', '.pnm', '.npy', '.dcm', '.dicom')
HEATMAP = '.heatmap.png'  # suffix of predict.py's output, which may lie beside the images
# Class names that suggest a wrong --data.
SPLIT_NAMES = {'train', 'training', 'test', 'testing', 'val', 'valid', 'validation', 'image',
               'images', 'img', 'imgs', 'data', 'dataset'}
MAX_NAMED = 50  # files in an error message


# ---- find ------------------------------------------------------------------------------------

def find_images(folder, seen=None):
    """The sorted paths of all images in a folder and below, and a Counter of other files by suffix.

    Leaves out hidden files, hidden folders and heat maps. Follows links, but visits each folder
    once: folders whose `folder_id` is in `seen` are skipped.

    Raises:
        DataError: a folder can't be read.
    """
    seen = ids_with_parents(folder) if seen is None else seen
    found, others = [], Counter()
    with os_errors_as_data_errors(folder):
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
                others['no regular file'] += 1  # a pipe; a dangling link counts as an image
            elif is_image(entry.name):
                found.append(entry.path)
            else:
                others[os.path.splitext(entry.name)[1].lower() or 'no suffix'] += 1
    return found, others


def is_image(path):
    """Whether a file is an image by its name, and neither hidden nor a heat map."""
    name = os.path.basename(path)
    return (name.lower().endswith(SUFFIXES) and not name.startswith('.')
            and not name.endswith(HEATMAP))


def ids_with_parents(folder):
    """The ids of a folder and its parents, so that no link leads back to them."""
    folder = Path(folder).resolve()
    return {folder_id(path) for path in (folder, *folder.parents)}


def folder_id(folder):
    """Identifies a folder, whatever links lead to it."""
    status = os.stat(folder)
    return status.st_dev, status.st_ino


@contextlib.contextmanager
def os_errors_as_data_errors(folder):
    try:
        yield
    except OSError as error:
        raise DataError(f'{error.filename or folder}: {error.strerror}') from error


def describe_unread(folder, others):
    """One line about the files that `find_images` leaves out."""
    kinds = ', '.join(f'{kind} ({count})' for kind, count in others.most_common(5))
    more = ', ...' if len(others) > 5 else ''
    return (f'{folder}: {others.total()} files are not read: {kinds}{more}; images are '
            f'{" ".join(SUFFIXES)}')


def class_names(folder):
    """The sorted names of a folder's subfolders, without hidden ones.

    Raises:
        DataError: it has none, or can't be read.
    """
    with os_errors_as_data_errors(folder), os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries
                       if not entry.name.startswith('.') and entry.is_dir())
    if not names:
        raise DataError(f'{folder} has no subfolders: it needs one per class')
    return names


@dataclass(frozen=True)
class ImageList:
    """Image files and their labels, in NumPy arrays, whose memory worker processes share.

    A list would be copied page by page into each worker, because reading it changes reference
    counts.
    """

    folder: str
    names: np.ndarray   # bytes [N], paths relative to the folder
    labels: np.ndarray  # int64 [N], or float32 [N, C] of 0, 1 and NaN (unknown)
    groups: np.ndarray = None  # bytes [N]

    def __len__(self):
        return len(self.names)

    def __getitem__(self, chosen):
        """The images that a mask, bool [N], selects."""
        groups = None if self.groups is None else self.groups[chosen]
        return ImageList(self.folder, self.names[chosen], self.labels[chosen], groups)

    def path(self, i):
        return os.path.join(self.folder, os.fsdecode(self.names[i]))

    def digest(self):
        """A hash of the names, the labels and their order, in hexadecimal."""
        names = b'\0'.join(self.names.tolist())
        return hashlib.sha256(names + b'\0' + self.labels.tobytes()).hexdigest()


def list_images(dataset, split, warn=None):
    """The ImageList of a split: sorted by class and name, or in the order of a labels file.

    Args:
        dataset: a Description of a folder of images.
        split: 'train', 'val' or 'test'; in the last two, classes may be missing.
        warn: called with a line about each likely mistake.

    Raises:
        DataError: no such split, no images in it or in a training class, unknown classes, or files
            and folders that can't be read.
    """
    if split not in dataset.splits:
        raise missing_split(dataset.root, split, dataset.labels_file)
    list_all = images_of_table if dataset.labels_file else images_of_folder
    images = list_all(dataset, split, warn)
    if dataset.is_divided(split):
        kept = dataset.choose(split, images.labels, images.names, images.groups)
        if warn is not None and split == 'train':
            lost = present_classes(images, dataset) - present_classes(images[kept], dataset)
            if lost:
                warn(f'all images of {", ".join(sorted(lost)[:5])} are held out: none is left to '
                     f'train on')
        images = images[kept]
    if not len(images):
        raise DataError(f'{images.folder} has no {split} images')
    return images


def present_classes(images, dataset):
    """The names of the classes that an ImageList has images of."""
    labels = images.labels
    present = (labels == 1).any(0).nonzero()[0] if labels.ndim == 2 else np.unique(labels)
    return {dataset.classes[i] for i in present}


def images_of_folder(dataset, split, warn):
    folder = str(dataset.splits[split])
    labels = {name: i for i, name in enumerate(dataset.classes)}
    names = class_names(folder)
    unknown = set(names) - set(labels)
    if unknown:
        raise DataError(f'{folder}: {min(unknown)} is not one of the training classes')
    found, others = images_by_class(folder, names)
    empty = [name for name in names if not found[name]]
    if split == 'train' and empty:
        raise DataError(f'{folder}: no images for {", ".join(empty[:5])}; images are '
                        f'{" ".join(SUFFIXES)}')
    if warn is not None and split == 'train':
        warn_of_layout(folder, found, warn)
    if warn is not None and others and (split == 'train' or not dataset.is_divided(split)):
        warn(describe_unread(folder, others))
    start = len(os.path.join(folder, ''))
    return ImageList(
        folder, np.array([name_of(path[start:]) for name in names for path in found[name]],
                         dtype=np.bytes_),
        np.repeat(np.array([labels[name] for name in names]), [len(found[name]) for name in names]))


def images_of_table(dataset, split, warn):
    """The images of a labels file (labels.py)."""
    folder, whole = str(dataset.root), read_table(dataset.labels_file)
    table = whole.of_split(dataset.splits[split])
    table.check('file', [os.path.isfile(os.path.join(folder, name)) for name in table.files],
                f'is not in --data {folder}')
    names = np.array([name_of(file) for file in table.files])
    groups = table.groups and np.array([os.fsencode(name) for name in table.groups])
    table.check_classes(split, warn)
    if warn is not None and split == 'train':
        whole.warn_of_shared_groups(warn)
        whole.warn_of_unused_columns(warn)
    return ImageList(folder, names, table.label_array(dataset.classes), groups)


def name_of(path):
    """A relative path as bytes, the same on all systems: it decides what is held out."""
    return os.fsencode(path.replace(os.sep, '/'))


def images_by_class(folder, names):
    """{class: paths of its images}, and a Counter of other files."""
    with os_errors_as_data_errors(folder):
        ids = [folder_id(os.path.join(folder, name)) for name in names]
        with os.scandir(folder) as entries:
            loose = sum(is_image(entry.name) and entry.is_file() for entry in entries)
    first = {}
    for name, i in zip(names, ids):
        if first.setdefault(i, name) != name:
            raise DataError(f'{folder}: {first[i]} and {name} are the same folder')
    seen, found, others = {*ids_with_parents(folder), *ids}, {}, Counter()
    if loose:
        others['images outside of the class folders'] = loose
    for name in names:
        found[name], other_files = find_images(os.path.join(folder, name), seen)
        others += other_files
    return found, others


def warn_of_layout(folder, found, warn):
    """Warn if class names look like splits, or if all images lie in subfolders of the classes."""
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
        DataError: as in `decode`, or more than 8 bits without a range.
    """
    image = read_pixels(dataset, image_transforms.test_transform(dataset), path)
    return (image.float() - per_channel(dataset.mean, 'cpu')) / per_channel(dataset.std, 'cpu')


def per_channel(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)


def read_pixels(dataset, transform, path):
    """Read and transform an image file: uint8 [C, H, W], or float32 if there is a value range.

    Both are in 0..255.
    """
    num_channels, value_range = len(dataset.mean), dataset.value_range
    image = decode(path, num_channels)
    if not isinstance(image, ArrayImage):
        return transform(image) if value_range is None else transform(image).float()
    if needs_range(image):
        if value_range is None:
            raise DataError(f'{path} has more than 8 bits, and the value range is not known: give '
                            f'train.py --value-range LOW HIGH')
        image = dataclasses.replace(image, low=value_range[0], high=value_range[1])
    pixels = 255 * transform(dataclasses.replace(image, channels=num_channels))
    return pixels.round().to(torch.uint8) if value_range is None else pixels


def some_readable(images, channels, count):
    """Decode `count` to 2 * `count` evenly spaced images; raises DataError if none can be."""
    found, errors, step = [], [], max(1, len(images) // count)
    for i in range(len(images)):
        if found and i % step:
            continue
        try:
            found.append(decode(images.path(i), channels))
        except SetupError:
            raise
        except DataError as error:
            errors.append(str(error))
    if not found:
        raise unreadable(errors)
    return found


def warn_of_other_values(dataset, images, script='train.py'):
    """Warn if decoded images have values unlike those that a model with a value range knows."""
    low, high = dataset.value_range
    known = f'the model was trained on values from {low:g} to {high:g}'
    if not all(map(needs_range, images)):
        console.warn(f'there are images of 8 bits, and {known} in images of more: they may look '
                     f'different to it', script=script)
    # Only those above: in CT, most of an image may lie below the window.
    if any(needs_range(image) and (image.values > high).mean() > 0.5 for image in images):
        console.warn(f'there are images with most values above {high:g}, and {known}: it can\'t '
                     f'tell these values apart', script=script)


def measure_range(images, channels, workers):
    """The lowest and highest value in images of more than 8 bits."""
    values = read_all(images, functools.partial(_extremes, channels), workers, 'measuring')
    low, high = values.min().item(), values.max().item()
    if low == high:
        raise DataError(f'all values in {images.folder} are {low:g}')
    return low, high


def _extremes(channels, path):
    image = decode(path, channels)
    if not needs_range(image):
        raise DataError(f'{path} has 8 bits, and the first training image has more: give '
                        f'--value-range LOW HIGH for the images of more than 8 bits')
    low, high = image.values.min(), image.values.max()
    if image.values.dtype.kind == 'f' and low < 0:
        raise DataError(f'{path}: floats as low as {low:g} have no natural range: give '
                        f'--value-range LOW HIGH')
    return torch.tensor([low, high], dtype=torch.float64)


def read_all(images, read, workers, what):
    """The results of `read` for N files, as one tensor [N, ...]; uses workers for many files."""
    count, done, result = len(images), 0, None
    rows = np.array([(index, 0) for index in range(count)])  # seed 0: nothing is random
    loader = file_loader(images, read, np.split(rows, range(100, count, 100)),
                         num_workers=workers if count > 2000 else 0)
    with tqdm(desc=what, total=count, leave=False, disable=None) as bar:
        for batch, _ in checked(loader):
            if result is None:  # NumPy: torch would use its thread pool for each small copy
                result = np.empty((count, *batch.shape[1:]), batch.numpy().dtype)
            result[done:done + len(batch)] = batch.numpy()
            done += len(batch)
            bar.update(len(batch))
    return torch.from_numpy(result)


def file_loader(images, read, batches, **kwargs):
    """A DataLoader over the files of an ImageList; iterate over it with `checked`.

    Yields the stacked results of `read(path)` and the labels, int64 [B]. `batches` is a list of
    arrays int64 [B, 2], with the index and the random seed of each image.
    """
    return DataLoader(_ImageFiles(images, read), batch_size=None, sampler=batches,
                      worker_init_fn=_leave_signals_to_main,
                      generator=torch.Generator(),  # keeps the global one, for dropout, unchanged
                      **kwargs)


def checked(loader):
    """Yield the batches of a `file_loader`.

    If an image can't be read, goes through the remaining ones without yielding them, so that the
    error names all unreadable images at once.
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
        """Pixels and labels, or a DataError with a message for each image that can't be read.

        An error that is raised in a worker would reach the main process as text of a traceback.
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
    # Ctrl-C, and SIGTERM and SIGUSR1 of many schedulers, also reach the workers. The main process
    # needs them to finish its step, so they ignore all except a SIGTERM from their parent.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, 'SIGUSR1'):  # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, 'sigwaitinfo'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_exit_on_parents_sigterm, daemon=True).start()


def _exit_on_parents_sigterm():
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
