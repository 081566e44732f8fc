"""The learned-loss file: weights, what they are, and how they came about, in one safetensors file."""

from pathlib import Path
from typing import Any

from torch import nn

from lkd.errors import UserError
from lkd.files import read_tensors, write_tensors
from lkd.losses.cross_entropy import CrossEntropyLoss
from lkd.losses.learned import FORMS, FeatureLoss, LearnedLoss, LogitLoss
from lkd.losses.replayed import ReplayedLoss
from lkd.sharing.references import fetch, is_remote

KIND, VERSION = "learned loss", 2
SUFFIX = ".lkd.safetensors"
PARTS: dict[str, type[nn.Module]] = {
    "LogitLoss": LogitLoss,  # the balance form's name in format version 1
    **{network.__name__: network for network in (*FORMS.values(), FeatureLoss, CrossEntropyLoss)},
}


def save_loss(path: str | Path, loss: LearnedLoss | ReplayedLoss, provenance: dict[str, Any]) -> None:
    """Write a learned loss, atomically; adapters of features, which fit one pair of networks, are left out.

    Args:
        path: The file; by custom it ends in `.lkd.safetensors`.
        loss: The loss, or its course over a training.
        provenance: What it was trained with: recipe, data, splits, seeds, versions, validation curve; JSON.
    """
    first: Any = loss.losses[0] if isinstance(loss, ReplayedLoss) else loss
    parts = {
        name: {"class": type(part).__name__, "arguments": getattr(part, "architecture", {})}
        for name, part in first.parts.items()
    }
    architecture = {"parts": parts, "normalize_gradient": first.normalize_gradient}
    if isinstance(loss, ReplayedLoss):
        architecture["starts"] = loss.starts
    tensors = {name: tensor for name, tensor in loss.state_dict().items() if ".adapters." not in name}
    write_tensors(Path(path), tensors, KIND, VERSION, {"architecture": architecture, "provenance": provenance})


def load_loss(path: str | Path) -> LearnedLoss | ReplayedLoss:
    """Load a learned loss, frozen, ready for any training loop. Runs no code from the file.

    Args:
        path: A `*.lkd.safetensors` file; or where it is to be fetched from, `hf://owner/repository/file` or
            `wandb://entity/project/artifact:version`.

    Returns:
        An ordinary module: `loss(student, teacher, target, progress) -> dict of terms`. It works for any number of
        classes and, if it reads features, for any stages: it compares the deepest that the outputs hold. A loss that
        was learned while a student was trained with it is replayed by progress.

    Raises:
        UserError: If the file is missing, truncated, not a learned loss, or of a newer format, or cannot be fetched.
    """
    here = fetch(str(path)) if is_remote(str(path)) else Path(path)
    tensors, header = read_tensors(here, KIND, VERSION)
    try:
        architecture = header["architecture"]
        starts = architecture.get("starts")
        losses = [build_loss_networks(architecture) for _ in starts or [0]]
        loss = ReplayedLoss(losses, starts) if starts else losses[0]
        loss.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its weights and its architecture do not fit: {error}") from error
    return loss.requires_grad_(False).eval()


def build_loss_networks(architecture: dict[str, Any]) -> LearnedLoss:
    """Build a loss, untrained, from what the file says of it."""
    parts = {name: PARTS[part["class"]](**part["arguments"]) for name, part in architecture["parts"].items()}
    return LearnedLoss(parts, architecture.get("normalize_gradient", False))


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What a learned loss was trained with.

    Raises:
        UserError: As `load_loss`.
    """
    return read_tensors(Path(path), KIND, VERSION)[1]["provenance"]
