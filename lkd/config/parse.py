"""From the words of a command line and its recipe files to what the parser takes."""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping
from functools import cache
from itertools import chain, takewhile
from pathlib import Path
from typing import Any, TypeVar, get_origin, get_type_hints

import yaml
from jsonargparse import ArgumentError, ArgumentParser, get_loader, set_parsing_settings
from jsonargparse import typing as ranged

from lkd.config import COMMANDS, POSITIONAL
from lkd.core.errors import UserError
from lkd.core.files import MALFORMED, PACKAGE, expand_home

Recipe = TypeVar("Recipe")

# ----------------------------------------------------------------------------------------------------------------------
# Recipe files that build on others: `base: FILE` or `base: [FILE, ...]`, relative to the file that says it.

MOST_BYTES = 1 << 20  # of a recipe
MOST_NESTED = 20  # mappings and lists in each other


def read_recipes(paths: list[Path]) -> list[dict[str, Any]]:
    """Read the recipe files of a command line, each merged with its bases.

    Nested keys are merged one by one; a file wins over its bases, a later base over an earlier one. Two keys reach
    into the other files: what stands under `with: {FILE: ...}` is merged over FILE if that is read, before or after;
    and `pair: NAME` is what `{pair}` stands for.
    """
    files = [read_layers(path) for path in paths]
    additions: dict[Path, dict[str, Any]] = {}
    pair = None
    for path, content in chain(*files):
        additions = merge(additions, pop_additions(path, content))
        pair = content.pop("pair", pair)
    if not (pair is None or isinstance(pair, str)):
        raise UserError(f"pair: {pair!r} is not a name")
    recipes = []
    for layers in files:
        recipe: dict[str, Any] = {}
        for path, content in layers:
            whole = merge(content, additions.get(path.resolve(), {}))
            recipe = merge(recipe, fill_in_pair(whole, pair, str(path)))
        recipes.append(recipe)
    return recipes


def read_layers(path: Path, above: tuple[Path, ...] = ()) -> list[tuple[Path, dict[str, Any]]]:
    """Read a recipe file and the files that it builds on, which come first.

    `above`: the files that led here, to find cycles.
    """
    trail = " → ".join(str(file) for file in (*above, path))
    if path.resolve() in {file.resolve() for file in above}:
        raise UserError(f"base: {trail} is a cycle: remove one of these")
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ValueError(f"it is longer than {MOST_BYTES:,} characters")
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
    below = [layer for base in bases for layer in read_layers(path.parent / expand_home(base), (*above, path))]
    return [*below, (path, content)]


def pop_additions(path: Path, content: dict[str, Any]) -> dict[Path, dict[str, Any]]:
    """Take what stands under `with` out of a file's content."""
    named = content.pop("with", {})
    if not is_nested(named) or not is_nested(*named.values()):
        raise UserError(f"{path}: with: {named!r} is not a mapping of recipe files to keys and values")
    additions = {path.parent / expand_home(str(name)): values for name, values in named.items()}
    for other in additions:
        if not other.is_file():
            raise UserError(f"{path}: with: there is no file {other}; names are relative to the file that says them")
    return {other.resolve(): values for other, values in additions.items()}


def fill_in_pair(value: Any, pair: str | None, place: str) -> Any:
    """Put the pair's name in the place of `{pair}`."""
    if isinstance(value, dict):
        return {key: fill_in_pair(inner, pair, f"{place}: {key}") for key, inner in value.items()}
    if isinstance(value, list):
        return [fill_in_pair(inner, pair, place) for inner in value]
    if not isinstance(value, str) or "{pair}" not in value:
        return value
    if pair is None:
        raise UserError(f"{place}: {value!r} is for a pair; name the pair's recipe too, which says `pair: NAME`")
    return value.replace("{pair}", pair)


def check_plain(text: str) -> None:
    """Check that YAML is a tree as large as its text and not deep, before it is built.

    Raises:
        ValueError: If it has aliases, of which a few lines can stand for any amount of memory, or is nested deeply.
    """
    depth, loader = 0, getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for event in yaml.parse(text, Loader=loader):
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {event.start_mark.line + 1}: aliases (*name) are not read; write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_NESTED:
            raise ValueError(f"line {event.start_mark.line + 1}: it is nested more than {MOST_NESTED} deep")
    check_unique(yaml.compose(text, Loader=loader))


