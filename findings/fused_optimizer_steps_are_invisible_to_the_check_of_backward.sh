#!/usr/bin/env bash
# torch.optim with fused=True changes the weights without increasing their version counters. So
# backward through a graph from before the step does not notice that a weight it saved is another
# one now: it returns a wrong gradient, where the same optimizer without fused raises an error.
#
# Version: torch 2.14.1 (Python 3.11, Linux, CPU); SGD, Adam, AdamW and Adagrad
# Seen:    2026-11-30
# Output:  SGD, fused=False: version 2 -> 3, the second backward raises RuntimeError
#          SGD, fused=True: version 2 -> 2, the second backward is off by 200%
#          Adam, fused=False: version 2 -> 3, the second backward raises RuntimeError
#          Adam, fused=True: version 2 -> 2, the second backward is off by 100%
#          AdamW, fused=False: version 2 -> 4, the second backward raises RuntimeError
#          AdamW, fused=True: version 2 -> 2, the second backward is off by 101%
#          Adagrad, fused=False: version 2 -> 3, the second backward raises RuntimeError
#          Adagrad, fused=True: version 2 -> 2, the second backward is off by 100%
#
# Why it surprises: "modified by an inplace operation" is the error that people rely on when two
# losses share a graph, as in adversarial training. fused=True is documented as a faster
# implementation of the same step. With it, the same mistake trains on wrong gradients. Caches of
# values computed from weights that look at tensor._version go stale, too.
#
# Exits with 0 while torch behaves so, and with 1 once it does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 numpy
cat > "$folder/check.py" <<'PYTHON'
import sys

import torch


def second_backward(name, fused):
    """(version counters before and after a step, relative error of the gradient or None)."""
    first, second = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        second.weight.fill_(1.0)
    version = second.weight._version
    optimizer = getattr(torch.optim, name)(second.parameters(), lr=1.0, fused=fused)
    loss = second(first(torch.ones(1, 1))).sum()  # d loss / d first = second.weight
    loss.backward(retain_graph=True)
    right = first.weight.grad.clone()             # 1.0, the weight when the loss was computed
    second.weight.grad.fill_(2.0)
    optimizer.step()
    first.weight.grad = None
    versions = f'version {version} -> {second.weight._version}'
    try:
        loss.backward()
    except RuntimeError:
        print(f'{name}, fused={fused}: {versions}, the second backward raises RuntimeError')
        return None
    error = ((first.weight.grad - right) / right).abs().item()
    print(f'{name}, fused={fused}: {versions}, the second backward is off by {error:.0%}')
    return error


as_seen = True
for name in ('SGD', 'Adam', 'AdamW', 'Adagrad'):
    as_seen &= second_backward(name, False) is None
    error = second_backward(name, True)
    as_seen &= error is not None and error > 0.1
sys.exit(0 if as_seen else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
