"""Learn a loss: draw students from the pool, roll them out with it, differentiate meta-validation, update it.

*Our reconstruction* of LKD's outer loop (Ran, Huang, Yang, PLOS ONE 2025; neither text nor code is public). Measured
choices of ours: the learning rate is annealed to zero within each rollout, and the loss sees progress run from the
student's age to 1 meanwhile, so that K steps stand for a whole training; students are young; the outer loss is
cross-entropy at the best temperature.
"""

import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lkd.artifact import SUFFIX, save_loss
from lkd.assembly import (
    Images,
    architecture_of,
    introduce_network,
    introduce_teacher,
    prepare_images,
    prepare_loss,
    prepare_student,
    prepare_teacher,
    read_teacher_stages,
)
from lkd.calibration import OBJECTIVES
from lkd.checkpoint import load_checkpoint, save_checkpoint
from lkd.config import MetaTrainRecipe
from lkd.data import Batch, Batches, draw_positions, seeded_generator
from lkd.errors import UserError, check_choice
from lkd.interrupt import Interrupted, deferred_interrupts
from lkd.losses import LearnedLoss, LogitLoss
from lkd.pool import Pool, build_pool, check_pool, open_pool
from lkd.rollouts import (
    InnerBatch,
    build_inner_optimizer,
    compute_inner_loss,
    compute_outer_logits,
    half_cosine,
    list_inner_batches,
)
from lkd.run import Run
from lkd.training import TeacherFunction
from meta import ESTIMATORS, Audited, Estimator, Hypergradient, OuterStep, call_module, outer_step
from meta.types import Tensors

AUDITED = "audited"


