"""The recipes: one dataclass a command. A recipe file is YAML with these fields; the command line overrides it.

Nothing here imports torch, so that `lkd --help` answers at once.
"""

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataRecipe:
    """Which images.

    Args:
        name: Data set: embedded, fashion_mnist, fashion_mnist_unseen, fashion_mnist_rest, cifar10, cifar100 or
            image_folder.
        root: Folder of the data set's files (not for `embedded`).
        train_size: Images to train on; 0 takes all that meta-validation leaves.
        meta_validation_size: Images that tuning and the outer loop look at; disjoint from the training images and from
            the test split.
        split_seed: Seed of the split, of flipped labels and of a teacher's random answers.
        label_noise: Fraction of the training labels that are flipped on purpose. Meta-validation keeps its true labels.
        augmentation: none, flip_and_crop (2 pixels of padding), flip_and_crop_4 (4 pixels: the literature's for CIFAR);
            for image_folder none (the centre) or random_resized_crop.
        image_size: Pixels, height and width, of the crops that image_folder cuts; other data sets have their own size.
    """

    name: str = "embedded"
    root: str | None = None
    train_size: int = 4000
    meta_validation_size: int = 4000
    split_seed: int = 0
    label_noise: float = 0.0
    augmentation: str = "none"
    image_size: int = 224


@dataclass
class ModelRecipe:
    """Which network.

    Args:
        name: A timm model name (with its tag, as in resnet50.tv_in1k), a CIFAR network (resnet32x4, wrn_40_2, ...), or
            small_resnet, small_cnn, tiny_cnn, small_mobilenet.
        pretrained: Start from timm's pretrained weights.
        options: Further arguments of timm.create_model, such as {act_layer: relu}.
    """

    name: str = "small_cnn"
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass
class TeacherRecipe:
    """Which teacher.

    Args:
        path: File written by `lkd teacher`; or a checkpoint (.pth) of RepDistiller or mdistiller; or `embedded`, the
            teacher that the package carries; or `random`, the untrained network `name` (to try a recipe).
        name: The network that the file holds; needed by .pth checkpoints, `pretrained` and `random`.
        pretrained: The teacher is timm's `name` with the weights of its tag, as in resnet34.tv_in1k; no file is read.
        options: Further arguments of timm.create_model, for `pretrained` and `random`.
        random_answers: Fraction of the images on which the teacher's logits are permuted at random, to test robustness
            to a bad teacher.
    """

    path: str = "embedded"
    name: str | None = None
    pretrained: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    random_answers: float = 0.0


@dataclass
class TrainRecipe:
    """How a network is trained (SGD).

    Args:
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: At the start, or after warm-up.
        momentum: Of SGD.
        nesterov: Nesterov's momentum.
        weight_decay: L2 penalty, coupled as in torch.optim.SGD.
        schedule: timm's name of the learning-rate schedule, stepped every update (cosine, multistep, ...).
        milestones: Epochs at whose end the learning rate is multiplied by decay_rate; of schedule multistep only.
        decay_rate: Factor at every milestone (multistep, step), or the power (poly).
        warmup_epochs: Linear warm-up.
    """

    epochs: int = 13
    batch_size: int = 64
    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 5e-4
    schedule: str = "cosine"
    milestones: list[int] = field(default_factory=list)
    decay_rate: float = 0.1
    warmup_epochs: int = 0


@dataclass
class WandbRecipe:
    """Weights & Biases.

    Args:
        mode: disabled, offline or online.
        project: Project name.
        name: Run name; the run directory's name if left out.
    """

    mode: Literal["disabled", "offline", "online"] = "disabled"
    project: str = "lkd"
    name: str | None = None


@dataclass
class RunRecipe:
    """What every run has.

    Args:
        run_dir: Where the run's config, log, checkpoints and results go.
        resume: never, or auto: go on with the run in `run_dir` if there is one.
        seed: Of initial weights and of the order of the batches.
        device: cpu, cuda, or auto (cuda where there is one).
        threads: CPU threads of torch; 0 leaves its own choice.
        wandb: Weights & Biases.
    """

    run_dir: str = "runs/run"
    resume: Literal["never", "auto"] = "never"
    seed: int = 0
    device: str = "auto"
    threads: int = 0
    wandb: WandbRecipe = field(default_factory=WandbRecipe)


