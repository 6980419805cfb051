"""Image files, written here by the formats' specifications, are read exactly or refused by name."""

import base64
import dataclasses
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, write_images
from PIL import Image, TiffImagePlugin, features
from torchvision import transforms

import predict
import train
from training import datasets, image_files, image_transforms
from training.augmentation import Augmentation
from training.console import DataError
from training.decoding import ArrayImage, convert, decode
from training.formats import check_avif_depth

RNG = np.random.RandomState(0)
GREY, COLOURS, MORE = (RNG.randint(0, 65536, (6, 5, *c)).astype(np.uint16)
                       for c in ((), (3,), (4,)))
BYTES = (MORE >> 8).astype(np.uint8)
# 4 x 4 pixels of 12 bits, the rows 0, 1, 2047, 4095, by OpenJPEG 2.5.4.
JPEG2000 = (
    '/0//UQApAAAAAAAEAAAABAAAAAAAAAAAAAAABAAAAAQAAAAAAAAAAAABCwEB/1IADAAAAAEAAAQEAAH/XAAEQGD/'
    'ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAAoAAH/k9/gXBFiNPlFDewnAC+I'
    '1+FP/KHKHKGBRcGX/9k=')
JPEG2000_COLOURS = (
    '/0//UQAvAAAAAAAEAAAABAAAAAAAAAAAAAAABAAAAAQAAAAAAAAAAAADCwEBCwEBCwEB/1IADAAAAAEBAAQEAAH/'
    'XAAEQGD/ZAAlAAFDcmVhdGVkIGJ5IE9wZW5KUEVHIHZlcnNpb24gMi41LjT/kAAKAAAAAAAqAAH/k9/gXBFiNPlF'
    'DewnAC+I1+FP/KHKHKGBRcGXgID/2Q==')

# 4 x 4 pixels of 10 bits, the multiples of 64, by libavif 1 (imagecodecs).
AVIF = (
    'AAAAHGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZgAAAOltZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAA'
    'AAAAAAAAAAAA5waXRtAAAAAAABAAAAHmlsb2MAAAAARAAAAQABAAAAAQAAAQ0AAAAfAAAAKGlpbmYAAAAAAAEAAAAa'
    'aW5mZQIAAAAAAQAAYXYwMUNvbG9yAAAAAGhpcHJwAAAASWlwY28AAAAUaXNwZQAAAAAAAAAEAAAABAAAAA5waXhpAA'
    'AAAAEKAAAADGF2MUOBAFwAAAAAE2NvbHJuY2x4AAIAAgACgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAAJ21kYXQS'
    'AAoFGAR/nUAyFBAAhwvN97sufespUrnGuc4SUrYo')


def png(pixels):
    """A PNG of 16 bits, [H, W, C]; Pillow writes none with colours or alpha."""
    height, width, bands = pixels.shape
    rows = pixels.astype('>u2').reshape(height, -1)
    kind = {1: 0, 2: 4, 3: 2, 4: 6}[bands]
    chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, height, 16, kind, 0, 0, 0)),
              (b'IDAT', zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows))),
              (b'IEND', b'')]
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(data)) + name + data + struct.pack('>I', zlib.crc32(name + data))
        for name, data in chunks)


def tiff(pixels, photometric=1, extra=None, order='<'):
    """An uncompressed TIFF of one strip, [H, W] or [H, W, C] (TIFF 6.0, sections 2 and 8)."""
    height, width, bands = (*pixels.shape, 1)[:3]
    kind = {'u': 1, 'i': 2, 'f': 3}[pixels.dtype.kind]
    data = pixels.astype(pixels.dtype.newbyteorder(order)).tobytes()
    tags = {256: [width], 257: [height], 258: [8 * pixels.itemsize] * bands, 259: [1],
            262: [photometric], 273: [8], 277: [bands], 278: [height], 279: [len(data)],
            **({} if extra is None else {338: extra}), 339: [kind] * bands}
    start = 8 + len(data)
    entries, more = struct.pack(f'{order}H', len(tags)), b''
    for tag, values in tags.items():
        packed = struct.pack(f'{order}{len(values)}H', *values)
        if len(packed) > 4:
            where = start + 2 + 12 * len(tags) + 4 + len(more)
            more, packed = more + packed, struct.pack(f'{order}I', where)
        entries += struct.pack(f'{order}HHI', tag, 3, len(values)) + packed.ljust(4, b'\0')
    head = {'<': b'II*\0', '>': b'MM\0*'}[order] + struct.pack(f'{order}I', start)
    return head + data + entries + struct.pack(f'{order}I', 0) + more


