"""A learned soft assignment of student stages to teacher stages, by relative depth."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lkd.losses.learned.perceptron import Perceptron

WIDTH = 0.2  # of the prior, in relative depth


class PairingNetwork(Perceptron):
    """From the relative depths of two stages to how much the student's learns from the teacher's.

    Starts at a Gaussian of the depths' difference. Depths, not names or numbers of stages, so that it holds for other
    networks.

    Args:
        hidden: Width of the hidden layers.
        lipschitz: As in `Perceptron`.
    """

    def __init__(self, hidden: int, lipschitz: float) -> None:
        super().__init__(3, hidden, 1, lipschitz)

    def assign(self, student_depths: Tensor, teacher_depths: Tensor) -> Tensor:
        """Shares, [S, T], each row of which sums to 1.

        Args:
            student_depths: In (0, 1], [S].
            teacher_depths: In (0, 1], [T].
        """
        student, teacher = torch.broadcast_tensors(student_depths.unsqueeze(1), teacher_depths.unsqueeze(0))
        apart = student - teacher
        scores = self(torch.stack([student, teacher, apart], 2)).squeeze(2)
        return (scores - (apart / WIDTH).square() / 2).softmax(1)


def relative_depths(names: list[str], chosen: list[str]) -> list[float]:
    """Depth in (0, 1] of the chosen stages: 1 is a network's last."""
    return [(names.index(name) + 1) / len(names) for name in chosen]


def name_needs(deepest: int, student: Iterable[str], teacher: Iterable[str]) -> str:
    """The stages that a loss over the `deepest` last ones needs, and which of them two networks have, in words."""
    last = [
        f"{role}: {', '.join(list(names)[-deepest:]) or 'none'}"
        for role, names in (("student", student), ("teacher", teacher))
    ]
    return f"the last {deepest} stages of both networks ({'; '.join(last)})"
