"""One image file as its exact pixels, or refused in one line that says what to do.

    image = decode('photo.jpg')      # 8 bits: a PIL image of mode RGB
    levels = decode('scan.png')      # more bits: Levels, with an array [C, H, W]
    levels = decode('field.tif', 5)  # neither 1 nor 3 channels: Levels, too

Pillow reads the files. Where it would change or drop values without a word (it cuts 16-bit colours
to 8 bits, stretches 12-bit grey to 16, lets unsigned 32 bits overflow, ignores further bands and
pages), this undoes it or refuses the file. NumPy reads .npy, pydicom DICOM, and tifffile TIFF of
neither 1 nor 3 channels.
"""

import dataclasses
import os
import re
import sys
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from training.console import DataError

MAX_PIXELS = 64_000_000  # an image of so many takes up to 1 GB to read
MAX_PIXELS_JPEG2000 = 48_000_000  # OpenJPEG takes 4 bytes a value
MAX_BYTES = 6 * MAX_PIXELS  # of an array: MAX_PIXELS in three channels of 16 bits
STRIP = 256              # rows that are converted at a time, to save memory
LUMA = 0.299, 0.587, 0.114  # shares of red, green and blue in grey, as in Pillow
REDUCED, ALPHA = 1, (1, 2, 999)  # TIFF: NewSubfileType of thumbnails; ExtraSamples that are alpha
# TIFF tags.
SUBFILE_TYPE, BITS, PHOTOMETRIC, SAMPLES = 254, 258, 262, 277
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, SIGNED = 0, 1, 2, 2
# DICOM's photometric interpretations. pydicom converts YBR to RGB.
DICOM_GREY = 'MONOCHROME1', 'MONOCHROME2'
DICOM_COLOURS = 'RGB', 'PALETTE COLOR', 'YBR_FULL', 'YBR_FULL_422', 'YBR_ICT', 'YBR_RCT'

# Many cameras write truncated EXIF data; the pixels are complete.
warnings.filterwarnings('ignore', 'Corrupt EXIF data', UserWarning)
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # MAX_PIXELS is less
warnings.filterwarnings('ignore', module='pydicom')  # of values that don't follow the standard


class SetupError(DataError):
    """What concerns all images alike: a package is not installed, or --in-channels is wrong."""


@dataclass(frozen=True)
class Levels:
    """An image of more than 8 bits, or of neither 1 nor 3 channels.

    Its levels from `low` to `high` are scaled to 0..1, or to 1..0 if `white_is_low`. `decode` sets
    low=0 and high=255 for 8 bits, and None for more.

    It is scaled a channel at a time, within the transform that makes it small: all of it as floats
    would be 768 MB for 64 megapixels.
    """

    values: np.ndarray  # [C, H, W], integers or floats
    low: float = None
    high: float = None
    channels: int = None  # of the result: C, or 1 or 3 if C is 1 or 3
    white_is_low: bool = False

    @property
    def size(self):
        """(width, height), as PIL has it."""
        return self.values.shape[:0:-1]

    def crop(self, box):
        left, top, right, bottom = box
        return dataclasses.replace(self, values=self.values[:, top:bottom, left:right])

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
            if self.white_is_low:
                np.subtract(1, scaled, out=scaled)
            torch.set_rng_state(state)
            results.append(transform(torch.from_numpy(scaled)[None]))
        image = torch.cat(results)
        if self.channels < len(image):
            return torch.einsum('c,chw->hw', torch.tensor(LUMA), image)[None]
        return image.expand(self.channels, -1, -1)


def decode(path, channels=3):
    """An image file for a network of that many channels.

    For 1 and 3 channels, an image of 8 bits is a PIL image of mode L or RGB without alpha. Images
    of more bits, and of another number of channels, are `Levels`.

    Raises:
        DataError: no image, a broken one, too large a one, several pages, or values that would not
            be read exactly.
        SetupError: an optional package is needed, or the image has other channels.
    """
    suffix, white_is_low = os.path.splitext(path)[1].lower(), False
    try:
        if suffix == '.npy':
            values = read_npy(path, channels)
        elif suffix in ('.dcm', '.dicom'):
            values, white_is_low = read_dicom(path)
        elif suffix in ('.tif', '.tiff') and channels not in (1, 3):
            values = read_tiff(path, channels)
        else:
            with Image.open(path) as image:
                if channels not in (1, 3):
                    values = read_bands(image, path, channels)
                else:
                    refuse_what_would_be_lost(image)
                    values = read_levels(image, path)
                    if values is None:
                        return convert(image, 'RGB' if channels == 3 else 'L')
                    if values.ndim == 3:
                        values = values.transpose(1, 2, 0)
        image = make_image(values, channels, white_is_low)
    except SetupError as error:
        raise SetupError(f'{path}: {error}') from None
    except Exception as error:  # the libraries raise anything for a broken file
        error = ' '.join(str(error).split()) or type(error).__name__
        if error.startswith('cannot identify image file'):  # the rest is the path again
            error = 'broken, or of a kind that Pillow does not know: save it as PNG'
        raise DataError(f'{path}: cannot be read as an image ({error})') from None
    return image


