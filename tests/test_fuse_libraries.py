"""`fuse` on the DenseNets of other libraries, each held against that library's own model.

In float64 unless it says otherwise. Libraries that are not installed are skipped.
"""

import copy
import functools
import io
import operator
import statistics

import pytest
import torch
from torch import nn

from fused_dense_block import cpu, fuse, unfuse

CHANNELS_LAST = torch.channels_last
SMALL = dict(growth_rate=4, block_config=(2, 3))


def torchvision_net(full=False, **options):
    models = pytest.importorskip('torchvision.models')
    return models.densenet121() if full else models.DenseNet(
        **SMALL, num_init_features=8, num_classes=5, **options)


def timm_net(full=False, **options):
    timm = pytest.importorskip('timm')
    return timm.create_model('densenet121') if full else timm.models.densenet.DenseNet(
        **SMALL, num_classes=5, **options)


def torchxrayvision_net(full=False, **options):
    models = pytest.importorskip('torchxrayvision').models
    return models.DenseNet(in_channels=3) if full else models.DenseNet(
        **SMALL, num_init_features=8, num_classes=5, in_channels=3, **options)


def smp_net(full=False, **options):
    """A segmentation network with its decoder, or just a small encoder."""
    smp = pytest.importorskip('segmentation_models_pytorch')
    return smp.Unet('densenet121', encoder_weights=None) if full else (
        smp.encoders.densenet.DenseNetEncoder(
            out_channels=None, growth_rate=4, block_config=(2, 1, 1, 2), num_init_features=8,
            **options))


def monai_net(full=False, **options):
    nets = pytest.importorskip('monai.networks.nets')
    settings = dict(spatial_dims=2, in_channels=3, out_channels=5)
    return nets.DenseNet121(**settings) if full else nets.DenseNet(
        **{**settings, **SMALL, 'init_features': 8, **options})


LIBRARIES = {'torchvision': torchvision_net, 'timm': timm_net,
             'torchxrayvision': torchxrayvision_net, 'smp': smp_net, 'monai': monai_net}
every_library = pytest.mark.parametrize('library', LIBRARIES)


def build(library, seed=0, **options):
    """In float64, with norm weights of both signs, and a zero."""
    torch.manual_seed(seed)
    model = LIBRARIES[library](**options).double()
    for norm in norms(model):
        nn.init.uniform_(norm.weight, -1, 1)
        nn.init.zeros_(norm.weight[:1])
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return model


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def make_images(seed=1, shape=(4, 3, 76, 76)):  # transition1 reads maps of 19 x 19 pixels
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, dtype=torch.float64, generator=generator)


def run(model, x):
    """All outputs in one vector; an encoder has several."""
    outputs = model(x)
    return torch.cat([output.flatten() for output in
                      ([outputs] if isinstance(outputs, torch.Tensor) else outputs)])


