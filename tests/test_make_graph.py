"""make_graph.py draws the network that is trained."""

import itertools
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import write_images
from torch import nn

import make_graph
import train
from densenet import DenseBlock, densenet_cifar

EDGE = re.compile(r'tooltip="(\S+) to (\S+): (\d+) × (\d+) × (\d+)"')
NETWORKS = ('--depth 22 --growth-rate 4', '--depth 40 --no-bottleneck --compression 1',
            '--block-config 3', '--arch densenet121', '--dataset cifar100',
            '--block-config 5 6 7 8',
            '--arch densenet121 --dataset cifar10 --drop-rate 0.2 --memory-efficient')


def draw(argv, tmp_path):
    """The graph in dot's language."""
    make_graph.main([*argv, '--output', str(tmp_path / 'graph.dot')])
    return (tmp_path / 'graph.dot').read_text()


def run_network(model, image_size):
    """{module: shape of its output without the batch} of a real forward pass."""
    shapes = {}
    for name, module in model.features.named_children():
        module.register_forward_hook(lambda module, inputs, output, name=name:
                                     shapes.update({name: tuple(output.shape[1:])}))
    model.eval()(torch.zeros(1, 3, image_size, image_size))
    return shapes


@pytest.mark.parametrize('argv', NETWORKS)
def test_edges_into_a_layer_add_up_to_its_input_channels(argv, tmp_path):
    _, model, image_size = make_graph.build_model(argv.split())
    shapes = run_network(model.to_empty(device='cpu'), image_size)
    text = draw(argv.split(), tmp_path)
    edges = [(source, target, (int(c), int(h), int(w)))
             for source, target, c, h, w in EDGE.findall(text)]
    read = {}
    for _, target, (channels, *_) in edges:
        read[target] = read.get(target, 0) + channels
    children = dict(model.features.named_children())
    for before, name in itertools.pairwise(children):
        module = children[name]
        if name.startswith('transition'):
            channels = f'{module.conv.in_channels} to {module.conv.out_channels}'
            assert re.search(rf'label="transition {name[-1]}\n[^"]*: {channels}\b', text)
        if not isinstance(module, DenseBlock):
            continue
        drawn = [target for target in read if target.startswith(f'{name}.layer')]
        assert len(drawn) == (len(module) if len(module) <= 6 else 4)
        for target in drawn:
            layer = module[f'denselayer{target.rpartition("layer")[2]}']
            assert read[target] == layer.norm1.num_features
        assert read[f'{name}.output'] == shapes[name][0]
        # Each source is connected to all later boxes, and its maps have the block's size.
        inside = [shape for _, target, shape in edges
                  if target in drawn or target == f'{name}.output']
        assert len(inside) == (len(drawn) + 1) * (len(drawn) + 2) // 2
        assert {shape[1:] for shape in inside} == {shapes[name][1:]}
        source = 'stem' if name == 'denseblock1' else before
        assert (source, f'{name}.layer1', shapes[before]) in edges
    linear = f'{model.classifier.in_features} to {model.classifier.out_features} classes'
    assert f'linear: {linear}"' in text
    last = f'denseblock{len(model.config["block_config"])}'
    assert (f'{last}.output', 'classifier', shapes['norm5']) in edges


@pytest.mark.parametrize('argv', NETWORKS[:4])
def test_the_autograd_view_has_every_parameter_and_function_of_a_real_step(argv, tmp_path):
    _, model, image_size = make_graph.build_model(argv.split())
    model = model.to_empty(device='cpu').train()
    functions, waiting = set(), [model(torch.zeros(2, 3, image_size, image_size)).grad_fn]
    while waiting:
        function = waiting.pop()
        if function is not None and function not in functions:
            functions.add(function)
            waiting += [source for source, _ in function.next_functions]
    text = draw([*argv.split(), '--view', 'autograd'], tmp_path)
    for name in dict(model.named_parameters()):
        assert text.count(f'\n{name} ') == 1, name
    own = [function for function in functions if not hasattr(function, 'variable')]
    readings = sum(source in own for function in own for source, _ in function.next_functions)
    assert text.count(' -> ') == readings + 1  # one more to the logits
    assert len(re.findall(r'^\tfunction\d+ \[', text, re.MULTILINE)) == len(own)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert len(re.findall(r'label="Convolution\b', text)) == convolutions


def test_a_folded_box_says_what_its_layers_read(tmp_path):
    text = draw('--block-config 7 8 9 12'.split(), tmp_path)
    for name, reads in (('layers 3 to 6', '48, 60, ..., 84'),
                        ('layers 3 to 7', '78, 90, ..., 126'),
                        ('layers 3 to 8', '99, 111, ..., 159'),
                        ('layers 3 to 11', '115, 127, ..., 211')):
        assert f'label="{name}:\n{reads}' in text


