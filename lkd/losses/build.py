"""From a recipe's `loss` to a module."""

from pathlib import Path
from typing import Any

from torch import nn

from lkd.artifact import SUFFIX, load_loss
from lkd.errors import UserError, check_choice
from lkd.losses.cross_entropy import CrossEntropyLoss
from lkd.losses.kd import KDLoss

LOSSES: dict[str, type[nn.Module]] = {"cross_entropy": CrossEntropyLoss, "kd": KDLoss}


def build_loss(specification: str | dict[str, Any]) -> nn.Module:
    """Build a loss.

    Args:
        specification: A name in `LOSSES`; the path of a learned-loss file; or a dict with `name` and the loss's own
            arguments.

    Raises:
        UserError: If the name, an argument or the file is not good.
    """
    options = dict(specification) if isinstance(specification, dict) else {"name": specification}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(
            f"loss: {specification!r} has no `name` (one of {', '.join(sorted(LOSSES))}, or a *{SUFFIX} path)"
        )
    if name.endswith(".safetensors") or Path(name).is_file():
        if options:
            raise UserError(f"loss: {name} is a learned loss and takes no {', '.join(options)}")
        return load_loss(name)
    check_choice("loss", name, LOSSES)
    try:
        return LOSSES[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"loss {name!r}: {error}") from error
