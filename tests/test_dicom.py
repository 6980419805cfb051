"""DICOM: pydicom's real files against their bytes, and the rare kinds written here."""

import re
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, fails, read_csv

import predict
import train
from training import datasets, image_files
from training.datasets import DataError
from training.decoding import ArrayImage, decode

pytestmark = pytest.mark.usefixtures('no_figures')

pydicom = pytest.importorskip('pydicom')
FILES = Path(pydicom.__file__).parent / 'data' / 'test_files'
CR = FILES / 'dicomdirtests/77654033/CR1/6154'  # MONOCHROME1 of 12 bits; slope 0.684, intercept 200


def stored(path, dtype, shape):
    """The bytes after the tag (7FE0,0010) of an uncompressed file with explicit types."""
    content = path.read_bytes()
    start = content.rindex(b'\xe0\x7f\x10\x00O') + 12  # tag, OW or OB, two zeros, 4 of length
    return np.frombuffer(content[start:], dtype, np.prod(shape)).reshape(shape)


def changed(path, name='MR_small.dcm', pixels=None, **elements):
    """A copy of a real file with other pixels and elements, such as ('SS', -2000) of a given type.
    """
    data = pydicom.dcmread(FILES / name)
    for key, value in elements.items():
        if isinstance(value, tuple):
            data.add_new(key, *value)
        else:
            setattr(data, key, value)
    if pixels is not None:
        data.Rows, data.Columns = pixels.shape[:2]
        data.PixelData = pixels.tobytes()
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        data.save_as(path)
    return path


def test_hounsfield_units():
    image = decode(FILES / 'CT_small.dcm', 1)
    assert image.values.dtype.kind == 'i' and not image.white_is_low
    expected = stored(FILES / 'CT_small.dcm', '<i2', (128, 128)).astype(int) - 1024
    np.testing.assert_array_equal(image.values[0], expected)


@pytest.mark.parametrize('ending', ['', '_RLE', '_bigendian', '_implicit', '_jp2klossless'])
def test_transfer_syntaxes_hold_the_same_pixels(ending):
    truth = stored(FILES / 'MR_small.dcm', '<i2', (64, 64))
    np.testing.assert_array_equal(decode(FILES / f'MR_small{ending}.dcm').values[0], truth)


def test_monochrome1_is_inverted_after_the_window(tmp_path):
    path = shutil.copy(CR, tmp_path / 'x.dcm')
    values = stored(CR, '<u2', (16, 16)) * 0.684 + 200
    image = decode(path, 1)
    assert image.white_is_low
    np.testing.assert_allclose(image.values[0], values, rtol=1e-6)
    dataset = datasets.Description('folder', None, ('a', 'b'), 16, (0,), (1,), (1700, 2100))
    seen = image_files.read_image(path, dataset)
    np.testing.assert_allclose(seen[0], 255 * (1 - ((values - 1700) / 400).clip(0, 1)), atol=1e-3)


def test_colours(tmp_path):
    y0, y1, blue, red = stored(FILES / 'SC_ybr_full_422_uncompressed.dcm', 'u1',
                               (100, 50, 4)).astype(float).transpose(2, 0, 1)
    y = np.stack([y0, y1], 2).reshape(100, 100)
    blue, red = (np.repeat(part, 2, 1) - 128 for part in (blue, red))
    rgb = y + 1.402 * red, y - 0.344136 * blue - 0.714136 * red, y + 1.772 * blue  # ITU-R BT.601
    image = np.asarray(decode(FILES / 'SC_ybr_full_422_uncompressed.dcm'), float)
    assert abs(image - np.stack(rgb, 2).clip(0, 255)).max() <= 1
    for name in ('SC_rgb_rle', 'SC_rgb_jpeg_dcmtk', 'SC_rgb_dcmtk_+eb+cr', 'SC_rgb_gdcm_KY'):
        assert abs(np.asarray(decode(FILES / f'{name}.dcm'), float) - image).mean() < 3, name
    deep = decode(FILES / 'SC_rgb_rle_16bit.dcm').values  # the 8 bits times 257
    assert abs(deep / 257 - image.transpose(2, 0, 1)).mean() < 3
    palette = pydicom.dcmread(FILES / 'examples_palette.dcm')
    table = [np.frombuffer(palette[f'{name}PaletteColorLookupTableData'].value, '<u2')
             for name in ('Red', 'Green', 'Blue')]
    indices = stored(FILES / 'examples_palette.dcm', 'u1', (350, 800))
    np.testing.assert_array_equal(decode(FILES / 'examples_palette.dcm').values,
                                  np.stack(table)[:, indices])


