"""Image files: finding them, reading and transforming them, in worker processes if they are many.

    samples = image_files.list_images(dataset, 'train')           # [(path, label)]
    transform = image_files.test_transform(224)
    pixels = image_files.read_pixels(dataset, transform, 'photo.jpg')   # [3, 224, 224]
"""

import hashlib
import itertools
import os
import signal
import threading
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets as torchvision_datasets
from torchvision import transforms
from tqdm import tqdm

from training.datasets import SMALL, DataError

HEATMAP = '.heatmap.png'  # what predict.py adds to an image's name, perhaps in its folder
# AlexNet's lighting noise with the constants of fb.resnet.torch, on the scale 0..1: eigenvectors
# (columns) and eigenvalues of ImageNet's RGB values, standard deviation of the random factors.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
LIGHTING_STD = 0.1

# Many cameras write truncated EXIF data; the pixels are complete.
warnings.filterwarnings('ignore', 'Corrupt EXIF data', UserWarning)


def is_image(path):
    """Whether a file is to be read, by its name: an image, neither hidden nor a heatmap of one."""
    name = os.path.basename(path)
    return (name.lower().endswith(torchvision_datasets.folder.IMG_EXTENSIONS)
            and not name.startswith('.') and not name.endswith(HEATMAP))


def class_folders(root, split, val_split):
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
    names = torchvision_datasets.folder.find_classes(folder)[0]
    return folder, [name for name in names if not name.startswith('.')]  # .ipynb_checkpoints


def list_images(dataset, split):
    """(path, label) of each image, sorted; in the test images, classes may be missing."""
    folder, found = class_folders(dataset.root, split, dataset.val_split)
    labels = {name: label for label, name in enumerate(dataset.classes)}
    unknown = set(found) - set(labels)
    if unknown:
        raise DataError(f'{folder}: {min(unknown)} is not among the classes trained on')
    try:
        samples = torchvision_datasets.folder.make_dataset(folder, labels, is_valid_file=is_image,
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


def decode(path, mode='RGB'):
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


def read_image(path, dataset):
    """An image file as the model's input, float32 [C, H, W].

    Raises:
        DataError: not an image, a broken one, or one of more than 8 bits without a range.
    """
    image = read_pixels(dataset, test_transform(dataset.image_size), path)
    return (image.float() - channels(dataset.mean, 'cpu')) / channels(dataset.std, 'cpu')


def read_pixels(dataset, transform, path):
    """An image file, transformed: uint8 [C, H, W] or, in a data set with a value range, float32.

    Both are on the scale 0..255.
    """
    channels, value_range = len(dataset.mean), dataset.value_range
    image = decode(path, 'RGB' if channels == 3 else 'L')
    if not isinstance(image, np.ndarray):
        return transform(image) if value_range is None else transform(image).float()
    if value_range is None:
        raise DataError(f'{path} has more than 8 bits, of a range that is not known: train.py is '
                        f'told it by --value-range LOW HIGH')
    low, high = value_range
    values = ((image.astype(np.float64) - low) / (high - low)).clip(0, 1).astype(np.float32)
    # 0..1, as the transforms expect floats.
    return 255 * transform(torch.from_numpy(values).expand(channels, -1, -1))


def measure_range(samples, workers):
    """The lowest and the highest value in the images of more than 8 bits."""
    values = read_all(samples, _extremes, workers, 'measuring')
    low, high = values.min().item(), values.max().item()
    if low == high:
        raise DataError(f'all values in {Path(samples[0][0]).parents[1]} are {low:g}')
    return low, high


def _extremes(path):
    values = decode(path)
    if not isinstance(values, np.ndarray):
        raise DataError(f'{path} has 8 bits, and the first training image has more: give '
                        f'--value-range LOW HIGH, for those of more')
    if values.dtype.kind == 'f' and values.min() < 0:
        raise DataError(f'{path}: floats as low as {values.min():g} have no natural range: give '
                        f'--value-range LOW HIGH')
    return torch.tensor([values.min(), values.max()], dtype=torch.float64)


def read_all(samples, read, workers, what):
    """What `read` makes of N files, as one tensor [N, ...]; if they are many, processes do it."""
    count, done, result = len(samples), 0, None
    rows = np.array([(index, 0) for index in range(count)])  # nothing is random: seed 0
    loader = file_loader(samples, read, np.split(rows, range(100, count, 100)),
                          num_workers=workers if count > 2000 else 0)
    with tqdm(desc=what, total=count, leave=False, disable=None) as bar:
        for batch, _ in checked(loader):
            if result is None:  # not a tensor: torch would start its threads for each copy
                result = np.empty((count, *batch.shape[1:]), batch.numpy().dtype)
            result[done:done + len(batch)] = batch
            done += len(batch)
            bar.update(len(batch))
    return torch.from_numpy(result)


def file_loader(samples, read, batches, **kwargs):
    """A DataLoader, for `checked`, of what `read` makes of image files, and of int64 labels.

    Samples are (path, label), and a batch is rows of (index, seed), int64 [B, 2].
    """
    return DataLoader(_ImageFiles(samples, read), batch_size=None, sampler=batches,
                      worker_init_fn=_leave_signals_to_main,
                      generator=torch.Generator(),  # not the global one, which dropout draws from
                      **kwargs)


def checked(loader):
    """The batches of a `file_loader`; raises the DataError that stands in a batch's place."""
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


def train_transform(size):
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


def channels(values, device):
    return torch.tensor(values, dtype=torch.float32, device=device).view(-1, 1, 1)
