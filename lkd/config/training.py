"""The recipes of the commands that train, measure, cache or pack one thing."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config import ranges
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, StudentRecipe, TeacherRecipe, TrainRecipe


@dataclass
class TrainTeacherRecipe(RunRecipe):
    """Train a teacher with cross-entropy and save it as one file (RUN_DIR/teacher.safetensors).

    Args:
        data: Training and meta-validation images.
        model: The network.
        train: The training.
        report_test: Measure the last weights on the test split, once, at the end.
    """

    run_dir: str = "runs/teacher"
    data: DataRecipe = field(default_factory=DataRecipe)
    model: ModelRecipe = field(default_factory=lambda: ModelRecipe(name="small_resnet"))
    train: TrainRecipe = field(default_factory=TrainRecipe)
    report_test: bool = False


@dataclass
class DistillRecipe(StudentRecipe):
    """Train a student with any loss (RUN_DIR/student.safetensors).

    Args:
        loss: `universal`, the learned loss that the package carries; another loss name, {name: ..., ...} (see
            docs/losses.md); or the path of a learned-loss file.
        balance: How the teacher's terms of the loss are weighed against its task: {name: dynamic, ...} (see
            docs/balance.md); without it the loss is the sum of its terms.
        labelled_size: Training images whose labels are known; the others get the teacher's. 0 for all.
        report_test: Measure the last weights on the test split, once, at the end.
    """

    loss: dict[str, Any] | str = "universal"
    balance: dict[str, Any] | str | None = None
    labelled_size: ranges.NonNegativeInt = 0
    report_test: bool = False


@dataclass
class EvaluateRecipe:
    """Measure a teacher's or a student's file.

    Args:
        checkpoint: File written by `lkd teacher` or `lkd distill`, or by another program; or `embedded`.
        split: test, or meta_validation.
        data: The images, as of `lkd distill` (data.name, data.root, ...); what is left out is as the file says that it
            was trained. Of the test split no sizes are read.
        device: cpu, cuda or auto.
        name: The network that the file holds; needed by files of other programs.
        options: What that network was built with beside its name, as in {act_layer: relu}.
        plugins: File of Python that registers networks of your own (docs/networks.md). It is run.
    """

    checkpoint: str = "embedded"
    split: Literal["test", "meta_validation"] = "test"
    data: dict[str, Any] = field(default_factory=dict)
    device: str = "auto"
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plugins: str | None = None


@dataclass
class PredictRecipe:
    """Say what a trained network sees in pictures: the most probable classes by name, with their probabilities.

    A folder makes it CSV: `lkd predict student.safetensors photos/ > photos.csv`.

    Args:
        checkpoint: File written by `lkd distill` or `lkd teacher`, or by another program; or `embedded`.
        pictures: Files, and folders of them.
        name: The network that the file holds; needed by files of other programs.
        options: What that network was built with beside its name, as in {act_layer: relu}.
        plugins: File of Python that registers networks of your own (docs/networks.md). It is run.
        top_k: Classes of each picture.
        image_size: Height and width of the input; 0 for that of the training images, which the file names.
        batch_size: Pictures at a time.
        out: File of CSV to write; without it lines are printed.
        device: cpu, cuda or auto.
    """

    checkpoint: str = "runs/student/student.safetensors"
    pictures: list[str] = field(default_factory=list)
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plugins: str | None = None
    top_k: ranges.PositiveInt = 5
    image_size: ranges.ZeroOrAtLeast8 = 0
    batch_size: ranges.PositiveInt = 50
    out: str | None = None
    device: str = "auto"


@dataclass
class VarianceRecipe:
    """Measure how noisy a finished student's gradient is for each share of the teacher (RUN_DIR/variance).

    Args:
        run_dir: Run directory of a finished `lkd distill`.
        samples: Mini-batches of training images: half predict, half measure.
        batch_size: Images of a mini-batch.
        horizon: 1 / (learning rate · strong convexity): how much bias costs against noise.
        device: cpu, cuda or auto.
        plugins: File of Python that registers networks of your own (docs/networks.md). It is run.
    """

    run_dir: str = "runs/student"
    samples: ranges.AtLeast4 = 100
    batch_size: ranges.PositiveInt = 10
    horizon: ranges.NonNegativeFloat = 0.0
    device: str = "auto"
    plugins: str | None = None


@dataclass
class ExportRecipe:
    """Write a student in the formats that others read; every file is read back and its logits compared (OUT_DIR).

    Args:
        checkpoint: File written by `lkd distill` or `lkd teacher`, or by another program.
        out_dir: Where the files go: student.pth, student.safetensors, student.onnx, student.pt2, export.json.
        formats: Some of timm (a state dict for `timm.create_model(..., checkpoint_path=)`), safetensors (the same
            weights), onnx (needs the `export` extra), torch_export.
        image_size: Height and width of the input; 0 for that of the training images, which the file names.
        tolerance: Largest difference of a logit, over the largest logit, between the file and the network.
        name: The network that the file holds; needed by files of other programs.
        options: What that network was built with beside its name, as in {act_layer: relu}.
        plugins: File of Python that registers networks of your own (docs/networks.md). It is run.
    """

    checkpoint: str = "runs/student/student.safetensors"
    out_dir: str = "runs/export"
    formats: list[str] = field(default_factory=lambda: ["safetensors", "torch_export"])
    image_size: ranges.ZeroOrAtLeast8 = 0
    tolerance: ranges.NonNegativeFloat = 1e-4
    name: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    plugins: str | None = None


@dataclass
class CacheRecipe(DistillRecipe):
    """Keep a teacher's answers to N augmentations of every training image, for trainings with the same `teacher.cache`.

    Takes the recipe of `lkd distill`, with `data.augmentation_seeds` N and the folder `teacher.cache`. Of the training
    it reads batch size, precision, compile and channels_last. What is there already is kept, and the rest is added.

    Args:
        top_k: Classes of each answer that are kept, with the sum of the others' probabilities; 0 for all classes.
        shard_size: Images a file; a killed command loses at most one file's answers.
    """

    top_k: ranges.NonNegativeInt = 0
    shard_size: ranges.PositiveInt = 50_000


@dataclass
class PackRecipe:
    """Decode all images once and keep them scaled down, for trainings with the same `data.packed`.

    Args:
        data: The images, and in `packed` the folder that they go to.
        shorter_side: Pixels of the shorter side; 256 is right for crops of 224.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    shorter_side: ranges.AtLeast8 = 256


