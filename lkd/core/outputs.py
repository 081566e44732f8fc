"""What every network of this project returns, and how it is asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import Tensor, nn


class Outputs(NamedTuple):
    """The outputs of a teacher or a student, computed in its forward pass (never by hooks: `higher` silences those).

    Attributes:
        logits: Class scores before softmax, [B, C].
        features: Stage name → feature map [B, c, h, w] or tokens [B, n, c], in order of depth.
    """

    logits: Tensor
    features: dict[str, Tensor]


def take_logits(answer: Any) -> Any:
    """The logits of what a network gives: its `logits`, or the first of several outputs (others are auxiliary)."""
    if isinstance(answer, dict) and "logits" in answer:
        return answer["logits"]
    answer = getattr(answer, "logits", answer)
    return answer[0] if isinstance(answer, tuple | list) and answer else answer


@contextmanager
def evaluating(network: Any) -> Iterator[None]:
    """Within, a network is in eval mode, if it is one; the mode of each of its modules is restored."""
    modes = [(module, module.training) for module in network.modules()] if isinstance(network, nn.Module) else []
    if modes:
        network.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
