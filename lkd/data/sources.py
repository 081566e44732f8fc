"""Where the images of a large data set are, one by one."""

import os
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from lkd.data.decoding import DamagedImageError, decode


class ImageSource(Protocol):
    """Images by their position; any thread may ask."""

    def __len__(self) -> int: ...

    def load(self, position: int) -> Tensor:
        """Decode an image: uint8, [3, H, W].

        Raises:
            DamagedImageError: If it cannot be read or decoded.
        """

    def name(self, position: int) -> str:
        """What an image is called in messages and fingerprints."""

    def size(self, position: int) -> int:
        """Bytes that are read to load an image."""


class FileSource:
    """Images in files of their own.

    Args:
        root: The folder.
        names: Paths of the files in it.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = str(root)
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def load(self, position: int) -> Tensor:
        """Decode a file; see `ImageSource`."""
        name = self.name(position)
        try:
            content = np.fromfile(f"{self.root}/{name}", np.uint8)
        except OSError as error:
            raise DamagedImageError(f"{name}: cannot be read ({error.strerror})") from error
        return decode(torch.from_numpy(content), name)

    def name(self, position: int) -> str:
        """The path in the root."""
        return self.names[position]

    def size(self, position: int) -> int:
        """Bytes of the file."""
        return os.stat(f"{self.root}/{self.name(position)}").st_size
