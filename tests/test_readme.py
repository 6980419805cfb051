"""The README and the pages of attic/: commands, flags, links, code and numbers."""

import argparse
import importlib
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import torch
import torchvision
from conftest import ROOT, cache_densenet121

from images import error_vs_parameters

README = (ROOT / 'README.md').read_text()
PAGES = {path.relative_to(ROOT): path.read_text()
         for path in (ROOT / 'README.md', *sorted((ROOT / 'attic').glob('*.md')))}
# In blocks of commands, where a backslash continues a line, and within sentences.
COMMANDS = [(str(page), command) for page, text in PAGES.items() for command in re.findall(
    r'(?:^ {4}|`)(?:python|torchrun.*?) ((?:\w+/)?\w+\.py\b[^`#\n]*)',
    re.sub(r'\\\n +', '', text.replace('$i', '1')), re.MULTILINE)]


WITHOUT_FLAGS = {'images/dense_block.py', 'images/memory_vs_depth.py'}  # test_images.py runs them


class Parsing(BaseException):
    """Has the parser that was about to parse."""


def make_parser(script):
    name = script.removesuffix('.py').replace('/', '.')
    name = 'training.flags' if name == 'train' else name
    module = importlib.import_module(name)
    if hasattr(module, 'make_parser'):
        return module.make_parser()

    def stop(parser, argv=None):
        raise Parsing(parser)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Parsing) as stopped:
        patch.setattr(argparse.ArgumentParser, 'parse_args', stop)
        module.main([])
    return stopped.value.args[0]


@pytest.mark.parametrize('page, command', COMMANDS)
def test_a_command_is_understood(page, command):
    script, *argv = shlex.split(command)
    if script in WITHOUT_FLAGS:
        assert not argv
    elif argv != ['--help']:
        make_parser(script).parse_args(argv)


def test_make_runs_the_commands_that_the_pages_give():
    makefile = (ROOT / 'Makefile').read_text()
    figures = PAGES[Path('attic/figures.md')].partition('The last one draws')[0]
    drawing = {command.strip() for page, command in COMMANDS
               if page == 'attic/figures.md' and f'    python {command}\n' in figures}
    readme = [command for page, command in COMMANDS if page == 'README.md']
    assert len(readme) > 20 and len(COMMANDS) > 50 and len(drawing) == 8
    for command in (*drawing, next(c for c in readme if '--dataset shapes' in c)):
        assert f'$(BIN)/python {command}' in makefile, command


def test_every_flag_exists():
    named = {flag for text in PAGES.values() for flag in re.findall(r'`(--[a-zA-Z-]+)', text)}
    scripts = {command.split()[0] for _, command in COMMANDS} - WITHOUT_FLAGS
    known = {option for script in scripts for action in make_parser(script)._actions
             for option in action.option_strings}
    assert named - known <= {'--max-restarts'}  # torchrun's


@pytest.mark.parametrize('page', PAGES, ids=str)
def test_links_and_images_resolve(page):
    tracked = subprocess.run(['git', 'ls-files'], cwd=ROOT, capture_output=True, text=True,
                             check=True).stdout.splitlines()
    links = re.findall(r'\]\(([^)\s]+)\)', PAGES[page])
    assert links or str(page) != 'README.md'
    for link in links:
        if link.startswith('https://'):
            continue
        path, _, anchor = link.partition('#')
        target = ((ROOT / page).parent / path).resolve().relative_to(ROOT) if path else page
        assert any(f'{file}/'.startswith(f'{target}/') for file in tracked), link
        if anchor:
            assert anchor in {slug(title) for title in re.findall(r'^#+ (.+)$', PAGES[target],
                                                                  re.MULTILINE)}, link


def test_the_readmes_model_runs(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    theirs = torchvision.models.densenet121()
    cache_densenet121(tmp_path, theirs)
    hub = PAGES[Path('attic/export.md')].partition('## torch.hub')[2]
    model, cloned = (re.search(r'```python\n(.*?)```', text, re.DOTALL)[1]
                     for text in (README.partition('## Copy the model')[2], hub))
    names = dict(images=torch.randn(2, 3, 32, 32), torch=torch, torchvision=torchvision)
    exec(model, names)
    assert names['logits'].shape == (2, 10) and names['feature_map'].shape == (2, 342, 8, 8)
    for key, weight in names['model'].state_dict().items():
        assert torch.equal(weight, theirs.state_dict()[key]), key
    exec(cloned.replace('path/to/clone', str(ROOT)), names)
    assert names['model'].config['growth_rate'] == 12


def slug(title):
    """GitHub's name of a heading."""
    return re.sub(r'[^\w -]', '', title.lower()).replace(' ', '-')


def test_the_figure_draws_the_published_table():
    published = PAGES[Path('attic/results.md')]
    rows = {cells[0]: cells[1:] for line in published.splitlines() if line.startswith('|')
            for cells in [[cell.strip() for cell in line.strip('|').split('|')]] if len(cells) == 8}
    for name, errors in error_vs_parameters.CURVES.items():
        plain = dict(bottleneck=False, compression=1.0) if name == 'DenseNet' else {}
        for (depth, growth_rate), (cifar10, cifar100) in errors.items():
            parameters, _, c10, _, c100, *_ = rows[f'{name} {depth}-{growth_rate}']
            assert (float(c10), float(c100)) == (cifar10, cifar100)
            size = error_vs_parameters.millions_of_parameters(depth, growth_rate, 10, **plain)
            assert f'{size:.1f}M' == parameters


def test_the_results_agree_with_the_runs_in_the_repository():
    """Each row that names a directory of a run: final and best error, and the epochs."""
    rows = re.findall(r'^\|.*\((?:\.\./)?work/([^\s)]+)\).*\| ([\d.]+)% \| ([\d.]+)% \| (\d+) \|',
                      '\n'.join(PAGES.values()), re.MULTILINE)
    assert len(rows) == 7
    for run, *said in rows:
        lines = (ROOT / 'work' / run / 'test.csv').read_text().splitlines()[1:]
        errors = [float(line.split(',')[2]) for line in lines]
        assert said == [f'{errors[-1]:.2f}', f'{min(errors):.2f}', str(len(errors))], run
        if run == 'densenet-bc-100-12':
            assert f'at {errors[-1]:.2f}% after {len(errors)} epochs' in ' '.join(README.split())
