"""Predict the classes of images with a trained model, and draw heat maps of what it looks at.

    python predict.py --checkpoint work/flowers/best.pth rose.jpg tulips/ 'scans/**/*.png'
    python predict.py --checkpoint work/flowers/best.pth photos/ --csv x.csv --heatmap-dir maps/
    python predict.py --checkpoint work/scans/best.pth scans/ --heatmap --class lesion --one-scale
    python predict.py --arch densenet121 photo.jpg        # torchvision's weights for ImageNet

Files that can't be read are skipped with a warning, and the exit code is then 2. A name that
matches no file is an error, before anything is predicted.
"""

import argparse
import os
import sys
from pathlib import Path

from training import console, flags
from training.parsing import POSITIVE, Parser


def make_parser():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders and globs')
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--checkpoint', metavar='FILE', help='latest.pth or best.pth of a run')
    which.add_argument('--arch', choices=flags.TORCHVISION_WEIGHTS,
                       help='a network with torchvision\'s weights for ImageNet')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='also write a CSV file')
    parser.add_argument('--heatmap', action='store_true',
                        help='write IMAGE.heatmap.png beside each image')
    parser.add_argument('--heatmap-dir', type=Path, metavar='DIR',
                        help='draw the heat maps into this folder')
    parser.add_argument('--class', dest='heatmap_class', metavar='NAME',
                        help='class of the heat map (default: the most probable)')
    parser.add_argument('--one-scale', action='store_true',
                        help='one colour scale for all heat maps, up to their common maximum '
                             '(default: one for each)')
    parser.add_argument('--batch-size', type=POSITIVE, default=32, help='(default: 32)')
    parser.add_argument('--device', choices=flags.DEVICES, default='auto', help='(default: auto)')
    return parser


if __name__ == '__main__':  # --help and wrong flags answer before torch is imported
    console.exit_on_user_error(make_parser().parse_args, 'predict.py')

import contextlib
import csv
import functools
import glob
import math

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import DataLoader
from tqdm import tqdm

import densenet
from training import checkpoint, datasets, image_files, image_transforms, networks
from training.console import DataError, UserError
from training.device import choose_device
from training.errors import explanation
from training.figures import shorten
from training.files import escape_formula, open_csv
from training.weights import torchvision_weights

CSV_COLUMNS = 'file', 'class', 'probability'
COLORMAP = 'inferno'  # perceptually uniform, also for colour-blind readers
MIN_WIDTH = 280       # pixels; smaller heat maps are enlarged, for the line of text
IMAGENET_CLASSES = tuple(torchvision.models.DenseNet121_Weights.DEFAULT.meta['categories'])


def load_model(args):
    """The model in eval mode, and the Description of its training data."""
    if args.checkpoint:
        saved = checkpoint.load(args.checkpoint)
        checkpoint.check_contents(saved, args.checkpoint)
        dataset = datasets.Description(root=None, **saved['dataset'])
        build, weights = functools.partial(densenet.DenseNet, **saved['config']), saved['model']
        checkpoint.check_network(build, weights, args.checkpoint)
        model = build()
    else:
        dataset = datasets.Description('imagenet', None, IMAGENET_CLASSES, 224,
                                       **datasets.IMAGENET_STATISTICS)
        model = getattr(densenet, args.arch)()
        weights = torchvision_weights(args.arch)
    model.load_state_dict(weights)
    checkpoint.check_finite(model, args.checkpoint or args.arch)
    return model.eval(), dataset


def find_images(name):
    """The file of that name, or the sorted images of a folder or glob."""
    if os.path.isfile(name):
        return [Path(name)]
    if os.path.isdir(name):
        found, others = image_files.find_images(name)
        if others:
            unread = image_files.describe_unread(name, others)
            if not found:
                raise UserError(unread)
            console.warn(unread, script='predict.py')
    else:
        found = sorted(file for file in glob.glob(name, recursive=True)
                       if image_files.is_image(file) and os.path.isfile(file))
    if not found:
        raise UserError(f'{name}: there is no such file, or no image in it')
    return [Path(file) for file in found]


def read(dataset, files):
    """[(file, float32 [C, H, W] or a DataError)]; runs in worker processes."""
    batch = []
    for file in files:
        try:  # NumPy: tensors would need shared memory, which is small in containers
            batch.append((file, image_files.read_image(file, dataset).numpy()))
        except DataError as error:
            batch.append((file, error))
    return batch


