"""Decoded images in one file: scaled down once, mapped into memory, cut without decoding."""

import hashlib
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.core.files import check_free_space, refusing_malformed, replaced_atomically
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.data.augment import resize_shorter_side
from lkd.data.image_files import MOST_PIXELS, DamagedImageError, ImageFiles, ImageSource, LoadingOptions
from lkd.data.loader import start_threads

warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)  # nobody writes into it

KIND, VERSION = "packed images", 1
SAMPLE = 64  # images from which the size of all is estimated
AT_ONCE = 256  # images in memory while they are packed


class PackedSource(ImageSource):
    """The images of a source, scaled down.

    Args:
        source: The source, which names them.
        path: The pixels of all images, one after another, each [H, W, 3].
        shapes: Height and width of each, int64, [N, 2]; 0 where it was damaged.
    """

    def __init__(self, source: ImageSource, path: Path, shapes: Tensor) -> None:
        self.source, self.names, self.names_tell = source, source.names, source.names_tell
        self.shapes = shapes
        self.ends = (3 * shapes.prod(1)).cumsum(0)
        self.pixels = np.memmap(path, np.uint8, "r", shape=int(self.ends[-1]))  # "c" would have to fit into memory

    def read(self, position: int) -> Tensor:
        """The pixels of an image, one after another."""
        end = int(self.ends[position])
        return torch.from_numpy(self.pixels[end - 3 * int(self.shapes[position].prod()) : end])

    def sizes(self) -> Tensor | None:
        return self.source.sizes()

    def load(self, position: int) -> Tensor:
        height, width = self.shapes[position].tolist()
        if not height:
            raise DamagedImageError(f"{self.names[position]}: could not be decoded when it was packed")
        return self.read(position).view(height, width, 3).permute(2, 0, 1)


def pack(files: ImageFiles, folder: Path, part: str, shorter_side: int, watch: Callable[[int], object]) -> Path:
    """Pack all images of a source into `PART.pixels` and `PART.index.safetensors`; the latter, which is written last.

    Their shorter side becomes `shorter_side` pixels; smaller ones keep their size. `watch` is told of every some images
    that are done how many they are. What is there already, of the same files, stays.
    """
    source = files.source
    count, pixels, index = len(source.names), folder / f"{part}.pixels", folder / f"{part}.index.safetensors"
    header = {"shorter_side": shorter_side, "images": count, "names": hash_names(source), "sizes": hash_sizes(source)}
    with suppress(UserError, OSError):
        tensors, kept = read_tensors(index, KIND, VERSION)
        whole = pixels.stat().st_size == 3 * int(tensors["shapes"].prod(1).sum())
        if whole and header["sizes"] and header.items() <= kept.items():
            watch(count)
            return index

    def scale(position: int) -> Tensor | str:
        try:
            image = source.load(position)
        except DamagedImageError as error:
            return str(error)
        small = resize_shorter_side(image, shorter_side) if min(image.shape[1:]) > shorter_side else image
        return small.permute(1, 2, 0).contiguous()

    threads = start_threads(files.loading.workers, os.getpid())
    sample = torch.linspace(0, count - 1, SAMPLE).long().unique().tolist()
    sizes = [image.numel() for image in threads.map(scale, sample) if not isinstance(image, str)]
    needed = int(1.05 * count * sum(sizes) / max(len(sizes), 1))
    advice = "take another disk, or a smaller shorter_side"
    check_free_space("data.packed", folder, needed, f"{count:,} images", advice)
    shapes = torch.zeros(count, 2, dtype=torch.int64)
    with replaced_atomically(pixels) as temporary:
        with temporary.open("wb") as file:
            for first in range(0, count, AT_ONCE):
                positions = range(first, min(first + AT_ONCE, count))
                failures = []
                for position, image in zip(positions, threads.map(scale, positions), strict=True):
                    if isinstance(image, str):
                        failures.append((source.names[position], image))
                    else:
                        shapes[position] = torch.tensor(image.shape[:2])
                        file.write(image.numpy().tobytes())
                files.damage.record(len(positions), failures)
                watch(len(positions))
        index.unlink(missing_ok=True)  # of pixels that are replaced now
    write_tensors(index, {"shapes": shapes}, KIND, VERSION, header)
    return index


def open_packed(source: ImageSource, folder: Path, part: str, loading: LoadingOptions) -> PackedSource:
    """Open what `pack` wrote, checked against the source that it was made of."""
    path, index = folder / f"{part}.pixels", folder / f"{part}.index.safetensors"
    if not index.is_file():
        raise UserError(f"data.packed: {folder} holds no packed {part} images; write them with lkd pack")
    tensors, header = read_tensors(index, KIND, VERSION)
    with refusing_malformed(index, "index of packed images"):
        shapes, names = tensors["shapes"], header["names"]
        count, shorter_side = header["images"], header["shorter_side"]
        if not type(count) is type(shorter_side) is int or count < 1 or not are_shapes(shapes, count):
            raise ValueError(f"{count!r} images of shorter side {shorter_side!r} and their shapes do not go together")
    needed = round(loading.image_size / loading.crop_pct)
    if (count, names) != (len(source.names), hash_names(source)):
        raise UserError(
            f"data.packed: {folder} holds {count:,} {part} images that are not the {len(source.names):,} of data.root "
            "(or not by the same names): pack them anew"
        )
    if header.get("sizes") not in (None, hash_sizes(source)):  # None: packed before they were kept, or not known
        raise UserError(
            f"data.packed: {folder} holds {part} images of data.root's names that have other sizes now: pack them anew"
        )
    if shorter_side < needed:
        raise UserError(
            f"data.packed: {folder} holds images of shorter side {shorter_side}, data.image_size {loading.image_size} "
            f"needs {needed}: pack them anew with that shorter_side"
        )
    size = 3 * int(shapes.prod(1).sum())
    if not path.is_file() or path.stat().st_size != size:
        raise UserError(f"data.packed: {path} is missing or not of {size:,} bytes: pack the images anew")
    return PackedSource(source, path, shapes)


def are_shapes(shapes: Tensor, count: int) -> bool:
    """Whether these are heights and widths of images that can be there; both are 0 of one that is not."""
    if shapes.dtype != torch.int64 or shapes.shape != (count, 2):
        return False
    bounded = (shapes >= 0) & (shapes <= MOST_PIXELS)
    whole = (shapes.prod(1) <= MOST_PIXELS) & ((shapes == 0).sum(1) != 1)
    return bool(bounded.all() and whole.all())


def hash_names(source: ImageSource) -> str:
    """A hash of the images' names, in order."""
    digest = hashlib.sha256()
    for name in source.names:
        digest.update(name.encode(errors="surrogateescape") + b"\n")  # a name that is no UTF-8
    return digest.hexdigest()


def hash_sizes(source: ImageSource) -> str | None:
    """A hash of the images' sizes in bytes, in order; None if they are not known."""
    sizes = source.sizes()
    return None if sizes is None else hashlib.sha256(sizes.numpy().tobytes()).hexdigest()
