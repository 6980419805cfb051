"""Compare hidden states and gradients with torchvision's DenseNet, layer by layer.

    python attic/compare_grads.py                          # DenseNet-121, in float64
    python attic/compare_grads.py --arch densenet169 --memory-efficient
    python attic/compare_grads.py --device cuda            # by cuDNN, where there is one

Both have the same weights and see the same images and labels, in training mode. For each layer the
table has the shape of its output and how far output, gradients of the parameters, and running
statistics after the step are from torchvision's: the largest difference, as a share of the layer's
largest number. The exit code is 1 where one is above 1e-9.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import torchvision  # noqa: E402

import densenet  # noqa: E402
import flags  # noqa: E402
from densenet import DenseBlock  # noqa: E402

TOLERANCE = 1e-9


def run(model, images, labels):
    """Forward and backward in training mode. Returns {name of a layer: its output}.

    A hook inside one of our blocks would make it take the plain path. Hence a layer's output is
    cut out of that of its block, where all are concatenated.
    """
    outputs, hooks = {}, []

    def keep(name):
        return lambda module, inputs, output: outputs.__setitem__(name, output.detach().clone())

    for name, module in [*model.features.named_children(), ('classifier', model.classifier)]:
        hooks.append(module.register_forward_hook(keep(name)))
    model.train()
    F.cross_entropy(model(images), labels).backward()
    for hook in hooks:
        hook.remove()
    layers = {}
    for name, output in outputs.items():
        if not name.startswith('denseblock'):
            layers[name] = output
            continue
        block = model.features.get_submodule(name)
        widths = [layer.conv2.out_channels for layer in block.children()]
        outputs_of_layers = output[:, -sum(widths):].split(widths, 1)
        layers.update(zip((f'{name}.{layer}' for layer, _ in block.named_children()),
                          outputs_of_layers))
    return layers


def difference(ours, theirs):
    """The largest, as a share of the largest number; 0.0 for nothing to compare."""
    pairs = [(a.flatten(), b.flatten()) for a, b in zip(ours, theirs)]
    if not pairs:
        return 0.0
    a, b = map(torch.cat, zip(*pairs))
    return ((a - b).abs().max() / b.abs().max()).item()


def compare(ours, theirs, images, labels):
    """For each layer its name, the shape of its output, and the three differences."""
    outputs, their_outputs = run(ours, images, labels), run(theirs, images, labels)
    modules, their_modules = dict(ours.named_modules()), dict(theirs.named_modules())
    for name, output in outputs.items():
        path = name if name == 'classifier' else f'features.{name}'
        module, their_module = modules[path], their_modules[path]
        yield name, list(output.shape), (
            difference([output], [their_outputs[name]]),
            difference([p.grad for p in module.parameters()],
                       [p.grad for p in their_module.parameters()]),
            difference(module.buffers(), their_module.buffers()))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--arch', choices=flags.TORCHVISION_WEIGHTS, default='densenet121')
    parser.add_argument('--memory-efficient', action='store_true')
    parser.add_argument('--device', choices=('cpu', 'cuda'), default='cpu')
    args = parser.parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.exit(2, f'{parser.prog}: error: --device cuda: torch finds none here\n')
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, args.arch)(weights=None)
    ours = getattr(densenet, args.arch)(memory_efficient=args.memory_efficient)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64, device=args.device)
    labels = torch.randint(1000, (2,), device=args.device)
    for model in (ours, theirs):
        model.to(args.device, torch.float64)
    print(f'{args.arch}: torch {torch.__version__}, torchvision {torchvision.__version__}')
    print(f'{"":<28}{"output":>18}{"difference":>12}{"gradients":>12}{"statistics":>12}')
    worst = 0.0
    for name, shape, differences in compare(ours, theirs, images, labels):
        print(f'{name:<28}{" x ".join(map(str, shape)):>18}'
              + ''.join(f'{value:>12.1e}' for value in differences))
        worst = max(worst, *differences)
    ways = {module.path for module in ours.modules() if isinstance(module, DenseBlock)}
    print(f'dense blocks: {", ".join(ways)}; largest difference {worst:.1e}')
    if worst > TOLERANCE:
        sys.exit(1)


if __name__ == '__main__':
    main()
