"""One episode: a run, a fault at a random moment, the run that goes on, and what came of it."""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.faults import FAULTS, Fault
from tests.faults.injections import Injection, Moment, count_steps, meet_soon
from tests.faults.subjects import COMMANDS, FILE_COMMANDS, Subject, read_results, write_images
from tests.processes import FORK, Command

LONGEST = 900.0  # seconds after which a run is taken to hang
BOUND = 60.0  # seconds within which a run must have ended after a fault from outside
ATTEMPTS = 20  # moments that are tried until a fault comes before the run is through
Row = dict[str, Any]


class Outcome(NamedTuple):
    """What a disturbed run did.

    Attributes:
        codes: Exit codes of its processes; None if one hung.
        said: What they printed.
        seconds: From the fault, if it came from outside, to the end.
        gone: Whether no worker was left.
        call: At which call the fault came; 0 if it came from outside.
    """

    codes: list[int | None]
    said: str
    seconds: float
    gone: bool
    call: int


class Bench:
    """Episodes in a folder, which becomes the current one; what they are compared with is made once."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
        write_images(Path("intact"))
        self.wholes: dict[tuple[str, bool, int], Row] = {}
        self.totals: dict[tuple[str, str], int] = {}
        self.references: dict[tuple[str, str, int], dict[str, str]] = {}

    def play(self, name: str, label: str, number: int) -> Row:
        """Run an episode; a fault that comes too late for the run to notice is tried at another moment."""
        fault, chance = FAULTS[label], random.Random(f"{name} {label} {number}")
        size = 2 if label == "process dies" else 1
        for _ in range(ATTEMPTS):
            place = clear("episode")
            outcome = self.disturb(name, label, place, size, chance)
            if has_happened(fault, place, outcome):
                break
        else:
            raise RuntimeError(f"{name}, {label}: the fault never came")
        kept = keeps_promise(fault, outcome, size) and (label != "terminate" or says_how_to_go_on(outcome))
        row: Row = {"command": name, "fault": label, "number": number, "call": outcome.call}
        row |= {"exit": " ".join(map(str, outcome.codes)), "said": last_line(outcome.said)}
        row |= {"seconds": round(outcome.seconds, 2), "exit_again": "", "warned": "", "steps_lost": 0}
        if fault.codes != (0,):
            kept = self.go_on(name, fault, place, size, row) and kept
        right = self.is_right(name, fault, place, size, outcome.call)
        finished = fault.codes == (0,) or row["exit_again"] == " ".join(["0"] * size)
        row["bitwise"] = int(right) if fault.exact else ""
        row["wrong"] = int(finished and not right)
        row["kept"] = int(kept and finished and right)
        if not row["kept"]:
            shutil.copytree(place, Path("broken") / f"{name} {label} {number}", dirs_exist_ok=True)
        return row

    def disturb(self, name: str, label: str, place: Path, size: int, chance: random.Random) -> Outcome:
        """Run a command until the fault, and see it end."""
        fault, command, moment = FAULTS[label], pick(name, FAULTS[label]), chance.random()
        restore_images()
        call, started = 0, time.monotonic()
        if fault.inject:
            workers = 2 if name == "compare" else 1
            call = 1 + int(moment * self.count_calls(name, label) / workers)
            injection = fault.inject(Moment(place / "calls", call, place / "fired", chance.randrange(2**32)))
            processes = start_job(command, place, size, injection)
        else:
            whole = self.run_whole(name, fault.files, size)
            processes = start_job(command, place, size)
            disturb_from_outside(label, processes, place, moment * (whole["student"] + whole["outer"] + 1), chance)
            started = time.monotonic()
        codes = [finish(process) for process in processes]
        seconds = time.monotonic() - started
        gone = all(wait_for_group(process) for process in processes)
        return Outcome(codes, (place / "output").read_text(), seconds, gone, call)

    def go_on(self, name: str, fault: Fault, place: Path, size: int, row: Row) -> bool:
        """Run the command again without a fault, add to the row, and say whether the promise is kept."""
        restore_images()
        command, whole = pick(name, fault), self.run_whole(name, fault.files, size)
        before = (place / "output").stat().st_size
        codes = [finish(process) for process in start_job(command, place, size)]
        said = (place / "output").read_text()[before:]
        student, outer = (steps(place)[key] - whole[key] for key in ("student", "outer"))
        row["exit_again"] = " ".join(map(str, codes))
        row["warned"] = " | ".join(line for line in said.splitlines() if "warning" in line)[:300]
        row["steps_lost"] = student + outer
        row["intervals_lost"] = round(max(student / command.interval, outer), 3)
        damaged = (place / "damaged").read_text() if (place / "damaged").exists() else ""
        named = damaged in said or not must_be_named(Path(damaged))
        return "Traceback" not in said and named and row["intervals_lost"] <= 1

    def is_right(self, name: str, fault: Fault, place: Path, size: int, call: int) -> bool:
        """Whether the results in the end are those that are promised."""
        command, whole = pick(name, fault), self.run_whole(name, fault.files, size)
        results = read_results(command, place / "run")
        if fault.exact:
            return results == whole["results"]
        if fault.reference:
            return results == self.find_reference(name, fault, size_of(place / "hypergradients") or call)
        return results.keys() == whole["results"].keys() and "unreadable" not in " ".join(results.values())

    def run_whole(self, name: str, files: bool, size: int) -> Row:
        """The undisturbed run: its results and steps."""
        key = (name, files, size)
        if key not in self.wholes:
            command = (FILE_COMMANDS if files else COMMANDS)[name]
            restore_images()
            place = finish_run(command, "whole", size)
            self.wholes[key] = {"results": read_results(command, place / "run"), **steps(place)}
        return self.wholes[key]

    def count_calls(self, name: str, label: str) -> int:
        """How often an undisturbed run calls what a fault comes with."""
        if (name, label) not in self.totals:
            inject = FAULTS[label].inject
            assert inject is not None
            moment = Moment(Path("count/calls").absolute(), 0, Path("count/fired").absolute())
            self.totals[name, label] = size_of(
                finish_run(pick(name, FAULTS[label]), "count", 1, inject(moment)) / "calls"
            )
        return self.totals[name, label]

    def find_reference(self, name: str, fault: Fault, call: int) -> dict[str, str]:
        """What the reference fault leaves when it comes at a call."""
        key = (name, fault.reference, call)
        if key not in self.references:
            inject = FAULTS[fault.reference].inject
            assert inject is not None
            moment = Moment(Path("reference/calls").absolute(), call, Path("reference/fired").absolute())
            place = finish_run(pick(name, fault), "reference", 1, inject(moment))
            self.references[key] = read_results(pick(name, fault), place / "run")
        return self.references[key]


def pick(name: str, fault: Fault) -> Subject:
    """The command, on the images that the fault needs."""
    command = (FILE_COMMANDS if fault.files else COMMANDS)[name]
    return replace(command, words=(*command.words, *fault.words))


def clear(name: str) -> Path:
    """An empty folder."""
    place = Path(name).absolute()
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    return place


def restore_images() -> None:
    """Undo what a fault did to image files."""
    shutil.rmtree("images", ignore_errors=True)
    shutil.copytree("intact", "images")


def start_job(command: Subject, place: Path, size: int, *injections: Injection) -> list[Command]:
    """Start a run, or a job of two processes, whose steps are counted; forks of this process, which start at once."""
    counting = partial(count_steps, place / "student", place / "outer")
    job = {}
    if size > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            job = {"WORLD_SIZE": str(size), "MASTER_ADDR": "localhost", "MASTER_PORT": str(probe.getsockname()[1])}
        injections = (*injections, meet_soon)
    return [
        Command(
            command.line(place / "run"),
            place / "output",
            job and job | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            partial(call_all, [*injections, *[counting][rank:]]),
            group=True,
            context=FORK,
        )
        for rank in range(size)
    ]


def call_all(injections: list[Injection]) -> None:
    for inject in injections:
        inject()


def finish(command: Command) -> int | None:
    """Wait for a run's end; its exit code, None if it hangs."""
    try:
        return command.wait(LONGEST)
    except subprocess.TimeoutExpired:
        return None


