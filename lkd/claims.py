"""Who does which piece of work, among processes and hosts that share a folder.

The claim of a result is a file beside it, `RESULT.claim.N`, made with O_CREAT | O_EXCL, so that one process only gets
it; it names host, process and time. Its owner renews the file's time while it works. A claim is stale if its owner was
a process of this host that is no longer there, or if its time has not changed while an observer watched for
`STALE_AFTER` seconds (on the observer's own clock: clocks of hosts need not agree). A stale claim N is taken over by
making claim N + 1, never by removing N: of two that try, one gets it.

An owner that was suspended for longer than that and comes back does its work a second time; results are written
atomically and are a function of the cell, so that nothing else is harmed.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

RENEW_EVERY = 10.0
STALE_AFTER = 60.0


class Watch:
    """An observer of claims; it remembers when it saw a claim's time change.

    Args:
        stale_after: Seconds without renewal after which a claim is stale.
    """

    def __init__(self, stale_after: float = STALE_AFTER) -> None:
        self.stale_after = stale_after
        self.seen: dict[Path, tuple[int, float]] = {}

    def free_claim(self, result: Path) -> Path | None:
        """The claim file that would win this result's work; None while someone else is at it."""
        number = -1
        for path in result.parent.glob(f"{result.name}.claim.*"):
            number = max(number, int(path.suffix[1:]))
        last = claim_path(result, number)
        return claim_path(result, number + 1) if number < 0 or self.is_stale(last) else None

    def is_stale(self, claim: Path) -> bool:
        """Whether the owner is gone."""
        try:
            changed = claim.stat().st_mtime_ns
            owner = json.loads(claim.read_text())
        except (FileNotFoundError, ValueError):  # released just now, or just made and still empty
            changed, owner = 0, {}
        if owner.get("host") == host_name() and not process_exists(owner["pid"]):
            return True
        now = time.monotonic()
        if self.seen.get(claim, (None, now))[0] != changed:
            self.seen[claim] = (changed, now)
        return now - self.seen[claim][1] > self.stale_after


def claim_path(result: Path, number: int) -> Path:
    """A claim's file."""
    return result.with_name(f"{result.name}.claim.{number}")


def host_name() -> str:
    """This host, and on Linux its process namespace: containers may share a host name, not process numbers."""
    try:
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_exists(pid: int) -> bool:
    """Whether a process of this host is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def claimed(result: Path, claim: Path, renew_every: float = RENEW_EVERY) -> Iterator[bool]:
    """Hold a claim within the block; True if the work is ours to do.

    Args:
        result: The file that the work will write.
        claim: What `Watch.free_claim` gave.
        renew_every: Seconds between renewals.
    """
    claim.parent.mkdir(parents=True, exist_ok=True)
    try:
        handle = os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        yield False
        return
    with os.fdopen(handle, "w") as file:
        json.dump({"host": host_name(), "pid": os.getpid(), "time": time.time()}, file)
    over = threading.Event()
    renewal = threading.Thread(target=renew, args=(claim, over, renew_every), daemon=True)
    renewal.start()
    try:
        yield not result.exists()  # someone may have finished since we looked
    finally:
        over.set()
        renewal.join()
        if result.exists():
            for path in result.parent.glob(f"{result.name}.claim.*"):
                path.unlink(missing_ok=True)
        claim.unlink(missing_ok=True)


def renew(claim: Path, over: threading.Event, every: float) -> None:
    """Touch a claim until it is over."""
    while not over.wait(every):
        with suppress(FileNotFoundError):
            os.utime(claim)
