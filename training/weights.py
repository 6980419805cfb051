"""Load weights from files of this and other libraries into `densenet.DenseNet`.

    weights.load_pretrained(model, args)      # --pretrained run.pth.tar
    tensors, _ = weights.read('run.pth.tar')  # {'state_dict.module.features.conv0.weight': ...}

Reads `.safetensors`, models of Lua Torch (`.t7`) and files of `torch.save`, without running code
from the file. Nested dicts are flattened to dotted keys, and the prefix of the weights is found by
the key of the first dense layer, so wrappers ('net', 'state_dict') and prefixes ('module.',
'model.') need no list of names.
"""

import os
import re
import textwrap
from collections import Counter

import numpy as np
import torch
from torch import nn

from training import distributed, flags, lua_torch, torch_files
from training.console import UserError, explain_errors, say
from training.datasets import SMALL

# First norm of the first dense layer in torchvision (before 2018: norm.1) and MONAI, in
# andreasveit/densenet-pytorch, and in bamos/densenet.pytorch.
FIRST_NORM = re.compile(r'((?:.*\.)?)(?:denseblock1\.denselayer1\.(?:layers\.)?norm\.?1|'
                        r'block1\.layer\.0\.bn1|dense1\.0\.bn1)\.weight')
RENAMED = tuple((re.compile(pattern), new) for pattern, new in (
    (r'(denselayer\d+)\.layers\.', r'\1.'),                    # MONAI
    (r'(denselayer\d+\.(?:norm|conv))\.([12])\.', r'\1\2.'),   # torchvision before 2018
    (r'^norm_final\.', 'norm5.'),                              # gpleiss/efficient_densenet_pytorch
    (r'^conv1\.', 'conv0.'), (r'^bn1\.', 'norm5.'),            # andreasveit and bamos
    (r'^trans(\d+)\.conv1\.', r'transition\1.conv.'),
    (r'^trans(\d+)\.bn1\.', r'transition\1.norm.'),
    (r'^(?:block(\d+)\.layer|dense(\d+))\.(\d+)\.(bn|conv)', lambda match: (
        f'denseblock{match[1] or match[2]}.denselayer{int(match[3]) + 1}.'
        f'{"norm" if match[4] == "bn" else "conv"}')),
))
FEATURES = re.compile(r'(conv0|norm0|denseblock\d+|transition\d+|norm5)\.')
AVERAGED = re.compile(r'(?<![a-z])(ema|swa)(?![a-z])')
# The first bytes of files that are mistaken for weights.
OTHER_FILES = {
    b'<': 'a web page: the download failed',
    b'version https://git-lfs': 'a Git LFS pointer: `git lfs pull` brings the file',
    b'\x89HDF': 'an HDF5 file, as Keras writes',
    b'\x1f\x8b': 'compressed: unpack it first',
    b'4\n': 'an ASCII file of Lua Torch: torch.save(name, torch.load(name, \'ascii\')) converts it',
    b'\0\0\0\4': 'a big-endian file of Lua Torch',
}


def load_pretrained(model, args, dataset=None):
    """Load the weights that --pretrained names, and print what was changed or left out.

    Without a file, downloads torchvision's. `file.pth:name` selects one of several networks in a
    file; by default averaged weights (EMA) are preferred, as in timm.

    Args:
        args: flags with `pretrained`, `arch`, `reset_classifier`, `evaluate` and `mean`.
        dataset: the Description of the images that the model will see.

    Raises:
        UserError: the file can't be read, or is of another network.
    """
    if args.pretrained:
        source, part = args.pretrained, ''
        file, _, name = source.rpartition(':')
        if os.path.exists(file) and not os.path.exists(source):
            source, part = file, name
        weights, notes, trained_on = read_weights(source, part, model)
        if args.evaluate and trained_on:
            notes.append(f'--resume {source} also takes classes, mean and std from this checkpoint')
        elif trained_on and dataset:
            notes += other_values(trained_on, dataset)
        elif args.evaluate and args.mean is None and model.config['small_inputs']:
            # another std, as many projects have it, can cost half a point on CIFAR-10
            notes.append('images are normalized by the mean and std of this data set; if the '
                         'weights need others, give --mean and --std')
    elif args.arch in flags.TORCHVISION_WEIGHTS:
        source, notes = 'torchvision\'s file', []
        with distributed.rank_0_first():
            weights = torchvision_weights(args.arch)
    else:
        raise UserError(f'--pretrained without a file loads torchvision\'s weights, which are for '
                        f'--arch {", ".join(flags.TORCHVISION_WEIGHTS)} and images of more than '
                        f'{SMALL} pixels')
    weights = adapt_channels(weights, model.config['in_channels'], notes)
    if notes and distributed.rank() == 0:
        say(f'{source}: {"; ".join(notes)}')
    load_into(model, weights, source, args.reset_classifier)