def test_a_memory_efficient_block_is_one_function_of_autograd(tmp_path):
    text = draw('--depth 22 --view autograd --memory-efficient'.split(), tmp_path)
    assert text.count('label="DenseBlockFunction\n') == 3 and 'Cat' not in text


@pytest.mark.parametrize('argv, size, classes', [([], 224, 1000),
                                                 (['--dataset', 'cifar10'], 32, 10)])
def test_arch_without_a_data_set_is_for_imagenet(argv, size, classes):
    _, model, image_size = make_graph.build_model(['--arch', 'densenet121', *argv])
    assert image_size == size and model.config['small_inputs'] == (size == 32)
    assert model.classifier.out_features == classes


def test_a_checkpoints_network_is_drawn(tmp_path, capsys):
    root = write_images(tmp_path / 'images', {f'{split}/{label}': 2 for split in ('train', 'val')
                                              for label in 'ab'}, (8, 8))
    train.main(['--dataset', 'folder', '--data', str(root), '--depth', '10', '--growth-rate', '4',
                '--epochs', '1', '--batch-size', '2', '--no-plot', '--save', str(tmp_path / 'run')])
    text = draw(['--resume', str(tmp_path / 'run' / 'latest.pth')], tmp_path)
    assert f'{sum(p.numel() for p in densenet_cifar(10, 4, num_classes=2).parameters()):,}' in text
    assert '3 × 8 × 8' in text and '2 classes' in text
    (tmp_path / 'torn.pth').write_bytes((tmp_path / 'run' / 'latest.pth').read_bytes()[:1000])
    assert 'torn.pth' in refused(capsys, '--resume', str(tmp_path / 'torn.pth'))


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as exit_:
        make_graph.main(list(argv))
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith('make_graph.py: error: ')
    assert error.count('\n') == 1
    return error


def test_the_flags_of_data_are_train_pys(tmp_path):
    """Classes from a table, or in folders without train/."""
    for name in 'abc':
        write_images(tmp_path, {name: 3}, (8, 8))
    (tmp_path / 'x.csv').write_text('file,label\na/0.png,x\nb/0.png,y\n')
    data = ['--dataset', 'folder', '--data', str(tmp_path), '--depth', '10']
    for argv, classes in ((['--labels', str(tmp_path / 'x.csv')], 2), ([], 3)):
        _, model, _ = make_graph.build_model(
            [*data, *argv, '--val-split', '0.4', '--output', 'x.dot'])
        assert model.classifier.out_features == classes


def test_wrong_flags(capsys, tmp_path):
    assert 'must end in .png' in refused(capsys, '--output', str(tmp_path / 'graph.gif'))
    assert 'nearest 40 and 46' in refused(capsys, '--depth', '41')
    assert 'invalid choice' in refused(capsys, '--view', 'tree')
    (tmp_path / 'file').touch()
    assert 'file' in refused(capsys, '--output', str(tmp_path / 'file' / 'graph.dot'))


def test_without_the_program_dot_only_a_dot_file_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv('PATH', str(tmp_path))
    argv = ['--depth', '10', '--output', str(tmp_path / 'new' / 'graph.png')]
    assert 'install graphviz' in refused(capsys, *argv)
    assert not (tmp_path / 'new').exists()
    assert draw(['--depth', '10'], tmp_path).startswith('digraph')


def test_without_the_python_package_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'graphviz', None)
    error = refused(capsys, '--depth', '10', '--output', str(tmp_path / 'graph.dot'))
    assert 'pip install graphviz' in error and 'dot' in error


def test_wrong_flags_answer_without_torch(tmp_path):
    (tmp_path / 'torch.py').write_text('raise SystemExit("torch was imported")')
    environment = {**os.environ, 'PYTHONPATH': str(tmp_path)}
    done = subprocess.run([sys.executable, make_graph.__file__, '--view', 'tree'], text=True,
                          env=environment, capture_output=True, timeout=60)
    assert done.returncode == 2 and 'invalid choice' in done.stderr


@pytest.mark.skipif(shutil.which('dot') is None, reason='needs the program dot of graphviz')
@pytest.mark.parametrize('suffix, start', [('.png', b'\x89PNG'), ('.svg', b'<?xml'),
                                           ('.pdf', b'%PDF')])
def test_formats(suffix, start, tmp_path):
    path = tmp_path / f'graph{suffix}'
    make_graph.main(['--depth', '16', '--output', str(path)])
    assert path.read_bytes().startswith(start)
