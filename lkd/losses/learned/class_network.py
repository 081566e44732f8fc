"""A factor for every class of every sample, from one network shared by all classes; and what it multiplies."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lkd.losses.learned.inputs import (
    CLASS_INPUTS,
    LogProbabilities,
    Progress,
    class_inputs,
    name_sample_inputs,
    sample_inputs,
)
from lkd.losses.learned.perceptron import Perceptron

FLOOR = 1e-30  # of a probability whose logarithm is taken: q log q is nothing there, and 1 / q is still a float32


class ClassNetwork(Perceptron):
    """From what is seen of a class and of its sample to bounded numbers; 0 before any meta-training.

    Args:
        hidden: Width of the hidden layers.
        outputs: Numbers for each class.
        conditioning: What is seen of the sample besides the teacher.
        lipschitz: As in `Perceptron`.
    """

    def __init__(self, hidden: int, outputs: int, conditioning: Sequence[str], lipschitz: float) -> None:
        super().__init__(len(CLASS_INPUTS) + len(name_sample_inputs(conditioning)), hidden, outputs, lipschitz)
        self.conditioning = conditioning

    def values(self, logs: LogProbabilities, progress: Progress) -> Tensor:
        """In (−1, 1), [B, C, outputs]."""
        classes = class_inputs(logs)
        samples = sample_inputs(logs, progress, self.conditioning).unsqueeze(1).expand(-1, classes.shape[1], -1)
        return self(torch.cat([classes, samples], 2)).tanh()


def class_divergences(target: Tensor, student: Tensor) -> Tensor:
    """The part of each class in KL(q ‖ p): q log(q / p) − q + p, not negative, 0 with zero gradient at p = q.

    Args:
        target: q, [B, C]; may hold zeros.
        student: log p, [B, C].
    """
    return negative_entropies(target) - target * student - target + student.exp()


def negative_entropies(target: Tensor) -> Tensor:
    """The q log q of every class, 0 at q = 0; its first and second derivatives are finite in float32."""
    return -torch.special.entr(target.clamp_min(FLOOR))


def mix_target(logs: LogProbabilities, weight: Tensor, temperature: Tensor) -> Tensor:
    """(1 − α) · label + α · softmax(teacher / τ), [B, C]; α and τ are [B] or scalars."""
    weight, temperature = (x.unsqueeze(-1) for x in (weight, temperature))
    return (1 - weight) * logs.target + weight * (logs.teacher / temperature).softmax(1)


def log_of_factor(factor: float) -> float:
    """Its logarithm.

    Raises:
        ValueError: If it is not greater than 1.
    """
    if not factor > 1:
        raise ValueError(f"maximal_factor: {factor} is not greater than 1")
    return math.log(factor)
