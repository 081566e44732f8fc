"""What a training costs: seconds and memory of its steps, evaluation left out."""

import ctypes
import gc
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch


class Cost:
    """Seconds and peak memory of the blocks that `measured` encloses.

    On CUDA memory is the allocator's. On Linux it is resident memory: before each block what the process has freed goes
    back to the system and the kernel's peak is reset, so that earlier trainings of the process do not count. Elsewhere
    it is not measured.

    Args:
        device: Where the training runs.

    Attributes:
        seconds: Of all blocks.
        peak_mib: The highest peak of a block above what was in use when this object was made, MiB; None where it cannot
            be measured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.peak_mib: float | None = None
        gc.collect()
        self.idle = self._reset()

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Count what happens within."""
        self._reset()
        started = time.perf_counter()
        try:
            yield
        finally:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self.seconds += time.perf_counter() - started
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else resident("VmHWM")
        if self.idle is not None and peak is not None:
            self.peak_mib = max(self.peak_mib or 0.0, peak - self.idle)

    def _reset(self) -> float | None:
        """Start a new peak; the memory in use, MiB."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            return torch.cuda.memory_allocated(self.device) / 2**20
        try:
            ctypes.CDLL(None).malloc_trim(0)
            Path("/proc/self/clear_refs").write_text("5")
        except (OSError, AttributeError, TypeError):
            return None
        return resident("VmRSS")


def resident(key: str) -> float | None:
    """An entry of this process's status, MiB; None where the system has none."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(key)), None)
