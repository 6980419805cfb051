"""predict.py: the files it takes, its predictions, and its heat maps."""

import math
import os
import re
import resource

import forked
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import cache_densenet121, fails, raise_no_network, read_csv
from PIL import Image
from torchvision import transforms

import densenet
import predict
from training import checkpoint, datasets, image_files

NARROW = dict(growth_rate=4, block_config=(2, 2), num_init_features=8)
SIZE = 66  # pixels: the model's input


@pytest.fixture(scope='module')
def model(tmp_path_factory):
    """A checkpoint of a network that was not trained."""
    torch.manual_seed(0)
    net = densenet.DenseNet(**NARROW, num_classes=2)
    dataset = datasets.Description('folder', None, ('bright', 'dark'), SIZE,
                                   **datasets.IMAGENET_STATISTICS)
    path = tmp_path_factory.mktemp('model') / 'best.pth'
    checkpoint.save(path, {'config': net.config, 'dataset': dataset.plain(),
                           'model': net.state_dict()})
    return path


@pytest.fixture
def photos(tmp_path):
    """a/0.png, a/1.jpg, b/c/2.png and b/3.PNG, and two files that are no images."""
    rng, root = np.random.RandomState(0), tmp_path / 'photos'
    for name in ('a/0.png', 'a/1.jpg', 'b/c/2.png', 'b/3.PNG'):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.randint(0, 256, (80, 90, 3)).astype(np.uint8)).save(root / name)
    (root / 'a/notes.txt').write_text('no picture')
    Image.new('RGB', (90, 80)).save(root / 'a/0.png.heatmap.png')
    return root


def predictions(capsys, *argv):
    capsys.readouterr()
    predict.main([*map(str, argv), '--device', 'cpu'])
    return capsys.readouterr().out.splitlines()


def named(root, *names):
    return [str(root / name) for name in names]


# ---- classes -------------------------------------------------------------------------------------

def test_predictions_are_the_probabilities_of_the_classes(model, photos, tmp_path, capsys):
    files = [photos / 'b/3.PNG', photos / 'a/0.png']
    lines = predictions(capsys, *files, '--checkpoint', model, '--csv', tmp_path / 'x.csv')
    rows = read_csv(tmp_path / 'x.csv')
    saved = torch.load(model, weights_only=True)
    theirs = torchvision.models.DenseNet(**NARROW, num_classes=2).eval()
    theirs.load_state_dict(saved['model'])
    mean, std = ([value / 255 for value in saved['dataset'][key]] for key in ('mean', 'std'))
    transform = transforms.Compose([transforms.Resize(75), transforms.CenterCrop(SIZE),
                                    transforms.ToTensor(), transforms.Normalize(mean, std)])
    for path, line in zip(files, lines, strict=True):
        with torch.no_grad():
            shares = theirs(transform(Image.open(path))[None])[0].softmax(0)
        first = int(shares.argmax())
        said = re.fullmatch(rf'{path}: (\w+) ([\d.]+)%, (\w+) ([\d.]+)%', line).groups()
        for name, percent, label in (*said[:2], first), (*said[2:], 1 - first):
            row = rows.pop(0)
            assert (row['file'], row['class']) == (str(path), name)
            assert name == ('bright', 'dark')[label]
            assert math.isclose(float(row['probability']), shares[label], abs_tol=2e-6)
            assert math.isclose(float(percent), 100 * shares[label], abs_tol=0.0052)
    assert rows == []


def test_predictions_have_the_error_of_the_evaluation(uninterrupted, folder, tmp_path, capsys):
    images = [folder / 'val/a/0.png', folder / 'val/a/1.png', *(folder / f'val/{c}' for c in 'bcd')]
    lines = predictions(capsys, *images, '--checkpoint', uninterrupted / 'latest.pth')
    paths, seen = zip(*(line.split(': ') for line in lines))
    assert list(paths) == sorted(str(path) for path in folder.glob('val/*/*'))
    wrong = sum(path.split('/')[-2] != first.split()[0] for path, first in zip(paths, seen))
    assert 100 * wrong / 8 == float(read_csv(uninterrupted / 'test.csv')[-1]['error']) > 0


