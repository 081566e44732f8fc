"""Augmentation of uint8 images, each a function of its pixels and its own random numbers."""

import math
from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.transforms.functional import center_crop
from torchvision.transforms.v2 import functional

from lkd.data.image_files import ImageFiles

ATTEMPTS = 10  # of a random crop to fit, as in torchvision
CROP_NUMBERS = 4 * ATTEMPTS + 1


def cut_center(image: Tensor, size: int, shorter_side: int) -> Tensor:
    """Scale an image [3, H, W] so that its shorter side has this length, cut out the centre, [3, size, size]."""
    return center_crop(resize_shorter_side(image, shorter_side), [size, size])


def resize_shorter_side(image: Tensor, length: int) -> Tensor:
    """Scale an image [3, H, W] so that its shorter side has this length, as torchvision's Resize."""
    height, width = image.shape[1:]
    if min(height, width) == length:
        return image
    longer = int(length * max(height, width) / min(height, width))
    return resize(image, *((longer, length) if height > width else (length, longer)))


def cut_random(image: Tensor, size: int, numbers: Tensor) -> Tensor:
    """Cut a random part of an image [3, H, W], scale it to [3, size, size], flip it with probability 1/2.

    The part covers 8 % to all of the image, at aspect ratios from 3/4 to 4/3 (Szegedy et al., 2015), as torchvision's
    RandomResizedCrop. Of the numbers in [0, 1) the first `CROP_NUMBERS` are used.
    """
    draws = numbers[: 4 * ATTEMPTS].view(ATTEMPTS, 4).tolist()
    left, top, right, bottom = choose_crop((image.shape[2], image.shape[1]), draws)
    crop = resize(image[:, top:bottom, left:right], size, size)
    return crop.flip(-1) if numbers[4 * ATTEMPTS] < 0.5 else crop


def choose_crop(size: tuple[int, int], draws: list[list[float]]) -> tuple[int, int, int, int]:
    """Turn uniform random numbers into a crop of an image of this width and height.

    Args:
        size: Width and height of the image.
        draws: For each attempt four numbers in [0, 1): area, aspect ratio, left, top.

    Returns:
        Left, top, right, bottom of the first attempt that fits, or of the largest central part of an aspect ratio in
        [3/4, 4/3].
    """
    width, height = size
    for area, ratio, left, top in draws:
        target = width * height * (0.08 + 0.92 * area)
        aspect = math.exp(math.log(3 / 4) + ratio * math.log(16 / 9))
        w, h = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < w <= width and 0 < h <= height:
            x, y = int(left * (width - w + 1)), int(top * (height - h + 1))
            return x, y, x + w, y + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    x, y = (width - w) // 2, (height - h) // 2
    return x, y, x + w, y + h


def resize(image: Tensor, height: int, width: int) -> Tensor:
    """Scale uint8 pixels [3, H, W] bilinearly, antialiased."""
    # In memory as [H, W, 3], which torch scales fastest, and as which decoders give it.
    pixels = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]


# ----------------------------------------------------------------------------------------------------------------------
# RandAugment (Cubuk et al., 2020) of one uint8 image, a function of the numbers it is given. torchvision's form and
# defaults: two operations of magnitude 9 out of 30. torchvision's own draws from the global generator, which threads
# would share.

OPERATIONS = 2
AUGMENT_NUMBERS = 2 * OPERATIONS
STRENGTH = 9 / 30


def move(image: Tensor, x: float = 0.0, y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0) -> Tensor:
    """Translate by parts of torchvision's 150/331 of the size, or shear by tangents."""
    height, width = image.shape[1:]
    translate = [int(x * width * 150 / 331), int(y * height * 150 / 331)]
    shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
    center = [0.0, 0.0] if shear_x or shear_y else None
    return functional.affine(image, 0.0, translate, 1.0, shear, center=center)


CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda image, sign: image,
    "ShearX": lambda image, sign: move(image, shear_x=sign * 0.3 * STRENGTH),
    "ShearY": lambda image, sign: move(image, shear_y=sign * 0.3 * STRENGTH),
    "TranslateX": lambda image, sign: move(image, x=sign * STRENGTH),
    "TranslateY": lambda image, sign: move(image, y=sign * STRENGTH),
    "Rotate": lambda image, sign: functional.rotate(image, sign * 30 * STRENGTH),
    "Brightness": lambda image, sign: functional.adjust_brightness(image, 1 + sign * 0.9 * STRENGTH),
    "Color": lambda image, sign: functional.adjust_saturation(image, 1 + sign * 0.9 * STRENGTH),
    "Contrast": lambda image, sign: functional.adjust_contrast(image, 1 + sign * 0.9 * STRENGTH),
    "Sharpness": lambda image, sign: functional.adjust_sharpness(image, 1 + sign * 0.9 * STRENGTH),
    "Posterize": lambda image, sign: functional.posterize(image, 8 - round(4 * STRENGTH)),
    "Solarize": lambda image, sign: functional.solarize(image, 255 * (1 - STRENGTH)),
    "AutoContrast": lambda image, sign: functional.autocontrast(image),
    "Equalize": lambda image, sign: functional.equalize(image),
}
"""Operation → from an image [3, H, W] and a sign, 1 or -1, to an image."""


def augment_randomly(image: Tensor, numbers: Tensor) -> Tensor:
    """Apply random operations one after another; of the numbers in [0, 1) each takes two: which it is, and its sign."""
    for which, sign in numbers[:AUGMENT_NUMBERS].view(OPERATIONS, 2).tolist():
        change = list(CHANGES.values())[int(which * len(CHANGES))]
        image = change(image, 1.0 if sign < 0.5 else -1.0)
    return image


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


AUGMENTATIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "none": lambda images, numbers: images,
    "flip_and_crop": flip_and_crop,
    "flip_and_crop_4": partial(flip_and_crop, padding=4),
}
"""Of images in memory: from pixels [B, C, H, W] and numbers [B, NUMBERS] to pixels."""

FILE_AUGMENTATIONS: dict[str, Callable[[Tensor, ImageFiles, Tensor], Tensor]] = {
    "none": lambda image, files, numbers: cut_center(image, files.size, files.shorter_side),
    "random_resized_crop": lambda image, files, numbers: cut_random(image, files.size, numbers),
    "rand_augment": lambda image, files, numbers: augment_randomly(
        cut_random(image, files.size, numbers), numbers[CROP_NUMBERS:]
    ),
}
"""Of images in files: from one image [3, H, W], what it is one of and numbers [NUMBERS] to a crop [3, size, size]."""


def augmentations_of(images: Tensor | ImageFiles) -> Iterable[str]:
    """The augmentations that these images can have."""
    return FILE_AUGMENTATIONS if isinstance(images, ImageFiles) else AUGMENTATIONS
