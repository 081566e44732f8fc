"""Recipes of the commands that train or measure one network."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe


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
class DistillRecipe(RunRecipe):
    """Train a student with any loss (RUN_DIR/student.safetensors).

    Args:
        data: The images.
        teacher: The teacher.
        student: The network.
        train: The training.
        loss: A loss name, {name: ..., ...} (see docs/losses.md), or the path of a learned-loss file.
        balance: What weighs the teacher's terms of the loss against its task: {name: dynamic, ...} (see
            docs/balance.md); without it the loss is the sum of its terms.
        labelled_size: Training images whose labels are known; the others get the teacher's. 0 for all.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    loss: dict[str, Any] | str = field(default_factory=lambda: {"name": "kd"})
    balance: dict[str, Any] | str | None = None
    labelled_size: int = 0


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
class VarianceRecipe:
    """Measure how noisy a finished student's gradient is for each share of the teacher (RUN_DIR/variance).

    Args:
        run_dir: Run directory of a finished `lkd distill`.
        samples: Mini-batches of training images: half predict, half measure.
        batch_size: Images of a mini-batch.
        horizon: 1 / (learning rate · strong convexity): how much bias costs against noise.
        device: cpu, cuda or auto.
    """

    run_dir: str = "runs/student"
    samples: int = 100
    batch_size: int = 10
    horizon: float = 0.0
    device: str = "auto"


@dataclass
class ExportRecipe:
    """Write a student in the formats that others read; every file is read back and its logits compared (OUT_DIR).

    Args:
        checkpoint: File written by `lkd distill` or `lkd teacher`.
        out_dir: Where the files go: student.pth, student.safetensors, student.onnx, student.pt2, export.json.
        formats: Some of timm (a state dict for `timm.create_model(..., checkpoint_path=)`), safetensors (the same
            weights), onnx (needs the `export` extra), torch_export.
        image_size: Height and width of the input; 0 for that of the training images, which the file names.
        tolerance: Largest difference of a logit, over the largest logit, between the file and the network.
    """

    checkpoint: str = "runs/student/student.safetensors"
    out_dir: str = "runs/export"
    formats: list[str] = field(default_factory=lambda: ["safetensors", "torch_export"])
    image_size: int = 0
    tolerance: float = 1e-4
