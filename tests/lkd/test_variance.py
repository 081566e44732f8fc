"""Distillation as a control variate: the identity, SVRG, least squares in closed form, the streaming estimate."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.variance_problems import LeastSquares, flat_labels, train_svrg
from lkd.balance.rules import GradientMoments, Moment, VarianceOptimalBalance, optimal_share
from lkd.cli import main
from lkd.core.files import read_json
from lkd.evaluation.variance import measure_noise


def test_a_snapshot_teacher_with_its_full_gradient_is_svrg() -> None:
    images, labels = torch.randn(60, 8, dtype=torch.float64), flat_labels(torch.arange(60) % 10).double()
    batches = [torch.randint(60, (5,)) for _ in range(100)]
    ours, svrg = train_svrg((images, labels), torch.zeros(8, 10, dtype=torch.float64), batches, 0.1, 20)
    assert float((ours - svrg).abs().max()) < 1e-10
    assert float(ours.norm()) > 0.1


def test_least_squares_is_as_noisy_as_predicted() -> None:
    problem = LeastSquares(0, 0.3)
    for share in (0.0, 0.5, 1.0):
        predicted = problem.predict(share, 0.02)
        assert problem.simulate(share, 0.02, chains=1000) == pytest.approx(predicted, rel=0.1)
    exact = LeastSquares(0, 0.0)
    assert exact.predict(1.0, 0.02) < 1e-20, "a perfect teacher removes all noise"


def test_streamed_moments_are_those_of_the_whole_sample() -> None:
    g = torch.randn(40, 6, dtype=torch.float64) + 0.5
    h = 0.7 * g + torch.randn(40, 6, dtype=torch.float64)
    moments = GradientMoments()
    for pair in zip(g, h, strict=True):
        moments.add(*pair)
    covariances = [sum(np.cov(a[:, i], b[:, i])[0, 1] for i in range(6)) for a, b in ((g, g), (g, h), (h, h))]
    np.testing.assert_allclose(moments.covariances(), covariances, rtol=1e-9)
    horizon = 3.0
    share, ratio = optimal_share(moments, horizon)
    grid = np.linspace(0, 1, 100001)
    noise = covariances[0] - 2 * grid * covariances[1] + grid**2 * covariances[2]
    noise += grid**2 * (1 + horizon) * moments.squared_bias()
    assert share == pytest.approx(grid[noise.argmin()], abs=1e-4)
    assert ratio == pytest.approx(noise.min() / noise[0], rel=1e-6)
    combined = (g - 0.3 * h).var(0).sum() / g.var(0).sum()
    assert measure_noise(moments, 0.3, -1.0) == pytest.approx(float(combined)), "without what bias costs"


def test_moments_go_on_where_the_gradients_are() -> None:
    """A checkpoint's are on the CPU."""
    saved, moments = GradientMoments(), GradientMoments()
    saved.add(torch.ones(3), torch.ones(3))
    moments.load_state_dict(saved.state_dict())
    moments.add(*torch.ones(2, 3, device="meta"))
    assert {sums.device.type for sums in (*moments.sums, moments.products)} == {"meta"}


def test_limits_of_the_teacher_are_defined() -> None:
    def share_of(control: torch.Tensor) -> tuple[float, float]:
        moments = GradientMoments()
        for g, h in zip(gradients, control, strict=True):
            moments.add(g, h)
        return optimal_share(moments, 10.0)

    gradients = torch.randn(50, 5)
    gradients -= gradients.mean(0)
    assert share_of(gradients) == pytest.approx((1.0, 0.0), abs=1e-5), "a perfect teacher"
    assert share_of(torch.zeros(50, 5)) == (0.0, 1.0), "a teacher that says what the labels say: 0 / 0"
    assert share_of(torch.ones(50, 5) * 3) == pytest.approx((0.0, 1.0), abs=1e-5), "bias alone"
    balance = VarianceOptimalBalance(every=50, samples=50)
    for step, g in enumerate(gradients):
        weight = balance.set_weight(Moment(step, 0.0, 1.0, 1.0, (g, torch.zeros(5))))
    assert weight == pytest.approx(10.0, abs=1e-3), "λ* of 1 would be an infinite weight"


def test_the_command_predicts_what_it_measures(gallery: Path, capsys) -> None:
    shutil.copytree(gallery / "kd", "r")
    assert main(["variance", "--run_dir", "r", "--samples", "200", "--batch_size", "20"]) == 0
    result = read_json(Path("r/variance/variance.json"))
    assert result["predicted"][0] == result["measured"][0] == 1
    np.testing.assert_allclose(result["predicted"], result["measured"], rtol=0.25, atol=0.05)
    assert 0 <= result["optimal_share"] <= 1
    assert result["predicted_ratio"] <= min(result["predicted"]) + 1e-9
    assert Path("r/variance/variance.png").stat().st_size > 1000
    for words, field in ((["r", "--samples", "3"], "samples"), (["nowhere"], "nowhere/config.json")):
        assert main(["variance", "--run_dir", *words]) == 2
        assert field in capsys.readouterr().err
