"""The table of the fault bench, its figures and its README."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lkd.core.files import environment, write_json, write_text
from lkd.tracking.run import evidence
from tests.faults.faults import FAULTS

FOLDER = re.compile(r"/\S*/episode/")  # where the bench ran
COMMAND = "python -m tests.faults.run"
README = """# Faults

Made by `{command}`: {runs} runs of `lkd pool`, `meta-train`, `distill`, `compare` and `cache`, each
disturbed at a random moment, and gone on with by the same command line. What is promised: [faults.md](../../faults.md).

* promises kept in **{kept} of {runs}** runs; wrong results (a run that ended well with other bits than promised):
  **{wrong}**
* final bits those of the undisturbed run: **{equal} of {exact}** runs, all in which that is promised (CPU, one thread)
* most steps done again: {lost} (a comparison's trainings of 20 steps have no checkpoints of their own; its two workers
  may lose one each); most over the command's checkpoint interval: {intervals:.2f}

| fault | {commands} | longest, s |
|---|{rule}---|
{table}

A cell: runs that kept the promise / runs, most steps done again; — where the fault does not apply:

{elsewhere}

What it found, each mended, with a test in tests/lkd that failed before:

* a flipped bit in the first and only checkpoint of a training ended the run; it begins anew, and says so;
* a flipped bit in `lineage.json` ended the run that went on with a traceback;
* a flipped bit in the name of a file's hash hid the hash: the file was read unchecked;
* a picture that could not be sent to W&B ended the run with a traceback;
* a process that died while the two of a job were meeting left the other waiting for 30 minutes.

The episodes that broke a promise were played again after the mends (meta-train, flipped bits, 1 and 11; cache, flipped
bits, 9; distill, process dies, 10; and pool, decoder dies, 1, where the bench itself had put the fault in a place that
the run never came to). Most of the others were played before, some at commits of the days before.

What it does not show: GPUs; several hosts; power cuts other than as files that arrive truncated or with flipped bits; a
process killed by the kernel while it writes a file's last block (files are renamed after fsync). Runs are forks of a
process that has imported the package, and so are a comparison's workers. The two processes of a job are started without
torchrun, which would end the other one at once, and wait half a minute for each other where five are usual. The full
disk and memory are failing calls, put in by the files of `tests/faults`, and W&B's server is a stand-in; kills,
dying workers, servers and processes, damaged and vanished files are real.

[An inner learning rate 100 times too high](stress.md) and [long runs](long_run.md) are beside this.
`result.json`: the figures; `runs.csv`: every run.
"""


def write_report(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows, figures and table."""
    folder.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with (folder / "runs.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows({key: FOLDER.sub("", str(value)) for key, value in row.items()} for row in rows)
    exact = [row["bitwise"] for row in rows if row["bitwise"] != ""]
    intervals = max(row.get("intervals_lost", 0) for row in rows)
    figures = {
        "runs": len(rows),
        "wrong_results": sum(row["wrong"] for row in rows),
        "bitwise_fraction": sum(exact) / len(exact),
        "max_steps_lost": max(row["steps_lost"] for row in rows),
        "max_intervals_lost": intervals,
        "promises_kept_fraction": sum(row["kept"] for row in rows) / len(rows),
    }
    write_json(folder / "result.json", evidence(COMMAND, environment(), figures))
    commands = list(dict.fromkeys(name for fault in FAULTS.values() for name in fault.commands))
    text = README.format(
        command=COMMAND,
        runs=len(rows),
        kept=sum(row["kept"] for row in rows),
        wrong=figures["wrong_results"],
        equal=sum(exact),
        exact=len(exact),
        lost=figures["max_steps_lost"],
        intervals=intervals,
        commands=" | ".join(commands),
        rule="---|" * len(commands),
        table="\n".join(format_fault(label, commands, rows) for label in FAULTS),
        elsewhere="\n".join(f"* {label}: {fault.elsewhere}" for label, fault in FAULTS.items() if fault.elsewhere),
    )
    write_text(folder / "README.md", text)


def format_fault(label: str, commands: list[str], rows: Sequence[dict[str, Any]]) -> str:
    """A line of the table."""
    cells = [f"{label}: {FAULTS[label].what}"]
    for name in commands:
        own = [row for row in rows if (row["command"], row["fault"]) == (name, label)]
        lost = max((row["steps_lost"] for row in own), default=0)
        cells.append(f"{sum(row['kept'] for row in own)}/{len(own)}, {lost}" if own else "—")
    cells.append(f"{max((row['seconds'] for row in rows if row['fault'] == label), default=0):.1f}")
    return f"| {' | '.join(cells)} |"
