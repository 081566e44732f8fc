"""What a run will take, before it runs: its steps are counted on tensors that have shapes and no contents."""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple, cast

import torch
from tabulate import tabulate
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

from lkd.balance.balancing import build_balance
from lkd.config.evaluation import PlanRecipe
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe, PoolSettings
from lkd.config.parts import DataRecipe, ModelRecipe
from lkd.config.worlds import expand_worlds
from lkd.core.errors import UserError, explained
from lkd.core.files import flatten, write_json, write_text
from lkd.core.outputs import Outputs
from lkd.data.image_files import ImageFiles
from lkd.data.images import Batch, ImageSet
from lkd.data.splits import choose_meta_validation_size, split_training_images
from lkd.influence.influence import INFLUENCE_WEIGHTED
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.loss import DistillationLoss
from lkd.meta_training.meta_train import check_settings
from lkd.meta_training.outer_loop import AUDITED
from lkd.meta_training.rollouts import OBJECTIVES, build_inner_optimizer, compute_inner_loss, compute_outer_logits
from lkd.meta_training.worlds import naming_world
from lkd.models.build import OWN_NETWORKS
from lkd.models.teacher import load_teacher_network
from lkd.models.teacher_cache import bytes_of_answer, check_stages, largest_top_k
from lkd.pool.pool import find_oldest, split_state
from lkd.tracking.remote import is_remote
from lkd.training.answers import is_tabulated
from lkd.training.build import Images, LossBuilder, choose_student, open_teacher, prepare_images, prepare_learned_loss
from lkd.training.optimizer import build_optimizer, choose_optimizer
from lkd.training.throughput import OperationCounter, StepClock
from lkd.training.training import StudentLoss, cut, keep_stages, widen_outputs
from meta import ESTIMATORS, Problem, State, Tensors

HOUR = 3600.0
LENGTHS = (2, 3)  # inner steps that are run; longer rollouts lie on the line through both
# Training images, classes, channels, pixels of what is planned without its files; 0: as many as the recipe says.
KNOWN = {"image_folder": (1_281_167, 1000, 3, 0), "cifar10": (50_000, 10, 3, 32), "cifar100": (50_000, 100, 3, 32)}
KNOWN |= {"fashion_mnist": (60_000, 10, 1, 28), "fashion_mnist_unseen": (12_000, 10, 1, 28)}
KNOWN |= {"fashion_mnist_rest": (48_000, 10, 1, 28)}


class Gpu(NamedTuple):
    """A datasheet: dense TFLOP/s of matrix units (half of those with sparsity), and without; GB/s and GB of memory.

    By torch's defaults convolutions of float32 tensors take TensorFloat-32, matrix products do not.
    """

    name: str
    bfloat16: float
    tensorfloat32: float
    float32: float
    bandwidth: float
    memory: float

    def build_counter(self, precision: str) -> OperationCounter:
        """What counts operations on this GPU."""
        rate = self.tensorfloat32 if precision == "float32" else self.bfloat16
        return OperationCounter(1e12 * rate, 1e9 * self.bandwidth, 1e12 * self.float32)


GPUS = {
    "h200_sxm": Gpu("H200 SXM 141 GB", 989.4, 494.7, 66.9, 4800, 141),
    "h100_sxm": Gpu("H100 SXM 80 GB", 989.4, 494.7, 66.9, 3350, 80),
    "a100_sxm_80gb": Gpu("A100 SXM 80 GB", 312, 156, 19.5, 2039, 80),
    "l40s": Gpu("L40S", 362, 183, 91.6, 864, 48),
    "rtx_4090": Gpu("GeForce RTX 4090", 165.2, 82.6, 82.6, 1008, 24),
}


# ----------------------------------------------------------------------------------------------------------------------
# A step of a training, and a hypergradient.


