from dataclasses import replace

import pytest
import torch
from bilevel_problems import learned_loss_problem, relative_distance

from meta import State, rollout, stack_students, unstack_state
from meta.estimators import adjoint, first_order
from meta.optim import SGD, AdamW, Averaged, Clipped, Grouped

CONVOLUTION, OTHERS = Clipped(SGD(0.05, 0.9), 0.05), Clipped(SGD(0.02, 0.9), 0.05)


@pytest.mark.parametrize(
    ("optimizer", "carry_momentum"),
    [
        (SGD(0.05, momentum=0.9), True),
        (AdamW(0.01), False),
        (Clipped(SGD(0.05, 0.9), 0.05), True),
        (Averaged(Clipped(AdamW(0.01), 0.05), 0.5), False),
        (Grouped(lambda name: CONVOLUTION if name.startswith("0") else OTHERS), True),
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


def test_each_student_is_clipped_by_its_own_norm_scalars_and_all():
    """Against autograd through the update, and torch's clipping of each student alone."""
    gradients = {name: torch.randn(shape, dtype=torch.float64) for name, shape in (("w", (2, 3)), ("scale", (2,)))}
    before = State({name: torch.zeros_like(tensor) for name, tensor in gradients.items()}, {}, {})
    clipped, cotangents = Clipped(SGD(1.0), 0.5, stacked=True), {n: torch.randn_like(g) for n, g in gradients.items()}
    moved, pull_back = torch.func.vjp(lambda given: clipped.update(before, given, 0).parameters, gradients)
    found = clipped.adjoint(before, gradients, 0, State(cotangents, {}, {})).gradients
    assert relative_distance(found, pull_back(cotangents)[0]) < 1e-9
    for student in range(2):
        alone = [torch.nn.Parameter(torch.zeros_like(tensor[student])) for tensor in gradients.values()]
        for parameter, tensor in zip(alone, gradients.values(), strict=True):
            parameter.grad = -tensor[student].clone()
        torch.nn.utils.clip_grad_norm_(alone, 0.5)
        for parameter, after in zip(alone, moved.values(), strict=True):
            torch.testing.assert_close(parameter.grad, after[student])


def test_students_of_different_kinds_do_not_stack():
    problem = learned_loss_problem()
    other = replace(problem, state=problem.state._replace(optimizer={}))
    with pytest.raises(ValueError, match="do not have the same names"):
        stack_students([problem, other])
    problem = learned_loss_problem(2, AdamW(0.01), carry_momentum=False)
    problem = replace(problem, state=rollout(problem))
    older = replace(problem, state=rollout(problem))
    with pytest.raises(ValueError, match="different numbers of steps"):
        stack_students([problem, older])
    with pytest.raises(ValueError, match="no students"):
        stack_students([])