def meta_train(recipe: MetaTrainRecipe, run: Run) -> Path:
    """Learn a loss and save it.

    Returns:
        The learned-loss file.

    Raises:
        UserError: If the recipe, the data, the teacher or the pool is not good.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    check_settings(recipe)
    images = prepare_images(recipe.data)
    architecture = architecture_of(recipe.student, images.train)
    pool = open_pool(Path(recipe.pool_dir), images, architecture) if recipe.pool_dir else None
    pool_loss = prepare_loss(recipe.pool.loss, recipe.student, recipe.teacher, images, recipe.seed)
    run.say(introduce_network("student", recipe.student, images, run.device))
    run.say(introduce_teacher(recipe.teacher, images, run.device))
    teacher = prepare_teacher(recipe.teacher, recipe.data, images, run.device, read_teacher_stages(pool_loss))
    pool = pool or build_pool(recipe, run.path / "pool", images, teacher, run)
    training = MetaTraining(recipe, images, teacher, pool, run.device)
    run.say(f"learned loss: {sum(p.numel() for p in training.loss.parameters()):,} parameters")
    checkpoint = run.path / "checkpoint.safetensors"
    if checkpoint.exists():
        training.load_state_dict(load_checkpoint(checkpoint))
    started = time.perf_counter()
    bar = tqdm(
        total=recipe.meta.outer_steps, initial=training.step, desc="meta-train", unit="step", disable=run.hide_bars
    )
    with deferred_interrupts() as stop, bar:
        while training.step < recipe.meta.outer_steps:
            result = training.run_step()
            row = log_row(result, training)
            training.history.append({"step": training.step, **row})
            run.tracker.log(training.step, **row)
            bar.update()
            bar.set_postfix(outer=f"{result.value:.4f}", norm=f"{result.norm:.2e}", balance=f"{row['loss/weight']:.2f}")
            if stop or training.step % recipe.meta.checkpoint_every == 0:
                save_checkpoint(checkpoint, training.state_dict())
            if stop:
                raise Interrupted(f"stopped at outer step {training.step} of {recipe.meta.outer_steps}")
    save_checkpoint(checkpoint, training.state_dict())
    path = run.path / f"loss{SUFFIX}"
    provenance = run.provenance() | {
        "split": images.fingerprint,
        "curve": training.history,
        "seconds": round(time.perf_counter() - started, 1),
    }
    save_loss(path, training.loss, provenance)
    run.say(f"{path}: reuse it with lkd.load_loss({str(path)!r})")
    return path


def check_settings(recipe: MetaTrainRecipe) -> None:
    """Check the outer loop's settings.

    Raises:
        UserError: If one is impossible.
    """
    check_pool(recipe.pool)
    check_choice("meta.estimator", recipe.meta.estimator, [*ESTIMATORS, AUDITED])
    check_choice("meta.objective", recipe.meta.objective, OBJECTIVES)
    for name in ("outer_steps", "students_per_step", "rollout_steps", "outer_batch_size", "checkpoint_every"):
        if getattr(recipe.meta, name) < 1:
            raise UserError(f"meta.{name}: {getattr(recipe.meta, name)} is not at least 1")
    if recipe.meta.clip_norm < 0:
        raise UserError(f"meta.clip_norm: {recipe.meta.clip_norm} is negative; 0 turns clipping off")


def log_row(result: OuterStep, training: "MetaTraining") -> dict[str, float]:
    """What is logged of one outer step."""
    weight, temperature = (sum(values) / len(values) for values in zip(*training.balances, strict=True))
    row = {
        "outer/value": result.value,
        "outer/hypergradient_norm": result.norm,
        "outer/clipped": float(result.clipped),
        "outer/left_out": float(len(result.left_out)),
        "loss/weight": weight,
        "loss/temperature": temperature,
    }
    if isinstance(training.estimator, Audited) and training.estimator.audits:
        latest = list(training.estimator.audits.values())[-1]
        row |= {"outer/audit_cosine": latest.cosine, "outer/audit_norm_ratio": latest.norm_ratio}
    return row


class MetaTraining:
    """The outer loop, a step at a time.

    Every draw is a function of the seed and the step, so nothing else need be saved.

    Args:
        recipe: The recipe.
        images: The images.
        teacher: From a batch to the teacher's outputs.
        pool: Where students come from.
        device: Where tensors go.
    """

    def __init__(
        self, recipe: MetaTrainRecipe, images: Images, teacher: TeacherFunction, pool: Pool, device: torch.device
    ) -> None:
        self.recipe = recipe
        self.settings = recipe.meta
        self.images = images
        self.teacher = teacher
        self.pool = pool
        self.device = device
        self.student = prepare_student(recipe.student, images.train, recipe.seed, device).train()
        torch.manual_seed(recipe.seed)
        part = LogitLoss(self.settings.hidden, self.settings.initial_weight, self.settings.initial_temperature)
        self.loss = LearnedLoss({"logits": part}).to(device)
        self.optimizer = torch.optim.Adam(self.loss.parameters(), self.settings.learning_rate)
        self.objective = OBJECTIVES[self.settings.objective]
        self.estimator: Estimator = (
            Audited() if self.settings.estimator == AUDITED else ESTIMATORS[self.settings.estimator]
        )
        self.step = 0
        self.history: list[dict[str, Any]] = []
        self.balances: list[tuple[float, float]] = []

    def run_step(self) -> OuterStep:
        """Average the hypergradients of several students and update the loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.learning_rate * half_cosine(self.step / self.settings.outer_steps)
        self.balances.clear()
        hypergradients = [self.differentiate_student(number) for number in range(self.settings.students_per_step)]
        parameters = dict(self.loss.named_parameters())
        result = outer_step(hypergradients, parameters, self.optimizer, self.settings.clip_norm or None)
        self.step += 1
        return result

    def differentiate_student(self, number: int) -> Hypergradient:
        """Draw a student and batches, roll out, and differentiate the outer loss with respect to the loss's weights."""
        settings, train = self.settings, self.recipe.train
        generator = seeded_generator(self.recipe.seed, 5, self.step, number)
        student = self.pool.draw(generator, self.device)
        seed = int(torch.randint(2**62, (), generator=generator))
        batches = Batches(self.images.train, train.batch_size, seed, self.recipe.data.augmentation, self.device)
        inner_batches = list_inner_batches(batches, self.teacher, student.progress, settings.rollout_steps)
        self.record_balance(student.state.parameters, student.state.buffers, inner_batches[0])
        validation = self.images.meta_validation
        size = min(settings.outer_batch_size, len(validation))
        outer_batch = validation.batch(draw_positions(len(validation), size, generator), self.device)
        optimizer = build_inner_optimizer(train, student.learning_rate, settings.annealing, settings.rollout_steps)
        return self.estimator(
            self.inner_loss,
            self.outer_loss,
            student.state,
            {name: parameter.detach() for name, parameter in self.loss.named_parameters()},
            inner_batches,
            outer_batch,
            optimizer,
        )

    def inner_loss(
        self, parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: InnerBatch
    ) -> tuple[Tensor, Tensors]:
        """The learned loss of one student step."""
        return compute_inner_loss(self.student, self.loss, parameters, buffers, hyper, batch)

    def outer_loss(self, parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
        """The student's meta-validation loss."""
        return self.objective(compute_outer_logits(self.student, parameters, buffers, batch), batch.target)

    @torch.no_grad()
    def record_balance(self, parameters: Tensors, buffers: Tensors, batch: InnerBatch) -> None:
        """Remember the loss's mean weight and temperature on a rollout's first batch, to be logged."""
        images, teacher, progress = batch
        outputs, _ = call_module(self.student, parameters, buffers, images.images)
        part: Any = self.loss.parts["logits"]
        weight, temperature = part.weights_and_temperatures(outputs.logits, teacher.logits, images.target, progress)
        self.balances.append((float(weight.mean()), float(temperature.mean())))

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to go on bit-exactly."""
        return {
            "step": self.step,
            "loss": self.loss.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "estimator": self.estimator.state_dict() if isinstance(self.estimator, Audited) else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned."""
        self.step = state["step"]
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.history = state["history"]
        if isinstance(self.estimator, Audited):
            self.estimator.load_state_dict(state["estimator"])
