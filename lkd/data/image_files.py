"""Images that stay in files until a batch needs them: where they are, how they are decoded, what is damaged."""

import functools
import importlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lkd.core.errors import UserError
from lkd.core.workers import count_cores

LEAST_SEEN = 10_000  # a fraction of fewer images means little
MOST_PIXELS = 1 << 26  # of an image, 200 MB decoded: a file of a few bytes can claim thousands of millions
MOST_ELONGATED = 64  # longer side over the shorter: the crop's shorter side is scaled up, and the longer one with it
DECODED_FAST = ("JPEG", "MPO")  # MPO: a JPEG of several images; on damaged PNGs torchvision crashes
BITS_PER_SAMPLE, PHOTOMETRIC = 258, 262  # tags of TIFF; the latter is 0 where 0 is white
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no others: Pillow has some start other programs
# What systems and programs leave beside people's own folders; and all that begins with a dot.
HIDDEN = ("__MACOSX", "__pycache__", "@eaDir", "@Recycle", "#recycle", "#snapshot", "lost+found", "$RECYCLE.BIN")


class DamagedImageError(Exception):
    """An image that cannot be decoded; the message names it and says why."""


@dataclass
class Damage:
    """Counts the images that were asked for and those that could not be decoded.

    Attributes:
        limit: Fraction of damaged images above which the run stops; of at least `LEAST_SEEN` images.
        seen: Images that were asked for, each as often as it was.
        damaged: Those of them that could not be decoded.
        named: Their names, each once: these are held to the limit.
    """

    limit: float = 0.001
    seen: int = 0
    damaged: int = 0
    named: set[str] = field(default_factory=set)
    lock: Lock = field(default_factory=Lock)

    def record(self, seen: int, failures: list[tuple[str, str]]) -> None:
        """Count images, and log each damaged one the first time.

        Args:
            seen: Images asked for, the damaged ones among them.
            failures: Name of each damaged image, and what is wrong with it.
        """
        with self.lock:
            self.seen += seen
            self.damaged += len(failures)
            for name, reason in failures:
                if name not in self.named:
                    self.named.add(name)
                    counts = f"{self.damaged} damaged of {self.seen} images seen"
                    logging.getLogger("lkd").warning("%s; skipped (%s)", reason, counts)
            if len(self.named) > self.limit * max(self.seen, LEAST_SEEN):
                named = ", ".join(sorted(self.named)[:3]) + (", ..." if len(self.named) > 3 else "")
                raise UserError(
                    f"data: {len(self.named)} of {self.seen} images seen cannot be decoded ({named}), more than "
                    f"data.damaged_limit {self.limit:g} allows: replace them, or raise the limit"
                )


# ----------------------------------------------------------------------------------------------------------------------
# From a file's bytes to pixels.


def decode(content: Tensor, name: str) -> Tensor:
    """Decode an image file as RGB.

    From its bytes, uint8, [N], to uint8, [3, H, W]. Its size is read first. `find_decoder`'s decodes JPEG; Pillow what
    is left of `FORMATS`, and what that cannot.

    Raises:
        DamagedImageError: If it is no image, half of one, or too large.
    """
    try:
        with Image.open(io.BytesIO(content.numpy().data), formats=FORMATS) as image:
            check_size(*image.size)
            pixels = decode_fast(content) if image.format in DECODED_FAST else None
            return to_rgb(image) if pixels is None else pixels
    except Exception as error:  # Pillow's readers let out whatever their parsers raise
        reason = " ".join(str(error).split(" <")[0].split())  # without the address of an object
        raise DamagedImageError(f"{name}: cannot be decoded ({reason})") from error


def to_rgb(image: Any) -> Tensor:
    """Pixels of a Pillow image of any mode as RGB: uint8, [3, H, W]; see `to_8_bits`."""
    return pil_to_tensor(to_8_bits(image).convert("RGB"))


def to_8_bits(image: Any) -> Any:
    """A Pillow image of 8 bits a channel, where Pillow's own conversion would cut grey values off at 255.

    16-bit grey (12 of TIFF's) is scaled by its largest value. Palettes are looked up, and transparency is dropped.

    Raises:
        ValueError: If its numbers have no range that says what is black and what is white.
    """
    if image.mode in ("P", "PA"):
        return image.convert("RGB")
    is_short = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    if not is_short:
        if image.mode in ("I", "F"):
            kind = "32-bit integers" if image.mode == "I" else "floating-point numbers"
            raise ValueError(f"its pixels are {kind}, whose black and white are not known: save 8 or 16 bits of grey")
        return image.convert("L") if image.mode == "1" else image
    tags = getattr(image, "tag_v2", {})
    bits, photometric = tags.get(BITS_PER_SAMPLE, (16,)), tags.get(PHOTOMETRIC, 1)
    values = np.asarray(image, dtype=np.float64) / (2 ** int(bits[0]) - 1)
    grey = (255 * (values if photometric else 1 - values)).round().clip(0, 255).astype(np.uint8)
    return Image.fromarray(grey)


