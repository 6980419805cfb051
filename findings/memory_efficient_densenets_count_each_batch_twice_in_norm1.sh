#!/usr/bin/env bash
# DenseNets of torchvision with memory_efficient=True, and of timm after set_grad_checkpointing(),
# update the running statistics of the first norm of each layer twice in each training step: in
# forward, and again when backward recomputes it. The other norms count each batch once.
#
# Version: torchvision 0.29.1, timm 1.0.31 (torch 2.14.1, Python 3.11, Linux, CPU)
# Seen:    2026-11-30
# Output:  torchvision: after 5 steps the weights differ by 0%, the losses by 0%
#          torchvision: batches counted by norm1 and norm2: 5 and 5, memory-efficient 10 and 5
#          torchvision: logits in evaluation differ by 10%
#          timm: after 5 steps the weights differ by 0%, the losses by 0%
#          timm: batches counted by norm1 and norm2: 5 and 5, memory-efficient 10 and 5
#          timm: logits in evaluation differ by 10%
#
# Why it surprises: both are documented as a trade of speed for memory ("Much more memory efficient,
# but slower" in torchvision), and losses and weights are those of the plain network during the
# whole training. The trained network nevertheless predicts something else in evaluation, because
# norm1 averages over batches with a momentum of about 0.19, and the other norms with 0.1. Nothing
# warns of it, and comparing losses, gradients or weights with the plain network does not show it.
# A user of another implementation asked about it: gpleiss/efficient_densenet_pytorch, issue 73.
#
# Exits with 0 while both behave so, and with 1 once one does not.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.14.1 torchvision==0.29.1 timm==1.0.31 numpy
cat > "$folder/check.py" <<'PYTHON'
import copy
import sys

import timm
import torch
import torch.nn.functional as F
import torchvision

STEPS = 5


def train(model):
    """Losses of some steps of SGD on batches of random images."""
    generator = torch.Generator().manual_seed(1)
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.01), []
    for _ in range(STEPS):
        images = torch.randn(8, 3, 32, 32, generator=generator)
        labels = torch.randint(10, (8,), generator=generator)
        loss = F.cross_entropy(model.train()(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses)


def difference(values, others):
    values, others = (torch.cat([v.detach().flatten() for v in vs]) for vs in (values, others))
    return ((values - others).norm() / others.norm()).item()


def compare(name, plain, efficient):
    losses = train(plain), train(efficient)
    weights = difference(efficient.parameters(), plain.parameters())
    loss = difference(losses[1:], losses[:1])
    print(f'{name}: after {STEPS} steps the weights differ by {weights:.0%}, '
          f'the losses by {loss:.0%}')
    counts = []
    for model in (plain, efficient):
        layer = model.features.denseblock1.denselayer2
        counts += [layer.norm1.num_batches_tracked.item(), layer.norm2.num_batches_tracked.item()]
    print(f'{name}: batches counted by norm1 and norm2: {counts[0]} and {counts[1]}, '
          f'memory-efficient {counts[2]} and {counts[3]}')
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        logits = [model.eval()(images) for model in (plain, efficient)]
    evaluation = difference(logits[1:], logits[:1])
    print(f'{name}: logits in evaluation differ by {evaluation:.0%}')
    return (max(weights, loss) < 0.001 and counts == [STEPS, STEPS, 2 * STEPS, STEPS]
            and evaluation > 0.02)


def torchvisions(memory_efficient):
    torch.manual_seed(0)
    return torchvision.models.DenseNet(8, (2, 2), 16, num_classes=10,
                                       memory_efficient=memory_efficient)


torch.manual_seed(0)
timms = timm.models.densenet.DenseNet(8, (2, 2), 10, stem_type='')
timms_efficient = copy.deepcopy(timms)
timms_efficient.set_grad_checkpointing(True)
as_seen = [compare('torchvision', torchvisions(False), torchvisions(True)),
           compare('timm', timms, timms_efficient)]
sys.exit(0 if all(as_seen) else 1)
PYTHON
"$folder/venv/bin/python" "$folder/check.py"
