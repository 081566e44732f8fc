"""Ways to get the hypergradient, one file each, all with one signature."""

from meta.estimators.adjoint import adjoint
from meta.estimators.evolution import evolution
from meta.estimators.first_order import first_order
from meta.estimators.higher import higher
from meta.estimators.implicit import implicit
from meta.estimators.truncated import last_step, truncated
from meta.estimators.unrolled import unrolled
from meta.problem import Estimator

ESTIMATORS: dict[str, Estimator] = {
    "higher": higher,
    "unrolled": unrolled,
    "adjoint": adjoint,
    "first_order": first_order,
    "truncated": truncated,
    "last_step": last_step,
    "implicit": implicit,
    "evolution": evolution,
}
"""Every estimator by its name."""
