#!/usr/bin/env bash
# Pillow scrambles uncompressed TIFFs in grey (8 and 16 bits) and RGBA whose Orientation tag turns
# them by a quarter (5 to 8), if they are opened by their path. Opened as a file object, compressed,
# or in RGB, the same pixels come out right.
#
# Version: Pillow 13.0.0 (NumPy 2.2.6, Python 3.11, Linux); the same from 11.0.0 on, 10.4.0 is right
# Seen:    2026-11-30
# Output:  L path scrambled
#          L file object upright
#          L path, LZW upright
#          I;16 path scrambled
#          I;16 file object upright
#          I;16 path, LZW upright
#          RGB path upright
#          RGB file object upright
#          RGB path, LZW upright
#          RGBA path scrambled
#          RGBA file object upright
#          RGBA path, LZW upright
#
# Why it surprises: nothing is raised or warned of; size and shape look plausible; the histogram is
# right; and the same file read from memory, or the same image with compression, is correct. A data
# set of scans can so hold some images of noise-like stripes. From 11.0 on an opened image has the
# turned size; a file that is opened by its path and needs no decoding is memory-mapped, and its
# rows are then cut at the width of the turned image before it is turned.
#
# Exits with 0 while this is so, and with 1 once it is not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet pillow==13.0.0 numpy==2.2.6
cat > "$folder/check.py" <<'PYTHON'
import sys

import numpy as np
from PIL import Image

ROTATED_90_CW = 6  # Orientation: to be shown, the stored image is turned clockwise
path = sys.argv[1]


def verdict(opened, stored):
    pixels = np.asarray(opened)
    upright = np.rot90(stored, -1)
    if np.array_equal(pixels, upright):
        return 'upright'
    same_values = np.array_equal(np.sort(pixels, axis=None), np.sort(stored, axis=None))
    turns = [np.rot90(image, k) for image in (stored, stored[:, ::-1]) for k in range(4)]
    turned = any(np.array_equal(pixels, turn) for turn in turns)
    return 'scrambled' if same_values and not turned else 'other'


seen = []
for mode, kind, bands in (('L', np.uint8, ()), ('I;16', np.uint16, ()), ('RGB', np.uint8, (3,)),
                          ('RGBA', np.uint8, (4,))):
    stored = np.random.default_rng(0).integers(0, 256, (35, 50, *bands)).astype(kind)
    exif = Image.Exif()
    exif[0x112] = ROTATED_90_CW
    image = Image.fromarray(stored)
    assert image.mode == mode
    image.save(path, exif=exif)
    seen.append(f'{mode} path {verdict(Image.open(path), stored)}')
    with open(path, 'rb') as file:
        seen.append(f'{mode} file object {verdict(Image.open(file), stored)}')
    image.save(path, exif=exif, compression='tiff_lzw')
    seen.append(f'{mode} path, LZW {verdict(Image.open(path), stored)}')
print(*seen, sep='\n')
scrambled = [line for line in seen if line.endswith('scrambled')]
expected = [f'{mode} path scrambled' for mode in ('L', 'I;16', 'RGBA')]
sys.exit(scrambled != expected or len([s for s in seen if s.endswith('upright')]) != 9)
PYTHON
"$folder/venv/bin/python" "$folder/check.py" "$folder/scan.tif"