@dataclass(frozen=True)
class PlannedWorld:
    """What the steps of a recipe meet: networks without their weights; shapes and classes, no images."""

    recipe: PlanRecipe
    meta: MetaSettings
    pool: PoolSettings
    loss: dict[str, Any] | str
    images: Images
    count: int  # of training images
    decoded: bool  # whether each is decoded when a batch needs it

    @property
    def steps(self) -> int:
        """Steps of a whole training."""
        return self.recipe.train.epochs * (self.count // self.recipe.train.batch_size)

    @property
    def part_of_batch(self) -> int:
        """Images of a batch on each GPU."""
        return self.recipe.train.batch_size // self.recipe.gpus

    def make_batch(self, size: int = 0) -> Batch:
        """A batch of zeros, by default of as many images as each GPU has."""
        size = size or self.part_of_batch
        labels = torch.zeros(size, dtype=torch.int64)
        return Batch(torch.zeros(size, *self.images.train.image_shape), labels, labels, labels)

    def prepare_teacher(self, teacher: Any, stages: tuple[str, ...]) -> Callable[[Tensor], Outputs]:
        """What answers a batch, as `prepare_teacher` has it; what a cache or a table holds costs nothing."""
        classes, cached = self.images.train.num_classes, self.recipe.teacher.cache
        if cached:
            check_stages(stages)
        if cached or is_tabulated(teacher, self.images, self.count, stages):
            shapes = teacher.find_stages(self.images.train.image_shape) if stages else {}
            return lambda images: Outputs(
                torch.empty(len(images), classes),
                {stage: torch.empty(len(images), *shapes[stage]) for stage in stages},
            )
        return torch.no_grad()(lambda images: keep_stages(teacher.network(images), stages))


class Counted(NamedTuple):
    """Work of a step: FLOPs and seconds by part, most bytes that are alive at once, parameters by network."""

    flops: dict[str, float]
    seconds: dict[str, float]
    peak: float
    parameters: dict[str, int]


def count_step(world: PlannedWorld) -> Counted:
    """Take two steps of a training; the second one, with momentum there, is counted."""
    train, shapes, precision = world.recipe.train, world.images.train, choose_precision(world.recipe)
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=precision != "float32")
    counter = GPUS[world.recipe.gpu].build_counter(precision)
    with FakeTensorMode(allow_non_fake_inputs=True), counter:
        builder, teacher = choose_student(world.recipe.student, shapes), open_teacher(world.recipe.teacher, shapes)
        student = builder.make().train()
        if is_missing(world.loss):  # yet to be learned: the default form
            fitted: DistillationLoss = build_learned_loss("logits", {}).requires_grad_(False)
        else:
            with unset_fake_temporarily():  # what its file holds is real
                opened = LossBuilder(world.loss, teacher, world.images)
            fitted = opened.build(builder, 0)
        plain, clock = replace(train, compile=False, channels_last=False), cast(StepClock, counter)
        computation: Any = StudentLoss(student, fitted, autocast, plain, clock)
        optimizer = build_optimizer(student, train, fitted)
        ask = world.prepare_teacher(teacher, fitted.teacher_stages)
        for _ in range(2):
            optimizer.zero_grad()
            batch, size = world.make_batch(), world.part_of_batch // train.accumulation
            counter.start()
            with autocast():
                answers = widen_outputs(ask(batch.images)) if fitted.needs_teacher else None
            counter.lap("teacher")
            for number in range(train.accumulation):
                part = slice(number * size, (number + 1) * size)
                own = Batch(*(column[part] for column in batch))
                identity = {"index": own.index} if fitted.needs_index else {}
                terms = computation(own.images, cut(answers, part), own.target, 0.5, identity)
                torch.stack(list(terms.values())).sum().backward()
                counter.lap("student")
            optimizer.step()
            counter.lap("student")
    networks = {"student": student, "teacher": teacher.network, "loss": fitted}
    parameters = {name: sum(p.numel() for p in each.parameters()) for name, each in networks.items()}
    average = 4 * parameters["student"] if train.ema_decay or train.swa_epochs else 0
    return Counted(counter.flops, counter.seconds, counter.peak + average, parameters)


