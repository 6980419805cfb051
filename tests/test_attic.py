"""The scripts of attic/: they run, and the checks notice errors made on purpose."""

import json
import re

import numpy as np
import pytest
import torch
import torchvision
from conftest import write_images
from PIL import Image

import densenet
import predict
import train
from attic import (
    channel_stats,
    clean_checkpoint,
    compare_grads,
    feature_reuse,
    numcheck_grads,
    summarize_folds,
)
from fused_dense_block import eager, fuse
from training import checkpoint


def test_gradients_agree_with_finite_differences(monkeypatch, capsys):
    # The script also has the plain blocks, and those that save more (tests/test_fuse.py).
    cases = [(name, module) for name, module in numcheck_grads.cases()
             if not name.endswith((', plain', ', fused'))]
    monkeypatch.setattr(numcheck_grads, 'cases', lambda: cases)
    numcheck_grads.main([])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == len(cases) == 6
    for row in rows:
        assert int(re.search(r'(\d+) gradients agree$', row)[1]) > 50, row


def spoil_backward(monkeypatch, which, factor):
    """Have the hand-written backward of all blocks return a gradient that is off by a factor."""
    backward = eager.norm_relu_conv_backward

    def wrong(*args, **kwargs):
        grad, pending, parameters = backward(*args, **kwargs)
        gradients = [grad, *parameters]
        gradients[which] = gradients[which] * factor
        return gradients[0], pending, gradients[1:]

    monkeypatch.setattr(eager, 'norm_relu_conv_backward', wrong)


@pytest.mark.parametrize('which', [0, 3])  # of the maps, of the convolution
def test_finite_differences_notice_a_wrong_backward(which, monkeypatch):
    cases = [case for case in numcheck_grads.cases() if case[0] == 'dense block, fused']
    monkeypatch.setattr(numcheck_grads, 'cases', lambda: cases)
    spoil_backward(monkeypatch, which, 1 + 1e-4)
    with pytest.raises(SystemExit) as exit_:
        numcheck_grads.main([])
    assert exit_.value.code.startswith('wrong: dense block, fused: ')


def test_hidden_states_and_gradients_equal_torchvision(capsys):
    compare_grads.main(['--memory-efficient'])  # without it: test_a_wrong_gradient_is_noticed
    _, _, *rows, last = capsys.readouterr().out.splitlines()
    theirs = torchvision.models.densenet121(weights=None)
    layers = [name for name, module in theirs.named_modules()
              if type(module).__name__ == '_DenseLayer']
    assert [row.split()[0] for row in rows if 'denselayer' in row] == \
        layers
    assert len(rows) == 4 + len(layers) + 3 + 2
    assert last.startswith('dense blocks: eager; ') and float(last.split()[-1]) < 1e-10


def test_a_wrong_gradient_is_noticed(monkeypatch):
    def fuse_and_spoil(model):  # which fuse would notice itself
        fuse(model)
        spoil_backward(monkeypatch, 1, 1 + 1e-6)

    monkeypatch.setattr(compare_grads, 'fuse', fuse_and_spoil)
    with pytest.raises(SystemExit) as exit_:
        compare_grads.main([])
    assert exit_.value.code == 1


@pytest.mark.parametrize('size', [(32, 32), (300, 260)])
def test_channel_statistics_agree_with_numpy(size, tmp_path, capsys):
    root = write_images(tmp_path, {f'{split}/{label}': 3 for split in ('train', 'val')
                                   for label in 'ab'}, size)
    channel_stats.main(['--dataset', 'folder', '--data', str(root)])
    rows = [[float(value) for value in line.split()[-3:]]
            for line in capsys.readouterr().out.splitlines()[1:4]]
    images = []
    for path in sorted((root / 'train').glob('*/*.png')):
        image = Image.open(path)
        if size != (32, 32):  # as for testing
            image = torchvision.transforms.functional.resize(image, 256)
            image = torchvision.transforms.functional.center_crop(image, 224)
        images.append(np.asarray(image, dtype=np.float64))
    images = np.stack(images)
    expected = [images.mean((0, 1, 2)), images.std((0, 1, 2)), images.std((1, 2)).mean(0)]
    np.testing.assert_allclose(rows, expected, atol=6e-4)


def test_channel_statistics_leave_out_what_train_py_holds_out(tmp_path, capsys):
    write_images(tmp_path, {'a': 20, 'b': 10}, (8, 8))
    channel_stats.main(['--dataset', 'folder', '--data', str(tmp_path), '--val-split', '0.2'])
    assert ': 24 training images of 8 pixels' in capsys.readouterr().out


