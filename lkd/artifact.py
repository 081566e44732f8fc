"""The learned-loss file: weights, what they are, and how they came about, in one safetensors file."""

from pathlib import Path
from typing import Any

from lkd.errors import UserError
from lkd.files import read_tensors, write_tensors
from lkd.losses.learned import LearnedLoss, LogitLoss
from lkd.losses.replayed import ReplayedLoss

KIND, VERSION = "learned loss", 1
SUFFIX = ".lkd.safetensors"
PARTS = {"LogitLoss": LogitLoss}


def save_loss(path: str | Path, loss: LearnedLoss | ReplayedLoss, provenance: dict[str, Any]) -> None:
    """Write a learned loss, atomically.

    Args:
        path: The file; by custom it ends in `.lkd.safetensors`.
        loss: The loss, or its course over a training.
        provenance: What it was trained with: recipe, data, splits, seeds, versions, validation curve; JSON.
    """
    first: Any = loss.losses[0] if isinstance(loss, ReplayedLoss) else loss
    parts = {name: {"class": type(part).__name__, "arguments": part.architecture} for name, part in first.parts.items()}
    architecture: dict[str, Any] = {"parts": parts}
    if isinstance(loss, ReplayedLoss):
        architecture["starts"] = loss.starts
    write_tensors(
        Path(path), loss.state_dict(), KIND, VERSION, {"architecture": architecture, "provenance": provenance}
    )


def load_loss(path: str | Path) -> LearnedLoss | ReplayedLoss:
    """Load a learned loss, frozen, ready for any training loop. Runs no code from the file.

    Args:
        path: A `*.lkd.safetensors` file.

    Returns:
        An ordinary module: `loss(student, teacher, target, progress) -> dict of terms`. It works for any number of
        classes. A loss that was learned while a student was trained with it is replayed by progress.

    Raises:
        UserError: If the file is missing, truncated, not a learned loss, or of a newer format.
    """
    tensors, header = read_tensors(Path(path), KIND, VERSION)
    try:
        starts = header["architecture"].get("starts")
        losses = [build_loss_networks(header["architecture"]["parts"]) for _ in starts or [0]]
        loss = ReplayedLoss(losses, starts) if starts else losses[0]
        loss.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its weights and its architecture do not fit: {error}") from error
    return loss.requires_grad_(False).eval()


def build_loss_networks(parts: dict[str, Any]) -> LearnedLoss:
    """Build a loss, untrained, from what the file says of its parts."""
    return LearnedLoss({name: PARTS[part["class"]](**part["arguments"]) for name, part in parts.items()})


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What a learned loss was trained with.

    Raises:
        UserError: As `load_loss`.
    """
    return read_tensors(Path(path), KIND, VERSION)[1]["provenance"]
