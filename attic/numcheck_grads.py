"""Check gradients against finite differences, in float64, number by number.

    python attic/numcheck_grads.py                  # stops at the first wrong gradient
    python attic/numcheck_grads.py --device cuda    # where cuDNN computes them

An early DenseNet port did not learn, because the gradient of a concatenation before a convolution
was wrong; its own check had used a linear layer (attic/debugging-discussion.md). So this script
checks a concatenation before a convolution, transitions, and whole blocks and networks, with plain
autograd and with the hand-written backward of fused_dense_block/autograd.py.
"""

import argparse
import functools
import sys
from pathlib import Path

import torch
from torch import nn
from torch.autograd.gradcheck import GradcheckError, gradcheck

sys.path.insert(0, str(Path(__file__).parents[1]))

from densenet import DenseBlock, DenseNet, Transition
from fused_dense_block import fuse


class CatIntoConv(nn.ModuleList):
    """A convolution that reads a concatenation; in a dense block, a BN does."""

    def forward(self, x):
        first, second = self
        return second(torch.cat([x, first(x)], 1))


def cases():
    """(name, module) of all that is checked; each reads two feature maps."""
    yield 'concatenation into convolution', CatIntoConv([nn.Conv2d(2, 2, 3, padding=1),
                                                         nn.Conv2d(4, 2, 3, padding=1)])
    yield 'transition', Transition(2, 3)
    for way in ('plain', 'fused', 'fused, recomputed'):
        recomputed = way == 'fused, recomputed'
        block = functools.partial(DenseBlock, 3, 2, 2, bn_size=1, memory_efficient=recomputed)
        modules = {
            'dense block': block(drop_rate=0.0, bottleneck=True),
            'dense block without bottleneck': block(drop_rate=0.0, bottleneck=False),
            'dense block with dropout': block(drop_rate=0.3, bottleneck=True),
            'network': DenseNet(2, (2, 1), 3, 1, num_classes=3, small_inputs=True, in_channels=2,
                                memory_efficient=recomputed)}
        for name, module in modules.items():
            yield f'{name}, {way}', module if way == 'plain' else fuse(module)


def check(module, device):
    """The number of gradients of a random linear combination of the outputs.

    Raises GradcheckError if one is wrong.
    """
    torch.manual_seed(1)
    module.to(device, torch.float64)
    for parameter in module.parameters():  # BN's, too: not all ones and zeros
        parameter.data.uniform_(0.2, 1).mul_(torch.randn_like(parameter).sign())
    images = torch.randn(3, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn_like(module(images))
    tensors = [images, *module.parameters()]
    drops = any(getattr(part, 'drop_rate', 0) for part in module.modules())

    def objective(images, *parameters):  # gradcheck changes the module's own, in place
        if drops:
            torch.manual_seed(2)  # the same masks every time
        return (weights * module(images)).sum()

    # A quotient of differences of float64 numbers is good to 1e-8 or so.
    gradcheck(objective, tensors, eps=1e-6, atol=1e-7, rtol=1e-7)
    return sum(tensor.numel() for tensor in tensors)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    args = parser.parse_args(argv)
    for name, module in cases():
        try:
            print(f'{name:<52}{check(module, args.device):>4} gradients agree', flush=True)
        except GradcheckError as error:
            sys.exit(f'wrong: {name}: {error}')


if __name__ == '__main__':
    main()
