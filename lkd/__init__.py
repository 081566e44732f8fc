"""LKD: knowledge distillation whose loss is learned.

*Our reconstruction* of Ran, Huang, Yang, PLOS ONE 20(6): e0325599, 2025.

loss = lkd.load_loss("fashion.lkd.safetensors")
sum(loss(student_outputs, teacher_outputs, target, progress).values()).backward()
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["Outputs", "load_loss"]

if TYPE_CHECKING:
    from lkd.artifact import load_loss
    from lkd.outputs import Outputs


def __getattr__(name: str) -> Any:
    # Lazily: `lkd --help` must not wait for torch.
    if name == "load_loss":
        from lkd.artifact import load_loss

        return load_loss
    if name == "Outputs":
        from lkd.outputs import Outputs

        return Outputs
    raise AttributeError(f"module 'lkd' has no attribute {name!r}")
