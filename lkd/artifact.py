"""The learned-loss file: weights, what they are, and how they came about, in one safetensors file."""

from pathlib import Path
from typing import Any

from lkd.errors import UserError
from lkd.files import read_tensors, write_tensors
from lkd.losses.learned import LearnedLoss, LogitLoss

KIND, VERSION = "learned loss", 1
SUFFIX = ".lkd.safetensors"
PARTS = {"LogitLoss": LogitLoss}


def save_loss(path: str | Path, loss: LearnedLoss, provenance: dict[str, Any]) -> None:
    """Write a learned loss, atomically.

    Args:
        path: The file; by custom it ends in `.lkd.safetensors`.
        loss: The loss.
        provenance: What it was trained with: recipe, data, splits, seeds, versions, validation curve; JSON.
    """
    parts = {name: {"class": type(part).__name__, "arguments": part.architecture} for name, part in loss.parts.items()}
    write_tensors(
        Path(path), loss.state_dict(), KIND, VERSION, {"architecture": {"parts": parts}, "provenance": provenance}
    )


def load_loss(path: str | Path) -> LearnedLoss:
    """Load a learned loss, frozen, ready for any training loop. Runs no code from the file.

    Args:
        path: A `*.lkd.safetensors` file.

    Returns:
        An ordinary module: `loss(student, teacher, target, progress) -> dict of terms`. It works for any number of
        classes.

    Raises:
        UserError: If the file is missing, truncated, not a learned loss, or of a newer format.
    """
    tensors, header = read_tensors(Path(path), KIND, VERSION)
    try:
        parts = {
            name: PARTS[part["class"]](**part["arguments"]) for name, part in header["architecture"]["parts"].items()
        }
        loss = LearnedLoss(parts)
        loss.load_state_dict(tensors)
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path}: its weights and its architecture do not fit: {error}") from error
    return loss.requires_grad_(False).eval()


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What a learned loss was trained with.

    Raises:
        UserError: As `load_loss`.
    """
    return read_tensors(Path(path), KIND, VERSION)[1]["provenance"]
