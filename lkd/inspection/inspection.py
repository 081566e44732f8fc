"""All that is found out about a loss, as one tree of numbers and names."""

import copy
from typing import Any

from torch import nn

from lkd.inspection.balance_fit import imply_balance
from lkd.inspection.field import describe_field
from lkd.inspection.invariances import check_invariances
from lkd.inspection.own_balance import read_own_balance
from lkd.inspection.pairing import describe_pairing, measure_shares
from lkd.inspection.probes import LogitView, draw_states, parts_at
from lkd.losses import KDLoss


def inspect_loss(loss: nn.Module, kd: KDLoss | None = None, num_classes: int = 10, seed: int = 0) -> dict[str, Any]:
    """Find out what a loss does, without training anything.

    The loss is asked about made-up logits (of students and teachers of every confidence) and, if it reads features,
    made-up features of four stages; nothing is read, written or changed.

    Args:
        loss: `loss(student, teacher, target, progress) -> dict of terms`: a learned loss or any other. One that reads
            features must take those of `lkd.inspection.probes.STAGES`; a learned loss does.
        kd: KD to compare with; by default of weight 0.5 and temperature 4.
        num_classes: Number of classes, at least 2.
        seed: Of what is made up.

    Returns:
        A tree that JSON can hold: `parts`, `parameters`, `kd` and `num_classes`; `field` (see `describe_field`) and
        `balance` (`imply_balance`), each None for a loss that only reads features; `own_balance` (`read_own_balance`);
        `shares` and `pairing` of features (`measure_shares`, `describe_pairing`); and `invariances`
        (`check_invariances`).
    """
    kd = kd or KDLoss()
    loss = copy.deepcopy(loss).eval().requires_grad_(False)
    precise = copy.deepcopy(loss).double()
    states = draw_states(num_classes, seed)
    view = LogitView(loss, seed)
    over_logits = bool(parts_at(view.loss, 0.0)) or not parts_at(loss, 0.0)
    balance = imply_balance(LogitView(precise, seed), states) if over_logits else None
    return {
        "parts": {
            name: {"form": type(part).__name__, "options": getattr(part, "architecture", {})}
            for name, part in (parts_at(loss, 0.0) or {"loss": loss}).items()
        },
        "parameters": sum(parameter.numel() for parameter in loss.parameters()),
        "num_classes": num_classes,
        "kd": {"weight": kd.weight, "temperature": kd.temperature},
        "field": describe_field(view, kd, num_classes) if over_logits else None,
        "balance": balance,
        "own_balance": [
            {"progress": row["progress"], **own}
            for row in (balance or {"over_progress": []})["over_progress"]
            if (own := read_own_balance(precise, states, row["progress"]))
        ],
        "shares": measure_shares(precise, states, seed),
        "pairing": describe_pairing(loss),
        "invariances": check_invariances(loss, num_classes, seed),
    }
