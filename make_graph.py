"""Draw the network that train.py would train with the same flags.

    python make_graph.py                                         # draws work/graph.png
    python make_graph.py --depth 40 --growth-rate 12 --output bc-40-12.svg
    python make_graph.py --arch densenet121 --output densenet121.pdf
    python make_graph.py --depth 22 --view autograd --output backward.png
    python make_graph.py --resume work/demo/best.pth

Views: `blocks`, as in figures 1 and 2 of the paper, and `autograd`, the graph of backward
functions, whose layout takes minutes for hundreds of layers. With --arch and no --dataset, images
and classes are ImageNet's. Needs `pip install graphviz` and, except for a FILE.dot, Graphviz's
program `dot` (`apt install graphviz`).
"""

import re
from pathlib import Path

from training import console, flags

FORMATS = ('.png', '.svg', '.pdf', '.dot')


def make_parser():
    parser = flags.make_parser()
    parser.prog, parser.description, parser.epilog = 'make_graph.py', __doc__, None
    group = parser.add_argument_group('picture')
    group.add_argument('--view', choices=('blocks', 'autograd'), default='blocks',
                       help='(default: %(default)s)')
    group.add_argument('--output', type=Path, metavar='FILE', default=Path('work/graph.png'),
                       help=f'one of {", ".join(FORMATS)} (default: %(default)s)')
    return parser


if __name__ == '__main__':  # --help and wrong flags answer before torch is imported
    console.exit_on_user_error(make_parser().parse_args, 'make_graph.py')

import torch
from torch import nn

import plot
from densenet import DenseBlock
from training import checkpoint, datasets, networks
from training.console import UserError

MAX_LAYERS = 6  # longer blocks are drawn as four boxes: two layers, those between, the last
FONT = dict(fontname='Helvetica,Arial,sans-serif', fontsize='12')
COLORS = [plot.GREY, *plot.COLORS[:-1]]  # of edges: from a block's input, then from its layers
BLUE, ORANGE, GREEN = '#d6e8f5', '#fbe3cf', '#d5eee5'  # of boxes


# ---- the view of blocks -------------------------------------------------------------------

def block_graph(model, image_size, title):
    """Stem, dense blocks, transitions and classifier: a column for each block.

    Each box in a block, and the box before it, has an edge to every later box in the block. The
    model is on torch's meta device, which computes only shapes.
    """
    dropout = ', dropout' if model.config['drop_rate'] > 0 else ''
    layer = '; '.join(f'BN, ReLU, {show(conv.kernel_size)} convolution to {conv.out_channels}'
                      f'{dropout}' for conv in convolutions(model.features.denseblock1.denselayer1))
    graph = new_graph(f'{title}\nLayer: {layer}\nAn edge carries all the feature maps of the box '
                      f'where it starts: channels × height × width. Edges of one colour carry '
                      f'the same maps.')
    graph.node('images', 'images', fillcolor='white')
    graph.node('stem', '3 × 3 convolution' if model.config['small_inputs'] else
               '7 × 7 convolution, stride 2\nBN, ReLU\n3 × 3 max pool, stride 2', fillcolor=GREEN)
    maps = torch.empty(1, model.config['in_channels'], *datasets.sides(image_size), device='meta')
    add_edge(graph, 'images', 'stem', maps.shape[1:])
    source = 'stem'  # the node that outputs the maps
    for name, module in model.eval().features.named_children():
        inputs, maps = maps, module(maps)
        if isinstance(module, DenseBlock):
            add_block(graph, name, module, source, inputs.shape[1:])
            source = f'{name}.output'
        elif name.startswith('transition'):
            [conv] = convolutions(module)
            graph.node(name, f'transition {name.removeprefix("transition")}\nBN, ReLU, '
                       f'1 × 1 convolution: {conv.in_channels} to {conv.out_channels}{dropout}\n'
                       f'2 × 2 average pool', fillcolor=ORANGE)
            # The top of the next column. dot draws edges downwards, so the one to it has two parts:
            # down to a bend, and back up.
            bend = f'{source}.bend'
            graph.node(bend, '', shape='point', width='0')
            add_edge(graph, source, bend, inputs.shape[1:], arrowhead='none')
            graph.edge(f'{name}:w', bend, dir='back', weight='0')
            with graph.subgraph(graph_attr={'rank': 'min'}) as top:
                top.node('images')
                top.node(name)
            source = name
    linear = model.classifier
    graph.node('classifier', 'BN, ReLU, global average pool\n'
               f'linear: {linear.in_features} to {linear.out_features} classes', fillcolor=GREEN)
    add_edge(graph, source, 'classifier', maps.shape[1:])
    return graph