def other_values(trained_on, dataset):
    """Notes on statistics of the images that differ from those of a checkpoint's training data.

    `trained_on` is the Description of those as a dict.
    """
    notes = []
    for name in ('mean', 'std'):
        before, now = trained_on.get(name, ()), getattr(dataset, name)
        if len(before) == len(now) and not np.allclose(before, now, rtol=0.01, atol=1):
            values = ' '.join(f'{value / 255:.4g}' for value in before)
            notes.append(f'trained with --{name} {values}')
    value_range = trained_on.get('value_range')
    if value_range and value_range != dataset.value_range:
        notes.append('trained with --value-range {:g} {:g}'.format(*value_range))
    return notes


def torchvision_weights(arch):
    """The state dict of torchvision's weights for ImageNet, downloaded if necessary.

    Raises:
        UserError: no network, or a broken file in torchvision's cache.
    """
    import torchvision  # slow to import

    with explain_errors(f'torchvision could not download or read its weights of {arch}'):
        return torchvision.models.get_model_weights(arch).DEFAULT.get_state_dict(weights_only=True)


# ---- into a model --------------------------------------------------------------------------------

def load_into(model, weights, source, reset_classifier=False):
    """Load a state dict with our keys into a model that is not fused yet.

    Raises:
        UserError: it does not fit; names the first difference, and flags that describe its network.
    """
    own = model.state_dict()
    if reset_classifier:
        weights = {key: tensor for key, tensor in weights.items() if 'classifier.' not in key}
        weights.update({key: tensor for key, tensor in own.items() if 'classifier.' in key})
    has_large_stem = 'features.norm0.weight' in weights
    if has_large_stem == model.config['small_inputs']:
        stems = 'the 3x3 stem of CIFAR', 'ImageNet\'s 7x7 stem'
        raise UserError(
            f'{source} has {stems[has_large_stem]}, and images of '
            + (f'up to {SMALL} pixels get the other: give --image-size {SMALL + 1} or more'
               if has_large_stem else
               f'more than {SMALL} pixels get the other: give --image-size {SMALL} or less'))
    problems = {key: f'{[*weights[key].shape]} in the file and {[*tensor.shape]} here'
                for key, tensor in own.items()
                if key in weights and weights[key].shape != tensor.shape}
    problems |= {key: 'only in the file' for key in weights if key not in own}
    problems |= {key: 'not in the file' for key in own if key not in weights
                 and not key.endswith('num_batches_tracked')}  # missing before PyTorch 0.4.1
    if problems:
        key, problem = next(iter(problems.items()))
        if all(key.startswith('classifier.') for key in problems):
            raise UserError(f'{source} does not fit the classifier: {key} is {problem}: '
                            f'--reset-classifier starts with a new classifier')
        theirs = network_flags(weights)
        hint = f'; its network is {theirs}' if theirs not in ('', network_flags(own)) else ''
        raise UserError(f'{source} does not fit the network: {key} is {problem}{hint}')
    with explain_errors(f'{source} does not fit the network'):
        model.load_state_dict(weights)


