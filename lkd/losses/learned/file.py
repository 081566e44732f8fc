"""The learned-loss file: weights, what they are, and how they came about, in one safetensors file."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.core.files import MALFORMED, find_pretrained, hash_file
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.forms import FORMS
from lkd.losses.learned.loss import LearnedLoss, ReplayedLoss
from lkd.losses.learned.trust import Trust
from lkd.losses.logits import CrossEntropyLoss
from lkd.losses.loss import DistillationLoss

KIND, VERSION = "learned loss", 2
SUFFIX = ".lkd.safetensors"
PRETRAINED = {  # name → sha256 of the file in lkd/losses/pretrained
    "universal": "8bfee05efdd01b0a9063f549553b9f4ce116c45a2bdede8317a141f51d820a95",
}
NETWORKS: tuple[type[DistillationLoss], ...] = (*FORMS.values(), FeatureLoss, CrossEntropyLoss)
PARTS = {network.__name__: network for network in NETWORKS}


def save_loss(path: str | Path, loss: LearnedLoss | ReplayedLoss, provenance: dict[str, Any]) -> None:
    """Write a learned loss, atomically; adapters of features, which fit one pair of networks, are left out.

    Args:
        path: The file; by custom it ends in `.lkd.safetensors`.
        loss: The loss, or its course over a training.
        provenance: What it was trained with: recipe, data, splits, seeds, versions, validation curve; JSON. `learned`
            is false of a loss that is what its meta-training began with: no look at reuse found a better one, or no
            hypergradient counted.
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


class LossFile(NamedTuple):
    """What a file of a learned loss holds."""

    path: Path
    tensors: dict[str, Tensor]
    header: dict[str, Any]

    @classmethod
    def read(cls, path: str | Path) -> "LossFile":
        """Read a file, or one that the package carries, by its name."""
        own = find_pretrained(str(path))
        if own and hash_file(own) != PRETRAINED.get(str(path)):
            raise UserError(f"{own}: is not the file that came with the package: install the package anew")
        if not own and str(path).isidentifier() and len(str(path)) < 64 and not Path(path).exists():  # meant as a name
            raise UserError(f"{path}: no such file, and no learned loss of the package: {', '.join(PRETRAINED)}")
        return cls(own or Path(path), *read_tensors(own or Path(path), KIND, VERSION))

    def build(self) -> LearnedLoss | ReplayedLoss:
        """The loss, frozen; a `UserError` if weights and architecture do not fit."""
        try:
            starts, parts = self.header["architecture"].get("starts") or [0], self.header["architecture"]["parts"]
            if not parts or len(starts) > max(1, len(self.tensors)):
                raise ValueError(f"{len(parts)} networks, {len(starts)} times, for {len(self.tensors)} weights")
            with torch.device("meta"):  # a header can name any size: nothing of it is made
                loss = build_loss_from(self.header["architecture"])
            with torch.inference_mode(False):  # what is made in it has no derivative outside of it
                own = {name: tensor.to(torch.float32, copy=True) for name, tensor in self.tensors.items()}
            loss.load_state_dict(own, assign=True)
            loss.set_trust(Trust())  # its buffer is not in the file
        except UserError as error:
            raise UserError(f"{self.path}: {error}: learn it again") from error
        except MALFORMED as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"{self.path}: its weights and its architecture do not fit: {reason}: if a newer lkd wrote it, update "
                "lkd, else replace the file"
            ) from error
        return loss.requires_grad_(False).eval()


def load_loss(path: str | Path, trust: Trust | None = None) -> LearnedLoss | ReplayedLoss:
    """Load a learned loss from a file, or one that the package carries, by its name; see `lkd.load_loss`."""
    loss = LossFile.read(path).build()
    if trust is not None:
        loss.set_trust(trust)
    return loss


def build_loss_from(architecture: dict[str, Any]) -> LearnedLoss | ReplayedLoss:
    """Build a loss, or the course of one, untrained, from what the file says of it; its networks must be known."""
    starts = architecture.get("starts")
    losses = []
    for _ in starts or [0]:
        parts = {}
        for name, part in architecture["parts"].items():
            if part["class"] not in PARTS:
                raise UserError(f"loss network {part['class']!r} is unknown; this package has {', '.join(PARTS)}")
            parts[name] = PARTS[part["class"]](**part["arguments"])
        losses.append(LearnedLoss(parts, architecture.get("normalize_gradient", False)))
    return ReplayedLoss(losses, starts) if starts else losses[0]


NOT_LEARNED = "not learned"


def was_learned(header: dict[str, Any]) -> bool:
    """Whether a loss is another than its meta-training began with, by what its file says."""
    provenance = header.get("provenance")
    return not (isinstance(provenance, dict) and provenance.get("learned") is False)


def mark_unlearned(name: str, learned: bool | None) -> str:
    """A loss's name, with a word if it was not learned; None is a hand-made one."""
    return f"{name} ({NOT_LEARNED})" if learned is False else name


def read_provenance(path: str | Path) -> dict[str, Any]:
    """What a learned loss was trained with; a `UserError` as of `load_loss`."""
    provenance = read_tensors(Path(path), KIND, VERSION)[1].get("provenance")
    if not isinstance(provenance, dict):
        raise UserError(f"{path}: does not say what it was trained with: its `provenance` is {provenance!r}")
    return provenance
