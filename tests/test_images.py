"""images/: the figures show the numbers that they claim to show."""

import itertools

import numpy as np
import pytest
import torch
from conftest import ROOT, write_images
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Polygon
from PIL import Image

import densenet
import train
from images import dense_block, error_vs_parameters, memory_vs_depth, predictions
from training import checkpoint


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / 'images').mkdir()
    for script in (dense_block, error_vs_parameters, memory_vs_depth):
        monkeypatch.setattr(script, 'ROOT', tmp_path)
    return tmp_path / 'images'


def test_the_dense_block_has_all_connections_and_is_transparent(elsewhere):
    axes = Figure().subplots()
    dense_block.draw_block(axes)
    patches = axes.patches
    # L(L+1)/2 connections into the layers (paper, section 3), one into the transition from each of
    # L+1 groups of maps, and one out of each layer.
    assert sum(isinstance(patch, FancyArrowPatch) for patch in patches) == 15 + 6 + 5
    assert sum(type(patch) is Polygon for patch in patches) == 8 + 5 * 4
    dense_block.main()
    alpha = np.asarray(Image.open(elsewhere / 'dense-block.png'))[..., 3]
    assert alpha[0, 0] == 0 and 0.1 < (alpha == 255).mean() < 0.9


def test_the_errors_of_the_paper_and_of_our_runs(elsewhere, monkeypatch):
    figures = []
    monkeypatch.setattr(error_vs_parameters.plot, 'save_figure',
                        lambda figure, path: figures.append(figure))
    error_vs_parameters.main([str(ROOT / 'work' / name) for name in ('densenet-bc-100-12',
                                                                     'densenet-bc-40-12')])
    cifar10, cifar100 = figures[0].axes
    lines = {line.get_label(): line.get_xydata() for line in cifar10.lines}
    np.testing.assert_allclose(lines['ours: densenet-bc-100-12, JPEG copy, 40 epochs'],
                               [[0.769162, 10.37]])
    np.testing.assert_allclose(lines['DenseNet'], [[1.019722, 5.24], [6.979642, 4.10],
                                                   [27.249082, 3.74]])
    assert len(cifar10.lines) == 5 and len(cifar100.lines) == 3
    figures[0].draw_without_rendering()
    for axes in figures[0].axes:  # no label covers a line or another label
        boxes = [text.get_window_extent() for text in axes.texts]
        assert len(boxes) == 9
        assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes, 2))
        paths = [line.get_path().transformed(line.get_transform()) for line in axes.lines]
        assert not any(path.intersects_bbox(box, filled=False) for path in paths for box in boxes)


def test_memory_against_depth(elsewhere, monkeypatch):
    monkeypatch.setattr(memory_vs_depth, 'DEPTHS', (10, 22))
    figures = []
    monkeypatch.setattr(memory_vs_depth.plot, 'save_figure',
                        lambda figure, path: figures.append((figure, path)))
    memory_vs_depth.main()
    [(figure, path)] = figures
    assert path == elsewhere / 'memory-vs-depth.png'
    curves = {line.get_label(): line.get_ydata().tolist() for line in figure.axes[0].lines}
    for curve in curves.values():
        assert len(curve) == 2 and curve == sorted(curve)
    assert (curves['fused, memory-efficient'][-1] < curves['fused'][-1]
            < curves['checkpointed'][-1] < curves['plain'][-1])


@pytest.mark.usefixtures('no_figures')
def test_predictions_agree_with_the_evaluation(tmp_path, capsys, monkeypatch):
    root = write_images(tmp_path, {f'{split}/{name}': 9 for split in ('train', 'test')
                                   for name in 'ab'}, (8, 8))
    train.main(['--dataset', 'folder', '--data', str(root), '--depth', '10', '--growth-rate', '4',
                '--epochs', '1', '--batch-size', '6', '--no-plot', '--save', str(tmp_path / 'run')])
    seen, titles = {}, []
    draw_images = predictions.draw_images

    def draw(axes, images, labels, probabilities, classes):
        seen.update(axes=axes, images=images, labels=labels, probabilities=probabilities)
        seen['lowest'] = draw_images(axes, images, labels, probabilities, classes)
        return seen['lowest']

    monkeypatch.setattr(predictions, 'draw_images', draw)
    monkeypatch.setattr(Figure, 'suptitle', lambda figure, title, **_: titles.append(title))
    capsys.readouterr()
    train.main(['--evaluate', '--resume', str(tmp_path / 'run/best.pth'), '--data', str(root)])
    error = float(capsys.readouterr().out.partition('error ')[2].partition('%')[0])
    predictions.main([str(tmp_path / 'run/best.pth'), '--data', str(root),
                      '--output', str(tmp_path / 'predictions.png')])
    files = sorted((root / 'test/a').iterdir()) + sorted((root / 'test/b').iterdir())
    pixels = torch.stack([torch.tensor(np.asarray(Image.open(path))) for path in files])
    assert torch.equal(seen['images'].permute(0, 2, 3, 1), pixels)
    answers, labels = seen['probabilities'].argmax(1), torch.tensor([0] * 9 + [1] * 9)
    assert torch.equal(seen['labels'], labels)
    wrong = (answers != labels).double().mean().item()
    assert abs(100 * wrong - error) < 0.01
    assert titles[-1].partition('\n')[0] == (
        f'run: 18 test images of {root.name}, error {error:.2f}%')
    assert Image.open(tmp_path / 'predictions.png').size > (1000, 500)
    wrong_shown = [1.0]
    for label, column in enumerate(seen['axes'].T):
        for row, axis in enumerate(column):
            for image in axis.images:  # of the column's class; right answers in the upper rows
                shown = image.get_array().data
                drawn, = (pixels.numpy() == shown).all((1, 2, 3)).nonzero()[0]
                assert labels[drawn] == label and (answers[drawn] == label) == (row < 3)
                if row >= 3:
                    assert axis.get_xlabel() == 'ab'[answers[drawn]]
                    wrong_shown.append(seen['probabilities'][drawn].max().item())
    assert seen['lowest'] == min(wrong_shown) < 1


def test_predictions_are_only_drawn_for_small_images(tmp_path, capsys):
    model = densenet.DenseNet(4, (1,), 8, num_classes=2)
    dataset = dict(name='folder', classes=('a', 'b'), image_size=224, mean=(0,) * 3, std=(1,) * 3)
    checkpoint.save(tmp_path / 'x.pth', {'config': model.config, 'model': model.state_dict(),
                                         'dataset': dataset})
    with pytest.raises(SystemExit, match='2'):
        predictions.main([str(tmp_path / 'x.pth'), '--data', str(tmp_path)])
    assert capsys.readouterr().err == (
        'predictions.py: error: only for networks for images of up to 64 pixels\n')