def network_flags(weights):
    """train.py's flags for the network of a state dict; '' if it is incomplete."""
    layers = [key.split('.')[1] for key in weights
              if re.fullmatch(r'features\.denseblock\d+\.denselayer\d+\.conv1\.weight', key)]
    first = 'features.denseblock1.denselayer1.'
    bottleneck = f'{first}conv2.weight' in weights
    try:
        width = len(weights[f'{first}conv1.weight'])
        growth_rate = len(weights[f'{first}conv2.weight']) if bottleneck else width
        values = {'block-config': ' '.join(map(str, Counter(layers).values())),
                  'growth-rate': growth_rate,
                  'init-features': len(weights['features.conv0.weight'])}
        if bottleneck and width != 4 * growth_rate:
            values['bn-size'] = width // growth_rate
        if 'features.transition1.conv.weight' in weights:
            kept, channels, *_ = weights['features.transition1.conv.weight'].shape
            if kept != channels // 2:
                values['compression'] = f'{kept / channels:.3g}'
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        return ''
    return ' '.join(f'--{flag} {value}' for flag, value in values.items()) + (
        '' if bottleneck else ' --no-bottleneck')


def adapt_channels(weights, channels, notes):
    """Adapt the first convolution of a state dict to another number of input channels.

    As in timm: 1 channel gets the sum of the weights, because conv(w, [x, x, x]) equals
    conv(w_red + w_green + w_blue, x); other numbers repeat the weights in turn, rescaled.
    """
    key = 'features.conv0.weight'
    weight = weights.get(key)
    if weight is None or weight.dim() != 4 or weight.shape[1] in (0, channels):
        return weights
    before = weight.shape[1]
    if channels == 1:
        weight = weight.float().sum(1, keepdim=True)
    else:
        weight = weight[:, torch.arange(channels) % before] * (before / channels)
    notes.append(f'first convolution adapted from {before} to {channels} channels')
    return {**weights, key: weight}


# ---- from a file's keys to ours ------------------------------------------------------------------

def read_weights(path, part, model):
    """Read a file into a state dict with our keys.

    Returns:
        The state dict; notes on what was renamed or left out; if it is one of our checkpoints, its
        Description of the data as a dict, otherwise None.

    Args:
        part: name of one of the networks in the file, or '' for the default.
        model: names the layers of a `.t7` file, which has no names.

    Raises:
        UserError: the file can't be read, or holds no DenseNet.
    """
    if first_bytes(path)[:4] in (b'\3\0\0\0', b'\4\0\0\0'):
        return read_lua_torch(path, model), [], None
    tensors, trained_on = read(path)
    prefixes = dict.fromkeys(match[1] for match in map(FIRST_NORM.fullmatch, tensors) if match)
    if not prefixes:
        raise UserError(f'{path} holds another network, or a DenseNet of an unknown layout: '
                        f'{textwrap.shorten(str([*tensors]), 200)}')
    networks = {re.sub(r'\.features$', '', prefix[:-1]): prefix for prefix in prefixes}
    name, notes = choose(networks, part, path), []
    prefix = networks[name]
    if len(networks) > 1:
        others = ' or '.join(f'{path}:{other}' for other in networks if other != name)
        notes.append(f'takes {name}, not {others}')
    names = our_keys(tensors, prefix)
    if not all(key.endswith(ours.removeprefix('features.')) for ours, key in names.items()):
        notes.append('keys renamed to torchvision\'s')
    others = tuple(f'{other}.' for other in networks if other != name)
    used, unused = {*names.values()}, {}
    for key, tensor in tensors.items():
        if key not in used and tensor.dim() and not key.startswith(others):
            parts = key.split('.')
            common = len(os.path.commonprefix([parts, prefix.split('.')]))
            unused['.'.join(parts[:common + 1])] = None  # the first part outside the prefix
    if unused:
        notes.append('not used: ' + textwrap.shorten(', '.join(unused), 100))
    return {ours: tensors[key] for ours, key in names.items()}, notes, trained_on


def choose(networks, part, path):
    """The name of the network to load: `part` if given, or the averaged one, or the only one."""
    if not part and {*networks} == {'model', 'trained_model'}:
        return 'model'  # of a run with --ema: the averages
    if part:
        found = [name for name in networks if f'{name}.'.startswith(f'{part}.')]
    else:
        averaged = [name for name in networks if AVERAGED.search(name.lower())]
        found = averaged if len(averaged) == 1 else [*networks]
    if len(found) != 1:
        choices = ', '.join(f'{path}:{name}' for name in networks)
        raise UserError(f'{path} holds more than one network: choose {choices}' if len(found) > 1
                        else f'{path} has no {part}, but {", ".join(networks)}')
    return found[0]


