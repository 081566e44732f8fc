"""Losses: `loss(student, teacher, target, progress=None) -> dict of named scalar terms`, whose sum is the loss."""

from lkd.losses.learned import LogitLoss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.logits import CrossEntropyLoss, KDLoss
from lkd.losses.loss import DistillationLoss, wrap_loss

__all__ = [
    "CrossEntropyLoss",
    "DistillationLoss",
    "FeatureLoss",
    "KDLoss",
    "LearnedLoss",
    "LogitLoss",
    "ReplayedLoss",
    "wrap_loss",
]
