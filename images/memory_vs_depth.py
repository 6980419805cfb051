"""Draw the memory that a training step of DenseNet-BC (k=12) holds for backward, against its depth.

    python images/memory_vs_depth.py        # draws images/memory-vs-depth.png

Batches of 8 images, fp32 on a CPU, weights not counted. "Checkpointed" is our model with
torch.utils.checkpoint, "fused" is `fuse(model)`, whose CPU kernels hold as much as its eager mode.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from matplotlib import rc_context
from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import bench
import plot

DEPTHS = (22, 40, 70, 100, 130, 160, 190, 220, 250)
BATCH_SIZE = 8


def main():
    images = torch.randn(BATCH_SIZE, 3, 32, 32)
    with rc_context(plot.STYLE):
        figure = Figure(figsize=(6, 4), layout='constrained')
        axes = figure.subplots()
        for mode, color, marker in zip(bench.EAGER_MODES, plot.COLORS, plot.MARKERS):
            row = bench.Row('ours', mode, 'fp32')
            models = (bench.make_model(row, bench.network_flags(depth=depth)) for depth in DEPTHS)
            held = [bench.bytes_held(model.train().to(memory_format=torch.channels_last), images)
                    for model in models]
            axes.plot(DEPTHS, np.array(held) / 2**20, color=color, marker=marker,
                      label=mode.replace(', eager', ''))
        axes.set(xlabel='depth', ylabel='memory held for backward (MiB)', xlim=(0, None),
                 ylim=(0, None))
        axes.legend(loc='upper left')
        figure.suptitle(f'DenseNet-BC k=12, fp32, batches of {BATCH_SIZE} at 32 pixels; CPU, torch '
                        f'{torch.__version__}', fontsize=8, color=plot.GREY)
    plot.save_figure(figure, ROOT / 'images' / 'memory-vs-depth.png')


if __name__ == '__main__':
    main()
