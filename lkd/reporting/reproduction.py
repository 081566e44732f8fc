"""The command line that makes a run again."""

import dataclasses
import json
import shlex
from typing import Any

from lkd.cli import COMMANDS
from lkd.reporting.runs import RunRecord
from lkd.reporting.settings import show_path, simplify

LEFT_OUT = ("resume",)  # says how a run was gone on with, not what it is


def command_line(run: RunRecord) -> str:
    """The shortest line that gives a run's settings: those that are not the defaults."""
    return shlex.join(["lkd", run.command, *list_options(COMMANDS[run.command][0](), run.recipe)])


def list_options(default: Any, recipe: dict[str, Any], prefix: str = "") -> list[str]:
    """The options by which a recipe differs from a default dataclass of its kind."""
    words = []
    for field in dataclasses.fields(default):
        key, usual = prefix + field.name, getattr(default, field.name)
        value = recipe.get(field.name, usual)
        if dataclasses.is_dataclass(usual) and isinstance(value, dict):
            words += list_options(usual, value, f"{key}.")
        elif key not in LEFT_OUT and value != usual:
            words += [f"--{key}", format_option(value)]
    return words


def format_option(value: Any) -> str:
    """A value as the command line takes it."""
    return show_path(value) if isinstance(value, str) else json.dumps(simplify(value), ensure_ascii=False)
