"""A bi-level engine: hypergradients of any inner training, by several estimators behind one signature."""

from meta import optim
from meta.audit import Audit, Audited, Horizon, audit, horizon
from meta.estimators import ESTIMATORS, Estimator, Particles
from meta.module import call_module
from meta.outer import OuterStep, outer_step
from meta.rollout import rollout
from meta.students import stack_batches, stack_students, unstack_state
from meta.tape import Tape
from meta.types import Hypergradient, InnerLoss, OuterLoss, State, Tensors
from meta.verify import Verification, verify

__all__ = [
    "ESTIMATORS",
    "Audit",
    "Audited",
    "Estimator",
    "Horizon",
    "Hypergradient",
    "InnerLoss",
    "OuterLoss",
    "OuterStep",
    "Particles",
    "State",
    "Tape",
    "Tensors",
    "Verification",
    "audit",
    "call_module",
    "horizon",
    "optim",
    "outer_step",
    "rollout",
    "stack_batches",
    "stack_students",
    "unstack_state",
    "verify",
]
