"""One image file as its exact pixels, or refused in one line that says what to do.

    image = decode('photo.jpg')      # 8 bits: a PIL image of mode RGB
    levels = decode('scan.png')      # more bits: Levels, with an array [C, H, W]

Pillow reads the files. Where it would change or drop values without a word (it cuts 16-bit colours
to 8 bits, stretches 12-bit grey to 16, lets unsigned 32 bits overflow, ignores further bands and
pages), this undoes it or refuses the file.
"""

import re
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from training.datasets import DataError

MAX_PIXELS = 64_000_000  # an image of so many takes up to 1 GB to read
MAX_PIXELS_JPEG2000 = 48_000_000  # OpenJPEG takes 4 bytes a value
STRIP = 256              # rows that are converted at a time, to save memory
LUMA = 0.299, 0.587, 0.114  # shares of red, green and blue in grey, as in Pillow
REDUCED, ALPHA = 1, (1, 2, 999)  # TIFF: NewSubfileType of thumbnails; ExtraSamples that are alpha
# TIFF tags.
SUBFILE_TYPE, BITS, PHOTOMETRIC, SAMPLES = 254, 258, 262, 277
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
WHITE_IS_ZERO, SIGNED = 0, 2

# Many cameras write truncated EXIF data; the pixels are complete.
warnings.filterwarnings('ignore', 'Corrupt EXIF data', UserWarning)
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # MAX_PIXELS is less


@dataclass(frozen=True)
class Levels:
    """An image of more than 8 bits, whose levels from `low` to `high` are scaled to 0..1.

    It is scaled a channel at a time, within the transform that makes it small: all of it as floats
    would be 768 MB for 64 megapixels.
    """

    values: np.ndarray  # [C, H, W], integers or floats; C is 1 or 3
    low: float = None
    high: float = None
    channels: int = None  # of the result: 1 or 3

    @property
    def size(self):
        """(width, height), as PIL has it."""
        return self.values.shape[:0:-1]

    def crop(self, box):
        left, top, right, bottom = box
        return Levels(self.values[:, top:bottom, left:right], self.low, self.high, self.channels)

    def map(self, transform):
        """`transform` of each channel, float32 [1, H, W] of 0..1: float32 [channels, h, w].

        All channels get the same random numbers.
        """
        state, results = torch.get_rng_state(), []
        for channel in self.values:
            scaled = np.empty(channel.shape, np.float32)
            for top in range(0, len(channel), STRIP):
                strip = channel[top:top + STRIP].astype(np.float64)
                scaled[top:top + STRIP] = ((strip - self.low) / (self.high - self.low)).clip(0, 1)
            torch.set_rng_state(state)
            results.append(transform(torch.from_numpy(scaled)[None]))
        image = torch.cat(results)
        if self.channels < len(image):
            return torch.einsum('c,chw->hw', torch.tensor(LUMA), image)[None]
        return image.expand(self.channels, -1, -1)


def decode(path, mode='RGB'):
    """An image file as a PIL image of that mode (RGB, L), or `Levels` if it has more than 8 bits.

    An alpha channel is dropped.

    Raises:
        DataError: no image, a broken one, more than `MAX_PIXELS`, several pages, bands that are
            neither grey, colours nor alpha, or values that would not be read exactly.
    """
    try:
        with Image.open(path) as image:
            refuse_what_would_be_lost(image)
            values = read_levels(image, path)
            if values is None:
                return convert(image, mode)
    except Exception as error:  # PIL raises anything for a broken file
        error = str(error) or type(error).__name__
        if error.startswith('cannot identify image file'):  # the rest is the path again
            error = 'broken, or of a kind that Pillow does not know: save it as PNG'
        raise DataError(f'{path}: cannot be read as an image ({error})') from None
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        raise DataError(f'{path} has values that are not finite')
    return Levels(values if values.ndim == 3 else values[None])


def convert(image, mode):
    """An image of 8 bits in that mode, loaded."""
    if image.mode == mode:
        image.load()
        return image
    if image.mode == 'LAB':  # has no way to grey but through colours
        image = image.convert('RGB')
    elif image.mode == 'La':  # grey multiplied by alpha
        image = image.convert('LA')
    elif 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert(mode)


def refuse_what_would_be_lost(image):
    """Raises ValueError for too many pixels, several pages, or bands that Pillow drops."""
    width, height = image.size
    limit = MAX_PIXELS_JPEG2000 if image.format == 'JPEG2000' else MAX_PIXELS
    if width * height > limit:
        raise ValueError(f'it has {width} x {height} pixels, and at most {limit // 10**6} '
                         f'million can be read: make it smaller, or cut it into tiles')
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
        raise ValueError(f'it has {pages} pages: save each as a file of its own')
    bands = image.tag_v2.get(SAMPLES, 1)
    unnamed = image.mode == 'RGBA' and EXTRA_SAMPLES not in image.tag_v2
    if bands > len(image.getbands()) or unnamed:
        raise ValueError(f'it has {bands} bands, more than grey or colours and alpha: save it '
                         f'without the others')


