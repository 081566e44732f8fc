"""Ctrl-C and SIGTERM as a question asked between steps, never an exception inside one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Training stopped at a step boundary because it was asked to; everything up to there is saved.

    Attributes:
        exit_code: What the command exits with, 128 and the signal's number, as in a shell: 130 after Ctrl-C, 143 after
            SIGTERM (preemption).
    """

    exit_code = 128 + signal.SIGTERM


class StopRequest:
    """Whether someone asked the process to stop, and by which signal."""

    def __init__(self) -> None:
        self.number: int | None = None

    def __bool__(self) -> bool:
        return self.number is not None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second Ctrl-C stops at once."""
        if self and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.number = self.number or number


@contextmanager
def deferred_interrupts() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM only set the request; the block around it learns of them at its end."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    except Interrupted as stopped:
        stopped.exit_code = 128 + request.number if request.number else stopped.exit_code
        raise
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        outer = getattr(previous[signal.SIGTERM], "__self__", None)
        if isinstance(outer, StopRequest):
            outer.number = outer.number or request.number
