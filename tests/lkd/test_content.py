"""What objects of a caller's are told apart by."""

import numpy as np
import pytest
import torch
from torch import nn

from lkd.api import name_loss, name_student, name_teacher


class Scaled(nn.Module):
    """A loss that holds a number."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale

    def forward(self, student, teacher, target):
        return self.scale * (student.logits - teacher.logits).square().mean()


class Callable:
    """The same, no module."""

    def __init__(self, scale) -> None:
        self.scale = scale

    def __call__(self, student, teacher, target):
        return self.scale * (student.logits - teacher.logits).square().mean()


def scale_by(scale: float):
    """A function of this module under a name that another function refers to."""

    def helper(difference):
        return scale * difference

    return helper


HELPER = scale_by(1.0)


def test_a_loss_is_known_by_what_a_comprehension_in_it_calls(monkeypatch) -> None:
    def loss(student, teacher, target):
        return sum(HELPER(s - t).square().mean() for s, t in zip(student.logits, teacher.logits, strict=True))

    first = name_loss(loss, {})
    monkeypatch.setitem(globals(), "HELPER", scale_by(2.0))
    assert name_loss(loss, {}) != first


HOLDERS = {
    "a module": Scaled,
    "an object": Callable,
    "a method": lambda scale: Callable(scale).__call__,
    "a function around a module": lambda scale: lambda s, t, target: Scaled(scale)(s, t, target),
    "a function around a module that it was given": lambda scale, inner=Scaled: (
        lambda loss: lambda s, t, target: loss(s, t, target)
    )(inner(scale)),
    "a list": lambda scale: Callable([scale, {"s": np.float32(scale)}]),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_loss_is_known_by_what_it_holds(holder: str) -> None:
    first, again, other = (name_loss(HOLDERS[holder](scale), {}) for scale in (1.0, 1.0, 2.0))
    assert first == again != other


def test_a_teacher_is_known_by_what_it_holds_and_a_student_by_all_but_its_weights() -> None:
    def make(rate: float, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        network = nn.Sequential(nn.Linear(4, 3), nn.Dropout(rate))
        network.parent, network[1].sizes = [network], [(1, 2), {"rate": {rate}}]
        return network

    assert name_teacher(make(0.1, 0), {}) == name_teacher(make(0.1, 0), {})
    assert len({name_teacher(make(*own), {}).path for own in ((0.1, 0), (0.2, 0), (0.1, 1))}) == 3
    students = [name_student(make(*own), {}).name for own in ((0.1, 0), (0.1, 1), (0.2, 0))]
    assert students[0] == students[1] != students[2]
