"""Augmentation of uint8 batches, a pure function of its generator."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor
from torch.nn.functional import pad

from lkd.data.image_files import ImageFiles, cut_centers, cut_random_crops


def flip_and_crop(images: Tensor, generator: Generator, padding: int = 2) -> Tensor:
    """Flip each image with probability 1/2 and cut it out of its zero-padded self at a random place.

    Args:
        images: uint8, [B, C, H, W].
        generator: Of the random numbers.
        padding: Pixels of zeros on each side.

    Returns:
        Images of the same shape.
    """
    count, _, height, width = images.shape
    flipped = torch.rand(count, generator=generator) < 0.5
    images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(-1), images)
    padded = pad(images, [padding] * 4)
    top, left = torch.randint(0, 2 * padding + 1, (2, count), generator=generator)
    rows = top.view(-1, 1) + torch.arange(height)
    columns = left.view(-1, 1) + torch.arange(width)
    each = torch.arange(count).view(-1, 1, 1)
    return padded.permute(0, 2, 3, 1)[each, rows.unsqueeze(2), columns.unsqueeze(1)].permute(0, 3, 1, 2)


def keep(images: Tensor, generator: Generator) -> Tensor:
    """No augmentation."""
    return images


AUGMENTATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "none": keep,
    "flip_and_crop": flip_and_crop,
    "flip_and_crop_4": partial(flip_and_crop, padding=4),
}
FILE_AUGMENTATIONS: dict[str, Callable[[ImageFiles, Generator], Tensor]] = {
    "none": lambda files, generator: cut_centers(files),
    "random_resized_crop": cut_random_crops,
}


def augmentations_of(images: Tensor | ImageFiles) -> dict[str, Callable[[Any, Generator], Tensor]]:
    """The augmentations by name that these images can have."""
    return FILE_AUGMENTATIONS if isinstance(images, ImageFiles) else AUGMENTATIONS
