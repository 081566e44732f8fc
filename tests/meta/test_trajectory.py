"""Ways to store a trajectory: what they save and what they cost."""

from functools import partial

import pytest
import torch
from bilevel_problems import MOMENTUM_SGD, Problem, learned_loss_problem
from test_estimators import OPTIMIZERS

from meta import State
from meta.estimators import adjoint, first_order, truncated
from meta.optim import SGD
from meta.rollout import record
from meta.tensors import cosine_similarity
from meta.types import Tensors


def to_float32(problem: Problem) -> Problem:
    def cast(tensors: Tensors) -> Tensors:
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    state = problem.state
    slots = {slot: cast(tensors) for slot, tensors in state.optimizer.items()}
    batches = [(images.float(), targets) for images, targets in [*problem.inner_batches, problem.outer_batch]]
    return problem._replace(
        state=State(cast(state.parameters), cast(state.buffers), slots),
        hyper=cast(problem.hyper),
        inner_batches=batches[:-1],
        outer_batch=batches[-1],
    )


def record_problem(problem: Problem, storage):
    inner_loss, _, state, hyper, batches, _, optimizer = problem
    return record(inner_loss, state, hyper, batches, optimizer, storage=storage)


def stored_bytes(trajectory) -> int:
    """Size of the memory blocks that the steps lie in, buffers and batches aside."""
    blocks = {}
    for step in trajectory.steps._stored:
        for tree in (step.before.parameters, step.gradients, *step.before.optimizer.values()):
            blocks |= {
                tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tree.values()
            }
    return sum(blocks.values())


@pytest.mark.parametrize("estimator", [first_order, partial(adjoint, chunk=3)], ids=["first_order", "adjoint"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_bfloat16_differences_keep_the_hypergradient(optimizer, estimator):
    problem = to_float32(learned_loss_problem(20, OPTIMIZERS[optimizer], carry_momentum=False))
    plain, stored = estimator(*problem), estimator(*problem, storage="bfloat16")
    assert cosine_similarity(stored.grads, plain.grads) > 0.9999
    assert stored.outer_value == plain.outer_value


@pytest.mark.parametrize("estimator", [first_order, adjoint])
def test_pinned_memory_changes_nothing_on_the_cpu(estimator):
    problem = learned_loss_problem(5)
    plain, stored = estimator(*problem), truncated(*problem, steps=5, estimator=partial(estimator, storage="cpu"))
    assert all(torch.equal(tensor, plain.grads[name]) for name, tensor in stored.grads.items())


def test_bfloat16_differences_save_a_third():
    problem = to_float32(learned_loss_problem(20))
    plain, stored = record_problem(problem, "memory"), record_problem(problem, "bfloat16")
    assert stored_bytes(stored) == stored_bytes(plain) * 8 // 12


def test_errors_do_not_add_up():
    problem = to_float32(learned_loss_problem(200))
    plain, stored = record_problem(problem, "memory"), record_problem(problem, "bfloat16")
    assert len(stored.steps) == 200
    for index in reversed(range(200)):
        exact, read = plain.steps[index].before.parameters, stored.steps[index].before.parameters
        earlier = plain.steps[max(0, index - 1)].before.parameters
        for name, tensor in exact.items():
            bound = 2**-8 * (tensor - earlier[name]).abs().max() + 200 * 2**-24 * tensor.abs().max()
            assert (read[name] - tensor).abs().max() <= bound
    assert [step.index for step in stored.steps[:3]] == [0, 1, 2]


@pytest.mark.parametrize("storage", ["memory", "bfloat16"])
def test_a_fault_is_found_where_it_arose(storage):
    problem = learned_loss_problem(4, SGD(0.05), carry_momentum=False)
    problem.inner_batches[2] = (problem.inner_batches[2][0] * float("inf"), problem.inner_batches[2][1])
    assert first_order(*problem, storage=storage).fault.startswith("inner step 2: gradient of")


def test_an_unknown_storage_is_named():
    with pytest.raises(ValueError, match="no storage 'disk'; there are memory, cpu, bfloat16"):
        first_order(*learned_loss_problem(2, MOMENTUM_SGD), storage="disk")
