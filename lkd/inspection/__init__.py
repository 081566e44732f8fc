"""What a loss does, found out without a training: `inspect_loss(loss) -> dict`."""

from lkd.inspection.inspection import inspect_loss

__all__ = ["inspect_loss"]
