"""The pool of students, and how meta-training draws from it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe


@dataclass
class PoolContents:
    """Which ages of which students the pool keeps.

    Args:
        students: Trainings, each from its own initial weights.
        snapshots: States kept of each, evenly spaced over [0, max_age].
        max_age: Progress up to which students are trained and kept, in [0, 1]; 1 is the end of the training.
        loss: What they are trained with: a loss name, or {name: ..., ...}.
    """

    students: int = 4
    snapshots: int = 9
    max_age: float = 0.8
    loss: dict[str, Any] | str = field(default_factory=lambda: {"name": "kd", "weight": 0.5, "temperature": 4.0})


@dataclass
class PoolSettings(PoolContents):
    """A pool, and how meta-training draws students from it.

    Args:
        sampling: uniform over all students of the pool; gaussian, ages near `gaussian_age`; fixed_step, the ages one
            after another, again and again; latest, the oldest age only; live, uniform over students that were trained
            with the loss as it is, anew every `refresh_every` outer steps; fidelity, ages weighted as `lkd fidelity`
            recommends.
        gaussian_age: The age at which sampling gaussian draws most.
        gaussian_spread: Standard deviation of the ages of sampling gaussian.
        refresh_every: Outer steps between two pools of sampling live; each costs `students` trainings up to `max_age`.
        fidelity_file: The fidelity.json that sampling fidelity takes its weights from.
        restore_momentum: Start a rollout with the momentum that the student had; else with none.
    """

    sampling: Literal["uniform", "gaussian", "fixed_step", "latest", "live", "fidelity"] = "uniform"
    gaussian_age: float = 0.0
    gaussian_spread: float = 0.1
    refresh_every: int = 10
    fidelity_file: str | None = None
    restore_momentum: bool = True


@dataclass
class PoolRecipe(RunRecipe):
    """Train students and keep them at many ages (RUN_DIR/pool).

    Args:
        data: The images.
        teacher: The teacher.
        student: The network.
        train: The whole training, of which the pool keeps the part up to `pool.max_age`.
        pool: Which ages are kept.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    pool: PoolContents = field(default_factory=PoolContents)