def our_keys(tensors, prefix):
    """{our key: the file's key} for the weights of the network with this prefix."""
    names, rest = {}, []
    for key in tensors:
        if key.startswith(prefix):
            inner = key[len(prefix):]
            for pattern, new in RENAMED:
                inner = pattern.sub(new, inner)
            if FEATURES.match(inner) and f'features.{inner}' not in names:
                names[f'features.{inner}'] = key
            else:
                rest.append(key)
    if not rest:  # the classifier is outside the module of the features
        parent = prefix[:prefix.rfind('.', 0, -1) + 1]
        rest = [key for key in tensors if key.startswith(parent) and not key.startswith(prefix)]
    # Whatever its name, the classifier is the only layer besides the features, and linear.
    linear = [key.removesuffix('weight') for key in rest
              if key.endswith('weight') and tensors[key].dim() == 2]
    layers = {key.rpartition('.')[0] for key in rest if key.endswith(('bias', 'running_mean'))}
    if len(linear) == 1 and layers <= {linear[0][:-1]}:
        names |= {f'classifier.{kind}': linear[0] + kind for kind in ('weight', 'bias')
                  if linear[0] + kind in tensors}
    return names


def read_lua_torch(path, model):
    """A state dict with our keys from an official model, whose layers have the order of ours."""
    with explain_errors(f'{path} can\'t be read as a model of Lua Torch'):
        theirs = lua_torch.load_modules(path)
    ours = {name: module for name, module in model.named_modules()
            if isinstance(module, (nn.Conv2d, nn.BatchNorm2d, nn.Linear))}
    is_layer = [[weight.dim() > 1 for weight in weights] for weights in (
        [layer['weight'] for layer in theirs], [module.weight for module in ours.values()])]
    if is_layer[0] != is_layer[1]:  # True: a convolution or linear layer, False: a norm
        depths = [f'{sum(kinds)} layers and {len(kinds) - sum(kinds)} norms' for kinds in is_layer]
        raise UserError(f'{path} is another network: it has {depths[0]}, and this one {depths[1]}')
    return {f'{name}.{key}': tensor for name, layer in zip(ours, theirs)
            for key, tensor in layer.items()}


# ---- files ---------------------------------------------------------------------------------------

def first_bytes(path):
    torch_files.check_is_file(path)
    try:
        with open(path, 'rb') as file:
            return file.read(32)
    except OSError as error:
        raise UserError(f'{path}: {error.strerror}') from error


def read(path):
    """All tensors in the nested dicts of a file: {'state_dict.conv1.weight': tensor}.

    Also returns `dataset` of our checkpoints, a dict, otherwise None.

    Raises:
        UserError: the file can't be read without running code, is damaged, or has another format.
    """
    beginning = first_bytes(path)
    if beginning[8:9] == b'{' or str(path).endswith('.safetensors'):  # JSON after its length
        with explain_errors(f'{path} can\'t be read as .safetensors'):
            from safetensors.torch import load_file

            return load_file(path), None
    for signature, what in OTHER_FILES.items():
        if beginning.startswith(signature):
            raise UserError(f'{path} holds no weights, but is {what}')
    saved, names = torch_files.load(path, skip_unknown=True)
    found, seen, dictionaries = {}, set(), [('', saved)]
    for prefix, values in dictionaries:
        # Limited, because a malicious file may nest endlessly.
        if not isinstance(values, dict) or id(values) in seen or prefix.count('.') > 9:
            continue
        seen.add(id(values))
        for key, value in values.items():
            # torch.compile adds _orig_mod to the name of what was compiled
            key = f'{prefix}{key}'.replace('_orig_mod.', '')
            if torch.is_tensor(value):
                found[key] = value
            else:
                dictionaries.append((f'{key}.', value))
    if not any(map(FIRST_NORM.fullmatch, found)):
        torch_files.raise_if_pickled_model(path, names)
    if not found:
        what = list(saved) if isinstance(saved, dict) else type(saved).__name__
        raise UserError(f'{path} holds no weights: it holds {textwrap.shorten(str(what), 200)}')
    is_ours = isinstance(saved, dict) and {'config', 'dataset', 'args'} <= saved.keys()
    return found, saved['dataset'] if is_ours else None
