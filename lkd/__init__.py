"""LKD: knowledge distillation whose loss is learned.

*Our reconstruction* of Ran, Huang, Yang, PLOS ONE 20(6): e0325599, 2025.

loss = lkd.load_loss("fashion.lkd.safetensors")
sum(loss(student_outputs, teacher_outputs, target, progress).values()).backward()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0.dev0"
__all__ = ["Outputs", "UserError", "distill", "load_loss", "meta_train", "read_images", "save_loss"]

if TYPE_CHECKING:
    from lkd.api import distill, meta_train
    from lkd.core.errors import UserError
    from lkd.core.outputs import Outputs
    from lkd.data.arrays import read_images
    from lkd.losses.learned.file import load_loss, save_loss

HOMES = {
    "Outputs": "lkd.core.outputs",
    "UserError": "lkd.core.errors",
    "distill": "lkd.api",
    "load_loss": "lkd.losses.learned.file",
    "meta_train": "lkd.api",
    "read_images": "lkd.data.arrays",
    "save_loss": "lkd.losses.learned.file",
}


def __getattr__(name: str) -> Any:
    # Lazily: `lkd --help` must not wait for torch.
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'lkd' has no attribute {name!r}")
