"""The loaders against torchvision's transforms, plain loops, and files made in each format."""

import dataclasses
import functools
import hashlib
import math
import os
import pickle
import re
import runpy
import shutil
import struct
import subprocess
import sys
import tarfile
import textwrap
import warnings
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
import torch.nn.functional as F
import torchvision
from conftest import ROOT, SHARED, SMALL, Opener, fails, write_images
from PIL import Image
from torchvision import transforms

import predict
from training import datasets, decoding, image_files, image_transforms, loaders
from training.augmentation import Augmentation
from training.console import DataError, UserError
from training.loaders import MemoryLoader

CPU = torch.device('cpu')
RGB = datasets.describe('cifar10')


def numbered(n=50, size=8):
    """Images whose pixels and labels are the image's number."""
    numbers = torch.arange(n)
    return numbers.to(torch.uint8)[:, None, None, None].expand(n, 3, size, size), numbers


def memory_loader(batch_size, **kwargs):
    return MemoryLoader(*numbered(), batch_size, mean=(0, 0, 0), std=(1, 1, 1), device=CPU,
                        **kwargs)


# ---- images held in memory -------------------------------------------------------------------

def test_crop_and_mirror_equal_a_loop_over_images():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(40, 3, 10, 7, generator=generator)
    offsets = torch.randint(9, (40, 2), generator=generator)
    mirrored = torch.randint(2, (40,), generator=generator).bool()
    for image, (down, right), mirror, ours in zip(
            images, offsets.tolist(), mirrored, loaders.crop_and_mirror(images, offsets, mirrored)):
        padded = F.pad(image, (4, 4, 4, 4))
        truth = transforms.functional.crop(padded, down, right, 10, 7)
        assert torch.equal(ours, transforms.functional.hflip(truth) if mirror else truth)


def test_augmentation_draws_every_offset_and_side_equally_often():
    image = torch.arange(1, 65, dtype=torch.uint8).view(1, 1, 8, 8).expand(20_000, 3, 8, 8)
    loader = MemoryLoader(image, torch.zeros(20_000).long(), 20_000, mean=(0,) * 3, std=(1,) * 3,
                          device=CPU, shuffle=True, augmentation=Augmentation())
    (images, _), = loader
    views, counts = images[:, 0].flatten(1).unique(dim=0, return_counts=True)
    assert len(views) == 9 * 9 * 2
    # 20,000 draws of 162: about 123 each, standard deviation 11.
    assert counts.min() > 123 - 5 * 11 and counts.max() < 123 + 5 * 11


def test_each_epoch_has_every_image_once_in_a_new_order():
    loader, orders = memory_loader(16, shuffle=True), []
    for epoch in (1, 2, 1):
        loader.set_epoch(epoch)
        batches = list(loader)
        assert [len(labels) for _, labels in batches] == [16, 16, 16, 2] and len(loader) == 4
        for images, labels in batches:
            assert torch.equal(images[:, 0, 0, 0].long(), labels)
        orders.append(torch.cat([labels for _, labels in batches]).tolist())
    assert sorted(orders[0]) == list(range(50))
    assert orders[0] == orders[2] != orders[1]
    other_seed = memory_loader(16, shuffle=True, seed=2)
    assert torch.cat([labels for _, labels in other_seed]).tolist() != orders[0]


def test_augmentation_does_not_depend_on_batch_size_or_resuming():
    def images(batch_size, start=0):
        loader = memory_loader(batch_size, shuffle=True, augmentation=Augmentation())
        loader.set_epoch(7, start=start)
        return torch.cat([images for images, _ in loader])

    assert torch.equal(images(16), images(7))
    assert torch.equal(images(16)[32:], images(16, start=2))


def test_normalises_as_torchvision_does():
    mean, std = datasets.DATASETS['cifar10'].mean, datasets.DATASETS['cifar10'].std
    images = torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8)
    (ours, _), = MemoryLoader(images, torch.zeros(5).long(), 5, mean=mean, std=std, device=CPU)
    normalize = transforms.Compose([transforms.ConvertImageDtype(torch.float32),
                                    transforms.Normalize([m / 255 for m in mean],
                                                         [s / 255 for s in std])])
    torch.testing.assert_close(ours, normalize(images), rtol=1e-5, atol=1e-5)


def test_the_padding_of_the_crops_is_zero_after_the_normalisation():
    images = torch.full((20, 3, 8, 8), 7, dtype=torch.uint8)
    (images, _), = MemoryLoader(images, torch.zeros(20).long(), 20, mean=(7,) * 3, std=(2,) * 3,
                                device=CPU, augmentation=Augmentation())
    assert not images.any()


# ---- shapes ----------------------------------------------------------------------------------

@pytest.fixture(scope='module')
def shapes():
    return {split: datasets.draw_shapes(split) for split in ('train', 'test')}


