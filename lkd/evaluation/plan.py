"""What a run will take, before it runs: hours, memory and data."""

import dataclasses
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import PlanRecipe
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe, PoolSettings
from lkd.config.parts import DataRecipe
from lkd.config.training import DistillRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json, write_text
from lkd.core.random import seeded_generator
from lkd.data.augment import CROP_NUMBERS, cut_random
from lkd.data.image_files import ImageFiles
from lkd.data.images import ImageSet
from lkd.data.loader import Loading
from lkd.evaluation.plan_steps import (
    GPUS,
    DryStep,
    Gpu,
    build_untrained_loss,
    name_untrained,
    plan_loss,
    plan_rollout,
    precision_of,
    run_dry_step,
)
from lkd.meta_training.checks import check_settings
from lkd.models.teacher_cache import bytes_of_answer, largest_top_k
from lkd.training.build import Images, prepare_images

# ----------------------------------------------------------------------------------------------------------------------
# Which images a plan is for: those of the recipe if they are there, else what is known of the data set.

IMAGENET_FILE_BYTES = 147_897_477_120 / 1_281_167  # ILSVRC2012_img_train.tar over its images
KNOWN = {"image_folder": (1_281_167, 1000, 3, 0), "cifar10": (50_000, 10, 3, 32), "cifar100": (50_000, 100, 3, 32)}
KNOWN |= dict.fromkeys(("fashion_mnist", "fashion_mnist_unseen", "fashion_mnist_rest"), (60000, 10, 1, 28))


class PlannedImages(NamedTuple):
    """Images without pixels.

    Attributes:
        stand_in: What networks and losses are built for: shapes and classes, no images.
        train_size: Training images.
        source: Where the counts come from.
        files: The training images' files, if they are decoded and there.
        decoded: Whether each image is decoded when a batch needs it.
        file_bytes: Mean size of a file, or of an image in memory.
    """

    stand_in: Images
    train_size: int
    source: str
    files: ImageFiles | None
    decoded: bool
    file_bytes: float


def plan_images(recipe: DataRecipe) -> PlannedImages:
    """Count the images of a recipe.

    Raises:
        UserError: If the data set is named with a root and is not good, or is neither there nor known.
    """
    if recipe.root is None and recipe.name != "embedded":
        if recipe.name not in KNOWN:
            raise UserError(f"data.root: missing; without it only {', '.join(KNOWN)} can be planned, not {recipe.name}")
        count, classes, channels, pixels = KNOWN[recipe.name]
        pixels = pixels or recipe.image_size
        train_size = recipe.train_size or count - recipe.meta_validation_size
        decoded = recipe.name == "image_folder"
        source = "ImageNet-1k's" if decoded else f"{recipe.name}'s"
        size = IMAGENET_FILE_BYTES if decoded else channels * pixels**2
        return PlannedImages(
            stand_in(recipe.name, classes, (channels, pixels, pixels)), train_size, source, None, decoded, size
        )
    images = prepare_images(recipe)
    train = images.train
    files = train.images if isinstance(train.images, ImageFiles) else None
    shape = train.image_shape
    size = measure_files(files) if files else float(torch.tensor(shape).prod())
    source = f"of {recipe.root or 'the package'}"
    return PlannedImages(
        stand_in(images.name, train.num_classes, shape), len(train), source, files, files is not None, size
    )


