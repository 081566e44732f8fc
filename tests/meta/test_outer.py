import pytest
import torch
from torch import nn

from meta import Hypergradient, State, outer_step


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
