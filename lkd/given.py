"""Objects in the place of a recipe's parts: networks, a teacher, images or a loss that the caller has built.

Each is a part of the recipe whose name holds a hash of the object, so that the config says what a run was made with,
and a run is not gone on with with something else. What was given is copied, never changed.
"""

import copy
import dataclasses
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.checkpoint import digest
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe
from lkd.data import Dataset, ImageSet, Splits, split_training_images
from lkd.data.image_files import ImageFiles
from lkd.errors import UserError
from lkd.models.given_network import GIVEN, adapt_given
from lkd.models.network_file import KIND, VERSION
from lkd.tensor_files import read_tensors

HASH_LENGTH = 12


class GivenModel(ModelRecipe):
    """A student that is an object. Its name holds its shapes: its weights are the checkpoint's once there is one.

    Args:
        given: The network, of which every student starts as a copy; or a function that builds it, under a seed of each
            student's own.

    Raises:
        UserError: If it is or builds no network, or one that cannot be copied or saved.
    """

    def __init__(self, given: nn.Module | Callable[[], nn.Module]) -> None:
        self.make = (lambda: copy_module(given, "student")) if isinstance(given, nn.Module) else given
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = self.make()
        if not isinstance(network, nn.Module):
            raise UserError(f"student: the function given builds a {type(network).__name__}, not a torch.nn.Module")
        shapes = [[name, list(tensor.shape)] for name, tensor in list_tensors(network, "student").items()]
        super().__init__(name_object(network, digest([shapes, [type(m).__name__ for m in network.modules()]])))

    def build(self, images: ImageSet) -> nn.Module:
        """A fresh one, returning `Outputs`.

        Raises:
            UserError: If it does not fit the images.
        """
        return adapt_given(self.make(), "student", images.num_classes, images.image_shape)

    def load(self, path: Path) -> nn.Module:
        """The network as it was given, with the weights of a student's file, in eval mode."""
        network = self.make()
        network.load_state_dict(read_tensors(path, KIND, VERSION)[0])
        return network.eval()


class GivenTeacher(TeacherRecipe):
    """A teacher that is an object; it sees images as the student does.

    Raises:
        UserError: If it cannot be copied.
    """

    def __init__(self, given: nn.Module) -> None:
        self.network = copy_module(given, "teacher").eval().requires_grad_(False)
        super().__init__(path=name_object(given, digest(list_tensors(given, "teacher"))))

    def open(self, images: ImageSet) -> tuple[nn.Module, dict[str, Any]]:
        """The network, returning `Outputs`, and its architecture.

        Raises:
            UserError: If it does not fit the images.
        """
        network = adapt_given(self.network, "teacher", images.num_classes, images.image_shape)
        return network, {"name": self.path, "num_classes": images.num_classes, "in_chans": images.image_shape[0]}


class GivenLoss(str):
    """A loss that is an object. Made by `give_loss`."""

    module: nn.Module

    def copy(self) -> nn.Module:
        """A loss of its own for each training."""
        return copy_module(self.module, "loss")


def give_loss(module: nn.Module) -> GivenLoss:
    """Let a module be a recipe's loss."""
    given = GivenLoss(name_object(module, digest(list_tensors(module, "loss"))))
    given.module = module
    return given


class GivenData(DataRecipe):
    """Images that are objects.

    Args:
        train: What is trained on, and where meta-validation is split off unless it is given.
        meta_validation: What the outer loop and tuning look at.
        fields: The recipe's other fields.
    """

    def __init__(self, train: ImageSet, meta_validation: ImageSet | None, **fields: Any) -> None:
        content = hashlib.blake2b(digest_images(train).encode())
        if meta_validation:
            index = 1 + int(train.index.max()) + torch.arange(len(meta_validation))
            meta_validation = dataclasses.replace(meta_validation, index=index)
            content.update(digest_images(meta_validation).encode())
        super().__init__(name=f"{GIVEN}images@{content.hexdigest()[:HASH_LENGTH]}", **fields)
        self.dataset = Dataset(self.name, train, train.select(torch.arange(0)))
        self.meta_validation = meta_validation

    def split(self) -> Splits:
        """The training and the meta-validation images.

        Raises:
            UserError: If the sizes are impossible.
        """
        train = self.dataset.train
        if self.meta_validation:
            return Splits(train, self.meta_validation, self.name)
        splits = split_training_images(train, self.train_size, self.meta_validation_size, self.split_seed)
        return splits._replace(fingerprint=f"{self.name}/{splits.fingerprint}")


def name_object(module: nn.Module, content: str) -> str:
    """What an object is called in a config."""
    return f"{GIVEN}{type(module).__name__}@{content[:HASH_LENGTH]}"


def copy_module(module: nn.Module, role: str) -> nn.Module:
    """A copy that shares nothing with the module.

    Raises:
        UserError: If it cannot be copied.
    """
    try:
        return copy.deepcopy(module)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{role}: this {type(module).__name__} cannot be copied: {reason}") from error


def list_tensors(module: nn.Module, role: str) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of a module.

    Raises:
        UserError: If that is not only tensors.
    """
    state = module.state_dict()
    for name, value in state.items():
        if not isinstance(value, torch.Tensor):
            raise UserError(f"{role}: {name!r} of its state dict is a {type(value).__name__}, not a tensor")
    return dict(state)


def digest_images(images: ImageSet) -> str:
    """A hash of all that trains: pixels (of files, their names), labels, normalisation."""
    pixels: Any = images.images
    if isinstance(pixels, ImageFiles):
        pixels = [pixels.name(slot) for slot in range(len(images))]
    return digest([pixels, images.labels, images.mean, images.std, images.num_classes])
