"""Images of any number of channels: what the files hold reaches the network, or is refused."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, fails, read_csv
from PIL import Image
from test_image_formats import png
from torchvision import transforms

import predict
import train
from attic import channel_stats
from training import checkpoint, datasets, image_files, image_transforms, loaders
from training.augmentation import Augmentation
from training.datasets import DataError
from training.decoding import ArrayImage, decode

pytestmark = pytest.mark.usefixtures('no_figures')

CPU = torch.device('cpu')
RNG = np.random.RandomState(0)
FIVE = RNG.randint(0, 65536, (12, 10, 5)).astype(np.uint16)
FOUR = RNG.randint(0, 256, (12, 10, 4)).astype(np.uint8)
PLANES = dict(photometric='minisblack', planarconfig='separate')
PIXELS = dict(photometric='minisblack', planarconfig='contig')


def assert_holds(path, expected):
    """`expected` is [H, W, C]."""
    image = decode(path, expected.shape[2])
    assert isinstance(image, ArrayImage) and image.values.flags.c_contiguous
    assert (image.high == 255) == (expected.dtype == np.uint8)
    np.testing.assert_array_equal(image.values, expected.transpose(2, 0, 1))


# ---- .npy --------------------------------------------------------------------------------------

@pytest.mark.parametrize('dtype', ['u1', 'i1', 'u2', '>i2', 'u4', 'i4', 'i8', 'f2', 'f4', '>f8'])
def test_npy(tmp_path, dtype):
    path = tmp_path / 'x.npy'
    for channels in (2, 5):
        values = np.asfortranarray(RNG.randint(-128, 128, (7, 6, channels)).astype(dtype))
        np.save(path, values)
        assert_holds(path, values)
    for part in (values[:, :, 0], values[:, :, :1], values[:, :, :3]):
        np.save(path, part)
        for channels in (1, 3):  # grey for colours and the other way round, as with other images
            image = decode(path, channels)
            if dtype == 'u1':
                truth = Image.fromarray(part.squeeze()).convert('RGB' if channels == 3 else 'L')
                np.testing.assert_array_equal(image, truth)
            else:
                np.testing.assert_array_equal(image.values.transpose(1, 2, 0), np.atleast_3d(part))


@pytest.mark.parametrize('values, channels, message', [
    (FIVE.transpose(2, 0, 1), 5, r'shape is \[5, 12, 10\], with the channels first: .*moveaxis'),
    (FIVE[:, :, 0][None], 1, r'shape is \[1, 12, 10\], with the channels first'),
    (FIVE, 4, '5 channels, and --in-channels is 4'), (FIVE, 3, '5 channels, and .* is 3'),
    (FIVE[:, :, 0], 5, '1 channels, and'), (FIVE[:, :, 0, None, None], 1, 'must be .H, W. or'),
    (FIVE[:0], 5, 'it has no pixels'),
    (FIVE > 9, 5, 'it holds bool: save'), (FIVE * 1j, 5, 'it holds complex128'),
    (np.array([[{}]]), 1, 'Python objects'), (np.full((4, 4, 5), np.inf), 5, 'not finite')])
def test_npy_that_is_refused(tmp_path, values, channels, message):
    np.save(tmp_path / 'x.npy', values)
    with pytest.raises(DataError, match=f'x.npy: .*{message}') as caught:
        decode(tmp_path / 'x.npy', channels)
    assert '\n' not in str(caught.value)


def test_npy_that_is_broken_or_large(tmp_path):
    np.lib.format.open_memmap(tmp_path / 'x.npy', 'w+', 'f8', (7000, 7000))  # a sparse file
    with pytest.raises(DataError, match='x.npy: .*takes 392 MB, and at most 384'):
        decode(tmp_path / 'x.npy', 1)
    np.save(tmp_path / 'x.npy', FIVE)
    (tmp_path / 'x.npy').write_bytes((tmp_path / 'x.npy').read_bytes()[:-1])
    with pytest.raises(DataError, match='x.npy: cannot be read'):
        decode(tmp_path / 'x.npy', 5)


# ---- TIFF, RGBA --------------------------------------------------------------------------------

@pytest.mark.parametrize('values, options', [
    (FIVE, PIXELS), (FIVE, dict(PIXELS, compression='zlib', predictor=True)),
    (FIVE, dict(PIXELS, tile=(16, 16))), (FIVE, dict(PIXELS, byteorder='>')),
    (FIVE.astype('f8') / 7, PIXELS), (FOUR, dict(photometric='rgb')), (FOUR[:, :, :2], PIXELS),
    (FIVE, {}),  # written as 12 pages
    (FIVE.transpose(2, 0, 1), {}), (FIVE.transpose(2, 0, 1), PLANES),
    (FIVE.transpose(2, 0, 1), dict(imagej=True)),
    (FIVE.transpose(2, 0, 1), dict(ome=True, metadata={'axes': 'CYX'}))])
def test_tiff(tmp_path, values, options):
    tifffile = pytest.importorskip('tifffile')
    tifffile.imwrite(tmp_path / 'x.tif', values, **options)
    is_first = values.shape[1:] == FIVE.shape[:2]
    assert_holds(tmp_path / 'x.tif', values.transpose(1, 2, 0) if is_first else values)


@pytest.mark.parametrize('values, options, message', [
    (FIVE, PIXELS, '5 channels, and --in-channels is 4'),
    (FOUR, dict(photometric='separated'), 'interpretation is SEPARATED'),
    (FIVE.transpose(2, 0, 1), PLANES, '5 channels'), (FIVE[None].repeat(2, 0), PIXELS, 'its axes'),
    (FOUR[:, :, 0], dict(photometric='miniswhite'), 'interpretation is MINISWHITE')])
def test_tiff_that_is_refused(tmp_path, values, options, message):
    tifffile = pytest.importorskip('tifffile')
    tifffile.imwrite(tmp_path / 'x.tif', values, **options)
    with pytest.raises(DataError, match=f'x.tif: .*{message}'):
        decode(tmp_path / 'x.tif', 4)
    tifffile.imwrite(tmp_path / 'x.tif', FIVE, **PIXELS)
    with tifffile.TiffWriter(tmp_path / 'x.tif', append=True) as file:
        file.write(FOUR, photometric='rgb')
    with pytest.raises(DataError, match='x.tif: .*holds 2 images'):
        decode(tmp_path / 'x.tif', 5)


def test_alpha_is_the_fourth_channel(tmp_path):
    for name in ('x.png', 'x.webp'):
        Image.fromarray(FOUR).save(tmp_path / name, lossless=True, exact=True)
        assert_holds(tmp_path / name, FOUR)
    (tmp_path / 'x.png').write_bytes(png(FIVE[:, :, :4]))
    assert_holds(tmp_path / 'x.png', FIVE[:, :, :4])
    Image.fromarray(FOUR[:, :, :2]).save(tmp_path / 'x.png')
    assert_holds(tmp_path / 'x.png', FOUR[:, :, :2])
    Image.fromarray(FOUR[:, :, :3]).save(tmp_path / 'x.png')
    with pytest.raises(DataError, match='mode is RGB, and --in-channels is 4: save .* RGBA'):
        decode(tmp_path / 'x.png', 4)
    Image.fromarray(FOUR).convert('CMYK').save(tmp_path / 'x.jpg')
    with pytest.raises(DataError, match='mode is CMYK'):
        decode(tmp_path / 'x.jpg', 4)
    (tmp_path / 'x.png').write_bytes(png(FIVE[:, :, :2]))
    with pytest.raises(DataError, match='more than 8 bits: save it as TIFF or .npy'):
        decode(tmp_path / 'x.png', 2)


# ---- transforms ----------------------------------------------------------------------------------

def test_channels_are_transformed_alike(tmp_path):
    """Of RGBA, Pillow's own resize gives black where alpha is 0."""
    values = np.tile(FOUR, (9, 9, 1))
    values[:, :, 3] = 0
    Image.fromarray(values).save(tmp_path / 'x.png')
    dataset = datasets.Description('folder', None, ('a', 'b'), 66, (0,) * 4, (1,) * 4)
    whole = torch.from_numpy(values).permute(2, 0, 1).float()
    transform = image_transforms.test_transform(dataset)
    seen = image_files.read_pixels(dataset, transform, tmp_path / 'x.png')
    truth = transforms.CenterCrop(66)(transforms.Resize(round(66 * 256 / 224))(whole))
    assert seen.dtype == torch.uint8
    torch.testing.assert_close(seen.float(), truth, rtol=0, atol=0.51)
    torch.manual_seed(0)
    transform = image_transforms.train_transform(dataset, Augmentation())
    seen = image_files.read_pixels(dataset, transform, tmp_path / 'x.png')
    torch.manual_seed(0)
    crop = transforms.Compose([transforms.RandomResizedCrop(66), transforms.RandomHorizontalFlip()])
    torch.testing.assert_close(seen.float(), crop(whole), rtol=0, atol=0.51)
    assert seen[3].max() == 0 and seen[:3].float().std() > 10


