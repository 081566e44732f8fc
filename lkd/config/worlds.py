"""The worlds of a meta-training: what its recipe lists, and what it has drawn."""

import dataclasses
import math
import random
from typing import Any

from lkd.config.meta_training import DrawRecipe, MetaTrainRecipe
from lkd.config.parse import is_nested, make_recipe, merge
from lkd.config.parts import StudentRecipe
from lkd.core.errors import UserError

PARTS = ("data", "teacher", "student", "train")


def expand_worlds(recipe: MetaTrainRecipe) -> dict[str, StudentRecipe]:
    """Name → data, teacher, student and training of each world: those listed, then those drawn; empty without any."""
    differences = {name: find_differences(name, recipe.worlds) for name in recipe.worlds}
    drawn = draw_worlds(recipe.draw, differences)
    if taken := sorted(drawn.keys() & differences.keys()):
        raise UserError(f"worlds.{taken[0]}: a drawn world has this name too; take another one")
    differences |= drawn
    if not differences:
        return {}
    if recipe.students:
        raise UserError("students: a recipe with worlds names the student in each world; leave it out")
    whole = dataclasses.asdict(recipe)
    shared = {part: whole[part] for part in PARTS}
    expanded = {}
    for name, content in differences.items():
        parts = make_recipe(StudentRecipe, merge(shared, content), f"worlds.{name}")
        kept = {part: getattr(parts, part) for part in PARTS}
        expanded[name] = StudentRecipe(seed=recipe.seed, device=recipe.device, **kept)
    return expanded


def find_differences(name: str, worlds: dict[str, Any], above: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a listed world differs in; `of` names another one whose differences it has too, where it has none itself."""
    if name in above or name not in worlds:
        raise UserError(f"worlds.{above[-1]}.of: {name!r} is not another world; there are {', '.join(worlds)}")
    content = dict(worlds[name]) if is_nested(worlds[name]) else worlds[name]
    base = content.pop("of", None) if isinstance(content, dict) else None
    own = check_world(name, content)
    return own if base is None else merge(find_differences(str(base), worlds, (*above, name)), own)


def check_world(name: str, content: Any) -> dict[str, Any]:
    """What a world differs in."""
    if not is_nested(content) or not name.replace("-", "").replace("_", "").isalnum():
        raise UserError(
            f"worlds.{name}: {content!r} is not a mapping of data, teacher, student and train, of a name of letters, "
            "digits, - and _"
        )
    if unknown := sorted(content.keys() - set(PARTS)):
        raise UserError(f"worlds.{name}: unknown key {unknown[0]!r}; a world differs in {', '.join(PARTS)}")
    return dict(content)


def draw_worlds(draw: DrawRecipe, listed: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The worlds that are drawn, a function of the seed: each is a listed one, drawn too, with other values."""
    if not draw.worlds:
        return {}
    bases = draw.of or list(listed)
    if unknown := [name for name in bases if name not in listed]:
        raise UserError(f"draw.of: there is no world {unknown[0]!r}; there are {', '.join(listed) or 'none'}")
    drawn = {}
    for number in range(draw.worlds):
        chance = random.Random(f"{draw.seed}/{number}")
        content = listed[chance.choice(bases)] if bases else {}
        for field, values in draw.values.items():
            content = merge(content, nest(field, draw_value(field, values, chance)))
        drawn[f"drawn-{number:02}"] = check_world(f"drawn-{number:02}", content)
    return drawn


def draw_value(field: str, values: Any, chance: random.Random) -> Any:
    """One of a list, or a number of a range; it stays as it is if neither is given."""
    if isinstance(values, list) and values:
        return chance.choice(values)
    if isinstance(values, dict) and values.keys() <= {"low", "high", "log"}:
        low, high = (
            float(bound) if isinstance(bound := values.get(k), int | float) else math.nan for k in ("low", "high")
        )
        log = values.get("log", False)
        if -math.inf < low <= high < math.inf and (low > 0 or not log):
            whole = isinstance(values["low"], int) and isinstance(values["high"], int)
            if whole and not log:  # rounding would draw the bounds half as often as what lies between
                return chance.randint(round(low), round(high))
            value = math.exp(chance.uniform(math.log(low), math.log(high))) if log else chance.uniform(low, high)
            return round(value) if whole else float(f"{value:.4g}")
    raise UserError(
        f"draw.values.{field}: nothing can be drawn from {values!r}; give a list of values, or "
        "{low: ..., high: ..., log: true or false} with low of at most high, positive where log"
    )


def nest(field: str, value: Any) -> dict[str, Any]:
    """`{"a": {"b": value}}` for `"a.b"`."""
    for key in reversed(field.split(".")):
        value = {key: value}
    return dict(value)