def count_hypergradient(world: PlannedWorld, estimator: str) -> Counted:
    """Count short rollouts, and follow the line through them to the recipe's length."""
    length = world.meta.rollout_steps
    short, long = (min(length, each) for each in LENGTHS)
    first, second = (count_rollout(world, estimator, each) for each in (short, long))
    slope = (length - long) / max(long - short, 1)
    flops, seconds, *peaks = (b + (b - a) * slope for a, b in zip(first, second, strict=True))
    return Counted({estimator: flops}, {estimator: seconds}, max(peaks), {})


def count_rollout(world: PlannedWorld, estimator: str, length: int) -> tuple[float, float, int, int]:
    """FLOPs and seconds of one hypergradient in float32; peaks of the teacher's answers and of the estimator, bytes."""
    meta, train, shapes = world.meta, world.recipe.train, world.images.train
    counter = GPUS[world.recipe.gpu].build_counter("float32")
    with torch.device("meta"), counter:
        student = choose_student(world.recipe.student, shapes).make().train()
        teacher, loss = open_teacher(world.recipe.teacher, shapes), build_loss_networks(world)
        ask = world.prepare_teacher(teacher, loss.teacher_stages)
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

        counter.start()
        batches = [world.make_batch() for _ in range(length)]
        answers = [ask(batch.images) for batch in batches]
        inner_batches = [(batch, answer, 0.5) for batch, answer in zip(batches, answers, strict=True)]
        teacher_peak, counter.peak = counter.peak, counter.bytes
        optimizer = build_inner_optimizer(student, train, train.learning_rate, meta.annealing, length)
        inner_loss = partial(compute_inner_loss, student, loss)
        problem = Problem(inner_loss, outer_loss, state, hyper, inner_batches, outer_batch, optimizer)
        with explained(f"meta.estimator {estimator}"):
            ESTIMATORS[estimator](problem)
    return *counter.since_lap, teacher_peak, counter.peak


def build_loss_networks(world: PlannedWorld) -> DistillationLoss:
    """The loss networks that a meta-training learns."""
    recipe, shapes = world.recipe, world.images.train
    students = [choose_student(model, shapes) for model in recipe.students or [recipe.student]]
    teacher = open_teacher(recipe.teacher, shapes)
    if world.meta.start and not is_missing(world.meta.start):
        with torch.device("cpu"):
            started = LossBuilder(world.meta.start, teacher, world.images).build(students[0], 0)
        return started.to("meta").requires_grad_(True)
    return prepare_learned_loss(world.meta.kind, world.meta.loss, students, teacher, world.images, 0)


def is_missing(loss: dict[str, Any] | str) -> bool:
    """Whether a loss is a file that is yet to be learned."""
    return isinstance(loss, str) and loss.endswith(".safetensors") and not is_remote(loss) and not Path(loss).exists()


def choose_precision(recipe: PlanRecipe) -> str:
    """What a training computes in on a GPU."""
    return "bfloat16" if recipe.train.precision == "auto" else recipe.train.precision


# ----------------------------------------------------------------------------------------------------------------------
# What the steps take, how many there are, and what that is in hours, memory and data.