def test_statistics_are_repeated_in_turn(tmp_path, capsys):
    for folder in ('train/a', 'train/b', 'val/a'):
        (tmp_path / folder).mkdir(parents=True)
        np.save(tmp_path / folder / 'x.npy', FIVE)
    dataset = datasets.describe('folder', tmp_path, in_channels=5)
    assert dataset.mean == (123.675, 116.28, 103.53, 123.675, 116.28)
    assert dataset.value_range == (FIVE.min(), FIVE.max()) and dataset.image_size == 10
    (images, _), = loaders.make_loader(dataset, 'test', 4, device=CPU)
    scaled = 255 * (FIVE - float(FIVE.min())) / (float(FIVE.max()) - FIVE.min())
    expected = ((scaled - dataset.mean) / dataset.std).transpose(2, 0, 1)[:, 1:-1]  # the centre
    np.testing.assert_allclose(images[0], expected, atol=1e-4)
    channel_stats.main(['--dataset', 'folder', '--data', str(tmp_path), '--in-channels', '5'])
    measured = ' '.join(capsys.readouterr().out.splitlines()[-2:]).split()
    assert measured[::6] == ['--mean', '--std']
    seen = scaled[1:-1].reshape(-1, 5) / 255
    for part, truth in ((measured[1:6], seen.mean(0)), (measured[7:], seen.std(0))):
        np.testing.assert_allclose(np.array(part, float), truth, atol=6e-5)