def make_image(values, channels, white_is_low=False):
    """What `decode` returns for an array [H, W] or [H, W, C]."""
    values = values[:, :, 0] if values.shape[2:] == (1,) else values
    found = 1 if values.ndim == 2 else values.shape[2]
    if found != channels and {found, channels} != {1, 3}:
        raise SetupError(f'it has {found} channels, and --in-channels is {channels}')
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        raise ValueError('it has values that are not finite')
    if values.dtype != np.uint8:
        limits = {}
    elif channels in (1, 3):
        return convert(Image.fromarray(values), 'RGB' if channels == 3 else 'L')
    else:
        limits = dict(low=0, high=255)
    bands = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return Levels(np.ascontiguousarray(bands), white_is_low=white_is_low, **limits)


def needs_range(image):
    """Whether an image of `decode` has more than 8 bits, so that someone must say its range."""
    return isinstance(image, Levels) and image.high is None


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


def refuse_large(width, height, limit=MAX_PIXELS):
    if width * height > limit:
        raise ValueError(f'it has {width} x {height} pixels, and at most {limit // 10**6} '
                         f'million can be read: make it smaller, or cut it into tiles')


def refuse_large_array(array):
    if array.nbytes > MAX_BYTES:
        raise ValueError(f'it takes {array.nbytes / 1e6:.0f} MB, and at most {MAX_BYTES // 10**6} '
                         f'can be read: make it smaller, or cut it into tiles')


def refuse_what_would_be_lost(image):
    """Raises ValueError for too many pixels, several pages, or bands that Pillow drops."""
    refuse_large(*image.size,
                 MAX_PIXELS_JPEG2000 if image.format == 'JPEG2000' else MAX_PIXELS)
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


def colours_of_16_bits(path, bands=3):
    """uint16 [bands, H, W] of a PNG or TIFF; 4 bands: with alpha.

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
                levels = np.zeros((bands, height, width), np.uint16)
            for top in range(0, height, STRIP):
                bottom = min(top + STRIP, height)
                strip = np.asarray(image.crop((0, top, width, bottom)))[:, :, :bands]
                levels[:, top:bottom] |= strip.transpose(2, 0, 1).astype(np.uint16) << shift
    return levels


def with_rawmode(tile, rawmode):
    """An entry of PIL's `image.tile` with another unpacker."""
    args = rawmode if isinstance(tile[3], str) else (rawmode, *tile[3][1:])
    return getattr(type(tile), '_make', tuple)([*tile[:3], args])  # a plain tuple before Pillow 11


# ---- any number of channels ------------------------------------------------------------------

def read_bands(image, path, channels):
    """[H, W, C] of an opened image whose alpha is one of the channels."""
    refuse_what_would_be_lost(image)
    if image.format == 'PNG' and image.tile[0][3] == 'RGBA;16B':
        return colours_of_16_bits(path, 4).transpose(1, 2, 0)
    if image.mode not in ('LA', 'RGBA'):
        raise SetupError(f'its mode is {image.mode}, and --in-channels is {channels}: save them as '
                         f'TIFF or .npy, or if they are 4 as RGBA')
    if read_levels(image, path) is not None:
        raise ValueError('it has more than 8 bits: save it as TIFF or .npy')
    return np.asarray(image)  # not through Pillow's transforms, which multiply by alpha


def read_npy(path, channels):
    """An array [H, W] or [H, W, C] from a file of NumPy."""
    values = np.load(path, mmap_mode='r', allow_pickle=False)  # reads the header alone
    if values.dtype.kind not in 'uif':
        raise ValueError(f'it holds {values.dtype}: save integers or floats')
    if values.ndim == 3 and values.shape[2] != channels and values.shape[0] in (1, channels):
        raise SetupError(f'its shape is {[*values.shape]}, with the channels first: save it as '
                         f'[H, W, C], which np.moveaxis(array, 0, -1) gives')
    if values.ndim not in (2, 3):
        raise ValueError(f'its shape is {[*values.shape]}: it must be [H, W] or [H, W, C]')
    refuse_large_array(values)
    return np.array(values)


