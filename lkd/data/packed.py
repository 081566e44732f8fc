"""Decoded images in one file: scaled down once, mapped into memory, cut without decoding."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.core.files import check_free_space, refusing_malformed, replaced_atomically
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.data.augment import SHORTER_SIDE, resize_shorter_side
from lkd.data.image_files import MOST_PIXELS, Damage, DamagedImageError, ImageSource
from lkd.data.loader import start_threads

KIND, VERSION = "packed images", 1
SAMPLE = 64  # images from which the size of all is estimated
AT_ONCE = 256  # images in memory while they are packed


class PackedSource:
    """The images of a source, scaled down.

    Args:
        source: The source, which names them.
        path: The pixels of all images, one after another, each [H, W, 3].
        shapes: Height and width of each, int64, [N, 2]; 0 where it was damaged.
    """

    def __init__(self, source: ImageSource, path: Path, shapes: Tensor) -> None:
        self.source = source
        self.shapes = shapes
        sizes = 3 * shapes.prod(1)
        self.starts = sizes.cumsum(0) - sizes
        self.pixels = np.memmap(path, np.uint8, "c", shape=int(sizes.sum()))  # torch warns of "r"

    def __len__(self) -> int:
        return len(self.shapes)

    def load(self, position: int) -> Tensor:
        """Look an image up; see `ImageSource`."""
        height, width = self.shapes[position].tolist()
        if not height:
            raise DamagedImageError(f"{self.name(position)}: could not be decoded when it was packed")
        start = int(self.starts[position])
        pixels = torch.from_numpy(self.pixels[start : start + 3 * height * width])
        return pixels.view(height, width, 3).permute(2, 0, 1)

    def name(self, position: int) -> str:
        """The source's name of it."""
        return self.source.name(position)

    def size(self, position: int) -> int:
        """Bytes of its pixels."""
        return 3 * int(self.shapes[position].prod())


def pack(
    source: ImageSource,
    folder: Path,
    part: str,
    shorter_side: int,
    workers: int,
    damage: Damage,
    watch: Callable[[int], object],
) -> Path:
    """Pack the images of a source; smaller ones keep their size.

    Args:
        source: The images.
        folder: Where `PART.pixels` and `PART.index.safetensors` go.
        part: What the source is, `train` or `val`.
        shorter_side: Pixels of the shorter side.
        workers: Threads that decode.
        damage: Counts images that cannot be decoded.
        watch: Told every number of images that are done.

    Returns:
        The index, which is written last.

    Raises:
        UserError: If the disk has not enough space, or more images are damaged than the limit allows.
    """

    def scale(position: int) -> Tensor | str:
        try:
            image = source.load(position)
        except DamagedImageError as error:
            return str(error)
        small = resize_shorter_side(image, shorter_side) if min(image.shape[1:]) > shorter_side else image
        return small.permute(1, 2, 0).contiguous()

    threads = start_threads(workers)
    sample = torch.linspace(0, len(source) - 1, SAMPLE).long().unique().tolist()
    check_space(folder, list(threads.map(scale, sample)), len(source))
    shapes = torch.zeros(len(source), 2, dtype=torch.int64)
    index = folder / f"{part}.index.safetensors"
    with replaced_atomically(folder / f"{part}.pixels") as temporary:
        with temporary.open("wb") as file:
            for first in range(0, len(source), AT_ONCE):
                positions = range(first, min(first + AT_ONCE, len(source)))
                failures = []
                for position, image in zip(positions, threads.map(scale, positions), strict=True):
                    if isinstance(image, str):
                        failures.append((source.name(position), image))
                    else:
                        shapes[position] = torch.tensor(image.shape[:2])
                        file.write(image.numpy().tobytes())
                damage.record(len(positions), failures)
                watch(len(positions))
        index.unlink(missing_ok=True)  # of pixels that are replaced now
    header = {"shorter_side": shorter_side, "images": len(source), "names": hash_names(source)}
    write_tensors(index, {"shapes": shapes}, KIND, VERSION, header)
    return index


def check_space(folder: Path, sample: list[Tensor | str], count: int) -> None:
    """Check that the disk has space for the images.

    Raises:
        UserError: If it has not.
    """
    sizes = [image.numel() for image in sample if not isinstance(image, str)]
    needed = int(1.05 * count * sum(sizes) / max(len(sizes), 1))
    advice = "take another disk, or a smaller shorter_side"
    check_free_space("data.packed", folder, needed, f"{count:,} images", advice)


def open_packed(source: ImageSource, folder: Path, part: str, image_size: int) -> PackedSource:
    """Open what `pack` wrote, checked against the source that it was made of.

    Raises:
        UserError: If there is nothing, it is of other images, or its images are too small for the crops.
    """
    path, index = folder / f"{part}.pixels", folder / f"{part}.index.safetensors"
    if not index.is_file():
        raise UserError(f"data.packed: {folder} holds no packed {part} images; write them with lkd pack")
    tensors, header = read_tensors(index, KIND, VERSION)
    with refusing_malformed(index, "index of packed images"):
        shapes = tensors["shapes"]
        if not all(type(header[key]) is int for key in ("images", "shorter_side")):
            raise ValueError(f"images {header['images']!r}, shorter_side {header['shorter_side']!r}")
        if shapes.dtype != torch.int64 or tuple(shapes.shape) != (header["images"], 2) or not header["images"]:
            raise ValueError(f"shapes are {shapes.dtype} {tuple(shapes.shape)}, of {header['images']} images")
        if not bool(((shapes >= 0) & (shapes <= MOST_PIXELS)).all() and (shapes.prod(1) <= MOST_PIXELS).all()):
            raise ValueError(
                f"shapes go from {shapes.min()} to {shapes.max()}, at most {MOST_PIXELS:,} pixels an image"
            )
        if bool(((shapes == 0).sum(1) == 1).any()):
            raise ValueError("an image has one side of 0")
        header["names"]
    if (header["images"], header["names"]) != (len(source), hash_names(source)):
        raise UserError(
            f"data.packed: {folder} holds {header['images']:,} {part} images that are not the {len(source):,} of "
            "data.root (or not by the same names): pack them anew"
        )
    if header["shorter_side"] < round(image_size * SHORTER_SIDE):
        raise UserError(
            f"data.packed: {folder} holds images of shorter side {header['shorter_side']}, data.image_size "
            f"{image_size} needs {round(image_size * SHORTER_SIDE)}: pack them anew with that shorter_side"
        )
    size = 3 * int(shapes.prod(1).sum())
    if not path.is_file() or path.stat().st_size != size:
        raise UserError(f"data.packed: {path} is missing or not of {size:,} bytes: pack the images anew")
    return PackedSource(source, path, shapes)


def hash_names(source: ImageSource) -> str:
    """A hash of the images' names, in order."""
    digest = hashlib.sha256()
    for position in range(len(source)):
        digest.update(source.name(position).encode() + b"\n")
    return digest.hexdigest()
