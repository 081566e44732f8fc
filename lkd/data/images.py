"""Image sets, and the batches drawn from them."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lkd.data.image_files import ImageFiles, cut_centers


class Batch(NamedTuple):
    """What a training step sees.

    Attributes:
        images: Normalised images, [B, C, H, W], float32.
        target: Class indices [B].
        index: Each image's position in its source data set, [B]: its identity, whatever the order of the batches.
    """

    images: Tensor
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # a field hides tuple.index


@dataclass(frozen=True)
class ImageSet:
    """Labelled images, in memory or in files.

    Attributes:
        images: uint8, [N, C, H, W]; or the files that they are decoded from when a batch needs them.
        labels: Class indices, int64, [N].
        index: Position of each image in its source data set, int64, [N].
        class_names: Name of each class.
        mean: Per-channel mean of the pixels scaled to [0, 1].
        std: Per-channel standard deviation of the pixels scaled to [0, 1].
    """

    images: Tensor | ImageFiles
    labels: Tensor
    index: Tensor
    class_names: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

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

    def select(self, positions: Tensor) -> "ImageSet":
        """The images at these positions, in this order."""
        return ImageSet(
            self.images[positions],
            self.labels[positions],
            self.index[positions],
            self.class_names,
            self.mean,
            self.std,
        )

    def relabel(self, labels: Tensor) -> "ImageSet":
        """The same images with other labels, [N]."""
        return ImageSet(self.images, labels, self.index, self.class_names, self.mean, self.std)

    def normalize(self, images: Tensor) -> Tensor:
        """Turn uint8 images [B, C, H, W] into float32 of zero mean and unit variance per channel."""
        mean = torch.tensor(self.mean, device=images.device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=images.device).view(1, -1, 1, 1)
        return (images.float() / 255 - mean) / std

    def batch(self, positions: Tensor, device: torch.device) -> Batch:
        """The batch at these positions, without augmentation."""
        chosen = self.images[positions]
        pixels = cut_centers(chosen) if isinstance(chosen, ImageFiles) else chosen
        return Batch(
            self.normalize(pixels.to(device)),
            self.labels[positions].to(device),
            self.index[positions].to(device),
        )
