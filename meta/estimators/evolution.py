"""The hypergradient by persistent evolution strategies."""

import math
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from meta.checks import check_inputs
from meta.estimators.parts import collect
from meta.problem import Hypergradient, Problem
from meta.randomness import read_generators, replaying
from meta.rollout import rollout
from meta.tensors import State, Tensors, add


@dataclass
class Particles:
    """Pairs of inner trainings under opposite perturbations, which go on from window to window.

    Attributes:
        pairs: How many pairs.
        spread: Standard deviation of the perturbation of every outer parameter.
        seed: Seed of the perturbations.
    """

    pairs: int = 8
    spread: float = 0.1
    seed: int = 0
    _states: list[tuple[State, State]] = field(default_factory=list)
    _perturbations: list[Tensors] = field(default_factory=list)
    _windows: int = 0

    def __post_init__(self) -> None:
        if self.pairs < 1 or not 0 < self.spread < math.inf:
            raise ValueError(f"pairs: {self.pairs}, spread: {self.spread}: at least one pair, and a positive spread")

    def draw(self, state: State, hyper: Tensors) -> list[tuple[tuple[State, State], Tensors, Tensors]]:
        """Start a window: return each pair's states, its new perturbation, and the sum of its perturbations so far."""
        if not self._states:
            self._states = [(state, state) for _ in range(self.pairs)]
            self._perturbations = [{} for _ in range(self.pairs)]
        generator = torch.Generator().manual_seed(self.seed + self._windows)
        self._windows += 1
        new = [
            {
                name: self.spread * torch.randn(value.shape, generator=generator).to(value)
                for name, value in hyper.items()
            }
            for _ in range(self.pairs)
        ]
        self._perturbations = [add(old, drawn) for old, drawn in zip(self._perturbations, new, strict=True)]
        return list(zip(self._states, new, self._perturbations, strict=True))

    def carry(self, states: list[tuple[State, State]]) -> None:
        """End a window: keep the states that the pairs reached."""
        self._states = states


@torch.no_grad()
def evolution(problem: Problem, *, particles: Particles | None = None) -> Hypergradient:
    """Correlate random perturbations of the outer parameters with the outer loss that they lead to.

    Nothing is differentiated: the outer loss may be an error rate. Unbiased for the objective smoothed by the
    perturbations, with a variance that grows with the number of outer parameters: for tiny sets of them. With
    `particles` handed from window to window, the inner trainings go on and their perturbations add up, so that the
    hypergradient reaches back to the first window (Vicol et al. 2021, PES); without, it is an antithetic evolution
    strategy over one window. Costs 2 · `pairs` + 1 rollouts of K gradient evaluations; memory of one, and a state for
    each particle.

    Args:
        problem: The problem.
        particles: The population, updated in place; None starts a new one of 8 pairs. After its first window its own
            states are gone on from, and `problem.state` serves the unperturbed rollout only, whose outer value and end
            are returned.

    Raises:
        ValueError: The inputs make no bi-level problem. That the losses ignore an outer parameter cannot be seen.
    """
    check_inputs(problem)
    hyper = problem.hyper
    particles = Particles() if particles is None else particles
    generators = read_generators(problem.state.parameters)

    def run(start: State, values: Tensors) -> tuple[State, Tensor]:
        # Every particle draws the same random numbers: their differences come from the perturbations alone.
        with replaying(generators):
            end = rollout(replace(problem, state=start, hyper=values))
            value = problem.evaluate(end)
        if value.dim() != 0:
            raise ValueError(f"the outer loss must be a scalar, but has shape {tuple(value.shape)}")
        return end, value

    grads: Tensors = {}
    carried = []
    for (ahead, behind), perturbation, accumulated in particles.draw(problem.state.detach(), hyper):
        ahead, value_ahead = run(ahead, add(hyper, perturbation))
        behind, value_behind = run(behind, {name: value - perturbation[name] for name, value in hyper.items()})
        weight = (value_ahead - value_behind) / (2 * particles.spread**2 * particles.pairs)
        grads = add(grads, {name: weight * total for name, total in accumulated.items()})
        carried.append((ahead, behind))
    particles.carry(carried)
    end, value = run(problem.state, hyper)
    return collect(value, grads, hyper, end, unused=())
