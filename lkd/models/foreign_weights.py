"""Weights that other programs saved: training scripts of timm, torchvision, RepDistiller and of users themselves."""

import functools
import json
import logging
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lkd.core.errors import UserError, first_line
from lkd.core.files import MALFORMED, refusing_malformed
from lkd.core.tensor_files import HEADER_KEY, check_header_size
from lkd.models.build import TORCHVISION, build, check_name, plain_state_dict, unwrap
from lkd.models.cifar import CIFAR_NETWORKS

NO_WIDTH = 7919  # a number of classes that is no layer's number of channels
EFFICIENTNET_LITE = tuple(f"tf_efficientnet_lite{number}" for number in range(5))
BESIDE = (  # last parts of names of what networks of some versions save and those of others do not
    "num_batches_tracked", "relative_position_index", "attn_mask", "total_ops", "total_params"
)  # fmt: skip
PICKLED = (".pth", ".pt", ".bin", ".tar", ".ckpt", ".pkl")
SHIFTING = ("googlenet", "inception_v3")  # torchvision's, whose own weights, timm's too, are of another normalisation
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")  # heads that only a training uses
NUMPY = ("dtype", "ndarray", "_core.multiarray.scalar", "core.multiarray.scalar", "core.multiarray._reconstruct")
SAVE_WEIGHTS = "save the weights alone: torch.save(model.state_dict(), path)"


class Weights(NamedTuple):
    """The weights of one network in a file.

    Attributes:
        tensors: By the network's own names.
        prefix: What their names begin with in the file, with the keys that led to them: `state_dict.module.`.
        num_classes: Of its classifier.
        in_chans: Channels of its input.
    """

    tensors: dict[str, Tensor]
    prefix: str
    num_classes: int
    in_chans: int


def load_foreign_network(
    path: Path, name: str, options: dict[str, Any] | None = None
) -> tuple[nn.Module, dict[str, Any], str]:
    """Load a network that another program trained; runs no code from its file.

    Args:
        path: A file of `torch.save` or safetensors: a state dict, or whatever holds one, under keys and prefixes of
            any name (`state_dict`, `model_ema`, `module.`, `_orig_mod.`, `student.`); or a whole network, of which the
            weights alone are read. Where there are several sets of weights that fit, an average of them (EMA) is taken.
        name: Which network it holds.
        options: Further arguments that it was built with.

    Returns:
        The network, in eval mode; its architecture: keyword arguments of `build`, with the classes that the file has;
        and what the names of the weights begin with in the file, with the keys that led to them.
    """
    known = check_name(name)
    state = read_weights(path)
    if name == "cifar_resnet50":
        state = rename(state)
    reasons = []
    for candidate in known:
        with refusing_malformed(path, "file of weights"):
            found, reason = find_weights(state, candidate, options)
        if found is None:
            reasons.append(reason)
            continue
        architecture: dict[str, Any] = {"name": candidate, "options": options or {}, "pretrained": False}
        architecture |= {"num_classes": found.num_classes, "in_chans": found.in_chans}
        with refusing_malformed(path, "file of weights"):
            network = build(**architecture)
            unwrap(network).load_state_dict(found.tensors, strict=False)  # only what is in BESIDE can differ
        shifting = candidate.removeprefix(TORCHVISION)
        if shifting in SHIFTING and "transform_input" not in architecture["options"]:
            logging.getLogger("lkd").warning(
                f"warning: {path}: a {shifting} that starts from torchvision's own weights shifts its input: then give "
                f"the name {TORCHVISION}{shifting} and the option transform_input: true (teacher.options, "
                "student.options); one trained from nothing does not"
            )
        return network.eval(), architecture, found.prefix
    raise UserError(f"{path}: {explain_mismatch(state, name) or reasons[0]}")


def is_foreign(path: Path) -> bool:
    """Whether a file is there that another program wrote."""
    if not path.is_file() or is_pickled(path):
        return path.is_file()
    try:
        check_header_size(path)
        with safe_open(path, framework="pt") as opened:
            return HEADER_KEY not in (opened.metadata() or {})
    except (UserError, SafetensorError, OSError, ValueError):
        return False  # whoever reads it says what is wrong


