"""Measure the house: files, lines, arrows, the trip of a step, the suite's time and coverage.

    python benchmarks/house.py [--root CHECKOUT] [--suite XML] [--coverage JSON] [--ci_seconds N] [--before | --check]

prints the figures of a checkout and merges them into docs/evidence/house/result.json; with `--before` under names that
end in `_before`. What is not given (the suite's time, say) is left as it was there. The suite's file is what
`python -m pytest --junitxml FILE` writes, the coverage's what `coverage json` writes of a run with `--branch`.
--check counts anew, and compares with what is committed.
"""

import argparse
import ast
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))
FOLDER = HERE / "docs" / "evidence" / "house"
LONG = 500


def list_sources(root: Path, folder: str) -> list[Path]:
    """The Python files of a folder that git knows."""
    names = subprocess.run(
        ["git", "-C", str(root), "ls-files", folder], capture_output=True, text=True, check=True
    ).stdout
    return [root / name for name in names.splitlines() if name.endswith(".py")]


def count_lines(path: Path) -> int:
    """All lines of a file."""
    return path.read_text().count("\n")


def count_code_lines(path: Path) -> int:
    """The lines of a file that are neither blank nor comment nor docstring."""
    text = path.read_text()
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, documented) and ast.get_docstring(node, clean=False) is not None:
            docstrings.update(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = enumerate(map(str.strip, text.splitlines()), 1)
    return sum(bool(line) and not line.startswith("#") and number not in docstrings for number, line in lines)


def measure_sources(root: Path) -> dict[str, float]:
    """What can be counted without running anything."""
    lkd = list_sources(root, "lkd")
    entries = {path.relative_to(root / "lkd").parts[0] for path in lkd}
    return {
        "lkd_files": len(lkd),
        "lkd_top_level_entries": len(entries),
        "lkd_lines": sum(map(count_lines, lkd)),
        "lkd_code_lines": sum(map(count_code_lines, lkd)),
        "files_over_500": sum(count_lines(path) > LONG for path in lkd),
        "meta_lines": sum(map(count_lines, list_sources(root, "meta"))),
        "tests_lines": sum(map(count_lines, list_sources(root, "tests"))),
    }


def measure_structure() -> dict[str, float]:
    """Circles, wrong arrows, and the trip of a step, of the checkout that this script stands in."""
    from tests import house

    return {
        "import_circles": len(house.find_circles()),
        "wrong_arrows": len(house.find_wrong_arrows()),
        "files_a_distill_step_visits": len(house.list_files_of_a_step()),
    }


def read_suite(path: Path) -> dict[str, float]:
    """Seconds and tests of a run of the suite."""
    suite = ElementTree.parse(path).getroot().find("testsuite")
    assert suite is not None
    return {"pytest_seconds": round(float(suite.attrib["time"])), "pytest_tests": int(suite.attrib["tests"])}


def read_coverage(path: Path) -> float:
    """Percent of lines and branches together."""
    return round(json.loads(path.read_text())["totals"]["percent_covered"], 2)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", type=Path, default=HERE)
    parser.add_argument("--suite", type=Path)
    parser.add_argument("--coverage", type=Path)
    parser.add_argument("--ci_seconds", type=float)
    parser.add_argument("--before", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    figures = measure_sources(options.root)
    if options.root == HERE:
        figures |= measure_structure()
    if options.check:
        from benchmarks.checking import check

        sys.exit(check(json.loads((FOLDER / "result.json").read_text())["figures"], figures))
    if options.suite:
        figures |= read_suite(options.suite)
    if options.ci_seconds:
        figures["ci_seconds"] = options.ci_seconds
    if options.before:
        figures = {f"{name}_before": figure for name, figure in figures.items()}
    if options.coverage:
        figures["coverage_before" if options.before else "coverage_after"] = read_coverage(options.coverage)

    from lkd.core.files import environment
    from lkd.tracking.run import evidence

    path = FOLDER / "result.json"
    kept = json.loads(path.read_text())["figures"] if path.exists() else {}
    command = "python benchmarks/house.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(evidence(command, environment(), kept | figures), indent=2) + "\n")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