def step(model, images):
    """Outputs and gradients of a forward and backward pass, by name."""
    model.zero_grad()
    x = images.clone().requires_grad_()
    outputs = run(model, x)
    weights = torch.linspace(-1, 1, len(outputs), dtype=torch.float64).to(outputs)
    (outputs.square() + weights * outputs).sum().backward()
    gradients = {f'gradient of {name}': parameter.grad
                 for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {'outputs': outputs.detach(), 'gradient of images': x.grad, **gradients}


def evaluate(model, images):
    with torch.no_grad():
        return {'evaluation': run(model.eval(), images)}


def train_and_evaluate(model, images):
    """`step`, the state after it, and `evaluate`."""
    results = step(model.train(), images)
    return {**results, **copy.deepcopy(model.state_dict()), **evaluate(model, images)}


def errors(results, truth):
    """Norm of the difference over norm of the truth, by name.

    Over 1e-3 at least: some gradients are zero, and all that is computed is rounding errors.
    """
    assert results.keys() == truth.keys()
    return {name: ((results[name] - value).double().norm()
                   / value.double().norm().clamp_min(1e-3)).item()
            for name, value in truth.items()}


def assert_equal(results, truth, tolerance=1e-10):
    found = errors(results, truth)
    assert not {name: error for name, error in found.items() if not error <= tolerance}


def blocks(model):
    return [module for module in model.modules() if 'denselayer1' in module._modules]


def paths(model):
    """The paths of all blocks, all transitions and `features`, by name without the number."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, 'path'):
            found.setdefault(name.rpartition('.')[2].rstrip('0123456789'), set()).add(module.path)
    return found


def bytes_held(model, images, forward=run):
    """Memory that a forward pass saves for backward, without the model's own, and its result."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward(model, images)
    return sum(saved[address].nbytes() for address in saved.keys() - own), result


# ---- training and evaluation ---------------------------------------------------------------------

@every_library
def test_equals_the_library(library):
    """Two steps with optimizers made before; then `unfuse` gives the classes back."""
    plain, model = build(library), build(library)
    optimizers = [torch.optim.SGD(m.parameters(), lr=1e-3, momentum=0.9) for m in (plain, model)]
    parameters, classes = list(model.parameters()), list(map(type, model.modules()))
    metadata = model.state_dict()._metadata  # the version of each module's keys
    assert fuse(model) is model
    assert all(map(operator.is_, model.parameters(), parameters))
    assert all(map(isinstance, model.modules(), classes))
    assert model.state_dict()._metadata == metadata

    def both(function, *args):
        return [function(m, *args) for m in (model, plain)]

    for seed in range(2):
        assert_equal(*both(step, make_images(seed)))
        for optimizer in optimizers:
            optimizer.step()
    if library == 'smp':  # its encoder calls the modules of the stem and of a transition itself
        assert paths(model) == {'features': {None}, 'denseblock': {'eager'}, 'transition': {None}}
    else:
        assert paths(model) == {'features': {'layers'}, 'denseblock': {'eager'},
                                'transition': {'eager'}}
    assert {block.reason for block in blocks(model)} == {'no kernels for torch.float64'}
    assert_equal(*both(lambda m: m.state_dict()))
    assert_equal(*both(evaluate, make_images()))
    if library != 'smp':
        assert paths(model) == {'features': {'eager'}, 'denseblock': {'layers'},
                                'transition': {'pooled first'}}
    assert_equal(*both(step, make_images()))  # in evaluation mode

    assert list(map(type, unfuse(model).modules())) == classes
    assert_equal(*both(train_and_evaluate, make_images()))


@every_library
def test_the_kernels_are_as_exact_as_the_library(library):
    """In float32 and channels_last: how far from float64 is the median result?"""
    if reason := cpu.unavailable_reason():
        pytest.skip(reason)
    fused, ratios = fuse(build(library)).float().to(memory_format=CHANNELS_LAST), []
    for seed in range(3):
        plain = build(library, seed=seed)
        truth = train_and_evaluate(copy.deepcopy(plain), make_images(seed))
        fused.load_state_dict(plain.state_dict())
        plain.float().to(memory_format=CHANNELS_LAST)
        images = make_images(seed).float().contiguous(memory_format=CHANNELS_LAST)
        fused_error, plain_error = (
            statistics.median(errors(train_and_evaluate(model, images), truth).values())
            for model in (fused, plain))
        assert paths(fused)['denseblock'] == {'kernels'}
        ratios.append(fused_error / plain_error)
    assert statistics.median(ratios) <= 1.1


@pytest.mark.parametrize('library, option', [
    ('torchvision', 'drop_rate'), ('timm', 'proj_drop_rate'), ('torchxrayvision', 'drop_rate'),
    ('smp', 'drop_rate')])
def test_dropout_draws_the_same_masks(library, option):
    plain, model = (build(library, **{option: 0.2}) for _ in range(2))
    results = []
    for m in (fuse(model), plain):
        torch.manual_seed(3)
        results.append(step(m.train(), make_images()))
    assert_equal(*results)
    assert paths(model)['denseblock'] == {'eager'}
    assert_equal(evaluate(model, make_images()), evaluate(plain, make_images()))


@pytest.mark.parametrize('library, when', [('torchvision', 'before'), ('timm', 'before'),
                                           ('timm', 'after')])
def test_memory_efficient(library, when):
    """Saves memory. The library's own recomputation updates norm1 twice, the fused one once."""
    plain = build(library)
    held, _ = bytes_held(fuse(build(library)), make_images())
    model = fuse(build(library, memory_efficient=when == 'before'))
    if when == 'after':
        model.set_grad_checkpointing(True)
    assert_equal(train_and_evaluate(model, make_images()), train_and_evaluate(plain, make_images()))
    assert bytes_held(model.train(), make_images())[0] < 0.8 * held
    assert paths(model)['denseblock'] == {'eager'}


def test_some_parameters_are_frozen():
    plain, model = build('torchvision'), fuse(build('torchvision'))
    for m in (plain, model):
        for name, parameter in m.named_parameters():
            parameter.requires_grad_('denseblock2.denselayer1' in name)
    assert_equal(train_and_evaluate(model, make_images()), train_and_evaluate(plain, make_images()))


# ---- DenseNet-121 --------------------------------------------------------------------------------

@every_library
def test_densenet121(library):
    """Full width and depth, and the memory that they hold; takes seconds."""
    plain, images = build(library, full=True), make_images(shape=(2, 3, 64, 64))
    model = fuse(copy.deepcopy(plain), kernels=False)
    held, results = bytes_held(model, images, step)
    plain_held, truth = bytes_held(plain, images, step)
    assert_equal(results, truth)
    assert paths(model)['denseblock'] == {'eager'}
    # smp: the decoder's too, and the encoder calls the modules of a transition itself.
    assert held <= plain_held * (0.5 if library == 'smp' else 0.25)


def test_a_quarter_of_the_memory():
    """Seconds: torchvision's DenseNet-121 in float32 and channels_last, images of 224 pixels."""
    if reason := cpu.unavailable_reason():
        pytest.skip(reason)
    model = torchvision_net(full=True).to(memory_format=CHANNELS_LAST)
    images = torch.randn(2, 3, 224, 224).contiguous(memory_format=CHANNELS_LAST)
    plain_held, _ = bytes_held(model, images)
    held, _ = bytes_held(fuse(model), images)
    assert held <= 0.25 * plain_held
    assert paths(model)['denseblock'] == paths(model)['transition'] == {'kernels'}


# ---- refused -------------------------------------------------------------------------------------

def frozen_timm_net():
    return pytest.importorskip('timm').layers.freeze_batch_norm_2d(timm_net())


def frozen_torchvision_net():
    frozen_norm = pytest.importorskip('torchvision.ops').FrozenBatchNorm2d
    net = torchvision_net()
    net.features.denseblock2.denselayer3.norm2 = frozen_norm(16)
    return net


def monai_ahnet():
    return pytest.importorskip('monai.networks.nets').AHNet(
        spatial_dims=2, layers=(1, 1, 1, 1), psp_block_num=0, upsample_mode='bilinear')


def resnet():
    return pytest.importorskip('torchvision.models').resnet18()


@pytest.mark.parametrize('make, message', [
    (functools.partial(monai_net, dropout_prob=0.2),
     'features.denseblock1.denselayer1.layers has the children .*, dropout '),
    (functools.partial(monai_net, spatial_dims=3),
     'features.denseblock1.denselayer1.layers.norm1 is a BatchNorm3d'),
    (functools.partial(monai_net, act='prelu'),
     'features.denseblock1.denselayer1.layers.relu1 is a PReLU'),
    (monai_ahnet, 'dense0.denselayer1 has the children bn1, '),
    (functools.partial(timm_net, act_layer='silu'),
     'features.denseblock1.denselayer1.norm1.act is a SiLU'),
    (frozen_timm_net, 'features.denseblock1.denselayer1'),
    (frozen_torchvision_net, 'features.denseblock2.denselayer3.norm2 is a FrozenBatchNorm2d'),
    (resnet, 'this ResNet has no dense block')],
    ids=['monai dropout', 'monai 3D', 'monai prelu', 'monai ahnet', 'timm silu', 'timm frozen',
         'torchvision frozen', 'resnet'])
def test_refused_by_name(make, message):
    model = make()
    classes, state = list(map(type, model.modules())), copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=f'not fused: {message}'):
        fuse(model)
    assert list(map(type, model.modules())) == classes
    assert_equal(model.state_dict(), state, tolerance=0)


