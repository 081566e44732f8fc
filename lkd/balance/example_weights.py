"""From influence to weights of the training examples, and the file that holds them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.config import InfluenceSettings
from lkd.errors import UserError
from lkd.tensor_files import read_tensors, write_tensors

KIND, VERSION = "set of example weights", 1


def weigh_examples(influence: Tensor, settings: InfluenceSettings) -> Tensor:
    """Weights of mean 1, so that they are no learning rate in disguise; all 1 where no example stands out.

    `sigmoid` is *our reconstruction* of the paper's "sigmoid-based mechanism", whose formula is not public:
    sigmoid(−sharpness · (I − mean) / standard deviation). `exponential` is the official code's e^m with m the influence
    scaled to [−1, 1] by its minimum and maximum. That code gives *more* weight to positive influence, the harmful
    examples (`favour: harmful`), and outliers fix the scale, so that nearly all weights are alike.

    Args:
        influence: [N]; negative is helpful.
        settings: Form, sharpness and sign.

    Returns:
        Weights, [N].
    """
    benefit = -influence.double() if settings.favour == "helpful" else influence.double()
    spread = benefit.std(correction=0)
    if not spread > 0:
        return torch.ones_like(influence)
    if settings.weights == "sigmoid":
        weights = (settings.sharpness * (benefit - benefit.mean()) / spread).sigmoid()
    else:
        low, high = benefit.min(), benefit.max()
        weights = (2 * (benefit - low) / (high - low) - 1).exp()
    return (weights / weights.mean()).to(influence.dtype)


def save_weights(path: Path, index: Tensor, weights: Tensor, influence: Tensor, provenance: dict[str, Any]) -> None:
    """Write the weight and the influence of each example, [N] each, by its index."""
    tensors = {"index": index, "weight": weights, "influence": influence}
    write_tensors(path, tensors, KIND, VERSION, {"provenance": provenance})


def load_weights(path: Path) -> tuple[Tensor, Tensor]:
    """Read index and weight of each example, [N] each.

    Raises:
        UserError: If the file is missing, damaged or another one.
    """
    tensors, _ = read_tensors(path, KIND, VERSION)
    nothing = torch.empty(0)
    index, weight = tensors.get("index", nothing), tensors.get("weight", nothing)
    good = index.dtype == torch.int64 and index.dim() == 1 and index.shape == weight.shape
    if not (good and weight.is_floating_point() and bool((weight >= 0).all() and weight.isfinite().all())):
        raise UserError(f"{path}: has not one index (int64) and one weight of at least 0 for each example: replace it")
    return index, weight