def read_tiff(path, channels):
    """[H, W] or [H, W, C] of a TIFF of any number of bands; pages of one band are bands, too."""
    try:
        import tifffile
    except ImportError:
        raise SetupError(f'TIFF of {channels} channels needs tifffile: pip install tifffile'
                         ) from None
    with tifffile.TiffFile(path) as file:
        if len(file.series) != 1:
            raise ValueError(f'it holds {len(file.series)} images: save each as a file of its own')
        series, photometric = file.series[0], file.pages[0].photometric
        if photometric not in (BLACK_IS_ZERO, RGB):
            raise ValueError(f'its photometric interpretation is {photometric.name}: save it with '
                             f'black as zero')
        refuse_large_array(series)
        try:
            values = series.asarray()
        except ValueError as error:  # a compression
            more = ': pip install imagecodecs' if 'imagecodecs' in str(error) else ''
            raise ValueError(f'{error}{more}') from None
    if values.dtype.kind not in 'uif':
        raise ValueError(f'it holds {values.dtype}: save integers or floats')
    if values.ndim not in (2, 3):
        raise ValueError(f'its axes are {series.axes} of {[*values.shape]}: save one image')
    if values.ndim == 2 or series.axes[2] == 'S':
        return values
    # tifffile.imwrite writes an array [H, W, C] of more than 4 channels as H pages.
    is_last = series.axes[0] == 'Q' and values.shape[0] != channels == values.shape[2]
    return values if is_last else np.moveaxis(values, 0, -1)


# ---- DICOM -----------------------------------------------------------------------------------

def read_dicom(path):
    """Pixels of a DICOM file: [H, W] in the units of the modality LUT, or colours [H, W, 3].

    Padding becomes black. The window that the file suggests (VOI LUT) is not applied.

    Returns:
        The array, and whether low values are white (MONOCHROME1). Then they are inverted after the
        value range is applied (DICOM PS3.3, C.7.6.3.1.2), so that it is in the file's units.
    """
    try:
        from pydicom import dcmread
        from pydicom.pixels import apply_color_lut
    except ImportError:
        raise SetupError('DICOM images need pydicom, version 3 or newer: pip install pydicom'
                         ) from None
    data = dcmread(path)
    kind, frames = data.get('PhotometricInterpretation'), int(data.get('NumberOfFrames') or 1)
    if 'Rows' not in data:
        raise ValueError('it holds no image')
    if frames > 1:
        raise ValueError(f'it has {frames} frames: save each as a file of its own')
    if kind not in DICOM_GREY + DICOM_COLOURS:
        raise ValueError(f'its photometric interpretation is {kind}: save it as RGB')
    refuse_large(data.Columns, data.Rows)
    try:
        stored = data.pixel_array
    except RuntimeError as error:
        failed = 'exceptions were raised' in str(error)
        reason = f'; {str(error).splitlines()[-1].strip()}' if failed else ''
        raise ValueError(f'no decoder for {data.file_meta.TransferSyntaxUID.name}: pip install '
                         f'pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg{reason}') from None
    if kind in DICOM_COLOURS:
        return apply_color_lut(stored, data) if kind == 'PALETTE COLOR' else stored, False
    white_is_low = kind == 'MONOCHROME1'
    values = modality_values(stored, data)
    padding = data.get('PixelPaddingValue')
    if padding is not None:
        low, high = sorted((padding, data.get('PixelPaddingRangeLimit', padding)))
        padded = (stored >= low) & (stored <= high)
        if not padded.all():
            values[padded] = (np.max if white_is_low else np.min)(values[~padded])
    if values.dtype != np.uint8:
        return values, white_is_low
    if data.BitsStored < 8:  # not 0..255
        return values.astype(np.uint16), white_is_low
    return 255 - values if white_is_low else values, False


def modality_values(stored, data):
    """Stored values after the modality LUT: integers if slope and intercept are whole numbers.

    They have 32 bits if 16 are stored, to save memory.
    """
    from pydicom.pixels import apply_modality_lut

    if 'ModalityLUTSequence' in data:
        return apply_modality_lut(stored, data)
    slope, intercept = rescaling(data)
    if (slope, intercept) == (1, 0):
        return np.array(stored)
    is_whole = (slope.is_integer() and intercept.is_integer()
                and abs(slope) <= 2**14 and abs(intercept) <= 2**30)  # no overflow
    if is_whole:
        slope, intercept = int(slope), int(intercept)
    values = stored.astype(f'{"i" if is_whole else "f"}{4 if stored.itemsize <= 2 else 8}')
    values *= slope
    values += intercept
    return values


def rescaling(data):
    """RescaleSlope and RescaleIntercept.

    Enhanced CT and MR have them in functional groups, which pydicom's apply_modality_lut ignores.
    """
    items = [item for groups in ('PerFrameFunctionalGroupsSequence',
                                 'SharedFunctionalGroupsSequence')
             for group in data.get(groups) or ()
             for item in group.get('PixelValueTransformationSequence') or ()]
    item = (*items, data)[0]
    return float(item.get('RescaleSlope', 1)), float(item.get('RescaleIntercept', 0))
