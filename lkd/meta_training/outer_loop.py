"""The outer loop, a step at a time: draw students, roll them out, differentiate their outer loss, update the loss."""

import time
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lkd.config.meta_training import MetaTrainRecipe
from lkd.core.distributed import count_processes, gather_objects, share_out
from lkd.core.errors import refuse_exhaustion
from lkd.core.random import draw_positions, seeded_generator
from lkd.data.images import Batch
from lkd.losses.learned.loss import LearnedLoss
from lkd.meta_training.checks import AUDITED
from lkd.meta_training.guard import OuterGuard, check_points, check_rows
from lkd.meta_training.log import measure_balance, read_clock
from lkd.meta_training.online_student import OnlineStudent, Point, copy_state, draw_seed, window_end
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
from lkd.models.teacher import TeacherFunction
from lkd.pool.pool import Pool
from lkd.pool.sampling import build_age_weights, draw_position
from lkd.training.build import Images, StudentBuilder
from lkd.training.optimizer import restore_optimizer
from meta import (
    ESTIMATORS,
    Audited,
    Estimator,
    Hypergradient,
    OuterLoss,
    OuterStep,
    Problem,
    Tensors,
    outer_step,
)
from meta.optim import Averaged, Optimizer

LESS_MEMORY = "a smaller meta.rollout_steps, meta.outer_batch_size or train.batch_size"

# ----------------------------------------------------------------------------------------------------------------------
# The problems of an outer step: a student of the pool and its batches, from which an estimator differentiates.


