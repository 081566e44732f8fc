"""What a run says first: its images, its student, its teacher, and what is doubtful of them."""

import math
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lkd.config.parts import TeacherRecipe, TrainRecipe
from lkd.core.files import MALFORMED
from lkd.data.image_files import DamagedImageError, ImageFiles
from lkd.data.images import ImageSet
from lkd.data.readers import sort_as_timm
from lkd.data.splits import choose_meta_validation_size
from lkd.models.build import describe
from lkd.models.dry_run import check_trainable
from lkd.models.teacher_cache import read_cache
from lkd.training.answers import keep_figures
from lkd.training.build import Images, OpenedTeacher, StudentBuilder
from lkd.training.evaluate import evaluate
from lkd.training.optimizer import check_optimization, doubt_learning_rate

MEASURED = 5  # pictures whose size is looked at


def introduce_images(images: Images) -> str:
    """Say how many images a training sees."""
    counts = f"{len(images.train):,} to train on, {len(images.meta_validation):,} for meta-validation"
    line = f"images: {images.name}, {counts}, {images.train.num_classes:,} classes{describe_crops(images.train)}"
    if images.settings.name == "embedded" and images.settings.root:
        line += f"; warning: data.root: {images.settings.root} is not read: name its images by data.name"
    missing = sorted({*range(images.train.num_classes)} - {*images.test.labels.tolist()}) if len(images.test) else []
    return line + (f"; warning: no test image of {images.train.class_names[missing[0]]!r}" if missing else "")


def describe_crops(images: ImageSet) -> str:
    """How pictures in files are cut, with a warning where they are of that size already and lose their edge."""
    files = images.images
    if not isinstance(files, ImageFiles):
        return ""
    size, first = files.size, []
    for slot in range(min(MEASURED, len(images))):
        with suppress(DamagedImageError, OSError):
            first.append(min(files.load(slot).shape[1:]))
    said = f", crops of {size}×{size}, their centres from a shorter side of {files.shorter_side}"
    if files.shorter_side == size or set(first) != {size}:
        return said
    return f"{said}; warning: they have that size, and are enlarged and cut: --data.crop_pct 1 takes them whole"


def introduce_network(
    role: str,
    student: StudentBuilder,
    images: Images,
    device: torch.device,
    train: TrainRecipe,
    processes: int = 1,
) -> str:
    """Say which network this is that will be trained, after a dry run of a step of this training."""
    network, pretrained = student.build(0, device), student.architecture["pretrained"]
    shape = images.train.image_shape
    line = describe(role, network, student.name, shape, pretrained) + student.started
    check_optimization(network, train, device)
    size = max(1, train.batch_size // (processes * train.accumulation))
    lines = [line, *check_trainable(network, role, shape, size), *doubt_learning_rate(train)]
    if train.milestones and train.milestones[0] >= train.epochs:
        lines.append(
            f"warning: train.milestones: {train.milestones}: none comes in train.epochs, {train.epochs}, so that the "
            "learning rate never falls"
        )
    if train.milestones and train.milestones[0] < train.warmup_epochs:
        lines.append(
            f"warning: train.milestones: {train.milestones[0]} is within the {train.warmup_epochs} epochs of warm-up: "
            "train.learning_rate is never reached"
        )
    return "\n".join(lines)


def introduce_teacher(teacher: OpenedTeacher, images: Images, device: torch.device) -> str:
    """Say which teacher this is, with its accuracy on meta-validation; if it is cached, by what the cache says."""
    settings = teacher.settings
    if settings.cache:
        return f"{read_cache(Path(settings.cache)).header['teacher']} when its answers were cached in {settings.cache}"
    name, shape = teacher.architecture["name"], images.train.image_shape
    described = describe("teacher", teacher.network, name, shape, settings.pretrained)
    reached, top1, knows = "", None, teacher.architecture["num_classes"] == images.train.num_classes
    if len(images.meta_validation) and knows:
        measure = partial(evaluate, teacher.network.to(device), images.meta_validation, device, shared=True)
        top1 = keep_figures("evaluation", teacher, images, device, measure, shared=True)["top1"]
        reached = f", {top1:.2f} % on meta-validation"
    random = settings.random_answers
    wrong = f", but answers at random on {random:.0%} of the images" if random else ""
    scale = f", its logits times {settings.logit_scale:g}" if settings.logit_scale != 1 else ""
    taken = f", from {teacher.architecture['taken']}*" if teacher.architecture.get("taken") else ""
    size = getattr(teacher.network, "size", 0)
    seen = f", sees the images as {size}×{size}" if size else ""
    if not teacher.architecture.get("is_input_said", True):
        seen += ", normalised as the student does, since its file does not say how"
    doubts = explain_doubts(top1, images, settings) if knows else ""
    if may_have_seen(teacher.architecture.get("provenance"), images):
        doubts += "; warning: it may have seen held-out images: take its data.split_seed, data.meta_validation_size"
    return f"{described}{taken}{reached}{wrong}{scale}{seen}{doubts}"


CHANCE = (
    "it is no better than chance: has it other classes, another order of them (data.class_map), or another image size"
)


def is_no_better_than(top1: float, share: float, count: int) -> bool:
    """Whether an accuracy in percent, of so many images, may be one of this share, within twice its standard error."""
    return top1 / 100 <= share + 2 * math.sqrt(share * (1 - share) / count)


def may_have_seen(provenance: Any, images: Images) -> bool:
    """Whether a teacher was trained on images that are held out here, by what its file says of its training."""
    with suppress(*MALFORMED):
        theirs, data, count = provenance["recipe"]["data"], images.settings, len(images.meta_validation)
        if count and (theirs["name"], Path(theirs["root"] or "").name) == (data.name, Path(data.root or "").name):
            default = count if data.train_size else choose_meta_validation_size(len(images.train) + count)
            held_out = default if theirs["meta_validation_size"] is None else theirs["meta_validation_size"]
            return bool(theirs["split_seed"] != data.split_seed or held_out < count)
    return False


def explain_doubts(top1: float | None, images: Images, settings: TeacherRecipe) -> str:
    """Warnings of a teacher that knows no more than a guess, or whose classes may be numbered in another order.

    Each is left out where meta-validation speaks against it, by twice the standard error.

    `top1`: its accuracy on meta-validation, in percent; None if there is none.
    """
    labels, classes = images.meta_validation.labels, images.train.class_names
    doubts = []
    if settings.path == "random":
        return ""
    if top1 is not None and is_no_better_than(top1, 1 / len(classes), len(labels)):
        doubts.append(f"{CHANCE} (teacher.image_size)?")
    theirs = None if images.settings.class_map else sort_as_timm(classes)
    if theirs:
        alike = torch.tensor([own == other for own, other in zip(classes, theirs, strict=True)])
        if top1 is None or is_no_better_than(top1, float(alike[labels].float().mean()), len(labels)):
            number = int(alike.int().argmin())
            doubts.append(
                f"class {number} is {classes[number]!r}, as text is sorted (torchvision's order), in timm's order it "
                f"is {theirs[number]!r}: if the teacher has that one, give data.class_map"
            )
    return "".join(f"; warning: {doubt}" for doubt in doubts)
