"""betty's way to solve the benchmark's problem: its DARTS hypergradient, which sees the last inner step only."""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from hypergradient_problem import Problem


def run_betty(problem: "Problem", learning_rate: float, momentum: float) -> dict[str, Tensor]:
    """Take K inner steps and one outer step with betty; return the outer gradient that its optimiser is given."""
    from betty.configs import Config, EngineConfig
    from betty.engine import Engine
    from betty.problems import ImplicitProblem

    logging.disable(logging.INFO)
    found: dict[str, Tensor] = {}

    class Student(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return problem.loss(self.module(batch[0]), dict(self.outer.module.named_parameters()), batch)

    class Outer(ImplicitProblem):
        def training_step(self, batch: Any) -> Tensor:
            return F.cross_entropy(self.student(batch[0]), batch[1])

        def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            found.update({name: tensor.grad for name, tensor in self.module.named_parameters()})

    steps = len(problem.inner_batches)
    weights = nn.ParameterDict({name: tensor.clone() for name, tensor in problem.hyper.items()})
    outer = Outer(
        name="outer",
        config=Config(first_order=True),
        module=weights,
        optimizer=torch.optim.SGD(weights.parameters(), lr=0.0),
        train_data_loader=[problem.outer_batch],
        device="cpu",
    )
    student = Student(
        name="student",
        config=Config(type="darts", unroll_steps=steps),
        module=problem.net,
        optimizer=torch.optim.SGD(problem.net.parameters(), lr=learning_rate, momentum=momentum),
        train_data_loader=problem.inner_batches,
        device="cpu",
    )
    dependencies = {"u2l": {outer: [student]}, "l2u": {student: [outer]}}
    Engine(config=EngineConfig(train_iters=steps), problems=[outer, student], dependencies=dependencies).run()
    return found
