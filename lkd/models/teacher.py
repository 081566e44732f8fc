"""A teacher: a callable from a batch to its outputs, without gradient."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lkd.core.errors import UserError, check_choice, explaining_exhaustion
from lkd.core.outputs import Outputs
from lkd.core.random import seeded_generator
from lkd.data.embedded import TEACHER
from lkd.data.images import Batch, ImageSet
from lkd.data.readers import IN_MEMORY
from lkd.models.build import TakenClasses, adapt_pretrained, build, build_forward
from lkd.models.dry_run import find_fixed_size
from lkd.models.files import fit_to_images, load_network

SMALLER_PARTS = "a smaller data.evaluation_batch_size"
TeacherFunction = Callable[[Batch], Outputs]
"""From a batch to a teacher's outputs."""


class Teacher:
    """A frozen network that is asked anew for every batch.

    Args:
        network: The network; put into eval mode.
        compiled: Whether it goes through torch.compile.
        channels_last: Whether its weights lie in memory with the channels last.
        logit_scale: Factor of its logits.
    """

    def __init__(
        self, network: nn.Module, compiled: bool = False, channels_last: bool = False, logit_scale: float = 1.0
    ) -> None:
        self.network, self.logit_scale = network.eval().requires_grad_(False), logit_scale
        self.forward = build_forward(self.network, compiled, channels_last)
        self.writes: bool | None = None  # into its input, which the student is to see as it was; not known yet

    @torch.no_grad()  # not inference_mode: it is no faster here, and its tensors cannot be saved for a loss's backward
    def __call__(self, batch: Batch) -> Outputs:
        images = batch.images if self.writes is False else batch.images.clone()
        before = images._version
        outputs = self.forward(images)
        changed = images._version != before
        if changed and self.writes is False:
            raise UserError("teacher: it has written into its input, which it did not before: it must not")
        self.writes = changed or bool(self.writes)
        if self.logit_scale == 1:
            return outputs
        return Outputs(self.logit_scale * outputs.logits.float(), outputs.features)


