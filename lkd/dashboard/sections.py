"""What the workspace shows, as data: sections of panels, each of metrics that runs log (docs/tracking.md)."""

from dataclasses import dataclass

STEP = "step"  # what every metric is drawn over; W&B's own count of log calls means nothing


@dataclass(frozen=True)
class Chart:
    """Lines over a run's steps.

    Attributes:
        title: Shown above.
        metrics: Names of what is drawn.
        pattern: Regular expression (RE2, of the whole name) of what is drawn instead, where names are open-ended.
        unit: Label of the y axis.
        smoothing: Of an exponential moving average, in [0, 1); the original stays visible.
        log_y: Logarithmic y axis.
        bounds: Of the y axis; None leaves it free.
        stacked: Areas on top of each other.
    """

    title: str
    metrics: tuple[str, ...] = ()
    pattern: str | None = None
    unit: str | None = None
    smoothing: float = 0.0
    log_y: bool = False
    bounds: tuple[float | None, float | None] = (None, None)
    stacked: bool = False


@dataclass(frozen=True)
class Pictures:
    """Pictures that a run has logged.

    Attributes:
        title: Shown above.
        metrics: Names that they were logged under.
    """

    title: str
    metrics: tuple[str, ...]


@dataclass(frozen=True)
class Differences:
    """A table of the runs' configs and figures, only what differs."""

    title: str = "What differs between the runs"
    metrics: tuple[str, ...] = ()


Panel = Chart | Pictures | Differences


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    title: str
    panels: tuple[Panel, ...]


COMPARISON: tuple[Panel, ...] = (
    Chart("Accuracy on the test split, last epoch", pattern=r"^.+/test_last$", unit="%"),
    Pictures("Comparison", ("comparison",)),
)
SECTIONS = (
    Section(
        "Meta-training",
        (
            Chart("Outer loss after the rollout", ("outer/value",), unit="nats", smoothing=0.8),
            Chart("Reuse: cross-entropy at the best temperature", ("reuse/calibrated_cross_entropy",), unit="nats"),
            Chart("Reuse: accuracy on meta-validation", ("reuse/top1",), unit="%"),
            Chart("Hypergradient norm, before clipping", ("outer/hypergradient_norm",), smoothing=0.6, log_y=True),
            Chart("Signal to noise of the hypergradient", ("outer/signal_to_noise",), smoothing=0.8),
            Chart("Updates clipped, students left out", ("outer/clipped", "outer/left_out"), smoothing=0.9),
            Chart("Audit of first_order: cosine", ("outer/audit_cosine",), bounds=(-1, 1)),
            Chart(
                "Ages of the students", ("outer/progress_least", "outer/progress", "outer/progress_most"), bounds=(0, 1)
            ),
        ),
    ),
    Section(
        "Learned loss",
        (
            Chart("Mean weight of the teacher", ("loss/weight",), smoothing=0.8, bounds=(0, None)),
            Chart("Mean temperature", ("loss/temperature",), smoothing=0.8),
            Chart("Share of each term in the student's gradient", pattern=r"^share/.+$", smoothing=0.6, bounds=(0, 1)),
            Chart("Norm of each part's weights", pattern=r"^weights/.+$"),
            Pictures("What the loss does to a student", ("learned_loss",)),
        ),
    ),
    Section(
        "Distillation",
        (
            Chart("Accuracy on meta-validation", ("meta_validation/top1",), unit="%"),
            Chart(
                "Cross-entropy on meta-validation, at the best temperature",
                ("meta_validation/calibrated_cross_entropy",),
                unit="nats",
            ),
            # Of `loss/TERM` all but a meta-training's `loss/weight` and `loss/temperature`: RE2 cannot look ahead.
            Chart("Terms of the loss", pattern=r"^loss/([^wt].*|t[^e].*)$", smoothing=0.3),
            Chart("Agreement with the teacher on a training batch", ("train/agreement",), unit="%", smoothing=0.6),
            Chart("Balance λ", ("balance",), bounds=(0, None)),
            Chart("Share of each term in the gradient", pattern=r"^share/.+$", smoothing=0.6, bounds=(0, 1)),
            Chart("Gradient norm", ("gradient_norm",), smoothing=0.6, log_y=True),
            Chart("Learning rate", ("learning_rate",)),
        ),
    ),
    Section("Comparison", (*COMPARISON, Differences())),
    Section(
        "System",
        (
            Chart("Images a second", ("images_per_second",), smoothing=0.6, bounds=(0, None)),
            Chart(
                "Where the time of a step goes",
                ("time_share/data", "time_share/teacher", "time_share/student", "time_share/loss"),
                bounds=(0, 1),
                stacked=True,
            ),
        ),
    ),
)
