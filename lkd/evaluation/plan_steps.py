"""What the steps of a recipe compute, move and hold, counted on tensors without contents."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry

from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parts import ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.data.batches import Batches
from lkd.data.images import Batch
from lkd.losses.learned.loss import LearnedLoss, build_learned_loss
from lkd.losses.loss import DistillationLoss
from lkd.meta_training.checks import AUDITED
from lkd.meta_training.rollouts import (
    OBJECTIVES,
    build_inner_optimizer,
    compute_inner_loss,
    compute_outer_logits,
    list_inner_batches,
)
from lkd.models.build import OWN_NETWORKS
from lkd.models.teacher import Teacher, load_teacher_network
from lkd.training.build import (
    Images,
    choose_student,
    open_teacher,
    prepare_learned_loss,
    prepare_loss,
)
from lkd.training.training import Training
from meta import ESTIMATORS, Problem, State, Tensors

# ----------------------------------------------------------------------------------------------------------------------
# GPUs by their datasheets.


class Gpu(NamedTuple):
    """What the vendor states. Rates of matrix units are dense: half of what is advertised with sparsity.

    Attributes:
        name: As the vendor calls it.
        bfloat16: TFLOP/s of matrix units in bfloat16.
        tensorfloat32: The same in TensorFloat-32, which convolutions of float32 tensors use by default.
        bandwidth: Of its memory, GB/s.
        memory: GB.
    """

    name: str
    bfloat16: float
    tensorfloat32: float
    bandwidth: float
    memory: float

    def rate(self, precision: str) -> float:
        """FLOP/s for tensors of this type."""
        return 1e12 * (self.bfloat16 if precision == "bfloat16" else self.tensorfloat32)


GPUS = {
    "h100_sxm": Gpu("H100 SXM 80 GB", 989.4, 494.7, 3350, 80),
    "a100_sxm_80gb": Gpu("A100 SXM 80 GB", 312, 156, 2039, 80),
    "l40s": Gpu("L40S", 362, 183, 864, 48),
    "rtx_4090": Gpu("GeForce RTX 4090", 165.2, 82.6, 1008, 24),
}


# ----------------------------------------------------------------------------------------------------------------------
# Count what operations compute, move and hold, on tensors without contents.

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

    It stands in for the clock of a training (`training.throughput.StepClock`), which tells it whose the operations are.
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


# ----------------------------------------------------------------------------------------------------------------------
# The real steps of a recipe on tensors without contents: what they compute, move and hold.


class DryStep(NamedTuple):
    """One step of a training.

    Attributes:
        parts: Part of the step (teacher, student, loss) → its work.
        peak: Bytes that are alive at once at most: weights, gradients, optimiser, activations, batch.
        weights: Bytes of it that lie there all the time: weights, optimiser's state, moving average.
        parameters: Network → its parameters.
    """

    parts: dict[str, Work]
    peak: int
    weights: int
    parameters: dict[str, int]


class DryBatches(Batches):
    """Batches of a data set that is not there.

    Args:
        images: Of no images: what they would look like.
        batch_size: Images a step.
        device: Where they go.
    """

    def __init__(self, images: Images, batch_size: int, device: str = "cpu") -> None:
        self.images, self.batch_size, self.steps_per_epoch = images.train, batch_size, 1000
        self.device, self.part, self.seed = torch.device(device), (0, 1), 0

    def at(self, step: int) -> Batch:
        """The batch of this step."""
        shape = self.batch_size, *self.images.image_shape
        pixels = torch.zeros(shape, dtype=torch.uint8, device=self.device)
        nothing = torch.zeros(self.batch_size, dtype=torch.int64, device=self.device)
        return Batch(self.images.normalize(pixels), nothing, nothing, nothing)


def run_dry_step(
    student: ModelRecipe,
    teacher: TeacherRecipe | None,
    loss: Callable[[], DistillationLoss],
    train: TrainRecipe,
    images: Images,
    gpu: Gpu,
) -> DryStep:
    """Take two steps of a training; the second one, with the optimiser's state there, is counted.

    Args:
        student: The student.
        teacher: An untrained teacher; None where the loss needs none.
        loss: Builds the loss.
        train: The training; its batch is that of one GPU.
        images: Shapes and classes.
        gpu: Whose rates turn work into seconds.
    """
    precision = precision_of(train)
    train = dataclasses.replace(train, compile=False, channels_last=False, precision=precision)
    counter = OperationCounter(gpu.rate(precision), gpu.bandwidth * 1e9)
    with without_contents(counter):
        taught_by = build_untrained_teacher(teacher, images) if teacher else None
        batches = DryBatches(images, train.batch_size)
        network = choose_student(dataclasses.replace(student, pretrained=False), images.train).make()
        built = loss()
        built.to = lambda *_: built  # type: ignore  # tensors without contents cannot be moved
        training = Training(network, built, Teacher(taught_by) if taught_by else None, batches, train)
        training.clock = training.computation.clock = counter  # type: ignore[assignment]
        training.run_step()
        training.optimizer.zero_grad()
        counter.reset()
        weights = counter.peak
        training.run_step()
        networks = {"student": network, "teacher": taught_by, "loss": training.loss}
        parameters = {name: sum(p.numel() for p in each.parameters()) for name, each in networks.items() if each}
        return DryStep(counter.parts, counter.peak, weights, parameters)


def precision_of(train: TrainRecipe) -> Literal["float32", "bfloat16"]:
    """What a training computes in on a GPU."""
    return "float32" if train.precision == "float32" else "bfloat16"


def name_untrained(teacher: TeacherRecipe) -> TeacherRecipe:
    """The teacher's network without its weights, which a plan does not read.

    Raises:
        UserError: If it has no name, and no file says it.
    """
    if teacher.name:
        name, options = teacher.name, teacher.options
    else:
        architecture = load_teacher_network(teacher.path)[1]["architecture"]
        name, options = architecture["name"], architecture.get("options") or {}
    return TeacherRecipe(path="random", name=name, options=options)


def build_untrained_teacher(teacher: TeacherRecipe, images: Images) -> nn.Module:
    """Build the network of `name_untrained`."""
    model = ModelRecipe(str(teacher.name), options={} if teacher.name in OWN_NETWORKS else teacher.options)
    return choose_student(model, images.train).make()


def plan_loss(
    specification: dict[str, Any] | str, student: ModelRecipe, teacher: TeacherRecipe, images: Images
) -> tuple[Callable[[], DistillationLoss], str]:
    """How a recipe's loss is built, and what it is called.

    Raises:
        UserError: If the loss, or one of the networks, is not good.
    """
    if isinstance(specification, str) and specification.endswith(".safetensors") and not Path(specification).exists():
        return lambda: build_learned_loss("logits", {}).requires_grad_(False), "the default learned loss, not there yet"
    named = specification if isinstance(specification, str) else str(specification.get("name"))

    def fit() -> DistillationLoss:
        opened = open_teacher(teacher, images.train)
        return prepare_loss(specification, choose_student(student, images.train), opened, images, 0)

    return fit, named


def build_untrained_loss(recipe: MetaTrainRecipe, images: Images) -> LearnedLoss:
    """The loss networks of a recipe whose teacher is untrained."""
    students = [choose_student(model, images.train) for model in recipe.students or [recipe.student]]
    opened = open_teacher(recipe.teacher, images.train)
    return prepare_learned_loss(recipe.meta.kind, recipe.meta.loss, students, opened, images, recipe.seed)


# ----------------------------------------------------------------------------------------------------------------------
# One hypergradient of a recipe on tensors without contents: what its estimator computes, moves and holds.

LENGTHS = (2, 3)  # inner steps that are run; longer rollouts lie on the line through both


class DryRollout(NamedTuple):
    """One hypergradient.

    Attributes:
        work: Of the teacher's answers, the rollout and the walk back.
        peak: Bytes that are alive at once at most.
        growth: Of them, bytes that each further inner step adds.
    """

    work: Work
    peak: float
    growth: float


def plan_rollout(
    recipe: MetaTrainRecipe, student: ModelRecipe, teacher: TeacherRecipe, images: Images, gpu: Gpu
) -> dict[str, DryRollout]:
    """Plan one hypergradient with the recipe's estimator.

    Returns:
        Estimator → `DryRollout`. An audited estimator is first_order as long as that is right, and else adjoint: both
        are there.
    """
    names = ("first_order", "adjoint") if recipe.meta.estimator == AUDITED else (recipe.meta.estimator,)
    return {name: extrapolate(recipe, student, teacher, images, gpu, name) for name in names}


def extrapolate(
    recipe: MetaTrainRecipe, student: ModelRecipe, teacher: TeacherRecipe, images: Images, gpu: Gpu, estimator: str
) -> DryRollout:
    """Run short rollouts, and follow the line through them to the recipe's length."""
    length = recipe.meta.rollout_steps
    short, long = (min(length, each) for each in LENGTHS)
    first, second = (run_dry_rollout(recipe, student, teacher, images, gpu, estimator, k) for k in (short, long))
    if short == long:
        return DryRollout(first[0], max(first[1]), 0.0)
    steps = (length - long) / (long - short)

    def follow(before: float, after: float) -> float:
        return after + (after - before) * steps

    work = Work(*map(follow, dataclasses.astuple(first[0]), dataclasses.astuple(second[0])))
    peaks = [(follow(*each), (each[1] - each[0]) / (long - short)) for each in zip(first[1], second[1], strict=True)]
    return DryRollout(work, *max(peaks))


