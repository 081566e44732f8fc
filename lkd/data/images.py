"""Image sets, and the batches drawn from them."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkd.data.augment import cut_center
from lkd.data.image_files import DamagedImageError, ImageFiles
from lkd.data.loader import Loading, Prefetcher


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small tensor of the CPU's on a device; to a GPU through pinned memory, so that this process need not wait."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Batch(NamedTuple):
    """What a training step sees.

    Attributes:
        images: Normalised images, [B, C, H, W], float32.
        target: Class indices [B], or distributions [B, C].
        index: Each image's position in its source data set, [B]: its identity, whatever the order of the batches.
        augmentation: Each image's augmentation seed, int64, [B]; 0 for none. With `index` it says how the image looks.
    """

    images: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # a field hides tuple.index
    augmentation: Tensor


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, in memory or in files.

    Attributes:
        images: uint8, [N, C, H, W]; or float32, as networks are to see them; or where they are decoded from when a
            batch needs them.
        labels: Class indices, int64, [N].
        index: Position of each image in its source data set, int64, [N].
        class_names: Name of each class.
        mean: Per-channel mean of the pixels scaled to [0, 1].
        std: Per-channel standard deviation of the pixels scaled to [0, 1].
        at_once: How many are in memory at a time where a network only answers: in evaluation and in teachers' tables.

    `mean` and `std` are what uint8 pixels are normalised with, and what float32 images have been.
    """

    images: Tensor | ImageFiles
    labels: Tensor
    index: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    at_once: int = 500

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of classes, whether all of them occur or not."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height, width."""
        channels, height, width = self.images.shape[1:]
        return channels, height, width

    @property
    def says_normalisation(self) -> bool:
        """Whether `mean` and `std` are those of the pixels: 0 and 1 are of none that go beyond [0, 1]."""
        pixels, (channels, *_) = self.images, self.image_shape
        said = (self.mean, self.std) != ((0.0,) * channels, (1.0,) * channels)
        if said or not isinstance(pixels, Tensor) or not pixels.is_floating_point() or not len(pixels):
            return True
        return bool(0 <= pixels.min() <= pixels.max() <= 1)

    def select(self, positions: Tensor) -> "ImageSet":
        """The images at these positions, in this order."""
        return replace(self, images=self.images[positions], labels=self.labels[positions], index=self.index[positions])

    def relabel(self, labels: Tensor) -> "ImageSet":
        """The same images with other labels, [N]."""
        return replace(self, labels=labels)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 images [B, C, H, W] into float32 of zero mean and unit variance per channel."""
        if images.is_floating_point():
            return images
        mean, std = (send(255 * torch.tensor(values), images.device) for values in (self.mean, self.std))
        if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
            return images.float().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
        # A row of pixels at a time: on CPUs three channels at a time take twice as long.
        width = images.shape[3]
        rows = images.permute(0, 2, 3, 1).flatten(2).float().sub_(mean.repeat(width)).div_(std.repeat(width))
        return rows.unflatten(2, (width, -1)).permute(0, 3, 1, 2)

    def batch(self, positions: Tensor, device: torch.device) -> Batch:
        """The batch at these positions, without augmentation; damaged images are left out."""
        return next(self.batches([positions], device))

    def batches(self, parts: Sequence[Tensor], device: torch.device) -> Iterator[Batch]:
        """The batches at these positions, one after another, without augmentation; damaged images are left out."""
        for pixels, positions in self.load(parts, device):
            yield Batch(
                self.normalize(pixels.to(device, non_blocking=True)),
                send(self.labels[positions], device),
                send(self.index[positions], device),
                torch.zeros_like(positions, device=device),
            )

    def load(self, parts: Sequence[Tensor], device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """Pixels and positions of the images at these positions; of files the centres of those that can be decoded."""
        files = self.images
        if not isinstance(files, ImageFiles):
            yield from ((files[positions], positions) for positions in parts)
            return

        def cut(image: Tensor, slot: int) -> Tensor:
            return cut_center(image, files.size, files.shorter_side)

        def start(number: int) -> Loading:
            return Loading(files, parts[number], cut, replace=False, pin=device.type == "cuda")

        for loading in Prefetcher(start, len(parts)):
            yield loading.wait()[:2]


@dataclass(frozen=True)
class Dataset:
    """A named data set: its training part, to be split further, and its test part, for reported numbers only."""

    name: str
    train: ImageSet
    test: ImageSet


def measure(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel of uint8 images, of pixels in [0, 1]; of others 0 and 1."""
    channels = images.shape[1]
    if images.dtype != torch.uint8:
        return [0.0] * channels, [1.0] * channels
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    for part in images.split(1000):  # bincount would widen all of them
        counts += torch.stack([part[:, channel].flatten().bincount(minlength=256) for channel in range(channels)])
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = counts / counts.sum(1, keepdim=True)
    mean = (shares * values).sum(1)
    std = (shares * (values - mean.unsqueeze(1)).square()).sum(1).sqrt()
    return mean.tolist(), std.tolist()


SAMPLED = 20  # images in files by which they are told from others of the same names


def identify_pixels(part: ImageSet) -> Any:
    """The images, for a hash; of those in files, whose names may be those of others, the bytes of some."""
    files = part.images
    if isinstance(files, Tensor):
        return files

    def read(position: int) -> Tensor | None:
        with suppress(OSError, DamagedImageError):
            return files.source.read(position)
        return None

    return [read(position) for position in files.positions[:SAMPLED].tolist()]
