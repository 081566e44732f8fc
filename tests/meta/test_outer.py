"""The outer step, of one process and of two."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from meta import Hypergradient, State, outer_step
from tests.processes import FORK


def make(gradient: float, value: float = 1.0) -> Hypergradient:
    grads = {"weight": torch.full((4,), gradient)}
    return Hypergradient(torch.tensor(value), grads, State({}, {}, {}), grads["weight"].norm())


def run(hypergradients: list[Hypergradient], clip_norm: float | None = None):
    weight = nn.Parameter(torch.zeros(4))
    return outer_step(hypergradients, {"weight": weight}, torch.optim.SGD([weight], lr=1.0), clip_norm), weight


def test_students_are_averaged():
    step, weight = run([make(1.0, value=2.0), make(3.0, value=4.0)])
    assert torch.equal(weight.detach(), torch.full((4,), -2.0))
    assert step[:6] == (3.0, 4.0, False, False, (), 2.0)  # hypergradients 1 and 3 in four places: mean norm 4, error 2


def test_the_average_is_clipped():
    step, weight = run([make(1.0), make(3.0)], clip_norm=1.0)
    assert step.clipped
    assert step.norm == 4.0
    assert weight.detach().norm().item() == pytest.approx(1.0, rel=1e-5)


def test_a_student_that_is_not_finite_is_left_out_and_named():
    step, weight = run([make(1.0), make(float("nan")), make(1.0, value=float("inf"))])
    assert torch.equal(weight.detach(), torch.full((4,), -1.0))
    assert step.left_out == ("1: weight", "2: outer value")
    assert not step.skipped


def test_nothing_moves_when_no_student_is_finite():
    step, weight = run([make(float("inf"))])
    assert step.skipped
    assert torch.equal(weight.detach(), torch.zeros(4))


def test_mismatched_names_are_an_error():
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with pytest.raises(ValueError, match="other, weight"):
        outer_step([make(1.0)], {"other": weight}, optimizer, None)
    with pytest.raises(ValueError, match="at least one"):
        outer_step([], {"weight": weight}, optimizer, None)


def test_what_is_too_large_is_left_out_and_touches_no_moment():
    weight = torch.nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.Adam([weight], lr=1.0)
    step = outer_step([make(1.0), make(1e3)], {"weight": weight}, optimizer, bound=100.0)
    assert step.left_out == ("1: norm 2e+03 > 100",)
    assert step.norms == (2.0,)
    moments = {name: tensor.clone() for name, tensor in optimizer.state[weight].items()}
    for gradient, bound in ((1e3, 100.0), (float("nan"), 100.0), (3e38, float("inf"))):  # the last has no finite norm
        assert outer_step([make(gradient)], {"weight": weight}, optimizer, clip_norm=1.0, bound=bound).skipped
    for name, tensor in optimizer.state[weight].items():
        assert torch.equal(tensor, moments[name])


# Two gloo processes.


def draw(student: int) -> Hypergradient:
    generator = torch.Generator().manual_seed(student)
    grads = {name: torch.randn(shape, generator=generator) for name, shape in {"weight": (3, 2), "bias": (3,)}.items()}
    if student == 2:
        grads["bias"][0] = float("nan")
    return Hypergradient(torch.tensor(float(student)), grads, State({}, {}, {}), torch.tensor(1.0))


def step(students: list[int]) -> tuple[torch.Tensor, float, float]:
    parameters = {"weight": nn.Parameter(torch.ones(3, 2)), "bias": nn.Parameter(torch.ones(3))}
    optimizer = torch.optim.SGD(parameters.values(), lr=0.5)
    done = outer_step([draw(student) for student in students], parameters, optimizer, clip_norm=1.0)
    return torch.cat([parameter.detach().flatten() for parameter in parameters.values()]), done.value, done.norm


def work(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    torch.save(step([0, 1] if rank == 0 else [2, 3]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    processes = [FORK.Process(target=work, args=(rank, str(tmp_path))) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    parameters, value, norm = step([0, 1, 2, 3])
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found[0], parameters)
        assert found[1] == value
        assert abs(found[2] - norm) < 1e-6
