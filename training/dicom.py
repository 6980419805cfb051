"""The pixels of a DICOM file, by pydicom.

    pixels, white_is_low = read_dicom('chest.dcm')    # [H, W] or [H, W, 3]
"""

import numpy as np

from training.formats import SetupError, check_size

# Photometric interpretations. pydicom converts YBR to RGB.
GREY = 'MONOCHROME1', 'MONOCHROME2'
COLOURS = 'RGB', 'PALETTE COLOR', 'YBR_FULL', 'YBR_FULL_422', 'YBR_ICT', 'YBR_RCT'


def read_dicom(path):
    """Pixels of a DICOM file: [H, W] in the units of the modality LUT, or colours [H, W, 3].

    Padding becomes black. The VOI LUT (the suggested window) is not applied.

    Returns:
        The array, and whether low values are white (MONOCHROME1). If so, the caller inverts after
        scaling to the value range (DICOM PS3.3, C.7.6.3.1.2), which is in the file's units.
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
        raise ValueError(f'it has {frames} frames: save each as a separate file')
    if kind not in GREY + COLOURS:
        raise ValueError(f'its photometric interpretation is {kind}: save it as RGB')
    check_size(data.Columns, data.Rows)
    try:
        stored = data.pixel_array
    except RuntimeError as error:
        failed = 'exceptions were raised' in str(error)
        reason = f'; {str(error).splitlines()[-1].strip()}' if failed else ''
        raise ValueError(f'no decoder for {data.file_meta.TransferSyntaxUID.name}: pip install '
                         f'pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg{reason}') from None
    if kind in COLOURS:
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
    if data.BitsStored < 8:  # a smaller range than 0..255
        return values.astype(np.uint16), white_is_low
    return 255 - values if white_is_low else values, False


def modality_values(stored, data):
    """Stored values after the modality LUT: integers if slope and intercept are whole numbers.

    Values stored in up to 16 bits become 32-bit ones, to save memory.
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

    Enhanced CT and MR store them in functional groups, which pydicom's apply_modality_lut ignores.
    """
    items = [item for groups in ('PerFrameFunctionalGroupsSequence',
                                 'SharedFunctionalGroupsSequence')
             for group in data.get(groups) or ()
             for item in group.get('PixelValueTransformationSequence') or ()]
    item = (*items, data)[0]
    return float(item.get('RescaleSlope', 1)), float(item.get('RescaleIntercept', 0))