def take_classes(network: nn.Module, num_classes: int, classes: list[int] | str) -> TakenClasses:
    """The network with the logits that `teacher.classes` names, of `num_classes`."""
    try:
        if isinstance(classes, list):
            columns = [int(number) for number in classes]
        elif span := re.fullmatch(r"(\d+)-(\d+)", classes):
            columns = list(range(int(span[1]), int(span[2]) + 1)) if int(span[2]) < num_classes else []
        else:
            columns = [int(line) for line in Path(classes).read_text(encoding="utf-8").split()]
    except OSError as error:
        raise UserError(f"teacher.classes: {classes}: cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"teacher.classes: {classes} does not hold one number on each line: {error}") from error
    if not columns or len(set(columns)) < len(columns) or not 0 <= min(columns) <= max(columns) < num_classes:
        raise UserError(
            f"teacher.classes: {str(classes)[:100]} names none, one twice, or one that is not there; the teacher has "
            f"the classes 0 to {num_classes - 1}"
        )
    return TakenClasses(network, columns).train(network.training)


class TabulatedTeacher:
    """A teacher's answers to every image of a set, computed once: right as long as the images are not augmented.

    Its answers to images of another set are NaN, which stops a training.

    Args:
        teacher: The teacher.
        images: The images that it will be asked about.
        device: Where the table lies.
        stages: The features that are kept beside the logits.
    """

    def __init__(
        self,
        teacher: TeacherFunction,
        images: ImageSet,
        device: torch.device,
        stages: tuple[str, ...] = (),
    ) -> None:
        rows = []
        with explaining_exhaustion("teacher", SMALLER_PARTS):
            for batch in images.batches(torch.arange(len(images)).split(images.at_once), device):
                outputs = teacher(batch)
                rows.append((batch.index, outputs.logits, *(outputs.features[stage] for stage in stages)))
        index, *answers = (torch.cat(column) for column in zip(*rows, strict=True))
        # The last row is what an image that is not in the table is answered.
        self.logits, *features = (torch.cat([each, torch.full_like(each[:1], torch.nan)]) for each in answers)
        self.features = dict(zip(stages, features, strict=True))
        self.row = torch.full((int(images.index.max()) + 2,), -1, device=device)  # the last of those beyond
        self.row[index] = torch.arange(len(index), device=device)

    def __call__(self, batch: Batch) -> Outputs:
        """Look a batch up by the images' index; the only features are those that were kept."""
        rows = self.row[batch.index.clamp(max=len(self.row) - 1)]
        return Outputs(self.logits[rows], {stage: feature[rows] for stage, feature in self.features.items()})


class UnreliableTeacher:
    """A teacher that answers at random on a fixed fraction of the images.

    There its logits are permuted over the classes, each image with a permutation of its own: a function of the seed.
    """

    def __init__(self, teacher: Teacher, fraction: float, seed: int) -> None:
        self.teacher = teacher
        self.fraction = fraction
        self.seed = seed

    def __call__(self, batch: Batch) -> Outputs:
        outputs = self.teacher(batch)
        order = torch.stack([self.class_order(int(i), outputs.logits.shape[1]) for i in batch.index])
        return Outputs(outputs.logits.gather(1, order.to(outputs.logits.device)), outputs.features)

    def class_order(self, index: int, num_classes: int) -> Tensor:
        """The permutation of the classes for one image: the identity where the teacher is reliable."""
        generator = seeded_generator(self.seed, 4, index)
        if torch.rand((), generator=generator) >= self.fraction:
            return torch.arange(num_classes)
        return torch.randperm(num_classes, generator=generator)


def load_teacher_network(
    path: str, name: str | None = None, options: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a teacher's file, see `load_network`; `embedded` is the one that the package carries."""
    if path != "embedded":
        return load_network(Path(path), name, options)
    network, header = load_network(TEACHER, name, options)
    known = IN_MEMORY["fashion_mnist"]
    return network, {"input": {"mean": known.mean, "std": known.std}, "classes": known.read.classes} | header


def load_teacher(
    images: ImageSet,
    path: str = "embedded",
    name: str | None = None,
    pretrained: bool = False,
    options: dict[str, Any] | None = None,
    image_size: int = 0,
) -> tuple[nn.Module, dict[str, Any]]:
    """Get a teacher, to be asked about these images as they are normalised for the student.

    The other arguments are the fields of `lkd.config.TeacherRecipe`.

    Returns:
        The network, in eval mode, and its architecture (keyword arguments of `lkd.models.build`).
    """
    if pretrained and path != "embedded":
        raise UserError(f"teacher.path: {path} and teacher.pretrained exclude each other: give one")
    if name is None and (pretrained or path == "random"):
        what = "pretrained" if pretrained else path
        raise UserError(f"teacher.name: missing; {what} needs the network's name, as in resnet32x4")
    architecture: dict[str, Any] = {"name": name, "options": options or {}}
    header: dict[str, Any] = {}
    if pretrained:
        network = build_pretrained(architecture)
    elif path == "random":
        architecture |= {"num_classes": images.num_classes, "in_chans": images.image_shape[0], "pretrained": False}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = build(**architecture)
    else:
        network, header = load_teacher_network(path, name, options)
        said = {"taken": header.get("taken", ""), "provenance": header.get("provenance")}
        architecture = header["architecture"] | said | {"is_input_said": "input" in header}
    size = image_size or find_fixed_size(network, architecture.get("options"))
    size = 0 if images.image_shape[1:] == (size, size) else size
    if pretrained:
        return adapt_pretrained(network.eval(), images, size), architecture
    return fit_to_images(path, network.eval(), header, images, size), architecture


def build_pretrained(architecture: dict[str, Any]) -> nn.Module:
    """Build timm's network of a name with a tag; the architecture learns of its classes."""
    import timm

    name = str(architecture["name"])
    if "." not in name:
        raise UserError(
            f"teacher.name: {name} has no tag; timm has several weights of it: name one, as in resnet34.tv_in1k"
        )
    check_choice("teacher.name", name, timm.list_pretrained())
    configuration = timm.get_pretrained_cfg(name)
    architecture |= {"num_classes": configuration.num_classes, "in_chans": 3, "pretrained": True}
    return build(**architecture)