# ---- runs ----------------------------------------------------------------------------------------

def write_fields(root, ending, size):
    """Two classes that differ in the fifth channel alone."""
    rng = np.random.RandomState(0)
    for folder, count in (('train/wet', 8), ('train/dry', 8), ('val/wet', 3), ('val/dry', 3)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            field = rng.randint(0, 6000, (size, size, 5)).astype(np.uint16)
            field[:, :, 4] = rng.randint(0, 4000, (size, size)) + 3000 * ('wet' in folder)
            if ending == 'npy':
                np.save(root / folder / f'{i}.npy', field)
            else:
                sys.modules['tifffile'].imwrite(root / folder / f'{i}.tif', field, **PIXELS)
    return root


@pytest.mark.parametrize('ending, size, network', [
    ('npy', 12, SMALL), ('tif', 70, ['--block-config', '1', '1', '--growth-rate', '4',
                                     '--batch-size', '4', '--print-freq', '3', '--device', 'cpu',
                                     '--image-size', '65', '--no-plot', '--workers', '0'])])
def test_a_run(tmp_path, capsys, ending, size, network):
    if ending == 'tif':
        pytest.importorskip('tifffile')
    root, run = write_fields(tmp_path / 'fields', ending, size), tmp_path / 'run'
    train.main(['--dataset', 'folder', '--data', str(root), '--in-channels', '5', *network,
                '--epochs', '3', '--save', str(run)])
    assert re.search(r'with values from \d+ to 69\d\d, 5 channels, normalised with repeated',
                     capsys.readouterr().out)
    train.main(['--save', str(run), '--resume', '--epochs', '6'])
    rows = read_csv(run / 'test.csv')
    assert len(rows) == 6 and min(float(row['error']) for row in rows) == 0
    predict.main([str(root / 'val'), '--checkpoint', str(run / 'best.pth'), '--device', 'cpu',
                  '--heatmap-dir', str(tmp_path / 'maps'), '--csv', str(tmp_path / 'x.csv')])
    for row in read_csv(tmp_path / 'x.csv')[::2]:
        assert Path(row['file']).parent.name == row['class']
    assert (tmp_path / f'maps/wet/0.{ending}.heatmap.png').exists()


def test_flags(tmp_path, capsys, monkeypatch):
    write_fields(tmp_path, 'npy', 12)
    argv = ['--dataset', 'folder', '--data', tmp_path, *SMALL, '--save', tmp_path / 'run']
    said = fails(capsys, *argv, '--in-channels', 4)
    assert said.endswith('it has 5 channels, and --in-channels is 4') and said.count('.npy') == 1
    assert "'0' is not a whole number in [1, 1024]" in fails(capsys, *argv, '--in-channels', 0)
    said = fails(capsys, *argv, '--in-channels', 5, '--mean', .1, .2)
    assert 'a value for each of 5 channels, or one for all' in said
    train.main([*map(str, argv), '--in-channels', '5', '--mean', '.5', '--std', '.2', '--epochs',
                '1'])
    assert 'ImageNet' not in capsys.readouterr().out
    _, dataset = predict.load_model(predict.make_parser().parse_args(
        ['x', '--checkpoint', str(tmp_path / 'run/best.pth')]))
    assert (dataset.mean, dataset.std) == ((127.5,) * 5, (51,) * 5)


def test_without_tifffile(tmp_path, monkeypatch):
    Image.fromarray(FOUR).save(tmp_path / 'x.tif')
    monkeypatch.setitem(sys.modules, 'tifffile', None)
    with pytest.raises(DataError, match='x.tif: TIFF of 4 .* tifffile: pip install tifffile$'):
        decode(tmp_path / 'x.tif', 4)
    assert np.array_equal(decode(tmp_path / 'x.tif'), FOUR[:, :, :3])  # Pillow's, as before


def test_a_grey_data_set_in_memory_needs_no_flag(tmp_path, monkeypatch):
    def read(split, root):
        return torch.randint(0, 256, (12, 1, 28, 28), dtype=torch.uint8), torch.arange(12) % 2

    monkeypatch.setitem(datasets.DATASETS, 'grey', datasets.Dataset(
        classes=('a', 'b'), image_size=28, read=read, mean=(72.9,), std=(90.0,)))
    train.main(['--dataset', 'grey', *SMALL, '--epochs', '1', '--save', str(tmp_path)])
    saved = checkpoint.load(tmp_path / 'best.pth')
    assert saved['config']['in_channels'] == 1 and saved['config']['small_inputs']