@dataclass
class InfluenceSettings:
    """How the influence of training images is measured, and how it becomes weights.

    Args:
        method: How the inverse curvature is applied: conjugate_gradient; or ekfac (kronfluence's EK-FAC, needs the
            `influence` extra).
        objective: What is to fall on meta-validation: expected_error, 1 - p of the label at the best temperature, 1 at
            least; bounded, it finds wrong labels however confident the network is. cross_entropy: its sign follows the
            network's confidence, not the labels. calibrated_cross_entropy, at its best temperature: confidence is no
            help, but nor are symmetric flips found; with losses that hear a teacher its weights did no less well.
        queries: mean, over meta-validation images; or unit, each image's gradient scaled to norm 1, so that the images
            that the network is least sure of don't drown the others; it finds flips within pairs of classes better.
        gradient: Whose gradient a training image is judged by: label, the label's cross-entropy, as it is the labels
            that are wrong; or loss, of the whole training loss, a teacher's answer included.
        curvature: Of the training loss: gauss_newton, never negative for convex losses; or hessian, where damping is
            raised until it is not.
        damping: Added to the curvature's diagonal; ekfac adds a tenth of each layer's mean eigenvalue instead.
        iterations: Of conjugate gradients at most; a residual over 0.1 is warned of.
        curvature_examples: Training images, drawn at random, that the curvature is taken over; 0 for all.
        batch_size: Images at a time.
        parameters: Only parameters whose names begin so, as in classifier; "" for all.
        weights: sigmoid, of the negative influence standardised; or exponential, e to the influence scaled to [-1, 1].
        sharpness: Factor in the sigmoid. At 3 an image one standard deviation to the harmful side keeps a twentieth of
            its weight. Where few images stand out (a kurtosis over 6), as with right labels, it is less, from 12 on 0:
            all weights are 1.
        favour: Which images get more weight: helpful; or harmful, as the official code's exponential does (a defect).
    """

    method: Literal["conjugate_gradient", "ekfac"] = "conjugate_gradient"
    objective: Literal["expected_error", "calibrated_cross_entropy", "cross_entropy"] = "expected_error"
    queries: Literal["mean", "unit"] = "mean"
    gradient: Literal["label", "loss"] = "label"
    curvature: Literal["gauss_newton", "hessian"] = "gauss_newton"
    damping: ranges.NonNegativeFloat = 0.1
    iterations: ranges.PositiveInt = 30
    curvature_examples: ranges.NonNegativeInt = 1000
    batch_size: ranges.PositiveInt = 500
    parameters: str = ""
    weights: Literal["sigmoid", "exponential"] = "sigmoid"
    sharpness: ranges.PositiveFloat = 3.0
    favour: Literal["helpful", "harmful"] = "helpful"