def predict(model, dataset, files, batch_size, label=None):
    """Yield (file, (probabilities [classes], heat [h, w])) or (file, DataError), in order."""
    device = next(model.parameters()).device
    multi_label = dataset.multi_label
    workers = flags.default_workers() if len(files) > batch_size else 0
    for batch in DataLoader(files, batch_size, collate_fn=functools.partial(read, dataset),
                            num_workers=workers):
        images = [image for _, image in batch if isinstance(image, np.ndarray)]
        if images:
            batch_tensor = torch.from_numpy(np.stack(images)).to(device)
            answers = zip(*classify(model, batch_tensor, label, multi_label))
        for file, image in batch:
            yield file, next(answers) if isinstance(image, np.ndarray) else image


@torch.inference_mode()
def classify(model, images, label=None, multi_label=False):
    """Probabilities of the classes, and the Grad-CAM of `label` or of the most probable class.

    Grad-CAM (Selvaraju et al. 2017) at the last ReLU. Only a mean over the map and a linear layer
    follow, so the gradient of a logit with respect to channel c is weight[class, c] / (h * w)
    everywhere. Without that factor 1 / (h * w), Grad-CAM is the positive part of CAM (Zhou et al.
    2016), whose mean over the map is the logit without its bias. Heat is in units of logits.

    Shapes: images [N, C, H, W] to probabilities [N, classes] and heat [N, h, w], of the size of the
    last feature map, on the CPU.
    """
    kept = []
    hook = model.features.register_forward_hook(lambda module, args, output: kept.append(output))
    logits = model(images)
    hook.remove()
    maps = F.relu(kept[0])                                       # [N, channels, h, w]
    labels = logits.argmax(1) if label is None else label
    weight = model.classifier.weight[labels].expand(len(maps), -1)  # [N, channels]
    heat = F.relu(torch.einsum('nc,nchw->nhw', weight, maps))
    probabilities = logits.sigmoid() if multi_label else logits.softmax(1)
    return probabilities.cpu(), heat.cpu()


def draw_heatmap(heat, file, dataset, highest=None):
    """An image file in grey, with the heat [h, w] overlaid on the centre crop that the model sees.

    Colours range from 0 (black) to `highest`, by default the maximum of `heat`.
    """
    from matplotlib import colormaps  # slow to import

    # [H, W], uncropped
    grey = image_files.read_pixels(dataset, image_transforms.to_tensor, file).float().mean(0)
    picture = grey[:, :, None].repeat(1, 1, 3).numpy() / 255
    resize, _, crop = image_transforms.test_transform(dataset).transforms
    scale = min(size / resized for size, resized in zip(grey.shape, resize.size))
    height, width = (round(scale * size) for size in crop.size)  # pixels of the file
    top, left = (grey.shape[0] - height) // 2, (grey.shape[1] - width) // 2
    heat = F.interpolate(heat[None, None], (height, width), mode='bicubic')[0, 0].clamp(min=0)
    highest = heat.max().item() if highest is None else highest
    colours = colormaps[COLORMAP]((heat / max(highest, 1e-12)).numpy())[:, :, :3]
    seen = picture[top:top + height, left:left + width]
    seen += 0.5 * (colours - seen)
    return Image.fromarray((255 * picture).round().astype(np.uint8))


