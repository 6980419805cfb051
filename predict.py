"""Say what a trained model sees in image files, or in all images of folders.

    python predict.py --checkpoint work/flowers/best.pth rose.jpg tulips/
    python predict.py --checkpoint work/flowers/best.pth photos/ --csv predictions.csv
    python predict.py --arch densenet121 photo.jpg        # torchvision's weights for ImageNet
"""

import argparse
import csv
import re
import sys
from pathlib import Path

import torch
import torchvision

import checkpoint
import data
import densenet
import flags
import machine
import runlog
from errors import UserError


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


def image_files(paths):
    """The files, and all images in the folders among them."""
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(file for file in path.rglob('*')
                           if file.suffix.lower() in torchvision.datasets.folder.IMG_EXTENSIONS)
            if not found:
                raise UserError(f'{path} has no images in it')
            yield from found
        else:
            yield path


@torch.inference_mode()
def predict(model, dataset, path):
    """Probabilities of the classes, float32 [classes]."""
    image = data.read_image(path, dataset).to(next(model.parameters()).device)
    return model(image[None])[0].softmax(0).cpu()


def make_parser():
    parser = flags.Parser(prog='predict.py', description=__doc__, allow_abbrev=False,
                          formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('images', nargs='+', metavar='IMAGE', help='files and folders')
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument('--checkpoint', metavar='FILE', help='latest.pth or best.pth of a run')
    which.add_argument('--arch', choices=flags.TORCHVISION_WEIGHTS,
                       help='with torchvision\'s weights')
    parser.add_argument('--csv', metavar='FILE', help='also write the classes to this file')
    parser.add_argument('--device', choices=machine.DEVICES, default='auto',
                        help='(default: cuda if there is one, else cpu)')
    return parser


def main(argv=None):
    try:
        args = make_parser().parse_args(argv)
        model, dataset = load_model(args)
        names = dataset.classes
        if len(names) == 1000 and all(re.fullmatch(r'n\d{8}', name) for name in names):
            names = imagenet_classes()  # instead of numbers in WordNet
        model.to(machine.choose_device(args.device), memory_format=torch.channels_last)
        rows = []
        for path in image_files(args.images):
            best = predict(model, dataset, path).topk(min(5, len(names)))
            found = [(names[label], share) for label, share
                     in zip(best.indices.tolist(), best.values.tolist())]
            print(f'{path}:', ', '.join(f'{name} {100 * share:.2f}%' for name, share in found),
                  flush=True)
            rows += [(path, name, f'{share:.6f}') for name, share in found]
        if args.csv:
            with open(args.csv, 'w', newline='') as file:
                csv.writer(file).writerows([('file', 'class', 'probability'), *rows])
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
    except (UserError, OSError, RuntimeError) as error:
        runlog.warn(' '.join(str(error).split()), 'error', 'predict.py')
        sys.exit(2)


if __name__ == '__main__':
    sys.stdout.reconfigure(errors='backslashreplace')  # the name of a class may be no text
    main()
