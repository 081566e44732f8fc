"""Options of the loss influence_weighted, from a recipe's mapping to a dataclass."""

import dataclasses
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from lkd.config import InfluenceSettings, InfluenceWeightedLossSettings
from lkd.errors import UserError, check_choice

INFLUENCE_WEIGHTED = "influence_weighted"
Settings = TypeVar("Settings", InfluenceSettings, InfluenceWeightedLossSettings)


def read_weighted_loss(specification: dict[str, Any]) -> InfluenceWeightedLossSettings:
    """Read {name: influence_weighted, ...}.

    Raises:
        UserError: If an option is unknown or of the wrong type.
    """
    where = f"loss '{INFLUENCE_WEIGHTED}'"
    options = {name: value for name, value in specification.items() if name != "name"}
    if not isinstance(options.get("influence", {}), dict):
        raise UserError(f"{where}: influence: {options['influence']!r} is not a mapping, such as {{method: lissa}}")
    influence = read_settings(f"{where}: influence", InfluenceSettings, options.pop("influence", {}))
    return dataclasses.replace(read_settings(where, InfluenceWeightedLossSettings, options), influence=influence)


def read_settings(where: str, kind: type[Settings], values: dict[str, Any]) -> Settings:
    """Make a dataclass of plain values.

    Raises:
        UserError: If a name is unknown or a value is not of its field's type.
    """
    hints = get_type_hints(kind)
    for name, value in values.items():
        check_choice(where, name, hints)
        hint = hints[name]
        if get_origin(hint) is Literal:
            check_choice(f"{where}: {name}", str(value), get_args(hint))
        elif hint in (int, float) and (
            isinstance(value, bool) or not isinstance(value, int if hint is int else (int, float))
        ):
            raise UserError(f"{where}: {name}: {value!r} is not of type {hint.__name__}")
    return kind(**values)
