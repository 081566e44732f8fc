"""A teacher's answers on disk, by image and augmentation seed; read in place of asking the teacher."""

import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lkd.core.errors import UserError
from lkd.core.files import find_differences, hash_file, refusing_malformed
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import digest, read_tensors
from lkd.data.image_files import ImageFiles, LoadingOptions
from lkd.data.images import Batch, ImageSet, identify_pixels
from lkd.data.packed import PackedSource, hash_names, hash_sizes
from lkd.data.readers import find_npz

KIND, INDEX_KIND, VERSION = "part of a teacher cache", "teacher cache", 1
INDEX = "index.safetensors"
MOST_IMAGES, MOST_CLASSES = 1 << 32, 1 << 24  # what an index may name: tables of that size are made
# Fields that change neither what the teacher is nor how an image of some index and augmentation seed looks.
OF_NO_EFFECT = {
    *("path", "name", "pretrained", "cache"),
    *("root", "train_size", "meta_validation_size", "split_seed", "augmentation_seeds"),
    *("label_noise", "label_noise_kind", "meta_validation_noise", "imbalance"),
    *("repeats", "mixup", "cutmix", "random_erasing"),
    *("workers", "damaged_limit", "read_timeout", "packed", "class_map", "evaluation_batch_size"),
}


def check_top_k(top_k: int, num_classes: int) -> None:
    """Check how many classes are kept."""
    most = largest_top_k(num_classes)
    if not 0 <= top_k <= most:
        raise UserError(f"top_k: {top_k} of {num_classes} classes; 0 keeps them all, more than {most} save nothing")


