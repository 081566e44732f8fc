"""The outer loop, a step at a time: draw students, roll them out, differentiate their outer loss, update the loss."""

import math
import statistics
import time
from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lkd.config.meta_training import MetaSettings, PoolSettings
from lkd.core.distributed import count_processes, gather_objects, share_out
from lkd.core.errors import explained, explaining_exhaustion
from lkd.core.random import draw_positions, draw_seed, seeded_generator
from lkd.data.images import Batch
from lkd.losses.learned.loss import LearnedLoss
from lkd.losses.learned.trust import TrustFigures, measure_own_accuracy
from lkd.meta_training.log import check_rows, measure_balance, read_clock
from lkd.meta_training.online_student import OnlineStudent, Point, check_points, copy_state, share_parameters
from lkd.meta_training.rollouts import (
    OBJECTIVES,
    InnerBatch,
    build_inner_optimizer,
    build_rollout_batches,
    compute_inner_loss,
    compute_outer_logits,
    half_cosine,
    list_inner_batches,
)
from lkd.pool.pool import Pool, PoolStudent, World, split_state
from lkd.pool.sampling import build_age_weights
from lkd.training.build import Images
from lkd.training.optimizer import restore_optimizer
from meta import (
    ESTIMATORS,
    Audited,
    Estimator,
    Hypergradient,
    OuterLoss,
    OuterStep,
    Problem,
    State,
    Tensors,
    outer_step,
)
from meta.estimators import evolution
from meta.optim import Averaged

AUDITED = "audited"
LESS_MEMORY = "a smaller meta.rollout_steps, meta.outer_batch_size or train.batch_size"


