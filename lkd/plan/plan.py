"""Put a plan together: what the steps take, how many there are, and what that is in hours, memory and data."""

import dataclasses
from pathlib import Path
from typing import Any

from lkd.config import DistillRecipe, MetaSettings, MetaTrainRecipe, PlanRecipe, PoolSettings
from lkd.errors import UserError
from lkd.files import write_json, write_text
from lkd.meta_checks import check_settings
from lkd.plan.distillation import plan_distillation
from lkd.plan.gpus import GPUS, Gpu
from lkd.plan.images import PlannedImages, measure_decoding, plan_images
from lkd.plan.meta_training import plan_meta_training
from lkd.plan.table import format_plan


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
    if not 0 < recipe.efficiency <= 1:
        raise UserError(f"efficiency: {recipe.efficiency} is not in (0, 1]; 0.5 is half of the datasheet's rates")
    for name in ("gpus", "cores", "augmentation_seeds", "top_k"):
        if getattr(recipe, name) < 1:
            raise UserError(f"{name}: {getattr(recipe, name)} is not at least 1")
    if recipe.decode_rate < 0 or (recipe.decode_rate == 0 and recipe.data.root is None):
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
