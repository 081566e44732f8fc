"""A cache of random answers, as large as one wants."""

import tempfile
from pathlib import Path

import torch

from lkd.core.tensor_files import write_tensors
from lkd.models.teacher_cache import KIND, VERSION, CachedTeacher, CacheFolder, compress_logits

SHARD = 50_000


def make_cached_teacher(classes: int, top_k: int, images: int = SHARD) -> CachedTeacher:
    """A cache for one augmentation seed, 0, in a temporary folder that is gone once its files are mapped."""
    header = {"made_with": {}, "top_k": top_k, "shard_size": SHARD, "num_classes": classes}
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        cache = CacheFolder(Path(folder), torch.arange(images), header)
        for shard in range(cache.shards):
            logits = torch.randn(min(SHARD, images - shard * SHARD), classes, generator=generator)
            kept = compress_logits(logits, top_k)
            write_tensors(cache.path(0, shard), kept, KIND, VERSION, {"cache": cache.fingerprint})
        teacher = CachedTeacher(cache, range(1), torch.device("cpu"))
        teacher.checked.update(range(cache.shards))  # just written; their names are gone when they are first read
        return teacher
