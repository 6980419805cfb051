"""Compare hidden states and gradients with torchvision's DenseNet, layer by layer.

    python attic/compare_grads.py                          # DenseNet-121, in float64
    python attic/compare_grads.py --arch densenet169 --memory-efficient
    python attic/compare_grads.py --device cuda            # by cuDNN, where there is one

Both have the same weights and see the same images and labels, in training mode. For each layer the
table has the shape of its output and how far output, gradients of the parameters, and running
statistics after the step are from torchvision's: the largest difference, as a share of the layer's
largest number. The exit code is 1 if one is above 1e-9.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))

import densenet
from fused_dense_block import fuse
from training import flags


def run(model, images, labels):
    """Forward and backward in training mode. Returns {name of a layer: its output}.

    A hook inside a fused block would make it run layer by layer. Hence a layer's output is cut out
    of the output of its block, where all are concatenated.
    """
    outputs, x = {}, images
    for name, module in model.train().features.named_children():
        x = module(x)
        output = x.detach().clone()  # torchvision's ReLUs change their input
        if 'denseblock' in name:
            names = [f'features.{name}.{layer}' for layer, _ in module.named_children()]
            widths = [layer.conv2.out_channels for layer in module.children()]
            outputs.update(zip(names, output[:, -sum(widths):].split(widths, 1)))
        else:
            outputs[f'features.{name}'] = output
    logits = model.classifier(F.relu(x).mean((2, 3)))
    F.cross_entropy(logits, labels).backward()
    return {**outputs, 'classifier': logits.detach()}


def difference(ours, theirs):
    """The largest |a - b|, relative to the largest value of `theirs`; 0.0 for empty lists."""
    largest = max((tensor.abs().max().item() for tensor in theirs), default=1.0)
    return max(((a - b).abs().max().item() / largest for a, b in zip(ours, theirs)), default=0.0)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--arch', choices=flags.TORCHVISION_WEIGHTS, default='densenet121')
    parser.add_argument('--memory-efficient', action='store_true')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    args = parser.parse_args(argv)
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, args.arch)(weights=None)
    ours = getattr(densenet, args.arch)(memory_efficient=args.memory_efficient)
    ours.load_state_dict(theirs.state_dict())
    fuse(ours)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, device=args.device)
    labels = torch.randint(1000, (2,), device=args.device)
    outputs, their_outputs = (run(model.to(args.device, torch.float64), images, labels)
                              for model in (ours, theirs))
    print(f'{args.arch}: torch {torch.__version__}, torchvision {torchvision.__version__}')
    print(f'{"":<36}{"output":>18}{"difference":>12}{"gradients":>12}{"statistics":>12}')
    worst = 0.0
    for name, output in outputs.items():
        module, their_module = ours.get_submodule(name), theirs.get_submodule(name)
        differences = (
            difference([output], [their_outputs[name]]),
            difference([p.grad for p in module.parameters()],
                       [p.grad for p in their_module.parameters()]),
            difference(module.buffers(), list(their_module.buffers())))
        print(f'{name:<36}{" x ".join(map(str, output.shape)):>18}'
              + ''.join(f'{value:>12.1e}' for value in differences))
        worst = max(worst, *differences)
    paths = {module.path for module in ours.modules() if isinstance(module, densenet.DenseBlock)}
    print(f'dense blocks: {", ".join(paths)}; largest difference {worst:.1e}')
    if worst > 1e-9:
        sys.exit(1)


if __name__ == '__main__':
    main()
