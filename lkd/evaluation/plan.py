"""What a run will take, before it runs: its steps are counted on tensors that have shapes and no contents."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple
from weakref import finalize

import torch
from tabulate import tabulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import conv_flop_count, flop_registry
from torch.utils.weak import WeakIdKeyDictionary

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import PlanRecipe
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe, PoolSettings
from lkd.config.parts import DataRecipe, ModelRecipe, TeacherRecipe
from lkd.config.worlds import expand_worlds
from lkd.core.errors import UserError, explained
from lkd.core.files import flatten, write_json, write_text
from lkd.core.outputs import Outputs
from lkd.data.image_files import ImageFiles
from lkd.data.images import Batch, ImageSet
from lkd.data.splits import choose_meta_validation_size
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.loss import DistillationLoss
from lkd.meta_training.meta_train import check_settings
from lkd.meta_training.outer_loop import AUDITED
from lkd.meta_training.rollouts import OBJECTIVES, build_inner_optimizer, compute_inner_loss, compute_outer_logits
from lkd.meta_training.worlds import name_world
from lkd.models.build import OWN_NETWORKS
from lkd.models.teacher import load_teacher_network
from lkd.models.teacher_cache import bytes_of_answer, largest_top_k
from lkd.pool.pool import split_state
from lkd.training.build import Images, LossBuilder, choose_student, open_teacher, prepare_images, prepare_learned_loss
from lkd.training.optimizer import build_optimizer, choose_optimizer
from lkd.training.training import keep_stages, widen_outputs
from meta import ESTIMATORS, Problem, State, Tensors

aten = torch.ops.aten
HOUR = 3600.0
LAUNCH_SECONDS = 5e-6  # that an operation takes at least
LENGTHS = (2, 3)  # inner steps that are run; longer rollouts lie on the line through both
# Training images, classes, channels, pixels of what is planned without its files; 0: as many as the recipe says.
KNOWN = {"image_folder": (1_281_167, 1000, 3, 0), "cifar10": (50_000, 10, 3, 32), "cifar100": (50_000, 100, 3, 32)}
KNOWN |= dict.fromkeys(("fashion_mnist", "fashion_mnist_unseen", "fashion_mnist_rest"), (60_000, 10, 1, 28))


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


GPUS = {
    "h200_sxm": Gpu("H200 SXM 141 GB", 989.4, 494.7, 4800, 141),
    "h100_sxm": Gpu("H100 SXM 80 GB", 989.4, 494.7, 3350, 80),
    "a100_sxm_80gb": Gpu("A100 SXM 80 GB", 312, 156, 2039, 80),
    "l40s": Gpu("L40S", 362, 183, 864, 48),
    "rtx_4090": Gpu("GeForce RTX 4090", 165.2, 82.6, 1008, 24),
}


class OperationCounter(TorchDispatchMode):
    """Counts operations, and the bytes of the tensors that are alive at once.

    Numbers that the code asks of tensors without contents are 1, so that checks for finite values pass.

    Args:
        gpu: At whose rates an operation takes the longest of computing, moving and launching.
        precision: Of the tensors.

    Attributes:
        part: Whose operations they are from here on.
        flops: Part → FLOPs of convolutions and matrix products, a multiply-add counted as two.
        seconds: Part → seconds.
        peak: The most bytes that were alive at once.
    """

    def __init__(self, gpu: Gpu, precision: str) -> None:
        super().__init__()
        self.flop_rate = 1e12 * (gpu.bfloat16 if precision == "bfloat16" else gpu.tensorfloat32)
        self.bandwidth = 1e9 * gpu.bandwidth
        self.alive, self.bytes = WeakIdKeyDictionary(), 0
        self.start("")

    def start(self, part: str) -> None:
        """Count anew from here; what is alive stays."""
        self.part, self.peak = part, self.bytes
        self.flops: dict[str, float] = defaultdict(float)
        self.seconds: dict[str, float] = defaultdict(float)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return args[0].dtype.is_floating_point or args[0].dtype is torch.bool or 1
        out = func(*args, **kwargs)
        if func is aten.empty_like.default and kwargs.get("device") == torch.device("meta"):
            return out  # of a trajectory that is stored without its values
        inputs, outputs = ([t for t in tree_leaves(tree) if isinstance(t, Tensor)] for tree in ((args, kwargs), out))
        if func.namespace == "aten":
            flops, moved = count_flops(func, args, kwargs, out), count_bytes(func, inputs, outputs)
            if flops or moved:
                self.flops[self.part] += flops
                self.seconds[self.part] += max(flops / self.flop_rate, moved / self.bandwidth, LAUNCH_SECONDS)
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
# A step of a training, and a hypergradient.


@dataclass(frozen=True)
class PlannedWorld:
    """What the steps of a recipe meet.

    Attributes:
        recipe: The recipe; its networks without their weights.
        meta: Its outer loop, if it has one.
        pool: Its pool, if it has one.
        loss: What its trainings are counted with.
        images: Shapes and classes, no images.
        count: Training images.
        decoded: Whether each image is decoded when a batch needs it.
        name: What it is called among several.
    """

    recipe: PlanRecipe
    meta: MetaSettings
    pool: PoolSettings
    loss: dict[str, Any] | str
    images: Images
    count: int
    decoded: bool
    name: str = ""

    @property
    def part_of_batch(self) -> int:
        """Images of a batch on each GPU."""
        return self.recipe.train.batch_size // self.recipe.gpus

    def make_batch(self, size: int) -> Batch:
        """A batch of zeros."""
        labels = torch.zeros(size, dtype=torch.int64)
        return Batch(torch.zeros(size, *self.images.train.image_shape), labels, labels, labels)

    def ask_teacher(self, teacher: Any, images: Tensor, stages: tuple[str, ...]) -> Outputs:
        """The teacher's outputs; those of a cache cost nothing."""
        if self.recipe.teacher.cache:
            return Outputs(torch.empty(len(images), self.images.train.num_classes), {})
        with torch.no_grad():
            return keep_stages(teacher.network(images), stages)


