"""Style and saving of the figures of plot.py and report_figures.py. No torch."""

import matplotlib

from training.files import replace_file

# Okabe and Ito's palette for colour-blind readers, without the yellow, which is too pale.
COLORS = ['#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000']
MARKERS = 'os^DvPX'
GREY = '#777777'
STYLE = {
    'font.size': 10, 'legend.fontsize': 9, 'legend.title_fontsize': 9, 'legend.frameon': False,
    'legend.borderaxespad': 0.2, 'axes.spines.top': False, 'axes.spines.right': False,
    'axes.formatter.useoffset': False, 'axes.formatter.limits': [-9, 12],
    'axes.grid': True, 'axes.grid.axis': 'y', 'axes.axisbelow': True, 'grid.color': '#e6e6e6',
    'grid.linewidth': 0.6, 'lines.linewidth': 1.4, 'lines.markersize': 4, 'text.usetex': False,
    'text.parse_math': False,  # names may contain dollars
    'savefig.dpi': 200, 'pdf.fonttype': 42,  # TrueType, because publishers reject Type 3
}


def shorten(name, length=40):
    """Cut the middle out of a longer name; undecodable bytes become question marks."""
    name = name.encode(errors='surrogateescape').decode(errors='replace')
    return name if len(name) <= length else f'{name[:length // 2 - 1]}…{name[-(length // 2):]}'


def save_figure(figure, path):
    """Write the figure atomically, because a viewer may have the old one open."""
    with replace_file(path) as temporary, matplotlib.rc_context(STYLE):
        figure.savefig(temporary, format=path.suffix[1:])
