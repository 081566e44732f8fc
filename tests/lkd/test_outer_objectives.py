"""Outer objectives against their definitions, written another way."""

import pytest
import torch

from lkd.meta_training.rollouts import OBJECTIVES, brier_score, smoothed_error


def test_brier_score_is_a_sum_over_samples_and_classes() -> None:
    logits, target = torch.randn(4, 3, dtype=torch.float64), [2, 0, 1, 1]
    total = 0.0
    for row, label in zip(logits.tolist(), target, strict=True):
        powers = [2.718281828459045**value for value in row]
        total += sum((power / sum(powers) - (label == c)) ** 2 for c, power in enumerate(powers))
    assert brier_score(logits, torch.tensor(target)).item() == pytest.approx(total / 4, rel=1e-12)


def test_brier_score_is_proper() -> None:
    """In expectation over labels it is least at the labels' own distribution: its gradient is zero there."""
    truth = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    logits = truth.log().requires_grad_()
    expected = sum(p * brier_score(logits.unsqueeze(0), torch.tensor([label])) for label, p in enumerate(truth))
    (gradient,) = torch.autograd.grad(expected, logits)
    assert gradient.abs().max() < 1e-15


def test_smoothed_error_becomes_the_error_rate() -> None:
    logits, target = torch.randn(200, 5, dtype=torch.float64), torch.randint(5, (200,))
    error = (logits.argmax(1) != target).double().mean()
    assert smoothed_error(logits, target, temperature=1e-6).item() == pytest.approx(error.item(), abs=1e-6)
    two = torch.tensor([[1.0, 0.0]])
    assert smoothed_error(two, torch.tensor([1])).item() == pytest.approx(1 / (1 + 2.718281828**-1.0))


@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("classes", [2, 7])
def test_objectives_have_the_gradient_of_finite_differences_and_ignore_shifts(name: str, classes: int) -> None:
    objective, target = OBJECTIVES[name], torch.randint(classes, (30,))
    logits = torch.randn(30, classes, dtype=torch.float64, requires_grad=True)
    value = objective(logits, target)
    (gradient,) = torch.autograd.grad(value, logits)
    direction = torch.randn_like(logits)
    with torch.no_grad():
        ahead, behind = (objective(logits + step * direction, target) for step in (1e-5, -1e-5))
        shifted = objective(logits + torch.randn(30, 1, dtype=torch.float64), target)
    assert ((ahead - behind) / 2e-5).item() == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-7)
    assert shifted.item() == pytest.approx(value.item(), rel=1e-9)