def is_pickled(path: Path) -> bool:
    """Whether a file is one of `torch.save`."""
    return path.suffix in PICKLED or zipfile.is_zipfile(path)


# ----------------------------------------------------------------------------------------------------------------------
# From a file to tensors.


class Ignored:
    """What stands for a number of numpy in a file of weights."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        """Keep nothing."""


class Emptied:
    """What stands for any other object: an empty mapping, whose attributes are those of the object."""

    def __new__(cls, *_: object) -> "OrderedDict[Any, Any]":  # type: ignore[misc]
        """Make one, whatever the class was to be given."""
        return OrderedDict()


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a file, on the CPU, by their names with the keys that lead to them."""
    if not path.is_file():
        raise UserError(f"{path}: no such file (expected the weights of a network)")
    try:
        content = unpickle(path) if is_pickled(path) else load_file(path)
    except Exception as error:  # what unpickling a damaged file raises has no end
        reason = first_line(error)
        raise UserError(f"{path}: cannot be read as a checkpoint of weights only ({reason}): {SAVE_WEIGHTS}") from error
    state = {key.replace("_orig_mod.", ""): tensor for key, tensor in flatten_tensors(content)}
    if not state:
        raise UserError(f"{path}: holds no weights: {SAVE_WEIGHTS}")
    return state


def unpickle(path: Path) -> Any:
    """Read a file of `torch.save`: tensors, and what holds them; of everything else nothing is imported or called."""
    check_not_compressed(path)
    unknown = [*(f"numpy.{name}" for name in NUMPY), "argparse.Namespace"]
    if zipfile.is_zipfile(path):
        unknown += torch.serialization.get_unsafe_globals_in_checkpoint(path)
    # numpy's numbers are built from a tuple, everything else from its attributes.
    stand_ins: Any = [(Ignored if name.startswith("numpy.") else Emptied, name) for name in dict.fromkeys(unknown)]
    with torch.serialization.safe_globals(stand_ins):
        return torch.load(path, map_location="cpu", weights_only=True)


def check_not_compressed(path: Path) -> None:
    """Check that a file is not far larger in memory than on the disk; torch.save never compresses."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        needed, there = sum(member.file_size for member in archive.infolist()), path.stat().st_size
    if needed > there:
        raise pickle.UnpicklingError(
            f"its {there:,} bytes would be {needed:,} in memory, but torch.save compresses nothing"
        )


def flatten_tensors(content: Any, prefix: str = "", seen: set[int] | None = None) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested mappings, and in whole networks, by dotted names."""
    seen = set() if seen is None else seen
    if not isinstance(content, dict) or id(content) in seen:
        return
    seen.add(id(content))
    attributes = getattr(content, "__dict__", {})
    parts = [attributes[name] for name in ("_parameters", "_buffers", "_modules") if name in attributes] or [content]
    for part in parts:
        for key, value in part.items() if isinstance(part, dict) else ():
            if isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu":
                yield f"{prefix}{key}", value.detach()
            else:
                yield from flatten_tensors(value, f"{prefix}{key}.", seen)


# ----------------------------------------------------------------------------------------------------------------------
# Which of the tensors are the network's.


