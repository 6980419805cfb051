"""Augmentation beyond crop and mirror: of single images by torchvision, and of pairs in a batch.

    augmentation = Augmentation(auto_augment='trivialaugment', mixup=0.2)
    image = augmentation.of_image(mean)(image)     # uint8, or float32 in 0..1
    images, labels = augmentation.mix(images, labels, 10, np.random.default_rng(seed))
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

AUTO_AUGMENT = {'randaugment': 'RandAugment', 'trivialaugment': 'TrivialAugmentWide'}  # in v2


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, by the flags of the same names.

    With the same seed, an image is augmented the same way, whatever the number of workers.
    """

    mirror: bool = True
    color_jitter: bool = True    # of large images, and lighting noise
    auto_augment: str = None     # a key of AUTO_AUGMENT
    random_erasing: float = 0.0  # probability of an image
    mixup: float = 0.0           # alpha of the Beta distribution; 0: none
    cutmix: float = 0.0

    @classmethod
    def of_flags(cls, args):
        return cls(**{name: getattr(args, name) for name in cls.__dataclass_fields__})

    @property
    def mixes(self):
        return self.mixup > 0 or self.cutmix > 0

    def of_image(self, mean):
        """A function of one image [C, H, W], uint8 or float32 in 0..1; None if there is none.

        It draws from torch's global generator. `mean`, of C channels in 0..255, fills what is
        erased.
        """
        if not self.auto_augment and not self.random_erasing:
            return None
        from torchvision.transforms import v2  # here, because it is slow to import

        policy = getattr(v2, AUTO_AUGMENT[self.auto_augment])() if self.auto_augment else None
        erase = {dtype: v2.RandomErasing(self.random_erasing, value=[v * scale for v in mean])
                 for dtype, scale in ((torch.uint8, 1), (torch.float32, 1 / 255))}

        def augment(image):
            image = policy(image) if policy else image
            return erase[image.dtype](image)

        return augment

    def mix(self, images, labels, num_classes, rng):
        """MixUp (Zhang et al. 2018) or CutMix (Yun et al. 2019) of images 0 and 1, 2 and 3, ...

        Batches are in random order, so neighbours are random pairs. With both, each batch draws one
        of them. The last image of an odd number stays as it is.

        Args:
            images: [B, C, H, W].
            labels: int64 [B], negative for no label; or float [B, C], of several labels.
            rng: a NumPy generator, in the same state in all processes.

        Returns:
            Images, and labels as shares of the classes, float32 [B, C].
        """
        if labels.dim() == 1:
            has_label = (labels >= 0)[:, None]
            labels = F.one_hot(labels.clamp(min=0), num_classes).float() * has_label
        uses_cutmix = self.cutmix > 0 and (self.mixup == 0 or rng.random() < 0.5)
        alpha = self.cutmix if uses_cutmix else self.mixup
        own = rng.beta(alpha, alpha)  # the share that an image keeps of itself
        partner = torch.arange(len(images), device=images.device)
        partner[:len(images) // 2 * 2] ^= 1
        if uses_cutmix:
            rows, columns = random_box(images.shape[2:], 1 - own, rng)
            mixed = images.clone()
            mixed[:, :, rows, columns] = images[partner][:, :, rows, columns]
            own = 1 - images[0, 0, rows, columns].numel() / images[0, 0].numel()
        else:
            mixed = images.lerp(images[partner], 1 - own)
        return mixed, labels.lerp(labels[partner], 1 - own)


def random_box(size, area, rng):
    """Slices (rows, columns) of a box with that share of an image's area, or less.

    Its centre is anywhere in the image, at whose borders it is cut off.
    """
    box = []
    for length in size:
        centre, half = rng.random() * length, length * area**0.5 / 2
        box.append(slice(round(max(centre - half, 0)), round(min(centre + half, length))))
    return box
