"""Resize, crop and augment single images: PIL images or `ArrayImage`s to tensors [C, H, W].

    transform = image_transforms.train_transform(dataset, Augmentation())
    transform = image_transforms.test_transform(dataset)

A PIL image gives uint8, an ArrayImage float32 in 0..1. torchvision is imported inside functions,
because it is slow to import.
"""

import math

import torch

from training.datasets import sides
from training.decoding import ArrayImage

MAX_ASPECT_RATIO = 4  # longer images lose their ends before a centre crop
# AlexNet's lighting noise with the constants of fb.resnet.torch, in 0..1: eigenvectors (columns)
# and eigenvalues of ImageNet's RGB values, standard deviation of the random factors.
PCA_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
PCA_VALUES = (0.2175, 0.0188, 0.0045)
LIGHTING_STD = 0.1


def train_transform(dataset, augmentation):
    """The augmentation of fb.resnet.torch, which the official ImageNet models were trained with.

    Images of neither 1 nor 3 channels are only cropped, resized and mirrored.

    Crop, resize and colour jitter are torchvision's; attic/imagenet-recipe.md lists how they differ
    from fb.resnet.torch.
    """
    from torchvision import transforms

    steps = [RandomResizedCrop(dataset.image_size)]
    if augmentation.mirror:
        steps.append(transforms.RandomHorizontalFlip())
    if augmentation.color_jitter and len(dataset.mean) in (1, 3):
        steps += [transforms.ColorJitter(0.4, 0.4, 0.4), to_tensor, add_lighting]
    else:
        steps.append(to_tensor)
    others = augmentation.of_image(dataset.mean)
    return transforms.Compose([*steps, others] if others else steps)


def test_transform(dataset, ten_crop=False):
    """Centre crop of 224/256 of an image's shorter side; no crop if images are held in memory.

    If height and width differ, it is 224/256 of the largest centred part with that aspect ratio.
    """
    from torchvision import transforms

    size = sides(dataset.image_size)
    crop = [transforms.TenCrop(size), torch.stack] if ten_crop else [transforms.CenterCrop(size)]
    larger = [round(side * 256 / 224) for side in size]
    return transforms.Compose([Resize(size if dataset.in_memory else larger), to_tensor, *crop])


class RandomResizedCrop(torch.nn.Module):
    """torchvision's, extended to `ArrayImage`.

    The aspect ratio of the crop, 3/4 to 4/3, is relative to the output's.
    """

    def __init__(self, size):
        from torchvision import transforms

        super().__init__()
        height, width = sides(size)
        ratio = width / height
        self.crop = transforms.RandomResizedCrop(
            (height, width), ratio=(3 / 4 * ratio, 4 / 3 * ratio))

    def forward(self, image):
        return image.map(self.crop) if isinstance(image, ArrayImage) else self.crop(image)


class Resize(torch.nn.Module):
    """Resize a PIL image or `ArrayImage` to the smallest size that covers `size`, undistorted.

    Crops elongated images first: resized to 256 pixels, an image of 2 x 20,000 would have 2.6
    million in the other direction.
    """

    def __init__(self, size):
        super().__init__()
        self.size = sides(size)

    def forward(self, image):
        from torchvision import transforms

        width, height = image.size
        new_height, new_width = self.size
        kept_width = min(width, math.ceil(MAX_ASPECT_RATIO * height * new_width / new_height))
        kept_height = min(height, math.ceil(MAX_ASPECT_RATIO * width * new_height / new_width))
        if (kept_width, kept_height) != image.size:
            left, top = (width - kept_width) // 2, (height - kept_height) // 2
            image = image.crop((left, top, left + kept_width, top + kept_height))
        if kept_width * new_height <= kept_height * new_width:
            new_height = int(new_width * kept_height / kept_width)
        else:
            new_width = int(new_height * kept_width / kept_height)
        resize = transforms.Resize((new_height, new_width))
        return image.map(resize) if isinstance(image, ArrayImage) else resize(image)


def add_lighting(image):
    """AlexNet's lighting noise (section 4.1): add the same random colour to all pixels.

    Shapes: uint8 or float32 (0..1) [C, H, W]; the result is clamped to the same range. Images with
    one channel are returned unchanged.
    """
    if len(image) == 1:
        return image
    factors = LIGHTING_STD * torch.randn(3) * torch.tensor(PCA_VALUES)
    colour = (torch.tensor(PCA_VECTORS) * factors).sum(1).view(3, 1, 1)
    if image.is_floating_point():
        return (image + colour).clamp(0, 1)
    steps = (255 * colour).round().to(torch.int16)
    # contiguous: PIL's images are channels last, which is slower
    return (image.contiguous() + steps).clamp(0, 255).to(torch.uint8)


def to_tensor(image):
    """uint8 [C, H, W] of a PIL image, float32 of an `ArrayImage`; tensors are returned as is."""
    if isinstance(image, ArrayImage):
        return image.map(lambda channel: channel)
    if torch.is_tensor(image):
        return image
    from torchvision.transforms.functional import pil_to_tensor

    return pil_to_tensor(image)
