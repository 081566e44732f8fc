"""The loss networks: five forms over logits, one over features, and their sum.

*Our reconstruction*: the text and code of LKD (Ran, Huang, Yang, PLOS ONE 2025) are not public.
"""

from lkd.losses.learned.balance import BalanceLoss
from lkd.losses.learned.build import FORMS, build_learned_loss
from lkd.losses.learned.decoupled import DecoupledLoss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.generic import GenericLoss
from lkd.losses.learned.learned_loss import LearnedLoss
from lkd.losses.learned.residual import ResidualLoss
from lkd.losses.learned.shares import find_saturated, gradient_shares
from lkd.losses.learned.target import TargetLoss

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
