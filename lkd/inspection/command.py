"""`lkd inspect`: from a recipe to a report, a JSON file and a picture."""

from pathlib import Path
from typing import Any

from torch import nn

from lkd.artifact import SUFFIX
from lkd.config import InspectRecipe
from lkd.errors import UserError
from lkd.files import write_json
from lkd.inspection.inspection import inspect_loss
from lkd.inspection.picture import draw_inspection
from lkd.inspection.probes import STAGES
from lkd.inspection.provenance import describe_file
from lkd.inspection.text import format_inspection
from lkd.losses import KDLoss
from lkd.losses.build import build_loss, is_learned


def inspect_recipe(recipe: InspectRecipe) -> tuple[str, Path]:
    """Inspect a recipe's loss; write inspection.json and inspection.png.

    Returns:
        The report for the terminal, and the folder.

    Raises:
        UserError: If the loss, or a setting, is not good.
    """
    if recipe.num_classes < 2:
        raise UserError(f"num_classes: {recipe.num_classes} is not at least 2")
    try:
        kd = KDLoss(recipe.kd_weight, recipe.kd_temperature)
    except ValueError as error:
        raise UserError(f"kd_{error}") from error
    loss, name = open_loss(recipe.loss)
    file = describe_file(Path(name)) if is_learned(name) else None
    title = Path(name).name if file else describe_options(recipe.loss)
    plain = Path(name).name.removesuffix(SUFFIX)
    folder = Path(recipe.out) if recipe.out else (Path(name).parent if file else Path()) / f"{plain}-inspection"
    report = inspect_loss(loss, kd, recipe.num_classes, recipe.seed)
    write_json(folder / "inspection.json", {"loss": recipe.loss, "file": file, **report})
    draw_inspection(report, title, folder / "inspection.png")
    return format_inspection(report, file, title), folder


def open_loss(specification: dict[str, Any] | str) -> tuple[nn.Module, str]:
    """The loss, and its file's path or its name. Losses over features are built for made-up stages.

    Raises:
        UserError: As `build_loss`; or if the loss can only be used with a data set.
    """
    loss = build_loss(specification, STAGES, STAGES)
    name = specification if isinstance(specification, str) else specification["name"]
    if getattr(loss, "needs_index", False):
        raise UserError(f"loss {name!r} keeps a memory of every training image; it cannot be inspected without them")
    return loss, name


def describe_options(specification: dict[str, Any] | str) -> str:
    """A hand-made loss's name with the options that were given."""
    if isinstance(specification, str):
        return specification
    options = [f"{key} {value}" for key, value in specification.items() if key != "name"]
    return f"{specification['name']} ({', '.join(options)})" if options else specification["name"]
