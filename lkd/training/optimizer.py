"""The optimiser and the learning-rate schedule of a training."""

import inspect
from typing import Any

import torch
from timm.optim import (
    SGDW,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lkd.config.parts import TrainRecipe
from lkd.core.errors import UserError, check_choice, first_line
from lkd.models.build import unwrap
from lkd.models.stages import find_head, is_within

FUSED_DEVICES = ("cpu", "cuda")
DIFFERENTIABLE = (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
"""Optimisers that have an adjoint in `meta.optim`; torch has a fused step of each."""
WITH_NESTEROV = (torch.optim.SGD, SGDW)  # those that train.nesterov is of
STEP_EPOCHS = 90  # of timm's schedule step
ENDLESS = ("multistep", "step", "constant")  # schedules without a rate that they end with
FIELDS = ("lr", "weight_decay", "momentum", "nesterov")  # of the recipe, no options


def build_optimizer(student: nn.Module, recipe: TrainRecipe, loss: nn.Module | None = None) -> torch.optim.Optimizer:
    """Build timm's optimiser of this name, over the parameters of a student, and of a loss, that are trained."""
    kind, options = choose_optimizer(recipe), dict(recipe.optimizer_options)
    groups = group_parameters(student, recipe, loss, tuple(options.pop("fallback_list", ())))
    if kind in DIFFERENTIABLE and not {"fused", "foreach"} & options.keys():
        devices = {parameter.device.type for group in groups for parameter in group["params"]}
        options["fused"] = devices <= {*FUSED_DEVICES}
    if kind in WITH_NESTEROV:  # timm's own default of both is true
        options["nesterov"] = recipe.nesterov or recipe.optimizer in ("nesterov", "nesterovw")
    rate, decay = scale_learning_rate(recipe), recipe.weight_decay
    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    try:
        return create_optimizer_v2(
            groups, recipe.optimizer, lr=rate, weight_decay=decay, momentum=recipe.momentum, **options
        )
    except (ValueError, TypeError, AssertionError, AttributeError, RuntimeError) as error:
        where = "train.optimizer_options" if recipe.optimizer_options else "train"
        raise UserError(f"{where}: {first_line(error)} ({recipe.optimizer})") from error


def choose_optimizer(recipe: TrainRecipe) -> type:
    """The class of the optimiser that a recipe names."""
    name, options = recipe.optimizer, recipe.optimizer_options
    check_choice("train.optimizer", name, list_optimizers())
    try:
        kind: Any = get_optimizer_class(name, bind_defaults=False)
    except (ImportError, AssertionError) as error:
        raise UserError(f"train.optimizer: {name} cannot run here: {first_line(error)}; take another one") from error
    if get_optimizer_info(name).second_order:
        raise UserError(f"train.optimizer: {name} needs second derivatives, which no training here has; take another")
    taken = [n for n in inspect.signature(kind).parameters if n not in ("params", "args", "kwargs", *FIELDS)]
    for option in options:
        if option in FIELDS:
            field = {"lr": "learning_rate"}.get(option, option)
            raise UserError(f"train.optimizer_options: {option} is a field of its own; give train.{field}")
        check_choice(f"train.optimizer_options of {name}", option, [*taken, "fallback_list"])
    if recipe.nesterov and kind not in WITH_NESTEROV:
        raise UserError(
            f"train.nesterov: is of sgd and sgdw, not of {name}; leave it out (timm has nadam, nadamw, nlars, ...)"
        )
    return kind


ADAPTIVE = ("adam", "adan", "adopt", "lamb", "lion", "laprop", "adabelief", "kron", "mars")  # in names of optimisers
LARGEST_ADAPTIVE = 0.02  # learning rate that these are trained with


def doubt_learning_rate(recipe: TrainRecipe) -> list[str]:
    """A warning of a learning rate that is SGD's, with an optimiser of another kind."""
    name, rate = recipe.optimizer, recipe.learning_rate
    if rate <= LARGEST_ADAPTIVE or not any(kind in name for kind in ADAPTIVE):
        return []
    return [f"warning: train.learning_rate: {rate:g} is a rate of SGD; {name} is mostly given 0.0001 to 0.003"]


def check_differentiable(recipe: TrainRecipe) -> None:
    """Check that a loss can be learned through an optimiser's steps."""
    if choose_optimizer(recipe) not in DIFFERENTIABLE:
        raise UserError(
            f"train.optimizer: {recipe.optimizer}: a loss is not learned through its steps; sgd, adam and adamw serve"
        )
    unfit = sorted({"amsgrad", "maximize", "differentiable", "dampening"} & recipe.optimizer_options.keys())
    if unfit:
        raise UserError(f"train.optimizer_options: a loss is not learned through steps with {unfit[0]}; leave it out")


def group_parameters(
    student: nn.Module, recipe: TrainRecipe, loss: nn.Module | None = None, fallback: tuple[str, ...] = ()
) -> list[dict[str, Any]]:
    """Parameters that are trained, in groups of equal weight decay and learning rate (`lr_scale`, a factor).

    By timm's rules: no weight decay of norms, biases and what a network names in `no_weight_decay`, if the recipe says
    so; learning rates that fall from the head to the stem (BEiT's layer-wise decay). A loss's own parameters are
    decayed alike, and have the whole rate, or what it says of them (`DistillationLoss.rates`).
    """
    everywhere = recipe.decay_norms_and_biases
    if everywhere is None:
        everywhere = choose_optimizer(recipe) is torch.optim.SGD
    model: Any = unwrap(student)
    spared = () if everywhere or not hasattr(model, "no_weight_decay") else model.no_weight_decay()
    rules: dict[str, Any] = {
        "weight_decay": recipe.weight_decay,
        "weight_decay_exclude_1d": not everywhere,
        "no_weight_decay_list": spared,
        "fallback_list": fallback,
    }
    if recipe.layer_decay < 1:
        groups = param_groups_layer_decay(model, layer_decay=recipe.layer_decay, **rules)
        if len({group["lr_scale"] for group in groups}) < 2:
            name = type(model).__name__
            raise UserError(f"train.layer_decay: this {name} does not say what its layers are; leave it out")
    else:
        groups = param_groups_weight_decay(model, **rules)
    if loss is not None:
        groups += param_groups_weight_decay(loss, recipe.weight_decay, not everywhere)
    head: set[Tensor] = set()
    if recipe.head_learning_rate is not None:
        names = find_head(student)
        head = {parameter for name, parameter in model.named_parameters() if is_within(name, names)}
        if not head or not recipe.learning_rate:
            what = "this network has no classifier" if not head else "it is relative to train.learning_rate, which is 0"
            raise UserError(f"train.head_learning_rate: {recipe.head_learning_rate}: {what}; leave it out")
    rates = getattr(loss, "rates", {})
    merged: dict[tuple[Any, ...], dict[str, Any]] = {}
    for group in groups:
        settings = {name: value for name, value in group.items() if name != "params"}
        for parameter in group["params"]:
            own = dict(settings)
            if parameter in head:
                own["lr_scale"] = float(recipe.head_learning_rate or 0.0) / recipe.learning_rate
            if parameter in rates:
                own["lr_scale"] = rates[parameter]
            if own.get("lr_scale") == 1:
                del own["lr_scale"]
            merged.setdefault(tuple(sorted(own.items())), {"params": [], **own})["params"].append(parameter)
    return list(merged.values())


def scale_learning_rate(recipe: TrainRecipe) -> float:
    """The learning rate, in proportion to the batch size if the recipe says of which batch it is."""
    of_batch = recipe.learning_rate_for_batch
    return recipe.learning_rate * recipe.batch_size / of_batch if of_batch else recipe.learning_rate


def read_learning_rate(optimizer: torch.optim.Optimizer) -> float:
    """The learning rate of the next step, of parameters that have the whole of it."""
    group = optimizer.param_groups[0]
    return float(group["lr"] / group["lr_scale"] if group.get("lr_scale") else group["lr"])


def read_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state, but for dtypes among its options, which the recipe gives."""
    state = optimizer.state_dict()
    groups = [{k: v for k, v in group.items() if not isinstance(v, torch.dtype)} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, laid out in memory as its parameters are: fused steps take that for granted.

    Raises:
        ValueError: If it is not that of an optimiser of its kind over such parameters.
    """
    options, own = list_kinds(optimizer), optimizer.param_groups
    dtypes = [{name: value for name, value in group.items() if isinstance(value, torch.dtype)} for group in own]
    saved = state["param_groups"]
    groups = [known | group for known, group in zip(dtypes, saved, strict=True)] if any(dtypes) else saved
    optimizer.load_state_dict({**state, "param_groups": groups})
    strict = isinstance(optimizer, DIFFERENTIABLE)  # others keep what they like of each parameter and group
    if strict and list_kinds(optimizer) != options:
        raise ValueError("the optimiser's options are not those of its kind")
    if not strict:  # torch turns all to the parameters' dtype
        parameters = [parameter for group in own for parameter in group["params"]]
        for number, slots in state["state"].items():
            kept = optimizer.state[parameters[number]]
            # Its tensors are copied to where those like them lie: a file's lie as they come, which decides digits.
            kept |= {name: tree_map(copy_like, value, kept[name]) for name, value in slots.items()}
        return
    for parameter, slots in optimizer.state.items():
        if slots.keys() != next(iter(optimizer.state.values())).keys():
            raise ValueError("the optimiser's parameters differ in what is kept of them")
        for name, value in slots.items():
            if name == "step":
                if not (isinstance(value, Tensor) and value.shape == () and value.is_floating_point() and value >= 0):
                    raise ValueError(f"the optimiser's step is {value}, not a number of steps")
            elif isinstance(value, Tensor) and value.shape == parameter.shape:
                slots[name] = torch.empty_like(parameter).copy_(value)
            elif value is not None:
                raise ValueError(f"the optimiser's {name} does not fit a parameter of shape {tuple(parameter.shape)}")


def copy_like(value: Any, like: Any) -> Any:
    """A tensor's copy where another one lies; what is none stays."""
    return value.to(like.device, copy=True) if isinstance(value, Tensor) else value


def list_kinds(optimizer: torch.optim.Optimizer) -> list[dict[str, type]]:
    """What kind of value each option of every group of parameters has; a number may be whole."""
    return [
        {name: float if type(value) is int else type(value) for name, value in group.items()}
        for group in optimizer.param_groups
    ]


def build_scheduler(optimizer: torch.optim.Optimizer, recipe: TrainRecipe, steps_per_epoch: int) -> Scheduler:
    """Build timm's scheduler, stepped every update."""
    check_milestones(recipe)
    if recipe.warmup_epochs and recipe.warmup_steps:
        raise UserError(f"train.warmup_steps: {recipe.warmup_steps} and train.warmup_epochs exclude each other")
    if recipe.cooldown_epochs >= recipe.epochs:
        raise UserError(
            f"train.cooldown_epochs: {recipe.cooldown_epochs} leave nothing of train.epochs, {recipe.epochs}, before "
            "them; take fewer"
        )
    for name in ("min_learning_rate", "cooldown_epochs"):
        if recipe.schedule in ENDLESS and getattr(recipe, name):
            raise UserError(
                f"train.{name}: {getattr(recipe, name)} is of schedules that end at a rate (cosine, tanh, poly, wsd), "
                f"not of {recipe.schedule}; leave it out"
            )
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.schedule,
            num_epochs=recipe.epochs - recipe.cooldown_epochs,
            # timm decays one update before a milestone; half an update more puts it where torch's MultiStepLR has it.
            decay_milestones=[milestone + 0.5 / steps_per_epoch for milestone in recipe.milestones],
            decay_rate=recipe.decay_rate,
            min_lr=recipe.min_learning_rate,
            warmup_lr=recipe.warmup_learning_rate,
            warmup_epochs=recipe.warmup_steps / steps_per_epoch if recipe.warmup_steps else recipe.warmup_epochs,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
        )
    except (AssertionError, ValueError) as error:
        raise UserError(f"train.schedule: {recipe.schedule!r} is none that timm can make so ({error})") from error
    if scheduler is None:
        raise UserError(f"train.schedule: {recipe.schedule!r} is not one of timm's; cosine, step, multistep, poly, ...")
    return scheduler


MANY_STEPS = 10**6  # an epoch, where their number is not known yet: no warm-up of some steps is then too long


def check_names(recipe: TrainRecipe) -> None:
    """Check all of optimiser and schedule that needs no network, before the images are looked for."""
    choose_optimizer(recipe)
    build_scheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), recipe, MANY_STEPS)