def wait_for_group(command: Command, seconds: float = 20.0) -> bool:
    """Wait until nothing of a run is left; whether that came about."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(command.pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.01)
    return False


def finish_run(command: Subject, folder: str, size: int, *injections: Injection) -> Path:
    """Run a command to its end in an empty folder; the folder."""
    place = clear(folder)
    codes = [finish(process) for process in start_job(command, place, size, *injections)]
    if any(code != 0 for code in codes):
        raise RuntimeError(f"lkd {' '.join(command.words)}: exit {codes}: {(place / 'output').read_text()[-2000:]}")
    return place


def steps(place: Path) -> dict[str, int]:
    """Steps of students and of the outer loop that were begun, in all runs of a folder."""
    return {name: size_of(place / name) for name in ("student", "outer")}


def size_of(path: Path) -> int:
    """Bytes of a file, 0 if there is none."""
    return path.stat().st_size if path.exists() else 0


def disturb_from_outside(label: str, processes: list[Command], place: Path, step: float, chance: random.Random) -> None:
    """Wait until a run has begun so many steps and is in the middle of the next, and bring a fault about."""
    victim = processes[chance.randrange(len(processes))]
    while victim.poll() is None and sum(steps(place).values()) < int(step):
        time.sleep(0.001)
    longest = 0.5 if step < 1 else 0.03  # it takes so long to start; a step and its checkpoint
    victim.process.join(chance.random() * longest)
    if victim.poll() is not None:
        return
    if label in ("kill", "process dies"):
        victim.send_signal(signal.SIGKILL)
    elif label == "terminate":
        victim.send_signal(signal.SIGTERM)
    elif label == "worker killed":
        workers = Path(f"/proc/{victim.pid}/task/{victim.pid}/children").read_text().split()
        if workers:
            os.kill(int(chance.choice(workers)), signal.SIGKILL)
    else:
        for file in chance.sample(sorted(Path("images/train").rglob("*.png")), 3):
            if label == "image gone":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:40])


def has_happened(fault: Fault, place: Path, outcome: Outcome) -> bool:
    """Whether a fault came before the run was through, and the run could notice."""
    if fault.files and fault.inject:  # an image that was read ahead may never be asked for
        return (place / "fired").exists() and outcome.codes != [0]
    if fault.inject:
        return (place / "fired").exists()
    if fault.codes == (0,):  # a run that had read all files could not see it
        return bool(re.search(fault.says, outcome.said))
    return 0 not in outcome.codes


def keeps_promise(fault: Fault, outcome: Outcome, size: int) -> bool:
    """Whether a disturbed run ended as is promised; of a job, the process that was not killed."""
    codes = outcome.codes if size == 1 else [code for code in outcome.codes if code != -signal.SIGKILL]
    return (
        all(code in fault.codes for code in codes)
        and "Traceback" not in outcome.said
        and bool(re.search(fault.says, outcome.said, re.MULTILINE))
        and (fault.inject is not None or outcome.seconds < BOUND)
        and outcome.gone
    )


def says_how_to_go_on(outcome: Outcome) -> bool:
    """Whether a run that stopped because it was asked to names the command that goes on."""
    return outcome.codes != [128 + signal.SIGTERM] or "go on with: lkd" in outcome.said


def must_be_named(damaged: Path) -> bool:
    """Whether the run that goes on reads this file: what it writes at its end is simply written again."""
    folder = damaged.parent.name
    return folder.startswith(("checkpoints", "student-", "cells")) or damaged.name.startswith(("seed-", "index"))


def last_line(text: str) -> str:
    """The last line that is no progress bar's."""
    lines = [line for line in re.split(r"[\r\n]+", text) if line.strip() and "%|" not in line and "it/s" not in line]
    return lines[-1][:300] if lines else ""