def annotate(picture, text, highest):
    """Add a line of text above a heat map, and a colour bar from 0 to `highest` beside it.

    The heat map is in the lower left corner; small ones are enlarged by an integer factor.
    """
    import matplotlib

    picture = picture.resize([math.ceil(MIN_WIDTH / picture.width) * side for side in picture.size],
                             Image.Resampling.NEAREST)
    width, height = picture.size
    size = max(13, width // 28)  # of letters, pixels
    font = ImageFont.truetype(Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf'), size)
    top, bar = 2 * size, [width + size // 2, 2 * size, width + size, 2 * size + height - 1]
    canvas = Image.new('RGB', (width + 5 * size, top + height), 'white')
    canvas.paste(picture, (0, top))
    levels = np.linspace(1, 0, height)[:, None].repeat(bar[2] - bar[0], 1)
    colours = (255 * matplotlib.colormaps[COLORMAP](levels)[:, :, :3]).round().astype(np.uint8)
    canvas.paste(Image.fromarray(colours), (bar[0], top))
    draw = ImageDraw.Draw(canvas)
    draw.text((size // 4, size), text, 'black', font, anchor='lm')
    for value, y, anchor in ((highest, top, 'lt'), (0, top + height - 1, 'lb')):
        draw.text((bar[2] + size // 4, y), f'{value:.3g}', 'black', font, anchor=anchor)
    return canvas


def save_heatmaps(heats, dataset, folder, root):
    """Draw (file, heat, text) with one scale, into `folder`, at the files' paths below `root`."""
    highest = max((heat.max().item() for _, heat, _ in heats), default=0)
    for file, heat, text in heats:
        path = Path(folder, os.path.relpath(file, root) + image_files.HEATMAP)
        path.parent.mkdir(parents=True, exist_ok=True)
        annotate(draw_heatmap(heat, file, dataset, highest), text, highest).save(path)


def find_class(name, names):
    """The index of a class; raises UserError, naming the classes, if it does not exist."""
    if name in names:
        return names.index(name)
    more = ', ...' if len(names) > 20 else ''
    raise UserError(f'--class {name}: there is no such class; the classes are '
                    f'{", ".join(names[:20])}{more}')


def run(args):
    """Predict all images: print the classes, write them to --csv, and draw the heat maps."""
    draws = args.heatmap or args.heatmap_dir is not None
    if not draws and (args.heatmap_class or args.one_scale):
        raise UserError('--class and --one-scale need --heatmap or --heatmap-dir')
    if args.csv and args.csv.is_file():
        with open_csv(args.csv) as file:
            if file.readline(1000).rstrip('\r\n') not in ('', ','.join(CSV_COLUMNS)):
                raise UserError(f'--csv {args.csv} would replace a file that predict.py has not '
                                f'written')
    files = [*dict.fromkeys(file for name in args.images for file in find_images(name))]
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    model, dataset = load_model(args)
    names, broken = dataset.classes, 0
    if len(names) == 1000 and names[0] == 'n01440764':  # ImageNet's WordNet IDs
        names = IMAGENET_CLASSES
    num_shown = len(names) if dataset.multi_label else min(5, len(names))
    device = choose_device(args.device)
    networks.fuse(model, device, script='predict.py')
    model.to(device, memory_format=torch.channels_last)
    label = None if args.heatmap_class is None else find_class(args.heatmap_class, names)
    if dataset.value_range:
        with contextlib.suppress(DataError):  # reported below
            first = image_files.decode(files[0], len(dataset.mean))
            image_files.warn_of_other_values(dataset, [first], 'predict.py')
    heats = []  # still to be drawn
    bar = tqdm(predict(model, dataset, files, args.batch_size, label), total=len(files),
               leave=False, disable=None)  # None: only on a terminal
    with open_csv(args.csv or os.devnull, 'w') as table:
        writer = csv.writer(table)
        writer.writerow(CSV_COLUMNS)
        for file, answer in bar:
            if isinstance(answer, DataError):
                with bar.external_write_mode():
                    console.warn(answer, script='predict.py')
                broken += 1
                continue
            probabilities, heat = answer
            best = [(names[i], value.item()) for value, i in zip(*probabilities.topk(num_shown))]
            with bar.external_write_mode():
                print(f'{file}:', ', '.join(f'{name} {value:.2%}' for name, value in best),
                      flush=True)
            writer.writerows((escape_formula(file), name, f'{value:.6f}') for name, value in best)
            if draws:
                shown = probabilities.argmax() if label is None else label
                text = f'{shorten(names[shown], 34)} {probabilities[shown]:.1%}'
                heats.append((file, heat, text))
            if not args.one_scale:
                save_heatmaps(heats, dataset, args.heatmap_dir or root, root)
                heats.clear()
    save_heatmaps(heats, dataset, args.heatmap_dir or root, root)
    if broken:
        raise UserError(f'{broken} of {len(files)} images could not be read')


def main(argv=None):
    try:
        run(make_parser().parse_args(argv))
    except BrokenPipeError:  # `| head`; Python would raise again at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, EOFError, RuntimeError, MemoryError) as error:
        message = explanation(error, 'give a lower --batch-size')
        if message is None:
            raise
        console.warn(message, 'error', 'predict.py')
        sys.exit(2)


if __name__ == '__main__':
    if hasattr(sys.stdout, 'reconfigure'):  # not in a notebook
        sys.stdout.reconfigure(errors='backslashreplace')  # class names may not be valid UTF-8
    main()
