"""Say what a trained model sees in image files, or in all images of folders, and where it looks.

    python predict.py --checkpoint work/flowers/best.pth rose.jpg tulips/ 'scans/**/*.png'
    python predict.py --checkpoint work/flowers/best.pth photos/ --csv x.csv --heatmap heatmaps/
    python predict.py --arch densenet121 photo.jpg        # torchvision's weights for ImageNet

A file that can't be read is a warning; the others are predicted, and the exit code is 2.
"""

import argparse
import csv
import functools
import glob
import os
import re
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
import data
import densenet
import flags
import machine
import runlog
from errors import UserError

HEATMAP = '.heatmap.png'  # the end of the names of heatmaps


def load_model(args):
    """The model in eval mode and the description of what it was trained on."""
    if args.checkpoint:
        saved = checkpoint.load(args.checkpoint)
        if not isinstance(saved.get('dataset'), dict):
            raise UserError(f'{args.checkpoint} holds no run: it does not say which classes it '
                            f'knows')
        dataset = data.Description(root=None, **saved['dataset'])
        model = densenet.DenseNet(**saved['config'])
        checkpoint.load_weights(model, saved.get('model'), args.checkpoint)
        return model.eval(), dataset
    model = getattr(densenet, args.arch)()
    checkpoint.load_weights(model, checkpoint.torchvision_weights(args.arch), args.arch)
    return model.eval(), data.Description('imagenet', None, imagenet_classes(), 224,
                                          *data.STATISTICS['imagenet'])


def imagenet_classes():
    return tuple(torchvision.models.DenseNet121_Weights.IMAGENET1K_V1.meta['categories'])


def find_images(name):
    """The file of that name, or all images in a folder or that a glob matches, sorted."""
    path = Path(name)
    if path.is_file():
        return [path]
    found = path.rglob('*') if path.is_dir() else map(Path, glob.glob(name, recursive=True))
    endings = torchvision.datasets.folder.IMG_EXTENSIONS
    found = sorted(file for file in found if file.name.lower().endswith(endings)
                   and not file.name.endswith(HEATMAP) and not file.is_dir())
    if not found:
        raise UserError(f'{name}: there is no such file, or no image in it')
    return found


def heatmap_paths(files, folder):
    """{image: its heatmap}, beside it or, below the folder that all images share, in `folder`."""
    if folder and Path(folder).is_file():
        raise UserError(f'--heatmap {folder} is no folder: name the images before --heatmap')
    root = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
    heatmaps = {file: Path(folder or root, os.path.relpath(file, root)).with_suffix(HEATMAP)
                for file in files}
    path, count = Counter(heatmaps.values()).most_common(1)[0]
    if count > 1:
        raise UserError(f'{path} would be the heatmap of {count} images: predict them one by one')
    return heatmaps


def read(dataset, files):
    """[(file, float32 [C, H, W] or a DataError)]: what a worker process hands over."""
    batch = []
    for file in files:
        try:  # NumPy, for tensors would come through shared memory, of which containers have little
            batch.append((file, data.read_image(file, dataset).numpy()))
        except data.DataError as error:
            batch.append((file, error))
    return batch


def predict(model, dataset, files, batch_size):
    """Yields (file, (probabilities [classes], heat [h, w])), or (file, DataError), in order."""
    device = next(model.parameters()).device
    for batch in DataLoader(files, batch_size, collate_fn=functools.partial(read, dataset),
                            num_workers=flags.default_workers() * (len(files) > batch_size)):
        images = [image for _, image in batch if isinstance(image, np.ndarray)]
        if images:
            answers = zip(*classify(model, torch.from_numpy(np.stack(images)).to(device)))
        for file, image in batch:
            yield file, next(answers) if isinstance(image, np.ndarray) else image


@torch.inference_mode()
def classify(model, images):
    """Probabilities of the classes, and where the model looks for the first of them.

    That is Grad-CAM (Selvaraju et al. 2017) at the last ReLU. After it come a mean over the map and
    a linear layer, so the gradient of a logit by channel c is weight[class, c] / (h * w) anywhere:
    but for 1 / (h * w), Grad-CAM is the positive part of CAM (Zhou et al. 2016), with no backward.

    Shapes: images [N, C, H, W] to, on the CPU, probabilities [N, classes] and heat [N, h, w], of
    the size of the last feature map.
    """
    maps = F.relu(model.features(images))                        # [N, channels, h, w]
    probabilities = model.classifier(maps.mean((2, 3))).softmax(1)
    weight = model.classifier.weight[probabilities.argmax(1)]    # [N, channels]
    heat = F.relu(torch.einsum('nc,nchw->nhw', weight, maps))
    return probabilities.cpu(), heat.cpu()


