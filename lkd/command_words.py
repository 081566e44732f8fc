"""The words of a command line, put into the form that the parser takes, and its errors into the user's words."""

import difflib
import json
import re
from itertools import takewhile
from pathlib import Path
from typing import Any, get_origin, get_type_hints

from lkd.errors import UserError
from lkd.recipe_files import read_recipe


def usage(recipe: type, field: str | None) -> str:
    """What may come before the options: recipe files, or values of a field."""
    if field is None:
        return "[RECIPE.yaml ...]"
    return f"{field.upper().removesuffix('S')} ..." if takes_list(recipe, field) else field.upper()


def takes_list(recipe: type, field: str) -> bool:
    """Whether a field of a recipe is a list."""
    return get_origin(get_type_hints(recipe)[field]) is list


def name_leading(words: list[str], recipe: type, field: str | None) -> list[str]:
    """Put the option that they are for before the words that come before the options.

    Args:
        words: The command line after the command.
        recipe: The command's dataclass.
        field: Its field that they are for; None for recipe files.

    Raises:
        UserError: If the field takes one value and there are more.
    """
    leading = list(takewhile(lambda word: not word.startswith("-"), words))
    options = words[len(leading) :]
    if field is None:
        return [part for path in leading for part in ("--config", path)] + options
    if not leading:
        return options
    if takes_list(recipe, field):
        return [f"--{field}", json.dumps(leading), *options]
    if len(leading) > 1:
        raise UserError(f"{field}: one is taken, but {len(leading)} are given: {' '.join(leading)}")
    return [f"--{field}", leading[0], *options]


def split_config(words: list[str]) -> list[str]:
    """Let `--config=FILE` be `--config FILE`."""
    return [part for word in words for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def read_recipes(words: list[str]) -> list[str]:
    """Put the content of a recipe file, with its bases, in the place of its name after `--config`."""
    return [
        json.dumps(read_recipe(Path(word)), default=str) if before == "--config" else word
        for before, word in zip(["", *words], words, strict=False)
    ]


def complete_switches(words: list[str], switches: set[str]) -> list[str]:
    """Let `--switch` alone mean `--switch true`."""
    completed = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        completed += [word, "true"] if word in switches and following.startswith("--") else [word]
    return completed


def known_keys(parser: Any, of_type: type | None = None) -> list[str]:
    """The dotted keys that a parser accepts; only those of one type if it is given."""
    return [
        action.dest
        for action in parser._actions
        if action.dest not in ("help", "print_config", "config")
        and (of_type is None or getattr(action, "_typehint", None) is of_type)
    ]


def explain(message: str, keys: list[str]) -> str:
    """Jsonargparse's message as one line, with the nearest keys where one was unknown."""
    line = " ".join(message.split()).replace("<class '", "").replace("'>", "")
    misplaced = re.search(r"unrecognized arguments: ([^-]\S*)", line)
    if misplaced:
        return f"{misplaced[1]!r} is not an option, nor a value of one; files and folders go before the options"
    unknown = re.search(
        r"(?:unrecognized arguments: (?:--)?|does not accept (?:option|nested key) '|Key ')([\w.]+)", line
    )
    group = re.search(r"Group '([\w.]+)'", line)
    if not unknown:
        return line
    name = f"{group[1]}.{unknown[1]}" if group and "." not in unknown[1] else unknown[1]
    near = difflib.get_close_matches(name, keys, n=3, cutoff=0.5) or keys[:6]
    return f"unknown key {name!r}; nearest: {', '.join(near)}"
