"""The heat maps of predict.py; and what tools for heat maps see of our network.

The tools are held against torchvision's network with the same weights. They keep the maps of
`features` by a forward hook. torchvision then rectifies these in place, and the tools have come to
count on it.
"""

import copy
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from conftest import fails, read_csv
from PIL import Image
from torch import nn

import densenet
import predict
from fused_dense_block import fuse
from training import datasets

models = pytest.importorskip('torchvision.models')


@pytest.fixture(scope='module')
def networks():
    """DenseNet-121 in evaluation mode: torchvision's, ours, and ours fused; images."""
    torch.manual_seed(0)
    theirs, ours = models.densenet121(num_classes=10), densenet.densenet121(num_classes=10)
    images = torch.randn(2, 3, 160, 160)
    for norm in (module for module in theirs.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.momentum = 1.0  # the statistics of these images, so that some features are positive
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias, std=0.2)
    with torch.no_grad():
        theirs(images)
    ours.load_state_dict(theirs.state_dict())
    fused = fuse(copy.deepcopy(ours), kernels=False)
    return dict(theirs=theirs.eval(), ours=ours.eval(), fused=fused.eval()), images


def kept_by_hook(module, model, images):
    kept = []
    hook = module.register_forward_hook(lambda module, inputs, output: kept.append(output))
    logits = model(images)
    hook.remove()
    return kept[0].detach(), logits.detach()