def draw_heatmap(heat, file, dataset):
    """An image file in grey and, over the centre crop that the model sees, its heat [h, w].

    The colours go from black, no heat, to the highest in this image.
    """
    from matplotlib import colormaps  # here, for it is slow to import

    pixels = data.read_pixels(dataset, data.to_tensor, file)  # all of the image, [C, H, W]
    grey = pixels.float().mean(0) / 255
    picture = grey[:, :, None].repeat(1, 1, 3).numpy()
    resize, _, crop = data.test_transform(dataset.image_size).transforms
    side = round(min(grey.shape) * crop.size[0] / resize.size)  # of the crop, in pixels of the file
    top, left = ((size - side) // 2 for size in grey.shape)
    heat = F.interpolate(heat[None, None], (side, side), mode='bicubic')[0, 0].clamp(min=0)
    colours = colormaps['inferno']((heat / heat.max().clamp(min=1e-12)).numpy())[:, :, :3]
    seen = picture[top:top + side, left:left + side]
    seen += 0.5 * (colours - seen)
    return Image.fromarray((255 * picture).round().astype(np.uint8))


def make_parser():
    parser = flags.Parser(prog='predict.py', description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files, folders and globs')
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--checkpoint', metavar='FILE', help='latest.pth or best.pth of a run')
    which.add_argument('--arch', choices=flags.TORCHVISION_WEIGHTS,
                       help='with torchvision\'s weights')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='also write the classes to this')
    parser.add_argument('--heatmap', nargs='?', const='', metavar='DIR',
                        help='draw where it looks, beside each image or in this folder')
    parser.add_argument('--batch-size', type=flags.POSITIVE, default=32, metavar='N',
                        help='(default: %(default)s)')
    parser.add_argument('--device', choices=machine.DEVICES, default='auto',
                        help='(default: cuda if there is one, else cpu)')
    return parser


def main(argv=None):
    broken = 0
    try:
        args = make_parser().parse_args(argv)
        files = [*dict.fromkeys(file for name in args.images for file in find_images(name))]
        heatmaps = {} if args.heatmap is None else heatmap_paths(files, args.heatmap)
        model, dataset = load_model(args)
        names = dataset.classes
        if len(names) == 1000 and all(re.fullmatch(r'n\d{8}', name) for name in names):
            names = imagenet_classes()  # instead of numbers in WordNet
        model.to(machine.choose_device(args.device), memory_format=torch.channels_last)
        # A file's name, and so a row, may be no text.
        table = open(args.csv or os.devnull, 'w', newline='', errors='surrogateescape')
        writer = csv.writer(table)
        writer.writerow(('file', 'class', 'probability'))
        bar = tqdm(predict(model, dataset, files, args.batch_size), total=len(files), leave=False,
                   disable=None)  # None: only on a terminal
        for file, answer in bar:
            with bar.external_write_mode():
                if isinstance(answer, data.DataError):
                    runlog.warn(answer, script='predict.py')
                    broken += 1
                    continue
                shares, labels = (part.tolist() for part in answer[0].topk(min(5, len(names))))
                found = [(names[label], share) for share, label in zip(shares, labels)]
                print(f'{file}:', ', '.join(f'{name} {100 * share:.2f}%' for name, share in found),
                      flush=True)
            writer.writerows((file, name, f'{share:.6f}') for name, share in found)
            if heatmaps:
                heatmaps[file].parent.mkdir(parents=True, exist_ok=True)
                draw_heatmap(answer[1], file, dataset).save(heatmaps[file])
        table.close()
        if broken:
            raise UserError(f'{broken} of {len(files)} images could not be read')
    except BrokenPipeError:  # `| head`; Python would fail again at its exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (UserError, OSError, RuntimeError) as error:
        runlog.warn(' '.join(str(error).split()), 'error', 'predict.py')
        sys.exit(2)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # the name of a class may be no text
    main()
