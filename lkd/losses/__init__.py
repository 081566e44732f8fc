"""Losses: `loss(student, teacher, target, progress=None) -> dict of named scalar terms`, whose sum is the loss."""

from lkd.losses.cross_entropy import CrossEntropyLoss
from lkd.losses.kd import KDLoss
from lkd.losses.learned import FeatureLoss, LearnedLoss, LogitLoss
from lkd.losses.replayed import ReplayedLoss

__all__ = ["CrossEntropyLoss", "FeatureLoss", "KDLoss", "LearnedLoss", "LogitLoss", "ReplayedLoss"]
