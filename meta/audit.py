"""A running check of `first_order` against the exact hypergradient."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from meta.checks import NotTwiceDifferentiableError, check_inputs
from meta.estimators.adjoint import adjoint
from meta.estimators.first_order import first_order
from meta.problem import Hypergradient, Problem
from meta.randomness import read_generators, replaying
from meta.tensors import cosine_similarity

RADII = (1e-3, 3e-3, 1e-2, 3e-2)
NOISE = 1e-6  # of every inner parameter, relative: some float32 roundings
TRUSTED = 0.9  # cosine between the hypergradients of two students so far apart


class Audit(NamedTuple):
    """How near `first_order` comes to the exact hypergradient.

    Attributes:
        cosine: Cosine between the two at the best radius.
        norm_ratio: Norm of the first-order hypergradient over that of the exact one, at the best radius.
        radius: The best radius.
        cosines: The cosine at every radius tried; 0 where the estimate vanishes or is not finite and the exact one is
            neither, NaN where the exact one says nothing.
    """

    cosine: float
    norm_ratio: float
    radius: float
    cosines: dict[float, float]


def audit(
    problem: Problem,
    *,
    radii: Sequence[float] = RADII,
    examples: int | None = None,
) -> Audit:
    """Compare `first_order` at several radii with `adjoint`; the random generators are left as they were.

    Costs one exact and `len(radii)` first-order hypergradients on the examples chosen.

    Args:
        problem: The problem.
        radii: The perturbation lengths to try.
        examples: Cut every tensor of the batches to this many leading entries; None takes whole batches.

    Raises:
        NotTwiceDifferentiableError: The inner loss allows no exact hypergradient.
        ValueError: The inputs make no bi-level problem.
    """
    check_inputs(problem)
    batches, last = tree_map(lambda leaf: _head(leaf, examples), (list(problem.inner_batches), problem.outer_batch))
    problem = replace(problem, inner_batches=batches, outer_batch=last)
    generators = read_generators(problem.state.parameters)
    with replaying(generators):
        exact = adjoint(problem)
    known = exact.fault is None and float(exact.norm) > 0
    cosines, ratios = {}, {}
    for radius in radii:
        with replaying(generators):
            estimate = first_order(problem, radius=radius)
        cosine = cosine_similarity(estimate.grads, exact.grads)
        cosines[radius] = 0.0 if known and not math.isfinite(cosine) else cosine
        ratios[radius] = (estimate.norm / exact.norm).item()
    best = max(cosines, key=lambda radius: cosines[radius])
    return Audit(cosines[best], ratios[best], best, cosines)


@dataclass
class Audited:
    """`first_order` that audits itself: an estimator with a memory.

    At the first call and at every `every`-th after it, `audit` chooses the radius. Where even the best radius stays
    under `threshold`, `adjoint` takes over until the next audit. An audit on a student that diverges says nothing: the
    next call is audited. A loss that cannot be differentiated twice cannot be audited: then `first_order` goes on with
    the middle radius, and the audit's cosine is NaN.

    Attributes:
        every: Calls between audits.
        threshold: Cosine that an audit has to reach.
        radii: The perturbation lengths to choose from.
        examples: Leading examples of every batch that an audit looks at; None takes whole batches.
        audits: Call number → audit, for logging.
        exact: Whether `adjoint` is in charge at present.
        radius: The radius in use.
    """

    every: int = 100
    threshold: float = 0.99
    radii: Sequence[float] = RADII
    examples: int | None = 16
    audits: dict[int, Audit] = field(default_factory=dict)
    exact: bool = False
    radius: float = field(init=False)
    _calls: int = 0
    _due: bool = False

    def __post_init__(self) -> None:
        self.radius = self._middle_radius()

    def __call__(self, problem: Problem) -> Hypergradient:
        self.follow(lambda: problem)
        if self.exact:
            return adjoint(problem)
        return first_order(problem, radius=self.radius)

    @property
    def latest(self) -> Audit | None:
        """The latest audit; None before the first."""
        return next(reversed(self.audits.values()), None)

    def follow(self, build_problem: Callable[[], Problem]) -> None:
        """Count a call, and audit if it is due, without estimating anything.

        Where several processes share the students of an outer step, each follows the calls that the others make, so
        that all of them keep the radius that a single process would have.

        Args:
            build_problem: Gives the problem of the call; called only if an audit is due.
        """
        if self._calls % self.every == 0 or self._due:
            try:
                found = audit(build_problem(), radii=self.radii, examples=self.examples)
                self._due = not math.isfinite(found.cosine)
                if not self._due:
                    self.radius, self.exact = found.radius, found.cosine < self.threshold
            except NotTwiceDifferentiableError:
                found = Audit(float("nan"), float("nan"), self._middle_radius(), {})
            self.audits[self._calls] = found
        self._calls += 1

    def state_dict(self) -> dict[str, Any]:
        """What the next call and the log depend on, for a checkpoint."""
        latest = {call: tuple(self.audits[call]) for call in list(self.audits)[-1:]}
        return {"calls": self._calls, "radius": self.radius, "exact": self.exact, "due": self._due, "latest": latest}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; audits before the latest are not kept."""
        self._calls, self.radius, self.exact = state["calls"], state["radius"], state["exact"]
        self._due = state["due"]
        self.audits = {call: Audit(*found) for call, found in state["latest"].items()}

    def _middle_radius(self) -> float:
        return sorted(self.radii)[(len(self.radii) - 1) // 2]


class Horizon(NamedTuple):
    """How far back a hypergradient can be trusted.

    Attributes:
        steps: The longest rollout tried up to which every cosine reached the threshold; 0 if none did.
        cosines: Rollout length → cosine between the hypergradients of two rollouts that started a rounding error apart.
    """

    steps: int
    cosines: dict[int, float]


def horizon(problem: Problem, *, lengths: Sequence[int] | None = None) -> Horizon:
    """Find up to which K the hypergradient of this problem means something.

    Where the rollout is chaotic, two students a rounding error apart have unrelated hypergradients, and the exact one
    of either is of no use. Costs two exact hypergradients for each length.

    Args:
        problem: The problem.
        lengths: Rollout lengths to try; None doubles from 1 up to the problem's.

    Raises:
        ValueError: A length is not one of the rollout's.
    """
    check_inputs(problem)
    longest = len(problem.inner_batches)
    doubled = {longest, *(2**power for power in range((longest - 1).bit_length()))}
    tried = sorted(doubled if lengths is None else lengths)
    if not tried or not 1 <= tried[0] <= tried[-1] <= longest:
        raise ValueError(f"lengths: {tried} are not between 1 and the rollout's {longest} steps")
    generator = torch.Generator().manual_seed(0)
    state = problem.state
    shifted = {
        name: tensor * (1 + NOISE * torch.randn(tensor.shape, generator=generator).to(tensor))
        for name, tensor in state.parameters.items()
    }
    generators = read_generators(state.parameters)
    cosines: dict[int, float] = {}
    for length in tried:
        found = []
        for start in (state, state._replace(parameters=shifted)):
            with replaying(generators):
                shorter = replace(problem, state=start, inner_batches=problem.inner_batches[:length])
                found.append(adjoint(shorter).grads)
        cosines[length] = cosine_similarity(*found)
    trusted = 0
    for length in tried:
        if not cosines[length] >= TRUSTED:
            break
        trusted = length
    return Horizon(trusted, cosines)


def _head(leaf: Any, examples: int | None) -> Any:
    return leaf[:examples] if isinstance(leaf, Tensor) and leaf.dim() else leaf