def test_where_slope_and_intercept_may_be(tmp_path):
    values = pydicom.dcmread(FILES / 'CT_small.dcm')
    item, group = pydicom.Dataset(), pydicom.Dataset()
    item.RescaleSlope, item.RescaleIntercept = 2, -1024  # as enhanced CT has them
    group.PixelValueTransformationSequence = [item]
    truth = values.pixel_array.astype(int)
    path = changed(tmp_path / 'x.dcm', 'CT_small.dcm', SharedFunctionalGroupsSequence=[group])
    np.testing.assert_array_equal(decode(path).values[0], truth * 2 - 1024)
    table = pydicom.Dataset()
    table.add_new('LUTDescriptor', 'SS', [4, 10, 16])  # 4 entries from value 10 on, of 16 bits
    table.add_new('LUTData', 'US', [7, 5, 300, 2])
    pixels = np.array([[9, 10, 11], [12, 13, 99]], np.int16)
    path = changed(tmp_path / 'table.dcm', pixels=pixels, ModalityLUTSequence=[table])
    np.testing.assert_array_equal(decode(path).values[0], [[7, 7, 5], [300, 2, 2]])


@pytest.mark.parametrize('kind, expected', [
    ('MONOCHROME2', [[5, 5, 9], [20, 30, 5]]), ('MONOCHROME1', [[30, 5, 9], [20, 30, 30]])])
def test_padding_becomes_black(tmp_path, kind, expected):
    pixels = np.array([[-2000, 5, 9], [20, 30, -1990]], np.int16)
    path = changed(tmp_path / 'x.dcm', pixels=pixels, PhotometricInterpretation=kind,
                   PixelPaddingValue=('SS', -2000), PixelPaddingRangeLimit=('SS', -1985))
    image = decode(path)
    np.testing.assert_array_equal(image.values[0], expected)
    assert image.white_is_low == (kind == 'MONOCHROME1')


def test_8_bits_and_less(tmp_path):
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    bits = dict(BitsAllocated=8, PixelRepresentation=0)
    for kind, expected in (('MONOCHROME2', pixels), ('MONOCHROME1', 255 - pixels)):
        path = changed(tmp_path / 'x.dcm', pixels=pixels, **bits, BitsStored=8, HighBit=7,
                       PhotometricInterpretation=kind)
        np.testing.assert_array_equal(decode(path, 1), expected)
    image = decode(changed(tmp_path / 'x.dcm', pixels=pixels, **bits, BitsStored=4, HighBit=3))
    assert isinstance(image, ArrayImage)
    np.testing.assert_array_equal(image.values[0], pixels)


@pytest.mark.parametrize('name, message', [
    ('SC_rgb_rle_2frame', '2 frames: save each as a separate file'),
    ('MR_small_jpeg_ls_lossless', 'no decoder for JPEG-LS .*: pip install pylibjpeg'),
    ('JPGExtended', r'no decoder for JPEG Extended .*: pip install .*12-bit precision'),
    ('test-SR', 'it holds no image'), ('MR_truncated', 'number of bytes of pixel data is less'),
    ('no_meta', 'missing DICOM File Meta Information')])
