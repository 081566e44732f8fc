"""The comparison's table in its forms, and published numbers beside ours."""

import csv
import io
import re
from pathlib import Path

import pytest

from lkd.evaluation.comparison.tables import (
    find_published,
    format_csv,
    format_latex,
    list_rows,
    plot_table,
    read_published,
    summarize,
    tabulate,
)
from lkd.losses.build import LOSSES

METHODS = {"KD": [80.0, 82.0, 81.0], "A&B_100%": [81.0, 83.5, 81.5], "CE": [79.0, 80.0, 78.0]}


def table(published: dict | None = None, seeds: int = 3) -> list[dict]:
    rows = [
        {
            "student": student,
            "method": method,
            "loss": method,
            "seed": seed,
            "last": {"top1": top1},
            "best": {"top1": top1},
            "steps_per_second": 100.0 + seed,
            "loss_parameters": 1234,
            "peak_mib": None if method == "CE" else 10.0 + seed,
        }
        for student in ("s_1", "s_2")
        for method, tops in METHODS.items()
        for seed, top1 in enumerate(tops[:seeds])
    ]
    return [row | {"tuned_over": 8, "published": published} for row in summarize(rows, "KD")]


def test_the_interval_is_that_of_the_paired_difference() -> None:
    row = table()[1]
    half = 4.302653 * 0.288675  # t of two degrees of freedom × standard error of 1, 1.5, 0.5
    assert row["difference"] == pytest.approx((1.0, 0.288675), abs=1e-5)
    assert row["interval"] == pytest.approx((1 - half, 1 + half), abs=1e-5)
    assert (row["steps_per_second"], row["peak_mib"]) == (101.0, 11.0)


def test_published_numbers_stand_beside_ours_only_where_there_are_any() -> None:
    header, *rows = tabulate(table(), "KD")
    assert "published %" not in header
    assert all(len(row) == len(header) for row in rows)
    header, *rows = tabulate(table({"accuracy": 73.33, "source": "a table"}), "KD")
    assert header[-1] == "published %"
    assert {row[-1] for row in rows} == {"73.33"}


def test_latex_is_escaped_and_rectangular() -> None:
    latex = format_latex(tabulate(table(), "KD"), ["100 % of it"])
    body = [line for line in latex.splitlines() if line.endswith(r"\\")]
    assert len(body) == 1 + 6
    assert {len(re.findall(r"(?<!\\)&", line)) for line in body} == {10}
    assert r"A\&B\_100\%" in latex
    assert r"$+$" not in latex
    assert r"$\pm$" in latex
    assert all(line.startswith("%") or not re.search(r"(?<!\\)[%#_]|[−±]", line) for line in latex.splitlines())
    assert latex.count(r"\midrule") == 2, "one below the header, one between the students"


def test_csv_holds_numbers() -> None:
    rows = list(csv.DictReader(io.StringIO(format_csv(list_rows(table(seeds=1))))))
    assert float(rows[1]["last"]) == 81.0
    assert rows[1]["interval_low"] == rows[2]["peak_mib"] == "", "nothing where nothing is known"
    rows = list(csv.DictReader(io.StringIO(format_csv(list_rows(table())))))
    assert float(rows[1]["interval_low"]) < float(rows[1]["difference"]) < float(rows[1]["interval_high"])


@pytest.mark.parametrize("seeds", [1, 3])
def test_the_picture_is_drawn(seeds: int) -> None:
    plot_table(table(seeds=seeds), "KD", Path("comparison.png"))
    assert Path("comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_published_number_needs_the_whole_protocol(tmp_path: Path) -> None:
    path = tmp_path / "published.csv"
    path.write_text("data,teacher,student,epochs,loss,accuracy,source\ncifar100,wrn_40_2,wrn-16-2,240,kd,74.9,here\n")
    protocol = ("cifar100", "wrn_40_2", "wrn_16_2", 240, "kd")
    assert find_published(*protocol, path=path) == {"accuracy": 74.9, "source": "here"}
    for place, other in enumerate(("cifar10", "wrn_16_2", "wrn_40_2", 13, "dkd")):
        changed = (*protocol[:place], other, *protocol[place + 1 :])
        assert find_published(*changed, path=path) is None


def test_the_published_numbers_are_of_known_losses_with_their_sources() -> None:
    rows = read_published()
    assert len({(row["teacher"], row["student"], row["loss"]) for row in rows}) == len(rows) > 20
    for row in rows:
        assert row["loss"] in LOSSES
        assert 60 < float(row["accuracy"]) < 80
        assert ";" in row["source"], "two public sources"