@pytest.mark.parametrize('gradients', [True, False])
@pytest.mark.parametrize('name', ['ours', 'fused'])
def test_the_kept_features_are_rectified(networks, name, gradients):
    models, images = networks
    with torch.set_grad_enabled(gradients):
        kept, logits = kept_by_hook(models[name].features, models[name], images)
        truth, expected = kept_by_hook(models['theirs'].features, models['theirs'], images)
    assert kept.min() == 0 and 0 < kept.count_nonzero() < kept.numel()
    torch.testing.assert_close(kept, truth, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('layer', ['features', 'features.norm5'])
@pytest.mark.parametrize('name', ['ours', 'fused'])
def test_full_backward_hooks(networks, name, layer):
    """They make the features a view, in which torchvision's ReLU in place raises."""
    models, images = networks
    model, images = copy.deepcopy(models[name]).double(), images[:1].double()
    parameters = list(model.parameters())
    truth = torch.autograd.grad(model(images)[0, 3], parameters)
    seen = []
    model.get_submodule(layer).register_full_backward_hook(
        lambda module, inputs, outputs: seen.append(outputs[0]))
    x = images.clone().requires_grad_()
    gradients = torch.autograd.grad(model(x)[0, 3], [x, *parameters])[1:]
    torch.testing.assert_close(gradients, truth, rtol=1e-9, atol=1e-12)
    features, _ = kept_by_hook(model.features, model, images)
    expected = model.classifier.weight[3] / features[0, 0].numel()
    expected = expected[:, None, None] * (features > 0)
    torch.testing.assert_close(seen[0], expected.detach())


@pytest.mark.parametrize('layer', ['features', 'features.denseblock4',
                                   'features.denseblock3.denselayer24'])
@pytest.mark.parametrize('name', ['ours', 'fused'])
def test_grad_cam_of_monai(networks, name, layer, monkeypatch):
    visualize = pytest.importorskip('monai.visualize')
    models, images = networks
    # torchvision's own rectifies the features in place, which raises under MONAI's backward hooks.
    theirs = models['theirs']
    monkeypatch.setattr(theirs, 'forward', lambda images: theirs.classifier(
        theirs.features(images).relu().mean((2, 3))))
    truth, heat = (torch.as_tensor(visualize.GradCAM(models[key], layer)(images[:1], class_idx=3))
                   for key in ('theirs', name))
    assert truth.std() > 0.1  # scaled to 0..1
    torch.testing.assert_close(heat, truth, rtol=0, atol=0.01)


# ---- predict.py ---------------------------------------------------------------------------

SIZE, NAMES = 66, ('mass', 'node', 'rib')
INFERNO = (255 * matplotlib.colormaps['inferno'](np.linspace(0, 1, 256))[:, :3]).round()


@pytest.fixture
def scans(tmp_path, monkeypatch):
    """Three images, and a network for them with three labels that may occur together."""
    torch.manual_seed(0)
    model = densenet.DenseNet(growth_rate=4, block_config=(2, 2), num_init_features=8,
                              num_classes=3).eval()
    dataset = SimpleNamespace(name='folder', classes=NAMES, image_size=SIZE, in_memory=False,
                              value_range=None, multi_label=True, **datasets.IMAGENET_STATISTICS)
    monkeypatch.setattr(predict, 'load_model', lambda args: (model, dataset))
    rng = np.random.RandomState(0)
    for i in range(3):
        image = Image.fromarray(rng.randint(0, 256, (80, 80, 3)).astype(np.uint8))
        image.save(tmp_path / f'{i}.png')
    return tmp_path, model


def run(*argv):
    predict.main([*map(str, argv), '--checkpoint', 'x.pth', '--device', 'cpu'])


def test_of_several_labels_each_has_its_probability(scans, capsys):
    folder, model = scans
    run(folder, '--csv', folder / 'x.csv')
    rows, lines = read_csv(folder / 'x.csv'), capsys.readouterr().out.splitlines()
    for i, line in enumerate(lines):
        image = predict.read(predict.load_model(None)[1], [folder / f'{i}.png'])[0][1]
        with torch.no_grad():
            shares = model(torch.from_numpy(image)[None])[0].sigmoid().tolist()
        found = {row['class']: float(row['probability']) for row in rows[3 * i:3 * i + 3]}
        assert found == pytest.approx(dict(zip(NAMES, shares)), abs=2e-6)
        ranked = sorted(found, key=found.get, reverse=True)
        assert list(found) == ranked
        assert [word.split()[0] for word in line.split(': ')[1].split(', ')] == ranked


def test_the_heat_of_a_class_of_choice(scans):
    _, model = scans
    images = torch.randn(2, 3, SIZE, SIZE)
    for label in range(3):
        shares, heat = predict.classify(model, images, label, multi_label=True)
        with torch.no_grad():
            maps = model.features(images).relu()
            cam = (model.classifier.weight[label].view(1, -1, 1, 1) * maps).sum(1)
            logits = cam.mean((1, 2)) + model.classifier.bias[label]
        torch.testing.assert_close(heat, cam.relu(), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(shares[:, label], logits.sigmoid())


def heatmaps(monkeypatch, *argv):
    """Texts, scales, and highest values of the heat maps drawn."""
    seen, draw, annotate = [], predict.draw_heatmap, predict.annotate

    def spy_draw(heat, file, dataset, highest):
        seen.append([highest, heat.max().item()])
        return draw(heat, file, dataset, highest)

    def spy_annotate(picture, text, highest):
        assert highest == seen[-1][0]
        seen[-1].insert(0, text)
        return annotate(picture, text, highest)

    with monkeypatch.context() as patch:
        patch.setattr(predict, 'draw_heatmap', spy_draw)
        patch.setattr(predict, 'annotate', spy_annotate)
        run(*argv)
    return zip(*seen)


def test_scales_and_texts(scans, monkeypatch, capsys):
    folder, _ = scans
    texts, scales, highest = heatmaps(monkeypatch, folder, '--heatmap-dir', folder / 'maps')
    first = [line.split(': ')[1].split()[0] for line in capsys.readouterr().out.splitlines()]
    assert [text.split()[0] for text in texts] == first and scales == highest
    texts, scales, highest = heatmaps(monkeypatch, folder, '--heatmap-dir', folder / 'maps',
                                      '--class', 'rib', '--one-scale')
    assert scales == (max(highest),) * 3 and len({*highest}) == 3
    assert all(text.startswith('rib ') and text.endswith('%') for text in texts)
    assert len(list((folder / 'maps').iterdir())) == 3


def test_wrong_classes_are_one_line(scans, capsys):
    folder, _ = scans
    last = ['--checkpoint', 'x.pth', '--device', 'cpu']
    assert 'the classes are mass, node, rib' in fails(
        capsys, folder, '--heatmap', '--class', 'ribs', *last, script=predict)
    assert 'need --heatmap' in fails(capsys, folder, '--class', 'rib', *last, script=predict)


@pytest.mark.parametrize('size', [(28, 28), (90, 40), (700, 300)])
def test_text_and_colour_bar_lie_beside_the_picture(size):
    picture = Image.effect_noise(size, 90).convert('RGB')
    scale = -(-280 // size[0])
    one, other, empty = (np.asarray(predict.annotate(picture, text, 13.8)).astype(int) for text in (
        'pneumonia 99.9%', 'Gänseblümchen '[:14] + 'x' * 20 + ' 100.0%', ''))
    top, width = len(one) - scale * size[1], scale * size[0]
    large = picture.resize((width, scale * size[1]), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(one[top:, :width], np.asarray(large))
    assert (one[top:] == other[top:]).all() and (empty[:top] == 255).all()
    for text in (one, other):  # drawn, and not cut off
        dark = np.argwhere(text[:top].min(2) < 128)
        assert len(dark) > 50 and dark[:, 0].min() > 0 and dark[:, 0].max() < top - 1
        assert dark[:, 1].max() < one.shape[1] - 2
    bar = one[top:, width:][:, (one[top:, width:] != 255).any(2).mean(0) > 0.99]
    assert bar.shape[1] > 4
    expected = INFERNO[np.linspace(255, 0, len(bar)).round().astype(int)]
    assert np.abs(bar - expected[:, None]).max() <= 6  # a level or two off