def check_unique(node: yaml.Node | None) -> None:
    """Check that no mapping has a key twice, of which the second would wipe the first.

    Raises:
        ValueError: If one has; names both lines.
    """
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ValueError(f"lines {seen[name]} and {line}: the key {name!r} is there twice; put both into one")
            seen[name] = line
            check_unique(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            check_unique(value)


def merge(below: dict[Any, Any], over: dict[Any, Any]) -> dict[Any, Any]:
    """Merge two nested dicts; `over` wins."""
    both = {key: merge(below[key], over[key]) for key in below.keys() & over.keys() if is_nested(below[key], over[key])}
    return {**below, **over, **both}


def is_nested(*values: Any) -> bool:
    """Whether all of the values are dicts."""
    return all(isinstance(value, dict) for value in values)


# ----------------------------------------------------------------------------------------------------------------------
# The words of a command line, put into the form that the parser takes, and its errors into the user's words.


def usage(recipe: type, field: str | None) -> str:
    """What may come before the options: recipe files, or values of a field."""
    if field is None:
        return "[RECIPE.yaml ...]"
    if " " in field:
        return " ".join(usage(recipe, part) for part in field.split())
    return f"{field.upper().removesuffix('S')} ..." if takes_list(recipe, field) else field.upper()


def check_words(words: list[str]) -> None:
    """Check the mappings among the words of a command line as those of a recipe are."""
    for word in words:
        _, equals, value = word.partition("=")
        text = value if word.startswith("--") and equals else word
        if text.lstrip().startswith(("{", "[")):
            try:
                check_plain(text)
            except yaml.YAMLError:
                continue  # jsonargparse says more of it: where it belongs, and what is accepted
            except ValueError as error:
                raise UserError(f"{text[:100]}: {error}") from error


def takes_list(recipe: type, field: str) -> bool:
    """Whether a field of a recipe is a list."""
    return get_origin(get_type_hints(recipe)[field]) is list


def fill_field(words: list[str], recipe: type, field: str) -> list[str]:
    """Put the option that they are for, `--field`, before the words that come before the options."""
    leading = list(takewhile(lambda word: not word.startswith("-"), words))
    options = words[len(leading) :]
    if not leading:
        return options
    first, _, rest = field.partition(" ")
    if rest:
        return [f"--{first}", leading[0], *fill_field([*leading[1:], *options], recipe, rest)]
    if takes_list(recipe, field):
        return [f"--{field}", json.dumps(leading), *options]
    if len(leading) > 1:
        raise UserError(f"{field}: one is taken, but {len(leading)} are given: {' '.join(leading)}")
    return [f"--{field}", leading[0], *options]


def split_files(words: list[str]) -> tuple[list[Path], list[str]]:
    """The recipe files among the words, which come before the options or after `--config`; and the options."""
    leading = list(takewhile(lambda word: not word.startswith("-"), words))
    paths, options = [find_recipe(word) for word in leading], []
    rest = iter(words[len(leading) :])
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--config":
            paths.append(find_recipe(value if equals else next(rest, "")))
        else:
            options.append(word)
    return paths, options


def find_recipe(name: str) -> Path:
    """A recipe file; one under `configs/` that is not there is the package's: in it, or beside it in a checkout."""
    path = Path(expand_home(name))
    if not path.exists() and path.parts[:1] == ("configs",):
        return next((own for own in (PACKAGE / path, PACKAGE.parent / path) if own.is_file()), path)
    return path


def complete_switches(words: list[str], switches: set[str]) -> list[str]:
    """Let `--switch` alone mean `--switch true`."""
    completed = []
    for word, following in zip(words, [*words[1:], "--"], strict=False):
        completed += [word, "true"] if word in switches and following.startswith("--") else [word]
    return completed


def known_keys(parser: ArgumentParser, of_type: type | None = None) -> list[str]:
    """The dotted keys that a parser accepts; only those of one type if it is given."""
    return [
        action.dest
        for action in parser._actions
        if action.dest not in ("help", "print_config", "config")
        and (of_type is None or getattr(action, "_typehint", None) is of_type)
    ]


def explain(message: str, keys: list[str], place: str = "") -> str:
    """Jsonargparse's message as one line: the nearest keys where one was unknown, the range where a number left it."""
    line = " ".join(message.split()).replace("<class '", "").replace("'>", "")
    misplaced = re.search(r"unrecognized arguments: ([^-]\S*)", line)
    if misplaced:
        return f"{misplaced[1]!r} is not an option, nor a value of one; files and folders go before the options"
    unknown = re.search(
        r"(?:unrecognized arguments: (?:--)?|does not accept (?:option|nested key) '|(?:Option|Key) ')([\w.-]+)", line
    )
    if unknown:
        group = re.search(r"Group '([\w.]+)'", line)
        name = f"{group[1]}.{unknown[1]}" if group and "." not in unknown[1] else unknown[1]
        near = difflib.get_close_matches(name, keys, n=3, cutoff=0.5) or keys[:6]
        return f"unknown key {place + name!r}; nearest: {', '.join(place + key for key in near)}"
    refused = re.search(r"Not of type (\w+): (?:invalid .*?: )?(\S+)", line)
    accepted = getattr(ranged, refused[1], None) if refused else None
    if refused and accepted:
        key = ".".join(re.findall(r'[kK]ey "([\w.]+)"', line))
        kind = "a whole number" if issubclass(accepted, int) else "a number"
        return f"{place}{key}: {refused[2]} is not {kind} {re.sub('v(==)?', '', accepted._expression)}"
    return place + re.sub(r'^Parser key "([\w.]+)":', r"\1:", line)


def build_parser(kind: type, **options: Any) -> ArgumentParser:
    """A parser of a recipe or of a part of one. A recipe is data: no value of it may name code that is imported."""
    set_parsing_settings(
        import_path_denylist=["*"], import_path_allowlist=["lkd.config"], instantiate_subclass_spec_in_any=False
    )
    parser = ArgumentParser(exit_on_error=False, allow_abbrev=False, **options)
    parser.add_class_arguments(kind)
    return parser


def instantiate(kind: type[Recipe], parser: ArgumentParser, parse: Callable[[], Any], role: str = "") -> Recipe:
    """The dataclass of what `parse` gives, with plain numbers in the place of the types that carry ranges."""
    try:
        parsed = parser.instantiate(parse())
    except ArgumentError as error:
        raise UserError(explain(str(error), known_keys(parser), role and f"{role}.")) from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{role or 'the recipe'} has a value that cannot be used ({reason})") from error
    return make_plain(kind(**{key: value for key, value in vars(parsed).items() if key != "config"}))


def make_plain(value: Any) -> Any:
    """A recipe, or a part of one, with plain numbers for the types that carry ranges, and paths without `~`."""
    if dataclasses.is_dataclass(value):
        for name, inner in vars(value).items():
            setattr(value, name, make_plain(inner))
    elif isinstance(value, list):
        return [make_plain(inner) for inner in value]
    elif isinstance(value, dict):
        return {key: make_plain(inner) for key, inner in value.items()}
    elif isinstance(value, str):
        return expand_home(value)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)
    return value