def test_shapes_are_the_same_every_time_and_balanced(shapes):
    images, labels = shapes['test']
    assert torch.equal(images, datasets.draw_shapes('test')[0])
    assert images.shape == (1000, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [100] * 10
    assert not (shapes['train'][0][:1000] == images).flatten(1).all(1).any()


def test_shapes_are_normalised_by_their_own_statistics(shapes):
    mean, std = datasets.DATASETS['shapes'].mean, datasets.DATASETS['shapes'].std
    pixels = shapes['train'][0].numpy().astype(np.float64)
    np.testing.assert_allclose(mean, pixels.mean((0, 2, 3)), rtol=1e-7)
    np.testing.assert_allclose(std, pixels.std((0, 2, 3)), rtol=1e-7)


@pytest.mark.parametrize('pool', [2, 4])  # of single pixels it is worse, and takes seconds
def test_no_linear_classifier_tells_the_shapes_apart(shapes, pool):
    (x, labels), (test_x, test_labels) = (
        (F.avg_pool2d(images / 127.5 - 1, pool).flatten(1), labels)
        for images, labels in (shapes['train'], shapes['test']))
    gram, moments = x.T @ x, x.T @ F.one_hot(labels).float()
    for penalty in (1, 10, 100, 1_000, 10_000, 100_000):  # least squares, the best of a wide range
        weights = torch.linalg.solve(gram + penalty * torch.eye(len(gram)), moments)
        assert ((test_x @ weights).argmax(1) != test_labels).float().mean() > 0.7  # chance: 0.9


# ---- folders of images -----------------------------------------------------------------------

def load(root, batch_size=4, image_size=None, name='folder', augment=True, ten_crop=False,
         **kwargs):
    """The description, the training loader and the test loader."""
    dataset = datasets.describe(name, root, image_size)
    common = dict(batch_size=batch_size, device=CPU, **kwargs)
    return (dataset, loaders.make_loader(
        dataset, 'train', augmentation=Augmentation() if augment else None, **common),
            loaders.make_loader(dataset, 'test', ten_crop=ten_crop, **common))


def test_small_folders_are_held_in_memory_as_they_are(tmp_path):
    write_images(tmp_path, {'train/cat': 3, 'train/dog': 2, 'val/cat': 1, 'val/dog': 2})
    dataset, train, test = load(tmp_path, augment=False)
    assert (dataset.classes, dataset.image_size, dataset.in_memory) == (('cat', 'dog'), 32, True)
    assert len(list(train)) == 2 and train.num_images == 5
    (images, labels), = test
    assert labels.tolist() == [0, 1, 1]
    pixels = images * test.std + test.mean
    truth = np.asarray(Image.open(tmp_path / 'val/dog/1.png')).transpose(2, 0, 1)
    np.testing.assert_allclose(pixels[2], truth, atol=1e-3)


@pytest.mark.parametrize('odd, size', [((200, 300), 20), ((9, 9), 20), ((20, 30), 224)])
def test_the_size_is_that_of_typical_images(tmp_path, odd, size):
    usual = (20, 30) if size == 20 else (200, 300)
    write_images(tmp_path, {'train/a': 8, 'train/b': 8, 'val/a': 1, 'val/b': 1}, usual)
    Image.new('RGB', odd).save(tmp_path / 'train/a/0.png')
    assert datasets.describe('folder', tmp_path).image_size == size


@pytest.mark.parametrize('image_size', [None, 66])
def test_hidden_files_and_heatmaps_beside_the_images_are_not_read(tmp_path, image_size):
    root = write_images(tmp_path, {'train/a': 3, 'train/b': 2, 'val/a': 1, 'val/b': 2})
    images = list(root.glob('*/*/*.png'))
    for path in images:
        shutil.copy(path, f'{path}.heatmap.png')  # as predict.py has put it there
        path.with_name(f'._{path.name}').write_bytes(b'written by macOS')
    (root / 'train/.ipynb_checkpoints').mkdir()
    _, train, test = load(root, image_size=image_size)
    assert {*train.files, *test.files} == set(map(str, images)) and train.num_images == 5


def test_a_test_folder_stands_in_for_val_and_grey_becomes_rgb(tmp_path):
    write_images(tmp_path, {'train/a': 2, 'train/b': 2, 'test/a': 1, 'test/b': 1}, (20, 12), 'L')
    dataset, _, test = load(tmp_path)
    (images, _), = test
    assert dataset.image_size == 12 and images.shape == (2, 3, 12, 12)
    pixels = images * test.std + test.mean
    truth = np.asarray(Image.open(tmp_path / 'test/a/0.png'))[:, 4:16]  # the middle
    np.testing.assert_allclose(pixels[0, 0], truth, atol=1e-3)
    np.testing.assert_allclose(pixels[0, 2], truth, atol=1e-3)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
    """Enough small images to be read by worker processes, if there are any."""
    root = tmp_path_factory.mktemp('many')
    return write_images(root, {'train/a': 2000, 'train/b': 50, 'val/a': 1, 'val/b': 1}, (5, 4))


def test_small_images_do_not_depend_on_the_number_of_workers(many):
    state = torch.get_rng_state()
    (_, one, _), (_, other, _) = (load(many, workers=workers) for workers in (0, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)
    assert one.labels.bincount().tolist() == [2000, 50]
    for i, path in enumerate(sorted((many / 'train/b').iterdir())):
        truth = np.asarray(Image.open(path))[:, :4]  # the middle, to the left of its half pixel
        assert np.array_equal(one.images[2000 + i].permute(1, 2, 0), truth)


def test_reading_shows_its_progress_on_a_terminal(many, monkeypatch, capsys):
    monkeypatch.setattr('sys.stderr.isatty', lambda: True, raising=False)
    load(many)
    output, bar = capsys.readouterr()
    assert output == '' and 'reading train:' in bar and '/2050 ' in bar


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    root = tmp_path_factory.mktemp('photos')
    return write_images(root, {'train/a': 5, 'train/b': 4, 'val/a': 2, 'val/b': 1}, (90, 70),
                        ending='jpg')


def test_large_images_do_not_depend_on_the_number_of_workers(photos):
    epochs = []
    for workers in (0, 2):
        dataset, train, _ = load(photos, workers=workers, name='imagenet', image_size=66)
        state = torch.get_rng_state()
        train.set_epoch(3)
        epochs.append(list(train))
        assert torch.equal(torch.get_rng_state(), state)  # dropout draws from it
        assert not dataset.in_memory and len(train) == 3
    train.set_epoch(3, start=1)
    for (images, labels), (other, other_labels) in zip(*epochs, strict=True):
        assert images.shape[1:] == (3, 66, 66)
        assert torch.equal(images, other) and torch.equal(labels, other_labels)
    for (images, labels), (later, later_labels) in zip(epochs[0][1:], train, strict=True):
        assert torch.equal(images, later) and torch.equal(labels, later_labels)
    train.set_epoch(4)
    assert not torch.equal(next(iter(train))[0], epochs[0][0][0])


def test_large_test_images_are_torchvisions_centre_and_ten_crops(photos):
    image = Image.open(photos / 'val/a/0.jpg')
    normalize = transforms.Normalize([m / 255 for m in datasets.DATASETS['imagenet'].mean],
                                     [s / 255 for s in datasets.DATASETS['imagenet'].std])
    centre = transforms.Compose([transforms.Resize(80), transforms.CenterCrop(70),
                                 transforms.ToTensor(), normalize])(image)
    crops = [normalize(transforms.functional.to_tensor(crop))
             for crop in transforms.TenCrop(70)(transforms.Resize(80)(image))]
    _, _, test = load(photos, 2, image_size=70)
    assert [len(labels) for _, labels in test] == [2, 1]
    torch.testing.assert_close(next(iter(test))[0][0], centre, rtol=1e-5, atol=1e-5)
    _, _, test = load(photos, 20, image_size=70, ten_crop=True)
    assert [images.shape for images, _ in test] == [(2, 10, 3, 70, 70), (1, 10, 3, 70, 70)]
    torch.testing.assert_close(next(iter(test))[0][0], torch.stack(crops), rtol=1e-5, atol=1e-5)


def test_large_training_images_without_augmentation_are_the_same_in_every_epoch(photos):
    _, train, _ = load(photos, 9, image_size=70, augment=False)
    (first, labels), = train
    train.set_epoch(2)
    (second, _), = train
    assert not torch.equal(first, second)  # in another order
    assert torch.equal(first.flatten(1).sort(0).values, second.flatten(1).sort(0).values)


def test_large_training_images_are_mirrored_and_their_colours_vary(tmp_path):
    ramp = np.tile(np.linspace(60, 200, 90).astype(np.uint8)[None, :, None], (70, 1, 3))
    ramp[..., 1] = 130  # a green that no crop changes
    Image.fromarray(ramp).save(tmp_path / 'ramp.png')
    larger = dataclasses.replace(RGB, image_size=66)
    transform = image_transforms.train_transform(larger, Augmentation())
    read = functools.partial(image_files.read_pixels, RGB, transform)
    dataset = image_files._ImageFiles(
        image_files.ImageList(str(tmp_path), np.array([b'ramp.png']), np.array([0])), read)
    batch = np.array([(0, seed) for seed in range(64)])
    views = dataset[batch][0].float()
    falling = (views[:, 0, :, 0] > views[:, 0, :, -1]).float().mean(1)
    assert 16 < falling.round().sum() < 48  # about half; by chance it fails once in 10,000
    assert views[:, 1].mean((1, 2)).std() > 15
    assert torch.equal(dataset[batch[5:6]][0][0], views[5])


def test_lighting_has_the_covariance_of_alexnets():
    torch.manual_seed(0)
    image = torch.full((3, 1, 1), 0.5)
    views = torch.stack([image_transforms.add_lighting(image) for _ in range(20_000)])
    colours = views.flatten(1).numpy() - 0.5
    # fb.resnet.torch, datasets/imagenet.lua: the sum over components of vector * value * N(0, 0.1)
    vectors = np.array([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140],
                        [-0.5836, -0.6948, 0.4203]])
    values = np.array([0.2175, 0.0188, 0.0045])
    np.testing.assert_allclose(vectors.T @ vectors, np.eye(3), atol=1e-3)
    np.testing.assert_allclose((colours @ vectors).std(0), 0.1 * values, rtol=0.03)
    np.testing.assert_allclose(np.corrcoef((colours @ vectors).T), np.eye(3), atol=0.03)
    assert np.all(np.abs(colours.mean(0)) < 5 * 0.1 * 0.2175 / 20_000**0.5)


def test_lighting_of_8_bits_is_that_of_floats_rounded_and_clamped():
    image, moved = torch.arange(256, dtype=torch.uint8).expand(3, 1, 256), 0
    for seed in range(20):
        torch.manual_seed(seed)
        ours = image_transforms.add_lighting(image)
        torch.manual_seed(seed)
        colour = 255 * (image_transforms.add_lighting(torch.full((3, 1, 1), 0.5)) - 0.5)
        assert ours.dtype == torch.uint8
        assert torch.equal(ours, (image + colour.round()).clamp(0, 255).byte())
        moved += not torch.equal(ours, image)
    assert moved > 10  # by a standard deviation of 3 grey levels
    extremes = [image_transforms.add_lighting(torch.tensor([0.0, 1.0]).expand(3, 1, 2))
                for _ in range(20)]
    assert torch.stack(extremes).aminmax() == (0, 1)
    for grey in (image[:1], image[:1] / 255):
        assert image_transforms.add_lighting(grey) is grey


def test_large_training_images_have_lighting_and_test_images_have_none(tmp_path):
    for folder in ('train/a', 'train/b', 'val/a', 'val/b'):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(20):
            Image.new('RGB', (80, 80), (130, 130, 130)).save(tmp_path / folder / f'{i}.png')
    for name in ('imagenet', 'folder'):
        _, train, test = load(tmp_path, 40, 66, name)
        (images, _), (test_images, _) = *train, *test
        pixels, test_pixels = (torch.round(batch * test.std + test.mean)
                               for batch in (images, test_images))
        assert torch.equal(test_pixels, torch.full_like(test_pixels, 130))
        tints = pixels - pixels.mean(1, keepdim=True)  # the colour jitter leaves grey images grey
        assert torch.equal(tints, tints[..., :1, :1].expand_as(tints))
        assert 10 < tints[:, :, 0, 0].any(1).sum() and tints.abs().max() < 3
        (images, _), = load(tmp_path, 40, 66, name, augment=False)[1]
        assert torch.equal(images, test_images)


def test_photographs_of_cameras_and_printers_become_rgb(tmp_path):
    rng = np.random.RandomState(0)
    colours = np.kron(rng.randint(0, 256, (5, 5, 3)), np.ones((16, 16, 1))).astype(np.uint8)
    picture = Image.fromarray(colours)
    kinds = {'rgb': picture, 'cmyk': picture.convert('CMYK'), 'grey': picture.convert('L'),
             'broken exif': picture}
    for name, image in kinds.items():
        broken = {'exif': b'Exif\0\0II*\0\x08\0\0\0\x40\0garbage'} if 'exif' in name else {}
        image.save(tmp_path / f'{name}.jpg', quality=95, **broken)
    palette = Image.fromarray(colours[..., 0], 'P')
    palette.putpalette(range(256))
    palette.save(tmp_path / 'palette.png', transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # decoding.py, imported here, lets none through
        decode = runpy.run_path(str(ROOT / 'training' / 'decoding.py'))['decode']
        decoded = {name: np.asarray(decode(tmp_path / f'{name}.jpg'), float) for name in kinds}
        decode(tmp_path / 'palette.png')
    for name in ('cmyk', 'broken exif'):
        assert decoded[name].shape == (80, 80, 3)
        assert abs(decoded[name] - decoded['rgb']).mean() < 6
    grey = colours @ (0.299, 0.587, 0.114)
    assert abs(decoded['grey'] - grey[..., None]).mean() < 4


@pytest.mark.parametrize('name', ['photo.jpg', 'photo.png', 'photo.webp', 'photo.tif'])
def test_a_photograph_of_a_turned_camera_is_upright(name, tmp_path):
    pixels = np.kron(np.arange(0, 240, 40).reshape(2, 3), np.ones((32, 32))).astype(np.uint8)
    for orientation, stored in ((1, pixels), (2, pixels[:, ::-1]), (3, np.rot90(pixels, 2)),
                                (4, pixels[::-1]), (5, pixels.T), (6, np.rot90(pixels)),
                                (7, np.rot90(pixels, 2).T), (8, np.rot90(pixels, 3))):
        exif = Image.Exif()
        exif[0x112] = orientation
        Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / name, exif=exif, quality=95)
        for channels in (1, 3):
            image = decoding.decode(tmp_path / name, channels)
            assert image.size == (96, 64)
            assert abs(np.asarray(image.convert('L'), float) - pixels).mean() < 2
        if name in ('photo.tif', 'photo.png'):
            scan = Image.fromarray(np.ascontiguousarray(stored).astype(np.uint16))
            scan.save(tmp_path / name, exif=exif)
            assert np.array_equal(decoding.decode(tmp_path / name, 1).values[0], pixels)
            bands = np.stack([stored, 255 - stored, stored // 2, stored], -1)
            Image.fromarray(bands).save(tmp_path / name, exif=exif)
            values = decoding.decode(tmp_path / name, 4).values
            assert np.array_equal(values, [pixels, 255 - pixels, pixels // 2, pixels])


DAMAGED_EXIF = {  # of Orientation 6, where that can be read
    'header': (b'Exif\0\0XX*\0', 1), 'cut off': (b'Exif\0\0II*\0', 1),
    'text instead of a number': (
        b'Exif\0\0II*\0\x08\0\0\0\x02\0' + struct.pack('<HHIHH', 0x112, 3, 1, 6, 0)
        + struct.pack('<HHI4s', 0x11a, 2, 4, b'abc\0') + b'\0' * 4, 6)}


@pytest.mark.parametrize('case', DAMAGED_EXIF)
@pytest.mark.parametrize('name', ['photo.jpg', 'photo.png', 'photo.webp'])
def test_damaged_exif_data_do_not_matter(name, case, tmp_path):
    exif, orientation = DAMAGED_EXIF[case]
    pixels = np.kron(np.arange(0, 240, 40).reshape(2, 3), np.ones((32, 32))).astype(np.uint8)
    stored = np.rot90(pixels) if orientation == 6 else pixels
    Image.fromarray(np.ascontiguousarray(stored)).save(
        tmp_path / name, exif=exif, quality=95, **({'dpi': (72, 72)} if 'jpg' in name else {}))
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # decoding.py, imported here, lets none through
        decode = runpy.run_path(str(ROOT / 'training' / 'decoding.py'))['decode']
        image = decode(tmp_path / name, 1)
    assert abs(np.asarray(image, float) - pixels).mean() < 2


@pytest.fixture(scope='module')
def imagenet_sample(tmp_path_factory):
    """111 photographs of as many classes, a copy of them in val/, and an Adobe CMYK among them."""
    archive = SHARED / 'imagenet-sample.tar'
    if not archive.exists():
        pytest.skip(f'needs {archive.name}, a photograph of each of 111 classes')
    root = tmp_path_factory.mktemp('imagenet')
    with tarfile.open(archive) as tar:
        tar.extractall(root, filter='data')
    return root / 'imagenet-sample'


def test_every_photograph_of_imagenet_arrives(imagenet_sample):
    dataset, train, test = load(imagenet_sample, 16, name='imagenet', workers=2)
    assert len(dataset.classes) == 111 and dataset.classes[0].startswith('n')
    for loader in (train, test):
        images, labels = map(torch.cat, zip(*loader))
        assert images.shape == (111, 3, 224, 224) and sorted(labels.tolist()) == list(range(111))
        assert images.flatten(1).std(1).min() > 0.05  # there is a picture
    paths = sorted(imagenet_sample.glob('val/*/*'))
    grey = images[[i for i, path in enumerate(paths) if Image.open(path).mode == 'L']]
    pixels = grey * test.std + test.mean
    assert len(grey) >= 4
    torch.testing.assert_close(pixels, pixels[:, :1].expand(-1, 3, -1, -1), rtol=0, atol=1e-3)


# ---- grey levels -----------------------------------------------------------------------------

def scan(mode, values):
    """An image of more than 8 bits, with those values in its first row."""
    dtype = {'I;16': np.uint16, 'I': np.int32, 'F': np.float32}[mode]
    pixels = np.tile(np.array(values, dtype), (len(values), 1))
    return Image.fromarray(pixels)


def save_scans(root, mode, values, ending):
    for folder in ('train/a', 'train/b', 'val/a', 'val/b'):
        (root / folder).mkdir(parents=True)
        scan(mode, values).save(root / folder / f'1.{ending}')


@pytest.mark.parametrize('mode, ending, values, value_range', [
    ('I;16', 'png', np.linspace(0, 4095, 70), None),       # 12 bits in 16
    ('I;16', 'tif', np.linspace(300, 65535, 8), None),
    ('I', 'tif', np.linspace(-1024, 3071, 8), None),       # signed, as Hounsfield units are
    ('F', 'tif', np.linspace(0, 0.7, 8), None),
    ('F', 'tif', np.linspace(-1000, 1000, 8), (-1000, 1000))])
@pytest.mark.parametrize('in_channels', [3, 1])
def test_images_of_more_than_8_bits_keep_all_their_levels(
        tmp_path, mode, ending, values, value_range, in_channels):
    save_scans(tmp_path, mode, values, ending)
    values = np.asarray(Image.open(tmp_path / f'train/a/1.{ending}'), np.float64)[0]
    size = len(values)
    dataset = datasets.describe('folder', tmp_path, size, in_channels=in_channels,
                            value_range=value_range)
    assert dataset.value_range == (values.min(), values.max())
    expected = 255 * (values - values.min()) / (values.max() - values.min())
    for split, augment in (('train', False), ('test', False), ('train', True)):
        loader = loaders.make_loader(dataset, split, 2, device=CPU,
                                    augmentation=Augmentation() if augment else None)
        (images, _), = loader
        assert images.shape == (2, in_channels, size, size) and images.dtype == torch.float32
        if augment:
            continue
        pixels = images * loader.std + loader.mean
        rows = pixels[..., size // 2, :] if dataset.in_memory else pixels[..., size // 2, 5:-5]
        if dataset.in_memory:
            np.testing.assert_allclose(rows, np.broadcast_to(expected, rows.shape), atol=1e-4)
        else:  # resized: a ramp stays one
            assert rows.diff(dim=-1).min() > 0
    (first, *_), _ = next(iter(loaders.make_loader(dataset, 'test', 2, device=CPU)))
    assert torch.equal(image_files.read_image(tmp_path / f'val/a/1.{ending}', dataset), first)


def test_8_bit_images_in_a_deeper_data_set_keep_their_values(tmp_path):
    save_scans(tmp_path, 'I;16', [0, 4095], 'png')
    Image.fromarray(np.array([[7, 200]] * 2, np.uint8)).save(tmp_path / 'val/a/2.png')
    loader = loaders.make_loader(datasets.describe('folder', tmp_path), 'test', 3, device=CPU)
    assert loader.images[1, :, 0].tolist() == 3 * [[7, 200]]
    assert loader.images[0, :, 0].tolist() == 3 * [[0, 255]]


def test_8_bit_images_in_a_deeper_data_set_have_no_measured_range(tmp_path):
    save_scans(tmp_path, 'I;16', [0, 4095], 'png')
    Image.fromarray(np.array([[7, 200]] * 2, np.uint8)).save(tmp_path / 'train/b/2.png')
    with pytest.raises(DataError, match='b/2.png has 8 bits, .* give --value-range LOW HIGH'):
        datasets.describe('folder', tmp_path)
    assert datasets.describe('folder', tmp_path, value_range=(0, 4095)).value_range == (0, 4095)


@pytest.mark.parametrize('mode, values, message', [
    ('F', [-0.5, 1], 'floats as low as -0.5 have no natural range: give --value-range LOW HIGH'),
    ('F', [math.nan, 1], 'values that are not finite'), ('I;16', [9, 9], 'all values in .* are 9')])
def test_values_without_a_range_are_refused_by_name(tmp_path, mode, values, message):
    save_scans(tmp_path, mode, values, 'tif')
    with pytest.raises(DataError, match=message):
        datasets.describe('folder', tmp_path)


def test_deeper_images_than_the_first_are_refused_by_name(tmp_path):
    write_images(tmp_path, {'train/a': 2, 'train/b': 1})
    scan('I;16', [0, 4095]).save(tmp_path / 'train/a/2.png')
    write_images(tmp_path, {'val/a': 1})
    with pytest.raises(DataError, match='2.png has more than 8 bits, .* --value-range LOW HIGH'):
        load(tmp_path)


# ---- one folder without a split --------------------------------------------------------------

@pytest.mark.parametrize('has_train', [True, False])
def test_val_split_takes_a_share_of_each_class(tmp_path, has_train):
    root = tmp_path / 'train' if has_train else tmp_path
    write_images(root, {'a': 40, 'b': 10, 'c': 2, 'd': 1})

    def files(split, **options):
        dataset = datasets.describe('folder', tmp_path, split='train', val_split=0.1, **options)
        return loaders.make_loader(dataset, split, 4, device=CPU).files

    train, test = files('train'), files('test')
    assert sorted(train + test) == sorted(map(str, root.rglob('*.png')))
    assert [Path(file).parent.name for file in test] == 4 * ['a'] + ['b', 'c']
    assert files('test') == test
    assert any(files('test', seed=seed) != test for seed in (2, 3))
    for i in range(3):  # an image more changes places with one other at the most
        shutil.copy(root / 'a/0.png', root / f'a/new{i}.png')
        before, test = test, files('test')
        assert len(set(test) ^ set(before)) <= 2


def test_test_images_may_lack_classes(tmp_path):
    write_images(tmp_path, {'train/a': 1, 'train/b': 1, 'train/c': 1, 'val/c': 2})
    (tmp_path / 'val/a').mkdir()
    _, _, test = load(tmp_path)
    assert test.labels.tolist() == [2, 2]
    for path in (tmp_path / 'val/c').iterdir():
        path.unlink()
    with pytest.raises(DataError, match='val has no test images'):
        load(tmp_path)


# ---- odd folders -----------------------------------------------------------------------------

def names(root, split='train', **options):
    """The images of a split, relative to the root, and the messages about them."""
    said, dataset = [], datasets.describe('folder', root, **options)
    found = image_files.list_images(dataset, split, said.append)
    return [str(Path(found.path(i)).relative_to(root)) for i in range(len(found))], said


@pytest.fixture
def plain(tmp_path):
    root = write_images(tmp_path / 'data', {'train/a': 2, 'train/b/deep': 2, 'val/a': 1}, (9, 9))
    return root, ['train/a/0.png', 'train/a/1.png', 'train/b/deep/0.png', 'train/b/deep/1.png']


@pytest.mark.parametrize('links', [
    {'a/own': 'a'}, {'a/up': '.'}, {'a/x': 'a', 'a/y': 'a'}, {'a/x': '.', 'b/y': '..'},
    {'a/other': 'b'}, {'b/deep/again': 'b/deep'}, {'a/.hidden': '../../elsewhere'}])
def test_cyclic_links_add_no_images(plain, links):
    root, expected = plain
    write_images(root.parent, {'elsewhere': 1}, (9, 9))
    for link, target in links.items():
        (root / 'train' / link).symlink_to(root / 'train' / target, target_is_directory=True)
    assert names(root) == (expected, [])
    files, everything = predict.find_images(str(root / 'train')), {*map(root.joinpath, expected)}
    assert {file.resolve() for file in files} == everything and len(files) == len(everything)


def test_linked_folders_are_followed_once(plain):
    root, expected = plain
    write_images(root.parent, {'elsewhere': 2}, (9, 9))
    for link in ('linked', 'again'):
        (root / 'train/a' / link).symlink_to(root.parent / 'elsewhere')
    linked = ['train/a/again/0.png', 'train/a/again/1.png']
    assert names(root)[0] == expected[:2] + linked + expected[2:]
    assert len(predict.find_images(str(root / 'train'))) == 6
    (root / 'train/c').symlink_to('a')
    with pytest.raises(DataError, match='train: a and c are the same folder'):
        names(root)


def test_files_that_are_not_read_are_counted_in_a_line(plain, capsys):
    root, expected = plain
    for name in ('a/x.HEIC', 'a/y.heic', 'b/deep/notes', 'b/.DS_Store', 'b/0.png.heatmap.png',
                 'loose.png', 'readme.txt'):
        (root / 'train' / name).touch()
    os.mkfifo(root / 'train/b/pipe.png')  # opening it would wait for a writer
    (root / 'train/b/linked.png').symlink_to('pipe.png')
    found, (said,) = names(root)
    assert found == expected
    assert said.startswith(f'{root}/train: 6 files are not read: ')
    for kind in ('.heic (2)', 'no suffix (1)', 'no regular file (2)',
                 'images outside of the class folders (1)'):
        assert kind in said
    assert '; images are .jpg ' in said and '\n' not in said
    dataset = datasets.describe('folder', root)
    for rank, lines in ((0, 1), (1, 0)):
        loaders.make_loader(dataset, 'train', 4, device=CPU, shard=(rank, 2))
        assert capsys.readouterr().err.count(' files are not read: ') == lines
    assert len(predict.find_images(str(root / 'train/b'))) == 2
    with pytest.raises(UserError, match='no such file, or no image'):
        predict.find_images(str(root / 'train/b/pipe.png'))


@pytest.mark.parametrize('folder', ['train', 'train/b', 'train/b/deep'])
def test_folders_that_cannot_be_listed_are_named(plain, monkeypatch, folder):
    root, scandir = plain[0], os.scandir

    def refuse(path):  # root may list everything
        if Path(path) == root / folder:
            raise PermissionError(13, 'Permission denied', str(path))
        return scandir(path)

    refused = pytest.raises(DataError, match=f'^{root / folder}: Permission denied$')
    with monkeypatch.context() as patch:  # undone before pytest removes the folder
        patch.setattr(os, 'scandir', refuse)
        with refused:
            names(root)
        with refused:
            predict.find_images(str(root / 'train'))


@pytest.mark.parametrize('counts, said', [
    ({'train/flowers/rose': 2, 'train/flowers/tulip': 2, 'val/flowers/rose': 1},
     'train has only one class, flowers: .* --data a folder too high'),
    ({'Training/a': 1, 'Testing/a': 1}, r'no train in .* \(only Testing/, Training/\)'),
    ({'train/a': 1, 'train/b': 1, 'val/a': 1, 'valid/a': 1}, 'has val and valid: keep one'),
    ({'train/a': 1, 'train/b': 1, 'val/a': 0}, 'val has no test images')])
def test_wrong_folder_layouts_are_refused(tmp_path, counts, said):
    with pytest.raises(DataError, match=said):
        load(write_images(tmp_path, counts, (9, 9)))


@pytest.mark.parametrize('counts, said', [
    ({'flowers/train/rose': 2, 'flowers/test/rose': 2, 'trees/train/oak': 1},
     ['all images of its 2 classes lie in deeper folders, such as .*flowers/test/rose: if']),
    ({'train/x': 2, 'Images/x': 1}, ['classes are called Images.*too high', 'lie in deeper']),
    ({'images': 2, 'masks': 2}, ['classes are called images: is --data a folder too high'])])
def test_suspicious_folder_layouts_are_warned_of(tmp_path, counts, said):
    root = write_images(tmp_path, {f'train/{name}': count for name, count in counts.items()})
    found, lines = names(write_images(root, {'val/x': 1}) and root, 'train')
    assert len(found) == sum(counts.values()) and len(lines) == len(said)
    for line, expected in zip(lines, said):
        assert re.search(expected, line)


# ---- val and test ----------------------------------------------------------------------------

@pytest.mark.parametrize('folders, val_split, expected', [
    ('train val', 0, {'test': 'val'}), ('train valid', 0, {'test': 'valid'}),
    ('train test', 0, {'test': 'test'}), ('train val test', 0, {'val': 'val', 'test': 'test'}),
    ('train valid test', 0, {'val': 'valid', 'test': 'test'}),
    ('train', 0.25, {'test': 'train'}), ('train test', 0.25, {'val': 'train', 'test': 'test'})])
def test_val_selects_the_best_and_test_is_reported(tmp_path, folders, val_split, expected):
    for folder in folders.split():
        write_images(tmp_path, {f'{folder}/a': 4, f'{folder}/b': 4}, (9, 9))
    dataset = datasets.describe('folder', tmp_path, val_split=val_split)
    assert dataset.selection_split == ('val' if 'val' in expected else 'test')
    files = {split: loaders.make_loader(dataset, split, 4, device=CPU).files
             for split in ('train', *expected)}
    for split, folder in expected.items():
        assert {Path(file).parents[1].name for file in files[split]} == {folder}
        assert len(files[split]) == (2 if folder == 'train' else 8)
    everything = [file for found in files.values() for file in found]
    assert len(set(everything)) == len(everything)
    assert len(files['train']) == (6 if val_split else 8)
    if 'val' not in expected:
        with pytest.raises(DataError, match='no val beside test in '):
            loaders.make_loader(dataset, 'val', 4, device=CPU)
    if 'val' in folders:
        with pytest.raises(DataError, match=' has images for validation, .*/vali?d?: leave out'):
            datasets.describe('folder', tmp_path, fold='1/2')


def test_the_digest_tells_whether_the_images_are_the_same(tmp_path):
    root = write_images(tmp_path, {'train/a': 3, 'train/b': 3, 'val/a': 2}, (9, 9))

    def digest(split='train'):
        digests = {loaders.make_loader(datasets.describe('folder', root, size), split, 4,
                                       device=CPU).digest for size in (None, 66)}
        return digests.pop() if len(digests) == 1 else None

    seen = [digest(), digest('test')]
    assert digest() == seen[0] and len(set(seen)) == 2
    path = root / 'train/a/2.png'
    for change in (lambda: path.rename(root / 'train/b/9.png'),
                   lambda: (root / 'train/b/9.png').rename(root / 'train/b/99.png'),
                   lambda: (root / 'train/b/99.png').unlink()):
        change()
        seen.append(digest())
    assert None not in seen and len(set(seen)) == 5
    shapes = [MemoryLoader(torch.zeros(4, 3, 8, 8), torch.tensor(labels), 2, mean=(0,), std=(1,),
                           device=CPU).digest for labels in ([0, 1, 0, 1], [0, 1, 1, 0])]
    assert len(set(shapes)) == 2


# ---- a new data set --------------------------------------------------------------------------

def test_the_example_of_the_docstring_reads_stl10(tmp_path, monkeypatch):
    """96 pixels a side: held in memory, although folders with images of this size are not."""
    kind, rng, truth = torchvision.datasets.STL10, np.random.RandomState(0), {}
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    (folder / kind.class_names_file).write_text('\n'.join('abcdefghij'))
    for split, count in (('train', 20), ('test', 8)):
        pixels = rng.randint(0, 256, (count, 3, 96, 96)).astype(np.uint8)
        (folder / f'{split}_X.bin').write_bytes(pixels.transpose(0, 1, 3, 2).tobytes())
        (folder / f'{split}_y.bin').write_bytes(bytes(1 + i % 10 for i in range(count)))
        truth[split] = pixels
    (folder / 'unlabeled_X.bin').touch()
    for listing in ('train_list', 'test_list'):
        monkeypatch.setattr(kind, listing, [[name, md5(folder / name)]
                                            for name, _ in getattr(kind, listing)])
    example = re.search(r'(?m)^    def read_stl10(.*\n)+?^    +recipe=.*\n', datasets.__doc__)
    monkeypatch.setattr(datasets, 'DATASETS', dict(datasets.DATASETS))
    monkeypatch.setattr(loaders, 'DATASETS', datasets.DATASETS)
    exec(textwrap.dedent(example.group()), vars(datasets))
    monkeypatch.delattr(datasets, 'read_stl10')

    dataset, train, test = load(tmp_path, name='stl10', batch_size=5)
    assert dataset.in_memory and dataset.image_size == 96 and len(dataset.classes) == 10
    (images, labels), = loaders.make_loader(dataset, 'test', 8, device=CPU)
    torch.testing.assert_close(images * test.std + test.mean,
                               torch.from_numpy(truth['test']).float(), rtol=0, atol=1e-3)
    assert labels.tolist() == [*range(8)]
    views = [images for images, _ in train]
    assert [view.shape for view in views] == 4 * [(5, 3, 96, 96)]
    padded = F.pad((torch.from_numpy(truth['train']) - train.mean) / train.std, (4,) * 4)
    for view, index in zip(torch.cat(views), train.permutation):
        down, right = train.offsets[index]
        crop = padded[index, :, down:down + 96, right:right + 96]
        assert torch.equal(view, crop.flip(-1) if train.mirrored[index] else crop)
    # A file is prepared as the images in memory are.
    Image.fromarray(truth['test'][0].transpose(1, 2, 0)).save(tmp_path / 'x.png')
    torch.testing.assert_close(image_files.read_image(tmp_path / 'x.png', dataset), images[0])


def test_names_and_recipes_are_known_without_torch():
    code = ('import sys; import training.datasets; '
            'print({"torch", "torchvision", "PIL"} & set(sys.modules))')
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == 'set()'


# ---- several processes -----------------------------------------------------------------------

@pytest.mark.parametrize('in_memory', [True, False])
@pytest.mark.parametrize('processes', [2, 3, 7])
def test_the_shards_of_several_processes_make_the_batches_of_one(photos, in_memory, processes):
    def loaders(shard):
        if in_memory:
            return [memory_loader(6, shuffle=True, augmentation=Augmentation(), shard=shard),
                    memory_loader(6, shard=shard)]
        return load(photos, 6, image_size=66, shard=shard)[1:]

    for whole, *shards in zip(loaders((0, 1)),
                              *(loaders((rank, processes)) for rank in range(processes))):
        whole.set_epoch(3, start=1)
        assert {len(shard) for shard in shards} == {len(whole)}
        for shard in shards:
            shard.set_epoch(3, start=1)
        for i, ((images, labels), *batches) in enumerate(zip(whole, *shards, strict=True), start=1):
            assert {shard.images_in(i) for shard in shards} == {len(images)}
            counted = [label >= 0 for _, label in batches]
            assert all(len(label) for label in counted)  # each process has a part of each batch
            found = [tensor[chosen] for pair, chosen in zip(batches, counted) for tensor in pair]
            assert torch.equal(torch.cat(found[::2]), images)
            assert torch.equal(torch.cat(found[1::2]), labels)
            sizes = [int(chosen.sum()) for chosen in counted]
            assert max(sizes) - min(sizes) <= 1


# ---- the formats that are downloaded ---------------------------------------------------------

def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.mark.parametrize('name', ['cifar10', 'cifar100'])
def test_reads_the_format_of_cifar(tmp_path, monkeypatch, name):
    kind = torchvision.datasets.CIFAR10 if name == 'cifar10' else torchvision.datasets.CIFAR100
    key, classes = ('labels', 10) if name == 'cifar10' else ('fine_labels', 100)
    rng = np.random.RandomState(0)
    folder = tmp_path / kind.base_folder
    folder.mkdir()
    truth = {}
    for listing in ('train_list', 'test_list'):
        files = []
        for file, _ in getattr(kind, listing):
            pixels = rng.randint(0, 256, (12, 3072)).astype(np.uint8)
            labels = rng.randint(0, classes, 12).tolist()
            (folder / file).write_bytes(pickle.dumps({'data': pixels, key: labels}))
            files.append([file, md5(folder / file)])
            truth.setdefault(listing, []).append((pixels, labels))
        monkeypatch.setattr(kind, listing, files)
    (folder / kind.meta['filename']).write_bytes(
        pickle.dumps({kind.meta['key']: [str(i) for i in range(classes)]}))
    monkeypatch.setattr(kind, 'meta', {**kind.meta, 'md5': md5(folder / kind.meta['filename'])})

    dataset, train, test = load(tmp_path, name=name, augment=False)
    assert (len(dataset.classes), dataset.image_size) == (classes, 32)
    for loader, listing in ((train, 'train_list'), (test, 'test_list')):
        pixels = np.concatenate([p for p, _ in truth[listing]])
        labels = np.concatenate([y for _, y in truth[listing]])
        np.testing.assert_array_equal(loader.images, pixels.reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(loader.labels, labels)


@pytest.fixture(params=['cifar10', 'cifar100'])
def binary_cifar(request, tmp_path, monkeypatch):
    """The name, folder and records of a small data set in the official binary format."""
    name, label_bytes = request.param, 1 if request.param == 'cifar10' else 2
    version = getattr(datasets, name.upper())
    folder, files = version.binary_folder, version.files
    rng = np.random.RandomState(0)
    (tmp_path / folder).mkdir()
    records, sums = {}, {}
    for split, names in files.items():
        batches = [rng.randint(0, 256, (12, label_bytes + 3072)).astype(np.uint8) for _ in names]
        for file, batch in zip(names, batches):
            batch[:, label_bytes - 1] %= 10
            batch.tofile(tmp_path / folder / file)
            sums.setdefault(split, {})[file] = md5(tmp_path / folder / file)
        records[split] = np.concatenate(batches)
    read = functools.partial(datasets.read_cifar, dataclasses.replace(version, files=sums))
    entry = dataclasses.replace(datasets.DATASETS[name], read=read)
    monkeypatch.setitem(datasets.DATASETS, name, entry)
    return name, tmp_path / folder, records


def test_reads_the_binary_format_of_cifar(binary_cifar):
    name, folder, records = binary_cifar
    _, train, test = load(folder.parent, name=name, augment=False)
    for loader, expected in ((train, records['train']), (test, records['test'])):
        np.testing.assert_array_equal(loader.images, expected[:, -3072:].reshape(-1, 3, 32, 32))
        np.testing.assert_array_equal(loader.labels, expected[:, -3073])


@pytest.mark.parametrize('damage, complaint', [
    (lambda path: path.unlink(), 'No such file.*unpack cifar-'),
    (lambda path: path.write_bytes(path.read_bytes()[:-1]), 'not the official file'),
    (lambda path: path.write_bytes(b'?' + path.read_bytes()[1:]), 'not the official file')])
def test_a_binary_file_that_is_missing_or_altered_is_named(binary_cifar, damage, complaint):
    name, folder, _ = binary_cifar
    path = sorted(folder.iterdir())[-1]
    damage(path)
    with pytest.raises(DataError, match=f'^{path}.*{complaint}'):
        load(folder.parent, name=name)


def test_reads_the_format_of_svhn_and_only_divides_by_255(tmp_path, monkeypatch):
    rng = np.random.RandomState(0)
    table, truth = {}, {}
    for split, (url, file, _) in torchvision.datasets.SVHN.split_list.items():
        pixels = rng.randint(0, 256, (32, 32, 3, 10)).astype(np.uint8)
        scipy.io.savemat(tmp_path / file, {'X': pixels, 'y': np.arange(1, 11)[:, None]})
        table[split] = [url, file, md5(tmp_path / file)]
        truth[split] = pixels.transpose(3, 2, 0, 1)
    monkeypatch.setattr(torchvision.datasets.SVHN, 'split_list', table)
    _, train, test = load(tmp_path, name='svhn', augment=False)
    np.testing.assert_array_equal(train.images, np.concatenate([truth['train'], truth['extra']]))
    assert train.labels.tolist() == 2 * [*range(1, 10), 0]  # the files say 10 for the digit 0
    images = torch.cat([images for images, _ in test])
    np.testing.assert_allclose(images, truth['test'] / 255, rtol=1e-6)


# ---- errors ----------------------------------------------------------------------------------

def no_network(*_, **__):
    raise OSError('no network')


@pytest.mark.parametrize('name, files', [
    ('cifar10', ['cifar-10-python.tar.gz']), ('cifar100', ['cifar-100-python.tar.gz']),
    ('svhn', ['train_32x32.mat', 'extra_32x32.mat', 'test_32x32.mat'])])
@pytest.mark.parametrize('broken', [False, True])
def test_missing_or_broken_archives_are_named(tmp_path, monkeypatch, name, files, broken):
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    for file in files * broken:
        (tmp_path / file).write_bytes(b'half of an archive')
    with pytest.raises(DataError) as caught:
        load(tmp_path, name=name)
    message = str(caught.value)
    assert message.startswith(f'{", ".join(files)}: missing from {tmp_path} or broken')
    assert '--dataset folder reads a folder of images' in message and '--dataset shapes' in message
    assert ('folder cifar-1' in message) == (name != 'svhn') and '\n' not in message


def test_foreign_files_in_the_folder_of_cifar_are_not_unpickled(tmp_path, monkeypatch):
    monkeypatch.setattr('urllib.request.urlopen', no_network)
    (tmp_path / 'cifar-10-batches-py').mkdir()
    for batch in (*(f'data_batch_{i}' for i in range(1, 6)), 'test_batch', 'batches.meta'):
        path = tmp_path / 'cifar-10-batches-py' / batch
        path.write_bytes(pickle.dumps(Opener(tmp_path / 'harm')))
    with pytest.raises(DataError, match='missing from'):
        load(tmp_path, name='cifar10')
    assert not (tmp_path / 'harm').exists()


def test_malformed_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match='no train in .*--dataset shapes'):
        datasets.describe('folder', tmp_path)
    write_images(tmp_path, {'train/a': 2, 'train/b': 2})
    with pytest.raises(DataError, match=r'no val or test in .* \(only train/\)'):
        load(tmp_path)
    write_images(tmp_path, {'val/a': 1, 'val/c': 1})
    with pytest.raises(DataError, match='val: c is not one of the training classes'):
        load(tmp_path)
    (tmp_path / 'train' / 'empty').mkdir()
    with pytest.raises(DataError, match='train.*empty'):
        load(tmp_path)


@pytest.mark.parametrize('images, image_size, ending, workers', [
    (2, None, 'png', 0), (2001, None, 'jpg', 2), (2, 70, 'jpg', 0), (2, 70, 'jpg', 2)])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, images, image_size, ending, workers):
    write_images(tmp_path, {'train/a': images, 'train/b': 2, 'val/a': 1, 'val/b': 1}, (9, 9),
                 ending=ending)
    path = tmp_path / f'train/b/1.{ending}'
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])
    with pytest.raises(DataError) as caught:
        list(load(tmp_path, image_size=image_size, workers=workers)[1])
    message = str(caught.value)
    assert message.startswith(f'{path}: cannot be read as an image') and '\n' not in message


@pytest.mark.parametrize('image_size, workers', [(None, 0), (70, 0), (70, 2)])
def test_all_bad_images_are_named_at_once(tmp_path, capsys, image_size, workers):
    write_images(tmp_path, {'train/a': 9, 'train/b': 9, 'val/a': 1}, (9, 9))
    bad = [tmp_path / name for name in ('train/a/0.png', 'train/a/3.png', 'train/b/8.png')]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-30])
    _, train, _ = ((None, None, None) if image_size is None else
                   load(tmp_path, image_size=image_size, workers=workers))
    with pytest.raises(DataError) as caught:
        list(train) if train else load(tmp_path)
    message, said = str(caught.value), capsys.readouterr().out
    assert message.startswith('3 images cannot be used: ') and '\n' not in message
    assert all(message.count(f'{path}: cannot be read') == 1 for path in bad)
    assert said.count('\n') == 1 and said.endswith('; looking for others\n')


def test_bad_images_of_both_splits_are_named_at_once(tmp_path, capsys):
    write_images(tmp_path, {f'{split}/{label}': 4 for split in ('train', 'val') for label in 'ab'},
                 (9, 9))
    bad = [tmp_path / name for name in ('train/a/1.png', 'train/b/0.png', 'val/b/3.png')]
    for path in bad:
        path.write_bytes(path.read_bytes()[:-30])
    error = fails(capsys, '--dataset', 'folder', '--data', tmp_path, *SMALL, '--save',
                  tmp_path / 'run')
    assert all(error.count(f'{path}: cannot be read') == 1 for path in bad)


def test_unsupported_options_of_a_data_set(photos):
    for options in ({'image_size': 48}, {'in_channels': 1}, {'labels_file': 'x.csv'},
                    {'value_range': (0, 1)}):
        with pytest.raises(DataError, match='^cifar10 has .* are only for folder and imagenet'):
            datasets.describe('cifar10', 'nowhere', **options)
    with pytest.raises(DataError, match='--ten-crop needs'):
        load(photos, image_size=32, ten_crop=True)


@pytest.mark.cuda
def test_batches_on_cuda_are_those_on_the_cpu(photos):
    for size in (32, 66):
        dataset = datasets.describe('folder', photos, size)
        cpu, gpu = (loaders.make_loader(dataset, 'train', 4, device=torch.device(device),
                                        augmentation=Augmentation(), workers=2)
                    for device in ('cpu', 'cuda'))
        for (images, labels), (other, other_labels) in zip(cpu, gpu, strict=True):
            torch.testing.assert_close(other.cpu(), images, rtol=1e-6, atol=1e-6)
            assert torch.equal(other_labels.cpu(), labels) and other.is_cuda