@dataclass
class InfluenceWeightedLossSettings:
    """Options of the loss influence_weighted.

    Args:
        loss: The loss that is weighted, by name or as {name: ..., ...}.
        weights: File of weights that `lkd influence` wrote; without it the student's own influence is measured.
        first_epoch: Epoch, from 0, before which it is measured for the first time; until then all weights are 1.
        refresh_epochs: Epochs after which it is measured anew; 0 for never.
        weigh: task, the terms of the labels alone, as a wrong label does not make a teacher's answer wrong; or loss,
            all of its terms. They are the same for cross_entropy.
        teacher_rate: The teacher is trained along by the student's optimiser, on the labels weighted alike, at the
            learning rate times this; 0 leaves it as it is. `train.clip_norm` is of both networks then.
        influence: How it is measured, and how weights are made of it.
    """

    loss: dict[str, Any] | str = field(default_factory=lambda: {"name": "kd"})
    weights: str | None = None
    first_epoch: ranges.NonNegativeInt = 2
    refresh_epochs: ranges.NonNegativeInt = 2
    weigh: Literal["task", "loss"] = "task"
    teacher_rate: ranges.NonNegativeFloat = 0.0
    influence: InfluenceSettings = field(default_factory=InfluenceSettings)


@dataclass
class InfluenceRecipe(RunRecipe):
    """Measure the influence of every training image on the meta-validation loss of a network (RUN_DIR/influence.csv).

    Also written: influence.html, a page of it with pictures; label_issues.csv, labels to check, as cleanlab has them;
    weights.safetensors (for the loss influence_weighted), result.json. The test split is not read.

    Args:
        data: The images.
        checkpoint: The network: a file written by `lkd distill` or `lkd teacher`, or `embedded`.
        loss: What the images teach: a loss over logits, by name or as {name: ..., ...}.
        teacher: The teacher, of losses that need one.
        influence: How it is measured.
        shown: Images in each half of the page.
    """

    run_dir: str = "runs/influence"
    data: DataRecipe = field(default_factory=DataRecipe)
    checkpoint: str = "embedded"
    loss: dict[str, Any] | str = "cross_entropy"
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    influence: InfluenceSettings = field(default_factory=InfluenceSettings)
    shown: ranges.PositiveInt = 24


@dataclass
class PushRecipe:
    """Put a learned loss on the Hugging Face Hub, with a model card, or into W&B's artifacts.

    Args:
        loss: The file.
        to: `hf://OWNER/REPOSITORY[@REVISION][/FILE]` or `wandb://ENTITY/PROJECT/ARTIFACT[:ALIAS]`.
        private: Of a new repository on the Hub, whether others cannot see it.
        card: Only write the model card to this file; nothing is sent.
    """

    loss: str
    to: str
    private: bool = False
    card: str | None = None


@dataclass
class PullRecipe:
    """Fetch a learned loss from the Hugging Face Hub or from W&B's artifacts, and check it.

    Args:
        loss: `hf://OWNER/REPOSITORY[@REVISION][/FILE]` or `wandb://ENTITY/PROJECT/ARTIFACT[:VERSION]`. Other commands
            take such a name in the place of a file, too.
        out: The file to write.
    """

    loss: str
    out: str = "loss.lkd.safetensors"
