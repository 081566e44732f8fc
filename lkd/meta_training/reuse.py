"""Judge a loss by its use: fresh students trained with it frozen, scored on meta-validation."""

import copy
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lkd.config.meta_training import MetaSettings
from lkd.config.parts import TrainRecipe
from lkd.core.distributed import (
    any_process,
    count_processes,
    gather_objects,
    is_main,
    own_rank,
    share_from_main,
    wait_for_slowest,
)
from lkd.core.errors import UserError
from lkd.core.interrupt import Interrupted, StopRequest
from lkd.core.random import draw_seed
from lkd.losses.learned.loss import LearnedLoss
from lkd.losses.loss import DistillationLoss
from lkd.meta_training.log import SCORE, average_rows, check_rows
from lkd.meta_training.online_student import Point, assemble_loss, check_points
from lkd.pool.pool import World
from lkd.tracking.run import Run
from lkd.training.build import LossBuilder
from lkd.training.checkpoints import Checkpoints, run_steps
from lkd.training.evaluate import evaluate
from lkd.training.training import DivergedError

FIGURES = (SCORE, "top1")
LOOK = "look"  # the folder of a look's checkpoints


class Reuse:
    """Looks at how good the loss is when it is reused, and the best loss so far.

    Each look trains `meta.reuse_students` fresh students in each world, the same in all looks, so that losses are
    compared in pairs. The score is the mean cross-entropy at the best temperature; the first of the best wins.
    Processes that have met share each training; of several worlds each does its own.

    Args:
        worlds: What students are trained in.
        settings: How often, how many, how long.
        run: The run; a look that was stopped goes on from the checkpoints in its folder `look`.
        references: Of each world, what builds the loss that looks are compared with; none for no comparison.
    """

    def __init__(
        self, worlds: list[World], settings: MetaSettings, run: Run, references: Sequence[LossBuilder | None] = ()
    ) -> None:
        self.settings, self.run = settings, run
        lengths = [settings.reuse_epochs or world.train.epochs for world in worlds]
        self.worlds = [replace(w, train=shorten(w.train, epochs)) for w, epochs in zip(worlds, lengths, strict=True)]
        shares = [epochs / world.train.epochs for world, epochs in zip(worlds, lengths, strict=True)]
        self.cost = settings.reuse_students * sum(shares)
        self.references = [builder.build for builder in references if builder]
        self.reference: list[float] = []
        self.rows: list[dict[str, float]] = []
        self.best: list[Point] = []

    @property
    def best_row(self) -> dict[str, float]:
        return min(self.rows, key=lambda row: row[SCORE])

    @property
    def trainings(self) -> float:
        """The cost of all looks, in units of one whole training."""
        return (len(self.rows) + bool(self.reference)) * self.cost

    def is_due(self, step: int) -> bool:
        """Whether to look at the loss before this outer step: the initial one, every so often, and the last one."""
        every, last = self.settings.reuse_every, self.settings.outer_steps
        seen = bool(self.rows) and self.rows[-1]["step"] == step
        return every > 0 and (step % every == 0 or step == last) and not seen

    def is_exhausted(self) -> bool:
        """Whether so many looks in a row found no better loss that meta-training ends."""
        if not self.settings.reuse_patience or not self.rows:
            return False
        return sum(row["step"] > self.best_row["step"] for row in self.rows) >= self.settings.reuse_patience

    def look(self, step: int, networks: LearnedLoss, points: Sequence[Point], stop: StopRequest) -> dict[str, float]:
        """Train fresh students with the loss of these points and score them.

        Raises:
            Interrupted: If `stop` was asked for; the look goes on later.
            UserError: If the loss that looks are compared with makes students diverge.
        """
        if self.references and not self.reference:
            builders = zip(self.references, self.worlds, strict=True)
            losses = [build(world.student, world.seed) for build, world in builders]
            scores = [row[SCORE] for row in self.train_students(losses, "reference", stop)]
            for world, score in zip(self.worlds, scores, strict=True):
                if not math.isfinite(score):
                    raise UserError(
                        f"{world.name and f'world {world.name}: '}meta.reference: its students diverged, calibrated "
                        f"cross-entropy {score}: lower train.learning_rate, or compare with another loss"
                    )
            self.reference = scores
        assembled = assemble_loss(networks, points)
        figures = self.train_students([assembled] * len(self.worlds), f"step-{step:06d}", stop)
        mean = average_rows(figures)
        if math.isnan(mean[SCORE]):  # a student that was finite until its last step
            mean[SCORE] = math.inf
        if self.reference:
            mean["regret"] = mean[SCORE] - sum(self.reference) / len(self.reference)
        for place, world in enumerate(self.worlds if self.worlds[0].name else []):
            mean |= {f"world/{world.name}/{name}": figures[place][name] for name in FIGURES}
            if self.reference:
                mean[f"world/{world.name}/regret"] = figures[place][SCORE] - self.reference[place]
        self.rows.append({"step": step, **mean})
        if self.best_row["step"] == step:
            self.best = [(start, copy.deepcopy(state)) for start, state in points]
        return self.rows[-1]

    def train_students(
        self, losses: Sequence[DistillationLoss], look: str, stop: StopRequest
    ) -> list[dict[str, float]]:
        """Train the fresh students of each world with its loss; each world's mean figures."""
        shared, count = not self.worlds[0].name, self.settings.reuse_students
        own: dict[int, dict[str, float]] = {}
        stopped: Interrupted | None = None
        for place, (world, loss) in enumerate(zip(self.worlds, losses, strict=True)):
            if not shared and place % count_processes() != own_rank():
                continue
            folder = self.run.path / LOOK / look
            places = [folder / f"student-{place * count + number:03d}" for number in range(count)]
            try:
                rows = [
                    self.train_student(world, number, copy.deepcopy(loss), path, stop, shared)
                    for number, path in enumerate(places)
                ]
            except Interrupted as error:
                stopped = error
                break
            own[place] = average_rows(rows)
        if not shared:
            wait_for_slowest()
        if any_process(bool(stopped), self.run.device):  # those whose students are done would wait for the others
            raise stopped or Interrupted(f"stopped in {look}")
        if shared:
            own = share_from_main(own)
        found = {place: row for part in gather_objects(own) for place, row in part.items()}
        return [found[place] for place in range(len(self.worlds))]

    def train_student(
        self, world: World, number: int, loss: DistillationLoss, folder: Path, stop: StopRequest, shared: bool
    ) -> dict[str, float]:
        """Train one fresh student with the frozen loss; its figures on meta-validation, the worst if it diverges."""
        training = world.start(loss, draw_seed(world.seed, 7, number), shared)
        checkpoints = Checkpoints(folder, world.train, self.run.say, shared)
        checkpoints.resume_training(training)
        try:
            for _ in run_steps(training, training.total_steps, stop, checkpoints):
                pass
            checkpoints.save_training(training)
            figures = evaluate(training.result, world.images.meta_validation, world.device, shared=shared)
        except DivergedError:
            return {SCORE: float("inf"), "top1": 0.0}
        return {name: figures[name] for name in FIGURES}

    def forget_checkpoints(self) -> None:
        """Delete the checkpoints of looks: those that were finished are in the outer loop's."""
        if is_main():
            shutil.rmtree(self.run.path / LOOK, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best, "reference": self.reference}

    def load_state_dict(self, state: dict[str, Any], networks: LearnedLoss) -> None:
        """Go on from what `state_dict` returned; the best weights are of these networks."""
        scores = [f"world/{world.name}/{SCORE}" for world in self.worlds if world.name]
        self.rows = check_rows(state["rows"], [*FIGURES, *scores])
        self.reference = [float(score) for score in state["reference"]]
        self.best = check_points(state["best"], networks)


