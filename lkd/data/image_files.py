"""Images that stay in their files until a batch needs them.

Decoded when asked for, by a few threads: right for image sets that do not fit in memory and for short runs on them.
"""

import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor
from torchvision.transforms.functional import center_crop, resize

from lkd.errors import UserError

SUFFIXES = (".jpg", ".jpeg", ".png")
ATTEMPTS = 10  # of a random crop to fit, as in torchvision


@dataclass(frozen=True)
class ImageFiles:
    """A sequence of image files that is indexed like a uint8 tensor [N, 3, size, size], but reads nothing.

    Attributes:
        paths: The files.
        size: Height and width of the crops to cut.
    """

    paths: tuple[Path, ...]
    size: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, channels, height and width of the crops."""
        return len(self.paths), 3, self.size, self.size

    def __getitem__(self, positions: Tensor) -> "ImageFiles":
        """The files at these positions, in this order."""
        return replace(self, paths=tuple(self.paths[position] for position in positions.tolist()))


def cut_centers(files: ImageFiles) -> Tensor:
    """Decode, scale the shorter side to 256/224 of the size, cut out the centre: uint8, [N, 3, size, size]."""

    def cut(path: Path) -> Image.Image:
        return center_crop(resize(open_image(path), round(files.size * 256 / 224)), files.size)

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return stack(threads.map(cut, files.paths))


def cut_random_crops(files: ImageFiles, generator: Generator) -> Tensor:
    """Decode, cut a random part, scale it to the size, flip it with probability 1/2: uint8, [N, 3, size, size].

    The part covers 8 % to all of the image, at aspect ratios from 3/4 to 4/3 (Szegedy et al., 2015); as torchvision's
    RandomResizedCrop, with random numbers that depend on the generator alone, not on the threads.

    Args:
        files: The files.
        generator: Of the random numbers.
    """
    draws = torch.rand(len(files.paths), ATTEMPTS, 4, generator=generator, dtype=torch.float64)
    flips = torch.rand(len(files.paths), generator=generator) < 0.5

    def cut(path: Path, draw: Tensor, flip: Tensor) -> Image.Image:
        image = open_image(path)
        part = image.crop(choose_crop(image.size, draw.tolist()))
        scaled = part.resize((files.size, files.size), Image.Resampling.BILINEAR)
        return scaled.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else scaled

    with ThreadPoolExecutor(os.cpu_count()) as threads:
        return stack(threads.map(cut, files.paths, draws, flips))


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


def open_image(path: Path) -> Image.Image:
    """Decode a file as RGB.

    Raises:
        UserError: If it is not an image.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except OSError as error:
        raise UserError(f"{path}: cannot be decoded as an image ({error}): replace or remove it") from error


def stack(images: Iterable[Image.Image]) -> Tensor:
    """Stack RGB images of one size: uint8, [N, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)