class OuterLoop:
    """The outer loop.

    Every draw is a function of the seed, the step and the student's number, so nothing random need be saved. Processes
    that have met share the students of a step, each a block of numbers, and end it with the same loss.

    Args:
        worlds: Where rollouts happen, in turn; all have the first one's seed and device.
        pools: Where students come from: one for each world; none if the loss only alternates.
        loss: The loss to learn.
        settings: The outer loop's.
        draws: How students are drawn.

    Attributes:
        step: Outer steps taken.
        points: The weights of the loss: one point, or, once it alternates, one for each stretch of progress.
        own: By number, the online students of this process, while the loss alternates with their training.
        balances: What `measure_balance` found for each student of the latest step, of all processes.
        guard: Which hypergradients are left out, and what follows.
        warnings: What the guard has to say of the latest step.
        seconds: What the steps took, by the wall's clock.
        work_seconds: The same by `read_clock`, of all processes.
    """

    def __init__(
        self, worlds: list[World], pools: list[Pool], loss: LearnedLoss, settings: MetaSettings, draws: PoolSettings
    ) -> None:
        self.worlds, self.pools, self.settings, self.draws = worlds, pools, settings, draws
        self.seed, self.device = worlds[0].seed, worlds[0].device
        self.loss = loss.to(self.device)
        self.losses = [share_parameters(self.loss) for _ in worlds]  # each is told its own world's trust
        self.networks = [world.student.build(self.seed, self.device).train() for world in worlds]
        self.age_weights = build_age_weights(draws)
        self.estimator: Estimator = Audited() if settings.estimator == AUDITED else ESTIMATORS[settings.estimator]
        self.optimizer = torch.optim.Adam(self.loss.parameters(), settings.learning_rate)
        self.guard = OuterGuard(0 if settings.clip_each else settings.exploding_norm)
        self.students_per_step = settings.students_per_step or len(worlds)
        self.numbers = share_out(self.students_per_step, "meta.students_per_step")
        self.own: dict[int, OnlineStudent] = {}
        if settings.interleaving != "before":
            for n in self.numbers:
                self.own[n] = OnlineStudent(worlds[n % len(worlds)], self.loss, n, settings.rollout_steps)
        self.step = 0
        self.course: list[Point] = []
        self.history: list[dict[str, Any]] = []
        self.balances: list[dict[str, float]] = []
        self.warnings: list[str] = []
        self.seconds = self.work_seconds = 0.0

    @property
    def alternates(self) -> bool:
        """Whether the next step alternates with the training of online students."""
        return self.step >= self.settings.alternation_start

    @property
    def points(self) -> list[Point]:
        """The weights of the loss, and from which progress on they are in charge."""
        return self.course or [(0.0, copy_state(self.loss))]

    def run_step(self) -> OuterStep:
        """Average the hypergradients of several students and update the loss."""
        started, work_started = time.perf_counter(), read_clock(self.device)
        for group in self.optimizer.param_groups:
            rate = self.guard.rate * self.settings.learning_rate
            group["lr"] = rate * half_cosine(self.step / self.settings.outer_steps)
        self.balances.clear()
        if self.alternates:
            self.course = self.points
        hypergradients = self.differentiate_students()
        clip_norm = self.settings.clip_norm or None
        parameters = dict(self.loss.named_parameters())
        result = outer_step(hypergradients, parameters, self.optimizer, clip_norm, self.guard.bound)
        self.step += 1
        if self.course:
            progress = self.own[self.numbers[0]].training.progress  # all are equally far
            self.course += [(progress, copy_state(self.loss))] if progress < 1 else []
        self.seconds += time.perf_counter() - started
        self.work_seconds += (read_clock(self.device) - work_started) * count_processes()
        own = [f"{self.numbers[int(index)]}: {why}" for index, _, why in (x.partition(": ") for x in result.left_out)]
        gathered = gather_objects((self.balances, own, result.norms))
        self.balances, left_out, norms = (list(chain(*parts)) for parts in zip(*gathered, strict=True))
        self.warnings = self.guard.record(self.step, norms, left_out, 1 if self.course else self.rollout_length())
        return result._replace(left_out=tuple(left_out), norms=tuple(norms))

    def differentiate_students(self) -> list[Hypergradient]:
        """The hypergradient of each of this process's students."""
        differentiate = self.differentiate_online_student if self.alternates else self.differentiate_pool_student
        hypergradients = []
        for number in range(self.students_per_step):
            if number in self.numbers:
                step = f"outer step {self.step}"
                with explaining_exhaustion(step, LESS_MEMORY):
                    with explained(f"meta.estimator {self.settings.estimator}, {step}"):
                        found = differentiate(number)
                    largest = self.settings.clip_each
                    hypergradients.append(clip(found, largest) if largest else found)
            elif isinstance(self.estimator, Audited) and not self.alternates:
                self.estimator.follow(partial(self.build_problem, number))
        return hypergradients

    def differentiate_pool_student(self, number: int) -> Hypergradient:
        """Roll a student of the pool out, and differentiate its outer loss with respect to the loss's weights."""
        problem = self.build_problem(number)
        estimator = self.estimator
        if estimator is evolution:  # equal seeds would leave the loss in the span of a few directions
            estimator = partial(evolution, seed=draw_seed(self.seed, 12, self.step, number))
        hypergradient = estimator(problem)
        place = self.choose_world(number)[1]
        state, network, name = problem.state, self.networks[place], self.worlds[place].name
        batch = problem.inner_batches[0]
        row = measure_balance(self.losses[place], network, state.parameters, state.buffers, batch)
        if name:
            own = {key.removeprefix("loss/"): value for key, value in row.items() if key.startswith("loss/")}
            own |= {"outer_value": float(hypergradient.outer_value), "hypergradient_norm": float(hypergradient.norm)}
            row |= {f"world/{name}/{key}": value for key, value in own.items()}
        self.balances.append(row)
        return hypergradient

    def choose_world(self, number: int) -> tuple[int, int]:
        """How many students were drawn before this one in its world, and which world that is."""
        return divmod(self.step * self.students_per_step + number, len(self.worlds))

    def build_problem(self, number: int) -> Problem:
        """Draw a student, the batches of its rollout and that of its outer loss: what the estimator is given."""
        steps, (draw, place) = self.rollout_length(), self.choose_world(number)
        network, pool = self.networks[place], self.pools[place]
        generator = seeded_generator(self.seed, 5, self.step, number)
        position = torch.multinomial(self.age_weights(pool.ages, draw), 1, generator=generator)
        student = pool.read(int(position), network)
        state = student.state if self.draws.restore_momentum else student.state._replace(optimizer={})
        student = student._replace(state=state)
        return self.build_rollout(place, student, steps, int(torch.randint(2**62, (), generator=generator)), generator)

    def build_rollout(
        self, place: int, student: PoolStudent, steps: int, seed: int, generator: torch.Generator
    ) -> Problem:
        """The rollout of a student in a world."""
        settings, world, network = self.settings, self.worlds[place], self.networks[place]
        torch.manual_seed(seed)  # of dropout
        images, loss = world.images, self.losses[place]
        if loss.reads_trust:
            self.tell_trust(place, student, generator)
        batches = build_rollout_batches(
            images.train, world.train, steps, settings.rollout_epochs, seed, images.settings, self.device
        )
        stages = self.loss.teacher_stages
        inner_batches = list_inner_batches(batches, world.teacher, student.progress, steps, stages)
        rate, annealing = student.rate_in(world.train), settings.annealing
        optimizer = build_inner_optimizer(network, world.train, rate, annealing, steps)
        return Problem(
            partial(compute_inner_loss, network, loss),
            self.outer_loss(network),
            student.state,
            {name: parameter.detach() for name, parameter in self.loss.named_parameters()},
            inner_batches,
            self.draw_outer_batch(inner_batches, generator, images),
            Averaged(optimizer, settings.average) if settings.average else optimizer,
        )

    def try_estimator(self) -> None:
        """Ask for the hypergradient of one step in each world: what is in its way is said at once."""
        for place, network in enumerate(self.networks):
            parameters, buffers = split_state(network)
            student = PoolStudent(State({name: p.detach() for name, p in parameters.items()}, buffers, {}), 0.1, 0.0)
            with torch.random.fork_rng(devices=[]), explained(f"meta.estimator {self.settings.estimator}"):
                self.estimator(self.build_rollout(place, student, 1, 0, seeded_generator(self.seed, 5)))

    def rollout_length(self) -> int:
        """K of this step's rollouts: constant, or growing evenly over the steps that draw from the pool."""
        first, last = self.settings.initial_rollout_steps or self.settings.rollout_steps, self.settings.rollout_steps
        grown = first + round((last - first) * self.step / max(self.settings.alternation_start - 1, 1))
        return self.guard.shorten(grown)

    def tell_trust(self, place: int, student: PoolStudent, generator: torch.Generator) -> None:
        """Tell a world's loss what is known there and of this student, or, at times, nothing of one or of both."""
        world, network, loss = self.worlds[place], self.networks[place], self.losses[place]
        hidden = torch.rand(2, generator=generator) < self.settings.hide_trust
        figures = TrustFigures() if hidden[0] else world.trust.figures
        if world.trust.looks and not hidden[1]:
            student.restore(network)
            figures = figures._replace(own_accuracy=measure_own_accuracy(network, world.trust.looks))
        loss.tell(figures)

    def draw_outer_batch(
        self, inner_batches: list[InnerBatch], generator: torch.Generator, images: Images | None = None
    ) -> Batch:
        """Images for the outer loss: of meta-validation, or those that the rollout was trained on."""
        size = self.settings.outer_batch_size
        if self.settings.batches == "different":
            part = (images or self.worlds[0].images).meta_validation
            return part.batch(draw_positions(len(part), size, generator), self.device)
        columns = [torch.cat(column) for column in zip(*(batch for batch, _, _ in inner_batches), strict=True)]
        positions = draw_positions(len(columns[0]), size, generator).to(self.device)
        return Batch(*(column[positions] for column in columns))

    def outer_loss(self, student: nn.Module) -> OuterLoss:
        """The outer objective of a student as a function of its parameters."""
        objective = OBJECTIVES[self.settings.objective]

        def compute(parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
            return objective(compute_outer_logits(student, parameters, buffers, batch), batch.target)

        return compute

    def differentiate_online_student(self, number: int) -> Hypergradient:
        """Train an online student up to the next update, and walk its last steps back."""
        own, start = self.own[number], self.settings.alternation_start
        training, student = own.training, own.training.student
        updates, update = self.settings.outer_steps - start, self.step + 1 - start
        batches = own.advance(training.total_steps * update // updates)
        parameters, buffers = split_state(student)
        self.balances.append(measure_balance(own.loss, student, parameters, buffers, batches[-1]))
        torch.manual_seed(draw_seed(self.seed, 8, self.step, number))
        outer_batch = self.draw_outer_batch(batches, seeded_generator(self.seed, 5, self.step, number))
        return own.tape.hypergradient(
            partial(compute_inner_loss, student, own.loss), self.outer_loss(student), outer_batch
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-exactly, with any number of processes. All of them must ask."""
        own = {number: own.training.state_dict() for number, own in self.own.items()}
        gathered = gather_objects(tree_map_only(Tensor, Tensor.cpu, own))
        return {
            "step": self.step,
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "estimator": self.estimator.state_dict() if isinstance(self.estimator, Audited) else None,
            "own": {number: state for part in gathered for number, state in part.items()},
            "course": self.course,
            "guard": self.guard.state_dict(),
            "seconds": self.seconds,
            "work_seconds": self.work_seconds,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned.

        Raises:
            LookupError, TypeError, ValueError: If that is not what it is.
        """
        if state["step"] not in range(self.settings.outer_steps + 1):
            raise ValueError(f"outer step {state['step']} of {self.settings.outer_steps}")
        self.step = int(state["step"])
        self.course = check_points(state["course"], self.loss)
        self.history = check_rows(state["history"])
        self.seconds, self.work_seconds = float(state["seconds"]), float(state["work_seconds"])
        self.guard.load_state_dict(state["guard"])
        self.loss.load_state_dict(state["loss"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if isinstance(self.estimator, Audited):
            self.estimator.load_state_dict(state["estimator"])
        for number, own in self.own.items():
            own.training.load_state_dict(state["own"][number])


def clip(hypergradient: Hypergradient, largest: float) -> Hypergradient:
    """The hypergradient, scaled down to a norm; one that is not finite stays as it is, to be left out."""
    scale = (largest / hypergradient.norm).clamp(max=1.0)
    if not torch.isfinite(hypergradient.norm):
        return hypergradient
    grads = {name: scale.to(grad) * grad for name, grad in hypergradient.grads.items()}
    return hypergradient._replace(grads=grads, norm=scale * hypergradient.norm)


# ----------------------------------------------------------------------------------------------------------------------
# Which hypergradients are too large to count, and what follows when none has counted for long.

WINDOW = 50  # norms that the median is taken of
LEAST = 10  # with fewer known there is no bound
LOST_IN_A_ROW = 3  # outer steps
NAMED = 10  # reasons that are kept
LONGEST = 100  # letters of one


class OuterGuard:
    """Keeps exploding hypergradients out of the loss and of the outer optimiser's moments.

    A hypergradient that is not finite is left out always; one whose norm is more than `factor` times the median of the
    last 50 that counted and did not vanish (once 10 are known), too. After three outer steps in a row in which none
    counted rollouts are halved, or, once they are one step long, the outer learning rate; the norms known so far are
    then forgotten: they are those of longer rollouts.

    Args:
        factor: How many times the median a norm may be; 0 for any finite norm.

    Attributes:
        rate: What the outer learning rate is multiplied by.
        counted: Hypergradients that counted.
        vanished: Those of them that were 0.
        left_out: Those that did not.
        reasons: Why, of the first of them.
    """

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.norms: list[float] = []
        self.lost = self.halvings = self.counted = self.vanished = self.left_out = 0
        self.rate = 1.0
        self.reasons: list[str] = []

    @property
    def bound(self) -> float:
        """The largest norm that counts in the next step."""
        known = self.factor and len(self.norms) >= LEAST
        return self.factor * statistics.median(self.norms) if known else math.inf

    def shorten(self, steps: int) -> int:
        """The length of a rollout that would have so many steps."""
        return max(1, steps >> self.halvings)

    def record(self, step: int, norms: Sequence[float], left_out: Sequence[str], rollout_steps: int) -> list[str]:
        """Take note of an outer step.

        `norms`: of the hypergradients that counted, of all processes.
        `rollout_steps`: of its rollouts; 1 if they cannot be shortened.

        Returns:
            What to tell the user.
        """
        self.norms = [*self.norms, *(norm for norm in norms if norm)][-WINDOW:]  # a median of 0 would bar all others
        self.counted += len(norms)
        self.vanished += sum(norm == 0 for norm in norms)
        self.left_out += len(left_out)
        short = [reason if len(reason) <= LONGEST else f"{reason[:LONGEST]} ..." for reason in left_out]
        said = [f"outer step {step}: hypergradient left out: student {reason}" for reason in short]
        said = said[: NAMED - len(self.reasons)]
        self.reasons += said
        self.lost = 0 if norms else self.lost + 1
        if self.lost < LOST_IN_A_ROW:
            return said
        self.lost, self.norms = 0, []
        if rollout_steps > 1:
            self.halvings += 1
            change = f"rollouts are halved to {rollout_steps // 2} steps"
        else:
            self.rate /= 2
            change = f"the outer learning rate is halved to {self.rate:g} of what it was"
        none = f"no hypergradient counted in {LOST_IN_A_ROW} steps in a row"
        return [*said, f"warning: outer step {step}: {none}: {change}"]

    def report(self) -> list[str]:
        """What became of all hypergradients, if any was left out or all were 0."""
        if self.counted and self.counted == self.vanished:
            return ["warning: all hypergradients were 0: nothing was learned, no weight of the loss counts"]
        if not self.left_out:
            return []
        lines = [f"{self.left_out} of {self.left_out + self.counted} hypergradients were left out"]
        if self.halvings:
            lines[0] += f"; rollouts were halved {self.halvings} times"
        if self.rate < 1:
            lines[0] += f"; the outer learning rate ended at {self.rate:g} of what was asked for"
        if not self.counted:
            lines.append("warning: none counted: nothing was learned; lower train.learning_rate or meta.rollout_steps")
        return lines

    def summarize(self) -> dict[str, Any]:
        """For the learned loss's provenance."""
        counts = {"counted": self.counted, "vanished": self.vanished, "left_out": self.left_out}
        counts["rollouts_halved"] = self.halvings
        return {**counts, "outer_rate": self.rate, "reasons": self.reasons}

    def state_dict(self) -> dict[str, Any]:
        return vars(self).copy()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update({name: type(value)(state[name]) for name, value in vars(self).items()})
        self.norms, self.reasons = [float(norm) for norm in self.norms], [str(reason) for reason in self.reasons]
        if min(self.lost, self.halvings, self.counted, self.vanished, self.left_out) < 0 or not 0 <= self.rate <= 1:
            raise ValueError("counts are negative, or the outer rate is not in [0, 1]")