def add_block(graph, name, block, source, input_shape):
    """Add a dense block whose input is the output of the node `source`."""
    layers = list(block.values())
    growth_rate = convolutions(layers[0])[-1].out_channels
    channels, height, width = input_shape
    nodes = [(source, channels)]  # (node, number of its output maps)
    groups = [[i] for i in range(len(layers))]  # the layers of each box
    if len(layers) > MAX_LAYERS:
        groups[2:-1] = [[*range(2, len(layers) - 1)]]
    style = dict(label=f'   block {name.removeprefix("denseblock")}', labelloc='b', labeljust='l',
                 style='rounded', color=plot.GREY)
    with graph.subgraph(name=f'cluster_{name}', graph_attr=style) as cluster:
        for group in groups:
            first, last = group[0] + 1, group[-1] + 1
            reads = [layers[i].norm1.num_features for i in group]
            text = f'layer {first}: {reads[0]} to {growth_rate}' if first == last else \
                f'layers {first} to {last}:\n{reads[0]}, {reads[1]}, ..., {reads[-1]}\n' \
                f'to {growth_rate} each'
            cluster.node(f'{name}.layer{first}', text, fillcolor=BLUE,
                         peripheries='1' if first == last else '2')
            nodes.append((f'{name}.layer{first}', growth_rate * len(group)))
        cluster.node(f'{name}.output', 'all maps', fillcolor='white', style='filled,rounded')
    targets = [node for node, _ in nodes[1:]] + [f'{name}.output']
    for i, (node, channels) in enumerate(nodes):
        for target in targets[i:]:
            add_edge(graph, node, target, (channels, height, width), color=COLORS[i % len(COLORS)],
                     is_main=target == targets[i])


def add_edge(graph, source, target, shape, is_main=True, **style):
    """Add an edge. A main edge has a label, and a weight that aligns its ends in a column."""
    graph.edge(source, target, tooltip=f'{source} to {target}: {show(shape)}',
               label=f'  {show(shape)}' if is_main else '', weight='9' if is_main else '1', **style)


def convolutions(module):
    return [child for child in module.modules() if isinstance(child, nn.Conv2d)]


def show(shape):
    return ' × '.join(map(str, shape))


# ---- the view of autograd -----------------------------------------------------------------

def autograd_graph(model, image_size, title):
    """The graph of autograd functions behind the logits.

    An edge goes from a function to the one that reads its result in the forward pass. The model is
    on torch's meta device, where a dense block with memory_efficient=True is one function, as on a
    GPU.
    """
    networks.fuse(model, torch.device('meta'), script='make_graph.py')
    images = torch.empty(2, model.config['in_channels'], *datasets.sides(image_size), device='meta')
    logits = model.train()(images)
    names = {parameter: name for name, parameter in model.named_parameters()}
    graph = new_graph(title + '\nAutograd functions and the parameters that they read.')
    graph.attr(nslimit='1', nslimit1='1')  # limits the layout time to seconds
    graph.node('logits', f'logits {show(logits.shape[1:])}', fillcolor=ORANGE)
    nodes, waiting = {}, [(logits.grad_fn, 'logits')]
    while waiting:
        function, reader = waiting.pop()
        if function not in nodes:
            node = nodes[function] = f'function{len(nodes)}'
            sources = [source for source, _ in function.next_functions if source]
            parameters = [source.variable for source in sources if hasattr(source, 'variable')]
            lines = [re.sub(r'Backward\d*$', '', function.name())]
            lines += [f'{names[parameter]} {show(parameter.shape)}' for parameter in parameters]
            graph.node(node, '\n'.join(lines), fillcolor=BLUE if parameters else 'white')
            waiting += [(source, node) for source in sources if not hasattr(source, 'variable')]
        graph.edge(nodes[function], reader)
    return graph


# ---- command line -------------------------------------------------------------------------

def new_graph(title):
    try:
        import graphviz
    except ImportError:
        raise UserError('graphviz is not installed: pip install graphviz, and install the program '
                        'dot, which apt, dnf or brew install graphviz brings') from None
    return graphviz.Digraph(
        'densenet',  # an SVG's title, which browsers show as a tooltip
        graph_attr=dict(label=title, labelloc='b', bgcolor='white', nodesep='0.3', ranksep='0.4',
                        newrank='true', **FONT),
        node_attr=dict(shape='box', style='filled', margin='0.12,0.06', height='0.3', **FONT),
        edge_attr=dict(arrowsize='0.6', **{**FONT, 'fontsize': '11'}))


def build_model(argv):
    """The flags, the network on torch's meta device, and the size of its images in pixels."""
    parser = make_parser()
    given = flags.parse(argv, parser)
    args, saved = checkpoint.with_saved_flags(given, parser)
    if args.output.suffix not in FORMATS:
        raise UserError(f'--output {args.output}: its name must end in {", ".join(FORMATS)}')
    if saved:
        num_classes, image_size = len(saved['dataset']['classes']), saved['dataset']['image_size']
    elif args.dataset == 'imagenet' or args.arch and 'dataset' not in given:  # reads no images
        num_classes, image_size = 1000, args.image_size or 224
    else:
        dataset = checkpoint.describe_data(args, None)
        num_classes, image_size = len(dataset.classes), dataset.image_size
    args = flags.with_network(args, image_size)
    with torch.device('meta'):
        return args, networks.build(args, num_classes, image_size), image_size


def render(graph, suffix):
    """The content of the file, as bytes."""
    import graphviz

    if suffix == '.dot':
        return graph.source.encode()
    try:
        return graph.pipe(suffix[1:], quiet=True)
    except graphviz.ExecutableNotFound:
        raise UserError("Graphviz's program dot is not installed: apt, dnf or brew install "
                        'graphviz brings it; --output FILE.dot does without') from None


def run(argv):
    args, model, image_size = build_model(argv)
    count = sum(parameter.numel() for parameter in model.parameters())
    title = f'{networks.name(args)}, {count:,} parameters'
    draw = autograd_graph if args.view == 'autograd' else block_graph
    content = render(draw(model, image_size, title), args.output.suffix)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_bytes(content)
    print(args.output)


def main(argv=None):
    console.exit_on_user_error(lambda: run(argv), 'make_graph.py')


if __name__ == '__main__':
    main()
