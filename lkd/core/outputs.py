"""What every network of this project returns."""

from typing import NamedTuple

from torch import Tensor


class Outputs(NamedTuple):
    """The outputs of a teacher or a student, computed in its forward pass (never by hooks: `higher` silences those).

    Attributes:
        logits: Class scores before softmax, [B, C].
        features: Stage name → feature map [B, c, h, w] or tokens [B, n, c], in order of depth.
    """

    logits: Tensor
    features: dict[str, Tensor]
