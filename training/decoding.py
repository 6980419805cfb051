"""Decode an image file to its exact pixels, or raise a one-line error that says what to do.

    image = decode('photo.jpg')      # 8 bits: a PIL image of mode RGB
    image = decode('scan.png')       # more than 8 bits: an ArrayImage
    image = decode('field.tif', 5)   # neither 1 nor 3 channels: also an ArrayImage

Pillow reads most files. formats.py reads those of more than 8 bits, .npy, and TIFF of neither 1 nor
3 channels (tifffile); dicom.py reads DICOM (pydicom).
"""

import dataclasses
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from training import dicom, formats
from training.console import DataError
from training.formats import SetupError

LUMA = 0.299, 0.587, 0.114  # weights of red, green and blue in grey, as in Pillow

# Many cameras write truncated EXIF data; the pixels are complete.
warnings.filterwarnings('ignore', 'Corrupt EXIF data|Metadata Warning|Tag data', UserWarning)
warnings.filterwarnings('ignore', category=Image.DecompressionBombWarning)  # MAX_PIXELS is lower
warnings.filterwarnings('ignore', module='pydicom')  # about values that violate the standard


@dataclass(frozen=True)
class ArrayImage:
    """An image of more than 8 bits, or of neither 1 nor 3 channels.

    Values from `low` to `high` are scaled to 0..1, or to 1..0 if `white_is_low`. `decode` sets them
    to 0 and 255 for 8 bits, and to None for more.

    Scaling happens one channel at a time, in `map`, before the transform makes the image small: the
    whole image as float32 would be 768 MB for 64 megapixels.
    """

    values: np.ndarray  # [C, H, W], integers or floats
    low: float = None
    high: float = None
    channels: int = None  # of the result: C, or 1 or 3 if C is 1 or 3
    white_is_low: bool = False

    @property
    def size(self):
        """(width, height), as in PIL."""
        return self.values.shape[:0:-1]

    def crop(self, box):
        left, top, right, bottom = box
        return dataclasses.replace(self, values=self.values[:, top:bottom, left:right])

    def map(self, transform):
        """Apply `transform` to each channel, float32 [1, H, W] in 0..1; float32 [channels, h, w].

        All channels get the same random numbers.
        """
        state, results = torch.get_rng_state(), []
        for channel in self.values:
            scaled = np.empty(channel.shape, np.float32)
            for top in range(0, len(channel), formats.STRIP):
                strip = channel[top:top + formats.STRIP].astype(np.float64)
                scaled[top:top + formats.STRIP] = (
                    (strip - self.low) / (self.high - self.low)).clip(0, 1)
            if self.white_is_low:
                np.subtract(1, scaled, out=scaled)
            torch.set_rng_state(state)
            results.append(transform(torch.from_numpy(scaled)[None]))
        image = torch.cat(results)
        if self.channels < len(image):
            return torch.einsum('c,chw->hw', torch.tensor(LUMA), image)[None]
        return image.expand(self.channels, -1, -1)


def decode(path, channels=3):
    """Decode an image file for a network with `channels` input channels.

    Returns:
        A PIL image of mode L or RGB, without alpha, if the network has 1 or 3 channels and the
        image has 8 bits; otherwise an ArrayImage. Turned upright, as its EXIF data say.

    Raises:
        DataError: not an image, damaged, too large, several pages, or values that can't be read
            exactly.
        SetupError: an optional package is needed, or the image has other channels.
    """
    suffix, white_is_low = os.path.splitext(path)[1].lower(), False
    try:
        if suffix == '.npy':
            values = formats.read_npy(path, channels)
        elif suffix in ('.dcm', '.dicom'):
            values, white_is_low = dicom.read_dicom(path)
        elif suffix in ('.tif', '.tiff') and channels not in (1, 3):
            values = formats.read_tiff(path, channels)
        else:
            values = _read_with_pillow(path, channels)
            if isinstance(values, Image.Image):
                return values
        return make_image(values, channels, white_is_low)
    except SetupError as error:
        raise SetupError(f'{path}: {error}') from None
    except Exception as error:  # libraries raise any exception for a damaged file
        error = ' '.join(str(error).split()) or type(error).__name__
        if error.startswith('cannot identify image file'):  # followed by the path
            error = 'damaged, or in a format that Pillow does not know: save it as PNG'
        raise DataError(f'{path}: cannot be read as an image ({error})') from None


def _read_with_pillow(path, channels):
    """An 8-bit image of mode L or RGB, or an array [H, W] or [H, W, C]; upright."""
    # Pillow 11 to 13 scrambles turned grey TIFFs that it opens by their path.
    with open(path, 'rb') as file, Image.open(file) as image:
        if channels not in (1, 3):
            values = formats.read_bands(image, path, channels)
            return formats.turn(values, formats.orientation(image))
        formats.check_contents(image)
        values = formats.read_high_depth(image, path)
        if values is None:
            picture = convert(image, 'RGB' if channels == 3 else 'L')
            if formats.orientation(image) == 1:
                return picture
            values = np.asarray(picture)
        elif values.ndim == 3:
            values = values.transpose(1, 2, 0)
        return formats.turn(values, formats.orientation(image))


def make_image(values, channels, white_is_low=False):
    """The image that `decode` returns, from an array [H, W] or [H, W, C]."""
    if not values.size:
        raise ValueError('it has no pixels')
    values = values[:, :, 0] if values.shape[2:] == (1,) else values
    found = 1 if values.ndim == 2 else values.shape[2]
    if found != channels and {found, channels} != {1, 3}:
        raise SetupError(f'it has {found} channels, and --in-channels is {channels}')
    if values.dtype.kind == 'f' and not np.isfinite(values).all():
        raise ValueError('it has values that are not finite')
    if values.dtype != np.uint8:
        limits = {}
    elif channels in (1, 3):
        picture = Image.fromarray(np.ascontiguousarray(values))
        return convert(picture, 'RGB' if channels == 3 else 'L')
    else:
        limits = dict(low=0, high=255)
    bands = values[None] if values.ndim == 2 else values.transpose(2, 0, 1)
    return ArrayImage(np.ascontiguousarray(bands), white_is_low=white_is_low, **limits)


def needs_range(image):
    """True for a decoded image of more than 8 bits, whose value range has to be set."""
    return isinstance(image, ArrayImage) and image.high is None


def convert(image, mode):
    """Load an 8-bit image and convert it to that mode."""
    if image.mode == mode:
        image.load()
        return image
    if image.mode == 'LAB':  # Pillow converts it to grey only through RGB
        image = image.convert('RGB')
    elif image.mode == 'La':  # grey multiplied by alpha
        image = image.convert('LA')
    elif 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert(mode)
