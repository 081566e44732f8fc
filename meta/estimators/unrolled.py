"""The hypergradient by backpropagation through the whole rollout."""

import sys

from meta.estimators.adjoint import adjoint
from meta.problem import Hypergradient, Problem


def unrolled(problem: Problem) -> Hypergradient:
    """Differentiate the outer loss through every inner step with autograd.

    Exact, with buffers held constant (Maclaurin et al. 2015; Franceschi et al. 2017). Costs about three gradient
    evaluations a step and holds every step's activations at once: memory grows with K. Every operation of the inner
    loss needs a double backward.
    """
    return adjoint(problem, chunk=sys.maxsize)