def test_predictions_of_imagenets_models_have_words(tmp_path, photos, monkeypatch, capsys):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    model = torchvision.models.densenet121()
    with torch.no_grad():
        model.classifier.bias[[0, 999]] = torch.tensor([35.0, 30.0])
    cache_densenet121(tmp_path, model)
    line, = predictions(capsys, photos / 'a/0.png', '--arch', 'densenet121')
    assert re.search(r': tench \d+\.\d\d%, toilet tissue \d', line) and line.count('%') == 5
    net = densenet.DenseNet(**NARROW)
    with torch.no_grad():
        net.classifier.bias[0] = 100
    folders = tuple(f'n{1440764 + i:08d}' for i in range(1000))
    checkpoint.save(tmp_path / 'ours.pth', {
        'config': net.config, 'model': net.state_dict(), 'dataset': datasets.Description(
            'folder', None, folders, SIZE, **datasets.IMAGENET_STATISTICS).plain()})
    line, = predictions(capsys, photos / 'a/0.png', '--checkpoint', tmp_path / 'ours.pth')
    assert ': tench 100.00%, ' in line


# ---- files ---------------------------------------------------------------------------------------

def test_a_file_that_is_no_table_is_not_replaced_by_one(model, photos, capsys):
    (photos / 'labels.csv').write_text('file,label\na/0.png,dark\n')
    for file in (model, photos / 'a/0.png', photos / 'labels.csv'):
        before = file.read_bytes()
        assert 'would replace a file that predict.py has not written' in fails(
            capsys, '--checkpoint', model, photos, '--csv', file, script=predict)
        assert file.read_bytes() == before
    for before in (None, b'', None):
        if before is not None:
            (photos / 'x.CSV').write_bytes(before)
        predictions(capsys, photos / 'a/0.png', '--checkpoint', model, '--csv', photos / 'x.CSV')


def test_files_folders_and_globs(model, photos, capsys):
    every = named(photos, 'a/0.png', 'a/1.jpg', 'b/3.PNG', 'b/c/2.png')
    for images, expected in (
            ([photos], every),  # without the heatmap
            ([photos / '**/*.png'], named(photos, 'a/0.png', 'b/c/2.png')),
            ([photos / '*' / '[01].*'], every[:2]),
            ([photos / 'b', photos / 'b/3.PNG', photos / 'a/1.jpg'], every[2:] + every[1:2]),
            ([photos / 'a/0.png.heatmap.png'], named(photos, 'a/0.png.heatmap.png'))):
        lines = predictions(capsys, *images, '--checkpoint', model)
        assert [line.split(': ')[0] for line in lines] == expected


def test_names_with_line_breaks_or_of_formulas(model, photos, monkeypatch, capsys):
    monkeypatch.chdir(photos)
    names = ['=1+1.png', '-1.png', 'a\rb.png', 'a\nb.png']
    for name in names:
        (photos / name).hardlink_to('a/0.png')
    predict.main(['--checkpoint', str(model), '--device', 'cpu', '--csv', 'x.csv', '--', *names])
    files = [row['file'] for row in read_csv(photos / 'x.csv')][::2]
    assert files == ['./=1+1.png', './-1.png', *names[2:]]
    assert all(map(os.path.isfile, files))


