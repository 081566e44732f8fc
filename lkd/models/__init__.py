"""Build a network by name; every one returns `Outputs(logits, features)` from its forward pass, without hooks."""

from lkd.models.build import build, plain_state_dict
from lkd.models.describe import describe

__all__ = ["build", "describe", "plain_state_dict"]
