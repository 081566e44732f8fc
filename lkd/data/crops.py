"""Crops of one image, uint8, the random ones a function of the numbers they are given."""

import math

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.transforms.functional import center_crop

ATTEMPTS = 10  # of a random crop to fit, as in torchvision
CROP_NUMBERS = 4 * ATTEMPTS + 1
SHORTER_SIDE = 256 / 224  # of an image whose centre is cut out, over the crop's size: the literature's


def cut_center(image: Tensor, size: int) -> Tensor:
    """Scale the shorter side to 256/224 of the size, cut out the centre.

    Args:
        image: uint8, [3, H, W].
        size: Height and width of the crop.

    Returns:
        uint8, [3, size, size].
    """
    return center_crop(resize_shorter_side(image, round(size * SHORTER_SIDE)), [size, size])


def resize_shorter_side(image: Tensor, length: int) -> Tensor:
    """Scale an image [3, H, W] so that its shorter side has this length, as torchvision's Resize."""
    height, width = image.shape[1:]
    if min(height, width) == length:
        return image
    longer = int(length * max(height, width) / min(height, width))
    return resize(image, *((longer, length) if height > width else (length, longer)))


def cut_random(image: Tensor, size: int, numbers: Tensor) -> Tensor:
    """Cut a random part, scale it to the size, flip it with probability 1/2.

    The part covers 8 % to all of the image, at aspect ratios from 3/4 to 4/3 (Szegedy et al., 2015), as torchvision's
    RandomResizedCrop.

    Args:
        image: uint8, [3, H, W].
        size: Height and width of the crop.
        numbers: In [0, 1), the first `CROP_NUMBERS` of which are used.

    Returns:
        uint8, [3, size, size].
    """
    draws = numbers[: 4 * ATTEMPTS].view(ATTEMPTS, 4).tolist()
    left, top, right, bottom = choose_crop((image.shape[2], image.shape[1]), draws)
    crop = resize(image[:, top:bottom, left:right], size, size)
    return crop.flip(-1) if numbers[4 * ATTEMPTS] < 0.5 else crop


def choose_crop(size: tuple[int, int], draws: list[list[float]]) -> tuple[int, int, int, int]:
    """Turn uniform random numbers into a crop.

    Args:
        size: Width and height of the image.
        draws: For each attempt four numbers in [0, 1): area, aspect ratio, left, top.

    Returns:
        Left, top, right, bottom: of the first attempt that fits, or else the largest central part whose aspect ratio
        is in [3/4, 4/3].
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
    """Scale uint8 pixels [3, H, W] bilinearly, antialiased.

    In memory as [H, W, 3], which torch scales fastest, and as which decoders give it.
    """
    pixels = image.unsqueeze(0).contiguous(memory_format=torch.channels_last)
    return interpolate(pixels, (height, width), mode="bilinear", antialias=True)[0]
