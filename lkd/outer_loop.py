"""The outer loop, a step at a time: draw students, roll them out, differentiate their outer loss, update the loss."""

import time
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from lkd.assembly import Images, prepare_student
from lkd.config import MetaTrainRecipe
from lkd.data import seeded_generator
from lkd.interleaving import OwnStudent, Point, alternation_start, copy_state, draw_seed, window_end
from lkd.losses import LearnedLoss
from lkd.memory import FOR_ROLLOUTS, explain_exhaustion
from lkd.meta_checks import AUDITED
from lkd.meta_cost import read_clock
from lkd.meta_log import measure_balance
from lkd.meta_state import check_points, check_rows
from lkd.optimization import restore_optimizer
from lkd.outer_guard import OuterGuard
from lkd.outer_problems import OuterProblems
from lkd.pool import Pool
from lkd.pools import list_students
from lkd.processes import count_processes, gather_objects, share_out
from lkd.rollouts import compute_inner_loss, half_cosine
from lkd.training import TeacherFunction
from meta import ESTIMATORS, Audited, Estimator, Hypergradient, OuterStep, outer_step
from meta.estimators.base import Problem
from meta.types import Tensors


class OuterLoop:
    """The outer loop.

    Every draw is a function of the seed, the step and the student's number, so nothing random need be saved. Processes
    that have met share the students of a step, each a block of numbers, and end it with the same loss.

    Args:
        recipe: The recipe.
        images: The images.
        teacher: From a batch to the teacher's outputs.
        loss: The loss to learn.
        pools: Where students come from: one for each architecture; none if the loss only alternates.
        device: Where tensors go.

    Attributes:
        step: Outer steps taken.
        points: The weights of the loss: one point, or, once it alternates, one for each stretch of progress.
        own: By number, the students of this process in training while the loss alternates with them.
        balances: What `measure_balance` found for each student of the latest step, of all processes.
        guard: Which hypergradients are left out, and what follows.
        warnings: What the guard has to say of the latest step.
        seconds: What the steps took, by the wall's clock.
        work_seconds: The same by `read_clock`, of all processes.

    Raises:
        UserError: If the students of a step do not divide among the processes.
    """

    def __init__(
        self,
        recipe: MetaTrainRecipe,
        images: Images,
        teacher: TeacherFunction,
        loss: LearnedLoss,
        pools: list[Pool],
        device: torch.device,
    ) -> None:
        self.recipe, self.settings, self.images = recipe, recipe.meta, images
        self.teacher, self.loss, self.pools, self.device = teacher, loss.to(device), pools, device
        models = list_students(recipe)
        self.students = [prepare_student(model, images.train, recipe.seed, device).train() for model in models]
        self.optimizer = torch.optim.Adam(self.loss.parameters(), self.settings.learning_rate)
        self.estimator: Estimator = (
            Audited() if self.settings.estimator == AUDITED else ESTIMATORS[self.settings.estimator]
        )
        self.problems = OuterProblems(recipe, images, teacher, self.loss, self.students, device)
        self.guard = OuterGuard(self.settings.exploding_norm)
        self.numbers = share_out(self.settings.students_per_step, "meta.students_per_step")
        self.own: dict[int, OwnStudent] = {}
        if self.settings.interleaving != "before":
            self.own = {
                n: OwnStudent(recipe, models[n % len(models)], images, teacher, self.loss, n, device)
                for n in self.numbers
            }
        self.step = 0
        self.course: list[Point] = []
        self.history: list[dict[str, Any]] = []
        self.balances: list[dict[str, float]] = []
        self.warnings: list[str] = []
        self.seconds = self.work_seconds = 0.0

    @property
    def alternates(self) -> bool:
        """Whether the next step alternates with the training of the loop's own students."""
        return self.step >= alternation_start(self.settings)

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
        differentiate = self.differentiate_own_student if self.alternates else self.differentiate_pool_student
        hypergradients = []
        for number in range(self.settings.students_per_step):
            if number in self.numbers:
                with explain_exhaustion(f"outer step {self.step}", FOR_ROLLOUTS):
                    hypergradients.append(differentiate(number))
            elif isinstance(self.estimator, Audited) and not self.alternates:
                self.estimator.follow(partial(self.build_problem, number))
        parameters = dict(self.loss.named_parameters())
        clip_norm = self.settings.clip_norm or None
        result = outer_step(hypergradients, parameters, self.optimizer, clip_norm, self.guard.bound)
        self.step += 1
        if self.course and self.own_progress < 1:
            self.course.append((self.own_progress, copy_state(self.loss)))
        self.seconds += time.perf_counter() - started
        self.work_seconds += (read_clock(self.device) - work_started) * count_processes()
        own = self.balances, result.left_out, result.norms
        balances, left_out, norms = (list(chain(*parts)) for parts in zip(*gather_objects(own), strict=True))
        self.balances = balances
        self.warnings = self.guard.record(self.step, norms, left_out, 1 if self.course else self.rollout_length())
        return result._replace(left_out=tuple(left_out), norms=tuple(norms))

    @property
    def own_progress(self) -> float:
        """How far the loop's own students are in their training, all alike."""
        return self.own[self.numbers[0]].training.progress

    def differentiate_pool_student(self, number: int) -> Hypergradient:
        """Roll a student of the pool out, and differentiate its outer loss with respect to the loss's weights."""
        problem = self.build_problem(number)
        hypergradient = self.estimator(*problem)
        state, batch = problem[2], problem[4][0]
        network = self.students[self.problems.count_draws(self.step, number)[1]]
        self.balances.append(measure_balance(self.loss, network, state.parameters, state.buffers, batch))
        return hypergradient

    def build_problem(self, number: int) -> Problem:
        """Draw a student and batches: what the estimator is given."""
        return self.problems.build(self.step, number, self.pools, self.rollout_length())

    def rollout_length(self) -> int:
        """K of this step's rollouts: constant, or growing evenly over the steps that draw from the pool."""
        first, last = self.settings.initial_rollout_steps or self.settings.rollout_steps, self.settings.rollout_steps
        grown = first + round((last - first) * self.step / max(alternation_start(self.settings) - 1, 1))
        return self.guard.shorten(grown)

    def differentiate_own_student(self, number: int) -> Hypergradient:
        """Train a student of the loop's own up to the next update, and walk its last steps back."""
        own = self.own[number]
        training = own.training
        batches = own.advance(window_end(self.settings, self.step, training.total_steps))
        parameters: Tensors = dict(training.student.named_parameters())
        buffers = dict(training.student.named_buffers())
        self.balances.append(measure_balance(self.loss, training.student, parameters, buffers, batches[-1]))
        torch.manual_seed(draw_seed(self.recipe.seed, 8, self.step, number))
        generator = seeded_generator(self.recipe.seed, 5, self.step, number)
        return own.tape.hypergradient(
            partial(compute_inner_loss, training.student, self.loss),
            self.problems.outer_loss(training.student),
            self.problems.draw_outer_batch(batches, generator),
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
        self.history = check_rows(state["history"], ("step",))
        self.seconds, self.work_seconds = float(state["seconds"]), float(state["work_seconds"])
        self.guard.load_state_dict(state["guard"])
        self.loss.load_state_dict(state["loss"])
        restore_optimizer(self.optimizer, state["optimizer"])
        if isinstance(self.estimator, Audited):
            self.estimator.load_state_dict(state["estimator"])
        for number, own in self.own.items():
            own.training.load_state_dict(state["own"][number])
