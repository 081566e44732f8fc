"""The hypergradient by an evolution strategy."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from meta.checks import check_inputs
from meta.estimators.parts import collect
from meta.problem import Hypergradient, Problem
from meta.randomness import read_generators, replaying
from meta.rollout import rollout
from meta.tensors import State, Tensors, add


@torch.no_grad()
def evolution(problem: Problem, *, pairs: int = 8, spread: float = 0.1, seed: int = 0) -> Hypergradient:
    """Correlate random perturbations of the outer parameters with the outer loss that they lead to.

    Nothing is differentiated: the outer loss may be an error rate. Unbiased for the objective smoothed by the
    perturbations, with a variance that grows with the number of outer parameters: for tiny sets of them. That the
    losses ignore an outer parameter cannot be seen. Costs 2 · `pairs` + 1 rollouts of K gradient evaluations; memory of
    one.

    Args:
        problem: The problem.
        pairs: Of rollouts under opposite perturbations.
        spread: Standard deviation of the perturbation of every outer parameter.
        seed: Of the perturbations: equal seeds try equal directions, so an outer loop gives each call its own.
    """
    check_inputs(problem)
    if pairs < 1 or not 0 < spread < math.inf:
        raise ValueError(f"pairs: {pairs}, spread: {spread}: at least one pair, and a positive spread")
    hyper, generators = problem.hyper, read_generators(problem.state.parameters)
    draws = torch.Generator().manual_seed(seed)

    def run(values: Tensors) -> tuple[State, Tensor]:
        end = rollout(replace(problem, hyper=values))
        value = problem.evaluate(end)
        if value.dim() != 0:
            raise ValueError(f"the outer loss must be a scalar, but has shape {tuple(value.shape)}")
        return end, value

    grads: Tensors = {}
    for _ in range(pairs):
        drawn = {name: spread * torch.randn(value.shape, generator=draws).to(value) for name, value in hyper.items()}
        # All rollouts draw the same random numbers: their differences come from the perturbations alone.
        with replaying(generators):
            _, ahead = run(add(hyper, drawn))
        with replaying(generators):
            _, behind = run({name: value - drawn[name] for name, value in hyper.items()})
        weight = (ahead - behind) / (2 * spread**2 * pairs)
        grads = add(grads, {name: weight * perturbation for name, perturbation in drawn.items()})
    end, value = run(hyper)
    return collect(value, grads, hyper, end, unused=())
