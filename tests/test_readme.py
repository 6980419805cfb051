"""The README's commands are commands of these scripts."""

import re
import shlex

import pytest
from conftest import ROOT

import bench
import flags
import plot
from attic import torture

PARSERS = {'train.py': flags.make_parser(), 'plot.py': plot.make_parser(),
           'bench.py': bench.make_parser(), 'attic/torture.py': torture.make_parser()}
# In blocks of commands, and within sentences.
COMMANDS = re.findall(r'(?:^ {4}|`)(?:python|torchrun.*?) '
                      r'((?:train|plot|bench|attic/torture)\.py\b(?! --help)[^`#\n]*)',
                      (ROOT / 'README.md').read_text(), re.MULTILINE)


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_of_the_readme_is_understood(command):
    script, *argv = shlex.split(command)
    PARSERS[script].parse_args(argv)


def test_the_readme_has_commands_and_make_demo_runs_the_one_it_gives():
    assert len(COMMANDS) > 10
    makefile = (ROOT / 'Makefile').read_text()
    demo = next(command for command in COMMANDS if '--dataset shapes' in command)
    assert demo.strip() in makefile


def test_every_flag_of_the_readme_exists():
    flags = set(re.findall(r'`(--[a-zA-Z-]+)', (ROOT / 'README.md').read_text()))
    known = {option for parser in PARSERS.values() for action in parser._actions
             for option in action.option_strings}
    assert flags <= known
