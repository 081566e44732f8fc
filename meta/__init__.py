"""A bi-level engine: hypergradients of any inner training, by several estimators behind one signature."""

from meta import optim
from meta.audit import Audit, Audited, Horizon, audit, horizon
from meta.estimators import ESTIMATORS
from meta.outer import OuterStep, outer_step
from meta.problem import Estimator, Hypergradient, InnerLoss, OuterLoss, Problem, call_module
from meta.rollout import rollout
from meta.students import stack_students, unstack_state
from meta.tape import Tape
from meta.tensors import State, Tensors
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
    "Problem",
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
    "stack_students",
    "unstack_state",
    "verify",
]
