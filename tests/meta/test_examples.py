"""The examples, in short."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import example_weights
import lkd_in_one_file
import tuned_optimizer


def test_wrong_labels_lose_their_weight():
    result = example_weights.run(train_size=500, outer_steps=60, train_steps=150)
    assert result.weight_of_wrong < result.weight_of_right - 0.2
    assert result.accuracy_weighted > result.accuracy_unweighted


def test_poor_settings_are_improved():
    result = tuned_optimizer.run(train_size=200, inner_steps=10, outer_steps=20)
    assert result.loss_after < result.loss_before - 0.1
    assert result.tuned[0] > result.start[0]


def test_the_one_file_runs():
    accuracies = lkd_in_one_file.run(lkd_in_one_file.TINY)
    assert list(accuracies) == ["cross-entropy", "KD(0.5, 4)", "KD(0.9, 4)", "learned"]
    assert all(len(seeds) == 2 and all(0 <= entry <= 100 for entry in seeds) for seeds in accuracies.values())