def test_skipped_files_are_one_line_per_folder(model, photos, tmp_path, capsys):
    for name in ('scan1.svg', 'scan2.svg'):
        (photos / 'a' / name).write_text('no picture')
    (tmp_path / 'none').mkdir()
    (tmp_path / 'none/x.heic').write_text('no picture')
    for images, said in (([photos / 'b'], []), ([photos / 'a/0.png'], []),
                         ([photos, photos / 'b'], [f'{photos}: 3 files are not read: .svg (2), '
                                                   f'.txt (1); images are .jpg '])):
        predict.main([*map(str, images), '--checkpoint', str(model), '--device', 'cpu'])
        lines = capsys.readouterr().err.splitlines()
        for line, start in zip(lines, said, strict=True):
            assert line.startswith(f'predict.py: warning: {start}')
    assert 'none: 1 files are not read: .heic (1); images are .jpg ' in fails(
        capsys, tmp_path / 'none', '--checkpoint', model, script=predict)


@pytest.mark.parametrize('batch_size', [1, 3, 32])  # workers read the first two
def test_a_broken_file_is_skipped(model, photos, tmp_path, capsys, batch_size):
    whole = predictions(capsys, photos, '--checkpoint', model)
    (photos / 'a/00.jpg').write_bytes((photos / 'a/1.jpg').read_bytes()[:2000])
    (photos / 'b/text.tiff').write_text('no picture')
    (photos / 'b/z.png').symlink_to('nowhere')
    csv = tmp_path / 'x.csv'
    with pytest.raises(SystemExit) as exit_:
        predictions(capsys, photos, '--checkpoint', model, '--batch-size', batch_size, '--csv', csv)
    out, errors = capsys.readouterr()
    assert exit_.value.code == 2 and [row['file'] for row in read_csv(csv)][::2] == [
        line.split(': ')[0] for line in whole]
    for line, expected in zip(out.splitlines(), whole, strict=True):  # except for the last digit
        assert re.sub(r'\d%', '', line) == re.sub(r'\d%', '', expected)
    *warnings, last = errors.splitlines()
    assert 'not read: .txt (1)' in warnings.pop(0)
    for warning, name in zip(warnings, ('a/00.jpg', 'b/text.tiff', 'b/z.png'), strict=True):
        assert warning.startswith(f'predict.py: warning: {photos / name}: cannot be read')
    assert last == 'predict.py: error: 3 of 7 images could not be read'


def test_wrong_files_are_one_line_errors(model, photos, tmp_path, monkeypatch, capsys):
    (tmp_path / 'empty').mkdir()
    torch.save(densenet.DenseNet(**NARROW).state_dict(), tmp_path / 'weights.pth')
    monkeypatch.setattr(torch.hub, 'download_url_to_file', raise_no_network)
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    photo, last = photos / 'a/0.png', ['--checkpoint', model]
    for argv, message in (
            ([photo, 'nowhere.jpg', '--checkpoint', 'nowhere.pth'], 'nowhere.jpg: there is no'),
            ([photo, tmp_path / 'empty', *last], 'empty: there is no such file, or no image in it'),
            ([photo, tmp_path / '*.png', *last], '*.png: there is no such file, or no image in it'),
            ([photos / '**/*.txt', *last], 'no image'),
            ([photo], 'one of the arguments --checkpoint --arch is required'),
            ([photo, '--checkpoint', 'nowhere.pth'], 'nowhere.pth is not there'),
            ([photo, '--checkpoint', tmp_path / 'weights.pth'], 'holds no run'),
            ([photo, *last, '--csv', tmp_path / 'nowhere/x.csv'], 'No such file or directory'),
            ([photo, *last, '--heatmap-dir', photo], 'File exists'),
            ([photo, *last, '--batch-size', '0'], '--batch-size'),
            ([photo, *last, '--device', 'abacus'], 'abacus'),
            ([photo, '--arch', 'densenet121'], 'could not download')):
        assert message in fails(capsys, *argv, script=predict, lines=1 + ('--arch' in argv))