def plan(recipe: PlanRecipe) -> dict[str, Any]:
    """Plan a recipe; write plan.json and plan.txt if it says where."""
    is_learned = bool(recipe.meta or recipe.pool or recipe.worlds or recipe.draw.worlds)
    worlds = open_worlds(recipe, is_learned)
    steps = count_each(worlds, count_step)
    hours = count_hours(worlds, steps)
    first, step = worlds[0], steps[0]
    result: dict[str, Any] = {
        "command": "meta-train" if is_learned else "distill",
        "teacher": ", ".join(dict.fromkeys(str(world.recipe.teacher.name) for world in worlds)),
        "student": ", ".join(dict.fromkeys(world.recipe.student.name for world in worlds)),
        "loss": name_loss(first),
        "precision": choose_precision(first.recipe),
        "steps": sum(world.steps for world in worlds),
        "parameters": step.parameters,
        "step": {
            part: {
                "gflops_an_image": step.flops[part] / first.part_of_batch / 1e9,
                "share": seconds / sum(step.seconds.values()),
            }
            for part, seconds in step.seconds.items()
        },
        "memory_gigabytes": {"a step of training": max(each.peak for each in steps) / 1e9},
        "hours": {"training": sum(hours)},
        "gpu": {"count": first.recipe.gpus, **GPUS[recipe.gpu]._asdict()},
        "efficiency": recipe.efficiency,
        "images_per_second": sum(world.steps * world.recipe.train.batch_size for world in worlds) / (sum(hours) * HOUR),
    }
    if any(world.decoded for world in worlds):
        result["decoded_images_per_second"] = recipe.cores * recipe.decode_rate
    data = first.recipe.data
    if is_learned:
        add_outer_loop(result, worlds, hours)
    elif "teacher" in result["step"] and not (data.mixup or data.cutmix or data.random_erasing):
        result["cache"] = plan_cache(first, result["step"]["teacher"]["share"] * sum(hours))
    result["gpu_hours"] = sum(result["hours"].values()) * first.recipe.gpus
    result["warnings"] = find_warnings(result)
    if recipe.out:
        write_json(Path(recipe.out) / "plan.json", result)
        write_text(Path(recipe.out) / "plan.txt", format_plan(result) + "\n")
    return result


def count_each(worlds: Sequence[PlannedWorld], count: Callable[[PlannedWorld], Counted]) -> list[Counted]:
    """Count each world; those whose steps take the same share the count."""
    distinct = {identify_step(world): world for world in worlds}
    counted = {key: count(world) for key, world in distinct.items()}
    return [counted[identify_step(world)] for world in worlds]


def count_hours(worlds: Sequence[PlannedWorld], steps: Sequence[Counted]) -> list[float]:
    """Hours of a whole training in each world."""
    return [
        world.steps * sum(step.seconds.values()) / world.recipe.efficiency / HOUR
        for world, step in zip(worlds, steps, strict=True)
    ]


def identify_step(world: PlannedWorld) -> str:
    """What two worlds share if a step of theirs takes the same."""
    train, shapes, recipe = world.recipe.train, world.images.train, world.recipe
    batch = train.batch_size, train.accumulation, train.precision, bool(train.ema_decay), bool(train.momentum)
    data = world.images.settings
    changing = data.augmentation, data.mixup, data.cutmix, data.random_erasing
    more = train.optimizer, bool(train.swa_epochs), changing, world.count
    return repr((recipe.student, recipe.teacher, batch, more, shapes.image_shape, shapes.num_classes))


def name_loss(world: PlannedWorld) -> str:
    """The loss that a world trains with in a few words."""
    if is_missing(world.loss):
        return "the default learned loss, not there yet"
    return world.loss if isinstance(world.loss, str) else str(world.loss.get("name"))


def open_worlds(recipe: PlanRecipe, is_learned: bool) -> list[PlannedWorld]:
    """The worlds that a meta-training's recipe lists and draws, or one for each of its students; see `open_world`."""
    if not is_learned:
        return [open_world(recipe, False)]
    expanded = expand_worlds(as_meta_training(recipe))
    if not expanded:
        world = open_world(recipe, True)
        students = world.recipe.students or [world.recipe.student]
        return [replace(world, recipe=replace(world.recipe, student=student)) for student in students]
    worlds = []
    for name, each in expanded.items():
        own = replace(recipe, data=each.data, teacher=each.teacher, student=each.student, train=each.train)
        with naming_world(name):
            worlds.append(open_world(own, True))
    return worlds


