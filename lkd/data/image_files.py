"""Images that stay where they are until a batch needs them."""

import os
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor

from lkd.data.damage import Damage
from lkd.data.sources import ImageSource
from lkd.errors import UserError


class LoadingOptions(NamedTuple):
    """How images in files are loaded.

    Attributes:
        image_size: Height and width of the crops to cut.
        workers: Threads that decode; 0 for one for each CPU core of this process.
        damaged_limit: Fraction of damaged images above which the run stops.
        packed: Folder of packed images to take instead.
        read_timeout: Seconds after which waiting for an image ends the run; 0 for never.
    """

    image_size: int = 224
    workers: int = 0
    damaged_limit: float = 0.001
    packed: str | None = None
    read_timeout: float = 600.0


@dataclass(frozen=True)
class ImageFiles:
    """A sequence of images that is indexed like a uint8 tensor [N, 3, size, size], but reads nothing.

    Attributes:
        source: Where they are.
        positions: Which of the source's images, int64, [N].
        size: Height and width of the crops to cut.
        workers: Threads that decode.
        damage: Counts those that cannot be decoded.
        timeout: Seconds after which waiting for one ends the run; None for never.
    """

    source: ImageSource
    positions: Tensor
    size: int
    workers: int = 1
    damage: Damage = field(default_factory=Damage)
    timeout: float | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, channels, height and width of the crops."""
        return len(self.positions), 3, self.size, self.size

    def __getitem__(self, positions: Tensor) -> "ImageFiles":
        """The images at these positions, in this order."""
        return replace(self, positions=self.positions[positions])

    def name(self, slot: int) -> str:
        """What the image in this place is called."""
        return self.source.name(int(self.positions[slot]))

    def load(self, slot: int) -> Tensor:
        """Decode the image in this place: uint8, [3, H, W].

        Raises:
            DamagedImageError: If it cannot be decoded.
        """
        return self.source.load(int(self.positions[slot]))


def open_source(source: ImageSource, loading: LoadingOptions) -> ImageFiles:
    """All images of a source, in its order.

    Raises:
        UserError: If a setting is impossible.
    """
    if loading.read_timeout < 0:
        raise UserError(f"data.read_timeout: {loading.read_timeout:g} is negative; 0 waits for ever")
    positions, workers = torch.arange(len(source)), loading.workers or count_own_cores()
    damage = Damage(loading.damaged_limit)
    return ImageFiles(source, positions, loading.image_size, workers, damage, loading.read_timeout or None)


def count_own_cores() -> int:
    """This process's share of the CPU cores that it may use with the other processes of a torchrun job on its host."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