@dataclass
class TrainTeacherRecipe(RunRecipe):
    """Train a teacher with cross-entropy and save it as one file (RUN_DIR/teacher.safetensors).

    Args:
        data: Training and meta-validation images.
        model: The network.
        train: The training.
    """

    run_dir: str = "runs/teacher"
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=lambda: ModelRecipe(name="small_resnet"))
    train: TrainRecipe = field(default_factory=TrainRecipe)


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
    snapshots: int = 6
    max_age: float = 0.1
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
            the loss alternates with their training, trained side by side.
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
        clip_norm: Hypergradients are scaled down to this norm; 0 turns it off.
        kind: What the learned loss reads: logits, features (with plain cross-entropy) or both.
        loss: Options of the loss networks: `form` (decoupled, balance, generic, residual, target), that form's own
            (hidden, initial_weight, initial_temperature, conditioning, lipschitz, ...), `normalize_gradient`, and
            under `features` those of the network over features; see docs/losses.md.
        reuse_every: Outer steps between looks at reuse: fresh students are trained with the loss frozen and scored on
            meta-validation; the loss whose students have the least cross-entropy at the best temperature is saved.
            0 for no look: the last loss is saved.
        reuse_epochs: Epochs of such a training, with the whole schedule of `train`; each costs reuse_epochs /
            train.epochs trainings. 0 for as many as `train` has.
        reuse_patience: Looks without a better loss after which meta-training ends; 0 for never.
        checkpoint_every: Outer steps between checkpoints.
    """

    outer_steps: int = 20
    interleaving: Literal["before", "alternate", "both"] = "before"
    batches: Literal["different", "same"] = "different"
    students_per_step: int = 2
    rollout_steps: int = 100
    initial_rollout_steps: int = 0
    rollout_epochs: int = 13
    annealing: Literal["cosine", "constant"] = "cosine"
    average: float = 0.0
    estimator: str = "audited"
    objective: str = "calibrated_cross_entropy"
    outer_batch_size: int = 1000
    learning_rate: float = 0.03
    clip_norm: float = 1.0
    kind: str = "logits"
    loss: dict[str, Any] = field(default_factory=dict)
    reuse_every: int = 5
    reuse_epochs: int = 0
    reuse_patience: int = 0
    checkpoint_every: int = 10


@dataclass
class MetaTrainRecipe(RunRecipe):
    """Learn a loss (RUN_DIR/loss.lkd.safetensors).

    A pool is built in the run directory first, unless `pool_dir` names one.

    Args:
        data: The images.
        teacher: The teacher.
        student: The network.
        students: Networks to learn with instead of `student`, in turn; each has a pool of its own.
        train: The students' training: the loss is learned for it.
        pool: The pool to build, and how students are drawn.
        pool_dir: A pool to use instead: the `pool` folder of an earlier run, with the same network or `students`.
        meta: The outer loop.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    students: list[ModelRecipe] = field(default_factory=list)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    pool: PoolSettings = field(default_factory=PoolSettings)
    pool_dir: str | None = None
    meta: MetaSettings = field(default_factory=MetaSettings)


@dataclass
class DistillRecipe(RunRecipe):
    """Train a student with any loss (RUN_DIR/student.safetensors).

    Args:
        data: The images.
        teacher: The teacher.
        student: The network.
        train: The training.
        loss: A loss name, {name: ..., ...} (see docs/losses.md), or the path of a learned-loss file.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    loss: dict[str, Any] | str = field(default_factory=lambda: {"name": "kd"})


@dataclass
class EvaluateRecipe:
    """Measure a teacher's or a student's file.

    Args:
        checkpoint: File written by `lkd teacher` or `lkd distill`, or `embedded`.
        split: test, or meta_validation.
        data: The images.
        device: cpu, cuda or auto.
    """

    checkpoint: str = "embedded"
    split: Literal["test", "meta_validation"] = "test"
    data: DataRecipe = field(default_factory=DataRecipe)
    device: str = "auto"


@dataclass
class CompareRecipe(RunRecipe):
    """Compare losses × students over paired seeds: one table, CSV and picture (RUN_DIR).

    A method is {name: ..., ...} or a learned-loss path; `train: {learning_rate: ...}` in it sets the training for it
    alone. A method with `grid: {option: [values]}` is tuned first: points of the grid are trained with the first seeds
    and the first student, and the best on meta-validation is used. `train.learning_rate` can be in a grid too.

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
    seeds: int = 3
    baseline: str = "KD"
    tuning_trainings: int = 0
    tuning_seeds: int = 1
    evaluate_every: int = 1
    workers: int = 0
    join: bool = False


def default_ranked_losses() -> dict[str, dict[str, Any] | str]:
    """Cross-entropy, and KD from too little of the teacher to nothing else, too cold to too warm."""
    points = [(0.2, 1.0), (0.2, 4.0), (0.5, 2.0), (0.5, 8.0), (0.8, 4.0), (1.0, 1.0), (1.0, 2.0)]
    kd = {f"KD({w:g}, {t:g})": {"name": "kd", "weight": w, "temperature": t} for w, t in points}
    return {"CE": {"name": "cross_entropy"}, **kd}


@dataclass
class FidelityRecipe(RunRecipe):
    """Do short rollouts rank losses as full trainings do? Spearman's correlation for each kind of rollout (RUN_DIR).

    To be asked before any meta-training, which sees rollouts only. Writes a table, a picture, and fidelity.json with
    the recommended rollout length, annealing, objective, and weights for drawing ages from the pool.

    Args:
        data: The images.
        teacher: The teacher.
        student: The network.
        train: The full training, and that of which a rollout is a stretch.
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
    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    pool: PoolContents = field(default_factory=lambda: PoolContents(students=8, snapshots=9, max_age=0.8))
    pool_dir: str | None = None
    losses: dict[str, dict[str, Any] | str] = field(default_factory=default_ranked_losses)
    ages: list[float] = field(default_factory=lambda: [0.0, 0.1, 0.5, 0.8])
    rollout_lengths: list[int] = field(default_factory=lambda: [20, 60])
    rollout_epochs: int = 13
    annealing: list[Literal["cosine", "constant"]] = field(default_factory=lambda: ["constant", "cosine"])
    objectives: list[str] = field(default_factory=list)
    outer_batch_size: int = 1000
    full_seeds: int = 4
    rollouts: int = 8
    workers: int = 0


@dataclass
class QuickstartRecipe(RunRecipe):
    """Learn a loss on embedded images in three settings, reuse it, compare it with CE and KD (RUN_DIR/report.html).

    Args:
        short: A small form of everything, under 90 seconds, that claims nothing.
        workers: Processes that train side by side; 0 means one for every CPU core.
        seeds: Paired seeds of the comparison.
    """

    run_dir: str = "runs/quickstart"
    short: bool = False
    workers: int = 0
    seeds: int = 3
