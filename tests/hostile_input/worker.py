"""One process that reads damaged files, one after another, and says what became of each.

python -m tests.hostile_input.worker READER FIRST LAST FOLDER

Prints a JSON line for every file that was neither read nor refused in one line, was slow, or took much memory. What is
being read, the counts so far and the peak of memory are kept in FOLDER/progress.json: they outlive a crash.
"""

import json
import os
import random
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lkd.core.errors import UserError
from tests.hostile_input.mutators import mutate_bytes
from tests.hostile_input.readers import MUTATORS, READERS, Reader

SECONDS = 5  # of this process's own time, after which a file counts as a hang
STUCK = 60  # seconds after which the system ends it: a hang that no handler of a signal reaches
ROOM = 4 << 30  # bytes of address space above what the worker has when it starts
OUT_OF_MEMORY = ("can't allocate memory", "Cannot allocate memory", "Unable to allocate", "not enough memory")


class HangError(BaseException):
    """A file took too long; a BaseException, so that no reader catches it."""


def stop(*_: object) -> None:
    raise HangError


def draw_file(name: str, number: int, files: dict[Path, bytes]) -> tuple[Path, bytes]:
    """The damaged file of a number: which one, and its bytes. A function of reader and number alone."""
    rng = random.Random(f"{name} {number}")
    path, other = rng.choice(sorted(files)), files[rng.choice(sorted(files))]
    mutate = mutate_bytes if rng.random() < 0.3 else MUTATORS.get(path.suffix, mutate_bytes)
    damaged = mutate(rng, files[path], other)
    return path, mutate_bytes(rng, damaged, other) if rng.random() < 0.05 else damaged


def try_file(reader: Reader, path: Path) -> tuple[str, str]:
    """Read a file: what became of it, and why."""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        reader.read(path)
        return "read", ""
    except HangError:
        return "hang", traceback.format_exc()
    except (Exception, SystemExit) as error:
        if ran_out_of_memory(error):
            return "out of memory", traceback.format_exc()
        return ("refused", str(error)) if isinstance(error, UserError) else ("traceback", traceback.format_exc())
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or one that led to it, was an allocation that failed: it was not bounded before."""
    while error is not None:
        if isinstance(error, MemoryError) or any(text in str(error) for text in OUT_OF_MEMORY):
            return True
        error = error.__cause__ or error.__context__
    return False


def memory(field: str) -> int:
    """A field of /proc/self/status, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def say(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def limit_time() -> None:
    """Have the system end this process if the next file takes too much of its time."""
    resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + STUCK, resource.RLIM_INFINITY))


def fuzz(name: str, numbers: range, folder: Path, prepare: Callable[[], object] = bool) -> dict[str, int]:
    """Read the damaged files of these numbers: how many ended how."""
    reader = READERS[name]
    folder.mkdir(parents=True, exist_ok=True)
    reader.write(folder)
    files = {path: path.read_bytes() for pattern in reader.targets for path in sorted(folder.glob(pattern))}
    for path in files:
        outcome, why = try_file(reader, path)
        assert outcome in ("read", "refused"), why
    before, peak = memory("VmRSS"), 0
    counts: dict[str, int] = {}

    def write_progress(number: int) -> None:
        Path("progress.json").write_text(json.dumps({"number": number, "counts": counts, "peak_kib": peak}))

    for number in numbers:
        path, damaged = draw_file(name, number, files)
        path.write_bytes(damaged)
        write_progress(number)
        prepare()
        Path("/proc/self/clear_refs").write_text("5")  # the peak of this file alone
        started = time.process_time()
        outcome, why = try_file(reader, path)
        seconds, grown = time.process_time() - started, memory("VmHWM") - before
        for mark in (folder / "EVIL", Path("EVIL")):
            if mark.exists():
                outcome, why = "code was run", str(path)
                mark.unlink()
        path.write_bytes(files[path])
        peak = max(peak, grown)
        counts[outcome] = counts.get(outcome, 0) + 1
        if outcome not in ("read", "refused") or grown > 512 << 10 or seconds > 2:
            say(number=number, file=path.name, outcome=outcome, why=why, seconds=round(seconds, 2), mib=grown >> 10)
    write_progress(numbers.stop)
    return counts


def main() -> None:
    name, first, last, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, stop)
    os.chdir(folder)
    limit = (memory("VmSize") << 10) + ROOM
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    fuzz(name, range(first, last), folder / "files", limit_time)


if __name__ == "__main__":
    main()
