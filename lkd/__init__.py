"""LKD: knowledge distillation whose loss is learned.

*Our reconstruction* of Ran, Huang, Yang, PLOS ONE 20(6): e0325599, 2025.

loss = lkd.load_loss("universal", trust=lkd.measure_trust(teacher.eval(), train_loader, validation_loader))
sum(loss(student_outputs, teacher_outputs, target, progress).values()).backward()
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"
__all__ = [
    "Outputs",
    "UserError",
    "distill",
    "load_loss",
    "measure_trust",
    "meta_train",
    "read_images",
    "register",
    "save_loss",
]

if TYPE_CHECKING:
    from lkd.api import distill, meta_train
    from lkd.core.errors import UserError
    from lkd.core.outputs import Outputs
    from lkd.data.arrays import read_images
    from lkd.losses.learned.file import save_loss
    from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
    from lkd.losses.learned.trust import Trust, measure_trust
    from lkd.models.build import register

HOMES = {
    "Outputs": "lkd.core.outputs",
    "UserError": "lkd.core.errors",
    "distill": "lkd.api",
    "measure_trust": "lkd.losses.learned.trust",
    "meta_train": "lkd.api",
    "read_images": "lkd.data.arrays",
    "register": "lkd.models.build",
    "save_loss": "lkd.losses.learned.file",
}


def load_loss(path: str | Path, trust: "Trust | None" = None) -> "LearnedLoss | ReplayedLoss":
    """Load a learned loss, frozen, ready for any training loop. Runs no code from the file.

    Args:
        path: The name of a loss that the package carries, `"universal"`; a `*.lkd.safetensors` file; or where it is to
            be fetched from, `hf://owner/repository/file` or `wandb://entity/project/artifact:version`.
        trust: What `lkd.measure_trust` found, for a loss that reads it; without it such a loss goes by what batches
            show.

    Returns:
        An ordinary module: `loss(student, teacher, target, progress) -> dict of terms`. It works for any number of
        classes and, if it reads features, for any stages: it compares the deepest that the outputs hold. A loss that
        was learned while a student was trained with it is replayed by progress.

    Raises:
        UserError: If the file is missing, truncated, not a learned loss, or of a newer format, or cannot be fetched.
    """
    from lkd.losses.learned.file import load_loss as load
    from lkd.tracking.remote import fetch_named

    return load(fetch_named(str(path)), trust)


def __getattr__(name: str) -> Any:
    # Lazily: `lkd --help` must not wait for torch.
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'lkd' has no attribute {name!r}")
