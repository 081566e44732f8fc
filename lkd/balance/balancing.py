"""A rule at work in a training: it splits the terms, asks the rule for λ, and weighs."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lkd.balance.rules import (
    Balance,
    ConstantBalance,
    CosineBalance,
    DTOKDBalance,
    DynamicBalance,
    LinearBalance,
    Moment,
    ReversedBalance,
    VarianceOptimalBalance,
)
from lkd.core.distributed import count_processes, gather_rows
from lkd.core.errors import UserError, check_choice
from lkd.losses.logits import CrossEntropyLoss


class Balancing:
    """total = task + λ · (sum of the other terms).

    Args:
        rule: Sets λ.
        normalize: Whether the total is 2 (task + λ · others) / (1 + λ): then λ is no learning rate in disguise, and
            λ = 1 changes nothing.

    Attributes:
        weight: The λ of the last step; NaN before the first.
    """

    def __init__(self, rule: Balance, normalize: bool = False) -> None:
        self.rule = rule
        self.normalize = normalize
        self.weight = math.nan

    def set_weight(self, terms: dict[str, Tensor], parameters: Iterable[Tensor], step: int, progress: float) -> None:
        """Set the λ of a step from the terms of its batch; several processes agree on one."""
        task, distillation = split_terms(terms)
        gradients = None
        if self.rule.wants_gradients(step):
            trained = [parameter for parameter in parameters if parameter.requires_grad]
            gradients = take_gradient(task, trained), take_gradient(distillation, trained)
            if step == 0 and not (task.detach() or gradients[0].any()):
                raise UserError(
                    "balance: the term `task` is 0, and so is its gradient: there is nothing to weigh the teacher "
                    "against; give the labels a share of the loss, as kd with weight below 1 does"
                )
        values = torch.stack([task, distillation]).detach()
        if count_processes() > 1:
            values = gather_rows(values.unsqueeze(0)).mean(0)
        own, others = values.tolist()
        if math.isfinite(own + others):  # else the step fails in a moment, and says so
            self.weight = self.rule.set_weight(Moment(step, progress, own, others, gradients))

    def weigh(self, terms: dict[str, Tensor]) -> Tensor:
        """The total of these terms at the λ that was set."""
        task, distillation = split_terms(terms)
        total = task + self.weight * distillation
        return 2 * total / (1 + self.weight) if self.normalize else total

    def scale(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """The terms as they are weighed: their sum is what `weigh` gives."""
        factor = 2 / (1 + self.weight) if self.normalize else 1.0
        return {
            name: factor * (value if name.rpartition("/")[2] == "task" else self.weight * value)
            for name, value in terms.items()
        }

    def state_dict(self) -> dict[str, Any]:
        return {"weight": self.weight, "rule": self.rule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weight = state["weight"]
        self.rule.load_state_dict(state["rule"])


def split_terms(terms: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The task's part and the teacher's; a learned loss's terms are named `part/term`."""
    if "teacher/task" in terms:
        raise UserError(
            "balance: with teacher_rate, influence_weighted trains the teacher by a term of its own, which no balance "
            "weighs; leave one of them"
        )
    own = [name for name in terms if name.rpartition("/")[2] == "task"]
    if len(own) in (0, len(terms)):
        missing = "`task`" if not own else "the teacher's"
        raise UserError(
            f"balance: the loss has the terms {', '.join(terms)}, none of them {missing}; "
            "a balance weighs `task` against all others"
        )
    others = [value for name, value in terms.items() if name not in own]
    return torch.stack([terms[name] for name in own]).sum(), torch.stack(others).sum()


def take_gradient(value: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """The gradient of a scalar as one vector, [P]; the graph is kept."""
    if not value.requires_grad:
        return torch.cat([torch.zeros_like(parameter).flatten() for parameter in parameters])
    parts = torch.autograd.grad(value, parameters, retain_graph=True, materialize_grads=True, allow_unused=True)
    return torch.cat([part.flatten() for part in parts])


# ----------------------------------------------------------------------------------------------------------------------
# From a recipe's `balance` to a rule.

BALANCES: dict[str, type[Balance]] = {
    "constant": ConstantBalance,
    "linear": LinearBalance,
    "cosine": CosineBalance,
    "dynamic": DynamicBalance,
    "reversed": ReversedBalance,
    "dto_kd": DTOKDBalance,
    "variance_optimal": VarianceOptimalBalance,
}


def build_balance(specification: str | dict[str, Any] | None, loss: nn.Module) -> Balancing | None:
    """Build a balance for one training; None if none is asked for.

    `specification`: A name in `BALANCES`, or a dict with `name`, `normalize` and the rule's own arguments.
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
    if isinstance(loss, CrossEntropyLoss):
        raise UserError(f"balance: {name} has nothing to weigh: the loss is cross-entropy, without a teacher")
    try:
        return Balancing(BALANCES[name](**options), normalize)
    except (TypeError, ValueError) as error:
        raise UserError(f"balance {name!r}: {error}") from error
