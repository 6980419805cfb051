"""Check gradients against finite differences, in float64, number by number.

    python attic/numcheck_grads.py                  # a table; the exit code is 1 if one is wrong
    python attic/numcheck_grads.py --device cuda    # where cuDNN computes them

The classic story of a DenseNet that would not learn ended at a library whose gradients of a
concatenation that went into a convolution were wrong (attic/debugging-discussion.md); the check of
then had concatenated before a linear layer, and so had not seen it. This one goes through all that
a dense block is made of: concatenation into convolution, layers, transitions, and whole blocks and
networks by the plain path and by the hand-written backward of densenet.py.

Each number of the input and of the parameters is moved by +-h, and the change of a random linear
combination of the outputs is compared with the gradient. The last column is the largest difference,
as a share of the largest gradient. Where the kink of a ReLU lies within h, the difference quotient
means nothing; so one that is off is computed again with another h.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

from densenet import DenseBlock, DenseNet, Transition  # noqa: E402

STEPS = 1e-6, 1e-7, 1e-5
TOLERANCE = 1e-6  # what float64 leaves of a difference of two numbers is good to 1e-8 or so


class CatIntoConv(nn.Module):
    """Both readers of a concatenation: a convolution, and a BN before one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 2, 1, bias=False)

    def forward(self, x):
        x = torch.cat([x, self.conv(x)], 1)
        return torch.cat([x, self.conv2(F.relu(self.norm(x)))], 1)


def make_block(way, bottleneck=True, drop_rate=0.0):
    block = DenseBlock(num_layers=3, in_channels=2, growth_rate=2, bn_size=1, drop_rate=drop_rate,
                       bottleneck=bottleneck, memory_efficient=way == 'linear, recomputed')
    block.linear_memory = way != 'plain'
    return block


def make_network(way):
    model = DenseNet(2, (2, 1), 3, 1, num_classes=3, small_inputs=True, in_channels=2)
    for module in model.modules():
        if isinstance(module, DenseBlock):
            module.linear_memory = way != 'plain'
    return model


def cases():
    """(name, module) of all that is checked; each reads two feature maps."""
    yield 'concatenation into convolution', CatIntoConv()
    yield 'transition', Transition(2, 3, drop_rate=0.0)
    yield 'dense block, plain', make_block('plain')
    yield 'dense block, linear, without bottleneck', make_block('linear', bottleneck=False)
    for way in ('linear', 'linear, recomputed'):
        yield f'dense block, {way}', make_block(way)
        yield f'dense block, {way}, dropout', make_block(way, drop_rate=0.3)
    for way in ('plain', 'linear'):
        yield f'network, {way}', make_network(way)


def check(module, device):
    """The number of gradients, and the largest difference of one."""
    torch.manual_seed(1)
    module = module.to(device, torch.float64).train()
    for parameter in module.parameters():  # BN's, too: not all ones and zeros
        parameter.data.uniform_(0.2, 1).mul_(torch.randn_like(parameter).sign())
    x = torch.randn(3, 2, 3, 3, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.randn_like(module(x))

    def objective():
        torch.manual_seed(2)  # the same dropout every time
        return (weights * module(x)).sum()

    tensors = [x, *module.parameters()]
    gradients = torch.autograd.grad(objective(), tensors)
    worst, scale = 0.0, max(gradient.abs().max().item() for gradient in gradients)
    for tensor, gradient in zip(tensors, gradients):
        flat = tensor.detach().view(-1)
        for i, expected in enumerate(gradient.flatten().tolist()):
            for h in STEPS:
                difference = abs(quotient(objective, flat, i, h) - expected) / scale
                if difference < TOLERANCE:
                    break
            worst = max(worst, difference)
    return sum(tensor.numel() for tensor in tensors), worst


@torch.no_grad()
def quotient(objective, flat, i, h):
    """The central difference of the objective in number i of a flat tensor."""
    original = flat[i].item()
    values = []
    for shift in (h, -h):
        flat[i] = original + shift
        values.append(objective().item())
    flat[i] = original
    return (values[0] - values[1]) / (2 * h)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.exit(2, f'{parser.prog}: error: --device cuda: torch finds none here\n')
    print(f'{"":<50}{"gradients":>10}{"difference":>12}')
    wrong = []
    for name, module in cases():
        count, worst = check(module, args.device)
        print(f'{name:<50}{count:>10}{worst:>12.1e}', flush=True)
        if worst > TOLERANCE:
            wrong.append(name)
    if wrong:
        sys.exit(f'wrong: {"; ".join(wrong)}')


if __name__ == '__main__':
    main()
