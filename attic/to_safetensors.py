"""Write a checkpoint as `model.safetensors` and `config.json`, as model hubs expect.

    python attic/to_safetensors.py work/x/best.pth hub/x

`config.json` holds the arguments of `densenet.DenseNet` and what an image needs: class names, image
size (one number, or height and width), mean and standard deviation of each channel in 0..1, and the
value range of images of more than 8 bits. `export.md` shows how to load both.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from safetensors.torch import save_file

from training import checkpoint, console


def make_config(saved):
    """What to write to config.json for a checkpoint."""
    dataset = saved['dataset']
    scaled = {key: [round(value / 255, 6) for value in dataset[key]]
              for key in ('mean', 'std')}
    return {**saved['config'], 'classes': dataset['classes'], 'image_size': dataset['image_size'],
            **scaled, 'value_range': dataset.get('value_range')}


def convert(path, directory):
    saved = checkpoint.load(path)
    if not saved.keys() >= {'model', 'config', 'dataset'}:
        raise console.UserError(f'{path} is not a checkpoint of a run')
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(make_config(saved), indent=2)
    (directory / 'config.json').write_text(f'{config}\n')
    weights = {key: tensor.contiguous() for key, tensor in saved['model'].items()}
    save_file(weights, directory / 'model.safetensors', metadata={'format': 'pt'})


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('checkpoint', type=Path, help='best.pth or latest.pth of a run')
    parser.add_argument('directory', type=Path, help='where to write; made if it is not there')
    args = parser.parse_args(argv)
    try:
        convert(args.checkpoint, args.directory)
    except (console.UserError, OSError) as error:
        parser.exit(2, f'to_safetensors.py: error: {error}\n')
    print(f'{args.directory}: model.safetensors, config.json')


if __name__ == '__main__':
    main()
