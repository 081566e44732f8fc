"""The recipe of a plan."""

from dataclasses import dataclass, field
from typing import Any, Literal

from lkd.config.meta_training import MetaSettings
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe
from lkd.config.pool import PoolSettings


@dataclass
class PlanRecipe(RunRecipe):
    """Say what `lkd distill` or `lkd meta-train` will take, before it runs: work, memory, hours, data, teacher cache.

    Takes the recipe of either command; one with `meta` or `pool` in it is that of a meta-training. Nothing is trained
    and no weights are read: the real steps run on tensors without contents.

    Args:
        data: The images. Without `root`, image_folder is taken for ImageNet-1k.
        teacher: The teacher.
        student: The network.
        students: Networks to learn a loss with instead of `student` (meta-training).
        train: The training.
        loss: What distillation trains with; a learned-loss file that is not there yet is planned as the default one.
        balance: What weighs its terms (distillation); checked, its own backward passes are not counted.
        pool: The pool (meta-training).
        pool_dir: A pool to use instead, which is then not planned (meta-training).
        meta: The outer loop (meta-training).
        gpu: Which GPU, by its datasheet.
        gpus: How many, for distillation; meta-training runs on one.
        efficiency: Part of the datasheet's rates that the steps reach, in (0, 1].
        cores: CPU cores of the machine that decode images.
        decode_rate: Images that one core decodes and crops a second; 0 measures it on images of data.root.
        augmentation_seeds: Augmentations of each image whose teacher's answers a cache holds.
        top_k: Classes of each answer that a small cache holds.
        out: Folder for plan.json and plan.txt; none are written without.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    teacher: TeacherRecipe = field(default_factory=TeacherRecipe)
    student: ModelRecipe = field(default_factory=ModelRecipe)
    students: list[ModelRecipe] = field(default_factory=list)
    train: TrainRecipe = field(default_factory=TrainRecipe)
    loss: dict[str, Any] | str = field(default_factory=lambda: {"name": "kd"})
    balance: dict[str, Any] | str | None = None
    pool: PoolSettings | None = None
    pool_dir: str | None = None
    meta: MetaSettings | None = None
    gpu: Literal["h100_sxm", "a100_sxm_80gb", "l40s", "rtx_4090"] = "h100_sxm"
    gpus: int = 1
    efficiency: float = 0.5
    cores: int = 16
    decode_rate: float = 500.0
    augmentation_seeds: int = 8
    top_k: int = 20
    out: str | None = None
