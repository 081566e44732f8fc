"""The teacher at work: what answers the batches of a training, and what is measured of it before."""

import dataclasses
import hashlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lkd.config.parts import DataRecipe, TrainRecipe
from lkd.core.distributed import gather_objects, is_main, share_from_main
from lkd.core.errors import UserError
from lkd.core.files import refusing_malformed
from lkd.core.plugins import MODULE
from lkd.core.tensor_files import digest, keep_result
from lkd.data.images import ImageSet, identify_pixels
from lkd.losses.learned.trust import Trust, TrustFigures, measure_agreement, measure_trust
from lkd.models.build import GIVEN
from lkd.models.teacher import TabulatedTeacher, Teacher, TeacherFunction, UnreliableTeacher
from lkd.models.teacher_cache import check_stages, identify, open_cache, read_cache
from lkd.tracking.lineage import Entry, read_lineage, record
from lkd.tracking.run import Run, describe_surroundings
from lkd.training.build import Images, OpenedTeacher


def ask_anew(
    teacher: OpenedTeacher, images: Images, device: torch.device, train: TrainRecipe | None = None
) -> TeacherFunction:
    """The teacher, asked for every batch; as reliable as its settings, and as fast as those of the training say."""
    fast = (train.compile, train.channels_last) if train else (False, False)
    reliable = Teacher(teacher.network.to(device), *fast, teacher.settings.logit_scale)
    random = teacher.settings.random_answers
    return UnreliableTeacher(reliable, random, images.settings.split_seed) if random else reliable


def measure_teacher(
    teacher: OpenedTeacher, images: Images, device: torch.device, answers: TeacherFunction | None = None
) -> Trust:
    """What there is to know of teacher and labels; a cache knows of the teacher already.

    `answers`: what answers the training, if that is there already: it may have its answers at hand.
    """
    if teacher.settings.cache:
        return read_trust(Path(teacher.settings.cache), images, device)
    held_out = images.meta_validation if len(images.meta_validation) else None

    def measure() -> dict[str, Any]:
        anew = ask_anew(teacher, images, device)
        known = measure_trust(anew, None if held_out else images.train, held_out, device).figures
        agreement = measure_agreement(answers or anew, images.train, device)
        per_class = len(images.train) / images.train.num_classes
        return known._replace(training_agreement=agreement, images_per_class=per_class).to_json()

    figures = keep_figures("trust", teacher, images, device, measure)
    return Trust(TrustFigures.from_json(figures), Trust.choose_looks(held_out or images.train, device))


def keep_figures(
    what: str,
    teacher: OpenedTeacher,
    images: Images,
    device: torch.device,
    measure: Callable[[], dict[str, Any]],
    shared: bool = False,
) -> dict[str, Any]:
    """Figures of a teacher on these images, measured once; where the network's code or ours may change, not kept."""
    surroundings = describe_surroundings(device)
    is_changing = str(surroundings["commit"]).endswith("-dirty")
    is_changing |= teacher.settings.path.startswith(GIVEN) or MODULE in sys.modules
    if share_from_main(is_changing) if shared else is_changing:
        return measure()
    made_with = json.dumps([identify_answers(teacher, images), surroundings])
    key = [what, made_with, images.settings.evaluation_batch_size, identify_labels(images)]
    return keep_result([*key, *map(identify_pixels, (images.train, images.meta_validation))], measure, shared)


def read_trust(cache: Path, images: Images, device: torch.device) -> Trust:
    """What a cache knows of its teacher and these images' labels; unknown if it was measured of others, or never."""
    looks = Trust.choose_looks(images.meta_validation if len(images.meta_validation) else images.train, device)
    header = read_cache(cache).header
    if header.get("trust_of") != identify_labels(images):
        reason = f"as {cache} was made {'with other labels' if 'trust_of' in header else 'before it was measured'}"
        return Trust(looks=looks, reason=f"{reason} (lkd cache with this recipe adds it)")
    with refusing_malformed(cache, "teacher cache"):
        return Trust(TrustFigures.from_json(header["trust"]), looks)


def identify_labels(images: Images) -> str:
    """A hash of which images are trained and measured on, and of their labels."""
    return digest([[part.index, part.labels] for part in (images.train, images.meta_validation)])


def identify_images(images: Images) -> str:
    """A hash of all parts, labels and classes' names: pixels of what is in memory, folders and names of files."""
    parts = [[identify_content(part), part.labels] for part in (images.train, images.meta_validation, images.test)]
    return digest([images.fingerprint, list(images.train.class_names), parts])