def make_recipe(kind: type[Recipe], values: Mapping[str, Any], role: str = "") -> Recipe:
    """A recipe, or a part of one, of plain values, checked as the command line's are.

    `values`: its fields; those of its parts are dicts.
    `role`: what messages call it, say `"train"`.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        hint, place = hints.get(name), role and f"{role}."
        if isinstance(value, str) and isinstance(hint, type) and issubclass(hint, int | float):
            raise UserError(f"{place}{name}: {value!r} is text, not a number")
        if dataclasses.is_dataclass(hint) and not isinstance(value, Mapping):
            raise UserError(f"{place}{name}: {value!r} is not a mapping of its fields")
    parser = keep_parser(kind)  # type: ignore[arg-type]  # a class is hashable
    return instantiate(kind, parser, lambda: parser.parse_object(dict(values)), role)


@cache
def keep_parser(kind: type) -> ArgumentParser:
    """`build_parser` of parts that are made again and again: the worlds of a meta-training, say."""
    return build_parser(kind)


def parse_recipe(command: str, words: list[str]) -> Any:
    """Turn recipe files and overrides into the command's dataclass; None if only help was asked for."""
    recipe, field = COMMANDS[command][0], POSITIONAL.get(command)
    parser = build_parser(
        recipe, prog=f"lkd {command}", usage=f"lkd {command} {usage(recipe, field)} [--key value ...]"
    )
    parser.add_argument("--config", action="config", help="A recipe file; the same as naming it first.")
    paths, options = split_files(fill_field(words, recipe, field) if field else words)
    recipes = read_recipes(paths)
    for path, read in zip(paths, recipes, strict=True):
        if read.get("plugins"):
            raise UserError(f"{path}: plugins: a recipe runs no code; say --plugins {read['plugins']} in the command")
    contents = [word for read in recipes for word in ("--config", json.dumps(read, default=str))]
    check_words(options)
    expanded = contents + complete_switches(options, {f"--{key}" for key in known_keys(parser, bool)})
    try:
        return instantiate(recipe, parser, lambda: parser.parse_args(expanded))
    except SystemExit:
        return None
