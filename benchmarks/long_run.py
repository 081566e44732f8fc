"""Does a long run need more and more? 10,000 outer steps and 200 epochs of distillation. Kept in docs/evidence/faults.

python -m benchmarks.long_run [RUN_DIR]

Samples resident memory, open files, disk and log of the running command once a second.
"""

import csv
import shutil
import statistics
import sys
import time
from pathlib import Path

from lkd.core.files import environment, write_json, write_text
from lkd.tracking.run import evidence
from tests.faults.subjects import TEACHER
from tests.processes import Command

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "faults"
TOY = ["--data.train_size", "40", "--data.meta_validation_size", "60", *TEACHER, "--student.name", "tiny_cnn"]
TOY += ["--train.batch_size", "10", "--device", "cpu", "--threads", "1"]
META = ["--train.epochs", "5", "--pool.students", "1", "--meta.students_per_step", "1", "--meta.outer_steps", "10000"]
META += ["--meta.rollout_steps", "1", "--meta.rollout_epochs", "1", "--meta.outer_batch_size", "30"]
META += ["--meta.reuse_every", "1000", "--meta.reuse_students", "1", "--meta.checkpoint_every", "100"]
RUNS = {
    "meta-train": ["meta-train", *TOY, *META, "--meta.estimator", "first_order"],
    "distill": ["distill", *TOY, "--train.epochs", "200", "--train.checkpoint_every", "100"],
}
WARM_UP = 0.1  # of a run's samples; the rest must be flat
COLUMNS = ("run", "second", "resident_mib", "open_files", "disk_kib", "log_kib", "log_rows")
README = """# Long runs

Made by `python -m benchmarks.long_run`: `lkd meta-train` with 10,000 outer steps and `lkd distill` with 200
epochs, at toy size; the running command is looked at once a second, here after the first tenth (`long_run.csv`).

| run | seconds | resident memory, MiB | its growth | open files | most disk, KiB | log, KiB | rows of the log |
|---|---|---|---|---|---|---|---|
{rows}

Growth is from the median of the second tenth of the run to that of the last. The log has at most 1,000 rows of outer
steps, however many there are; a training logs its speed every second, and half as often after every 1,000 times.
Most of the disk is pictures of the loss, 100 at most: a first run of this benchmark, with one every 10 steps, had grown
by 2.59 %, and to 97 MiB of disk, and led to that bound.
"""


def main() -> None:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/long").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    samples = [sample for name in RUNS for sample in watch(name, folder)]
    report(samples)


def watch(name: str, folder: Path) -> list[tuple[float | str, ...]]:
    """Run a command from the start, and sample it until it ends."""
    place = folder / name
    shutil.rmtree(place, ignore_errors=True)
    words = [*RUNS[name], "--run_dir", str(place)]
    command = Command(words, folder / f"{name}.txt")
    started, samples = time.monotonic(), []
    while command.poll() is None:
        time.sleep(1.0)
        if command.poll() is None and (place / "log.jsonl").exists():
            measured = sample(command, place)
            if measured[0]:  # else it is just ending
                samples.append((name, round(time.monotonic() - started), *measured))
    if command.poll():
        raise RuntimeError(f"lkd {name}: exit {command.poll()}; see {folder / name}.txt")
    return samples


def sample(command: Command, place: Path) -> tuple[float, ...]:
    """Resident memory, open files, disk, and size and rows of the log."""
    proc = Path(f"/proc/{command.pid}")
    pages = int((proc / "statm").read_text().split()[1])
    disk = 0
    for path in place.rglob("*"):
        try:
            disk += path.stat().st_size
        except FileNotFoundError:
            continue  # a checkpoint that has just been replaced
    log = (place / "log.jsonl").read_bytes()
    open_files = len(list((proc / "fd").iterdir()))
    return pages * 4096 / 2**20, open_files, disk / 1024, len(log) / 1024, log.count(b"\n")


def report(samples: list[tuple[float | str, ...]]) -> None:
    """Write the samples, the table and the figures."""
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    with (EVIDENCE / "long_run.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        writer.writerows([f"{value:.1f}" if isinstance(value, float) else value for value in row] for row in samples)
    rows, figures = [], {}
    for name in RUNS:
        own = [row for row in samples if row[0] == name]
        warm = own[round(WARM_UP * len(own)) :]
        memory, files, disk, log, lines = ([float(row[column]) for row in warm] for column in range(2, 7))
        tenth = max(1, len(own) // 10)
        growth = statistics.median(memory[-tenth:]) / statistics.median(memory[:tenth]) - 1
        cells = [name, str(own[-1][1]), f"{min(memory):.1f} to {max(memory):.1f}", f"{growth:+.2%}"]
        cells += [f"{min(files):g} to {max(files):g}", f"{max(disk):.0f}", f"{log[-1]:.0f}", f"{lines[-1]:g}"]
        rows.append(f"| {' | '.join(cells)} |")
        key = name.replace("-", "_")
        figures |= {f"{key}_memory_growth": growth, f"{key}_open_files_growth": files[-1] - files[0]}
        figures |= {f"{key}_disk_kib": max(disk), f"{key}_log_rows": lines[-1]}
    write_json(EVIDENCE / "long_run.json", evidence("python -m benchmarks.long_run", environment(), figures))
    write_text(EVIDENCE / "long_run.md", README.format(rows="\n".join(rows)))
    print("\n".join(rows))


if __name__ == "__main__":
    main()
