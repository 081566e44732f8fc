"""The recipes of the pool and of meta-training."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config import ranges
from lkd.config.parts import ModelRecipe, StudentRecipe


@dataclass
class PoolContents:
    """Which ages of which students the pool keeps.

    Args:
        students: Trainings, each from its own initial weights.
        snapshots: States kept of each, evenly spaced over [0, max_age]; 1 for fresh students alone, of age 0.
        max_age: Progress up to which students are trained and kept, in [0, 1]; 1 is the end of the training.
        loss: What they are trained with: a loss name, or {name: ..., ...}.
    """

    students: ranges.PositiveInt = 2
    snapshots: ranges.PositiveInt = 9
    max_age: ranges.ClosedUnitInterval = 0.8
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
    gaussian_spread: ranges.PositiveFloat = 0.1
    refresh_every: ranges.PositiveInt = 10
    fidelity_file: str | None = None
    restore_momentum: bool = True


@dataclass
class PoolRecipe(StudentRecipe):
    """Train students and keep them at many ages (RUN_DIR/pool).

    Args:
        pool: Which ages are kept of the whole training, which is done up to `pool.max_age`.
    """

    pool: PoolContents = field(default_factory=PoolContents)


@dataclass
class MetaSettings:
    """The outer loop.

    Args:
        outer_steps: Updates of the loss network.
        interleaving: before, the loss is learned from the pool and then reused; alternate, it is updated while students
            of its own are trained with it from start to end, at even distances, and its course is saved, to be replayed
            by progress; both, half of the outer steps each, in this order.
        batches: The outer loss looks at meta-validation images (different), or at the rollout's own training images
            (same).
        students_per_step: Students whose hypergradients are averaged for each update: drawn from the pool, or, where
            the loss alternates with their training, trained side by side. Worlds take turns; 0 for one in each world.
        rollout_steps: K, the student's steps in one rollout. Where the loss alternates, its last steps before each
            update.
        initial_rollout_steps: K at the first outer step, from which it grows evenly to `rollout_steps`; 0 for no
            growth. From the pool only.
        rollout_epochs: How often a rollout from the pool sees each of its images: 1, all different; more, a part of the
            training images again and again, as a whole training does.
        annealing: Learning rate within a rollout from the pool: cosine (to zero) or constant.
        average: The outer loss sees an exponential moving average of the rollout's iterates with this decay; 0 for the
            last iterate. From the pool only.
        estimator: How the hypergradient is computed: one of meta's (unrolled, adjoint and higher are exact; first_order
            is leaner), or audited: first_order as long as its audit against the exact one holds, else adjoint. Where
            the loss alternates with a training, first_order walks back over the training's own steps.
        objective: Outer loss: cross_entropy, calibrated_cross_entropy (at the best temperature), brier, or
            smoothed_error (a sigmoid of the margin in place of the error's step).
        outer_batch_size: Images of one outer loss.
        learning_rate: Of Adam on the loss network's weights, at the start; annealed to zero by a cosine.
        clip_norm: The average of the hypergradients is scaled down to this norm; 0 turns it off.
        clip_each: Each student's hypergradient is scaled down to this norm before they are averaged: those of
            different worlds differ a hundredfold; 0 turns it off.
        hide_trust: Part of the rollouts in which a loss that reads trust (`Trust`) is not told it, so that it learns to
            do without; the student's own accuracy is hidden in as many, independently. A student that is trained while
            the loss learns (`interleaving`) tells it all.
        start: The loss to start from, a file; fresh networks if left out. `loss` then has no say.
        exploding_norm: A hypergradient whose norm is more than so many times the median of the latest ones is left
            out; 0, or `clip_each`, leaves out only those that are not finite.
        kind: What the learned loss reads: logits, features (with plain cross-entropy) or both.
        loss: Options of the loss networks: `form` (decoupled, generic), that form's own (hidden, initial_weight,
            initial_temperature, conditioning, lipschitz, ...), `normalize_gradient`, and under `features` those of the
            network over features; see docs/losses.md.
        reuse_every: Outer steps between looks at reuse: fresh students are trained with the loss frozen and scored on
            meta-validation; the loss whose students have the least cross-entropy at the best temperature is saved.
            0 for no look: the last loss is saved.
        reference: Loss that looks at reuse are compared with, trained with the same students once, before the first
            look: a name, or {name: ..., ...}. A loss's regret is its students' cross-entropy at the best temperature
            less the reference's, the mean over the worlds. None if left out.
        reuse_students: Fresh students of each architecture at a look; their mean is what counts.
        reuse_epochs: Epochs of such a training, with the whole schedule of `train`; each costs reuse_epochs /
            train.epochs trainings. 0 for as many as `train` has.
        reuse_patience: Looks without a better loss after which meta-training ends; 0 for never.
        checkpoint_every: Outer steps between checkpoints.
        picture_every: Outer steps between two pictures of the loss (RUN_DIR/pictures, W&B, trackio), and one of the
            loss that a look chose; 0 for none. Of a run of over 100 times as many steps a multiple: there are 100
            pictures at most.
    """

    outer_steps: ranges.PositiveInt = 20
    interleaving: Literal["before", "alternate", "both"] = "before"
    batches: Literal["different", "same"] = "different"
    students_per_step: ranges.NonNegativeInt = 2
    rollout_steps: ranges.PositiveInt = 30
    initial_rollout_steps: ranges.NonNegativeInt = 0
    rollout_epochs: ranges.PositiveInt = 2
    annealing: Literal["cosine", "constant"] = "cosine"
    average: ranges.FractionBelowOne = 0.0
    estimator: str = "audited"
    objective: str = "calibrated_cross_entropy"
    outer_batch_size: ranges.PositiveInt = 1000
    learning_rate: ranges.NonNegativeFloat = 0.05
    clip_norm: ranges.NonNegativeFloat = 1.0
    clip_each: ranges.NonNegativeFloat = 0.0
    hide_trust: ranges.ClosedUnitInterval = 0.2
    start: str | None = None
    exploding_norm: ranges.ZeroOrAtLeast1 = 100.0
    kind: str = "logits"
    loss: dict[str, Any] = field(default_factory=dict)
    reuse_every: ranges.NonNegativeInt = 10
    reference: dict[str, Any] | str | None = None
    reuse_students: ranges.PositiveInt = 2
    reuse_epochs: ranges.NonNegativeInt = 0
    reuse_patience: ranges.NonNegativeInt = 0
    checkpoint_every: ranges.PositiveInt = 10
    picture_every: ranges.NonNegativeInt = 10

    @property
    def alternation_start(self) -> int:
        """The outer step from which on the loss alternates with the training of its online students."""
        return {"before": self.outer_steps, "alternate": 0, "both": self.outer_steps // 2}[self.interleaving]


@dataclass
class DrawRecipe:
    """Worlds that are drawn at random.

    Args:
        worlds: How many.
        seed: Of the draws.
        of: Names of the listed worlds that they are variations of; all if left out.
        values: Field, as in data.label_noise → what is drawn for it: one of a list; or a number of a range,
            {low: 0.0, high: 0.6}, evenly, or evenly in its logarithm with `log: true`; whole if both bounds are.
    """

    worlds: ranges.NonNegativeInt = 0
    seed: ranges.Seed = 0
    of: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)


@dataclass
class MetaTrainRecipe(StudentRecipe):
    """Learn a loss (RUN_DIR/loss.lkd.safetensors).

    A pool is built in the run directory first, unless `pool_dir` names one.

    A world is images with their noise, a teacher with its faults, a student and its training. Without `worlds` and
    `draw` the recipe is the only one. Processes of a torchrun job share the worlds among them.

    Args:
        worlds: Name → what differs from the recipe in `data`, `teacher`, `student` and `train` of this world; with
            `of: NAME` what differs from another listed one.
        draw: Further worlds, drawn at random.
        students: Networks to learn with instead of `student`, in turn; each has a pool of its own. The loss is learned
            for their training.
        pool: The pool to build, and how students are drawn.
        pool_dir: A pool to use instead: the `pool` folder of an earlier run, with the same split of the images and the
            same network or `students`. If they were trained otherwise, a line says so.
        meta: The outer loop.
    """

    worlds: dict[str, Any] = field(default_factory=dict)
    draw: DrawRecipe = field(default_factory=DrawRecipe)
    students: list[ModelRecipe] = field(default_factory=list)
    pool: PoolSettings = field(default_factory=PoolSettings)
    pool_dir: str | None = None
    meta: MetaSettings = field(default_factory=MetaSettings)
