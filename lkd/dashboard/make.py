"""Make a workspace or a report: send it to W&B, or write what would be sent."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lkd.config import DashboardRecipe
from lkd.dashboard.names import list_empty, read_names
from lkd.dashboard.report import build_report, check_comparison
from lkd.dashboard.sections import SECTIONS
from lkd.dashboard.workspace import build_workspace
from lkd.errors import UserError
from lkd.files import write_json


def make_dashboard(recipe: DashboardRecipe, say: Callable[[str], None] = print) -> str:
    """Make what the recipe asks for.

    Returns:
        The file of a dry run, else the address.

    Raises:
        UserError: If wandb-workspaces is not installed, W&B does not answer or nobody is logged in, or a folder is
            not what it should be.
    """
    if importlib.util.find_spec("wandb_workspaces") is None:
        raise UserError("dashboard: wandb-workspaces is not installed: pip install 'lkd[dashboard]'")
    names = [read_names(Path(run)) for run in recipe.runs]
    if recipe.report:
        check_comparison(Path(recipe.report))
    if names:
        empty = list_empty(SECTIONS, set().union(*names))
        say("\n  ".join([f"{len(empty)} panels lack something of these runs" + ":" * bool(empty), *empty]))
    if recipe.dry_run:
        return write_spec(recipe, say)
    with explained_failures():
        made = build(recipe, recipe.entity or find_entity(), known=True)
        made.save()
        return str(made.url)


def build(recipe: DashboardRecipe, entity: str, known: bool) -> Any:
    """The recipe's report or workspace; for `known` see `build_report`.

    Raises:
        UserError: If wandb-workspaces refuses the name.
    """
    if recipe.report:
        return build_report(Path(recipe.report), entity, recipe.project, known)
    try:
        return build_workspace(entity, recipe.project, recipe.name)
    except ValueError as error:
        raise UserError(f"name: {recipe.name!r}: W&B takes no emoji and no symbols such as + = < $") from error


def write_spec(recipe: DashboardRecipe, say: Callable[[str], None]) -> str:
    """Write what would be sent; the file."""
    path = Path(recipe.out) / ("report.json" if recipe.report else "workspace.json")
    write_json(path, read_spec(build(recipe, recipe.entity or "", known=False)))
    if recipe.report:
        say("the run's project is looked up when the report is sent: its panels here are of the report's own project")
    return str(path)


def read_spec(made: Any) -> Any:
    """What `save` sends of a workspace or report: wandb-workspaces has no public name for it."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def find_entity() -> str:
    """Who is logged in.

    Raises:
        UserError: If W&B does not say.
    """
    import wandb

    entity = wandb.Api().default_entity
    if not entity:
        raise UserError("entity: W&B names no default for who is logged in; give --entity USER_OR_TEAM")
    return str(entity)


@contextmanager
def explained_failures() -> Iterator[None]:
    """Tell in one line why W&B took nothing; its libraries raise bare `Exception`s."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"dashboard: nothing was sent: {first}; run `wandb login`, or write what would be sent with --dry_run"
        ) from error