def test_refused_in_one_line(name, message):
    if 'decoder' in message and any(sys.modules.get(name) for name in ('openjpeg', 'libjpeg')):
        pytest.skip('a decoder is installed')
    with pytest.raises(DataError, match=message) as caught:
        decode(FILES / f'{name}.dcm')
    assert '\n' not in str(caught.value) and len(str(caught.value)) < 500


def test_other_interpretations_and_sizes_are_refused(tmp_path):
    path = changed(tmp_path / 'x.dcm', 'SC_rgb_small_odd.dcm',
                   PhotometricInterpretation='YBR_PARTIAL_420')  # pydicom leaves it as it is
    with pytest.raises(DataError, match='interpretation is YBR_PARTIAL_420: save it as RGB'):
        decode(path)
    path = changed(tmp_path / 'x.dcm', Rows=8001, Columns=8000)
    with pytest.raises(DataError, match='8000 x 8001 pixels, and at most 64 million'):
        decode(path)


def write_scans(root):
    """Two classes of 12 bits: a spot on the left or on the right; half of them are MONOCHROME1."""
    rng = np.random.RandomState(0)
    for folder, count in (('train/left', 8), ('train/right', 8), ('val/left', 2),
                          ('val/right', 2)):
        (root / folder).mkdir(parents=True)
        for i in range(count):
            scan = rng.randint(0, 1000, (20, 24)).astype(np.uint16)
            scan[6:14, 4:10] += 3000 * ('left' in folder)
            scan[6:14, 14:20] += 3000 * ('right' in folder)
            scan[0, :2] = 0, 4095
            dark = i % 2 == 1
            changed(root / folder / f'{i}.dcm', pixels=4095 - scan if dark else scan,
                    BitsStored=12, HighBit=11, PixelRepresentation=0,
                    PhotometricInterpretation='MONOCHROME1' if dark else 'MONOCHROME2')
    return root


def test_a_run_on_dicom_images(tmp_path, capsys):
    root, run = write_scans(tmp_path / 'scans'), tmp_path / 'run'
    train.main(['--dataset', 'folder', '--data', str(root), '--in-channels', '1', *SMALL,
                '--no-augment', '--epochs', '8', '--save', str(run)])
    assert 'values from 0 to 4095' in capsys.readouterr().out
    assert min(float(row['error']) for row in read_csv(run / 'test.csv')) == 0
    _, dataset = predict.load_model(predict.make_parser().parse_args(
        ['x', '--checkpoint', str(run / 'best.pth')]))
    light = decode(root / 'val/left/0.dcm', 1).values
    changed(root / 'val/left/2.dcm', pixels=4095 - light[0], BitsStored=12, HighBit=11,
            PixelRepresentation=0, PhotometricInterpretation='MONOCHROME1')
    torch.testing.assert_close(*(image_files.read_image(root / f'val/left/{name}.dcm', dataset)
                                 for name in (0, 2)))
    predict.main([str(root / 'val'), '--checkpoint', str(run / 'best.pth'), '--device', 'cpu',
                  '--heatmap-dir', str(tmp_path / 'maps'), '--csv', str(tmp_path / 'x.csv')])
    found = read_csv(tmp_path / 'x.csv')
    assert len(found) == 2 * 5
    for row in found[::2]:
        assert Path(row['file']).parent.name == row['class']
    assert (tmp_path / 'maps/left/0.dcm.heatmap.png').exists()


def test_without_pydicom(tmp_path, monkeypatch, capsys):
    for folder in ('train/a', 'train/b', 'val/a'):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(3):
            shutil.copy(CR, tmp_path / folder / f'{i}.dcm')
    for name in [name for name in sys.modules if name.split('.')[0] == 'pydicom']:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, 'pydicom', None)
    said = fails(capsys, '--dataset', 'folder', '--data', tmp_path, *SMALL, '--save',
                 tmp_path / 'run')
    assert re.search(r'0.dcm: DICOM images need pydicom, .*: pip install pydicom$', said)
    assert said.count('pydicom,') == 1