def as_meta_training(recipe: PlanRecipe) -> MetaTrainRecipe:
    """The recipe as one of `lkd meta-train`."""
    fields = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(MetaTrainRecipe)}
    return MetaTrainRecipe(**fields | {"meta": recipe.meta or MetaSettings(), "pool": recipe.pool or PoolSettings()})


def open_world(recipe: PlanRecipe, is_learned: bool) -> PlannedWorld:
    """Check a recipe, count its images, and name the networks whose weights a plan does not read."""
    train, teacher = recipe.train, recipe.teacher
    gpus = 1 if is_learned else recipe.gpus
    if train.batch_size % (gpus * train.accumulation):
        raise UserError(
            f"train.batch_size: {train.batch_size} does not divide among {gpus} gpus × train.accumulation "
            f"{train.accumulation}"
        )
    if is_learned:
        check_settings(as_meta_training(recipe))
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
        teacher=replace(teacher, path="random", name=network, pretrained=False, options=options, classes=None),
        student=untrain(recipe.student),
        students=[untrain(model) for model in recipe.students],
    )
    images, count, decoded = count_images(recipe.data)
    if not 1 <= train.batch_size <= count:
        raise UserError(f"train.batch_size: {train.batch_size} is not between 1 and the {count} training images")
    meta, pool = recipe.meta or MetaSettings(), recipe.pool or PoolSettings()
    loss = pool.loss if is_learned else recipe.loss
    if isinstance(loss, dict) and loss.get("name") == INFLUENCE_WEIGHTED:
        loss = loss.get("loss", "kd")
    return PlannedWorld(untrained, meta, pool, loss, images, count, decoded)


def untrain(model: ModelRecipe) -> ModelRecipe:
    """The network with random weights."""
    return replace(model, pretrained=False, path=None, new_head=False)


def count_images(data: DataRecipe) -> tuple[Images, int, bool]:
    """Images without contents; how many there are to train on, if need be as is known; whether they are decoded."""
    if data.root is not None or data.name == "embedded":
        clean = replace(data, label_noise=0.0, meta_validation_noise=0.0)  # wrong labels change no count
        train = prepare_images(clean, scored=False).train
        count, classes, shape = len(train), train.num_classes, train.image_shape
        decoded = isinstance(train.images, ImageFiles) and not data.packed
    elif data.name in KNOWN:
        known, classes, channels, pixels = KNOWN[data.name]
        size, decoded = data.meta_validation_size, not (pixels or data.packed)
        size = choose_meta_validation_size(known) if size is None else size
        index = torch.arange(known)  # of each class as many
        whole = ImageSet(torch.zeros(known, 0), index % classes, index, tuple(map(str, range(classes))), (), ())
        count = len(split_training_images(whole, data.train_size, size, data.split_seed, data.imbalance).train)
        shape = channels, pixels or data.image_size, pixels or data.image_size
    else:
        raise UserError(f"data.root: missing; without it only {', '.join(KNOWN)} can be planned, not {data.name}")
    empty, half = torch.zeros(0, dtype=torch.int64), (0.5,) * shape[0]
    names = tuple(map(str, range(classes)))
    part = ImageSet(torch.zeros(0, *shape, dtype=torch.uint8), empty, empty, names, half, half)
    return Images(data.name, part, part, part, "", data), count, decoded


