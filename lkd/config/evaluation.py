"""The recipes of the commands that answer questions about losses and runs."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config import ranges
from lkd.config.meta_training import DrawRecipe, MetaSettings, PoolContents, PoolSettings
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, StudentRecipe, TeacherRecipe, TrainRecipe


@dataclass
class CompareRecipe(RunRecipe):
    """Compare losses × students over paired seeds: one table, CSV and picture (RUN_DIR).

    A method is {name: ..., ...} or a learned-loss path; `train: {learning_rate: ...}` in it sets the training for it
    alone, `balance: {name: dynamic}` weighs its terms. A method with `grid: {option: [values]}` is tuned first: points
    of the grid are trained with the first seeds and the first student, and the best on meta-validation is used.
    `train.learning_rate` and `balance.maximum` can be in a grid too.

    Args:
        data: The images.
        teacher: The teacher.
        train: The training.
        methods: Label → method.
        students: Networks.
        seeds: Number of paired seeds: seed, seed + 1, ...
        baseline: Label of the method that differences are taken to.
        tuning_trainings: Trainings that each method with a grid may use for tuning, all seeds together: of a larger
            grid a spread of points is drawn; 0 trains every point.
        tuning_seeds: Seeds that each point of a grid is trained with.
        labelled_size: Training images whose labels are known; the others get the teacher's. 0 for all.
        evaluate_every: Epochs between looks at meta-validation, from which the best epoch is chosen.
        workers: Processes that train side by side; 0 means one for every CPU core, or for every GPU. They take turns on
            the GPUs.
        join: Share run_dir with other processes and hosts that run the same comparison: no training is done twice.
            Needs a file system that all of them see. W&B is left to the run that was started without it.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    methods: dict[str, dict[str, Any] | str] = field(
        default_factory=lambda: {
            "CE": {"name": "cross_entropy"},
            "KD": {"name": "kd", "grid": {"weight": [0.2, 0.5, 0.8, 1.0], "temperature": [1.0, 2.0, 4.0, 8.0]}},
        }
    )
    students: list[ModelRecipe] = field(default_factory=lambda: [ModelRecipe()])
    seeds: ranges.PositiveInt = 3
    baseline: str = "KD"
    tuning_trainings: ranges.NonNegativeInt = 0
    tuning_seeds: ranges.PositiveInt = 1
    labelled_size: ranges.NonNegativeInt = 0
    evaluate_every: ranges.PositiveInt = 1
    workers: ranges.NonNegativeInt = 0
    join: bool = False


def default_ranked_losses() -> dict[str, dict[str, Any] | str]:
    """Cross-entropy, and KD from too little of the teacher to nothing else, too cold to too warm."""
    points = [(0.2, 1.0), (0.2, 4.0), (0.5, 2.0), (0.5, 8.0), (0.8, 4.0), (1.0, 1.0), (1.0, 2.0)]
    kd = {f"KD({w:g}, {t:g})": {"name": "kd", "weight": w, "temperature": t} for w, t in points}
    return {"CE": {"name": "cross_entropy"}, **kd}


@dataclass
class FidelityRecipe(StudentRecipe):
    """Do short rollouts rank losses as full trainings do? Spearman's correlation for each kind of rollout (RUN_DIR).

    To be asked before any meta-training, which sees rollouts only. Writes a table, a picture, and fidelity.json with
    the recommended rollout length, annealing, objective, and weights for drawing ages from the pool.

    Args:
        pool: The pool to build; it must hold the `ages`.
        pool_dir: A pool to use instead: the `pool` folder of an earlier run.
        losses: Label → loss to rank, at least 3. What a loss trains along with the student (adapters) has no age, so
            losses that have such parts are refused.
        ages: Ages of the students that rollouts start from, in [0, 1].
        rollout_lengths: K, the student's steps in one rollout.
        rollout_epochs: How often a rollout sees each of its images, as in `lkd meta-train`.
        annealing: Learning rates within a rollout: cosine (to zero) or constant.
        objectives: Outer objectives by name, as in `lkd meta-train`; an empty list takes all there are.
        outer_batch_size: Meta-validation images that a rollout is scored on.
        full_seeds: Full trainings of each loss, with paired seeds: seed, seed + 1, ...; at least 2, and from 4 on the
            noise ceiling has an interval worth its name.
        rollouts: Rollouts of each loss, age, K and annealing; the losses share students and batches. Each takes the
            next student of the pool, and as many students as rollouts are best.
        workers: Processes that work side by side; 0 means one for every CPU core, or for every GPU.
    """

    run_dir: str = "runs/fidelity"
    pool: PoolContents = field(default_factory=lambda: PoolContents(students=8, snapshots=9, max_age=0.8))
    pool_dir: str | None = None
    losses: dict[str, dict[str, Any] | str] = field(default_factory=default_ranked_losses)
    ages: list[ranges.ClosedUnitInterval] = field(default_factory=lambda: [0.0, 0.1, 0.5, 0.8])
    rollout_lengths: list[ranges.PositiveInt] = field(default_factory=lambda: [20, 60])
    rollout_epochs: ranges.PositiveInt = 2
    annealing: list[Literal["cosine", "constant"]] = field(default_factory=lambda: ["constant", "cosine"])
    objectives: list[str] = field(default_factory=list)
    outer_batch_size: ranges.PositiveInt = 1000
    full_seeds: ranges.AtLeast2 = 4
    rollouts: ranges.AtLeast2 = 8
    workers: ranges.NonNegativeInt = 0


