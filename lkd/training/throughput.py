"""How fast a training goes, and which part of its steps takes the time."""

import time
from collections import deque

import torch

PARTS = ("data", "teacher", "student", "loss")


class StepClock:
    """Seconds of each part of the steps: waiting for data, teacher, student (forward, backward, optimiser), loss.

    On a GPU the marks are events in its stream, read when it has passed them, so that no step waits for the clock; the
    time of `data` is then what the GPU waits for a batch.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self._last = 0.0
        self._events: deque[tuple[str | None, torch.cuda.Event]] = deque()

    def start(self) -> None:
        """Begin a step: what was before it counts for no part."""
        self.lap(None)

    def lap(self, part: str | None) -> None:
        """The time since the last mark was this part's."""
        if self.device.type != "cuda":
            now = time.perf_counter()
            if part:
                self.seconds[part] += now - self._last
            self._last = now
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        self._events.append((part, event))
        while len(self._events) > 1 and self._events[1][1].query():
            _, before = self._events.popleft()
            passed, after = self._events[0]
            if passed:
                self.seconds[passed] += before.elapsed_time(after) / 1000


class Throughput:
    """Images a second and the parts' shares of the time, since it was started.

    Args:
        clock: The training's.
        batch_size: Images a step, of all processes together.
    """

    def __init__(self, clock: StepClock, batch_size: int) -> None:
        self.clock = clock
        self.batch_size = batch_size
        self.start(0)

    def start(self, step: int) -> None:
        """Measure from now, before this step, on."""
        self.step, self.started, self.before = step, time.perf_counter(), dict(self.clock.seconds)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.started

    def read(self, step: int) -> dict[str, float]:
        """`images_per_second` and `time_share/PART`, which sum to 1, of the steps before this one since the start."""
        seconds = {part: value - self.before[part] for part, value in self.clock.seconds.items()}
        total = sum(seconds.values()) or 1.0
        shares = {f"time_share/{part}": value / total for part, value in seconds.items()}
        return {"images_per_second": (step - self.step) * self.batch_size / self.elapsed, **shares}


def format_throughput(figures: dict[str, float]) -> str:
    """What `Throughput.read` found, for a progress bar."""
    shares = ", ".join(f"{part} {figures[f'time_share/{part}']:.0%}" for part in PARTS)
    return f"{figures['images_per_second']:,.0f} images/s ({shares})"