def measure_files(files: ImageFiles, sample: int = 1000) -> float:
    """Mean size of the files, by a sample of them, bytes."""
    chosen = files.positions[:: max(1, len(files.positions) // sample)].tolist()
    sizes = [len(files.source.read(position)) for position in chosen]
    return sum(sizes) / len(sizes)


def measure_decoding(files: ImageFiles, sample: int = 64) -> float:
    """Images that one core decodes and crops a second, by a sample of them."""
    slots = torch.arange(0, len(files.positions), max(1, len(files.positions) // sample))
    numbers = torch.rand(len(files.positions), CROP_NUMBERS, generator=seeded_generator(0), dtype=torch.float64)
    started = time.process_time()
    cut = lambda image, slot: cut_random(image, files.size, numbers[slot])  # noqa: E731
    Loading(files, slots, cut, replace=True, pin=False).wait()
    return len(slots) / (time.process_time() - started)


def stand_in(name: str, classes: int, shape: tuple[int, int, int]) -> Images:
    """A data set of no images."""
    names = tuple(str(number) for number in range(classes))
    nothing = torch.zeros(0, dtype=torch.int64)
    mean = (0.5,) * shape[0]
    part = ImageSet(torch.zeros(0, *shape, dtype=torch.uint8), nothing, nothing, names, mean, mean)
    return Images(name, part, part, part, "")


# ----------------------------------------------------------------------------------------------------------------------
# The plan of a distillation.

HOUR = 3600.0


def plan_distillation(recipe: DistillRecipe, settings: PlanRecipe, images: PlannedImages, gpu: Gpu) -> dict[str, Any]:
    """Plan a distillation.

    Raises:
        UserError: If the loss, a network or the batch is not good.
    """
    train, teacher = recipe.train, name_untrained(recipe.teacher)
    steps = count_steps(train.epochs, images.train_size, train.batch_size)
    loss, described = plan_loss(recipe.loss, recipe.student, teacher, images.stand_in)
    build_balance(recipe.balance, loss())
    share = replace(train, batch_size=train.batch_size // settings.gpus)
    step = run_dry_step(recipe.student, teacher, loss, share, images.stand_in, gpu)
    seconds = sum(work.seconds for work in step.parts.values()) / settings.efficiency
    hours = steps * seconds / HOUR
    return {
        "command": "distill",
        "teacher": teacher.name,
        "student": recipe.student.name,
        "loss": described,
        "precision": precision_of(train),
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "steps": steps,
        "parameters": step.parameters,
        "step": describe_step(step, share.batch_size),
        "memory_gigabytes": {"a step of training": step.peak / 1e9},
        "weights_gigabytes": step.weights / 1e9,
        "hours": {"training": hours},
        "gpu_hours": hours * settings.gpus,
        "images_per_second": train.batch_size / seconds,
        "cache": plan_cache(settings, images, step, hours),
    }


def count_steps(epochs: int, images: int, batch_size: int) -> int:
    """Steps of a training; an epoch's incomplete batch is dropped.

    Raises:
        UserError: If there is no whole batch.
    """
    if not 1 <= batch_size <= images:
        raise UserError(f"train.batch_size: {batch_size} is not between 1 and the {images} training images")
    return epochs * (images // batch_size)


def describe_step(step: DryStep, batch_size: int) -> dict[str, Any]:
    """Each part's work for an image, and its share of the time."""
    total = sum(work.seconds for work in step.parts.values())
    return {
        part: {
            "gflops_an_image": work.flops / batch_size / 1e9,
            "megabytes_an_image": work.bytes / batch_size / 1e6,
            "operations": work.operations,
            "share": work.seconds / total,
        }
        for part, work in step.parts.items()
    }


def plan_cache(settings: PlanRecipe, images: PlannedImages, step: DryStep, hours: float) -> dict[str, Any]:
    """Size of a cache of the teacher's answers (`lkd cache`), and when it pays.

    A cache holds the answers to N augmentations of every image. Filling it takes N epochs of the teacher, as a training
    of N epochs would: from the epoch after on it saves the teacher's work.
    """
    classes, seeds = images.stand_in.train.num_classes, settings.augmentation_seeds
    answers = images.train_size * seeds
    total = sum(work.seconds for work in step.parts.values())
    share = step.parts["teacher"].seconds / total if "teacher" in step.parts else 0.0
    saved = share * hours * max(0.0, 1 - seeds / settings.train.epochs)
    kept = min(settings.top_k, largest_top_k(classes))
    return {
        "augmentation_seeds": seeds,
        "gigabytes": answers * bytes_of_answer(classes, 0) / 1e9,
        "top_k": kept,
        "top_k_gigabytes": answers * bytes_of_answer(classes, kept) / 1e9,
        "break_even_epochs": seeds,
        "saved_hours": saved,
        "saved_hours_of_another_training": share * hours,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The plan of a meta-training.


def plan_meta_training(
    recipe: MetaTrainRecipe, settings: PlanRecipe, images: PlannedImages, gpu: Gpu
) -> dict[str, Any]:
    """Plan a meta-training: its pools, its outer steps, its looks at reuse.

    Raises:
        UserError: If a loss, a network or the batch is not good.
    """
    train, meta, teacher = recipe.train, recipe.meta, name_untrained(recipe.teacher)
    models = recipe.students or [recipe.student]
    steps = count_steps(train.epochs, images.train_size, train.batch_size)
    losses = [plan_loss(recipe.pool.loss, model, teacher, images.stand_in)[0] for model in models]
    dry = [
        run_dry_step(model, teacher, loss, train, images.stand_in, gpu)
        for model, loss in zip(models, losses, strict=True)
    ]
    rollouts = [plan_rollout(recipe, model, teacher, images.stand_in, gpu) for model in models]
    training = steps * mean([sum(w.seconds for w in step.parts.values()) for step in dry]) / settings.efficiency / HOUR
    names = list(rollouts[0])
    outer = {
        name: meta.outer_steps
        * meta.students_per_step
        * mean([r[name].work.seconds for r in rollouts])
        / settings.efficiency
        / HOUR
        for name in names
    }
    loss_parameters = count_loss_parameters(replace(recipe, teacher=teacher), images.stand_in)
    trainings = count_trainings(recipe, len(models))
    hours = {"outer steps": outer[names[0]]} | {name: count * training for name, count in trainings.items()}
    largest = {name: max(r[name].peak for r in rollouts) / 1e9 for name in names}
    length = meta.rollout_steps * train.batch_size
    return {
        "command": "meta-train",
        "teacher": teacher.name,
        "student": ", ".join(model.name for model in models),
        "loss": f"learned: {meta.kind}, {meta.loss.get('form', 'decoupled')}",
        "precision": f"{precision_of(train)}; rollouts float32",
        "epochs": train.epochs,
        "batch_size": train.batch_size,
        "steps": steps,
        "parameters": dry[0].parameters | {"loss": loss_parameters},
        "step": describe_step(dry[0], train.batch_size),
        "rollout": {
            name: {
                "steps": meta.rollout_steps,
                "gflops": mean([r[name].work.flops for r in rollouts]) / 1e9,
                "seconds": mean([r[name].work.seconds for r in rollouts]) / settings.efficiency,
                "megabytes_a_step": mean([r[name].growth for r in rollouts]) / 1e6,
            }
            for name in names
        },
        "memory_gigabytes": {"a step of the pool's training": max(step.peak for step in dry) / 1e9}
        | {f"a hypergradient by {name}": size for name, size in largest.items()},
        "weights_gigabytes": max(step.weights for step in dry) / 1e9,
        "hours": hours,
        "hours_of_outer_steps_at_most": max(outer.values()),
        "hours_of_one_training": training,
        "gpu_hours": sum(hours.values()),
        "images_per_second": max(
            train.batch_size * steps / (training * HOUR), length / min(outer_seconds(rollouts, settings))
        ),
    }


def outer_seconds(rollouts: list[dict[str, Any]], settings: PlanRecipe) -> list[float]:
    """Seconds of one hypergradient, by estimator and network."""
    return [each.work.seconds / settings.efficiency for by_name in rollouts for each in by_name.values()]


def count_trainings(recipe: MetaTrainRecipe, architectures: int) -> dict[str, float]:
    """Whole trainings that the pools, the looks at reuse and the loop's own students come to."""
    meta, pool = recipe.meta, recipe.pool
    drawn = meta.alternation_start
    built = 0 if recipe.pool_dir or not drawn else 1
    built += max(drawn - 1, 0) // pool.refresh_every if pool.sampling == "live" else 0
    looks = 0
    if meta.reuse_every:
        looks = 1 + -(-meta.outer_steps // meta.reuse_every)
    part = (meta.reuse_epochs or recipe.train.epochs) / recipe.train.epochs
    return {
        "pool": built * pool.students * pool.max_age * architectures,
        "reuse": looks * part * architectures,
        "own students": float(meta.students_per_step) if meta.interleaving != "before" else 0.0,
    }


def count_loss_parameters(recipe: MetaTrainRecipe, images: Images) -> int:
    """Parameters of the loss networks."""
    with torch.device("meta"):
        loss = build_untrained_loss(recipe, images)
    return sum(parameter.numel() for parameter in loss.parameters())


def mean(values: list[float]) -> float:
    """The mean."""
    return sum(values) / len(values)


# ----------------------------------------------------------------------------------------------------------------------
# A plan as text.


def format_plan(plan: dict[str, Any]) -> str:
    """One line for each thing that a plan says."""
    gpu, loading = plan["gpu"], plan["loading"]
    total = sum(plan["hours"].values())
    parameters = ", ".join(f"{name} {count:,}" for name, count in plan["parameters"].items())
    rows = [
        ("command", f"lkd {plan['command']}: {plan['teacher']} → {plan['student']}, loss: {plan['loss']}"),
        ("parameters", parameters),
        ("images", f"{loading['images']:,} ({loading['source']}), {loading['gigabytes']:,.1f} GB"),
        ("training", f"{plan['epochs']} epochs of batch {plan['batch_size']}: {plan['steps']:,} steps"),
        ("precision", plan["precision"]),
        *(format_part(name, part) for name, part in plan["step"].items()),
        *(format_rollout(name, rollout) for name, rollout in plan.get("rollout", {}).items()),
        *(("memory", f"{name}: {size:.1f} GB of {gpu['memory']:g}") for name, size in plan["memory_gigabytes"].items()),
        ("GPU", f"{gpu['count']} × {gpu['name']} at {plan['efficiency']:.0%} of its datasheet"),
        *((f"  {name}", f"{hours:,.2f} hours") for name, hours in plan["hours"].items() if hours),
        ("in all", f"{total:,.2f} hours, {plan['gpu_hours']:,.2f} GPU-hours"),
        ("needs", f"{loading['needed_images_per_second']:,.0f} images/s"),
    ]
    if "decoded_images_per_second" in loading:
        rate = f"{loading['images_per_core']:,.0f} images/s on each of {loading['cores']} cores"
        rows.append(("decoding", f"{loading['decoded_images_per_second']:,.0f} images/s: {rate}"))
    if "cache" in plan:
        rows += format_cache(plan["cache"])
    rows += [("WARNING", warning) for warning in plan["warnings"]]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def format_part(name: str, part: dict[str, float]) -> tuple[str, str]:
    """A part of a step."""
    work = f"{part['gflops_an_image']:.3f} GFLOPs and {part['megabytes_an_image']:.1f} MB an image"
    return f"  {name}", f"{work}, {part['operations']:.0f} operations, {part['share']:.1%} of a step"


def format_rollout(name: str, rollout: dict[str, float]) -> tuple[str, str]:
    """A hypergradient."""
    work = f"{rollout['gflops'] / 1000:,.1f} TFLOPs, {rollout['seconds']:,.2f} s"
    return f"  {name}", f"{rollout['steps']:.0f} steps: {work}; each step adds {rollout['megabytes_a_step']:,.0f} MB"


def format_cache(cache: dict[str, float]) -> list[tuple[str, str]]:
    """A teacher cache."""
    small = f"{cache['top_k_gigabytes']:,.1f} GB of the best {cache['top_k']:.0f} classes"
    size = f"{cache['augmentation_seeds']:.0f} augmentations of each image: {cache['gigabytes']:,.1f} GB, or {small}"
    again = f"{cache['saved_hours_of_another_training']:,.2f} of another training"
    saved = f"pays after {cache['break_even_epochs']:.0f} epochs; saves {cache['saved_hours']:,.2f} hours here, {again}"
    return [("teacher cache", size), ("", saved)]


# ----------------------------------------------------------------------------------------------------------------------
# Put a plan together: what the steps take, how many there are, and what that is in hours, memory and data.


def plan(recipe: PlanRecipe) -> dict[str, Any]:
    """Plan a recipe; write plan.json and plan.txt if it says where.

    Raises:
        UserError: If the recipe is not good.
    """
    check_plan(recipe)
    images, gpu = plan_images(recipe.data), GPUS[recipe.gpu]
    if recipe.meta is None and recipe.pool is None:
        result = plan_distillation(select(recipe, DistillRecipe), recipe, images, gpu)
    else:
        learning = select(recipe, MetaTrainRecipe)
        learning.meta, learning.pool = recipe.meta or MetaSettings(), recipe.pool or PoolSettings()
        check_settings(learning)
        result = plan_meta_training(learning, recipe, images, gpu)
    result |= {"gpu": {"count": recipe.gpus, **gpu._asdict()}, "efficiency": recipe.efficiency}
    result["loading"] = plan_loading(recipe, images, result["images_per_second"])
    result["warnings"] = find_warnings(result, gpu)
    if recipe.out:
        write_json(Path(recipe.out) / "plan.json", result)
        write_text(Path(recipe.out) / "plan.txt", format_plan(result) + "\n")
    return result


def check_plan(recipe: PlanRecipe) -> None:
    """Check what a plan adds to the recipe.

    Raises:
        UserError: If a number is impossible.
    """
    if recipe.decode_rate == 0 and recipe.data.root is None:
        raise UserError(f"decode_rate: {recipe.decode_rate:g} cannot be measured without data.root; give images/s")
    if recipe.train.batch_size % recipe.gpus:
        raise UserError(f"train.batch_size: {recipe.train.batch_size} does not divide among {recipe.gpus} gpus")


def select(recipe: PlanRecipe, kind: type) -> Any:
    """The fields of a plan's recipe that are those of another command."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: value for name, value in vars(recipe).items() if name in names})


def plan_loading(recipe: PlanRecipe, images: PlannedImages, needed: float) -> dict[str, Any]:
    """The images, their volume, and whether they come as fast as they are needed."""
    figures: dict[str, Any] = {
        "images": images.train_size,
        "source": images.source,
        "gigabytes": images.train_size * images.file_bytes / 1e9,
        "needed_images_per_second": needed,
    }
    if images.decoded:
        rate = recipe.decode_rate or (measure_decoding(images.files) if images.files else 0.0)
        figures |= {"decoded_images_per_second": rate * recipe.cores, "images_per_core": rate, "cores": recipe.cores}
    return figures


def find_warnings(result: dict[str, Any], gpu: Gpu) -> list[str]:
    """What will go wrong."""
    warnings, loading = [], result["loading"]
    decoded, needed = loading.get("decoded_images_per_second"), loading["needed_images_per_second"]
    if decoded is not None and decoded < needed:
        cores = -(-needed // loading["images_per_core"])
        warnings.append(
            f"loading is the bottleneck: {loading['cores']} cores decode {decoded:,.0f} images/s, the GPUs take "
            f"{needed:,.0f}: the run takes {needed / decoded:.1f} times as long; {cores:.0f} cores, or packed images, "
            "would keep up"
        )
    for name, size in result["memory_gigabytes"].items():
        if size > gpu.memory:
            warnings.append(
                f"memory: {name} needs {size:.1f} GB, {gpu.name} has {gpu.memory:g}; lower train.batch_size, or raise "
                "train.accumulation (distillation)"
            )
    return warnings
