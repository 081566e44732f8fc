"""Recipe files that build on others: `base: FILE` or `base: [FILE, ...]`, relative to the file that says it."""

from pathlib import Path
from typing import Any

from lkd.errors import UserError
from lkd.files import MALFORMED

MOST_BYTES = 1 << 20  # of a recipe
MOST_NESTED = 20  # mappings and lists in each other


def read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a recipe file, merged with its bases.

    Nested keys are merged one by one; the file wins over its bases, a later base over an earlier one.

    Args:
        path: The YAML file.
        above: The files that led here, to find cycles.

    Raises:
        UserError: If a file is missing, is not a YAML mapping, or is its own base.
    """
    import yaml
    from jsonargparse import get_loader

    trail = " → ".join(str(file) for file in (*above, path))
    if path.resolve() in {file.resolve() for file in above}:
        raise UserError(f"base: {trail} is a cycle: remove one of these")
    try:
        text = read_bounded(path)
        check_plain(text)
        content = get_loader("yaml")(text)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise UserError(f"{trail}: cannot be read: {reason}") from error
    except (*MALFORMED, yaml.YAMLError) as error:
        raise UserError(f"{trail}: is not YAML that is read: {' '.join(str(error).split())[:500]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{trail}: is not a mapping of keys to values")
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise UserError(f"{trail}: base: {bases!r} is not a file name or a list of file names")
    merged: dict[str, Any] = {}
    for base in bases:
        merged = merge(merged, read_recipe(path.parent / base, (*above, path)))
    return merge(merged, content)


def read_bounded(path: Path) -> str:
    """The text of a file.

    Raises:
        ValueError: If it is over `MOST_BYTES` long.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise ValueError(f"it is longer than {MOST_BYTES:,} characters")
    return text


def check_plain(text: str) -> None:
    """Check that YAML is a tree as large as its text and not deep, before it is built.

    Raises:
        ValueError: If it has aliases, of which a few lines can stand for any amount of memory, or is nested deeply.
    """
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: aliases (*name) are not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise ValueError(f"line {event.start_mark.line + 1}: it is nested more than {MOST_NESTED} deep")


def merge(below: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge two nested dicts; `over` wins."""
    both = {key: merge(below[key], over[key]) for key in below.keys() & over.keys() if is_nested(below[key], over[key])}
    return {**below, **over, **both}


def is_nested(*values: Any) -> bool:
    """Whether all of the values are dicts."""
    return all(isinstance(value, dict) for value in values)
