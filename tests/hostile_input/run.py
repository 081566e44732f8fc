"""Damaged and hostile files for every reader, by the thousands. Kept in docs/evidence/hostile_input.

python -m tests.hostile_input.run [OUT] [--files N | --check]

Reads N files a reader (10,000), two readers at a time, and writes OUT/result.json, files.csv, README.md and what was
found (findings.jsonl). Files are a function of reader and number alone: `python -m tests.hostile_input.worker
READER NUMBER NUMBER+1 FOLDER` reads one again. --check reads the first 30 of each, and compares what must not happen.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tabulate import tabulate

from benchmarks.checking import check
from lkd.core.files import environment, write_json, write_text
from lkd.tracking.run import evidence
from tests.hostile_input.readers import READERS
from tests.hostile_input.worker import SECONDS

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "docs" / "evidence" / "hostile_input"
FILES = 10_000
OUTCOMES = ("read", "refused", "traceback", "out of memory", "code was run", "hang", "crash")
README = """# Hostile input

Made by `python -m tests.hostile_input.run --files {files}`. Each reader of files that may come from strangers
read {files:,} damaged files (byte flips, cuts, splices; and lies in each format's own terms: header lengths, offsets,
shapes, dtypes, JSON of other types and depths, YAML tags, aliases and class paths, tar names and sizes, zip bombs,
pickles that run a command, images that claim to be huge). Where files carry a hash of their content, nine in ten lies
come with one that fits. Good is: the reader returns a valid object, which is then used once (a training goes on from a
checkpoint), or refuses the file in one line (`UserError`; of a damaged image, it is skipped; a damaged first checkpoint
is passed over with a warning). What else happened:

{table}

A hang is a file that takes more than {seconds} s of the process's own time. Peak memory is of one file, above the
worker at rest. A worker has 4 GiB of address space to spare, and an allocation that fails counts as *out of memory*
even if the reader turns it into a refusal. Commands and modules that hostile files name would leave a mark; *code was
run* counts the marks.

The last rounds found, and each was mended with a test that failed before: checkpoints whose hash fits and whose content
does not (a training began anew in silence; a meta-training ended in a traceback), names longer than a file system takes
in `_info.json` and in a pool's index, a date in YAML that is none, and JSON of any size.

What it does not show: code behind these readers that a valid but malicious file reaches (a loss that teaches badly is a
valid file); the readers of `hfds/` and `torch/`, which are other packages'; files that pass the checksum of CIFAR's
pickles. Fashion-MNIST's small stand-ins are all refused, for their number of images, once their headers are read. Seeds
are fixed: the same command tries the same files.

`result.json`: the figures; `files.csv`: the table; `findings.jsonl`: every file that did not end well or was slow (over
2 s) or large (over 512 MiB).
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=EVIDENCE)
    parser.add_argument("--files", type=int, default=FILES, help="a reader")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if options.check:
        options.files = 30
    with ThreadPoolExecutor(options.workers) as threads:
        rows = list(threads.map(lambda name: fuzz_reader(name, options.files), READERS))
    if options.check:
        return compare_bad(rows)
    report(rows, options.out, options.files)
    return 0


def compare_bad(rows: list[dict[str, Any]]) -> int:
    """Compare the counts of what must not happen with the committed ones."""
    with (EVIDENCE / "files.csv").open(newline="") as file:
        committed = {row["reader"]: row for row in csv.DictReader(file)}
    names = [(row["reader"], outcome) for row in rows for outcome in OUTCOMES[2:]]
    made = {row["reader"]: row for row in rows}
    return check(*({f"{name}, {bad}": each[name][bad] for name, bad in names} for each in (committed, made)))


def fuzz_reader(name: str, files: int) -> dict[str, Any]:
    """Have workers read a reader's files; a worker that dies is followed by another."""
    counts: dict[str, int] = dict.fromkeys(OUTCOMES, 0)
    findings: list[dict[str, Any]] = []
    peak, first, started = 0, 0, time.time()  # after the last file `first` is past `files`
    while first < files:
        with tempfile.TemporaryDirectory() as folder:
            progress = {"number": first, "counts": {}, "peak_kib": 0}  # the worker's own is newer
            words = [sys.executable, "-m", "tests.hostile_input.worker", name, str(first), str(files), folder]
            variables = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
            done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables, check=False)
            if (newest := Path(folder) / "progress.json").exists():
                progress = json.loads(newest.read_text())
            findings += [json.loads(line) for line in done.stdout.splitlines()]
        peak, first = max(peak, progress["peak_kib"]), progress["number"] + 1
        for outcome, count in progress["counts"].items():
            counts[outcome] += count
        if done.returncode == 1:
            raise RuntimeError(f"the worker of {name!r} failed at file {progress['number']}")
        if done.returncode:
            outcome = "hang" if done.returncode == -signal.SIGXCPU else "crash"
            counts[outcome] += 1
            findings.append({"number": progress["number"], "outcome": outcome, "why": f"exit code {done.returncode}"})
    print(f"{name}: {counts}, {peak >> 10} MiB, {time.time() - started:.0f} s", flush=True)
    return {"reader": name, "files": sum(counts.values()), **counts, "peak_mib": peak / 1024, "findings": findings}


def report(rows: list[dict[str, Any]], out: Path, files: int) -> None:
    """Write the evidence."""
    columns = ["reader", "files", *OUTCOMES, "peak_mib"]
    total = {key: sum(row[key] for row in rows) for key in columns[1:-1]}
    total |= {"reader": "all", "peak_mib": max(row["peak_mib"] for row in rows)}
    out.mkdir(parents=True, exist_ok=True)
    with (out / "files.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(row | {"peak_mib": round(row["peak_mib"], 1)} for row in rows)
    found = [json.dumps({"reader": row["reader"], **finding}) for row in rows for finding in row["findings"]]
    write_text(out / "findings.jsonl", "".join(f"{line}\n" for line in found))
    figures = {
        "files_tried": total["files"],
        "crashes": total["crash"],
        "tracebacks": total["traceback"] + total["out of memory"] + total["code was run"],
        "hangs": total["hang"],
        "peak_memory_mib": round(total["peak_mib"], 1),
        "readers": len(rows),
        "files_read": total["read"],
        "files_refused": total["refused"],
    }
    command = f"python -m tests.hostile_input.run --files {files}"
    write_json(out / "result.json", evidence(command, environment(), figures))
    cells = [
        [row["reader"], *(f"{row[key]:,}" for key in columns[1:-1]), f"{row['peak_mib']:.0f}"] for row in (*rows, total)
    ]
    table = tabulate(cells, [*columns[:-1], "peak, MiB"], "github", disable_numparse=True)
    print(table)
    write_text(out / "README.md", README.format(files=files, table=table, seconds=SECONDS))


if __name__ == "__main__":
    sys.exit(main())