def check_size(width: int, height: int) -> None:
    """Check an image's size before any memory is taken for it."""
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise ValueError(f"{width} × {height} pixels, at most {MOST_PIXELS:,} are decoded")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(f"{width} × {height} pixels, one side more than {MOST_ELONGATED} times the other")


@functools.cache
def find_decoder() -> Callable[..., Tensor] | None:
    """A faster decoder than Pillow: TorchCodec's, or torchvision's while that has one; None if there is neither."""
    for module in ("torchcodec.decoders", "torchvision.io"):
        try:
            return importlib.import_module(module).decode_image
        except (ImportError, AttributeError, RuntimeError, OSError):  # the last two: libraries that it misses
            continue
    return None


def decode_fast(content: Tensor) -> Tensor | None:
    """Decode an image file as RGB; None where no decoder but Pillow can, or it gives no 8 bits."""
    decoder = find_decoder()
    try:
        pixels = decoder(content, mode="RGB") if decoder else content
    except RuntimeError:  # what Pillow says of the file is clearer, and it may know better
        return None
    return pixels if pixels.dtype == torch.uint8 and pixels.dim() == 3 else None


def as_bytes(content: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)


# ----------------------------------------------------------------------------------------------------------------------
# Where images are.


def is_hidden(path: str) -> bool:
    """Whether a file, or a folder that it lies in, is none of the user's own: no image and no class."""
    return any(part in HIDDEN or (part.startswith(".") and part not in (".", "..")) for part in path.split("/"))


class ImageSource:
    """Images by their position; any thread may ask.

    Attributes:
        names: What each is called in messages and fingerprints.
        names_tell: Whether names tell images apart from those of another set, as those of files do.
    """

    names: Sequence[str]
    names_tell = True

    def read(self, position: int) -> Tensor:
        """The bytes of an image as they are kept, uint8, [N]."""
        raise NotImplementedError

    def sizes(self) -> Tensor | None:
        """Bytes of each image, int64, [N], by which one is found that was replaced; None if that takes reading all."""
        return None

    def load(self, position: int) -> Tensor:
        """Decode an image: uint8, [3, H, W].

        Raises:
            DamagedImageError: If it cannot be read or decoded.
        """
        name = self.names[position]
        try:
            content = self.read(position)
        except OSError as error:
            raise DamagedImageError(f"{name}: cannot be read ({error.strerror})") from error
        return decode(content, name)


class FileSource(ImageSource):
    """Images in files of their own.

    Args:
        root: The folder.
        names: Paths of the files in it.
    """

    def __init__(self, root: Path, names: list[str]) -> None:
        self.root = str(root)
        self.names = names

    def read(self, position: int) -> Tensor:
        return torch.from_numpy(np.fromfile(f"{self.root}/{self.names[position]}", np.uint8))

    def sizes(self) -> Tensor:
        def measure(name: str) -> int:
            try:
                return os.stat(f"{self.root}/{name}").st_size
            except OSError:  # a list names it, but it is not there
                return -1

        return torch.tensor([measure(name) for name in self.names])


class LoadingOptions(NamedTuple):
    """How images in files are loaded: fields of `lkd.config.DataRecipe`."""

    image_size: int = 224
    workers: int = 0
    damaged_limit: float = 0.001
    packed: str | None = None
    read_timeout: float = 600.0
    crop_pct: float = 0.875


@dataclass(frozen=True)
class ImageFiles:
    """A sequence of images that is indexed like a uint8 tensor [N, 3, size, size], but reads nothing.

    Attributes:
        source: Where they are.
        positions: Which of the source's images, int64, [N].
        loading: How they are loaded.
        damage: Counts those that cannot be decoded.
    """

    source: ImageSource
    positions: Tensor
    loading: LoadingOptions
    damage: Damage

    @property
    def size(self) -> int:
        return self.loading.image_size

    @property
    def shorter_side(self) -> int:
        """Pixels to which the shorter side is scaled before the centre is cut out."""
        return round(self.size / self.loading.crop_pct)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """N, channels, height and width of the crops."""
        return len(self.positions), 3, self.size, self.size

    def __getitem__(self, positions: Tensor) -> "ImageFiles":
        return replace(self, positions=self.positions[positions])

    def name(self, slot: int) -> str:
        """What the image in this place is called."""
        return self.source.names[int(self.positions[slot])]

    def load(self, slot: int) -> Tensor:
        """Decode the image in this place: uint8, [3, H, W].

        Raises:
            DamagedImageError: If it cannot be decoded.
        """
        return self.source.load(int(self.positions[slot]))


def open_source(source: ImageSource, loading: LoadingOptions) -> ImageFiles:
    """All images of a source, in its order."""
    loading = loading._replace(workers=loading.workers or count_own_cores())
    return ImageFiles(source, torch.arange(len(source.names)), loading, Damage(loading.damaged_limit))


def count_own_cores() -> int:
    """This process's share of the CPU cores that it may use with the other processes of a torchrun job on its host."""
    return max(1, count_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
