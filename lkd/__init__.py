"""LKD: knowledge distillation whose loss is learned.

*Our reconstruction* of Ran, Huang, Yang, PLOS ONE 20(6): e0325599, 2025.

loss = lkd.load_loss("fashion.lkd.safetensors")
sum(loss(student_outputs, teacher_outputs, target, progress).values()).backward()
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Outputs", "UserError", "distill", "load_loss", "meta_train", "read_images"]

if TYPE_CHECKING:
    from lkd.api import distill, meta_train
    from lkd.artifact import load_loss
    from lkd.data.given_images import read_images
    from lkd.errors import UserError
    from lkd.outputs import Outputs

HOMES = {
    "Outputs": "lkd.outputs",
    "UserError": "lkd.errors",
    "distill": "lkd.api",
    "load_loss": "lkd.artifact",
    "meta_train": "lkd.api",
    "read_images": "lkd.data.given_images",
}


def __getattr__(name: str) -> Any:
    # Lazily: `lkd --help` must not wait for torch.
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    raise AttributeError(f"module 'lkd' has no attribute {name!r}")
