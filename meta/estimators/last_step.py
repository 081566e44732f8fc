"""The hypergradient of the last inner step only: T1–T2 and DARTS."""

from functools import partial

from meta.estimators.adjoint import adjoint
from meta.estimators.first_order import first_order
from meta.estimators.truncated import truncated
from meta.problem import Hypergradient, Problem


def last_step(problem: Problem, *, differences: bool = False, radius: float = 3e-3) -> Hypergradient:
    """Differentiate only through the last inner step.

    T1–T2 (Luketina et al. 2016) takes its mixed product exactly; DARTS (Liu et al. 2019) takes it as a central
    difference, without a double backward. Biased: what earlier steps owe to the outer parameters is left out, so the
    norm is far too small and the direction right only roughly. Costs K gradient evaluations and two or three more;
    memory of one step.

    Args:
        problem: The problem.
        differences: DARTS instead of T1–T2.
        radius: Of DARTS, the length of the perturbation relative to the norm of the inner parameters.

    Raises:
        ValueError: The inputs make no bi-level problem; the message says why.
    """
    one_step = partial(first_order, radius=radius, central=True) if differences else adjoint
    return truncated(problem, steps=1, estimator=one_step)