@dataclass
class DashboardRecipe:
    """Make a W&B workspace of sections and panels for a project's runs, or a report of a finished comparison.

    Every call makes a new one. Needs the `dashboard` extra.

    Args:
        entity: User or team; the one that is logged in if left out.
        project: Project name.
        name: The workspace's name.
        report: Run directory of a finished `lkd compare`: make its report instead of the workspace.
        runs: Run directories: say which panels would stay empty with only these runs.
        dry_run: Send nothing, write what would be sent as JSON.
        out: Folder for the workspace.json or report.json of a dry run.
    """

    entity: str | None = None
    project: str = "lkd"
    name: str = "LKD"
    report: str | None = None
    runs: list[str] = field(default_factory=list)
    dry_run: bool = False
    out: str = "runs/dashboard"


@dataclass
class InspectRecipe:
    """Say what a loss does, without training anything (OUT/inspection.json, OUT/inspection.png).

    Args:
        loss: The path of a learned-loss file, or the name of one that the package carries; or, to compare, a loss name
            or {name: ..., ...} (see docs/losses.md).
        out: Where the files go; NAME-inspection beside the loss's file, or in this folder for a named loss, if left
            out.
        kd_weight: Weight of the teacher in the KD that the loss is drawn beside, in [0, 1].
        kd_temperature: Temperature of that KD.
        num_classes: Number of classes of the made-up answers that the loss is looked at with.
        seed: Of these answers.
    """

    loss: dict[str, Any] | str
    out: str | None = None
    kd_weight: ranges.ClosedUnitInterval = 0.5
    kd_temperature: ranges.PositiveFloat = 4.0
    num_classes: ranges.AtLeast2 = 10
    seed: ranges.Seed = 0


@dataclass
class PlanRecipe(StudentRecipe):
    """Say what `lkd distill` or `lkd meta-train` will take, before it runs: work, memory, hours, data, teacher cache.

    Takes the recipe of either command; one with `meta` or `pool` in it is that of a meta-training. Nothing is trained
    and no weights are read: the real steps run on tensors without contents. Without `data.root`, image_folder is taken
    for ImageNet-1k.

    Args:
        worlds: Worlds that a loss is learned in (meta-training); each is planned, and their hours are summed.
        draw: Further worlds, drawn at random (meta-training).
        students: Networks to learn a loss with instead of `student` (meta-training).
        loss: What distillation trains with; a learned-loss file that is not there yet is planned as the default one.
        balance: What weighs its terms (distillation); checked, its own backward passes are not counted.
        labelled_size: Training images whose labels are known (distillation); asking for the others' is not counted.
        report_test: Of distillation; not counted.
        pool: The pool (meta-training).
        pool_dir: A pool to use instead, which is then not planned (meta-training).
        meta: The outer loop (meta-training).
        gpu: Which GPU, by its datasheet.
        gpus: How many, for distillation; meta-training runs on one.
        efficiency: Part of the datasheet's rates that the steps reach, in (0, 1].
        cores: CPU cores of the machine that decode images.
        decode_rate: Images that one core decodes and crops a second.
        augmentation_seeds: Augmentations of each image whose teacher's answers a cache holds.
        top_k: Classes of each answer that a small cache holds.
        out: Folder for plan.json and plan.txt; none are written without.
    """

    worlds: dict[str, Any] = field(default_factory=dict)
    draw: DrawRecipe = field(default_factory=DrawRecipe)
    students: list[ModelRecipe] = field(default_factory=list)
    loss: dict[str, Any] | str = "universal"
    balance: dict[str, Any] | str | None = None
    labelled_size: ranges.NonNegativeInt = 0
    report_test: bool = False
    pool: PoolSettings | None = None
    pool_dir: str | None = None
    meta: MetaSettings | None = None
    gpu: Literal["h200_sxm", "h100_sxm", "a100_sxm_80gb", "l40s", "rtx_4090"] = "h100_sxm"
    gpus: ranges.PositiveInt = 1
    efficiency: ranges.PositiveFraction = 0.5
    cores: ranges.PositiveInt = 16
    decode_rate: ranges.PositiveFloat = 500.0
    augmentation_seeds: ranges.PositiveInt = 8
    top_k: ranges.PositiveInt = 20
    out: str | None = None


@dataclass
class QuickstartRecipe(RunRecipe):
    """Train with the universal loss in three settings, beside CE and a grid of KD, and adapt it (RUN_DIR/report.html).

    Args:
        short: A small form of everything, about a minute, that claims nothing.
        workers: Processes that train side by side; 0 means one for every CPU core, or for every GPU.
        seeds: Paired seeds of the comparison.
    """

    run_dir: str = "runs/quickstart"
    short: bool = False
    workers: ranges.NonNegativeInt = 0
    seeds: ranges.PositiveInt = 3


@dataclass
class ReportRecipe:
    """Write one HTML page about runs, finished or not: results, curves, learned losses, settings, lineage.

    The page needs no network. Nothing in the run directories is changed.

    Args:
        runs: Run directories; their names may come first on the line, as in `lkd report runs/a runs/b`.
        out: The page, a .html file; one that is there is replaced.
    """

    runs: list[str] = field(default_factory=list)
    out: str = "report.html"
