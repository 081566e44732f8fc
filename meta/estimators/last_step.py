"""The hypergradient of the last inner step only: T1–T2."""

from meta.estimators.adjoint import adjoint
from meta.estimators.truncated import truncated
from meta.problem import Hypergradient, Problem


def last_step(problem: Problem) -> Hypergradient:
    """Differentiate only through the last inner step (Luketina et al. 2016).

    Biased: what earlier steps owe to the outer parameters is left out, so the norm is far too small and the direction
    right only roughly. Costs K gradient evaluations and two or three more; memory of one step.
    """
    return truncated(problem, steps=1, estimator=adjoint)
