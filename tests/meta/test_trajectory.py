"""Ways to store a trajectory: what they save and what they cost."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from bilevel_problems import MOMENTUM_SGD, learned_loss_problem
from test_estimators import OPTIMIZERS

from meta import Problem, State, Tensors
from meta.estimators import adjoint, first_order
from meta.optim import SGD
from meta.rollout import record
from meta.tensors import cosine_similarity
from meta.trajectory import StoredSteps


def to_float32(problem: Problem) -> Problem:
    def cast(tensors: Tensors) -> Tensors:
        return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}

    state = problem.state
    slots = {slot: cast(tensors) for slot, tensors in state.optimizer.items()}
    batches = [(images.float(), targets) for images, targets in [*problem.inner_batches, problem.outer_batch]]
    return replace(
        problem,
        state=State(cast(state.parameters), cast(state.buffers), slots),
        hyper=cast(problem.hyper),
        inner_batches=batches[:-1],
        outer_batch=batches[-1],
    )


def record_problem(problem: Problem, storage="memory", back="difference"):
    return record(problem, problem.optimizer, back, storage)


def stored_bytes(trajectory) -> int:
    """Size of the memory blocks that parameters, gradients and optimiser state lie in."""
    blocks = trajectory.steps._blocks.items()
    return sum(
        block.nbytes for (tree, *_), block in blocks if tree.startswith(("parameters", "gradients", "optimizer"))
    )


@pytest.mark.parametrize("estimator", [first_order, partial(adjoint, chunk=3)], ids=["first_order", "adjoint"])
@pytest.mark.parametrize("optimizer", ["momentum", "clipped averaged adamw", "grouped"])
def test_bfloat16_differences_keep_the_hypergradient(optimizer, estimator):
    problem = to_float32(learned_loss_problem(20, OPTIMIZERS[optimizer], carry_momentum=False))
    plain, stored = estimator(problem), estimator(problem, storage="bfloat16")
    assert cosine_similarity(stored.grads, plain.grads) > 0.9999
    assert stored.outer_value == plain.outer_value


@pytest.mark.parametrize(
    ("back", "storage", "bytes_each"),
    [
        ("difference", "memory", 8),  # parameters, gradients
        ("central difference", "memory", 4),
        ("graph", "memory", 8),  # parameters, momentum
        ("difference", "bfloat16", 6),
        ("central difference", "bfloat16", 2),
    ],
)
def test_only_what_the_walk_back_reads_is_stored(back, storage, bytes_each):
    problem = to_float32(learned_loss_problem(20))
    parameters = sum(tensor.numel() for tensor in problem.state.parameters.values())
    assert stored_bytes(record_problem(problem, storage, back)) == 20 * parameters * bytes_each


def test_the_oldest_step_makes_room():
    whole = record_problem(to_float32(learned_loss_problem(12))).steps
    last = StoredSteps("memory", 5)
    for step in whole:
        last.append(step)
        assert torch.equal(last[-1].gradients["0.weight"], step.gradients["0.weight"])  # reads in between do no harm
    assert [step.index for step in last] == [7, 8, 9, 10, 11]
    for kept, step in zip(reversed(last), reversed(whole), strict=False):
        torch.testing.assert_close(kept.before.parameters, step.before.parameters, rtol=1e-6, atol=1e-7)


def test_errors_do_not_add_up():
    problem = to_float32(learned_loss_problem(60))
    plain, stored = record_problem(problem, "memory"), record_problem(problem, "bfloat16")
    assert len(stored.steps) == 60
    for index in reversed(range(60)):
        exact, read = plain.steps[index].before.parameters, stored.steps[index].before.parameters
        earlier = plain.steps[max(0, index - 1)].before.parameters
        for name, tensor in exact.items():
            bound = 2**-8 * (tensor - earlier[name]).abs().max() + 60 * 2**-24 * tensor.abs().max()
            assert (read[name] - tensor).abs().max() <= bound


def test_a_fault_is_found_where_it_arose():
    problem = learned_loss_problem(4, SGD(0.05), carry_momentum=False)
    problem.inner_batches[2] = (problem.inner_batches[2][0] * float("inf"), problem.inner_batches[2][1])
    assert first_order(problem, storage="bfloat16").fault.startswith("inner step 2: gradient of")


def test_an_unknown_storage_is_named():
    with pytest.raises(ValueError, match="no storage 'disk'; there are memory, bfloat16"):
        first_order(learned_loss_problem(2, MOMENTUM_SGD), storage="disk")