def test_missing_data_are_a_one_line_error(tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_:
        channel_stats.main(['--dataset', 'imagenet', '--data', str(tmp_path)])
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith('channel_stats.py: error: no train in ')
    assert error.count('\n') == 1


@pytest.fixture(scope='module')
def training(tmp_path_factory):
    """Flags of a run of one epoch with 400 test images."""
    root = write_images(tmp_path_factory.mktemp('images'), {
        'train/a': 20, 'train/b': 20, 'val/a': 200, 'val/b': 200}, (8, 8))
    return ['--dataset', 'folder', '--data', str(root), '--depth', '10', '--growth-rate', '4',
            '--epochs', '1', '--batch-size', '20', '--device', 'cpu', '--no-plot']


@pytest.fixture(scope='module')
def cleaned(training, tmp_path_factory):
    """A checkpoint, and its cleaned copy, alone in another directory."""
    run = tmp_path_factory.mktemp('run')
    train.main([*training, '--save', str(run)])
    output = tmp_path_factory.mktemp('cleaned') / 'best.pth'
    clean_checkpoint.main([str(run / 'best.pth'), '--output', str(output)])
    return run / 'best.pth', output


@pytest.mark.usefixtures('no_figures')
def test_a_cleaned_checkpoint_is_used_as_before(training, cleaned, tmp_path, capsys):
    logits, best = [], str(cleaned[1])
    before = checkpoint.load(cleaned[0])
    for saved in map(checkpoint.load, cleaned):
        model = densenet.DenseNet(**saved['config']).eval()
        model.load_state_dict(saved['model'])
        torch.manual_seed(0)
        logits.append(model(torch.randn(50, 3, 8, 8)))
    torch.testing.assert_close(*logits, rtol=0, atol=0.01 * logits[0].std().item())
    train.main(['--evaluate', '--resume', best, '--device', 'cpu'])
    error = float(capsys.readouterr().out.split('error ')[1].split('%')[0])
    assert abs(error - before['best_error']) < 0.6  # 2 images of 400
    Image.new('RGB', (40, 30)).save(tmp_path / 'image.png')
    predict.main(['--checkpoint', best, '--device', 'cpu', str(tmp_path / 'image.png')])
    assert capsys.readouterr().out.startswith(f'{tmp_path / "image.png"}: ')
    train.main([*training, '--lr', '1e-9', '--pretrained', best, '--save', str(tmp_path / 'tuned')])
    tuned = checkpoint.load(tmp_path / 'tuned/latest.pth')['model']['classifier.weight']
    torch.testing.assert_close(tuned, before['model']['classifier.weight'], rtol=1e-3, atol=1e-4)


def test_a_cleaned_checkpoint_is_small_and_keeps_statistics(cleaned):
    before, after = map(checkpoint.load, cleaned)
    assert not {'optimizer', 'processes', 'scaler'} & after.keys()
    sizes = [path.stat().st_size for path in cleaned]
    assert sizes[1] < 0.5 * sizes[0]
    for key, tensor in after['model'].items():
        if key.endswith(('running_mean', 'running_var', 'num_batches_tracked')):
            assert torch.equal(tensor, before['model'][key]), key
        else:
            assert tensor.dtype == torch.float16, key


def test_a_cleaned_checkpoint_cannot_be_resumed(cleaned, tmp_path, capsys):
    best = cleaned[1]
    for directory in (best.parent, tmp_path / 'other'):
        with pytest.raises(SystemExit) as exit_:
            train.cli(['--resume', str(best), '--epochs', '2', '--save', str(directory),
                       '--device', 'cpu'])
        assert exit_.value.code == 2
        assert capsys.readouterr().err == (f'train.py: error: {best} holds only weights: '
                                           f'--pretrained {best} starts training from them\n')
    assert not (best.parent / 'latest.pth').exists() and not (tmp_path / 'other').exists()


@pytest.mark.parametrize('content, reason', [
    (None, 'is not there'), ({}, 'is not a checkpoint of a run')])
def test_files_that_cannot_be_cleaned_are_a_one_line_error(content, reason, tmp_path, capsys):
    path = tmp_path / 'x.pth'
    if content is not None:
        checkpoint.save(path, content)
    with pytest.raises(SystemExit) as exit_:
        clean_checkpoint.main([str(path), '--output', str(tmp_path / 'y.pth')])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert error.startswith(f'clean_checkpoint.py: error: {path} {reason}')
    assert error.count('\n') == 1 and not (tmp_path / 'y.pth').exists()


def test_cleaning_does_not_overwrite_a_file(cleaned, tmp_path, capsys):
    (tmp_path / 'y.pth').write_text('kept')
    with pytest.raises(SystemExit) as exit_:
        clean_checkpoint.main([str(cleaned[0]), '--output', str(tmp_path / 'y.pth')])
    assert exit_.value.code == 2 and 'name another file' in capsys.readouterr().err
    assert (tmp_path / 'y.pth').read_text() == 'kept'


def test_feature_reuse_is_the_mean_weight_of_each_layer_on_each_source(tmp_path, capsys):
    model = densenet.densenet_cifar(22, 4)
    blocks = [module for module in model.modules() if isinstance(module, densenet.DenseBlock)]
    readers = [[*(layer.conv1.weight for layer in block.values()), follows] for block, follows in
               zip(blocks, (model.features.transition1.conv.weight,
                            model.features.transition2.conv.weight, model.classifier.weight))]
    with torch.no_grad():
        for i, weights in enumerate(readers):
            first = blocks[i].denselayer1.conv1.in_channels
            for reader, weight in enumerate(weights):
                for channel in range(weight.shape[1]):  # 100 reader + source, signs mixed
                    source = 0 if channel < first else 1 + (channel - first) // 4
                    weight[:, channel] = (100 * reader + source) * (-1) ** channel
    for reuse in feature_reuse.block_reuse(model):
        expected = torch.arange(4) + 100 * torch.arange(4)[:, None]  # [reader, source]
        expected = expected.float().tril().T.contiguous()
        expected[torch.ones(4, 4).tril(-1).bool()] = torch.nan
        torch.testing.assert_close(reuse, expected, equal_nan=True)
    dataset = dict(name='cifar10', classes=tuple('abcdefghij'), image_size=32, mean=(0.0,) * 3,
                   std=(1.0,) * 3)
    checkpoint.save(tmp_path / 'best.pth', {'config': model.config, 'model': model.state_dict(),
                                            'dataset': dataset})
    feature_reuse.main([str(tmp_path / 'best.pth'), '--output', str(tmp_path / 'reuse.png')])
    assert len(capsys.readouterr().out.splitlines()) == 5 and (tmp_path / 'reuse.png').exists()
    with pytest.raises(SystemExit, match='2'):
        feature_reuse.main([str(tmp_path / 'nowhere.pth')])
    assert 'is not there' in capsys.readouterr().err


# ---- folds -----------------------------------------------------------------------------------

def write_fold(directory, fold, error, **flags):
    directory.mkdir()
    flags = {'dataset': 'folder', 'data': 'x', 'seed': 1, 'fold': fold, 'epochs': 2,
             'growth_rate': 12, **flags}
    (directory / 'args.json').write_text(json.dumps({'args': flags}))
    (directory / 'test.csv').write_text(f'epoch,error,auc\n1,50,0.5\n2,{error},nan\n')
    return str(directory)


def test_folds_are_summarized(tmp_path, capsys):
    runs = [write_fold(tmp_path / f'{i}', f'{i}/3', 10 * i, data=f'{"../" * i}x/')
            for i in (1, 2, 3)]
    (tmp_path / '2/test.csv').write_text('epoch,error,auc\n2,20,0.7\n')
    summarize_folds.main(runs)
    said = capsys.readouterr().out
    assert re.search(r'error +20 \+- 10   \(10, 20, 30\)', said)
    assert re.search(r'auc +undefined in some runs   \(nan, 0.7, nan\)', said)


def test_an_unfinished_fold_is_refused(tmp_path, capsys):
    runs = [write_fold(tmp_path / f'{i}', f'{i}/2', 10, epochs=epochs)
            for i, epochs in ((1, 300), (2, 300))]
    with pytest.raises(SystemExit):
        summarize_folds.main(runs)
    assert 'has done 2 of 300 epochs: --resume goes on' in capsys.readouterr().err
    runs = [write_fold(tmp_path / f'stopped {i}', f'{i}/2', 10, epochs=300, patience=1)
            for i in (1, 2)]
    summarize_folds.main(runs)


@pytest.mark.parametrize('flags, content, message', [
    (dict(fold='1/3'), None, '--fold 1/3, 1/3'), (dict(fold=None), None, '--fold 1/3, None'),
    (dict(fold='2/5'), None, '--fold 1/3, 2/5'),
    (dict(seed=7), None, '--seed is 1, 7'), (dict(data='y'), None, '--data is x, y'),
    (dict(growth_rate=24), None, 'these runs differ in --growth-rate: 12, 24'),
    (dict(epochs=3), None, 'differ in --epochs'),
    ({}, 'epoch;error\n1;5\n', 'test.csv is not as train.py has written it'),
    ({}, 'epoch,error,auc\n2,20,0.7\n,,\n', 'test.csv is not as train.py has written it')])
def test_runs_that_are_not_folds_of_one_division(tmp_path, capsys, flags, content, message):
    runs = [write_fold(tmp_path / 'a', '1/3', 10),
            write_fold(tmp_path / 'b', **{'fold': '2/3', 'error': 20, **flags})]
    if content:
        (tmp_path / 'b/test.csv').write_text(content)
    with pytest.raises(SystemExit) as exit:
        summarize_folds.main(runs)
    [line] = capsys.readouterr().err.splitlines()
    assert exit.value.code == 2 and line.startswith('summarize_folds.py: error: ')
    assert message in line