@pytest.mark.parametrize('part, values, message', [
    ('dataset', dict(extra=1), "this version of train.py: .* unexpected keyword argument 'extra'"),
    ('config', dict(block_config=(3, 2)), 'does not fit the model: '),
    ('config', dict(growth_rate=10**9), 'does not fit the model: '),
    ('config', dict(drop_rate='x'), 'does not fit the model: '),
    ('model', {'features.norm5.weight': torch.ones(16, dtype=torch.int8)},
     'features.norm5.weight is torch.int8 in the file and torch.float32 here'),
    ('model', {'features.norm5.weight': torch.full((16,), math.nan)},
     'weights that are not finite, the first in features.norm5.weight: ')])
def test_a_checkpoint_of_another_kind_is_one_line(model, photos, tmp_path, capsys, part, values,
                                                  message):
    saved = torch.load(model, weights_only=True)
    saved[part].update(values)
    checkpoint.save(tmp_path / 'x.pth', saved)
    assert re.search(message, fails(capsys, photos / 'b', '--checkpoint', tmp_path / 'x.pth',
                                    script=predict))


def test_a_full_disk_is_a_one_line_error(model, photos, tmp_path, capsys):
    csv, before = tmp_path / 'x.csv', resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        assert 'too large' in fails(capsys, photos / 'b', '--checkpoint', model, '--csv', csv,
                                    script=predict)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_closed_pipe_is_not_an_error(model, photos):
    script = '''
import os, runpy
reading, writing = os.pipe()
os.close(reading)
sys.stdout = open(writing, 'w')
runpy.run_path('predict.py', run_name='__main__')
sys.stdout.flush()  # as Python does at exit
'''
    ended = forked.run(script, [photos / 'b', '--checkpoint', model, '--batch-size', '1',
                                '--device', 'cpu'])
    assert (ended.returncode, ended.stderr) == (0, '')


# ---- heatmaps ------------------------------------------------------------------------------------

def test_the_heat_is_grad_cam_by_autograd(model):
    """On torchvision's network: the gradients of each image's first logit by the last ReLU."""
    weights = torch.load(model, weights_only=True)['model']
    ours = densenet.DenseNet(**NARROW, num_classes=2).double().eval()
    theirs = torchvision.models.DenseNet(**NARROW, num_classes=2).double().eval()
    generator, kept = torch.Generator().manual_seed(0), []
    images = torch.randn(6, 3, 66, 90, dtype=torch.float64, generator=generator)
    theirs.load_state_dict(weights)
    with torch.no_grad():
        weights['classifier.bias'] -= theirs(images).median(0).values  # so that both classes occur
    for network in (ours, theirs):
        network.load_state_dict(weights)
    probabilities, heat = predict.classify(ours, images)

    def keep(module, inputs, maps):
        kept.append(maps.relu())
        return kept[0]  # torchvision's own ReLU leaves it as it is

    theirs.features.register_forward_hook(keep)
    logits = theirs(images)
    assert logits.argmax(1).unique().tolist() == [0, 1]
    maps, = kept
    gradient, = torch.autograd.grad(logits.max(1).values.sum(), maps)
    grad_cam = F.relu((gradient.mean((2, 3), keepdim=True) * maps).sum(1))
    torch.testing.assert_close(probabilities, logits.softmax(1))
    torch.testing.assert_close(heat, grad_cam * maps[0, 0].numel())
    assert heat.count_nonzero() > 0


