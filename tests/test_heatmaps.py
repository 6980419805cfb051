"""Heat map tools on our network, compared with torchvision's with the same weights.

They keep the maps of `features` by a forward hook. torchvision then rectifies these in place, and
the tools have come to count on it.
"""

import copy

import pytest
import torch
from torch import nn

import densenet
from fused_dense_block import fuse

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


def torchcam_map(model, images, layer):
    methods = pytest.importorskip('torchcam.methods')
    with methods.XGradCAM(model, layer) as extractor:
        return extractor(3, model(images[:1]))[0]


def pytorch_grad_cam_map(model, images, layer):
    grad_cam = pytest.importorskip('pytorch_grad_cam')
    with grad_cam.XGradCAM(model, [model.get_submodule(layer)]) as extractor:
        return torch.from_numpy(extractor(images[:1], [lambda logits: logits[3]]))


@pytest.mark.parametrize('layer', ['features', 'features.denseblock4',
                                   'features.denseblock3.denselayer24'])
@pytest.mark.parametrize('draw', [torchcam_map, pytorch_grad_cam_map])
@pytest.mark.parametrize('name', ['ours', 'fused'])
def test_xgradcam(networks, name, draw, layer):
    models, images = networks
    truth, heat = (draw(models[key], images, layer).flatten() for key in ('theirs', name))
    assert truth.std() > 0.01
    assert torch.corrcoef(torch.stack([truth, heat]))[0, 1] > 0.999