class OuterProblems:
    """The problems of all outer steps; every draw is a function of the seed, the step and the student's number.

    Args:
        recipe: The recipe.
        images: The images.
        teacher: From a batch to the teacher's outputs.
        loss: The loss to learn.
        students: A network of each architecture.
        device: Where tensors go.
    """

    def __init__(
        self,
        recipe: MetaTrainRecipe,
        images: Images,
        teacher: TeacherFunction,
        loss: LearnedLoss,
        students: list[nn.Module],
        device: torch.device,
    ) -> None:
        self.recipe, self.settings, self.images, self.teacher = recipe, recipe.meta, images, teacher
        self.loss, self.students, self.device = loss, students, device
        self.objective = OBJECTIVES[self.settings.objective]
        self.age_weights = build_age_weights(recipe.pool)

    def count_draws(self, step: int, number: int) -> tuple[int, int]:
        """How many students were drawn before this one from the pool of its architecture, and which that is."""
        return divmod(step * self.settings.students_per_step + number, len(self.students))

    def build(self, step: int, number: int, pools: list[Pool], steps: int) -> Problem:
        """Draw a student and batches: what the estimator is given.

        Args:
            step: The outer step.
            number: Of the student.
            pools: One of each architecture.
            steps: Of the rollout.
        """
        settings, train = self.settings, self.recipe.train
        generator = seeded_generator(self.recipe.seed, 5, step, number)
        draw, architecture = self.count_draws(step, number)
        network, pool = self.students[architecture], pools[architecture]
        student = pool.read(draw_position(self.age_weights(pool.ages, draw), generator), self.device)
        state = student.state if self.recipe.pool.restore_momentum else student.state._replace(optimizer={})
        seed = int(torch.randint(2**62, (), generator=generator))
        torch.manual_seed(seed)  # of dropout
        batches = build_rollout_batches(
            self.images.train, train, steps, settings.rollout_epochs, seed, self.images.settings, self.device
        )
        stages = self.loss.teacher_stages
        inner_batches = list_inner_batches(batches, self.teacher, student.progress, steps, stages)
        optimizer: Optimizer = build_inner_optimizer(train, student.learning_rate, settings.annealing, steps)
        return Problem(
            partial(compute_inner_loss, network, self.loss),
            self.outer_loss(network),
            state,
            {name: parameter.detach() for name, parameter in self.loss.named_parameters()},
            inner_batches,
            self.draw_outer_batch(inner_batches, generator),
            Averaged(optimizer, settings.average) if settings.average else optimizer,
        )

    def draw_outer_batch(self, inner_batches: list[InnerBatch], generator: torch.Generator) -> Batch:
        """Images for the outer loss: of meta-validation, or those that the rollout was trained on."""
        size = self.settings.outer_batch_size
        if self.settings.batches == "different":
            part = self.images.meta_validation
            return part.batch(draw_positions(len(part), size, generator), self.device)
        columns = [torch.cat(column) for column in zip(*(batch for batch, _, _ in inner_batches), strict=True)]
        positions = draw_positions(len(columns[0]), size, generator).to(self.device)
        return Batch(*(column[positions] for column in columns))

    def outer_loss(self, student: nn.Module) -> OuterLoss:
        """The outer objective of a student as a function of its parameters."""

        def compute(parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
            return self.objective(compute_outer_logits(student, parameters, buffers, batch), batch.target)

        return compute


# ----------------------------------------------------------------------------------------------------------------------
# The outer loop, a step at a time: draw students, roll them out, differentiate their outer loss, update the loss.


class OuterLoop:
    """The outer loop.

    Every draw is a function of the seed, the step and the student's number, so nothing random need be saved. Processes
    that have met share the students of a step, each a block of numbers, and end it with the same loss.

    Args:
        recipe: The recipe.
        images: The images.
        students: What builds students of each architecture.
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
        students: list[StudentBuilder],
        teacher: TeacherFunction,
        loss: LearnedLoss,
        pools: list[Pool],
        device: torch.device,
    ) -> None:
        self.recipe, self.settings, self.images = recipe, recipe.meta, images
        self.teacher, self.loss, self.pools, self.device = teacher, loss.to(device), pools, device
        self.students = [student.build(recipe.seed, device).train() for student in students]
        self.optimizer = torch.optim.Adam(self.loss.parameters(), self.settings.learning_rate)
        self.estimator: Estimator = (
            Audited() if self.settings.estimator == AUDITED else ESTIMATORS[self.settings.estimator]
        )
        self.problems = OuterProblems(recipe, images, teacher, self.loss, self.students, device)
        self.guard = OuterGuard(self.settings.exploding_norm)
        self.numbers = share_out(self.settings.students_per_step, "meta.students_per_step")
        self.own: dict[int, OnlineStudent] = {}
        if self.settings.interleaving != "before":
            self.own = {
                n: OnlineStudent(recipe, students[n % len(students)], images, teacher, self.loss, n, device)
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
        differentiate = self.differentiate_online_student if self.alternates else self.differentiate_pool_student
        hypergradients = []
        for number in range(self.settings.students_per_step):
            if number in self.numbers:
                try:
                    hypergradients.append(differentiate(number))
                except (MemoryError, RuntimeError) as error:
                    refuse_exhaustion(error, f"outer step {self.step}", LESS_MEMORY)
                    raise
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
        hypergradient = self.estimator(problem)
        state, batch = problem.state, problem.inner_batches[0]
        network = self.students[self.problems.count_draws(self.step, number)[1]]
        self.balances.append(measure_balance(self.loss, network, state.parameters, state.buffers, batch))
        return hypergradient

    def build_problem(self, number: int) -> Problem:
        """Draw a student and batches: what the estimator is given."""
        return self.problems.build(self.step, number, self.pools, self.rollout_length())

    def rollout_length(self) -> int:
        """K of this step's rollouts: constant, or growing evenly over the steps that draw from the pool."""
        first, last = self.settings.initial_rollout_steps or self.settings.rollout_steps, self.settings.rollout_steps
        grown = first + round((last - first) * self.step / max(self.settings.alternation_start - 1, 1))
        return self.guard.shorten(grown)

    def differentiate_online_student(self, number: int) -> Hypergradient:
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