def read_levels(image, path):
    """The pixels of an opened image of more than 8 bits as an array, or None if it has 8.

    [H, W] if grey, uint16 [3, H, W] of colours. Raises ValueError for what can't be read exactly.
    """
    if image.format == 'TIFF':
        return levels_of_tiff(image, path)
    if image.format == 'PNG':
        return levels_of_png(image, path)
    if image.format == 'JPEG2000':
        return levels_of_jpeg2000(image, path)
    if image.format == 'PPM':
        return levels_of_ppm(image)
    if image.format == 'AVIF':
        refuse_deep_avif(path)
    return np.asarray(image) if image.mode.startswith(('I', 'F')) else None


def levels_of_png(image, path):
    rawmode = image.tile[0][3]
    if rawmode == 'LA;16B':  # read as 4 x 8 bits: upper and lower byte of grey, and of alpha
        image.tile = [with_rawmode(tile, 'RGBA') for tile in image.tile]
        upper, lower = (np.asarray(image.getchannel(i), np.uint16) for i in range(2))
        return (upper << 8) | lower
    if rawmode in ('RGB;16B', 'RGBA;16B'):
        return colours_of_16_bits(path)
    return np.asarray(image) if image.mode.startswith('I') else None


def levels_of_ppm(image):
    codec, extents, offset, args = image.tile[0]
    maximum = args[-1] if codec in ('ppm', 'ppm_plain') else 255
    if maximum > 255 and image.mode != 'I':
        raise ValueError('its colours have more than 8 bits: save it as PNG')
    if not image.mode.startswith(('I', 'F')):
        return None
    if codec == 'ppm_plain':  # stretched to 65535
        return np.rint(np.asarray(image) / 65535 * maximum).astype(np.uint16)
    if codec == 'ppm':  # not stretched, and much faster
        image.tile = [('raw', extents, offset, 'I;16B')]
    return np.asarray(image)


def levels_of_tiff(image, path):
    rawmode = image.tile[0][3][0]
    bits = max(image.tag_v2.get(BITS, (1,)))
    is_signed = SIGNED in image.tag_v2.get(SAMPLE_FORMAT, ())
    if bits > 8 and image.mode in ('RGB', 'RGBA') and re.fullmatch(r'RGB[AX]?;16[BLN]', rawmode):
        return colours_of_16_bits(path)
    if bits > 8 and not image.mode.startswith(('I', 'F')):
        raise ValueError(f'it has {bits} bits a channel in a layout of which Pillow reads 8: save '
                         f'it as PNG')
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


def levels_of_jpeg2000(image, path):
    with open(path, 'rb') as file:
        content = file.read()
    # The codestream begins with the markers SOC and SIZ; byte 42 is sign and precision.
    kind = content[content.index(b'\xff\x4f\xff\x51') + 42]
    is_signed, bits = kind >> 7, (kind & 0x7f) + 1
    if bits <= 8 and not is_signed:
        return None
    if is_signed or image.mode != 'I;16':
        raise ValueError(f'it is a JPEG 2000 of {bits} bits, in colour or signed: save it as PNG')
    return np.asarray(image) >> (16 - bits)  # Pillow shifts them up


def refuse_deep_avif(path):
    """Raises ValueError for an AVIF of 10 or 12 bits, which Pillow cuts to 8.

    The av1C box (AV1-ISOBMFF, section 2.3.3) begins with marker and version, then profile and
    level; the bits after the tier are high_bitdepth and twelve_bit.
    """
    with open(path, 'rb') as file:
        found = re.findall(rb'av1C\x81.(.)', file.read(), re.DOTALL)
    depths = {0x40: 10, 0x60: 12}
    bits = max((depths.get(kind[0] & 0x60, 8) for kind in found), default=8)
    if bits > 8:
        raise ValueError(f'it is an AVIF of {bits} bits, of which Pillow reads 8: save it as PNG')


def colours_of_16_bits(path):
    """uint16 [3, H, W] of a PNG or TIFF.

    Pillow's unpackers RGB;16B and RGB;16L take the upper byte of a big- or little-endian value. So
    the wrong one of them gives the lower byte.
    """
    swapped = {'B': 'L', 'L': 'B', 'N': 'B' if sys.byteorder == 'little' else 'L'}
    levels = None
    for shift in (8, 0):
        with Image.open(path) as image:
            if shift == 0:
                rawmode = image.tile[0][3]
                rawmode = rawmode if isinstance(rawmode, str) else rawmode[0]
                rawmode = rawmode[:-1] + swapped[rawmode[-1]]
                image.tile = [with_rawmode(tile, rawmode) for tile in image.tile]
            image.load()
            width, height = image.size
            if levels is None:
                levels = np.zeros((3, height, width), np.uint16)
            for top in range(0, height, STRIP):
                bottom = min(top + STRIP, height)
                strip = np.asarray(image.crop((0, top, width, bottom)))[:, :, :3]
                levels[:, top:bottom] |= strip.transpose(2, 0, 1).astype(np.uint16) << shift
    return levels


def with_rawmode(tile, rawmode):
    """An entry of PIL's `image.tile` with another unpacker."""
    args = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
    return getattr(type(tile), '_make', tuple)([*tile[:3], args])  # a plain tuple before Pillow 11