def run_dry_rollout(
    recipe: MetaTrainRecipe,
    student: ModelRecipe,
    teacher: TeacherRecipe,
    images: Images,
    gpu: Gpu,
    estimator: str,
    length: int,
) -> tuple[Work, tuple[int, int]]:
    """One hypergradient over so many inner steps, in float32: its work, and the peaks of teacher and estimator, bytes.

    The two grow with the steps each in its own way.
    """
    counter = OperationCounter(gpu.rate("float32"), gpu.bandwidth * 1e9)
    settings, train = recipe.meta, recipe.train
    without_autocast = patch.object(torch, "autocast", lambda *_, **__: nullcontext())  # the meta device has none
    with torch.device("meta"), without_autocast, counter:
        taught_by = Teacher(build_untrained_teacher(teacher, images))
        model = dataclasses.replace(student, pretrained=False)
        network = choose_student(model, images.train).make().train()
        loss = build_untrained_loss(dataclasses.replace(recipe, teacher=teacher), images)
        parameters = {name: p.detach() for name, p in network.named_parameters()}
        buffers = dict(network.named_buffers())
        momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
        state = State(parameters, buffers, {"momentum_buffer": momentum})
        outer_batch = DryBatches(images, settings.outer_batch_size, "meta").at(0)
        batches = DryBatches(images, train.batch_size, "meta")
        counter.reset()
        counter.start()

        def outer_loss(parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
            return OBJECTIVES[settings.objective](
                compute_outer_logits(network, parameters, buffers, batch), batch.target
            )

        inner_batches = list_inner_batches(batches, taught_by, 0.0, length, loss.teacher_stages)
        teacher_peak = counter.take_peak()
        problem = Problem(
            partial(compute_inner_loss, network, loss),
            outer_loss,
            state,
            {name: p.detach() for name, p in loss.named_parameters()},
            inner_batches,
            outer_batch,
            build_inner_optimizer(train, train.learning_rate, settings.annealing, length),
        )
        ESTIMATORS[estimator](problem)
        counter.lap("hypergradient")
    return counter.parts["hypergradient"], (teacher_peak, counter.take_peak())