def pnm(kind, maximum, pixels):
    height, width = pixels.shape[:2]
    data = (' '.join(map(str, pixels.ravel())).encode() if kind == 'P2'
            else pixels.astype('>u2').tobytes())
    return f'{kind}\n{width} {height}\n{maximum}\n'.encode() + data


def signed(bits):
    return (GREY.astype(np.int32) - 2**15 >> 16 - bits).astype(f'int{bits}')


@pytest.mark.parametrize('name, content, expected', [
    ('colours.png', png(COLOURS), COLOURS), ('alpha.png', png(MORE), MORE[:, :, :3]),
    ('grey alpha.png', png(MORE[:, :, :2]), MORE[:, :, 0]),
    ('colours.tif', tiff(COLOURS, 2), COLOURS), ('big.tif', tiff(COLOURS, 2, order='>'), COLOURS),
    ('alpha.tif', tiff(MORE, 2, [2]), MORE[:, :, :3]),
    ('grey.tif', tiff(GREY), GREY), ('big grey.tif', tiff(GREY, order='>'), GREY),
    ('white is zero.tif', tiff(GREY, 0), 65535 - GREY),
    ('unsigned 32.tif', tiff(GREY * np.uint32(65537)), GREY * np.uint32(65537)),
    ('signed 32.tif', tiff(GREY - np.int32(40000)), GREY - np.int32(40000)),
    ('signed 16.tif', tiff(signed(16)), signed(16)), ('signed 8.tif', tiff(signed(8)), signed(8)),
    ('floats.tif', tiff(GREY.astype(np.float32) / 7), GREY.astype(np.float32) / 7),
    ('12.pgm', pnm('P5', 4095, GREY >> 4), GREY >> 4), ('16.pgm', pnm('P5', 65535, GREY), GREY),
    ('plain.pgm', pnm('P2', 4095, GREY >> 4), GREY >> 4),
    ('12.j2k', base64.b64decode(JPEG2000), [[0, 1, 2047, 4095]] * 4)])
def test_images_of_more_than_8_bits_are_read_exactly(tmp_path, name, content, expected):
    (tmp_path / name).write_bytes(content)
    image = decode(tmp_path / name)
    expected = np.atleast_3d(expected).transpose(2, 0, 1)
    assert isinstance(image, ArrayImage) and image.size == expected.shape[:0:-1]
    np.testing.assert_array_equal(image.values, expected)


@pytest.mark.parametrize('compression', ['tiff_lzw', 'tiff_adobe_deflate'])
def test_compressed_16_bit_grey_with_white_as_zero(tmp_path, compression):
    Image.fromarray(GREY).save(tmp_path / 'x.tif', compression=compression, tiffinfo={262: 0})
    np.testing.assert_array_equal(decode(tmp_path / 'x.tif').values[0], 65535 - GREY)


@pytest.mark.parametrize('name, content, message', [
    ('bands.tif', tiff(BYTES, 2, [0]), 'has 4 bands, .* save it without the others'),
    ('no kind.tif', tiff(BYTES, 2), 'has 4 bands'),
    ('bands 16.tif', tiff(MORE, 2, [0]), 'has 4 bands'),
    ('infrared.tif', tiff(np.dstack([BYTES, BYTES[:, :, 0]]), 2, [2, 0]), 'has 5 bands'),
    ('two.tif', tiff(BYTES[:, :, :2], 1, [0]), 'has 2 bands|Pillow does not know'),
    ('premultiplied.tif', tiff(MORE, 2, [1]), '16 bits a channel.* save it as PNG'),
    ('cmyk.tif', tiff(MORE, 5), '16 bits a channel.* save it as PNG'),
    ('floats.tif', tiff(GREY.astype(np.float32), 0), 'floats have white as zero'),
    ('doubles.tif', tiff(GREY.astype(np.float64)), 'in a format that Pillow does not know'),
    ('nan.tif', tiff(np.full((2, 2), np.nan, np.float32)), 'values that are not finite'),
    ('colours.ppm', pnm('P6', 4095, COLOURS >> 4), 'colours have more than 8 bits: save it as PNG'),
    ('colours.j2k', base64.b64decode(JPEG2000_COLOURS), 'JPEG 2000 of 12 bits.*save it as PNG'),
    ('text.png', b'no image', 'damaged, or in a format')])
def test_images_that_would_lose_information_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f'^{tmp_path / name}.*{message}') as caught:
        decode(tmp_path / name)
    assert '\n' not in str(caught.value)


