"""Ways to get the hypergradient, one file each, all with one signature."""

from typing import Any, Protocol

from meta.estimators.higher import higher
from meta.estimators.unrolled import unrolled
from meta.types import Hypergradient


class Estimator(Protocol):
    """The one signature; see `meta.estimators.unrolled` for the arguments."""

    def __call__(
        self,
        inner_loss: Any,
        outer_loss: Any,
        state: Any,
        hyper: Any,
        inner_batches: Any,
        outer_batch: Any,
        optimizer: Any,
    ) -> Hypergradient: ...


ESTIMATORS: dict[str, Estimator] = {"higher": higher, "unrolled": unrolled}
"""Every estimator by its name."""

__all__ = ["ESTIMATORS", "Estimator", "higher", "unrolled"]
