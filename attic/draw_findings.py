"""Write the images of `shapes` and a table of findings: several labels an image, without data.

    python attic/draw_findings.py work/data/findings
    python train.py --dataset folder --data work/data/findings --depth 16 --growth-rate 8 \\
        --labels work/data/findings/labels.csv --val-split 0.1 --best-by auc --epochs 10 \\
        --lr-schedule cosine --name findings

Three findings: `round`, `hollow` and `striped`. A tenth of the labels is unknown, chosen at random,
and three images in a row make a group. 6,000 images are for training, 1,000 for testing.
"""

import argparse
import csv
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from training.datasets import SHAPES, draw_shapes

FINDINGS = {'round': ('disk', 'ring'), 'hollow': ('ring', 'frame'),
            'striped': ('horizontal bars', 'vertical bars')}


def rows(split, folder, rng):
    """Write the images of a split; yields the rows of the table."""
    for i, (image, label) in enumerate(zip(*draw_shapes(split))):
        name = f'{split}-{i:04}.png'
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / name)
        found = [int(SHAPES[label] in shapes) for shapes in FINDINGS.values()]
        found = [value if rng.rand() >= 0.1 else '' for value in found]
        yield name, *found, split, f'{split}-{i // 3}'


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='where the images and labels.csv go')
    folder, rng = parser.parse_args(argv).folder, np.random.RandomState(0)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / 'labels.csv', 'w', newline='') as file:
        writer = csv.writer(file)
        writer.writerow(['file', *FINDINGS, 'split', 'group'])
        for split in ('train', 'test'):
            writer.writerows(rows(split, folder, rng))


if __name__ == '__main__':
    main()