def test_pages_and_animations_are_refused_but_no_thumbnails(tmp_path):
    pages = [Image.fromarray(np.full((64, 64, 3), value, np.uint8)) for value in (10, 90, 200)]
    for name, word in (('x.tif', '3 pages'), ('x.gif', '3 images'), ('x.webp', '3 images'),
                       ('x.png', '3 images')):
        pages[0].save(tmp_path / name, save_all=True, append_images=pages[1:])
        with pytest.raises(DataError, match=f'{name}: .* {word}: save '):
            decode(tmp_path / name)
    # A photograph and its preview, as many cameras save them; a TIFF with a thumbnail.
    pages[0].save(tmp_path / 'x.jpg', 'MPO', save_all=True, append_images=pages[1:])
    with TiffImagePlugin.AppendingTiffWriter(tmp_path / 'y.tif', True) as file:
        pages[0].save(file, 'TIFF')
        file.newFrame()
        pages[1].save(file, 'TIFF', tiffinfo={254: 1})
    with Image.open(tmp_path / 'y.tif') as image:
        assert image.n_frames == 2
    for name in ('x.jpg', 'y.tif'):
        assert abs(np.asarray(decode(tmp_path / name), int) - 10).max() <= 1


@pytest.mark.skipif(not features.check('avif'), reason='this Pillow reads no AVIF')
def test_avif_of_more_than_8_bits_is_refused(tmp_path):
    path, content = tmp_path / 'x.avif', bytearray(base64.b64decode(AVIF))
    path.write_bytes(content)
    with Image.open(path) as image:
        assert image.getextrema() == (0, 239)  # of 0..960 of 1023
    with pytest.raises(DataError, match='x.avif: .* AVIF of 10 bits.*: save it as PNG'):
        decode(path)
    content[content.index(b'av1C') + 6] |= 0x20
    path.write_bytes(content)  # which Pillow would not open: the pixels have 10 bits
    with pytest.raises(ValueError, match='AVIF of 12 bits'):
        check_avif_depth(path)
    Image.fromarray(BYTES[:, :, :3]).save(path)
    assert decode(path).size == (5, 6)


def test_8_bit_kinds(tmp_path):
    (tmp_path / 'white.tif').write_bytes(tiff(BYTES[:, :, 0], 0))
    assert np.array_equal(decode(tmp_path / 'white.tif', 1), 255 - BYTES[:, :, 0])
    # sRGB's red in CIELAB with white D50 (Lindbloom's calculator): 54.29, 80.81, 69.89.
    lab = np.tile(np.array([round(54.29 * 2.55), 81, 70], np.uint8), (4, 4, 1))
    (tmp_path / 'lab.tif').write_bytes(tiff(lab, 8))
    assert abs(np.asarray(decode(tmp_path / 'lab.tif'), int) - (255, 0, 0)).max() < 6
    assert abs(np.asarray(decode(tmp_path / 'lab.tif', 1), int) - 0.299 * 255).max() < 4
    # Grey multiplied by alpha: 50 of 128 is 99.6 of 255.
    for mode in ('L', 'RGB'):
        image = convert(Image.new('La', (4, 4), (50, 128)), mode)
        assert np.unique(image).tolist() in ([99], [100])


@pytest.mark.parametrize('suffix', sorted({*image_files.SUFFIXES} - {'.npy', '.dcm', '.dicom'}))
def test_files_of_each_suffix_are_found_and_read(tmp_path, suffix):
    kind = Image.registered_extensions().get(suffix)
    if kind is None:
        pytest.skip(f'this Pillow reads no {suffix}')
    path = tmp_path / f'x{suffix.upper()}'
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).convert(
        '1' if suffix == '.pbm' else 'RGB').save(path, kind)
    assert image_files.find_images(tmp_path) == ([str(path)], {})
    assert decode(path).size == (16, 16)


# ---- sizes -----------------------------------------------------------------------------------

PHOTOS = datasets.Description('folder', None, ('a', 'b'), 224, **datasets.IMAGENET_STATISTICS)


def test_images_too_large_are_refused_with_their_size(tmp_path):
    Image.new('1', (8001, 8000)).save(tmp_path / 'x.png')
    with pytest.raises(DataError, match='x.png: .* 8001 x 8000 pixels, and at most 64 million'):
        decode(tmp_path / 'x.png')
    content = bytearray(base64.b64decode(JPEG2000))
    content[8:16] = struct.pack('>II', 8001, 6000)  # Xsiz, Ysiz
    (tmp_path / 'x.j2k').write_bytes(content)
    with pytest.raises(DataError, match='x.j2k: .* 8001 x 6000 pixels, and at most 48 million'):
        decode(tmp_path / 'x.j2k')