def largest_top_k(num_classes: int) -> int:
    """The most classes of an answer that take less space than all of them; 0 where not even one does."""
    entry = bytes_of_answer(num_classes, 1) - 2
    return max(0, (2 * num_classes - 3) // entry)


def type_of_classes(num_classes: int) -> torch.dtype:
    """The integers that class indices are kept as."""
    return torch.int16 if num_classes <= 2**15 else torch.int32


def bytes_of_answer(num_classes: int, top_k: int) -> int:
    """Bytes that the answer to one image takes; `top_k` 0 keeps all classes."""
    return top_k * (2 + type_of_classes(num_classes).itemsize) + 2 if top_k else 2 * num_classes


def compress_logits(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """Keep logits in float16.

    Args:
        logits: [B, C].
        top_k: How many of the largest are kept; 0 for all.

    Returns:
        `logits`, [B, C]. With `top_k`: `logits` and `classes`, [B, top_k], and `remainder`, [B], the logarithm of the
        sum of the other logits' exponentials.
    """
    logits = logits.float()
    if not top_k:
        kept = {"logits": logits.half()}
    else:
        largest, classes = logits.topk(top_k, 1)
        remainder = logits.scatter(1, classes, -math.inf).logsumexp(1)
        classes = classes.to(type_of_classes(logits.shape[1]))
        kept = {"logits": largest.half(), "classes": classes, "remainder": remainder.half()}
    if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
        raise UserError(
            f"teacher: its logits reach {logits.abs().max():g}, float16 holds up to 65504; it cannot be cached"
        )
    return kept


def restore_logits(kept: dict[str, Tensor], num_classes: int) -> Tensor:
    """The logits that `compress_logits` kept, [B, C], float32; the remainder is shared evenly among its classes."""
    logits = kept["logits"].float()
    if "classes" not in kept:
        return logits
    even = kept["remainder"].float() - math.log(num_classes - logits.shape[1])
    return even.unsqueeze(1).repeat(1, num_classes).scatter_(1, kept["classes"].long(), logits)


@dataclass(frozen=True)
class CacheFolder:
    """A cache, finished or not: an index, and for every augmentation seed files of `shard_size` images each.

    Attributes:
        folder: Where it lies.
        index: The images' index, int64, [N], ascending.
        header: `made_with` (of `identify`), `top_k`, `shard_size`, `num_classes`, and `teacher`, a line about it. What
            was measured of the teacher is in `trust`, with a hash of the labels, `trust_of`; older caches lack it.
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
        """Raise ValueError unless a file's tensors are what one of its number holds."""
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

    Attributes:
        checked: The files whose content was compared with its hash.
    """

    def __init__(self, cache: CacheFolder, seeds: range, device: torch.device) -> None:
        self.cache, self.first_seed, self.device = cache, seeds.start, device
        self.paths = [cache.path(seed, shard) for seed in seeds for shard in range(cache.shards)]
        self.parts = [open_part(cache, path, check=False) for path in self.paths]
        for number, (path, part) in enumerate(zip(self.paths, self.parts, strict=True)):
            with refusing_malformed(path, KIND):
                cache.check(part, number % cache.shards)
        self.checked: set[int] = set()

    def __call__(self, batch: Batch) -> Outputs:
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
        known, size = self.cache.index, self.cache.header["shard_size"]
        rows = torch.searchsorted(known, index).clamp(max=len(known) - 1)
        if not torch.equal(known[rows], index):
            raise UserError(f"teacher.cache: {self.cache.folder} has no answers but to training images: leave it out")
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
    """Map a file of a cache; `check` reads all of it, and compares its content with its hash."""
    advice = "delete it and go on with lkd cache"
    try:
        tensors, header = read_tensors(path, KIND, VERSION, check)
    except UserError as error:
        raise UserError(f"{error}: {advice}") from error
    if header.get("cache") != cache.fingerprint:
        raise UserError(f"{path}: belongs to another cache: {advice}")
    return tensors


def read_cache(folder: Path) -> CacheFolder:
    """Read what a cache says of itself."""
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


def identify(
    network: nn.Module, name: str, teacher: dict[str, Any], data: dict[str, Any], images: ImageSet
) -> dict[str, Any]:
    """All that decides a teacher's answer to an image of some index and augmentation seed, as JSON."""
    taught_by, look = ({key: part[key] for key in part if key not in OF_NO_EFFECT} for part in (teacher, data))
    taught_by |= {"network": name, "weights": digest(dict([*network.named_parameters(), *network.named_buffers()]))}
    if teacher["logit_scale"] == 1:  # caches from before it was a setting stay good
        del taught_by["logit_scale"]
    if teacher["classes"] is None:
        del taught_by["classes"]
    if data["crop_pct"] == LoadingOptions().crop_pct:
        del look["crop_pct"]
    if teacher["random_answers"]:
        taught_by["seed"] = data["split_seed"]
    look |= {"shape": images.image_shape, "mean": images.mean, "std": images.std}
    reader, _, named = data["name"].partition("/")
    if reader == "npz" and teacher["cache"]:  # to hash it takes seconds
        look |= {"file": hash_file(find_npz(named, data["root"]))}
    if isinstance(images.images, ImageFiles):
        source = images.images.source
        look |= {"files": hash_names(source)}
        look |= {"sizes": hash_sizes(source)} if teacher["cache"] else {}  # to ask for them takes seconds
        if not source.names_tell:
            look |= {"pixels": digest(identify_pixels(images))}
        look |= {"packed": digest(source.shapes) if isinstance(source, PackedSource) else None}
    return json.loads(json.dumps({"teacher": taught_by, "data": look}))


def check_made_with(cache: CacheFolder, made_with: dict[str, Any]) -> None:
    """Check that a cache holds the answers of this teacher to these images."""
    for key, before, now in find_differences(cache.header["made_with"], made_with):
        if key in ("data.sizes", "data.file", "data.pixels") and before is None:  # made before they were kept
            continue
        raise UserError(
            f"teacher.cache: {cache.folder} was made with {key} {before!r}, not with {now!r}: take the same, or make "
            "another cache in another folder"
        )


def check_stages(stages: tuple[str, ...]) -> None:
    """Check that a loss can do with a cache."""
    if stages:
        raise UserError(
            f"teacher.cache: holds logits alone, but the loss reads the teacher's features ({', '.join(stages)}): "
            "leave it out, or take a loss over logits"
        )


def open_cache(
    folder: Path, made_with: dict[str, Any], seeds: range, images: ImageSet, device: torch.device
) -> CachedTeacher:
    """Open a cache for training on these images, under these augmentation seeds."""
    cache = read_cache(folder)
    check_made_with(cache, made_with)
    lacking = int((~torch.isin(images.index, cache.index)).sum())
    if lacking:
        raise UserError(
            f"teacher.cache: {folder} lacks {lacking:,} of the {len(images):,} training images: take data.train_size, "
            "data.meta_validation_size and data.split_seed that it was made with, or make another cache"
        )
    paths = [cache.path(seed, shard) for seed in seeds for shard in range(cache.shards)]
    missing = sum(not path.is_file() for path in paths)
    if missing:
        raise UserError(
            f"teacher.cache: {folder} lacks {missing:,} of the {len(paths):,} files for data.augmentation_seeds "
            f"{len(seeds)}: make them with lkd cache, or lower data.augmentation_seeds"
        )
    return CachedTeacher(cache, seeds, device)
