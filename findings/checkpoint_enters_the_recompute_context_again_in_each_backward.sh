#!/usr/bin/env bash
# torch.utils.checkpoint calls context_fn once, in forward, and then enters the second context that
# it returned again in each backward. A context made by @contextlib.contextmanager, the usual way to
# write one, can be entered once only, so a second backward fails.
#
# Version: torch 2.14.1 (Python 3.11, Linux, CPU), use_reentrant=False
# Seen:    2026-11-30
# Output:  generator: first backward passes
#          generator: second backward raises AttributeError: '_GeneratorContextManager' object has
#          no attribute 'args'
#          class: first backward passes
#          class: second backward passes
#
# Why it surprises: the documentation says that context_fn returns two context managers for the
# function and its recomputation. One backward works, so tests pass; backward(retain_graph=True)
# followed by another one, or a gradient penalty, then fails with an error that names neither
# checkpoint nor context_fn. A context that is a class with __enter__ and __exit__ works.
#
# Exits with 0 while torch behaves so, and with 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/check.py" <<'PYTHON'
import contextlib

import torch
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def generator():
    yield


class Context:
    def __enter__(self):
        pass

    def __exit__(self, *_):
        pass


def second_backward(name, make_context):
    """The error of a second backward through one checkpoint, or None."""
    x = torch.ones(3, requires_grad=True)
    y = checkpoint(lambda x: x.sin().exp(), x, use_reentrant=False,
                   context_fn=lambda: (contextlib.nullcontext(), make_context()))
    y.sum().backward(retain_graph=True)
    print(f'{name}: first backward passes')
    try:
        y.sum().backward()
    except AttributeError as error:
        print(f'{name}: second backward raises AttributeError: {error}')
        return error
    print(f'{name}: second backward passes')


failed = second_backward('generator', generator)
passed = second_backward('class', Context)
raise SystemExit(0 if failed is not None and passed is None else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
