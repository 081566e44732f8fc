"""How students are drawn by age."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from lkd.config import PoolSettings
from lkd.core.errors import UserError
from lkd.core.random import seeded_generator
from lkd.pool.sampling import build_age_weights, check_sampling, draw_position, find_drawable_ages

AGES = torch.tensor([0, 0.25, 0.5] * 2, dtype=torch.float64)  # of two trainings


def draw_ages(settings: PoolSettings, count: int = 600) -> list[float]:
    weights = build_age_weights(settings)
    draws = (draw_position(weights(AGES, n), seeded_generator(0, n)) for n in range(count))
    return [AGES[position].item() for position in draws]


@pytest.mark.parametrize("sampling", ["uniform", "live"])
def test_every_student_is_drawn_equally_often(sampling) -> None:
    settings = PoolSettings(sampling=sampling)
    weights = build_age_weights(settings)
    counts = Counter(draw_position(weights(AGES, n), seeded_generator(0, n)) for n in range(600))
    assert all(70 < counts[position] < 130 for position in range(6))


def test_gaussian_sampling_follows_the_bell() -> None:
    settings = PoolSettings(sampling="gaussian", gaussian_age=0.25, gaussian_spread=0.25)
    counts = Counter(draw_ages(settings))
    side = math.exp(-0.5) / (1 + 2 * math.exp(-0.5))
    for age, share in ((0, side), (0.25, 1 - 2 * side), (0.5, side)):
        assert counts[age] == pytest.approx(600 * share, abs=4 * math.sqrt(600 * share * (1 - share)))
    narrow = PoolSettings(sampling="gaussian", gaussian_age=0.3, gaussian_spread=1e-9)
    assert set(draw_ages(narrow, 20)) == {0.25}


def test_fixed_steps_walk_through_the_ages_and_all_trainings() -> None:
    settings = PoolSettings(sampling="fixed_step")
    assert draw_ages(settings, 7) == [0, 0.25, 0.5, 0, 0.25, 0.5, 0]
    weights = build_age_weights(settings)
    assert {draw_position(weights(AGES, 1), seeded_generator(n)) for n in range(30)} == {1, 4}


def test_latest_is_the_oldest_age() -> None:
    assert set(draw_ages(PoolSettings(sampling="latest"), 20)) == {0.5}


def test_fidelity_interpolates_what_the_file_says() -> None:
    Path("fidelity.json").write_text(json.dumps({"age_weights": [[0.4, 0.0], [0.1, 0.9], [0.2, 0.5]], "rows": []}))
    settings = PoolSettings(sampling="fidelity", fidelity_file="fidelity.json")
    ages = torch.tensor([0, 0.1, 0.13, 0.2, 0.39, 0.4, 1.0], dtype=torch.float64)
    expected = np.interp(ages.numpy(), [0.1, 0.2, 0.4], [0.9, 0.5, 0.0])
    np.testing.assert_allclose(build_age_weights(settings)(ages, 0).numpy(), expected, atol=1e-12)
    assert find_drawable_ages(build_age_weights(settings), AGES).tolist() == [0, 0.25]
    with pytest.raises(UserError, match=r"gives no weight to any age of the pool \(0.5 to 1\)"):
        check_sampling(settings, torch.tensor([0.5, 1.0], dtype=torch.float64))
    Path("fidelity.json").write_text(json.dumps({"age_weights": [[0.1, 2.0]]}))
    assert build_age_weights(settings)(AGES, 0).tolist() == [2.0] * 6


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "fidelity.json: no such file; `lkd fidelity` writes it"),
        ("{", "is not valid JSON"),
        ("{}", "has no `age_weights`"),
        ('{"age_weights": []}', "has no `age_weights`"),
        ('{"age_weights": [[0, -1]]}', "weight of at least 0"),
        ('{"age_weights": [[0, NaN]]}', "weight of at least 0"),
        ('{"age_weights": [[0, 1], [0, 2]]}', "each age once"),
        ('{"age_weights": [0, 1, 2]}', "has no `age_weights`"),
    ],
)
def test_bad_fidelity_files_are_refused(content, message: str) -> None:
    if content is not None:
        Path("fidelity.json").write_text(content)
    with pytest.raises(UserError, match=message):
        build_age_weights(PoolSettings(sampling="fidelity", fidelity_file="fidelity.json"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": "gaussian", "gaussian_age": 0.7}, "gaussian_age: 0.7 is outside the pool.*from 0 to 0.5"),
        ({"sampling": "fidelity"}, "fidelity_file: missing"),
    ],
)
def test_impossible_sampling_is_refused(settings, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_sampling(PoolSettings(**settings), AGES)
