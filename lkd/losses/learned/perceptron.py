"""The small network inside every learned loss."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear


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
