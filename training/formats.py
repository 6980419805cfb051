"""The pixels of an image file as a NumPy array, exactly as stored, for each file format.

    with Image.open('scan.png') as image:
        pixels = read_high_depth(image, 'scan.png')   # None: 8 bits, which Pillow reads correctly
    pixels = read_npy('field.npy', channels=5)        # [H, W, 5]

Pillow silently truncates 16-bit colours to 8 bits, rescales 12-bit grey to 16, overflows unsigned
32 bits, and ignores extra bands and pages. The functions here work around this, or raise a
ValueError that says how to save the file.
"""

import re
import sys

import numpy as np
from PIL import Image

from training.console import DataError

MAX_PIXELS = 64_000_000  # reading an image of this size takes up to 1 GB
MAX_PIXELS_JPEG2000 = 48_000_000  # OpenJPEG uses 4 bytes per value
MAX_BYTES = 6 * MAX_PIXELS  # of an array: MAX_PIXELS in three channels of 16 bits
STRIP = 256              # rows that are converted at a time, to save memory
REDUCED = 1  # TIFF's NewSubfileType of thumbnails
# TIFF tags.
SUBFILE_TYPE, BITS, PHOTOMETRIC, SAMPLES = 254, 258, 262, 277
ORIENTATION, EXTRA_SAMPLES, SAMPLE_FORMAT = 274, 338, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, SIGNED = 0, 1, 2, 2


class SetupError(DataError):
    """An error that affects all images: a package is not installed, or --in-channels is wrong."""


def check_size(width, height, limit=MAX_PIXELS):
    if width * height > limit:
        raise ValueError(f'it has {width} x {height} pixels, and at most {limit // 10**6} '
                         f'million can be read: make it smaller, or cut it into tiles')


def check_array_size(array):
    if array.nbytes > MAX_BYTES:
        raise ValueError(f'it takes {array.nbytes / 1e6:.0f} MB, and at most {MAX_BYTES // 10**6} '
                         f'can be read: make it smaller, or cut it into tiles')


def check_contents(image):
    """Raises ValueError if there are too many pixels, several pages, or bands that Pillow drops."""
    check_size(*image.size, MAX_PIXELS_JPEG2000 if image.format == 'JPEG2000' else MAX_PIXELS)
    if image.format != 'TIFF':
        if getattr(image, 'is_animated', False) and image.format != 'MPO':  # MPO: photo, preview
            raise ValueError(f'it is an animation of {image.n_frames} images: save one of them')
        return
    pages = 0
    for page in range(image.n_frames):
        image.seek(page)
        pages += not image.tag_v2.get(SUBFILE_TYPE, 0) & REDUCED
    image.seek(0)
    if pages > 1:
        raise ValueError(f'it has {pages} pages: save each as a separate file')
    bands = image.tag_v2.get(SAMPLES, 1)
    undeclared = image.mode == 'RGBA' and EXTRA_SAMPLES not in image.tag_v2
    if bands > len(image.getbands()) or undeclared:
        raise ValueError(f'it has {bands} bands, more than grey or colours and alpha: save it '
                         f'without the others')


def orientation(image):
    """The EXIF orientation of a loaded image, 1 (upright) to 8."""
    try:
        # Pillow turns TIFFs itself.
        found = 1 if image.format == 'TIFF' else image.getexif().get(ORIENTATION)
    except Exception:  # of any class, for damaged EXIF data; the pixels are complete
        found = 1
    return found if found in range(1, 9) else 1


def turn(values, orientation):
    """Pixels [H, W, ...] of an EXIF or TIFF orientation, 1 to 8, turned upright."""
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    return values[:, ::-1] if orientation in (2, 3, 6, 7) else values


def read_high_depth(image, path):
    """The pixels of an opened image of more than 8 bits: grey [H, W] or colours uint16 [3, H, W].

    None if it has 8 bits. Raises ValueError if it can't be read exactly.
    """
    if image.format == 'TIFF':
        return _read_tiff(image, path)
    if image.format == 'PNG':
        return _read_png(image, path)
    if image.format == 'JPEG2000':
        return _read_jpeg2000(image, path)
    if image.format == 'PPM':
        return _read_ppm(image)
    if image.format == 'AVIF':
        check_avif_depth(path)
    return np.asarray(image) if image.mode.startswith(('I', 'F')) else None


