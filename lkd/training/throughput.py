"""How fast a training goes, and which part of its steps takes the time: measured, or counted before it runs."""

import math
import time
from collections import defaultdict, deque
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

aten = torch.ops.aten
LAUNCH_SECONDS = 5e-6  # that an operation takes at least
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


class OperationCounter(TorchDispatchMode):
    """Counts what a `StepClock` measures, on tensors that may have no contents, and the bytes that are alive at once.

    An operation takes the longest of computing, at so many FLOP/s, moving, at so many bytes/s, and launching. FLOPs are
    those of convolutions and matrix products, a multiply-add counted as two. Numbers that the code asks of tensors are
    1, so that checks for finite values pass; of what is looked for nothing is found.
    """

    def __init__(self, flop_rate: float = math.inf, bandwidth: float = math.inf, matmul_rate: float = math.inf) -> None:
        super().__init__()
        self.flop_rate, self.bandwidth, self.matmul_rate = flop_rate, bandwidth, matmul_rate
        self.alive, self.bytes, self.found = WeakIdKeyDictionary(), 0, WeakIdKeyDictionary()
        self.start()

    def start(self) -> None:
        """Count anew from here; what is alive stays."""
        self.peak, self.operations, self.since_lap = self.bytes, 0, (0.0, 0.0)
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    def lap(self, part: str) -> None:
        """The work since the last mark was this part's, as `StepClock` has it of time."""
        flops, seconds = self.since_lap
        if seconds:
            self.flops[part] += flops
            self.seconds[part] += seconds
        self.since_lap = 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.operations += not func.is_view
        if func is aten._local_scalar_dense.default:
            if args[0] in self.found:
                return False
            return args[0].dtype.is_floating_point or args[0].dtype is torch.bool or 1
        out = func(*args, **kwargs)
        if func.overloadpacket is aten.any:
            self.found[out] = True
        if func is aten.empty_like.default and kwargs.get("device") == torch.device("meta"):
            return out  # of a trajectory that is stored without its values
        inputs, outputs = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        if func.namespace == "aten":
            flops, moved = count_flops(func, args, kwargs, out), count_bytes(func, inputs, outputs)
            if flops or moved:
                before, seconds = self.since_lap
                plain = outputs and outputs[0].dtype is torch.float32 and "convolution" not in func.name()
                rate = self.matmul_rate if plain else self.flop_rate
                taken = max(flops / rate, moved / self.bandwidth, LAUNCH_SECONDS)
                self.since_lap = before + flops, seconds + taken
        for storage in (tensor.untyped_storage() for tensor in outputs):
            if storage not in self.alive:
                self.alive[storage] = True
                self.bytes += storage.nbytes()
                finalize(storage, self.release, storage.nbytes())
                self.peak = max(self.peak, self.bytes)
        return out

    def release(self, size: int) -> None:
        """A tensor's memory is free."""
        self.bytes -= size


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> int:
    """FLOPs of a convolution or matrix product; torch's count lacks grouped gradients, and attention on CPUs."""
    if func is aten.convolution_backward.default:
        gradient, images, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        once = conv_flop_count(images.shape, weight.shape, gradient.shape, transposed)
        return once * (bool(mask[0]) + bool(mask[1]))
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return sdpa_flop_count(*(tensor.shape for tensor in args[:3]))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return sdpa_backward_flop_count(*(tensor.shape for tensor in args[:4]))
    packet = func.overloadpacket
    return flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0


def count_bytes(func: Any, inputs: list[Tensor], outputs: list[Tensor]) -> int:
    """Bytes that an operation reads and writes; views and empty tensors move nothing."""
    if func.is_view or "empty" in func.name() or not (outputs or func._schema.is_mutable):
        return 0
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    if not func._schema.is_mutable and any(tensor.untyped_storage()._cdata in storages for tensor in outputs):
        return 0
    return sum(min(t.numel() * t.element_size(), t.untyped_storage().nbytes()) for t in [*inputs, *outputs])
