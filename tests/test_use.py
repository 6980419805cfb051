"""Uses of weights: fine-tuning, evaluating, torch.hub, exporting."""

import argparse
import json
import math
import pickle
import re
import sys
import tarfile

import numpy as np
import pytest
import torch
import torchvision
from conftest import (
    ROOT,
    Opener,
    cache_densenet121,
    fails,
    read_csv,
    write_images,
)
from PIL import Image

import densenet
import hubconf
import predict
import train
from attic import to_safetensors
from training import checkpoint, datasets, flags, loaders

pytestmark = pytest.mark.usefixtures('no_figures')

NARROW = dict(growth_rate=4, block_config=(2, 2), num_init_features=8)
NARROW_FLAGS = ['--growth-rate', 4, '--block-config', 2, 2, '--init-features', 8, '--workers', 0,
                '--batch-size', 4, '--device', 'cpu', '--no-plot']


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Dark and bright images of more than 64 pixels: a folder that even a small net learns."""
    root, rng = tmp_path_factory.mktemp('photos'), np.random.RandomState(0)
    for split, count in (('train', 6), ('val', 3)):
        for label, low in (('bright', 150), ('dark', 0)):
            (root / split / label).mkdir(parents=True)
            for i in range(count):
                image = rng.randint(low, low + 100, (80, 90, 3)).astype(np.uint8)
                Image.fromarray(image).save(root / split / label / f'{i}.png')
    return root


@pytest.fixture(scope='module')
def trained(photos, tmp_path_factory):
    run = tmp_path_factory.mktemp('trained')
    train.main([*map(str, ['--dataset', 'folder', '--data', photos, '--image-size', 66,
                           *NARROW_FLAGS, '--epochs', 3, '--lr', 0.02, '--save', run])])
    return run


def run(capsys, *argv, script=train):
    capsys.readouterr()
    script.main(list(map(str, argv)))
    return capsys.readouterr().out.splitlines()


# ---- fine-tuning -----------------------------------------------------------------------------

def torchvisions(path):
    model = torchvision.models.DenseNet(**NARROW)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.running_mean)
    torch.save(model.state_dict(), path)
    return model.state_dict()


@pytest.mark.parametrize('frozen', [True, False])
def test_fine_tuning_from_a_state_dict_of_torchvisions(photos, tmp_path, capsys, frozen):
    theirs = torchvisions(tmp_path / 'theirs.pth')
    argv = ['--dataset', 'folder', '--data', photos, '--image-size', 66, *NARROW_FLAGS, '--epochs',
            2, '--pretrained', tmp_path / 'theirs.pth', '--save', tmp_path / 'run']
    error = fails(capsys, *argv)
    assert 'classifier.weight is [1000, 16] in the file and [2, 16] here' in error
    assert '--reset-classifier' in error
    assert not (tmp_path / 'run').exists()
    train.main([*map(str, argv), '--reset-classifier', *['--freeze-features'] * frozen])
    saved = checkpoint.load(tmp_path / 'run/latest.pth')
    ours = saved['model']
    assert ours['classifier.weight'].shape[0] == 2
    kept = {key: torch.equal(ours[key], theirs[key]) for key in theirs if 'features' in key}
    assert kept and (all(kept.values()) if frozen else not any(
        same for key, same in kept.items() if 'num_batches' not in key))
    assert len(saved['optimizer']['state']) == (2 if frozen else len(list(
        densenet.DenseNet(**NARROW).parameters())))
    before = ours['classifier.weight']
    train.main(['--save', str(tmp_path / 'run'), '--resume', '--epochs', '3', '--device', 'cpu'])
    ours = checkpoint.load(tmp_path / 'run/latest.pth')['model']
    assert not torch.equal(ours['classifier.weight'], before)
    assert torch.equal(ours['features.conv0.weight'], theirs['features.conv0.weight']) == frozen


def test_weights_of_timm_in_three_file_formats(tmp_path, photos, capsys):
    timm = pytest.importorskip('timm', reason='needs timm')
    safetensors = pytest.importorskip('safetensors.torch', reason='needs safetensors')
    model = timm.models.densenet.DenseNet(growth_rate=4, block_config=(2, 2), num_classes=2).eval()
    state = model.state_dict()
    torch.save(state, tmp_path / 'bare.pth')
    torch.save({'epoch': 3, 'arch': 'densenet', 'state_dict': state,
                'args': argparse.Namespace(lr=0.1, model='densenet')}, tmp_path / 'run.pth.tar')
    safetensors.save_file(state, tmp_path / 'model.safetensors')
    truth = None
    for name in ('bare.pth', 'run.pth.tar', 'model.safetensors'):
        line, *_ = run(capsys, '--evaluate', '--pretrained', tmp_path / name, '--dataset', 'folder',
                       '--data', photos, '--image-size', 66, '--save', tmp_path, *NARROW_FLAGS)
        dataset = datasets.describe('folder', photos, 66)
        loader = loaders.make_loader(dataset, 'test', 4, device=torch.device('cpu'))
        truth = truth or train.evaluate(model, loader, torch.autocast('cpu', enabled=False))
        assert line == f'test loss {truth.loss:.4f}, error {truth.error:.2f}%'
    (tmp_path / 'broken.safetensors').write_bytes(b'nothing')
    assert 'broken.safetensors can\'t be read' in fails(
        capsys, '--evaluate', '--pretrained', tmp_path / 'broken.safetensors', '--dataset',
        'folder', '--data', photos, *NARROW_FLAGS)


# ---- evaluating ------------------------------------------------------------------------------

def test_one_crop_or_ten(trained, photos, capsys):
    one, *_ = run(capsys, '--evaluate', '--resume', trained / 'latest.pth', '--device', 'cpu')
    error = float(read_csv(trained / 'test.csv')[-1]['error'])
    assert f'error {error:.2f}%' in one
    ten, *_ = run(capsys, '--evaluate', '--resume', trained / 'latest.pth', '--device', 'cpu',
                  '--ten-crop')
    assert ten.startswith('test loss ') and ten != one


def test_densenet121_at_224_pixels_trains_and_is_tested_on_ten_crops(tmp_path, capsys):
    write_images(tmp_path / 'data', {'train/a': 2, 'train/b': 1, 'val/a': 1}, (80, 90))
    lines = run(capsys, '--dataset', 'imagenet', '--data', tmp_path / 'data', '--arch',
                'densenet121', '--batch-size', 2, '--epochs', 1, '--print-freq', 1, '--ten-crop',
                '--workers', 1, '--device', 'cpu', '--no-plot', '--save', tmp_path / 'run')
    assert re.match(r'densenet121: 6,955,906 parameters; imagenet: 3 training and 1 test images '
                    r'of 224 pixels, 2 classes', lines[0])
    assert [row['epoch'] for row in read_csv(tmp_path / 'run/train.csv')] == ['0.50000', '1.00000']
    assert len(read_csv(tmp_path / 'run/test.csv')) == 1


def test_the_weights_in_the_repository_have_the_error_in_the_results(
        cifar10_jpeg, tmp_path, capsys):
    with tarfile.open(cifar10_jpeg) as tar:
        for member in tar:  # every tenth of the 10,000 test images
            if re.fullmatch(r'test/\w+/\d+0.jpg', member.name):
                tar.extract(member, tmp_path, filter='data')
    said, = re.findall(r'\| DenseNet-BC 40-12 .*?\(../work/densenet-bc-40-12\).*% \| ([\d.]+)% \|',
                       (ROOT / 'attic/results.md').read_text())
    line, *_ = run(capsys, '--evaluate', '--resume', ROOT / 'work/densenet-bc-40-12/best.pth',
                   '--dataset', 'folder', '--data', tmp_path, '--device', 'cpu', '--save', tmp_path)
    error, said = float(line.split('error ')[1].split('%')[0]), float(said)
    assert abs(error - said) < 4 * math.sqrt(said * (100 - said) / 1000)  # four deviations


def test_fine_tuning_says_which_statistics_the_weights_know(recipe, tmp_path, capsys):
    argv = [*recipe, '--epochs', '1']
    train.main([*argv, '--mean', '0.1', '--std', '0.05', '--save', str(tmp_path / 'run')])
    own = [*argv, '--pretrained', str(tmp_path / 'run/best.pth'), '--save']
    capsys.readouterr()
    train.main([*own, str(tmp_path / 'other')])
    assert 'trained with --mean 0.1 0.1 0.1; trained with --std 0.05 0.05 0.05' in (
        capsys.readouterr().out)
    train.main([*own, str(tmp_path / 'same'), '--mean', '0.1', '--std', '0.05'])
    assert 'trained with' not in capsys.readouterr().out


def test_evaluation_needs_no_training_images(trained, photos, tmp_path, capsys):
    truth = run(capsys, '--evaluate', '--resume', trained / 'latest.pth', '--device', 'cpu')
    (tmp_path / 'only').mkdir()
    (tmp_path / 'only/val').symlink_to(photos / 'val')
    found = run(capsys, '--evaluate', '--resume', trained / 'latest.pth', '--device', 'cpu',
                '--data', tmp_path / 'only')
    assert found[:-1] == truth[:-1] and found[-1] == f'{truth[-1]}/on-only'
    write_images(tmp_path / 'other', {'val/bright': 1, 'val/dim': 1}, (70, 70))
    assert 'dark is in only one of them' in fails(
        capsys, '--evaluate', '--resume', trained / 'latest.pth', '--data', tmp_path / 'other')


def test_images_are_normalised_as_in_the_checkpoint(uninterrupted, folder, tmp_path, capsys):
    saved = checkpoint.load(uninterrupted / 'latest.pth')
    saved['dataset'] |= dict(mean=(90.0, 100.0, 110.0), std=(50.0, 60.0, 70.0))
    checkpoint.save(tmp_path / 'other.pth', saved)
    model = densenet.DenseNet(**saved['config'])
    model.load_state_dict(saved['model'])
    dataset = datasets.Description(root=folder, **saved['dataset'])
    loader = loaders.make_loader(dataset, 'test', 4, device=torch.device('cpu'))
    truth = train.evaluate(model, loader, torch.autocast('cpu', enabled=False))
    line, *_ = run(capsys, '--evaluate', '--resume', tmp_path / 'other.pth', '--device', 'cpu')
    assert line.startswith(f'test loss {truth[0]:.4f}, ')
    argv = ['--evaluate', '--pretrained', tmp_path / 'weights.pth', '--dataset', 'folder', '--data',
            folder, '--depth', 10, '--growth-rate', 4, '--device', 'cpu', '--save', tmp_path / 'x']
    torch.save(saved, tmp_path / 'weights.pth')
    assert f'--resume {tmp_path}/weights.pth also takes classes, mean and std' in run(
        capsys, *argv)[0]
    torch.save(saved['model'], tmp_path / 'weights.pth')
    said, line, *_ = run(capsys, *argv)
    assert 'normalized by the mean and std of this data set' in said
    assert not line.startswith(f'test loss {truth[0]:.4f}, ')
    shares = [[value / 255 for value in saved['dataset'][name]] for name in ('mean', 'std')]
    line, *_ = run(capsys, *argv, '--mean', *shares[0], '--std', *shares[1])
    assert line.startswith(f'test loss {truth[0]:.4f}, ')


# ---- hostile files ---------------------------------------------------------------------------

@pytest.mark.filterwarnings('ignore')  # torch has its doubts about the pickle's version
@pytest.mark.parametrize('zipped', [True, False])
def test_untrusted_files_run_no_code(photos, tmp_path, monkeypatch, capsys, zipped):
    harm, file = tmp_path / 'harm', tmp_path / 'bad.pth'
    if zipped:
        checkpoint.save(file, {'model': Opener(harm)})
    else:
        file.write_bytes(pickle.dumps(Opener(harm)))  # as torch wrote its files before 1.6
    cache_densenet121(tmp_path, None, file.read_bytes())
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    training = ['--dataset', 'folder', '--data', photos, '--device', 'cpu', '--save',
                tmp_path / 'run']
    for door in (['--resume', file], ['--pretrained', file], ['--evaluate', '--resume', file],
                 ['--arch', 'densenet121', '--pretrained']):
        fails(capsys, *training, *door)
    for door in (['--checkpoint', file], ['--arch', 'densenet121']):
        fails(capsys, photos / 'val/dark/0.png', *door, script=predict)
    with pytest.raises(Exception, match='Weights only load failed|weights_only'):
        torch.hub.load(str(ROOT), 'densenet121', source='local', pretrained=True)
    assert not harm.exists()
    torch.load(file, weights_only=False) if zipped else pickle.loads(file.read_bytes())
    assert harm.exists()  # elsewhere the same file does it


# ---- in other projects -----------------------------------------------------------------------

def test_the_hub_has_the_networks_from_a_clone(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    for name in ('densenet_cifar', *flags.ARCHITECTURES):
        assert getattr(hubconf, name).__wrapped__ is getattr(densenet, name)
    model = torch.hub.load(str(ROOT), 'densenet_cifar', source='local', depth=22)
    assert sum(p.numel() for p in model.parameters()) == 71_686
    assert not model.training and model.classes is None
    theirs = torchvision.models.densenet121().eval()
    cache_densenet121(tmp_path, theirs)
    ours = torch.hub.load(str(ROOT), 'densenet121', source='local', pretrained=True)
    assert len(ours.classes) == 1000 and ours.classes[1] == 'goldfish'
    assert ours.mean == [0.485, 0.456, 0.406] and ours.std == [0.229, 0.224, 0.225]
    images = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-4, atol=1e-4)
    # The clone need not be on the path, nor be imported already.
    monkeypatch.setattr(sys, 'path', [path for path in sys.path if path not in ('', str(ROOT))])
    monkeypatch.delitem(sys.modules, 'densenet')
    model = torch.hub.load(str(ROOT), 'densenet_cifar', source='local', depth=10, num_classes=7)
    assert model.classifier.out_features == 7
    assert sys.modules.pop('densenet') is not densenet


@pytest.mark.filterwarnings('ignore')  # the exporters warn of their own future
def test_the_readmes_code_loads_and_exports(trained, photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work/flowers').symlink_to(trained)
    (tmp_path / 'photo.jpg').symlink_to(photos / 'val/dark/0.png')
    names = {}
    readme, export = ((ROOT / page).read_text() for page in ('README.md', 'attic/export.md'))
    section = readme.split('Checkpoints load with `weights_only=True`')[1]
    loading, preparing, exporting, hub, _ = re.findall(
        r'```python\n(.*?)```', section.partition('```\n')[0] + '```\n' + export, re.DOTALL)
    exec(loading + preparing, names)
    model, image = names['model'], names['image']
    assert names['saved']['dataset']['classes'][names['label']] == 'dark'
    pytest.importorskip('onnxscript', reason='needs onnxscript, which the ONNX exporter needs')
    onnxruntime = pytest.importorskip('onnxruntime', reason='needs onnxruntime')
    exec(exporting, names)
    batch = torch.randn(5, *image.shape)
    with torch.no_grad():
        truth = model(batch)
    exported = torch.export.load('densenet.pt2').module()
    torch.testing.assert_close(exported(batch), truth, rtol=1e-5, atol=1e-5)
    session = onnxruntime.InferenceSession('densenet.onnx', providers=['CPUExecutionProvider'])
    logits, = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), truth, rtol=1e-4, atol=1e-4)


def test_safetensors_and_config_for_a_hub(trained, tmp_path, monkeypatch):
    safetensors = pytest.importorskip('safetensors.torch', reason='needs safetensors')
    saved = checkpoint.load(trained / 'best.pth')
    model = densenet.DenseNet(**saved['config']).eval()
    model.load_state_dict(saved['model'])
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'work').mkdir()
    (tmp_path / 'work/flowers').symlink_to(trained)
    page = (ROOT / 'attic/export.md').read_text()
    command, = re.findall(r'^    python attic/to_safetensors.py (.*)$', page, re.MULTILINE)
    to_safetensors.main(command.split())
    weights = safetensors.load_file('hub/flowers/model.safetensors')
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    config = json.loads((tmp_path / 'hub/flowers/config.json').read_text())
    assert config['classes'] == ['bright', 'dark'] and config['image_size'] == 66
    assert config['mean'] == [0.485, 0.456, 0.406] and config['std'] == [0.229, 0.224, 0.225]
    pytest.importorskip('huggingface_hub', reason='needs huggingface_hub')
    *_, code, _ = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    names = {'DenseNet': densenet.DenseNet}
    exec(code, names)
    images = torch.randn(2, 3, 66, 66)
    assert torch.equal(names['model'](images), model(images))


def test_the_hub_has_our_trained_network(capsys):
    model = torch.hub.load(str(ROOT), 'densenet_bc_100_12', source='local', pretrained=True)
    saved = checkpoint.load(ROOT / 'work/densenet-bc-100-12/best.pth')
    assert sum(p.numel() for p in model.parameters()) == 769_162
    assert model.classes[-1] == 'truck' and model.mean == [0.485, 0.456, 0.406]
    for key, weight in model.state_dict().items():
        assert torch.equal(weight, saved['model'][key].to(weight.dtype)), key