def identify_content(part: ImageSet) -> torch.Tensor | str:
    """The pixels, or of files a hash of all that lie where these do, by folder and name, or, without, by the first."""
    if isinstance(part.images, torch.Tensor):
        return part.images
    names = "\n".join("/".join(name.split("/")[-2:]) for name in part.images.source.names)
    found = hashlib.sha256(names.encode(errors="surrogateescape")).hexdigest()
    return found if part.images.source.names_tell else digest([found, identify_pixels(part)])


def check_same_images(images: Images, run: Run, world: str = "") -> None:
    """Check that a run that is gone on with has the images that it was begun with; of one that begins, keep a hash."""
    entry = Entry("images", world or images.name, identify_images(images), None)
    if len(set(gather_objects(entry.sha256))) > 1:
        raise UserError("data.root: the processes of this job have other images, labels or classes; give all the same")
    kept = {(row["kind"], row["name"]): row["sha256"] for row in read_lineage(run.path)["used"]}
    if kept.get((entry.kind, entry.name), entry.sha256) != entry.sha256:
        raise UserError(
            f"data{f' of world {world}' if world else ''}: the images, their files' names, labels or classes are not "
            f"those that the run in {run.path} was begun with; put them back, or begin anew with another --run_dir"
        )
    if is_main():
        record(run.path, "used", entry)


def identify_answers(teacher: OpenedTeacher, images: Images) -> dict[str, Any]:
    """All that decides the teacher's answers, for its cache."""
    fields = dataclasses.asdict(teacher.settings), dataclasses.asdict(images.settings)
    return identify(teacher.network, teacher.architecture["name"], *fields, images.train)


def choose_cached_seeds(data: DataRecipe) -> range:
    """The augmentation seeds that batches of these images have, whose answers a cache of them holds."""
    if data.mixup or data.cutmix or data.random_erasing:
        raise UserError(
            f"data.mixup, data.cutmix, data.random_erasing: {data.mixup}, {data.cutmix}, {data.random_erasing}; a "
            "teacher cache holds no answers to mixed or erased images: set them to 0, or leave teacher.cache out"
        )
    if data.augmentation == "none":
        return range(1)
    if data.augmentation_seeds < 1:
        raise UserError(
            f"data.augmentation_seeds: {data.augmentation_seeds} takes a new augmentation in every epoch, which no "
            "cache holds: give N, at least 1, for epochs that cycle over N augmentations"
        )
    return range(1, data.augmentation_seeds + 1)


TABLE_BYTES = 2**28  # features of a teacher that are kept in memory; larger ones are computed anew for every batch


def prepare_teacher(
    teacher: OpenedTeacher,
    images: Images,
    device: torch.device,
    stages: tuple[str, ...] = (),
    train: TrainRecipe | None = None,
) -> TeacherFunction:
    """What answers batches: a cache; a table, computed here, if nothing is augmented; or the network, asked anew.

    `stages`: those whose features the loss reads. They are tabulated too if they take no more than `TABLE_BYTES`.
    `train`: whether a teacher that is asked for every batch is compiled, and its layout in memory.
    """
    data, cache = images.settings, teacher.settings.cache
    if cache:
        check_stages(stages)
        seeds = choose_cached_seeds(data)
        cached = open_cache(Path(cache), identify_answers(teacher, images), seeds, images.train, device)
        if not seeds.start:
            return cached
        # A cache of augmented images has no answer to plain ones, which pseudo-labels and influence are of.
        return lambda batch: (cached if batch.augmentation.all() else ask_anew(teacher, images, device))(batch)
    if not is_tabulated(teacher, images, len(images.train), stages):
        return ask_anew(teacher, images, device, train)
    return TabulatedTeacher(ask_anew(teacher, images, device), images.train, device, stages=stages)


def is_tabulated(teacher: OpenedTeacher, images: Images, count: int, stages: tuple[str, ...]) -> bool:
    """Whether the teacher's answers to so many training images, which nothing changes, are computed once."""
    data, shapes = images.settings, teacher.find_stages(images.train.image_shape) if stages else {}
    changing = data.augmentation != "none" or data.mixup or data.cutmix or data.random_erasing
    return not changing and 4 * count * sum(math.prod(shapes[stage]) for stage in stages) <= TABLE_BYTES
