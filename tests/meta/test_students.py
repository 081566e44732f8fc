from dataclasses import replace

import pytest
import torch
from bilevel_problems import learned_loss_problem, relative_distance

from meta import stack_students, unstack_state
from meta.estimators import adjoint, first_order
from meta.optim import SGD, AdamW, Averaged, Clipped


@pytest.mark.parametrize(
    ("optimizer", "carry_momentum"),
    [
        (SGD(0.05, momentum=0.9), True),
        (AdamW(0.01), False),
        (Clipped(SGD(0.05, 0.9), 0.05), True),
        (Averaged(Clipped(AdamW(0.01), 0.05), 0.5), False),
    ],
)
def test_a_stack_gives_the_mean_hypergradient_and_every_students_state(optimizer, carry_momentum):
    alone = [learned_loss_problem(3, optimizer, carry_momentum, seed) for seed in (0, 1)]
    shared = alone[0]
    alone = [
        replace(each, inner_loss=shared.inner_loss, outer_loss=shared.outer_loss, hyper=shared.hyper) for each in alone
    ]
    problem = stack_students(alone)

    singles = [adjoint(one) for one in alone]
    mean = {name: (singles[0].grads[name] + singles[1].grads[name]) / 2 for name in shared.hyper}
    result = adjoint(problem)
    assert relative_distance(result.grads, mean) < 1e-9
    assert relative_distance(first_order(problem, radius=1e-5, central=True).grads, mean) < 1e-4
    for single, state in zip(singles, unstack_state(result.final_state), strict=True):
        assert relative_distance(state.parameters, single.final_state.parameters) < 1e-9
        torch.testing.assert_close(state.buffers, single.final_state.buffers)


def test_students_of_different_kinds_do_not_stack():
    problem = learned_loss_problem()
    other = replace(problem, state=problem.state._replace(optimizer={}))
    with pytest.raises(ValueError, match="do not have the same names"):
        stack_students([problem, other])
    with pytest.raises(ValueError, match="no students"):
        stack_students([])
