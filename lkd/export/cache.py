"""`lkd cache`: a teacher's answers to N augmentations of every training image."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lkd.config.training import CacheRecipe
from lkd.core.distributed import place_of, read_job
from lkd.core.errors import DamagedFileError, UserError
from lkd.core.files import check_free_space
from lkd.core.tensor_files import write_tensors
from lkd.data.batches import OrderedBatches
from lkd.models.teacher import TeacherFunction
from lkd.models.teacher_cache import (
    INDEX,
    INDEX_KIND,
    KIND,
    VERSION,
    CacheFolder,
    bytes_of_answer,
    check_made_with,
    check_stages,
    check_top_k,
    compress_logits,
    open_part,
    read_cache,
)
from lkd.tracking.run import choose_device, describe_changes, describe_surroundings
from lkd.training.answers import ask_anew, choose_cached_seeds, identify_answers, identify_labels, measure_teacher
from lkd.training.build import Images, LossBuilder, OpenedTeacher, choose_student, open_teacher, prepare_images
from lkd.training.distill import select_labelled
from lkd.training.introduce import introduce_teacher
from lkd.training.training import build_autocast, check_inputs


def cache_answers(recipe: CacheRecipe) -> CacheFolder:
    """Ask the teacher about every training image under every augmentation seed; what is there already is kept.

    The processes of a torchrun job share the files, without talking to each other.
    """
    if recipe.teacher.cache is None:
        raise UserError("teacher.cache: missing; give the folder that the answers go to")
    seeds = choose_cached_seeds(recipe.data)
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    device = place_of(choose_device(recipe.device))
    images = prepare_images(recipe.data, scored=False)
    check_top_k(recipe.top_k, images.train.num_classes)
    opened = open_teacher(recipe.teacher, images.train)
    opened.check_classes(images.train)
    student = choose_student(recipe.student, images.train)
    check_stages(LossBuilder(recipe.loss, opened, images).build(student, recipe.seed).teacher_stages)
    cache, teacher = prepare_cache(recipe, opened, images, device), ask_anew(opened, images, device, recipe.train)
    places = [(seed, shard) for seed in seeds for shard in range(cache.shards)]
    job = read_job()
    own = places[job.rank :: job.size]
    missing = {place for place in own if not is_kept(cache, cache.path(*place))}
    missing |= {place for place in places if not cache.path(*place).is_file()}
    positions = images.train.index.argsort().split(recipe.shard_size)
    count = sum(len(positions[shard]) for _, shard in missing)
    needed = count * bytes_of_answer(images.train.num_classes, recipe.top_k)
    hint = "take another disk, fewer data.augmentation_seeds, or a top_k"
    check_free_space("teacher.cache", cache.folder, needed, f"{count:,} answers", hint)
    known = select_labelled(images, recipe.labelled_size)
    if cache.header.get("trust_of") != (labels := identify_labels(known)):
        live = dataclasses.replace(opened, settings=dataclasses.replace(recipe.teacher, cache=None))
        trust = measure_teacher(live, known, device)
        print(trust)
        measured = {"teacher": introduce_teacher(live, images, device), "trust": trust.figures.to_json()}
        header = cache.header | measured | {"trust_of": labels}
        write_tensors(cache.folder / INDEX, {"index": cache.index}, INDEX_KIND, VERSION, header)
    with tqdm(total=count // job.size, desc="cache", unit="image", disable=None) as bar:
        for seed, shard in own:
            if (seed, shard) in missing:
                part = images.train.select(positions[shard])
                batches = OrderedBatches(part, recipe.train.batch_size, recipe.data.augmentation, seed, device)
                kept = ask_teacher(teacher, batches, recipe, bar)
                write_tensors(cache.path(seed, shard), kept, KIND, VERSION, {"cache": cache.fingerprint})
    return read_cache(cache.folder)


def is_kept(cache: CacheFolder, path: Path) -> bool:
    """Whether a file of the cache is there and good; one that is not is said, and made anew."""
    if not path.is_file():
        return False
    try:
        open_part(cache, path)
    except UserError:
        print(f"warning: {path}: is damaged, or of another cache; it is made anew")
        return False
    return True


def prepare_cache(recipe: CacheRecipe, opened: OpenedTeacher, images: Images, device: torch.device) -> CacheFolder:
    """The cache, begun or to be begun."""
    folder = Path(str(recipe.teacher.cache))
    made_with = identify_answers(opened, images)
    header: dict[str, Any] = {
        "made_with": made_with,
        "top_k": recipe.top_k,
        "shard_size": recipe.shard_size,
        "num_classes": images.train.num_classes,
        "surroundings": describe_surroundings(device) | {"precision": recipe.train.precision},
    }
    index = images.train.index.sort().values
    try:
        cache = read_cache(folder) if (folder / INDEX).is_file() else None
    except DamagedFileError as error:  # it can be made anew, and is then the same
        print(f"warning: {error}; it is made anew")
        cache = None
    if cache is None:
        return CacheFolder(folder, index, header)
    check_made_with(cache, made_with)
    for key in ("top_k", "shard_size"):
        if cache.header[key] != header[key]:
            raise UserError(f"{key}: {header[key]}, but the cache in {folder} has {cache.header[key]}: take the same")
    if not torch.equal(cache.index, index):
        raise UserError(f"teacher.cache: {folder} holds answers to other images: take another folder, or its split")
    before = cache.header.get("surroundings")
    for line in describe_changes(folder, before if isinstance(before, dict) else {}, header["surroundings"]):
        print(line)
    return cache


@torch.no_grad()
def ask_teacher(teacher: TeacherFunction, batches: OrderedBatches, recipe: CacheRecipe, bar: tqdm) -> dict[str, Tensor]:
    """Collect the answers to one file's images; where none could be decoded they are not numbers."""
    index, device = batches.images.index, batches.device
    kept: dict[str, Tensor] = {}
    for batch in batches:
        if recipe.train.channels_last:
            batch = batch._replace(images=batch.images.contiguous(memory_format=torch.channels_last))
        with build_autocast(recipe.train, device)():
            outputs = teacher(batch)
        check_inputs("teacher.cache", batch, outputs)
        logits = outputs.logits
        rows = torch.searchsorted(index, batch.index.cpu())
        for name, tensor in compress_logits(logits, recipe.top_k).items():
            if name not in kept:
                nothing = math.nan if tensor.is_floating_point() else 0
                kept[name] = torch.full((len(index), *tensor.shape[1:]), nothing, dtype=tensor.dtype)
            kept[name][rows] = tensor.cpu()
        bar.update(len(rows))
    return kept