@pytest.mark.parametrize('shape', [(20000, 2), (1, 40000), (100, 21), (21, 100)])
@pytest.mark.parametrize('dtype', [np.uint8, np.uint16])
def test_elongated_images_are_cropped_before_they_are_resized(tmp_path, shape, dtype):
    """Resized first, 2 x 20,000 pixels take 7 GB."""
    pixels = np.random.RandomState(0).randint(0, 256, shape).astype(dtype)
    Image.fromarray(pixels).save(tmp_path / 'x.png')
    dataset = dataclasses.replace(PHOTOS, value_range=(0, 255) if dtype == np.uint16 else None)
    transform = image_transforms.test_transform(dataset)
    seen = image_files.read_pixels(dataset, transform, tmp_path / 'x.png')
    top, left = ((size - 4 * min(shape)) // 2 if size > min(shape) else 0 for size in shape)
    middle = torch.from_numpy(pixels[top:, left:][:4 * min(shape), :4 * min(shape)].astype('f4'))
    truth = transforms.CenterCrop(224)(transforms.Resize(256)(middle[None])).expand(3, -1, -1)
    torch.testing.assert_close(seen.float(), truth, rtol=0, atol=1 if dtype == np.uint8 else 1e-3)


# ---- transforms of more than 8 bits ----------------------------------------------------------

@pytest.mark.parametrize('channels', [3, 1])
@pytest.mark.parametrize('source', [COLOURS, COLOURS[:, :, :1]])
def test_array_images_are_transformed_as_a_tensor_of_floats(tmp_path, channels, source):
    (tmp_path / 'x.png').write_bytes(png(source))
    dataset = dataclasses.replace(PHOTOS, mean=(0,) * channels, std=(1,) * channels, image_size=8,
                                  value_range=(1000, 60000))
    whole = (torch.from_numpy(source.astype(np.float32)).permute(2, 0, 1) - 1000) / 59000
    whole = whole.clamp(0, 1).expand(3, -1, -1)
    if channels == 1:
        whole = transforms.functional.rgb_to_grayscale(whole)
    for ours, theirs in ((image_transforms.RandomResizedCrop(8), transforms.RandomResizedCrop(8)),
                         (image_transforms.Resize(8), transforms.Resize(8)),
                         (image_transforms.to_tensor, lambda image: image)):
        torch.manual_seed(0)
        seen = image_files.read_pixels(dataset, ours, tmp_path / 'x.png')
        torch.manual_seed(0)
        torch.testing.assert_close(seen, 255 * theirs(whole), rtol=1e-4, atol=0.05)
    torch.manual_seed(0)
    transform = image_transforms.train_transform(dataset, Augmentation(random_erasing=1))
    seen = image_files.read_pixels(dataset, transform, tmp_path / 'x.png')
    assert seen.shape == (channels, 8, 8) and 0 <= seen.min() and seen.max() <= 255


def test_the_lower_bytes_of_colours_reach_the_model(tmp_path):
    pixels = np.full((8, 8, 3), 300, np.uint16)
    pixels[:, 4:] += 1
    (tmp_path / 'x.png').write_bytes(png(pixels))
    dataset = dataclasses.replace(PHOTOS, image_size=8, value_range=(300, 301))
    seen = image_files.read_image(Path(tmp_path, 'x.png'), dataset)
    black, white = ((value - seen.new_tensor(PHOTOS.mean)) / seen.new_tensor(PHOTOS.std)
                    for value in (0, 255))
    torch.testing.assert_close(seen[:, 4, 0], black)
    torch.testing.assert_close(seen[:, 4, 7], white)


@pytest.mark.usefixtures('no_figures')
def test_images_with_other_values_than_a_model_knows_are_said(tmp_path, capsys):
    folders = {f'{split}/{name}': 2 for split in ('train', 'test') for name in 'ab'}
    for name, factor in (('8', None), ('12', 16), ('16', 256)):  # bits
        for path in write_images(tmp_path / name, folders, (12, 12), 'L').glob('*/*/*'):
            if factor:
                pixels = np.asarray(Image.open(path)).astype(np.uint16)[..., None]
                path.write_bytes(png(factor * pixels))
    train.main(['--dataset', 'folder', '--data', str(tmp_path / '12'), *SMALL, '--epochs', '1',
                '--in-channels', '1', '--save', str(tmp_path / 'run')])
    best = str(tmp_path / 'run/best.pth')
    for name, warning in (('8', 'there are images of 8 bits'), ('12', None),
                          ('16', 'there are images with most values above')):
        data = str(tmp_path / name)
        capsys.readouterr()
        train.main(['--evaluate', '--resume', best, '--device', 'cpu', '--data', data])
        predict.main(['--checkpoint', best, '--device', 'cpu', f'{data}/test'])
        said = capsys.readouterr().err
        assert said.count('warning: ') == (2 if warning else 0)
        assert warning is None or said.count(warning) == 2
