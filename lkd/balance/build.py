"""From a recipe's `balance` to a rule."""

from functools import partial
from typing import Any

from torch import nn

from lkd.balance.balancing import Balancing
from lkd.balance.contract import Balance
from lkd.balance.dto_kd import DTOKDBalance
from lkd.balance.dynamic import DynamicBalance
from lkd.balance.schedules import ConstantBalance, CosineBalance, LinearBalance
from lkd.balance.variance import VarianceOptimalBalance
from lkd.errors import UserError, check_choice
from lkd.losses import CrossEntropyLoss

BALANCES: dict[str, Any] = {
    "constant": ConstantBalance,
    "linear": LinearBalance,
    "cosine": CosineBalance,
    "dynamic": DynamicBalance,
    "reversed": partial(DynamicBalance, direction=-1),
    "dto_kd": DTOKDBalance,
    "variance_optimal": VarianceOptimalBalance,
}


def build_balance(specification: str | dict[str, Any] | None, loss: nn.Module) -> Balancing | None:
    """Build a balance for one training; None if none is asked for.

    Args:
        specification: A name in `BALANCES`, or a dict with `name`, `normalize` and the rule's own arguments.
        loss: What it will weigh the terms of.

    Raises:
        UserError: If the name or an argument is not good, or the loss has nothing of a teacher.
    """
    if specification is None:
        return None
    options = dict(specification) if isinstance(specification, dict) else {"name": specification}
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"balance: {specification!r} has no `name` (one of {', '.join(sorted(BALANCES))})")
    check_choice("balance", name, BALANCES)
    normalize = options.pop("normalize", name == "variance_optimal")
    if not isinstance(normalize, bool):
        raise UserError(f"balance.normalize: {normalize!r} is neither true nor false")
    if "direction" in options:
        raise UserError("balance.direction: no option; take the balance `dynamic` or `reversed`")
    if isinstance(loss, CrossEntropyLoss):
        raise UserError(f"balance: {name} has nothing to weigh: the loss is cross-entropy, without a teacher")
    try:
        rule: Balance = BALANCES[name](**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"balance {name!r}: {error}") from error
    return Balancing(rule, normalize)
