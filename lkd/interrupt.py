"""Ctrl-C and SIGTERM as a question asked between steps, never an exception inside one."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Training stopped at a step boundary because it was asked to; everything up to there is saved."""


class StopRequest:
    """Whether someone asked the process to stop."""

    def __init__(self) -> None:
        self.received = False

    def __bool__(self) -> bool:
        return self.received

    def handle(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; a second Ctrl-C stops at once."""
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = True


@contextmanager
def deferred_interrupts() -> Iterator[StopRequest]:
    """Within the block SIGINT and SIGTERM only set the request."""
    request = StopRequest()
    previous = {number: signal.signal(number, request.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
