"""Spearman's ρ against scipy and its textbook formula; the bootstrap and the ceiling where the answer is known."""

import pytest
import torch

from lkd.core.statistics import (
    bootstrap_correlation,
    correlate,
    noise_ceiling,
    percentile_interval,
    rank,
    spearman,
    split_halves,
)
from lkd.data import seeded_generator


def test_ranks_share_ties() -> None:
    assert rank(torch.tensor([[3.0, 1.0, 3.0, -torch.inf]])).tolist() == [[3.5, 2.0, 3.5, 1.0]]


def test_without_ties_it_is_the_textbook_formula() -> None:
    """1 − 6 Σ d² / (n (n² − 1)), Spearman (1904), with ranks by sorting."""
    a, b = torch.randn(50, 8), torch.randn(50, 8)
    d = (a.argsort(1).argsort(1) - b.argsort(1).argsort(1)).double()
    torch.testing.assert_close(spearman(a, b), 1 - 6 * d.square().sum(1) / (8 * 63))


def test_with_ties_it_is_scipys() -> None:
    stats = pytest.importorskip("scipy.stats")
    a, b = torch.randint(4, (50, 8)).double(), torch.randn(50, 8).double().round()
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a.numpy(), b.numpy(), strict=True)]
    torch.testing.assert_close(spearman(a, b), torch.tensor(expected, dtype=torch.float64))


def test_only_the_order_counts_and_a_constant_ranks_nothing() -> None:
    a, b = torch.randn(7).double(), torch.randn(7).double()
    assert spearman(a.exp(), b * 3 - 1) == spearman(a, b)
    assert spearman(a, -a) == -1
    assert spearman(a, torch.ones(7)) == 0


def test_what_the_columns_share_is_no_noise() -> None:
    """Seeds that are better or worse as a whole do not blur a ranking within each."""
    truth = torch.arange(6.0).double()
    seeds = truth + 100 * torch.randn(5, 1).double()
    assert correlate(seeds, truth.expand(3, 6)) == 1
    draws = bootstrap_correlation(seeds, truth.expand(3, 6), 200, seeded_generator(0))
    assert percentile_interval(draws) == (1, 1)
    assert noise_ceiling(seeds, 200, seeded_generator(0)) == (1, 1, 1)


def test_the_interval_covers_the_true_correlation() -> None:
    """Of 100 noisy measurements of a ranking whose ρ is known, the interval holds it in most."""
    a, b = torch.arange(8.0).double(), torch.tensor([1.0, 0, 3, 2, 5, 7, 4, 6]).double()
    true, held = float(spearman(a, b)), 0
    for number in range(100):
        noisy = [mean + 1.5 * torch.randn(8, 8).double() for mean in (a, b)]
        low, high = percentile_interval(bootstrap_correlation(*noisy, 300, seeded_generator(number)))
        assert -1 <= low < high <= 1
        held += low <= true <= high
    assert held >= 85


def test_halves_are_disjoint_and_each_split_comes_once() -> None:
    assert [len(split_halves(count)) for count in (2, 3, 4, 5, 6)] == [1, 3, 3, 15, 10]
    for first, second in split_halves(7):
        assert len(first) == len(second) == 3
        assert not set(first) & set(second)


def test_noise_alone_has_no_ceiling() -> None:
    ceilings = [noise_ceiling(torch.randn(4, 8).double(), 300, seeded_generator(n)) for n in range(20)]
    assert abs(sum(mean for mean, _, _ in ceilings) / 20) < 0.15
    assert all(low < 0.2 and high - low > 0.3 for _, low, high in ceilings)