def find_weights(
    state: dict[str, Tensor], name: str, options: dict[str, Any] | None = None
) -> tuple[Weights | None, str]:
    """The weights of a network among tensors, or else what does not fit."""
    expected = list_shapes(name, json.dumps(options or {}))
    first = next(iter(expected))
    prefixes = {key.removesuffix(first) for key in state if key == first or key.endswith(f".{first}")}
    prefixes = {prefix for prefix in prefixes if 2 * sum(prefix + key in state for key in expected) >= len(expected)}
    reasons = [] if prefixes else [f"holds no {name}: {find_missing(state, expected)!r} is missing"]
    for prefix in sorted(prefixes, key=rank_prefix, reverse=True):
        within = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
        reasons.append(compare_shapes(within, expected, name))
        if not reasons[-1]:
            classes = [len(within[key]) for key, shape in expected.items() if NO_WIDTH in shape[:1]]
            inputs = [within[key].shape[1] for key, shape in expected.items() if shape[1:2] == (3,)]
            own = {key: value for key, value in within.items() if not is_beside(key)}
            return Weights(own, prefix, (classes or [0])[0], (inputs or [3])[0]), ""
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    if name in EFFICIENTNET_LITE and list(trim(shapes).values()) == list(set_classes(expected, 1000).values()):
        ours = dict(zip(expected, (state[key] for key in trim(shapes)), strict=True))  # timm's, by other names
        return Weights(ours, "", 1000, 3), ""
    return None, reasons[0]


def find_missing(state: dict[str, Tensor], expected: dict[str, Any]) -> str:
    """The first tensor of a network that is not in a file by its own name."""
    return next((key for key in expected if key not in state), next(iter(expected)))


def rank_prefix(prefix: str) -> tuple[bool, bool, int, str]:
    """What orders the places in a file where weights are, the best one last: averages (EMA), not a teacher's, short."""
    words = prefix.replace("_", ".").split(".")
    return "ema" in words, "teacher" not in words, -len(prefix), prefix


def is_beside(name: str) -> bool:
    """Whether a tensor is one that a network may have or not."""
    return name.rpartition(".")[2] in BESIDE or name.startswith(AUXILIARY)


def trim(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Without what a network may have or not."""
    return {name: shape for name, shape in shapes.items() if not is_beside(name)}


def set_classes(shapes: dict[str, tuple[int, ...]], num_classes: int) -> dict[str, tuple[int, ...]]:
    """Shapes that `list_shapes` gave, for a number of classes."""
    return {name: (num_classes, *shape[1:]) if NO_WIDTH in shape[:1] else shape for name, shape in trim(shapes).items()}


def compare_shapes(found: dict[str, Tensor], expected: dict[str, tuple[int, ...]], name: str) -> str:
    """Where tensors first differ from what a network has, for any number of classes and input channels."""
    shapes = trim({key: tuple(value.shape) for key, value in found.items()})
    for key in [*expected, *shapes]:
        theirs, ours = shapes.get(key), expected.get(key)
        if theirs and ours and len(theirs) == len(ours):
            classes = theirs[:1] if NO_WIDTH in ours[:1] else ours[:1]
            channels = theirs[1:2] if 3 in ours[1:2] else ours[1:2]
            ours = classes + channels + ours[2:]
        if theirs != ours:
            size = "; networks of a fixed image size take options {img_size: N}" if "pos_embed" in key else ""
            there, here = theirs or "missing", ours or "no such weight"
            return f"holds no {name}: {key!r} is {there}, a {name} has {here}{size}"
    return ""


@functools.cache
def list_shapes(name: str, options: str = "{}") -> dict[str, tuple[int, ...]]:
    """What the weights look like with `NO_WIDTH` classes, with options as JSON; a network is laid out once."""
    arguments: dict[str, Any] = {"name": name, "num_classes": NO_WIDTH, "options": json.loads(options)}
    try:
        with torch.device("meta"):
            network = build(**arguments)
    except (*MALFORMED, UserError):  # some networks count while they are built
        network = build(**arguments)
    return trim({key: tuple(value.shape) for key, value in plain_state_dict(network).items()})


def explain_mismatch(state: dict[str, Tensor], name: str) -> str:
    """Say which of the CIFAR networks a state dict is of, if it is of one."""
    for other in CIFAR_NETWORKS:
        if any(find_weights(each, other)[0] for each in (state, rename(state))):
            return f"holds a {other}, not a {name}: give the name {other}, or the file of a {name}"
    return ""


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """RepDistiller's names in `resnet.py` for those that it has in `resnetv2.py`."""
    others = {"shortcut": "downsample", "linear": "fc"}
    return {".".join(others.get(part, part) for part in key.split(".")): value for key, value in state.items()}
