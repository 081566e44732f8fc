"""A teacher's answers on disk, by image and augmentation seed; read in place of asking the teacher."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.compressed_logits import check_top_k, restore_logits, type_of_classes
from lkd.data import Batch
from lkd.errors import UserError
from lkd.files import refusing_malformed
from lkd.outputs import Outputs
from lkd.tensor_files import read_tensors

KIND, INDEX_KIND, VERSION = "part of a teacher cache", "teacher cache", 1
INDEX = "index.safetensors"
MOST_IMAGES, MOST_CLASSES = 1 << 32, 1 << 24  # what an index may name: tables of that size are made


@dataclass(frozen=True)
class CacheFolder:
    """A cache, finished or not: an index, and for every augmentation seed files of `shard_size` images each.

    Attributes:
        folder: Where it lies.
        index: The images' index, int64, [N], ascending.
        header: `made_with` (of `identify`), `top_k`, `shard_size`, `num_classes`, and `teacher`, a line about it.
    """

    folder: Path
    index: Tensor
    header: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """A hash of all that decides what its files hold."""
        header = {key: value for key, value in self.header.items() if key in ("made_with", "top_k", "shard_size")}
        content = json.dumps(header, sort_keys=True).encode() + self.index.numpy().tobytes()
        return hashlib.sha256(content).hexdigest()[:16]

    @property
    def shards(self) -> int:
        """Files of one augmentation seed."""
        return -(-len(self.index) // self.header["shard_size"])

    def check(self, tensors: dict[str, Tensor], shard: int) -> None:
        """Check that a file's tensors are what one of its number holds.

        Raises:
            ValueError: If not.
        """
        count, top_k, classes = self.header["shard_size"], self.header["top_k"], self.header["num_classes"]
        rows = min(count, len(self.index) - shard * count)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"logits": ((rows, top_k or classes), torch.float16)}
        if top_k:
            expected |= {"classes": ((rows, top_k), type_of_classes(classes)), "remainder": ((rows,), torch.float16)}
        found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        if found != expected:
            raise ValueError(f"it holds {found}, not {expected}")
        if top_k and not 0 <= int(tensors["classes"].min()) <= int(tensors["classes"].max()) < classes:
            raise ValueError(f"it names classes that are not in [0, {classes})")

    def path(self, seed: int, shard: int) -> Path:
        """The file of some of the images under an augmentation seed."""
        return self.folder / f"seed-{seed:05d}-{shard:05d}.safetensors"


class CachedTeacher:
    """A teacher's answers, looked up: a callable from a batch to its outputs. The files are mapped into memory.

    Args:
        cache: The cache.
        seeds: Augmentation seeds that will be asked for.
        device: Where answers go.

    Raises:
        UserError: If one of the files is not good or belongs to another cache.

    Attributes:
        checked: The files whose content was compared with its hash.
    """

    def __init__(self, cache: CacheFolder, seeds: range, device: torch.device) -> None:
        self.cache, self.first_seed, self.device = cache, seeds.start, device
        self.rows = torch.zeros(int(cache.index.max()) + 1, dtype=torch.int64)
        self.rows[cache.index] = torch.arange(len(cache.index))
        self.paths = [cache.path(seed, shard) for seed in seeds for shard in range(cache.shards)]
        self.parts = [open_part(cache, path, check=False) for path in self.paths]
        for number, (path, part) in enumerate(zip(self.paths, self.parts, strict=True)):
            with refusing_malformed(path, KIND):
                cache.check(part, number % cache.shards)
        self.checked: set[int] = set()

    def __call__(self, batch: Batch) -> Outputs:
        """Look a batch up.

        Raises:
            UserError: If an image could not be decoded when the cache was made, or a file is damaged.
        """
        kept = self.look_up(batch.index.cpu(), batch.augmentation.cpu())
        if kept["logits"].isnan().any():
            raise UserError(
                f"teacher.cache: {self.cache.folder} lacks answers to images that could not be decoded then, but can "
                "now: delete it and make it anew"
            )
        kept = {name: tensor.to(self.device, non_blocking=True) for name, tensor in kept.items()}
        return Outputs(restore_logits(kept, self.cache.header["num_classes"]), {})

    def look_up(self, index: Tensor, augmentation: Tensor) -> dict[str, Tensor]:
        """What is kept of the answers to these images under these augmentation seeds, each [B]."""
        rows, size = self.rows[index], self.cache.header["shard_size"]
        part = (augmentation - self.first_seed) * self.cache.shards + rows // size
        found = {name: tensor.new_empty(len(index), *tensor.shape[1:]) for name, tensor in self.parts[0].items()}
        for number in part.unique().tolist():
            if number not in self.checked:  # when it is first read: all of a large cache would take minutes
                open_part(self.cache, self.paths[number])
                self.checked.add(number)
            places = (part == number).nonzero().flatten()
            for name, tensor in self.parts[number].items():
                found[name][places] = tensor[rows[places] % size]
        return found


def open_part(cache: CacheFolder, path: Path, check: bool = True) -> dict[str, Tensor]:
    """Map a file of a cache.

    Args:
        cache: The cache.
        path: The file.
        check: Whether to read all of it, and compare its content with its hash.

    Raises:
        UserError: If it is damaged, or belongs to another cache.
    """
    advice = "delete it and go on with lkd cache"
    try:
        tensors, header = read_tensors(path, KIND, VERSION, check)
    except UserError as error:
        raise UserError(f"{error}: {advice}") from error
    if header.get("cache") != cache.fingerprint:
        raise UserError(f"{path}: belongs to another cache: {advice}")
    return tensors


def read_cache(folder: Path) -> CacheFolder:
    """Read what a cache says of itself.

    Raises:
        UserError: If there is none, or its index is damaged.
    """
    if not (folder / INDEX).is_file():
        raise UserError(f"teacher.cache: {folder} holds no teacher cache; make one with lkd cache")
    tensors, header = read_tensors(folder / INDEX, INDEX_KIND, VERSION)
    with refusing_malformed(folder / INDEX, INDEX_KIND):
        index = tensors["index"]
        sizes = [header[key] for key in ("shard_size", "num_classes", "top_k")]
        if index.dtype != torch.int64 or index.dim() != 1 or not len(index) or not bool((index.diff() > 0).all()):
            raise ValueError(f"its index, {index.dtype} {tuple(index.shape)}, is not of ascending int64")
        if not 0 <= index[0] <= index[-1] < MOST_IMAGES:
            raise ValueError(f"its index goes from {index[0]} to {index[-1]}")
        if any(type(size) is not int for size in sizes) or sizes[0] < 1 or not 1 <= sizes[1] < MOST_CLASSES:
            raise ValueError(f"shard_size, num_classes, top_k are {sizes}")
        if not isinstance(header["made_with"], dict) or not isinstance(header["teacher"], str):
            raise ValueError("it does not say what it was made with")
        check_top_k(header["top_k"], header["num_classes"])
    return CacheFolder(folder, index, header)
