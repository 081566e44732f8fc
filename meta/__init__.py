"""A bi-level engine: hypergradients of any inner training, by several estimators behind one signature."""

from meta import optim
from meta.estimators import ESTIMATORS, Estimator, Particles
from meta.module import call_module
from meta.outer import OuterStep, outer_step
from meta.rollout import rollout
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors
from meta.verify import Verification, verify

__all__ = [
    "ESTIMATORS",
    "Estimator",
    "Hypergradient",
    "InnerLoss",
    "OuterLoss",
    "OuterStep",
    "Particles",
    "State",
    "Tensors",
    "Verification",
    "call_module",
    "optim",
    "outer_step",
    "rollout",
    "verify",
]
