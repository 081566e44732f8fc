"""Does a killed run go on to the same bits, and do two processes learn what one does? Kept in docs/evidence/resume.

python benchmarks/resume.py [RUN_DIR | --check]

--check kills one run of each command and goes on with it.

Goes on with an interrupted run in RUN_DIR.
"""

import csv
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from checking import check
from rows import Row, matching

sys.path.insert(0, str(Path(__file__).parents[1]))  # else another package's `tests` may be found

from lkd.core.files import environment, read_json, write_json, write_text
from lkd.tracking.run import evidence
from tests.processes import RUNS, TINY, VIT, Command, read_results, start_job

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "resume"
KILLS = 20  # of each command
SHARED = {  # what two processes do as one does: command and options; students have no BatchNorm where they are shared
    "distill": ("distill", [*TINY, "--student", VIT, "--loss", "{name: kd, weight: 0.9}"]),
    "pool": ("pool", [*RUNS["pool"], "--student", VIT]),
    "meta-train": ("meta-train", [*RUNS["meta-train"], "--meta.reuse_every", "0", "--pool_dir", "POOL"]),
    "meta-train with its pool": ("meta-train", [*RUNS["meta-train"], "--student", VIT, "--meta.reuse_every", "0"]),
}
README = """# Killed and gone on with; shared among processes

Made by `python benchmarks/resume.py`. Each of {count} runs ({commands}, {kills} each) was killed
by SIGKILL at a random moment and gone on with by `--resume auto`; {equal} ended with the bits of a run that nobody
disturbed, in every tensor of what it leaves. {within} of them went on from a checkpoint; the others were killed before
there was one, while the command was preparing, or, of a pool, between two students. `lkd distill` ran with CRD, whose
memory of all images is part of a checkpoint, and with a moving average of the weights.

Two processes (gloo) against one, each with half of every batch (distill, pool) or half of the students of an outer step
(meta-train, from a given pool), largest difference of any weight: {differences}.
In the last run the processes trained the pool together too: its roundings are amplified by the finite differences of
first_order (the students' fused attention allows no exact hypergradient) and by Adam.

What it does not show: GPUs, where kernels may not be deterministic; power cuts; several hosts. The runs are tiny
({steps} steps of distillation), each a fork of a process that had imported the package and done nothing else.

`result.json`: the figures; `kills.csv`: every kill; `two_processes.csv`: both comparisons.
"""


def main() -> int:
    if "--check" in sys.argv:
        with tempfile.TemporaryDirectory() as place:
            made = {command: kill_and_resume(command, 0, Path(place))["bitwise_equal"] for command in RUNS}
        return check({command: find_kill(command)["bitwise_equal"] for command in RUNS}, made)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/resume").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    kills = [kill_and_resume(command, number, folder) for command in RUNS for number in range(KILLS)]
    differences = [compare_processes(name, folder) for name in SHARED]
    report(kills, differences)
    return 0


def find_kill(command: str) -> Row:
    """The committed row of a command's first kill."""
    return matching(EVIDENCE / "kills.csv", command=command, number=0)[0]


def finish(words: list[str], output: Path) -> float:
    """Run a command to its end; seconds."""
    started = time.monotonic()
    if code := Command(words, output).wait(timeout=3600):
        raise RuntimeError(f"lkd {' '.join(words)}: exit code {code}; see {output}")
    return time.monotonic() - started


def run_undisturbed(command: str, folder: Path) -> tuple[Path, float]:
    """A run that nobody kills, and how long it took; made once."""
    run_dir = folder / f"{command}-whole"
    record = folder / f"{command}-whole.json"
    if not record.exists():
        shutil.rmtree(run_dir, ignore_errors=True)
        finish(["--version"], folder / "output.txt")  # starts the process that the others are forked from
        seconds = finish([command, *RUNS[command], "--run_dir", str(run_dir)], folder / "output.txt")
        write_json(record, {"seconds": seconds})
    return run_dir, read_json(record)["seconds"]