def shorten(train: TrainRecipe, epochs: int) -> TrainRecipe:
    """A training of fewer epochs whose warm-up, milestones, cooldown and average shrink in proportion.

    None of them vanishes but a cooldown: each milestone has an epoch of its own, an average has one, and a warm-up has
    one too, where one is left. Milestones that the whole training does not reach are out of reach here, too.

    Raises:
        UserError: If there are too few epochs for the milestones.
    """
    reached = [milestone for milestone in train.milestones if milestone < train.epochs]
    if len(reached) >= epochs:
        raise UserError(
            f"meta.reuse_epochs: {epochs} epochs have no room for the {len(reached)} milestones of train; take "
            f"{len(reached) + 1} or more"
        )
    milestones = [
        max(number + 1, min(round(milestone * epochs / train.epochs), epochs - len(reached) + number))
        for number, milestone in enumerate(reached)
    ]
    names = "warmup_epochs", "warmup_steps", "cooldown_epochs", "swa_epochs"
    shorter = {name: round(getattr(train, name) * epochs / train.epochs) for name in names}
    for name in ("warmup_epochs", "warmup_steps", "swa_epochs"):
        shorter[name] = max(shorter[name], min(1, getattr(train, name)))
    shorter["cooldown_epochs"] = min(shorter["cooldown_epochs"], epochs - 1)
    shorter["warmup_epochs"] = min(shorter["warmup_epochs"], epochs - 1 - shorter["cooldown_epochs"])
    return replace(train, epochs=epochs, milestones=milestones or train.milestones, **shorter)
