"""Words that lead a command line: recipe files, or the values of one field."""

from dataclasses import dataclass, field
from typing import Any

import pytest

from lkd.cli import main, overview
from lkd.config.parse import COMMANDS, POSITIONAL, name_leading, parse_recipe, usage
from lkd.core.errors import UserError


@dataclass
class Listed:
    """Takes any number of folders.

    Args:
        runs: Folders.
        out: A file.
    """

    runs: list[str] = field(default_factory=list)
    out: str = "page.html"


@dataclass
class Single:
    """Takes one loss.

    Args:
        loss: A loss.
    """

    loss: dict[str, Any] | str = "kd"


@pytest.fixture(autouse=True)
def _commands(monkeypatch) -> None:
    monkeypatch.setitem(COMMANDS, "show", (Listed, "show runs"))
    monkeypatch.setitem(COMMANDS, "look", (Single, "look at a loss"))
    monkeypatch.setitem(POSITIONAL, "show", "runs")
    monkeypatch.setitem(POSITIONAL, "look", "loss")


def test_leading_words_fill_a_list() -> None:
    odd = ["a b", "null", "[1, 2]", "3", "{x: 1}", 'q"uote']
    recipe = parse_recipe("show", [*odd, "--out", "o.html"])
    assert (recipe.runs, recipe.out) == (odd, "o.html")
    assert parse_recipe("show", []).runs == []
    assert parse_recipe("show", ["--runs", "[a, b]"]).runs == ["a", "b"]


def test_a_leading_word_is_a_single_value() -> None:
    assert parse_recipe("look", ["runs/x.lkd.safetensors"]).loss == "runs/x.lkd.safetensors"
    assert parse_recipe("look", ["{name: kd, weight: 0.5}"]).loss == {"name": "kd", "weight": 0.5}
    with pytest.raises(UserError, match="loss: one is taken, but 2 are given: a b"):
        parse_recipe("look", ["a", "b"])


def test_recipe_files_stay_what_leads_the_other_commands() -> None:
    assert name_leading(["a.yaml", "b.yaml", "--x", "1"], Single, None) == [
        *("--config", "a.yaml", "--config", "b.yaml", "--x", "1")
    ]


def test_help_and_mistakes_speak_of_them(capsys) -> None:
    assert (usage(Listed, "runs"), usage(Single, "loss")) == ("RUN ...", "LOSS")
    assert main(["show", "--help"]) == 0
    assert "usage: lkd show RUN ... [--key value ...]" in capsys.readouterr().out
    assert "show runs" in overview()
    assert main(["show", "--out", "o.html", "a"]) == 2
    assert "'a' is not an option, nor a value of one; files and folders go before" in capsys.readouterr().err
