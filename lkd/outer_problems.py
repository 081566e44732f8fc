"""The problems of an outer step: a student of the pool and its batches, from which an estimator differentiates."""

from functools import partial

import torch
from torch import Tensor, nn

from lkd.assembly import Images, read_teacher_stages
from lkd.config import MetaTrainRecipe
from lkd.data import Batch, draw_positions, seeded_generator
from lkd.losses import LearnedLoss
from lkd.outer_objectives import OBJECTIVES
from lkd.pool import Pool
from lkd.pool_sampling import build_age_weights, draw_position
from lkd.rollouts import (
    InnerBatch,
    build_inner_optimizer,
    build_rollout_batches,
    compute_inner_loss,
    compute_outer_logits,
    list_inner_batches,
)
from lkd.training import TeacherFunction
from meta import OuterLoss
from meta.estimators.base import Problem
from meta.optim import Averaged, Optimizer
from meta.types import Tensors


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
            self.images.train, train, steps, settings.rollout_epochs, seed, self.recipe.data, self.device
        )
        stages = read_teacher_stages(self.loss)
        inner_batches = list_inner_batches(batches, self.teacher, student.progress, steps, stages)
        optimizer: Optimizer = build_inner_optimizer(train, student.learning_rate, settings.annealing, steps)
        return (
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