@pytest.mark.parametrize('stem_only', [True, False])
def test_blur_pooling_stays(stem_only):
    """In the stem as in timm's densenetblur121d, or in the transitions as well."""
    blur = pytest.importorskip('timm').layers.BlurPool2d
    plain, model = (build('timm', stem_type='deep', aa_layer=blur, aa_stem_only=stem_only)
                    for _ in range(2))
    fuse(model)
    assert_equal(train_and_evaluate(model, make_images()), train_and_evaluate(plain, make_images()))
    assert paths(model).keys() == ({'denseblock', 'transition'} if stem_only else {'denseblock'})


# ---- changed afterwards --------------------------------------------------------------------------

@every_library
def test_norms_in_evaluation_mode(library):
    plain, model = build(library), fuse(build(library))
    for m in (plain, model):
        m.train()
        for norm in norms(m):
            norm.eval()
    assert_equal(step(model, make_images()), step(plain, make_images()))
    assert paths(model)['denseblock'] == {'layers'}
    assert all('norm1.training is not True' in block.reason for block in blocks(model))


@every_library
def test_hooks_are_called(library):
    """Once in each pass: of a block, set before, and of a layer, set afterwards."""
    plain, model, calls = build(library), build(library), []
    truth, evaluation = step(plain, make_images()), evaluate(plain, make_images())
    model.load_state_dict(plain.state_dict())
    block = model.features.denseblock1
    block.register_forward_pre_hook(lambda *_: calls.append('pre'))
    block.register_forward_hook(lambda *_: calls.append('block'))
    block.register_full_backward_hook(lambda *_: calls.append('backward'))
    fuse(model)
    assert_equal(step(model, make_images()), truth)
    assert calls == ['pre', 'block', 'backward'] and block.path == 'eager'

    hook = block.denselayer2.register_forward_hook(lambda *_: calls.append('layer'))
    calls.clear()
    assert_equal(step(model, make_images()), truth)
    assert calls == ['pre', 'layer', 'block', 'backward']
    assert (block.path, block.reason) == ('layers', 'denselayer2 has hooks or a forward of its own')
    assert model.features.denseblock2.path == 'eager'
    model.load_state_dict(plain.state_dict())
    calls.clear()
    assert_equal(evaluate(model, make_images()), evaluation)
    assert calls == ['pre', 'layer', 'block']

    hook.remove()
    assert_equal(step(model.train(), make_images()), truth)
    assert block.path == 'eager'


