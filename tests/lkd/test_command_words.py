"""Words that lead a command line: recipe files, or the values of one field."""

from pathlib import Path

import pytest

from lkd.cli import main
from lkd.config import DistillRecipe, TrainRecipe
from lkd.config.parse import make_recipe, parse_recipe, split_files
from lkd.core.errors import UserError


def test_leading_words_fill_a_list_or_a_single_value() -> None:
    odd = ["a b", "null", "[1, 2]", "3", "{x: 1}", 'q"uote']
    recipe = parse_recipe("report", [*odd, "--out", "o.html"])
    assert (recipe.runs, recipe.out) == (odd, "o.html")
    assert parse_recipe("report", ["--runs", "[a, b]"]).runs == ["a", "b"]
    assert parse_recipe("inspect", ["runs/x.lkd.safetensors"]).loss == "runs/x.lkd.safetensors"
    assert parse_recipe("inspect", ["{name: kd, weight: 0.5}"]).loss == {"name": "kd", "weight": 0.5}
    with pytest.raises(UserError, match="loss: one is taken, but 2 are given: a b"):
        parse_recipe("inspect", ["a", "b"])


def test_recipe_files_come_first_or_after_config() -> None:
    files = [Path("a.yaml"), Path("b.yaml"), Path("c.yaml")]
    assert split_files(["a.yaml", "--x", "1", "--config", "b.yaml", "--config=c.yaml"]) == (files, ["--x", "1"])


def test_help_and_mistakes_speak_of_them(capsys) -> None:
    for command, words in (("report", "RUN ..."), ("inspect", "LOSS")):
        assert main([command, "--help"]) == 0
        assert f"usage: lkd {command} {words} [--key value ...]" in capsys.readouterr().out
    assert main(["report", "--out", "o.html", "a"]) == 2
    assert "'a' is not an option, nor a value of one; files and folders go before" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--data.label_noise 2", "data.label_noise: 2 is not a number >=0 and <=1"),
        ("--train.epochs 0", "train.epochs: 0 is not a whole number >0"),
        ("--train.epochs 1.5", "train.epochs: '1.5'"),
        ("--train.momentum nan", "train.momentum: nan"),
        ("--train.milestones [3,0]", "train.milestones: 0"),
        ("--teacher.image_size 4", "teacher.image_size: 4 is not a whole number 0 or >=8"),
    ],
)
def test_a_number_out_of_range_is_one_line_and_code_2(words: str, named: str, capsys) -> None:
    assert main(["distill", *words.split()]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"lkd: error: {named}")
    assert "\n" not in error


def test_plain_values_are_checked_as_the_command_line_is() -> None:
    train = make_recipe(TrainRecipe, {"learning_rate": 1, "epochs": 2}, "train")
    assert (train.learning_rate, type(train.learning_rate), type(train.epochs)) == (1.0, float, int)
    assert make_recipe(DistillRecipe, {"train": {"epochs": 3}, "balance": None}).train.epochs == 3
    for values, named in (
        ({"learning_rate": -1}, "train.learning_rate: -1"),
        ({"epochs": True}, "train.epochs: True"),
        ({"epochs": "3"}, "train.epochs: '3'"),
        ({"epoch": 3}, "'train.epoch'; nearest: epochs"),
        ({"schedule": 3}, "train.schedule: .*3"),
    ):
        with pytest.raises(UserError, match=named):
            make_recipe(TrainRecipe, values, "train")
