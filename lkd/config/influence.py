"""Recipes of influence: how it is measured, and how weights are made of it."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config.parts import DataRecipe, RunRecipe, TeacherRecipe


@dataclass
class InfluenceSettings:
    """How the influence of training images is measured, and how it becomes weights.

    Args:
        method: How the inverse curvature is applied: conjugate_gradient; exact (a dense matrix, for few parameters);
            lissa (a stochastic Neumann series); ekfac (kronfluence's EK-FAC, needs the `influence` extra); bilevel (the
            bi-level engine differentiates meta-validation through `iterations` steps of training); or
            gradient_similarity (no curvature: a control).
        objective: Of meta-validation: cross_entropy; or calibrated_cross_entropy, at its best temperature, to which
            more or less confidence is no help.
        curvature: gauss_newton, never negative for convex losses; or hessian, where damping is raised until it is not.
        damping: Added to the curvature's diagonal; ekfac adds a tenth of each layer's mean eigenvalue instead.
        iterations: Of conjugate gradients at most; terms of lissa; steps of bilevel.
        step_size: Of lissa (times the largest eigenvalue below 2) and of bilevel's steps.
        curvature_examples: Training images, drawn at random, that the curvature is taken over; 0 for all.
        batch_size: Images at a time.
        parameters: Only parameters whose names begin so, as in classifier; "" for all.
        weights: sigmoid, of the negative influence standardised; or exponential, e to the influence scaled to [-1, 1].
        sharpness: Factor in the sigmoid.
        favour: Which images get more weight: helpful; or harmful, as the official code's exponential does (a defect).
    """

    method: Literal["conjugate_gradient", "exact", "lissa", "ekfac", "bilevel", "gradient_similarity"] = (
        "conjugate_gradient"
    )
    objective: Literal["calibrated_cross_entropy", "cross_entropy"] = "calibrated_cross_entropy"
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    damping: float = 0.01
    iterations: int = 30
    step_size: float = 0.05
    curvature_examples: int = 2000
    batch_size: int = 500
    parameters: str = ""
    weights: Literal["sigmoid", "exponential"] = "sigmoid"
    sharpness: float = 1.0
    favour: Literal["helpful", "harmful"] = "helpful"


@dataclass
class InfluenceWeightedLossSettings:
    """Options of the loss influence_weighted.

    Args:
        loss: The loss that is weighted, by name or as {name: ..., ...}.
        weights: File of weights that `lkd influence` wrote; without it the student's own influence is measured.
        first_epoch: Epoch, from 0, before which it is measured for the first time; until then all weights are 1.
        refresh_epochs: Epochs after which it is measured anew; 0 for never.
        teacher_rate: The teacher is trained along by the student's optimiser, on the labels weighted alike, with its
            gradient times this; 0 leaves it as it is.
        influence: How it is measured, and how weights are made of it.
    """

    loss: dict[str, Any] | str = field(default_factory=lambda: {"name": "kd"})
    weights: str | None = None
    first_epoch: int = 3
    refresh_epochs: int = 0
    teacher_rate: float = 0.0
    influence: InfluenceSettings = field(default_factory=InfluenceSettings)


@dataclass
class InfluenceRecipe(RunRecipe):
    """Measure the influence of every training image on the meta-validation loss of a network (RUN_DIR/influence.csv).

    Also written: weights.safetensors (for the loss influence_weighted), influence.png (the most helpful and the most
    harmful images), result.json. The test split is not read.

    Args:
        data: The images.
        checkpoint: The network: a file written by `lkd distill` or `lkd teacher`, or `embedded`.
        loss: What the images teach: a loss over logits, by name or as {name: ..., ...}.
        teacher: The teacher, of losses that need one.
        influence: How it is measured.
        shown: Images in each half of the picture.
    """

    run_dir: str = "runs/influence"
    data: DataRecipe = field(default_factory=DataRecipe)
    checkpoint: str = "embedded"
    loss: dict[str, Any] | str = "cross_entropy"
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    influence: InfluenceSettings = field(default_factory=InfluenceSettings)
    shown: int = 24