# ---- other ways to use a network -----------------------------------------------------------------

def test_timm_intermediate_features():
    models = pytest.importorskip('timm').models
    plain, model = build('timm'), fuse(build('timm'))
    for training in (True, False) if hasattr(plain, 'forward_intermediates') else ():
        results, truth = (m.train(training).forward_intermediates(make_images())[1]
                          for m in (model, plain))
        torch.testing.assert_close(results, truth, rtol=1e-10, atol=1e-10)
    # as create_model(..., features_only=True)
    plain, model = (models.FeatureListNet(build('timm'), (0, 1, 2), flatten_sequential=True)
                    for _ in range(2))
    fuse(model)
    assert_equal(train_and_evaluate(model, make_images()), train_and_evaluate(plain, make_images()))
    assert paths(model)['features_denseblock'] == {'layers'}


@pytest.mark.parametrize('library', ['torchvision', 'timm'])
def test_a_slice_of_the_features(library):
    """nn.Sequential makes it from its own class; this is also how timm prunes a network."""
    plain, model = build(library).features[:-1], fuse(build(library)).features[:-1]
    assert_equal(train_and_evaluate(model, make_images()), train_and_evaluate(plain, make_images()))
    fuse(model)
    assert_equal(train_and_evaluate(model, make_images()), train_and_evaluate(plain, make_images()))
    assert list(map(type, unfuse(model).modules())) == list(map(type, plain.modules()))


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, save_and_load])
def test_copies_are_fused(duplicate):
    plain, model = build('torchvision'), fuse(build('torchvision'))
    step(model, make_images())  # so that it has plans
    model.load_state_dict(plain.state_dict())
    twin, truth = duplicate(model), step(plain, make_images())
    for m in (twin, model):
        assert_equal(step(m, make_images()), truth)
        assert paths(m)['denseblock'] == {'eager'}
    assert list(map(type, unfuse(twin).modules())) == list(map(type, plain.modules()))


def extract_features(model):
    feature_extraction = pytest.importorskip('torchvision.models.feature_extraction')
    extractor = feature_extraction.create_feature_extractor(
        model, ['features.denseblock1', 'features.transition1', 'features.norm5'])
    return lambda x: list(extractor(x).values())


@pytest.mark.filterwarnings('ignore:.*torch.jit')  # deprecated, and still in use
@pytest.mark.parametrize('library', ['torchvision', 'timm'])
@pytest.mark.parametrize('record', [torch.jit.script, torch.fx.symbolic_trace, extract_features])
def test_scripted_and_traced(record, library):
    plain, model = build(library).eval(), fuse(build(library)).eval()
    truth = evaluate(plain, make_images())
    assert_equal(evaluate(model, make_images()), truth)
    if record is extract_features:
        truth = {'evaluation': run(record(plain), make_images())}
    assert_equal({'evaluation': run(record(model), make_images())}, truth)