def add_outer_loop(plan: dict[str, Any], worlds: Sequence[PlannedWorld], hours: Sequence[float]) -> None:
    """Add what a meta-training does besides trainings, which take `hours`: hypergradients, pools, looks at reuse.

    An audited estimator is first_order as long as that is right, and else adjoint: both are counted.
    """
    meta, pool = worlds[0].meta, worlds[0].pool
    plan["rollout"] = {}
    audited = ("first_order", "adjoint") if meta.alternation_start else ("first_order",)  # which walks a tape back
    for name in audited if meta.estimator == AUDITED else (meta.estimator,):
        counted = count_each(worlds, partial(count_hypergradient, estimator=name))
        plan["rollout"][name] = {
            "gflops": mean(each.flops[name] for each in counted) / 1e9,
            "seconds": mean(each.seconds[name] for each in counted) / plan["efficiency"],
        }
        plan["memory_gigabytes"][f"a hypergradient by {name}"] = max(each.peak for each in counted) / 1e9
    with torch.device("meta"):
        plan["parameters"]["loss"] = sum(p.numel() for p in build_loss_networks(worlds[0]).parameters())
    drawn = meta.alternation_start  # outer steps that draw from a pool
    built = 0 if worlds[0].recipe.pool_dir or not drawn else 1
    built += max(drawn - 1, 0) // pool.refresh_every if pool.sampling == "live" else 0
    looks = 1 + bool(meta.reference) - (-meta.outer_steps // meta.reuse_every) if meta.reuse_every else 0
    epochs = [world.recipe.train.epochs for world in worlds]
    reused = sum(each * (meta.reuse_epochs or whole) / whole for each, whole in zip(hours, epochs, strict=True))
    seconds = [rollout["seconds"] for rollout in plan["rollout"].values()]
    students = meta.students_per_step or len(worlds)
    grown = (1 + (meta.initial_rollout_steps or meta.rollout_steps) / meta.rollout_steps) / 2  # on average, of K
    plan["loss"] = f"learned: {meta.start or ', '.join((meta.kind, meta.loss.get('form', 'decoupled')))}"
    plan["precision"] += "; rollouts float32"
    plan["hours_of_one_training"] = mean(hours)
    plan["hours"] = {
        "outer steps": meta.outer_steps * students * seconds[0] * grown / HOUR,
        "pool": built * pool.students * find_oldest(pool) * sum(hours),
        "reuse": looks * meta.reuse_students * reused,
        "own students": students * mean(count_own(worlds)) if meta.interleaving != "before" else 0.0,
    }
    rate = meta.rollout_steps * mean(world.recipe.train.batch_size for world in worlds) / min(seconds)
    plan["images_per_second"] = max(plan["images_per_second"], rate)


def count_own(worlds: Sequence[PlannedWorld]) -> list[float]:
    """Hours of a student that the loss alternates with in each world: in float32, of whole batches."""
    plain = [
        replace(w, recipe=replace(w.recipe, train=replace(w.recipe.train, precision="float32", accumulation=1)))
        for w in worlds
    ]
    return count_hours(plain, count_each(plain, count_step))


def plan_cache(world: PlannedWorld, hours: float) -> dict[str, Any]:
    """Size of a cache of the teacher's answers (`lkd cache`) to N augmentations of every image, and what it saves.

    Filling it takes N epochs of the teacher, as a training of N epochs would: from the epoch after on it saves the
    teacher's work, of which this training has so many hours.
    """
    recipe = world.recipe
    classes, seeds = world.images.train.num_classes, recipe.data.augmentation_seeds or recipe.augmentation_seeds
    kept = min(world.recipe.top_k, largest_top_k(classes))
    return {
        "augmentation_seeds": seeds,
        "gigabytes": world.count * seeds * bytes_of_answer(classes, 0) / 1e9,
        "top_k": kept,
        "top_k_gigabytes": world.count * seeds * bytes_of_answer(classes, kept) / 1e9,
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
    for name, value in flatten({key: value for key, value in plan.items() if key != "warnings"}).items():
        text = value if isinstance(value, str) else f"{value:,.4g}" if abs(value) < 1000 else f"{value:,.0f}"
        rows.append((name.replace(".", " ").replace("_", " "), text))
    rows += [("WARNING", warning) for warning in plan["warnings"]]
    return tabulate(rows, tablefmt="plain", disable_numparse=True)
