"""What every fault does to every command. Kept in docs/evidence/faults.

python -m tests.faults.run [RUN_DIR] [--moments 20] [--only PATTERN] [--report | --check]

Goes on with an interrupted bench in RUN_DIR; with --report it only writes what its rows so far say;
with --check it kills one run of each command, and compares what became of them with the committed rows.
"""

import argparse
import csv
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import lkd.core.workers
import lkd.data.readers
import lkd.evaluation.comparison.tables
from benchmarks.checking import check
from lkd.config.parse import parse_recipe
from lkd.core.files import environment, write_json, write_text
from lkd.tracking.run import evidence
from tests.faults.episodes import Bench
from tests.faults.faults import ALL, FAULTS
from tests.processes import FORK

ROWS = "rows.jsonl"
COMMAND = "python -m tests.faults.run"
LEGEND = "A cell: runs that kept the promise / runs, most steps done again; — where the fault does not apply:"
COUNTS = """\
* promises kept in **{kept} of {runs}** runs; wrong results (a run that ended well with other bits than promised):
  **{wrong_results}**
* final bits those of the undisturbed run: **{equal} of {exact}** runs, all in which that is promised (CPU, one thread)
* most steps done again: {max_steps_lost} (a comparison's trainings of 20 steps have no checkpoints of their own; its
  two workers may lose one each); most over the command's checkpoint interval: {max_intervals_lost:.2f}

"""
EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "faults"
FOLDER = re.compile(r"/\S*/episode/")  # where the bench ran


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", nargs="?", default="runs/faults", type=Path)
    parser.add_argument("--moments", default=20, type=int, help="Episodes of every command under every fault.")
    parser.add_argument("--only", default="", help="A regular expression of COMMAND FAULT; then no report is written.")
    parser.add_argument("--report", action="store_true", help="Only write the report of the rows that there are.")
    parser.add_argument("--check", action="store_true")
    given = parser.parse_args()
    if given.check:
        return check_kills()
    folder = given.run_dir.absolute()
    rows = read_rows(folder / ROWS) if given.report else play_faults(folder, given.moments, given.only)
    if not given.only:
        write_report(EVIDENCE, rows)
    return 0


def check_kills() -> int:
    """Play the first episode of a kill of each command anew."""
    with tempfile.TemporaryDirectory() as folder:
        rows = play_faults(Path(folder), 1, " kill$")
    names = ("bitwise", "wrong", "kept")
    committed, made = {}, {}
    with (EVIDENCE / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            committed |= {f"{row['command']} {row['fault']} {row['number']} {name}": row[name] for name in names}
    for row in rows:
        made |= {f"{row['command']} {row['fault']} {row['number']} {name}": row[name] for name in names}
    return check(committed, made)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows that there are."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def play_faults(folder: Path, moments: int, only: str = "") -> list[dict[str, Any]]:
    """Play the episodes that have no row yet, as forks of this process; all rows."""
    prepare()
    bench, record = Bench(folder), folder / ROWS
    rows = read_rows(record)
    done = {(row["command"], row["fault"], row["number"]) for row in rows}
    for number in range(moments):
        for label, fault in FAULTS.items():
            for name in fault.commands:
                if (name, label, number) in done or not re.search(only, f"{name} {label}"):
                    continue
                row = bench.play(name, label, number)
                rows.append(row)
                with record.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                mark = "" if row["kept"] else "   PROMISE BROKEN" + "   WRONG RESULT" * row["wrong"]
                print(f"{number:2} {name}, {label}: exit {row['exit']}, {row['steps_lost']} lost{mark}", flush=True)
    return rows


def prepare() -> None:
    """What every run would otherwise do anew."""
    torch.set_num_threads(1)
    for command in ALL:
        parse_recipe(command, [])
    lkd.core.workers.CONTEXT = FORK  # forks need not import everything anew
    lkd.data.readers.read_embedded_archive = cache(lkd.data.readers.read_embedded_archive)
    lkd.evaluation.comparison.tables.plot_table = draw_nothing


def draw_nothing(_: object, baseline: str, path: Path) -> None:
    """A comparison's plot would take a second, and is no part of what faults may harm."""
    Image.new("RGB", (1, 1)).save(path)


def write_report(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, figures and table."""
    from tests.tables import replace_between

    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({key: FOLDER.sub("", str(value)) for key, value in row.items()} for row in rows)
    exact = [row["bitwise"] for row in rows if row["bitwise"] != ""]
    figures = {
        "runs": len(rows),
        "wrong_results": sum(row["wrong"] for row in rows),
        "bitwise_fraction": sum(exact) / len(exact),
        "max_steps_lost": max(row["steps_lost"] for row in rows),
        "max_intervals_lost": max(row.get("intervals_lost", 0) for row in rows),
        "promises_kept_fraction": sum(row["kept"] for row in rows) / len(rows),
    }
    write_json(folder / "result.json", evidence(COMMAND, environment(), figures))
    lines = [f"| fault | {' | '.join(ALL)} | longest, s |", f"|---|{'---|' * len(ALL)}---|"]
    lines += [format_fault(label, rows) for label in FAULTS]
    lines += ["", LEGEND, ""]
    lines += [f"* {label}: {fault.elsewhere}" for label, fault in FAULTS.items() if fault.elsewhere]
    kept = sum(row["kept"] for row in rows)
    counts = COUNTS.format(kept=kept, equal=sum(exact), exact=len(exact), **figures)
    text = (folder / "README.md").read_text()
    write_text(folder / "README.md", replace_between(text, "figures", lambda _: counts + "\n".join(lines)))


def format_fault(label: str, rows: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    cells = [f"{label}: {FAULTS[label].what}"]
    for name in ALL:
        own = [row for row in rows if (row["command"], row["fault"]) == (name, label)]
        lost = max((row["steps_lost"] for row in own), default=0)
        cells.append(f"{sum(row['kept'] for row in own)}/{len(own)}, {lost}" if own else "—")
    cells.append(f"{max((row['seconds'] for row in rows if row['fault'] == label), default=0):.1f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
