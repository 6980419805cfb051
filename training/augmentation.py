"""Augmentation of single images by torchvision, and MixUp and CutMix of batches.

    augmentation = Augmentation(auto_augment='trivialaugment', mixup=0.2)
    image = augmentation.of_image(mean)(image)     # uint8, or float32 in 0..1
    images, labels = augmentation.mix(images, labels, 10, np.random.default_rng(seed))
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

AUTO_AUGMENT = {'randaugment': 'RandAugment', 'trivialaugment': 'TrivialAugmentWide'}  # in v2


@dataclass(frozen=True)
class Augmentation:
    """The augmentation of training images, as set by the flags of the same names."""

    mirror: bool = True
    color_jitter: bool = True    # and lighting noise, for large images
    auto_augment: str = None     # a key of AUTO_AUGMENT
    random_erasing: float = 0.0  # probability per image
    mixup: float = 0.0           # alpha of the Beta distribution; 0: off
    cutmix: float = 0.0

    @classmethod
    def of_flags(cls, args):
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})

    @property
    def mixes(self):
        return self.mixup > 0 or self.cutmix > 0

    def of_image(self, mean):
        """A function of one image [C, H, W], uint8 or float32 in 0..1; None if not needed.

        Draws from torch's global generator. `mean`, C values in 0..255, fills erased regions.
        """
        if not self.auto_augment and not self.random_erasing:
            return None
        from torchvision.transforms import v2  # here, because it is slow to import

        policy = getattr(v2, AUTO_AUGMENT[self.auto_augment])() if self.auto_augment else None
        erase = {dtype: v2.RandomErasing(self.random_erasing, value=[v * scale for v in mean])
                 for dtype, scale in ((torch.uint8, 1), (torch.float32, 1 / 255))}
        return functools.partial(_augment, policy, erase)

    def mix(self, images, labels, num_classes, rng):
        """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019) of images 0 and 1, 2 and 3, ...

        Batches are in random order, so these are random pairs. If both are on, one of them is drawn
        for each batch. The last image of an odd number is unchanged.

        Args:
            images: [B, C, H, W].
            labels: int64 [B], negative for no label; or, multi-label, float [B, C].
            rng: a NumPy generator in the same state on all ranks.

        Returns:
            Images, and labels as class probabilities, float32 [B, C].
        """
        if labels.dim() == 1:
            has_label = (labels >= 0)[:, None]
            labels = F.one_hot(labels.clamp(min=0), num_classes).float() * has_label
        uses_cutmix = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if uses_cutmix else self.mixup
        lam = rng.beta(alpha, alpha)  # weight of the image, against its partner's
        partner = torch.arange(len(images), device=images.device)
        partner[:len(images) // 2 * 2] ^= 1
        if uses_cutmix:
            rows, columns = random_box(images.shape[2:], 1 - lam, rng)
            mixed = images.clone()
            mixed[:, :, rows, columns] = images[partner][:, :, rows, columns]
            lam = 1 - images[0, 0, rows, columns].numel() / images[0, 0].numel()
        else:
            mixed = images.lerp(images[partner], 1 - lam)
        return mixed, labels.lerp(labels[partner], 1 - lam)


def _augment(policy, erase, image):  # not a closure: started, not forked workers pickle it
    image = policy(image) if policy else image
    return erase[image.dtype](image)


def random_box(size, area, rng):
    """Slices (rows, columns) of a box that covers the share `area` of an image.

    Its centre is anywhere in the image, and the box is clipped at the borders.
    """
    box = []
    for length in size:
        centre, half = rng.random() * length, length * area**0.5 / 2
        box.append(slice(round(max(centre - half, 0)), round(min(centre + half, length))))
    return box
