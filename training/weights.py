"""Weights from files, ours or another library's, and torchvision's downloads (--pretrained)."""

from pathlib import Path

from training import checkpoint, datasets, distributed, flags
from training.checkpoint import CheckpointError, explained
from training.console import UserError


def load_weights_file(path):
    """The state dict in a file: our checkpoint, or one of torchvision or timm, bare or not.

    Raises:
        CheckpointError: as `load`; or it is a .safetensors file, and the package is not there.
    """
    if Path(path).suffix == '.safetensors':  # as timm's weights come
        with explained(f'{path} cannot be read'):
            from safetensors.torch import load_file

            return load_file(path)
    saved = checkpoint.load(path)
    return next((saved[key] for key in ('model', 'state_dict') if key in saved), saved)


def torchvision_weights(arch):
    """The state dict of torchvision's weights for ImageNet, downloaded if it has to be.

    Raises:
        CheckpointError: no network, or a broken file in torchvision's cache.
    """
    import torchvision  # here, for checkpoints alone need no torchvision

    with explained(f'torchvision could not download or read its weights of {arch}'):
        return torchvision.models.get_model_weights(arch).DEFAULT.get_state_dict(weights_only=True)


def load_pretrained(model, args):
    """Weights from a file, ours or another's, or torchvision's download (--pretrained)."""
    source = args.pretrained
    if source:
        weights = load_weights_file(source)
    elif args.arch in flags.TORCHVISION_WEIGHTS:
        source = 'torchvision\'s file'
        with distributed.rank_0_first():
            weights = torchvision_weights(args.arch)
    else:
        raise UserError(f'--pretrained without a file takes torchvision\'s weights, which are for '
                        f'--arch {", ".join(flags.TORCHVISION_WEIGHTS)} and images of more than '
                        f'{datasets.SMALL} pixels')
    if model.config['in_channels'] == 1:
        # A grey image in three channels: conv(w, [x, x, x]) = conv(w_red + w_green + w_blue, x).
        weights = {key: weight.sum(1, keepdim=True) if key.endswith('conv0.weight') else weight
                   for key, weight in weights.items()}
    # ImageNet's stem has a norm, that of small images has none.
    if model.config['small_inputs'] and any(key.endswith('norm0.weight') for key in weights):
        raise CheckpointError(f'{source} has ImageNet\'s 7x7 stem, and images of up to '
                              f'{datasets.SMALL} pixels get a 3x3 stem: give --image-size '
                              f'{datasets.SMALL + 1} or more')
    if args.reset_classifier:
        weights = {key: weight for key, weight in weights.items() if 'classifier.' not in key}
        weights.update({f'classifier.{key}': weight
                        for key, weight in model.classifier.state_dict().items()})
    try:
        checkpoint.load_weights(model, weights, source)
    except CheckpointError as error:
        if 'classifier.' not in str(error):
            raise
        raise CheckpointError(f'{error}: --reset-classifier starts with a new one') from error
