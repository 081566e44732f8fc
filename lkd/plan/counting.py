"""Count what operations compute, move and hold, on tensors without contents."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

aten = torch.ops.aten
SLACK = 1.0003  # how far a peak may be off
LAUNCH_SECONDS = 5e-6  # that an operation takes at least


@dataclass
class Work:
    """What operations did.

    Attributes:
        flops: Of convolutions and matrix products, a multiply-add counted as two.
        bytes: Read and written by all operations, each by itself, as they are without a compiler.
        seconds: At the rates that the counter was given: of every operation the longest of computing, moving and
            launching.
        operations: How many there were.
    """

    flops: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    operations: float = 0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))


class OperationCounter(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that are alive at once.

    It stands in for the clock of a training (`lkd.throughput.StepClock`), which tells it whose the operations are.
    Numbers that the code asks of tensors without contents are 1, so that checks for finite values pass.

    Args:
        flop_rate: FLOP/s.
        bandwidth: Bytes a second.

    Attributes:
        parts: Part of the step → its work.
        peak: The most bytes that were alive at once since `reset`.
    """

    def __init__(self, flop_rate: float, bandwidth: float) -> None:
        super().__init__()
        self.flop_rate, self.bandwidth = flop_rate, bandwidth
        self.parts: dict[str, Work] = {}
        self.peak = 0
        self._since = Work()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._bytes = 0

    def reset(self) -> None:
        """Count anew from here; what is alive stays."""
        self.parts = {}
        self._since = Work()
        self.take_peak()

    def take_peak(self) -> int:
        """The peak so far; from here on it is that of what follows."""
        self._sweep()
        peak, self.peak = self.peak, 0
        self._sweep()
        return peak

    def start(self) -> None:
        """A step begins: what was before it is nobody's."""
        self._since = Work()

    def lap(self, part: str) -> None:
        """What was done since the last mark was this part's."""
        self.parts[part] = self.parts.get(part, Work()) + self._since
        self._since = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point or args[0].dtype is torch.bool or 1
        out = func(*args, **kwargs)
        if func is aten.empty_like.default and kwargs.get("device") == torch.device("meta"):
            return out  # `meta.trajectory.without_values`: no memory on any device
        inputs, outputs = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        if func.namespace == "aten":
            flops = count_flops(func, args, kwargs, out)
            moved = count_bytes(func, inputs, outputs)
            if flops or moved:
                seconds = max(flops / self.flop_rate, moved / self.bandwidth, LAUNCH_SECONDS)
                self._since += Work(flops, moved, seconds, 1)
        for tensor in outputs:
            self._hold(tensor)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        reference = StorageWeakRef(storage)
        if reference.cdata in self._alive:
            return
        self._alive[reference.cdata] = reference, storage.nbytes()
        self._bytes += storage.nbytes()
        if self._bytes > self.peak * SLACK:
            self._sweep()

    def _sweep(self) -> None:
        """Forget what is no longer alive: only then the sum is right, and only a new peak needs it."""
        self._alive = {key: (ref, size) for key, (ref, size) in self._alive.items() if not ref.expired()}
        self._bytes = sum(size for _, size in self._alive.values())
        self.peak = max(self.peak, self._bytes)


@contextmanager
def without_contents(counter: OperationCounter) -> Iterator[None]:
    """Within, tensors have shapes but no memory, and the counter sees every operation."""
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        yield


def count_flops(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """FLOPs of a convolution or matrix product; torch's own count but for the gradients of grouped convolutions."""
    if func is aten.convolution_backward.default:
        gradient, images, weight, transposed, mask = args[0], args[1], args[2], args[7], args[10]
        once = conv_flop_count(images.shape, weight.shape, gradient.shape, transposed)
        return once * (bool(mask[0]) + bool(mask[1]))
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