def _read_png(image, path):
    rawmode = image.tile[0][3]
    if rawmode == 'LA;16B':  # read as 4 x 8 bits: upper and lower byte of grey, then of alpha
        image.tile = [_with_rawmode(tile, 'RGBA') for tile in image.tile]
        upper, lower = (np.asarray(image.getchannel(i), np.uint16) for i in range(2))
        return (upper << 8) | lower
    if rawmode in ('RGB;16B', 'RGBA;16B'):
        return _read_16_bit_colours(path)
    return np.asarray(image) if image.mode.startswith('I') else None


def _read_ppm(image):
    codec, extents, offset, args = image.tile[0]
    maximum = args[-1] if codec in ('ppm', 'ppm_plain') else 255
    if maximum > 255 and image.mode != 'I':
        raise ValueError('its colours have more than 8 bits: save it as PNG')
    if not image.mode.startswith(('I', 'F')):
        return None
    if codec == 'ppm_plain':  # Pillow rescales to 65535
        return np.rint(np.asarray(image) / 65535 * maximum).astype(np.uint16)
    if codec == 'ppm':  # not rescaled, and much faster
        image.tile = [('raw', extents, offset, 'I;16B')]
    return np.asarray(image)


def _read_tiff(image, path):
    rawmode = image.tile[0][3][0]
    bits = max(image.tag_v2.get(BITS, (1,)))
    is_signed = SIGNED in image.tag_v2.get(SAMPLE_FORMAT, ())
    if bits > 8 and image.mode in ('RGB', 'RGBA') and re.fullmatch(r'RGB[AX]?;16[BLN]', rawmode):
        return _read_16_bit_colours(path)
    if bits > 8 and not image.mode.startswith(('I', 'F')):
        raise ValueError(f'it has {bits} bits a channel, in a layout that Pillow cuts to 8: '
                         f'save it as PNG')
    if bits <= 8:
        return np.asarray(image).view(np.int8) if is_signed else None
    values = np.asarray(image)
    if image.mode == 'I' and bits == 32 and not is_signed:
        values = values.view(np.uint32)
    if image.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        if values.dtype.kind == 'f':
            raise ValueError('its floats have white as zero: save it with black as zero')
        values = (2**bits - 1) - values
    return values


def _read_jpeg2000(image, path):
    with open(path, 'rb') as file:
        content = file.read()
    # The codestream begins with the markers SOC and SIZ; byte 42 is sign and precision.
    kind = content[content.index(b'\xff\x4f\xff\x51') + 42]
    is_signed, bits = kind >> 7, (kind & 0x7f) + 1
    if bits <= 8 and not is_signed:
        return None
    if is_signed or image.mode != 'I;16':
        raise ValueError(f'it is a JPEG 2000 of {bits} bits, in colour or signed: save it as PNG')
    return np.asarray(image) >> (16 - bits)  # Pillow shifts the bits up


def check_avif_depth(path):
    """Raises ValueError for an AVIF of 10 or 12 bits, which Pillow cuts to 8.

    The av1C box (AV1-ISOBMFF, section 2.3.3) begins with marker and version, then profile and
    level; the bits after the tier are high_bitdepth and twelve_bit.
    """
    with open(path, 'rb') as file:
        found = re.findall(rb'av1C\x81.(.)', file.read(), re.DOTALL)
    depths = {0x40: 10, 0x60: 12}
    bits = max((depths.get(kind[0] & 0x60, 8) for kind in found), default=8)
    if bits > 8:
        raise ValueError(f'it is an AVIF of {bits} bits, which Pillow cuts to 8: save it as PNG')


