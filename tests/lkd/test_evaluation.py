"""Accuracy and calibration against independent computations."""

from dataclasses import replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from lkd.data import load_dataset
from lkd.losses.functions import calibrated_cross_entropy, expected_calibration_error, find_best_temperature
from lkd.models import build
from lkd.training.evaluate import evaluate


def test_best_temperature_equals_a_dense_search() -> None:
    logits = 6 * torch.randn(500, 10, dtype=torch.float64)
    target = torch.where(torch.rand(500) < 0.6, logits.argmax(1), torch.randint(10, (500,)))
    grid = torch.logspace(-1, 1, 2001, dtype=torch.float64)
    values = torch.stack([cross_entropy(logits / t, target) for t in grid])
    assert find_best_temperature(logits, target) == pytest.approx(float(grid[values.argmin()]), rel=2e-3)


def test_calibrated_cross_entropy_has_the_exact_gradient() -> None:
    """The temperature moves with the logits, but at its minimum that does not count."""
    logits = (3 * torch.randn(40, 5, dtype=torch.float64)).requires_grad_()
    target = logits.argmax(1).roll(1)
    target[:25] = logits.argmax(1)[:25]
    (gradient,) = torch.autograd.grad(calibrated_cross_entropy(logits, target), logits)
    direction = torch.randn_like(logits)
    step = 1e-3
    with torch.no_grad():
        ahead, behind = (calibrated_cross_entropy(logits + s * direction, target) for s in (step, -step))
    assert float((gradient * direction).sum()) == pytest.approx(float(ahead - behind) / (2 * step), rel=1e-4)


def test_calibration_error_of_known_cases() -> None:
    always_sure = torch.tensor([[1.0, 0.0]]).repeat(10, 1)
    target = torch.tensor([0] * 7 + [1] * 3)
    assert expected_calibration_error(always_sure, target) == pytest.approx(0.3)
    assert expected_calibration_error(torch.tensor([[0.7, 0.3]]).repeat(10, 1), target) == pytest.approx(0, abs=1e-6)


def test_evaluate_counts_every_image_once_and_restores_the_mode() -> None:
    images = replace(load_dataset("embedded").test.select(torch.arange(777)), at_once=100)
    network = build("small_cnn", 10, 1).train()
    figures = evaluate(network, images, torch.device("cpu"))
    assert network.training
    with torch.no_grad():
        logits = network.eval()(images.normalize(images.images)).logits
    assert figures["top1"] == pytest.approx(100 * (logits.argmax(1) == images.labels).double().mean().item())
    hits = [label in row.topk(5).indices for row, label in zip(logits, images.labels, strict=True)]
    assert figures["top5"] == pytest.approx(100 * sum(hits) / 777)
    assert figures["cross_entropy"] == pytest.approx(float(cross_entropy(logits, images.labels)), rel=1e-5)
