"""Build a network by name; every one returns `Outputs(logits, features)` from its forward pass, without hooks."""

from lkd.models.build import build, describe, plain_state_dict

__all__ = ["build", "describe", "plain_state_dict"]
