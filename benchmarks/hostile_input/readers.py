"""Every reader of files that may come from strangers: what a valid one looks like, who damages it, how it is read."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.hostile_input import read_data, read_meta, read_tensors, read_text
from benchmarks.hostile_input.archive_mutators import mutate_tar, mutate_zip
from benchmarks.hostile_input.byte_mutators import mutate_bytes
from benchmarks.hostile_input.idx_mutators import mutate_idx
from benchmarks.hostile_input.image_mutators import mutate_image
from benchmarks.hostile_input.json_mutators import mutate_json_file
from benchmarks.hostile_input.tensor_mutators import mutate_safetensors
from benchmarks.hostile_input.text_mutators import mutate_yaml


class Reader(NamedTuple):
    """A reader.

    Attributes:
        write: Writes valid files into a folder.
        targets: Glob patterns of the files that are damaged, one at a time.
        mutate: From a file's suffix to what damages it besides `mutate_bytes`.
        read: Reads the file at a path, which lies among the other valid ones, and uses what was read.
    """

    write: Callable[[Path], None]
    targets: tuple[str, ...]
    mutate: dict[str, Callable]
    read: Callable[[Path], object]


TENSORS = {".safetensors": mutate_safetensors}
JSON = {".json": mutate_json_file, ".jsonl": mutate_json_file}
READERS = {
    "learned loss": Reader(read_tensors.write_losses, ("*.safetensors",), TENSORS, read_tensors.read_loss),
    "network": Reader(read_tensors.write_networks, ("*.safetensors",), TENSORS, read_tensors.read_network),
    "foreign checkpoint": Reader(
        read_tensors.write_foreign, ("*.pth",), {".pth": mutate_zip}, read_tensors.read_foreign
    ),
    "training checkpoint": Reader(
        read_tensors.write_checkpoint, ("checkpoints/*.safetensors",), TENSORS, read_tensors.read_checkpoint
    ),
    "meta-training checkpoint": Reader(
        read_meta.write_meta_checkpoint, ("checkpoints/*.safetensors",), TENSORS, read_meta.read_meta_checkpoint
    ),
    "pool": Reader(
        read_tensors.write_pool, ("pool/index.json", "pool/*.safetensors"), TENSORS | JSON, read_tensors.read_pool
    ),
    "example weights": Reader(read_tensors.write_weights, ("*.safetensors",), TENSORS, read_tensors.read_weights),
    "teacher cache": Reader(read_data.write_cache, ("cache/*.safetensors",), TENSORS, read_data.read_cache),
    "packed images": Reader(read_data.write_packed, ("packed/*",), TENSORS, read_data.read_packed),
    "image": Reader(
        read_data.write_pictures,
        ("*.png", "*.jpg", "*.gif", "*.webp", "*.bmp", "*.tif"),
        dict.fromkeys((".png", ".jpg", ".gif", ".webp", ".bmp", ".tif"), mutate_image),
        read_data.read_picture,
    ),
    "class tars": Reader(
        read_data.write_class_tars, ("train.tar", "val.tar"), {".tar": mutate_tar}, read_data.read_tars
    ),
    "WebDataset shards": Reader(
        read_data.write_shards,
        ("train-0.tar", "val-0.tar", "_info.json"),
        {".tar": mutate_tar} | JSON,
        read_data.read_shards,
    ),
    "IDX": Reader(read_data.write_idx, ("FashionMNIST/raw/*",), {"": mutate_idx}, read_data.read_idx),
    "recipe": Reader(read_text.write_recipes, ("*.yaml",), {".yaml": mutate_yaml}, read_text.read_recipe_file),
    "fidelity.json": Reader(read_text.write_fidelity, ("*.json",), JSON, read_text.read_fidelity_file),
    "run directory": Reader(read_text.write_run, ("config.json", "log.jsonl"), JSON, read_text.read_run),
}

__all__ = ["READERS", "Reader", "mutate_bytes"]