@pytest.mark.parametrize('width, height', [(300, 200), (121, 340), (50, 50)])
def test_the_heat_map_shows_the_relevant_region(tmp_path, width, height):
    """A spot that is drawn where a cell's heat is shall reach the model in that cell."""
    dataset = datasets.Description('folder', None, ('a',), SIZE, (0.0,) * 3, (1.0,) * 3)
    path = tmp_path / 'image.png'
    rows, columns = torch.arange(height).view(-1, 1), torch.arange(width)
    plain = np.random.RandomState(0).randint(0, 256, (height, width)).astype(np.uint8)
    for cell in ((0, 0), (1, 4), (4, 1), (5, 3)):
        Image.fromarray(plain).save(path)
        heat = torch.zeros(6, 6)
        heat[cell] = 7.5
        picture = np.asarray(predict.draw_heatmap(heat, path, dataset)).astype(int)
        assert picture.shape == (height, width, 3)
        colour = torch.from_numpy(np.ptp(picture, axis=2))
        hot = (colour > 0.8 * colour.max()).double()
        y, x = (((hot * axis).sum() / hot.sum()).item() for axis in (rows, columns))
        radius = min(width, height) / 20
        spot = 255 * torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / radius ** 2)
        Image.fromarray(spot.byte().numpy()).save(path)
        seen = image_files.read_image(path, dataset)[0].double()
        for axis, index in enumerate(cell):
            centre = (seen.sum(1 - axis) * torch.arange(SIZE)).sum() / seen.sum()
            if 0 < index < 5:  # a spot at the edge is cut off
                assert abs(centre - (11 * index + 5)) < 1.5
            else:
                assert centre // 11 == index
        top = round((height - min(width, height) * 224 / 256) / 2)
        assert (picture[:max(0, top - 1)] == plain[:max(0, top - 1), :, None]).all()


def test_a_heat_map_of_zeros_is_drawn(photos):
    dataset = datasets.Description('folder', None, ('a',), SIZE, **datasets.IMAGENET_STATISTICS)
    picture = np.asarray(predict.draw_heatmap(torch.zeros(3, 3), photos / 'a/0.png', dataset))
    assert picture.std() > 0 and (np.ptp(picture, axis=2) <= 2).all()


def test_heat_maps_are_written_beside_the_images_or_into_a_folder(model, photos, tmp_path, capsys):
    (photos / 'a/0.png.heatmap.png').unlink()
    Image.new('RGB', (90, 80)).save(photos / 'a/1.png')
    every = ('a/0.png', 'a/1.jpg', 'a/1.png', 'b/3.PNG', 'b/c/2.png')
    names = {f'{name}.heatmap.png' for name in every}
    found = lambda root: {str(path.relative_to(root)) for path in root.rglob('*.heatmap.png')}
    argv = ['--checkpoint', model]
    for images in ([photos], [photos / 'b', *(photos / name for name in every[:3])]):
        output = tmp_path / f'maps{len(images)}'
        predictions(capsys, *argv, '--heatmap-dir', output, *images)
        assert found(output) == names and found(photos) == set()
    predictions(capsys, *argv, '--heatmap', photos)
    assert found(photos) == names


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'RGBA', 'CMYK', 'I;16', 'F'])
def test_images_of_any_kind(model, tmp_path, capsys, mode):
    saved = torch.load(model, weights_only=True)
    deep = mode in ('I;16', 'F')
    saved['dataset']['value_range'] = (1000.0, 30000.0) if deep else None
    checkpoint.save(tmp_path / 'model.pth', saved)
    ramp = np.linspace(1000, 30000, 90 * 70).reshape(70, 90)
    image = (Image.fromarray(ramp.astype({'I;16': np.uint16, 'F': np.float32}[mode])) if deep else
             Image.fromarray((ramp / 30000 * 255).astype(np.uint8)).convert(mode))
    image.save(tmp_path / 'image.tiff')
    line, = predictions(capsys, tmp_path / 'image.tiff', '--checkpoint', tmp_path / 'model.pth',
                        '--heatmap')
    assert math.isclose(sum(map(float, re.findall(r'([\d.]+)%', line))), 100, abs_tol=0.011)
    with Image.open(tmp_path / 'image.tiff.heatmap.png') as heatmap:
        assert heatmap.mode == 'RGB'
        edge = np.asarray(heatmap)[-4 * 70:, :4 * 90, 0].astype(int)  # enlarged, below the text
    assert edge[0, 0] < 20 and edge[-1, -1] > 235  # outside of the crop: the ramp as it was
