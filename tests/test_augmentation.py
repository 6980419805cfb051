"""Augmentation of images and of batches, averages of the weights, and what fine-tuning changes."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from conftest import fails, parse_flags, read_csv, write_images
from forked import run_interrupted
from PIL import Image

import train
from training import checkpoint, datasets, loaders
from training.augmentation import Augmentation
from training.averages import WeightAverages

pytestmark = pytest.mark.usefixtures('no_figures')

CPU = torch.device('cpu')
ALL = ['--ema', '0.9', '--mixup', '0.4', '--cutmix', '1', '--random-erasing', '0.5',
       '--auto-augment', 'trivialaugment', '--head-lr', '0.1', '--fold', '1/3']


def rng(seed=0):
    return np.random.default_rng(seed)


# ---- images and batches ----------------------------------------------------------------------

@pytest.mark.parametrize('multi_label', [False, True])
@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_mixed_labels_say_how_much_of_each_image_there_is(kind, multi_label):
    """Image i has the value 2**i, so that what is mixed can be read off."""
    n, shares = 5, []
    images = (2.0 ** torch.arange(n)).view(n, 1, 1, 1).expand(n, 3, 20, 16)
    labels = torch.tensor([3, 0, 2, 1, -100])
    if multi_label:
        labels = torch.tensor([[1., 0], [0, math.nan], [1, 1], [0, 0], [1, math.nan]])
    for seed in range(50):
        mixed, soft = Augmentation(**{kind: 0.5}).mix(images, labels, 4, rng(seed))
        assert torch.equal(mixed[4], images[4])
        for i, partner in ((0, 1), (1, 0), (2, 3), (3, 2)):
            own = (mixed[i].mean().item() - 2**partner) / (2**i - 2**partner)
            if kind == 'cutmix':
                assert set(mixed[i].unique().tolist()) <= {2.0**i, 2.0**partner}
            if multi_label:
                expected = own * labels[i] + (1 - own) * labels[partner]
            else:
                expected = torch.zeros(4)
                expected[labels[i]] += own
                expected[labels[partner]] += 1 - own
            torch.testing.assert_close(soft[i], expected, atol=1e-5, rtol=0, equal_nan=True)
        shares.append(own)
        if not multi_label:
            assert soft[4].tolist() == [0] * 4  # no label
    assert 0 <= min(shares) < 0.3 and 0.7 < max(shares) <= 1.00001


@pytest.mark.parametrize('processes', [2, 3, 4])
def test_the_shards_of_a_batch_are_mixed_as_the_whole(processes):
    """13 images in batches of 6: shards of unequal sizes and, in the last batch, empty ones."""
    images, labels = torch.randint(256, (13, 3, 6, 6)).byte(), torch.arange(13) % 3

    def batches(rank, processes):
        loader = loaders.MemoryLoader(
            images, labels, 6, mean=(9,) * 3, std=(5,) * 3, device=CPU, shuffle=True, num_classes=3,
            shard=(rank, processes), augmentation=Augmentation(mixup=1, cutmix=1))
        return list(loader)

    shards = zip(*(batches(rank, processes) for rank in range(processes)), strict=True)
    for whole, parts in zip(batches(0, 1), shards, strict=True):
        real = [part for part in parts if part[1].is_floating_point()]
        for one, others in zip(whole, zip(*real)):
            assert torch.equal(one, torch.cat(others))
        assert all(label.tolist() == [loaders.NO_LABEL] for _, label in parts
                   if not label.is_floating_point())


@pytest.mark.parametrize('size', [8, 66])
def test_augmented_epochs_depend_on_seed_and_epoch_alone(tmp_path, size):
    root = write_images(tmp_path, {f'{split}/{c}': 6 for split in ('train', 'val') for c in 'ab'},
                        (70, 70))
    dataset = datasets.describe('folder', root, size)

    def epoch(number, workers=0, start=0, **options):
        loader = loaders.make_loader(
            dataset, 'train', 4, device=CPU, workers=workers, **options,
            augmentation=Augmentation(auto_augment='randaugment', random_erasing=0.9, mixup=1))
        loader.set_epoch(number, start)
        return list(loader)

    state = torch.get_rng_state()
    first = epoch(2)
    for other in (epoch(2, workers=2 * (size > 64)), [None, *epoch(2, start=1)]):
        for one, two in zip(first, other):
            assert two is None or all(torch.equal(a, b) for a, b in zip(one, two))
    assert torch.equal(torch.get_rng_state(), state)  # dropout's numbers are left alone
    assert not torch.equal(first[0][0], epoch(3)[0][0])
    assert not torch.equal(first[0][0], epoch(2, seed=2)[0][0])


def test_workers_that_are_not_forked_augment_alike():
    augment = Augmentation(auto_augment='trivialaugment', random_erasing=1.0).of_image((9, 9, 9))
    results, image = [], torch.randint(256, (3, 20, 20), dtype=torch.uint8)
    for each in (augment, pickle.loads(pickle.dumps(augment))):
        torch.manual_seed(0)
        results.append(each(image))
    assert torch.equal(*results) and not torch.equal(results[0], image)


def test_erased_regions_have_the_mean_colour():
    mean = (30.0, 60.0, 90.0)
    augment = Augmentation(random_erasing=1).of_image(mean)
    torch.manual_seed(0)
    image = torch.full((3, 20, 20), 200, dtype=torch.uint8)
    for erased in (augment(image).float(), 255 * augment(image / 255)):
        colours = {tuple(pixel) for pixel in erased.round().flatten(1).T.tolist()}
        assert colours == {(200,) * 3, mean}


@pytest.mark.parametrize('given, mirrors, jitters', [
    ('', True, True), ('--no-mirror', False, True), ('--no-color-jitter', True, False),
    ('--no-mirror --no-color-jitter', False, False)])
def test_mirror_and_color_jitter_are_switched_off_independently(tmp_path, given, mirrors, jitters):
    augmentation = Augmentation.of_flags(parse_flags(given.split()))
    ramp = np.arange(64, 192, dtype=np.uint8)  # from left to right, the same in all colours
    dataset = datasets.describe(
        'folder', write_images(tmp_path, {'train/a': 1, 'train/b': 1, 'val/a': 1}, (66, 66)), 66)
    transform = loaders.image_transforms.train_transform(dataset, augmentation)
    torch.manual_seed(0)
    views = torch.stack([transform(Image.fromarray(np.tile(ramp, (128, 1))).convert('RGB'))
                         for _ in range(20)]).int()
    assert (views.diff(dim=-1) < 0).any() == mirrors
    assert (views.diff(dim=1) != 0).any() == jitters  # jitter, and lighting
    numbers = torch.arange(64, dtype=torch.uint8).expand(16, 3, 1, 64)
    loader = loaders.MemoryLoader(numbers, torch.zeros(16, dtype=torch.int64), 16, mean=(0,),
                                  std=(1,), device=CPU, augmentation=augmentation)
    images, _ = next(iter(loader))
    assert (images[:, 0, :, 10:50].diff(dim=-1) < 0).any() == mirrors


# ---- averages --------------------------------------------------------------------------------

def test_averages_are_a_loop_over_the_weights():
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 1), torch.nn.BatchNorm2d(2))
    averages = WeightAverages(model, 0.7)
    expected = copy.deepcopy(model.state_dict())
    for step in range(1, 40):
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1) if tensor.dtype == torch.int64 else tensor.normal_()
        averages.update()
        decay = min(0.7, (1 + step) / (10 + step))
        for name, tensor in model.state_dict().items():
            expected[name] = (tensor.clone() if tensor.dtype == torch.int64 else
                              decay * expected[name] + (1 - decay) * tensor)
    torch.testing.assert_close(averages.state_dict(), expected)
    before = copy.deepcopy(model.state_dict())
    with averages.in_use():
        torch.testing.assert_close(model.state_dict(), expected)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_a_run_with_everything_resumes_bit_for_bit(recipe, tmp_path, capsys):
    whole, stopped = tmp_path / 'whole', tmp_path / 'stopped'
    data = write_images(tmp_path / 'data', {f'train/{c}': 9 for c in 'abcd'}, (8, 8))
    argv = [*recipe, *ALL, '--data', str(data), '--batch-size', '2']
    train.main([*argv, '--save', str(whole)])
    assert run_interrupted([*argv, '--save', stopped], 'set_learning_rate', 20, 15
                           ).returncode == 143
    train.main([*argv, '--save', str(stopped), '--resume'])
    saved = [checkpoint.load(run / 'latest.pth') for run in (whole, stopped)]
    for key in ('model', 'trained_model', 'optimizer', 'average_updates'):
        torch.testing.assert_close(saved[0][key], saved[1][key], rtol=0, atol=0)
    assert (whole / 'test.csv').read_bytes() == (stopped / 'test.csv').read_bytes()
    # The model in a checkpoint is the one that test.csv tells of.
    capsys.readouterr()
    train.main(['--evaluate', '--resume', str(stopped / 'latest.pth')])
    last = read_csv(stopped / 'test.csv')[-1]
    assert f'error {float(last["error"]):.2f}%\n' in capsys.readouterr().out
    assert saved[0]['optimizer']['param_groups'][1]['lr_scale'] == pytest.approx(0.1 / 0.05)


# ---- fine-tuning -----------------------------------------------------------------------------

def test_frozen_norms_do_not_change_and_the_head_has_its_rate(recipe, uninterrupted, tmp_path):
    argv = [*recipe, '--pretrained', str(uninterrupted / 'best.pth'), '--freeze-norm', '--head-lr',
            '0.001', '--epochs', '1', '--save', str(tmp_path)]
    train.main(argv)
    before, after = (checkpoint.load(path)['model']
                     for path in (uninterrupted / 'best.pth', tmp_path / 'latest.pth'))
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) == ('norm' in name), name
    args = parse_flags(argv)
    model = torch.nn.ModuleDict({'features': torch.nn.Linear(2, 2),
                                 'classifier': torch.nn.Linear(2, 2)})
    optimizer = train.make_optimizer(args, model)
    train.set_learning_rate(optimizer, 0.05 / 10)
    assert [group['lr'] for group in optimizer.param_groups] == pytest.approx([5e-3, 1e-4])
    assert [len(group['params']) for group in optimizer.param_groups] == [2, 2]


def test_patience_ends_a_run_and_so_it_stays(recipe, tmp_path, capsys):
    argv = [*recipe, '--lr', '1e-12', '--drop-rate', '0', '--epochs', '20', '--patience', '2',
            '--save', str(tmp_path)]
    train.main(argv)
    epochs = len(read_csv(tmp_path / 'test.csv'))
    best = checkpoint.load(tmp_path / 'latest.pth')['best_epoch']
    assert epochs == best + 2 < 20
    train.main([*argv, '--resume'])
    assert len(read_csv(tmp_path / 'test.csv')) == epochs


def test_flags_that_need_others(capsys):
    for flag in ('--mixup 1', '--cutmix 1', '--random-erasing 0.1', '--auto-augment randaugment'):
        assert 'needs --augment' in fails(capsys, '--no-augment', *flag.split())
    assert '--freeze-norm needs a model' in fails(capsys, '--freeze-norm')
