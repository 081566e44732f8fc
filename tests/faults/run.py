"""What every fault does to every command. Kept in docs/evidence/faults.

python -m tests.faults.run [RUN_DIR] [--moments 20] [--only PATTERN] [--report]

Goes on with an interrupted bench in RUN_DIR; with --report it only writes what its rows so far say.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

from tests.faults.episodes import Bench
from tests.faults.faults import FAULTS
from tests.faults.processes import prepare
from tests.faults.table import write_report

ROWS = "rows.jsonl"
EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "faults"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", nargs="?", default="runs/faults", type=Path)
    parser.add_argument("--moments", default=20, type=int, help="Episodes of every command under every fault.")
    parser.add_argument("--only", default="", help="A regular expression of COMMAND FAULT; then no report is written.")
    parser.add_argument("--report", action="store_true", help="Only write the report of the rows that there are.")
    given = parser.parse_args()
    folder = given.run_dir.absolute()
    rows = read_rows(folder / ROWS) if given.report else play_faults(folder, given.moments, given.only)
    if not given.only:
        write_report(EVIDENCE, rows)


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


if __name__ == "__main__":
    main()
