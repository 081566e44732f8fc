"""One episode: a run, a fault at a random moment, the run that goes on, and what came of it."""

import os
import random
import re
import shutil
import signal
import socket
import time
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.faults.commands import COMMANDS, FILE_COMMANDS, Command, read_results, write_images
from benchmarks.faults.faults import FAULTS, Fault
from benchmarks.faults.injections import Moment, count_steps
from benchmarks.faults.processes import finish, list_workers, start, wait_for_group

BOUND = 20.0  # seconds within which a run must have ended after its fault
Row = dict[str, Any]


class Bench:
    """Episodes in a folder, which is the current one.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        write_images(Path("images"))
        self.wholes: dict[tuple[str, bool, int], Row] = {}
        self.totals: dict[tuple[str, str], int] = {}
        self.references: dict[tuple[str, str, int], dict[str, str]] = {}

    def command(self, fault: Fault, name: str) -> Command:
        return (FILE_COMMANDS if fault.files else COMMANDS)[name]

    def run_whole(self, name: str, files: bool, size: int = 1) -> Row:
        """The undisturbed run: its results, its duration, its steps; made once."""
        key = (name, files, size)
        if key not in self.wholes:
            command, place = (FILE_COMMANDS if files else COMMANDS)[name], clear("whole")
            started = time.monotonic()
            processes = start_job(command, place, size)
            codes = [finish(process) for process in processes]
            if any(codes):
                raise RuntimeError(f"undisturbed {name}: exit {codes}: {(place / 'output').read_text()[-2000:]}")
            seconds = time.monotonic() - started
            self.wholes[key] = {"results": read_results(command, place / "run"), "seconds": seconds, **steps(place)}
        return self.wholes[key]

    def count_calls(self, name: str, label: str) -> int:
        """How often an undisturbed run calls what a fault comes with; counted once."""
        if (name, label) not in self.totals:
            fault, place = FAULTS[label], clear("count")
            assert fault.inject is not None
            moment = Moment(place / "calls", 0, place / "fired")
            code = finish(start(self.command(fault, name).line(place / "run"), place / "output", fault.inject(moment)))
            if code:
                raise RuntimeError(f"{name}, {label}: exit {code}: {(place / 'output').read_text()[-2000:]}")
            self.totals[name, label] = (place / "calls").stat().st_size
        return self.totals[name, label]

    def find_reference(self, name: str, fault: Fault, call: int) -> dict[str, str]:
        """What the reference fault leaves when it comes at a call."""
        key = (name, fault.reference, call)
        if key not in self.references:
            reference, place = FAULTS[fault.reference], clear("reference")
            command = self.command(fault, name)
            assert reference.inject is not None
            moment = Moment(place / "calls", call, place / "fired")
            code = finish(start(command.line(place / "run"), place / "output", reference.inject(moment)))
            if code:
                raise RuntimeError(f"{name}, {fault.reference}: exit {code}: {(place / 'output').read_text()[-2000:]}")
            self.references[key] = read_results(command, place / "run")
        return self.references[key]

    def play(self, name: str, label: str, number: int) -> Row:
        """Run an episode; a fault that comes too late for the run to notice is tried at another moment."""
        fault, chance = FAULTS[label], random.Random(f"{name} {label} {number}")
        size = 2 if label == "process dies" else 1
        whole, command = self.run_whole(name, fault.files, size), self.command(fault, name)
        for _ in range(20):
            place, moment = clear("episode"), chance.random()
            shutil.rmtree("images.intact", ignore_errors=True)
            if fault.files:
                shutil.copytree("images", "images.intact")
            started = time.monotonic()
            if fault.inject:
                workers = 2 if name == "compare" else 1
                call = 1 + int(moment * self.count_calls(name, label) / workers)
                injected = fault.inject(Moment(place / "calls", call, place / "fired", chance.randrange(2**32)))
                processes = [start(command.line(place / "run"), place / "output", counting(place), injected)]
            else:
                call, processes = 0, start_job(command, place, size)
                disturb(label, processes, place, moment * (whole["student"] + whole["outer"] + 1), chance)
            disturbed = time.monotonic()
            codes = [finish(process) for process in processes]
            ended = time.monotonic()
            said = (place / "output").read_text()
            if has_happened(fault, place, codes, said):
                break
        else:
            raise RuntimeError(f"{name}, {label}: the fault never came")
        row: Row = {"command": name, "fault": label, "number": number, "moment": round(moment, 4), "call": call}
        row |= {"exit": " ".join(map(str, codes)), "said": last_line(said)}
        survivor = [code for code in codes if code != -signal.SIGKILL] if size == 2 else codes
        kept = all(code in fault.codes for code in survivor) and "Traceback" not in said
        kept = kept and (not fault.says or bool(re.search(fault.says, said, re.MULTILINE)))
        if label == "terminate" and codes[0] == 143:
            kept = kept and "go on with: lkd" in said
        row["seconds"] = round(ended - (started if fault.inject else disturbed), 2)
        kept = kept and (bool(fault.inject) or row["seconds"] < BOUND) and all(map(wait_for_group, processes))
        if fault.files:
            shutil.rmtree("images")
            shutil.move("images.intact", "images")
        again: list[int | None] = [0]
        if fault.codes != (0,):
            before = len(said)
            again = [finish(process) for process in start_job(command, place, size)]
            spoken = (place / "output").read_text()[before:]
            kept = kept and "Traceback" not in spoken
            row["said_again"] = " | ".join(line for line in spoken.splitlines() if "warning" in line)[:300]
            if label in ("truncated", "flipped bits"):
                damaged = (place / "damaged").read_text() if (place / "damaged").exists() else ""
                kept = kept and (not damaged or damaged in spoken)
        lost = {key: value - whole[key] for key, value in steps(place).items()}
        results = read_results(command, place / "run")
        row["exit_again"] = " ".join(map(str, again))
        row["steps_lost"] = lost["student"] + lost["outer"] if fault.codes != (0,) else 0
        row["intervals_lost"] = max(lost["student"] / command.interval, lost["outer"]) if fault.codes != (0,) else 0
        if fault.exact:
            right = results == whole["results"]
            row["bitwise"] = int(right)
        elif fault.reference:
            calls = size_of(place / "hypergradients") or call
            right = results == self.find_reference(name, fault, calls)
            row["as_reference"] = int(right)
        else:
            right = results.keys() == whole["results"].keys() and not any("unreadable" in v for v in results.values())
        finished = again == [0] * size
        row["wrong"] = int(finished and not right)
        row["kept"] = int(kept and finished and right and row["intervals_lost"] <= 1)
        return row


def has_happened(fault: Fault, place: Path, codes: list[int | None], said: str) -> bool:
    """Whether a fault came before the run was through, and the run could notice."""
    if fault.inject:
        return (place / "fired").exists()
    if fault.codes == (0,):  # it came from outside, and a run that had read all files could not see it
        return bool(re.search(fault.says, said))
    return 0 not in codes


def clear(name: str) -> Path:
    """An empty folder."""
    place = Path(name).absolute()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def counting(place: Path) -> Any:
    """The injection that counts steps in a folder."""
    return partial(count_steps, place / "student", place / "outer")


def steps(place: Path) -> dict[str, int]:
    """Steps of students and of the outer loop that were begun, in all runs of a folder."""
    return {name: size_of(place / name) for name in ("student", "outer")}


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def start_job(command: Command, place: Path, size: int) -> list[BaseProcess]:
    """Start a run, or a job of two processes."""
    words, output = command.line(place / "run"), place / "output"
    if size == 1:
        return [start(words, output, counting(place))]
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    return [start(words, output, *[counting(place)][rank:], rank=rank, port=port) for rank in range(size)]


def disturb(label: str, processes: list[BaseProcess], place: Path, step: float, chance: random.Random) -> None:
    """Wait until a run has begun so many steps and is in the middle of the next, and bring a fault about."""
    victim = processes[chance.randrange(len(processes))]
    while victim.exitcode is None and sum(steps(place).values()) < int(step):
        victim.join(0.001)
    victim.join(chance.random() * (0.5 if step < 1 else 0.03))  # it takes so long to start; a step and its checkpoint
    if victim.exitcode is not None:
        return
    pid = int(victim.pid or 0)
    if label in ("kill", "process dies"):
        os.kill(pid, signal.SIGKILL)
    elif label == "terminate":
        os.kill(pid, signal.SIGTERM)
    elif label == "worker killed":
        workers = list_workers(victim)
        if workers:
            os.kill(chance.choice(workers), signal.SIGKILL)
    else:
        files = sorted(Path("images/train").rglob("*.png"))
        for file in chance.sample(files, 3):
            if label == "image gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:40])


def last_line(text: str) -> str:
    """The last line that is no progress bar's."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line and "it/s" not in line]
    return lines[-1][:300] if lines else ""