def _read_16_bit_colours(path, bands=3):
    """uint16 [bands, H, W] of a PNG or TIFF; 4 bands: with alpha.

    Pillow's unpackers RGB;16B and RGB;16L return the upper byte of a big- or little-endian value.
    With the wrong one of the two, it returns the lower byte.
    """
    swapped = {'B': 'L', 'L': 'B', 'N': 'B' if sys.byteorder == 'little' else 'L'}
    pixels = None
    for shift in (8, 0):
        with Image.open(path) as image:
            if shift == 0:
                rawmode = image.tile[0][3]
                rawmode = rawmode if isinstance(rawmode, str) else rawmode[0]
                rawmode = rawmode[:-1] + swapped[rawmode[-1]]
                image.tile = [_with_rawmode(tile, rawmode) for tile in image.tile]
            image.load()
            width, height = image.size
            if pixels is None:
                pixels = np.zeros((bands, height, width), np.uint16)
            for top in range(0, height, STRIP):
                bottom = min(top + STRIP, height)
                strip = np.asarray(image.crop((0, top, width, bottom)))[:, :, :bands]
                pixels[:, top:bottom] |= strip.transpose(2, 0, 1).astype(np.uint16) << shift
    return pixels


def _with_rawmode(tile, rawmode):
    """An entry of Pillow's `image.tile` with another unpacker."""
    args = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
    return getattr(type(tile), '_make', tuple)([*tile[:3], args])  # Pillow < 11: a plain tuple


# ---- any number of channels ------------------------------------------------------------------

def read_bands(image, path, channels):
    """[H, W, C] of an opened image, with alpha as one of the channels."""
    check_contents(image)
    if image.format == 'PNG' and image.tile[0][3] == 'RGBA;16B':
        return _read_16_bit_colours(path, 4).transpose(1, 2, 0)
    if image.mode not in ('LA', 'RGBA'):
        raise SetupError(f'its mode is {image.mode}, and --in-channels is {channels}: save them as '
                         f'TIFF or .npy, or if they are 4 as RGBA')
    if read_high_depth(image, path) is not None:
        raise ValueError('it has more than 8 bits: save it as TIFF or .npy')
    return np.asarray(image)  # Pillow's own transforms would multiply by alpha


def read_npy(path, channels):
    """The array [H, W] or [H, W, C] in a .npy file."""
    values = np.load(path, mmap_mode='r', allow_pickle=False)  # reads only the header
    if values.dtype.kind not in 'uif':
        raise ValueError(f'it holds {values.dtype}: save integers or floats')
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] in (1, channels):
        raise SetupError(f'its shape is {[*values.shape]}, with the channels first: save it as '
                         f'[H, W, C], which np.moveaxis(array, 0, -1) gives')
    if values.ndim not in (2, 3):
        raise ValueError(f'its shape is {[*values.shape]}: it must be [H, W] or [H, W, C]')
    check_array_size(values)
    return np.array(values)


def read_tiff(path, channels):
    """[H, W] or [H, W, C] of a TIFF with any number of bands; single-band pages count as bands."""
    try:
        import tifffile
    except ImportError:
        raise SetupError(f'TIFF of {channels} channels needs tifffile: pip install tifffile'
                         ) from None
    with tifffile.TiffFile(path) as file:
        if len(file.series) != 1:
            raise ValueError(f'it holds {len(file.series)} images: save each as a separate file')
        series, photometric = file.series[0], file.pages[0].photometric
        orientation = file.pages[0].tags.valueof(ORIENTATION)
        if photometric not in (BLACK_IS_ZERO, RGB):
            raise ValueError(f'its photometric interpretation is {photometric.name}: save it with '
                             f'black as zero')
        check_array_size(series)
        try:
            values = series.asarray()
        except ValueError as error:  # unsupported compression
            more = ': pip install imagecodecs' if 'imagecodecs' in str(error) else ''
            raise ValueError(f'{error}{more}') from None
    if values.dtype.kind not in 'uif':
        raise ValueError(f'it holds {values.dtype}: save integers or floats')
    if values.ndim not in (2, 3):
        raise ValueError(f'its axes are {series.axes} of {[*values.shape]}: save one image')
    # tifffile.imwrite stores [H, W, C] with C > 4 as H pages.
    if series.axes[0] == 'Q' and values.shape[0] != channels == values.shape[2]:
        return values
    if values.ndim == 3 and series.axes[2] != 'S':
        values = np.moveaxis(values, 0, -1)
    return turn(values, orientation)
