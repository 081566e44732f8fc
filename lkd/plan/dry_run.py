"""The real steps of a recipe on tensors without contents: what they compute, move and hold."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from lkd.assembly import Images, architecture_of, prepare_loss
from lkd.config import ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.data import Batch, Batches
from lkd.losses.learned import build_learned_loss
from lkd.models import build
from lkd.models.build import OWN_NETWORKS
from lkd.plan.counting import OperationCounter, Work, without_contents
from lkd.plan.gpus import Gpu
from lkd.teacher import Teacher, load_teacher_network
from lkd.training import Training


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
    loss: Callable[[], nn.Module],
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
        network = build(**architecture_of(dataclasses.replace(student, pretrained=False), images.train))
        built = loss()
        built.to = lambda *_: built  # type: ignore  # tensors without contents cannot be moved
        training = Training(network, built, Teacher(taught_by, train) if taught_by else None, batches, train)
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
    return build(**architecture_of(model, images.train))


def plan_loss(
    specification: dict[str, Any] | str, student: ModelRecipe, teacher: TeacherRecipe, images: Images
) -> tuple[Callable[[], nn.Module], str]:
    """How a recipe's loss is built, and what it is called.

    Raises:
        UserError: If the loss, or one of the networks, is not good.
    """
    if isinstance(specification, str) and specification.endswith(".safetensors") and not Path(specification).exists():
        return lambda: build_learned_loss("logits", {}).requires_grad_(False), "the default learned loss, not there yet"
    named = specification if isinstance(specification, str) else str(specification.get("name"))
    return lambda: prepare_loss(specification, student, teacher, images, 0), named
