"""Images whose height and width differ, from the flag to the heat map."""

import dataclasses

import numpy as np
import pytest
import torch
from conftest import SMALL, fails, parse_flags, read_csv, write_images
from PIL import Image
from torchvision import transforms

import bench
import make_graph
import predict
import train
from training import checkpoint, datasets, image_transforms, loaders
from training.augmentation import Augmentation
from training.decoding import ArrayImage

pytestmark = pytest.mark.usefixtures('no_figures')

CPU = torch.device('cpu')
LARGE = datasets.Description('folder', None, ('a', 'b'), (72, 48), (0,) * 3, (1,) * 3)
DEPTH_10 = ['--block-config', '1', '1', '--growth-rate', '4', '--batch-size', '4',
            '--print-freq', '3', '--device', 'cpu', '--no-plot', '--workers', '0']


@pytest.mark.parametrize('flag, size', [
    ('--image-size 72 48', (72, 48)), ('--image-size 72', 72), ('--image-size 72 72', 72),
    ('--image-size=72', 72)])
def test_the_flag(flag, size):
    args = parse_flags(['--dataset', 'folder', *flag.split()])
    assert args.image_size == size
    saved = vars(train.flags.complete(train.flags.parse([]), vars(args)))
    assert saved['image_size'] == size


def test_wrong_sizes(small, capsys):
    assert 'one number, or height and width' in fails(capsys, *small, '--image-size', 1, 2, 3)
    assert "'0' is not a whole" in fails(capsys, *small, '--image-size', 64, 0)
    said = fails(capsys, *small, '--image-size', 30, 3)
    assert 'at least 4 pixels, and these have 30 x 3' in said
    assert 'cifar10 has images of 32 pixels' in fails(capsys, '--image-size', 32, 64)


@pytest.mark.parametrize('shape, resized', [  # 72 x 48 is 224/256 of 82 x 55
    ((200, 100), (110, 55)), ((150, 100), (82, 55)), ((100, 100), (82, 82)), ((70, 180), (82, 210)),
    ((2000, 20), (330, 55))])  # more than 4 times as long: (4 * 20 * 82 / 55 = 120) x 20
def test_the_centre_is_seen(shape, resized):
    pixels = np.random.RandomState(0).randint(0, 256, (*shape, 3)).astype(np.uint8)
    image = Image.fromarray(pixels)
    if shape == (2000, 20):
        image = image.crop((0, 940, 20, 1060))
    truth = transforms.functional.pil_to_tensor(
        transforms.CenterCrop((72, 48))(transforms.Resize(resized)(image)))
    seen = image_transforms.test_transform(LARGE)(Image.fromarray(pixels))
    assert seen.shape == (3, 72, 48) and torch.equal(seen, truth)
    levels = ArrayImage(pixels.transpose(2, 0, 1).astype(np.uint16), 0, 255, 3)
    other = 255 * image_transforms.test_transform(LARGE)(levels)
    torch.testing.assert_close(other, truth.float(), rtol=0, atol=1.01)  # Pillow rounds twice
    assert image_transforms.test_transform(LARGE, ten_crop=True)(
        Image.fromarray(pixels)).shape == (10, 3, 72, 48)
    small = dataclasses.replace(LARGE, image_size=(36, 24))
    assert small.in_memory
    resize = image_transforms.test_transform(small).transforms[0](image)
    assert resize.size[0] == 24 or resize.size[1] == 36


@pytest.mark.parametrize('size', [(40, 160), (160, 40), (80, 80)])
def test_crops_have_about_the_ratio_of_the_network(size):
    """Seen by the slopes of two ramps: pixels of the file to one of the crop."""
    rows, columns = np.mgrid[:1000, :1000]
    levels = ArrayImage(np.stack([rows, columns, columns]).astype(np.uint16), 0, 1000, 3)
    crop, ratios = image_transforms.RandomResizedCrop(size), []
    for seed in range(20):
        torch.manual_seed(seed)
        seen = 1000 * crop(levels)
        assert seen.shape == (3, *size)
        down, right = (seen[0, -3, 5] - seen[0, 2, 5]) / (size[0] - 5), (
            seen[1, 5, -3] - seen[1, 5, 2]) / (size[1] - 5)
        ratios.append((right / down).item())
    assert 0.72 < min(ratios) < 0.9 and 1.1 < max(ratios) < 1.39


@pytest.mark.parametrize('size, network', [((24, 16), SMALL), ((72, 48), DEPTH_10)])
def test_a_run(tmp_path, capsys, size, network):
    root, run = tmp_path / 'photos', tmp_path / 'run'
    write_images(root, {'train/a': 5, 'train/b': 5, 'val/a': 2, 'val/b': 2}, (90, 110))
    argv = ['--dataset', 'folder', '--data', str(root), *network, '--save', str(run)]
    train.main([*argv, '--image-size', *map(str, size), '--epochs', '1'])
    assert f'test images of {size[0]} x {size[1]} pixels, 2 classes' in capsys.readouterr().out
    saved = checkpoint.load(run / 'latest.pth')
    assert saved['dataset']['image_size'] == saved['args']['image_size'] == size
    train.main(['--save', str(run), '--resume', '--epochs', '2'])
    dataset = datasets.Description(root=root, **saved['dataset'])
    (images, _), *_ = loaders.make_loader(dataset, 'train', 4, device=CPU,
                                           augmentation=Augmentation())
    assert images.shape == (4, 3, *size)
    train.main(['--evaluate', '--resume', str(run / 'best.pth'), '--device', 'cpu'])
    rows = read_csv(run / 'predictions.csv')
    predict.main([str(root / 'val'), '--checkpoint', str(run / 'best.pth'), '--device', 'cpu',
                  '--csv', str(tmp_path / 'x.csv'), '--heatmap-dir', str(tmp_path / 'maps')])
    found = {row['file']: row for row in reversed(read_csv(tmp_path / 'x.csv'))}
    for row in rows:
        assert abs(float(row['probability']) - float(found[row['file']]['probability'])) < 1e-4
    assert (tmp_path / 'maps/a/0.png.heatmap.png').exists()


def test_the_heatmap_covers_what_is_seen(tmp_path):
    for shape, box in (((100, 60), (11, 4, 79, 52)), ((60, 100), (4, 32, 53, 35))):
        Image.fromarray(np.full(shape, 200, np.uint8)).save(tmp_path / 'x.png')
        picture = np.asarray(predict.draw_heatmap(torch.ones(4, 3), tmp_path / 'x.png', LARGE))
        rows, columns = np.nonzero((picture != 200).any(2))
        found = rows.min(), columns.min(), np.ptp(rows) + 1, np.ptp(columns) + 1
        assert np.abs(np.subtract(found, box)).max() <= 1, found


def test_other_scripts(tmp_path):
    flags = '--arch densenet121 --image-size 96 64'.split()
    args, model, size = make_graph.build_model(flags)
    assert size == args.image_size == (96, 64)
    pytest.importorskip('graphviz')
    assert '64 × 24 × 16' in make_graph.block_graph(model, size, 'x').source  # after the stem
    options = bench.make_parser().parse_args(['--depth', '10', '--image-size', '12', '8'])
    args = bench.network_flags(**{**vars(options), 'batch_size': 2, 'inference': True})
    assert args.image_size == (12, 8)
    square = bench.network_flags(inference=True, depth=10, batch_size=2, image_size=8)
    assert bench.convolution_flops(args) == pytest.approx(
        bench.convolution_flops(square) * 1.5, rel=0.2)  # padding