def check_optimization(network: nn.Module, recipe: TrainRecipe, device: torch.device) -> None:
    """Check that a network can be trained so, before any work."""
    if recipe.precision == "float16" and device.type == "cpu":
        raise UserError("train.precision: float16, whose gradients are scaled, is for GPUs; a CPU takes bfloat16")
    if recipe.ema_decay and recipe.swa_epochs:
        raise UserError(
            f"train.swa_epochs: {recipe.swa_epochs} and train.ema_decay are two averages, of which one is saved; give "
            "one"
        )
    if recipe.swa_epochs > recipe.epochs:
        raise UserError(
            f"train.swa_epochs: {recipe.swa_epochs} are more than train.epochs, {recipe.epochs}; take fewer"
        )
    build_scheduler(build_optimizer(network, recipe), recipe, MANY_STEPS)


def check_milestones(recipe: TrainRecipe) -> None:
    """Check the milestones of a multistep schedule, and that a step schedule has any."""
    if recipe.schedule == "step" and recipe.epochs - recipe.cooldown_epochs <= STEP_EPOCHS:
        raise UserError(
            f"train.schedule: step is timm's, whose rate falls every {STEP_EPOCHS} epochs, and never in train.epochs "
            f"{recipe.epochs}; take multistep, with train.milestones"
        )
    if recipe.schedule != "multistep":
        if recipe.milestones:
            raise UserError(
                f"train.milestones: {recipe.milestones} belong to schedule multistep, not {recipe.schedule}"
            )
    elif not recipe.milestones or recipe.milestones != sorted({m for m in recipe.milestones if m > 0}):
        raise UserError(
            f"train.milestones: {recipe.milestones} are not increasing epochs, as in [150, 180, 210]; "
            "schedule multistep needs them"
        )