class Counted(NamedTuple):
    """Work of a step: FLOPs and seconds by part, most bytes that are alive at once, parameters by network."""

    flops: dict[str, float]
    seconds: dict[str, float]
    peak: float
    parameters: dict[str, int]


def count_step(world: PlannedWorld, model: ModelRecipe, loss: dict[str, Any] | str, size: int) -> Counted:
    """Take two steps of a training with batches of this size; the second one, with momentum there, is counted."""
    train, shapes, precision = world.recipe.train, world.images.train, choose_precision(world.recipe)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision == "bfloat16")
    counter = OperationCounter(GPUS[world.recipe.gpu], precision)
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        builder, teacher = choose_student(model, shapes), open_teacher(world.recipe.teacher, shapes)
        student = builder.make().train()
        if is_missing(loss):  # yet to be learned: the default form
            fitted: DistillationLoss = build_learned_loss("logits", {}).requires_grad_(False)
        else:
            with unset_fake_temporarily():  # what its file holds is real
                opened = LossBuilder(loss, teacher, world.images)
            fitted = opened.build(builder, 0)
        optimizer = build_optimizer(student, train, fitted)
        for _ in range(2):
            optimizer.zero_grad()
            columns = [column.split(size // train.accumulation) for column in world.make_batch(size)]
            counter.start("teacher")
            for batch in map(Batch._make, zip(*columns, strict=True)):
                counter.part = "teacher"
                with autocast():
                    answers = world.ask_teacher(teacher, batch.images, fitted.teacher_stages)
                    counter.part = "student"
                    outputs = student(batch.images)
                counter.part = "loss"  # until, backward, the gradient of the logits is there
                outputs.logits.register_hook(lambda _: setattr(counter, "part", "student"))
                outputs = widen_outputs(outputs if fitted.teacher_stages else keep_stages(outputs, ()))
                identity = {"index": batch.index} if fitted.needs_index else {}
                terms = fitted(outputs, widen_outputs(answers), batch.target, 0.5, **identity)
                torch.stack(list(terms.values())).sum().backward()
            optimizer.step()
    networks = {"student": student, "teacher": teacher.network, "loss": fitted}
    parameters = {name: sum(p.numel() for p in each.parameters()) for name, each in networks.items()}
    average = 4 * parameters["student"] if train.ema_decay or train.swa_epochs else 0
    return Counted(counter.flops, counter.seconds, counter.peak + average, parameters)


def count_hypergradient(world: PlannedWorld, model: ModelRecipe, estimator: str) -> Counted:
    """Count short rollouts, and follow the line through them to the recipe's length."""
    length = world.meta.rollout_steps
    short, long = (min(length, each) for each in LENGTHS)
    first, second = (count_rollout(world, model, estimator, each) for each in (short, long))
    slope = (length - long) / max(long - short, 1)
    flops, seconds, *peaks = (b + (b - a) * slope for a, b in zip(first, second, strict=True))
    return Counted({estimator: flops}, {estimator: seconds}, max(peaks), {})


def count_rollout(
    world: PlannedWorld, model: ModelRecipe, estimator: str, length: int
) -> tuple[float, float, int, int]:
    """FLOPs and seconds of one hypergradient in float32; peaks of the teacher's answers and of the estimator, bytes."""
    meta, train, shapes = world.meta, world.recipe.train, world.images.train
    counter = OperationCounter(GPUS[world.recipe.gpu], "float32")
    with torch.device("meta"), counter:
        student, teacher = choose_student(model, shapes).make().train(), open_teacher(world.recipe.teacher, shapes)
        loss = build_loss_networks(world)
        parameters, buffers = split_state(student)
        parameters = {name: p.detach() for name, p in parameters.items()}
        is_sgd = choose_optimizer(train) is torch.optim.SGD  # Adam's moments are there after the first step
        momentum = {name: torch.zeros_like(p) for name, p in parameters.items()}
        state = State(parameters, buffers, {"momentum_buffer": momentum} if is_sgd else {})
        hyper = {name: p.detach() for name, p in loss.named_parameters()}
        outer_batch = world.make_batch(meta.outer_batch_size)

        def outer_loss(parameters: Tensors, buffers: Tensors, batch: Batch) -> Tensor:
            logits = compute_outer_logits(student, parameters, buffers, batch)
            return OBJECTIVES[meta.objective](logits, batch.target)

        counter.start(estimator)
        batches = [world.make_batch(train.batch_size) for _ in range(length)]
        answers = [world.ask_teacher(teacher, batch.images, loss.teacher_stages) for batch in batches]
        inner_batches = [(batch, answer, 0.5) for batch, answer in zip(batches, answers, strict=True)]
        teacher_peak, counter.peak = counter.peak, counter.bytes
        optimizer = build_inner_optimizer(student, train, train.learning_rate, meta.annealing, length)
        inner_loss = partial(compute_inner_loss, student, loss)
        problem = Problem(inner_loss, outer_loss, state, hyper, inner_batches, outer_batch, optimizer)
        with explained(f"meta.estimator {estimator}"):
            ESTIMATORS[estimator](problem)
    return counter.flops[estimator], counter.seconds[estimator], teacher_peak, counter.peak


def build_loss_networks(world: PlannedWorld) -> DistillationLoss:
    """The loss networks that a meta-training learns."""
    recipe, shapes = world.recipe, world.images.train
    students = [choose_student(model, shapes) for model in recipe.students or [recipe.student]]
    teacher = open_teacher(recipe.teacher, shapes)
    return prepare_learned_loss(world.meta.kind, world.meta.loss, students, teacher, world.images, 0)


def is_missing(loss: dict[str, Any] | str) -> bool:
    """Whether a loss is a file that is yet to be learned."""
    return isinstance(loss, str) and loss.endswith(".safetensors") and not Path(loss).exists()


def choose_precision(recipe: PlanRecipe) -> str:
    """What a training computes in on a GPU."""
    return "float32" if recipe.train.precision == "float32" else "bfloat16"


# ----------------------------------------------------------------------------------------------------------------------
# What the steps take, how many there are, and what that is in hours, memory and data.


def plan(recipe: PlanRecipe) -> dict[str, Any]:
    """Plan a recipe; write plan.json and plan.txt if it says where.

    Raises:
        UserError: If the recipe is not good.
    """
    is_learned = bool(recipe.meta or recipe.pool or recipe.worlds or recipe.draw.worlds)
    trainings = count_trainings(open_worlds(recipe, is_learned))
    first, trained = trainings[0], sum(each.hours for each in trainings)
    result: dict[str, Any] = {
        "command": "meta-train" if is_learned else "distill",
        "teacher": join(each.world.recipe.teacher.name for each in trainings),
        "student": join(each.model.name for each in trainings),
        "loss": name_loss(first.world.loss),
        "precision": join(choose_precision(each.world.recipe) for each in trainings),
        "epochs": span(each.world.recipe.train.epochs for each in trainings),
        "batch_size": span(each.world.recipe.train.batch_size for each in trainings),
        "steps": span(each.steps for each in trainings),
        "parameters": first.step.parameters,
        "step": {
            part: {
                "gflops_an_image": first.step.flops[part] / first.world.part_of_batch / 1e9,
                "share": seconds / sum(first.step.seconds.values()),
            }
            for part, seconds in first.step.seconds.items()
        },
        "memory_gigabytes": {"a step of training": max(each.step.peak for each in trainings) / 1e9},
        "hours": {"training": trained},
        "gpu": {"count": first.world.recipe.gpus, **GPUS[recipe.gpu]._asdict()},
        "efficiency": recipe.efficiency,
        "images": span(each.world.count for each in trainings),
        "images_per_second": sum(each.seen for each in trainings) / (trained * HOUR),
    }
    if any(each.world.decoded for each in trainings):
        result["decoded_images_per_second"] = recipe.cores * recipe.decode_rate
    if is_learned:
        add_outer_loop(result, trainings)
    elif not recipe.teacher.cache:
        result["cache"] = plan_cache(first.world, result["step"]["teacher"]["share"] * trained)
    result["gpu_hours"] = sum(result["hours"].values()) * first.world.recipe.gpus
    result["warnings"] = find_warnings(result)
    if recipe.out:
        write_json(Path(recipe.out) / "plan.json", result)
        write_text(Path(recipe.out) / "plan.txt", format_plan(result) + "\n")
    return result


@dataclass(frozen=True)
class PlannedTraining:
    """One training: in a world, of one of its students."""

    world: PlannedWorld
    model: ModelRecipe
    step: Counted

    @property
    def steps(self) -> int:
        """Steps of the whole training."""
        train = self.world.recipe.train
        return train.epochs * (self.world.count // train.batch_size)

    @property
    def seen(self) -> int:
        """Images of all steps."""
        return self.steps * self.world.recipe.train.batch_size

    @property
    def hours(self) -> float:
        """Hours of the whole training."""
        return self.steps * sum(self.step.seconds.values()) / self.world.recipe.efficiency / HOUR

    def describe(self) -> dict[str, Any]:
        """What sets a world apart."""
        recipe = self.world.recipe
        named = {"student": self.model.name, "teacher": recipe.teacher.name, "images": self.world.count}
        return named | {"batch_size": recipe.train.batch_size, "steps": self.steps, "hours": float(f"{self.hours:.4g}")}


def count_trainings(worlds: Sequence[PlannedWorld]) -> list[PlannedTraining]:
    """Count the step of each world's students; worlds whose steps are the same share the count."""
    steps: dict[str, Counted] = {}
    trainings = []
    for world in worlds:
        for model in world.recipe.students or [world.recipe.student]:
            key = identify_step(world, model)
            if key not in steps:
                steps[key] = count_step(world, model, world.loss, world.part_of_batch)
            trainings.append(PlannedTraining(world, model, steps[key]))
    return trainings


def identify_step(world: PlannedWorld, model: ModelRecipe) -> str:
    """What two worlds share if a step of theirs takes the same."""
    train, shapes = world.recipe.train, world.images.train
    batch = train.batch_size, train.accumulation, train.precision, bool(train.ema_decay), bool(train.momentum)
    more = train.optimizer, bool(train.swa_epochs)
    return repr((model, world.recipe.teacher, batch, more, shapes.image_shape, shapes.num_classes))


def name_loss(loss: dict[str, Any] | str) -> str:
    """A loss in a few words."""
    named = loss if isinstance(loss, str) else str(loss.get("name"))
    return "the default learned loss, not there yet" if is_missing(loss) else named


def join(names: Iterable[str | None]) -> str:
    """Names, each once."""
    return ", ".join(dict.fromkeys(map(str, names)))


def span(numbers: Iterable[int]) -> int | str:
    """A number that all have, or the least and the largest in words."""
    found = sorted(set(numbers))
    return found[0] if len(found) == 1 else f"{found[0]:,} to {found[-1]:,}"


def open_worlds(recipe: PlanRecipe, is_learned: bool) -> list[PlannedWorld]:
    """The worlds that a meta-training's recipe lists and draws, or the recipe as the only one; see `open_world`."""
    if not is_learned:
        return [open_world(recipe, False)]
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(MetaTrainRecipe)}
    parts = {"meta": recipe.meta or MetaSettings(), "pool": recipe.pool or PoolSettings()}
    worlds = []
    for name, each in (expand_worlds(MetaTrainRecipe(**fields | parts)) or {"": recipe}).items():
        own = replace(recipe, data=each.data, teacher=each.teacher, student=each.student, train=each.train)
        try:
            worlds.append(open_world(own, True, name))
        except UserError as error:
            raise name_world(error, name) from error
    return worlds


def open_world(recipe: PlanRecipe, is_learned: bool, name: str = "") -> PlannedWorld:
    """Check a recipe, count its images, and name the networks whose weights a plan does not read.

    Raises:
        UserError: If a setting is impossible, or the images or the teacher's network are not known.
    """
    train, teacher, meta, pool = (
        recipe.train,
        recipe.teacher,
        recipe.meta or MetaSettings(),
        recipe.pool or PoolSettings(),
    )
    gpus = 1 if is_learned else recipe.gpus
    if train.batch_size % (gpus * train.accumulation):
        raise UserError(
            f"train.batch_size: {train.batch_size} does not divide among {gpus} gpus × train.accumulation "
            f"{train.accumulation}"
        )
    if is_learned:
        fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(MetaTrainRecipe)}
        check_settings(MetaTrainRecipe(**fields | {"meta": meta, "pool": pool}))
    else:
        build_balance(recipe.balance, DistillationLoss())
    network, options = teacher.name, teacher.options
    if not network:
        architecture = load_teacher_network(teacher.path)[1]["architecture"]
        network, options = architecture["name"], architecture.get("options") or {}
    options = {} if network in OWN_NETWORKS else options
    untrained = replace(
        recipe,
        gpus=gpus,
        teacher=TeacherRecipe(path="random", name=network, options=options, cache=teacher.cache),
        student=replace(recipe.student, pretrained=False, path=None),
        students=[replace(model, pretrained=False, path=None) for model in recipe.students],
    )
    images, count, decoded = count_images(recipe.data)
    if not 1 <= train.batch_size <= count:
        raise UserError(f"train.batch_size: {train.batch_size} is not between 1 and the {count} training images")
    return PlannedWorld(untrained, meta, pool, pool.loss if is_learned else recipe.loss, images, count, decoded, name)


def count_images(data: DataRecipe) -> tuple[Images, int, bool]:
    """Images without contents; how many there are to train on, if need be as is known; whether they are decoded.

    Raises:
        UserError: If the data set is named with a root and is not good, or is neither there nor known.
    """
    if data.root is not None or data.name == "embedded":
        clean = replace(data, label_noise=0.0, meta_validation_noise=0.0)  # wrong labels change no count
        train = prepare_images(clean, scored=False).train
        count, classes, shape = len(train), train.num_classes, train.image_shape
        decoded = isinstance(train.images, ImageFiles)
    elif data.name in KNOWN:
        count, classes, channels, pixels = KNOWN[data.name]
        size, decoded = data.meta_validation_size, not pixels
        count = data.train_size or count - (choose_meta_validation_size(count) if size is None else size)
        shape = channels, pixels or data.image_size, pixels or data.image_size
    else:
        raise UserError(f"data.root: missing; without it only {', '.join(KNOWN)} can be planned, not {data.name}")
    empty, half = torch.zeros(0, dtype=torch.int64), (0.5,) * shape[0]
    names = tuple(map(str, range(classes)))
    part = ImageSet(torch.zeros(0, *shape, dtype=torch.uint8), empty, empty, names, half, half)
    return Images(data.name, part, part, part, "", data), count, decoded


def add_outer_loop(plan: dict[str, Any], trainings: Sequence[PlannedTraining]) -> None:
    """Add what a meta-training does besides trainings: hypergradients, pools, looks at reuse.

    An audited estimator is first_order as long as that is right, and else adjoint: both are counted.
    """
    first = trainings[0].world
    meta, pool = first.meta, first.pool
    plan["rollout"] = {}
    for name in ("first_order", "adjoint") if meta.estimator == AUDITED else (meta.estimator,):
        keys = [identify_step(each.world, each.model) for each in trainings]
        distinct = dict(zip(keys, trainings, strict=True))
        found = {key: count_hypergradient(each.world, each.model, name) for key, each in distinct.items()}
        counted = [found[key] for key in keys]
        plan["rollout"][name] = {
            "gflops": mean(each.flops[name] for each in counted) / 1e9,
            "seconds": mean(each.seconds[name] for each in counted) / first.recipe.efficiency,
        }
        plan["memory_gigabytes"][f"a hypergradient by {name}"] = max(each.peak for each in counted) / 1e9
    with torch.device("meta"):
        plan["parameters"]["loss"] = sum(parameter.numel() for parameter in build_loss_networks(first).parameters())
    drawn = meta.alternation_start  # outer steps that draw from a pool
    built = 0 if first.recipe.pool_dir or not drawn else 1
    built += max(drawn - 1, 0) // pool.refresh_every if pool.sampling == "live" else 0
    looks = 1 + bool(meta.reference) - (-meta.outer_steps // meta.reuse_every) if meta.reuse_every else 0
    epochs = [each.world.recipe.train.epochs for each in trainings]
    reused = [each.hours * (meta.reuse_epochs or e) / e for each, e in zip(trainings, epochs, strict=True)]
    seconds = [rollout["seconds"] for rollout in plan["rollout"].values()]
    students, whole = meta.students_per_step or len(trainings), plan["hours"]["training"]
    plan["loss"] = f"learned: {meta.kind}, {meta.loss.get('form', 'decoupled')}"
    plan["precision"] += "; rollouts float32"
    plan["hours_of_one_training"] = whole / len(trainings)
    plan["hours"] = {
        "outer steps": meta.outer_steps * students * seconds[0] / HOUR,
        "pool": built * pool.students * pool.max_age * whole,
        "reuse": looks * meta.reuse_students * sum(reused),
        "own students": students * whole / len(trainings) if meta.interleaving != "before" else 0.0,
    }
    if first.name:
        plan["worlds"] = {each.world.name: each.describe() for each in trainings}
    rate = meta.rollout_steps * mean(each.world.recipe.train.batch_size for each in trainings) / min(seconds)
    plan["images_per_second"] = max(plan["images_per_second"], rate)


def plan_cache(world: PlannedWorld, hours: float) -> dict[str, Any]:
    """Size of a cache of the teacher's answers (`lkd cache`) to N augmentations of every image, and what it saves.

    Filling it takes N epochs of the teacher, as a training of N epochs would: from the epoch after on it saves the
    teacher's work, of which this training has so many hours.
    """
    classes, seeds = world.images.train.num_classes, world.recipe.augmentation_seeds
    kept = min(world.recipe.top_k, largest_top_k(classes))
    return {
        "augmentation_seeds": seeds,
        "gigabytes": world.count * seeds * bytes_of_answer(classes, 0) / 1e9,
        "top_k": kept,
        "top_k_gigabytes": world.count * seeds * bytes_of_answer(classes, kept) / 1e9,
        "pays_after_epochs": seeds,
        "saved_hours": hours * max(0.0, 1 - seeds / world.recipe.train.epochs),
        "saved_hours_of_another_training": hours,
    }


def find_warnings(plan: dict[str, Any]) -> list[str]:
    """What will go wrong."""
    needed, gpu = plan["images_per_second"], plan["gpu"]
    decoded = plan.get("decoded_images_per_second", needed)
    warnings = [
        f"memory: {name} needs {size:.1f} GB, {gpu['name']} has {gpu['memory']:g}; lower train.batch_size, or raise "
        "train.accumulation (distillation)"
        for name, size in plan["memory_gigabytes"].items()
        if size > gpu["memory"]
    ]
    if decoded < needed:
        warnings.append(
            f"loading is the bottleneck: the cores decode {decoded:,.0f} images/s, the GPUs take {needed:,.0f}: the "
            f"run takes {needed / decoded:.1f} times as long; more cores, or packed images, would keep up"
        )
    return warnings


def format_plan(plan: dict[str, Any]) -> str:
    """One line for each thing that a plan says."""
    rows = []
    for name, value in flatten(plan | {"worlds": None, "warnings": None}).items():
        if value is not None:
            text = value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
            rows.append((name.replace(".", " ").replace("_", " "), text))
    rows += [
        (f"world {name}", ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in world.items()))
        for name, world in plan.get("worlds", {}).items()
    ]
    rows += [("WARNING", warning) for warning in plan["warnings"]]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
