"""Methods of a comparison: their options, their grids, and which points of a grid a budget allows."""

import dataclasses
import itertools
import random
from collections import Counter
from typing import Any

from lkd.config import CompareRecipe, TrainRecipe
from lkd.errors import UserError, check_choice

Method = dict[str, Any] | str
TRAIN = "train."
BALANCE = "balance."


def split_method(method: Method, train: TrainRecipe) -> tuple[Method, TrainRecipe]:
    """What `build_loss` takes, and the training with the method's own settings (`train: {learning_rate: 0.03}`)."""
    if isinstance(method, str):
        return method, train
    loss = {key: value for key, value in method.items() if key not in ("train", "grid", "balance")}
    return loss, dataclasses.replace(train, **method.get("train", {}))


def balance_of(method: Method) -> dict[str, Any] | str | None:
    """What `build_balance` takes."""
    return None if isinstance(method, str) else method.get("balance")


def expand_grid(method: Method) -> list[Method]:
    """Every point of a method's grid; the method itself if it has none."""
    if isinstance(method, str) or "grid" not in method:
        return [method]
    names = list(method["grid"])
    return [
        place_point(method, dict(zip(names, point, strict=True)))
        for point in itertools.product(*method["grid"].values())
    ]


def place_point(method: dict[str, Any], point: dict[str, Any]) -> dict[str, Any]:
    """A method with one point of its grid; keys that start with `train.` or `balance.` go into that part of it."""
    placed = {key: value for key, value in method.items() if key != "grid"}
    train = dict(placed.pop("train", {}))
    train |= {key.removeprefix(TRAIN): value for key, value in point.items() if key.startswith(TRAIN)}
    if weighed := {key.removeprefix(BALANCE): value for key, value in point.items() if key.startswith(BALANCE)}:
        balance = placed.get("balance", {})
        placed["balance"] = ({"name": balance} if isinstance(balance, str) else balance) | weighed
    placed |= {key: value for key, value in point.items() if not key.startswith((TRAIN, BALANCE))}
    return placed | ({"train": train} if train else {})


def choose_points(recipe: CompareRecipe, label: str) -> list[Method]:
    """The points that a method is tuned over: its grid, or as much of it as the budget allows.

    The first point has the method's own options, given beside the grid, where the grid holds them, and each list's
    first value elsewhere. Every further one is the point whose values have been used least so far, so that the values
    of each option are tried equally often; a seeded shuffle breaks ties.
    """
    method = recipe.methods[label]
    grid = expand_grid(method)
    budget = recipe.tuning_trainings // recipe.tuning_seeds
    if isinstance(method, str) or not recipe.tuning_trainings or len(grid) <= budget:
        return grid
    options: dict[str, list[Any]] = method["grid"]
    own = method | {f"{TRAIN}{key}": value for key, value in dataclasses.asdict(recipe.train).items()}
    own |= {f"{TRAIN}{key}": value for key, value in method.get("train", {}).items()}
    first = tuple(values.index(own[name]) if own.get(name) in values else 0 for name, values in options.items())
    points = list(itertools.product(*(range(len(values)) for values in options.values())))
    random.Random(f"{recipe.seed}/{label}").shuffle(points)
    used: Counter[tuple[int, int]] = Counter()
    chosen: list[tuple[int, ...]] = []
    while len(chosen) < budget:
        point = min(points, key=lambda p: sum(used[place] for place in enumerate(p))) if chosen else first
        points.remove(point)
        used.update(enumerate(point))
        chosen.append(point)
    names = list(options)
    return [
        place_point(method, {name: options[name][i] for name, i in zip(names, p, strict=True)}) for p in sorted(chosen)
    ]


def check_tuning(recipe: CompareRecipe) -> None:
    """Check the budget and the form of every grid and every training of a method's own.

    Raises:
        UserError: If one is not good.
    """
    if recipe.tuning_seeds < 1:
        raise UserError(f"tuning_seeds: {recipe.tuning_seeds} is not at least 1")
    if recipe.tuning_trainings and recipe.tuning_trainings < recipe.tuning_seeds:
        raise UserError(
            f"tuning_trainings: {recipe.tuning_trainings} is not at least tuning_seeds, {recipe.tuning_seeds}; "
            "0 trains the full grid of every method"
        )
    for label, method in recipe.methods.items():
        if isinstance(method, str):
            continue
        grid, train = method.get("grid", {}), method.get("train", {})
        for key, value in (("grid", grid), ("train", train)):
            if not isinstance(value, dict):
                raise UserError(f"methods.{label}.{key}: {value!r} is not a mapping, such as {{option: ...}}")
        for name, values in grid.items():
            if not isinstance(values, list) or not values:
                raise UserError(f"methods.{label}.grid.{name}: {values!r} is not a list of values to try")
            if name.startswith(TRAIN):
                for value in values:
                    check_setting(f"methods.{label}.grid.{name}", name.removeprefix(TRAIN), value)
        for name, value in train.items():
            check_setting(f"methods.{label}.train.{name}", name, value)


def check_setting(where: str, name: str, value: Any) -> None:
    """Check that the training has such a setting, and that the value is of its type."""
    defaults = dataclasses.asdict(TrainRecipe())
    check_choice(where, name, defaults)
    kind = type(defaults[name])
    if not (isinstance(value, kind) or (kind is float and type(value) is int)) or (kind is int and value is True):
        raise UserError(f"{where}: {value!r} is not of type {kind.__name__}")
