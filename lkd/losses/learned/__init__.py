"""The loss networks: five forms over logits, one over features, and their sum.

*Our reconstruction*: the text and code of LKD (Ran, Huang, Yang, PLOS ONE 2025) are not public.
"""

from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.forms import BalanceLoss, DecoupledLoss, GenericLoss, ResidualLoss, TargetLoss
from lkd.losses.learned.loss import FORMS, LearnedLoss, build_learned_loss
from lkd.losses.learned.shares import find_saturated, gradient_shares

LogitLoss = BalanceLoss  # under the name that format version 1 of learned-loss files knows

__all__ = [
    "FORMS",
    "BalanceLoss",
    "DecoupledLoss",
    "FeatureLoss",
    "GenericLoss",
    "LearnedLoss",
    "LogitLoss",
    "ResidualLoss",
    "TargetLoss",
    "build_learned_loss",
    "find_saturated",
    "gradient_shares",
]
