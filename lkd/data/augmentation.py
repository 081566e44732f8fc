"""Augmentation of uint8 images, each a function of its pixels and its own random numbers."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import pad

from lkd.data.crops import CROP_NUMBERS, cut_center, cut_random
from lkd.data.image_files import ImageFiles
from lkd.data.rand_augment import AUGMENT_NUMBERS, augment_randomly

NUMBERS = CROP_NUMBERS + AUGMENT_NUMBERS
"""Random numbers that an image gets."""


def flip_and_crop(images: Tensor, numbers: Tensor, padding: int = 2) -> Tensor:
    """Flip each image with probability 1/2 and cut it out of its zero-padded self at a random place.

    Args:
        images: uint8, [B, C, H, W].
        numbers: In [0, 1), [B, 3 or more]: flip, top, left.
        padding: Pixels of zeros on each side.

    Returns:
        Images of the same shape.
    """
    count, _, height, width = images.shape
    images = torch.where((numbers[:, 0] < 0.5).view(-1, 1, 1, 1), images.flip(-1), images)
    padded = pad(images, [padding] * 4)
    top, left = (numbers[:, 1:3] * (2 * padding + 1)).long().unbind(1)
    rows = top.view(-1, 1) + torch.arange(height)
    columns = left.view(-1, 1) + torch.arange(width)
    each = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def cut_and_augment(image: Tensor, size: int, numbers: Tensor) -> Tensor:
    """A random crop, and RandAugment of it."""
    return augment_randomly(cut_random(image, size, numbers), numbers[CROP_NUMBERS:])


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda images, numbers: images,
    "flip_and_crop": flip_and_crop,
    "flip_and_crop_4": partial(flip_and_crop, padding=4),
}
"""Of images in memory: from pixels [B, C, H, W] and numbers [B, NUMBERS] to pixels."""

FILE_AUGMENTATIONS: dict[str, Callable[[Tensor, int, Tensor], Tensor]] = {
    "none": lambda image, size, numbers: cut_center(image, size),
    "random_resized_crop": cut_random,
    "rand_augment": cut_and_augment,
}
"""Of images in files: from one image [3, H, W], the size and numbers [NUMBERS] to a crop [3, size, size]."""


def augmentations_of(images: Tensor | ImageFiles) -> Iterable[str]:
    """The augmentations that these images can have."""
    return FILE_AUGMENTATIONS if isinstance(images, ImageFiles) else AUGMENTATIONS