def kill_and_resume(command: str, number: int, folder: Path) -> dict[str, Any]:
    """Kill a run at a random moment, go on with it, and compare."""
    record, run_dir = folder / f"{command}-{number:02d}.json", folder / f"{command}-killed"
    whole, duration = run_undisturbed(command, folder)
    if not record.exists():
        chance = random.Random(f"{command} {number}")
        words = [command, *RUNS[command], "--run_dir", str(run_dir), "--resume", "auto"]
        killed = False
        while not killed:  # it may be through before
            shutil.rmtree(run_dir, ignore_errors=True)
            seconds = chance.uniform(0.1, 1.0) * duration
            process = Command(words, folder / "output.txt")
            time.sleep(seconds)
            with suppress(ProcessLookupError):  # it is through
                process.send_signal(signal.SIGKILL)
            if (code := process.wait()) not in (0, -signal.SIGKILL):
                raise RuntimeError(f"lkd {' '.join(words)}: exit code {code}; see {folder / 'output.txt'}")
            killed = code != 0
        found = [str(path.relative_to(run_dir).with_suffix("")) for path in run_dir.rglob("[0-9]*.safetensors")]
        finish(words, folder / "output.txt")
        expected, results = read_results(whole), read_results(run_dir)
        equal = expected.keys() == results.keys() and all(torch.equal(t, results[key]) for key, t in expected.items())
        row = {"command": command, "number": number, "killed_after_seconds": round(seconds, 3)}
        row |= {"checkpoints": " ".join(sorted(found)), "tensors": len(expected), "bitwise_equal": int(equal)}
        write_json(record, row)
        print(*row.values(), flush=True)
    return read_json(record)


def compare_processes(name: str, folder: Path) -> dict[str, Any]:
    """The largest difference of a weight between a run of two processes and one of a single process."""
    record = folder / f"{name}-processes.json"
    pool, _ = run_undisturbed("pool", folder)
    if not record.exists():
        one, two = (folder / f"{name}-{count}" for count in ("one", "two"))
        for run_dir in (one, two):
            shutil.rmtree(run_dir, ignore_errors=True)
        command, options = SHARED[name]
        words = [command, *(str(pool / "pool") if word == "POOL" else word for word in options), "--run_dir"]
        finish([*words, str(one)], folder / "output.txt")
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = probe.getsockname()[1]
        for process in start_job([*words, str(two)], port, output=str(folder / "output-{rank}.txt")):
            process.wait()
        expected, results = read_results(one), read_results(two)
        difference = max(float((t - results[key]).abs().max()) for key, t in expected.items() if t.is_floating_point())
        largest = max(float(t.abs().max()) for t in expected.values() if t.is_floating_point())
        row = {"run": name, "tensors": len(expected), "max_difference": difference, "largest_weight": largest}
        write_json(record, row)
        print(*row.values(), flush=True)
    return read_json(record)


def report(kills: list[dict[str, Any]], differences: list[dict[str, Any]]) -> None:
    """Write the rows, the figures and the README."""
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    for name, rows in (("kills", kills), ("two_processes", differences)):
        with (EVIDENCE / f"{name}.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    equal = sum(row["bitwise_equal"] for row in kills)
    figures = {"resume_kills": len(kills), "resume_bitwise_fraction": equal / len(kills)}
    for command in RUNS:
        own = [row["bitwise_equal"] for row in kills if row["command"] == command]
        figures[f"resume_bitwise_fraction_{command.replace('-', '_')}"] = sum(own) / len(own)
    figures["two_process_max_difference"] = max(row["max_difference"] for row in differences)
    for row in differences:
        figures[f"two_process_max_difference_{row['run'].replace('-', '_').replace(' ', '_')}"] = row["max_difference"]
    write_json(EVIDENCE / "result.json", evidence("python benchmarks/resume.py", environment(), figures))
    text = README.format(
        count=len(kills),
        commands=", ".join(f"`lkd {command}`" for command in RUNS),
        kills=KILLS,
        equal=equal,
        within=sum(bool(row["checkpoints"]) for row in kills),
        differences=", ".join(
            f"{row['run']} {row['max_difference']:.1g} (largest weight {row['largest_weight']:.2g})"
            for row in differences
        ),
        steps=30,
    )
    write_text(EVIDENCE / "README.md", text)


if __name__ == "__main__":
    sys.exit(main())
