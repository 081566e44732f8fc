"""What a checkpoint of meta-training must hold: checked before it is used, since it may be a stranger's."""

from collections.abc import Collection
from typing import Any

from torch import nn

from lkd.interleaving import Point


def check_points(points: Any, loss: nn.Module) -> list[Point]:
    """Weights of a loss, and from which progress on they are in charge.

    Raises:
        ValueError: If the weights are not those of `loss`, or their starts are not in ascending order in [0, 1].
    """
    shapes = {name: tensor.shape for name, tensor in loss.state_dict().items()}
    checked = [(float(start), dict(state)) for start, state in points]
    starts = [start for start, _ in checked]
    if starts != sorted(starts) or not all(0 <= start <= 1 for start in starts):
        raise ValueError(f"points of progress {starts} do not ascend in [0, 1]")
    for _, state in checked:
        if {name: tensor.shape for name, tensor in state.items()} != shapes:
            raise ValueError("weights of a point of progress are not those of the loss")
    return checked


def check_rows(rows: Any, needed: Collection[str]) -> list[dict[str, float]]:
    """Rows of a log.

    Raises:
        ValueError: If a row lacks a figure that is needed, or one is no number.
    """
    checked = [dict(row) for row in rows]
    for row in checked:
        if missing := set(needed) - row.keys():
            raise ValueError(f"a row lacks {', '.join(sorted(missing))}")
        if not all(isinstance(name, str) and isinstance(value, int | float) for name, value in row.items()):
            raise ValueError("a row holds something else than numbers")
    return checked


def check_fields(state: Any, like: dict[str, Any]) -> dict[str, Any]:
    """Fields of an object.

    Raises:
        ValueError: If they are not those of `like`, or one is of another type.
    """
    if state.keys() != like.keys():
        raise ValueError(f"has the fields {', '.join(map(str, state))}, not {', '.join(like)}")
    for name, value in state.items():
        if type(value) is not type(like[name]):
            raise ValueError(f"{name} is a {type(value).__name__}, not a {type(like[name]).__name__}")
    return dict(state)
