"""Seconds and peak memory of a training's steps."""

import sys
import time

import pytest
import torch

from lkd.evaluation.comparison.trials import Cost

CPU = torch.device("cpu")


def test_only_the_blocks_are_timed() -> None:
    cost = Cost(CPU)
    for _ in range(2):
        time.sleep(0.2)
        with cost.measured():
            time.sleep(0.05)
    assert 0.1 <= cost.seconds < 0.3


@pytest.mark.skipif(sys.platform != "linux", reason="measured on Linux only")
def test_the_peak_is_that_of_the_blocks_whatever_came_before() -> None:
    for earlier in (1, 400):
        torch.ones(earlier * 2**18)  # MiB, freed at once
        cost = Cost(CPU)
        torch.ones(200 * 2**18)  # evaluation
        with cost.measured():
            torch.ones(64 * 2**18)
        with cost.measured():
            torch.ones(16 * 2**18)
        assert cost.peak_mib == pytest.approx(64, abs=6)
