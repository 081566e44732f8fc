"""Inner optimisers as pure functions, step for step equal to `torch.optim`, with hand-derived adjoints."""

from meta.optim.adam import Adam, AdamW
from meta.optim.base import Optimizer, OptimizerOrRecipe, UpdateAdjoint, build_optimizer, setting_at
from meta.optim.from_torch import from_torch, read_slots
from meta.optim.sgd import SGD
from meta.optim.wrappers import Averaged, Clipped, Grouped, PerStep, evaluation_parameters

__all__ = [
    "SGD",
    "Adam",
    "AdamW",
    "Averaged",
    "Clipped",
    "Grouped",
    "Optimizer",
    "OptimizerOrRecipe",
    "PerStep",
    "UpdateAdjoint",
    "build_optimizer",
    "evaluation_parameters",
    "from_torch",
    "read_slots",
    "setting_at",
]
