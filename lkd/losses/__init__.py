"""Losses: `loss(student, teacher, target, progress=None) -> dict of named scalar terms`, whose sum is the loss."""

from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.forms import DecoupledLoss, GenericLoss
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.logits import CrossEntropyLoss, KDLoss
from lkd.losses.loss import DistillationLoss, wrap_loss

__all__ = [
    "CrossEntropyLoss",
    "DecoupledLoss",
    "DistillationLoss",
    "FeatureLoss",
    "GenericLoss",
    "KDLoss",
    "LearnedLoss",
    "ReplayedLoss",
    "wrap_loss",
]
