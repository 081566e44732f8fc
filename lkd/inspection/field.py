"""The gradient field of a loss over the confidence of teacher and student, beside those of KD and cross-entropy."""

from typing import Any

from torch import Tensor, nn

from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.surfaces import confidence_grid, gradient_surface

PROGRESS = (0.0, 0.5, 1.0)
POINTS = 33
DIGITS = 5  # after the point


def describe_field(loss: nn.Module, kd: KDLoss, num_classes: int) -> dict[str, Any]:
    """The gradient at the student's logit of the label; what is left of each probability is shared evenly.

    Args:
        loss: A loss over logits.
        kd: KD to compare with.
        num_classes: Number of classes.

    Returns:
        `confidence`: the grid. `loss`, at three progresses, `kd` and `cross_entropy`: each with its `gradient` (rows
        are the teacher's confidence, columns the student's) and its `rest`: for each of the teacher's confidences the
        student's probability at which the gradient is zero, where the loss would leave it.
    """
    surfaces = [gradient_surface(loss, progress, num_classes, POINTS) for progress in PROGRESS]
    references = {"kd": kd, "cross_entropy": CrossEntropyLoss()}
    return {
        "confidence": confidence_grid(POINTS).tolist(),
        "loss": [{"progress": p, **describe_surface(s)} for p, s in zip(PROGRESS, surfaces, strict=True)],
        **{
            name: describe_surface(gradient_surface(reference, 0.0, num_classes, POINTS))
            for name, reference in references.items()
        },
    }


def describe_surface(surface: Tensor) -> dict[str, Any]:
    """A gradient, [teacher, student], and where its rows rest."""
    return {
        "gradient": [[round(x, DIGITS) for x in row] for row in surface.tolist()],
        "rest": [find_rest(row) for row in surface],
    }


def find_rest(row: Tensor) -> float:
    """The student's probability at which the gradient changes from negative to positive; the last, if there are many.

    0 where it is positive throughout, 1 where it is negative throughout.
    """
    grid = confidence_grid(len(row)).tolist()
    rising = ((row[:-1] < 0) & (row[1:] >= 0)).nonzero().flatten().tolist()
    if not rising:
        return 1.0 if float(row[-1]) < 0 else 0.0
    low, high = row[rising[-1]].item(), row[rising[-1] + 1].item()
    start, end = grid[rising[-1]], grid[rising[-1] + 1]
    return start + (end - start) * -low / (high - low)
