"""Which stages of a student learn from which of a teacher, and how much each part of a loss pulls."""

from typing import Any

import torch
from torch import nn

from lkd.inspection.probes import STAGES, States, add_features, parts_at
from lkd.losses.learned import FeatureLoss, gradient_shares
from lkd.losses.learned.features import COMPARISONS
from lkd.losses.learned.pairing import relative_depths

PROGRESS = (0.0, 0.5, 1.0)
SPARSE = 5  # every so many states: features of all of them take long; no divisor of the number of confidences


def describe_pairing(loss: nn.Module) -> dict[str, Any] | None:
    """How a loss pairs stages; None if it reads no features.

    Returns:
        Of a learned loss, at three progresses: `student` and `teacher`, the stages' names and relative depths;
        `assignment`, [student stage, teacher stage], rows of sum 1; `weights`, each comparison's weight at each of the
        student's stages. They are those of networks of as many stages as `STAGES`. Of a hand-made loss: `pairs` of
        stages, each of the same weight, where it pairs any, and the teacher's stages that it reads.
    """
    if any(isinstance(part, FeatureLoss) for part in parts_at(loss, 0.0).values()):
        return {"learned": [describe_learned(loss, progress) for progress in PROGRESS]}
    stages = getattr(loss, "teacher_stages", ())
    return {"pairs": getattr(loss, "pairs", None), "teacher_stages": list(stages)} if stages else None


@torch.no_grad()
def describe_learned(loss: nn.Module, progress: float) -> dict[str, Any]:
    """The pairing of the network over features that is in charge at this progress."""
    (part,) = (part for part in parts_at(loss, progress).values() if isinstance(part, FeatureLoss))
    names = list(STAGES)
    chosen = names[-part.deepest :]
    depths = torch.tensor(relative_depths(names, chosen))
    weights = part.weigh_stages(depths, torch.tensor(progress))
    return {
        "progress": progress,
        "student": dict(zip(chosen, depths.tolist(), strict=True)),
        "teacher": dict(zip(chosen, depths.tolist(), strict=True)),
        "assignment": part.pairing.assign(depths, depths).tolist(),
        "weights": {name: weights[:, kind].tolist() for kind, name in enumerate(COMPARISONS)},
    }


def measure_shares(loss: nn.Module, states: States, seed: int) -> list[dict[str, Any]]:
    """Each term's share of the gradient at three progresses, with made-up features; see `gradient_shares`."""
    student, teacher, target = (x[::SPARSE] for x in (states.student, states.teacher, states.target))
    outputs = add_features(student, teacher, seed)
    return [
        {"progress": progress, "shares": gradient_shares(loss, *outputs, target, progress)} for progress in PROGRESS
    ]
