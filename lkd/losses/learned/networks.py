"""The small networks that learned losses are made of."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from lkd.losses.learned.inputs import (
    CLASS_INPUTS,
    LogProbabilities,
    class_inputs,
    name_sample_inputs,
    sample_inputs,
    squash,
)
from lkd.losses.loss import Progress

# ----------------------------------------------------------------------------------------------------------------------
# The small network inside every learned loss.


class BoundedLinear(nn.Linear):
    """A linear layer whose map has a 2-norm below a bound, whatever its weight.

    The weight W acts as W / √(1 + ‖W‖²_F / bound²), whose Frobenius norm, and so its 2-norm, is less than the bound.
    It is smooth in W, at W = 0 too, so that hypergradients pass through it.

    Args:
        inputs: Input features.
        outputs: Output features.
        bound: Of the 2-norm.
    """

    def __init__(self, inputs: int, outputs: int, bound: float) -> None:
        super().__init__(inputs, outputs)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """Apply the bounded map."""
        return linear(x, effective_weight(self), self.bias)


def check_network_options(hidden: int, lipschitz: float) -> None:
    """Check the options that every loss network has.

    Raises:
        ValueError: If `hidden` is not positive or `lipschitz` is negative.
    """
    if hidden < 1:
        raise ValueError(f"hidden: {hidden} is not at least 1")
    if not lipschitz >= 0:
        raise ValueError(f"lipschitz: {lipschitz} is negative; 0 sets no bound")


def build_linear(inputs: int, outputs: int, bound: float) -> nn.Linear:
    """A linear layer whose 2-norm is below a bound; 0 sets none."""
    return BoundedLinear(inputs, outputs, bound) if bound else nn.Linear(inputs, outputs)


def effective_weight(layer: nn.Linear) -> Tensor:
    """The weight with which a layer acts."""
    if not isinstance(layer, BoundedLinear):
        return layer.weight
    return layer.weight * (1 + layer.weight.square().sum() / layer.bound**2).rsqrt()


class Perceptron(nn.Sequential):
    """Two hidden layers of tanh and a linear head that starts at zero.

    Args:
        inputs: Number of inputs, the last dimension of the tensor given.
        hidden: Width of the hidden layers.
        outputs: Number of outputs.
        lipschitz: Bound of the network's Lipschitz constant (2-norm to 2-norm); 0 sets none.

    Raises:
        ValueError: If `hidden` is not positive or `lipschitz` is negative.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, lipschitz: float = 0.0) -> None:
        check_network_options(hidden, lipschitz)
        bound = lipschitz ** (1 / 3)
        head = build_linear(hidden, outputs, bound)
        body = build_linear(inputs, hidden, bound), nn.Tanh(), build_linear(hidden, hidden, bound), nn.Tanh()
        super().__init__(*body, head)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        head = self[-1]
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network along the last dimension, in the dtype of its weights."""
        return super().forward(x.to(self.head.weight.dtype))


class BalanceNetwork(Perceptron):
    """From what is seen of a sample to a weight of the teacher and a temperature.

    Args:
        inputs: Number of inputs.
        hidden: Width of the hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        lipschitz: As in `Perceptron`.

    Raises:
        ValueError: If an initial value is out of range.
    """

    def __init__(
        self,
        inputs: int,
        hidden: int,
        initial_weight: float,
        initial_temperature: float,
        maximal_temperature: float,
        lipschitz: float = 0.0,
    ) -> None:
        bias = unbound_balance(initial_weight, initial_temperature, maximal_temperature)
        super().__init__(inputs, hidden, 2, lipschitz)
        self.maximal_temperature = maximal_temperature
        self.head.bias.data.copy_(bias)

    def balance(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """α in (0, 1) and τ in (1, `maximal_temperature`), of the shape of `x` without its last dimension."""
        return bound_balance(self(x), self.maximal_temperature)


def bound_balance(free: Tensor, maximal_temperature: float) -> tuple[Tensor, Tensor]:
    """α in (0, 1) and τ in (1, `maximal_temperature`) from two free numbers in the last dimension."""
    weight, share = free.sigmoid().unbind(-1)
    return weight, 1 + share * (maximal_temperature - 1)


def unbound_balance(weight: float, temperature: float, maximal_temperature: float) -> Tensor:
    """The inverse of `bound_balance`, [2].

    Raises:
        ValueError: If a value is out of range.
    """
    if not 0 < weight < 1:
        raise ValueError(f"initial_weight: {weight} is not in (0, 1)")
    if not 1 < temperature < maximal_temperature:
        raise ValueError(
            f"initial_temperature: {temperature} is not between 1 and maximal_temperature {maximal_temperature}"
        )
    return torch.logit(torch.tensor([weight, (temperature - 1) / (maximal_temperature - 1)]))


# ----------------------------------------------------------------------------------------------------------------------
# A factor for every class of every sample, from one network shared by all classes; and what it multiplies.

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


# ----------------------------------------------------------------------------------------------------------------------
# The network that weighs single differences between two networks' features.


class EntryNetwork(nn.Module):
    """From a difference, the teacher's value there and where that is to a number in (−1, 1); 0 before meta-training.

    One hidden layer of tanh. What is shared by many entries enters the hidden layer as one addend, so that the inputs
    are never written out for every entry.

    Args:
        places: Number of inputs that say which two stages and which comparison.
        samples: Number of inputs that are seen of a sample.
        hidden: Width of the hidden layer.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.
    """

    def __init__(self, places: int, samples: int, hidden: int, lipschitz: float) -> None:
        super().__init__()
        self.places = places
        self.hidden = build_linear(2 + places + samples, hidden, lipschitz ** (1 / 2))
        self.head = build_linear(hidden, 1, lipschitz ** (1 / 2))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, difference: Tensor, theirs: Tensor, places: Tensor, samples: Tensor) -> Tensor:
        """Weigh every entry.

        Args:
            difference: Student's less teacher's entries, [S, T, B, E].
            theirs: The teacher's entries, [T, B, E].
            places: [S, T, places].
            samples: [B, samples].

        Returns:
            [S, T, B, E].
        """
        weight = effective_weight(self.hidden)
        differences, values, of_places, of_samples = weight.split([1, 1, self.places, len(samples.T)], 1)
        shared = (places.to(weight) @ of_places.T + self.hidden.bias)[:, :, None] + samples.to(weight) @ of_samples.T
        own = squash(theirs.to(weight)).unsqueeze(3) * values[:, 0]
        base = shared[:, :, :, None] + own
        seen = torch.addcmul(base, squash(difference.to(weight)).unsqueeze(4), differences[:, 0])
        return self.head(seen.tanh()).squeeze(4).tanh()


# ----------------------------------------------------------------------------------------------------------------------
# A learned soft assignment of student stages to teacher stages, by relative depth.

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
