"""Evidence of trouble that users of other projects report: run every case, keep the counts in docs/evidence/outside.

python benchmarks/outside.py [TESTS ... | --check]

A case is a test that is marked `outside(line)`, by the line of the list of troubles that it is an example or a sibling
of. Given files or folders of tests, only their cases are run, and nothing is kept.
--check runs those of one file, and compares their outcomes with the committed ones.
"""

import csv
import sys
from pathlib import Path
from typing import Any

import pytest
from checking import check
from rows import read_rows

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from lkd.core.files import environment, write_json, write_text
from lkd.tracking.run import evidence

FOLDER = ROOT / "docs" / "evidence" / "outside"
SECTIONS = {"A": range(1, 18), "B": range(18, 43), "C": range(43, 49)}
README = """# Trouble from outside

Made by `python benchmarks/outside.py`: {cases} cases of {lines} kinds of trouble that users of distillation, vision and
bi-level code report in public, and what was found beside them; each is a test that is marked `outside(line)`.

Sections A (wrong in silence) and C (engine and losses): {held} held, which is the right value or one line that stops;
{silent_wrong} did not. Section B (refused where it should work): {works} work, {tracebacks} do not. Skipped, for want
of a package or a device: {skipped}.

What it does not show: trouble that nobody has reported yet, other machines, other versions of the packages.

`result.json`: the figures; `cases.csv`: every case.
"""


class Recorder:
    """A plugin of pytest that keeps the line and the outcome of every marked test."""

    def __init__(self) -> None:
        self.lines: dict[str, list[int]] = {}
        self.outcomes: dict[str, str] = {}

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            self.lines[item.nodeid] = [int(marker.args[0]) for marker in item.iter_markers("outside")]

    def pytest_runtest_logreport(self, report: Any) -> None:
        said = report.when == "call" or report.outcome != "passed"  # a fixture that fails is a case that fails
        if said and self.outcomes.get(report.nodeid) != "failed":
            self.outcomes[report.nodeid] = report.outcome

    def list_cases(self) -> list[dict[str, Any]]:
        """A row for every line of every test."""
        section = {line: name for name, lines in SECTIONS.items() for line in lines}
        pairs = [(line, test, self.outcomes.get(test, "failed")) for test in self.lines for line in self.lines[test]]
        return [{"line": n, "section": section[n], "test": test, "outcome": outcome} for n, test, outcome in pairs]


def count_cases(cases: list[dict[str, Any]]) -> dict[str, float]:
    """The figures."""

    def count(outcome: str, *sections: str) -> int:
        return sum(case["outcome"] == outcome and case["section"] in sections for case in cases)

    return {
        "cases": len(cases),
        "held": count("passed", "A", "C"),
        "works": count("passed", "B"),
        "silent_wrong": count("failed", "A", "C"),
        "tracebacks": count("failed", "B"),
        "skipped": count("skipped", *SECTIONS),
    }


def main(paths: list[str]) -> int:
    only_check = "--check" in paths
    paths = [str(path) for path in (ROOT / "tests" / "lkd").glob("test_outside_*.py")] if only_check else paths
    recorder = Recorder()
    words = ["-m", "outside", "-q", "-n", "0", "-p", "no:cacheprovider", *(paths or [str(ROOT / "tests")])]
    status = pytest.main(words, plugins=[recorder])
    cases = sorted(recorder.list_cases(), key=lambda case: (case["line"], case["test"]))
    if only_check:
        committed = {row["test"]: row["outcome"] for row in read_rows(FOLDER / "cases.csv")}
        made = {case["test"]: case["outcome"] for case in cases}
        return check({test: committed.get(test, "missing") for test in made}, made) or int(status)
    figures, tested = count_cases(cases), {case["line"] for case in cases}
    print(*(f"{name}: {figure}" for name, figure in figures.items()), sep="\n")
    missing = [str(line) for lines in SECTIONS.values() for line in lines if line not in tested]
    print(f"lines without a test: {', '.join(missing) or 'none'}")
    if not paths:
        FOLDER.mkdir(parents=True, exist_ok=True)
        write_json(FOLDER / "result.json", evidence("python benchmarks/outside.py", environment(), figures))
        with (FOLDER / "cases.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["line", "section", "test", "outcome"])
            writer.writeheader()
            writer.writerows(cases)
        write_text(FOLDER / "README.md", README.format(lines=len(tested), **figures))
    return int(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
