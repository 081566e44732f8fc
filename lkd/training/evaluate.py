"""What a network reaches on a set of images."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lkd.core.distributed import copy_buffers_from_main, count_processes, gather_rows, own_rank
from lkd.core.errors import explaining_exhaustion
from lkd.core.outputs import evaluating
from lkd.data.images import ImageSet
from lkd.losses.functions import expected_calibration_error, find_best_temperature
from lkd.models.teacher import SMALLER_PARTS
from lkd.training.training import NAMED, BrokenInputError, DivergedError


@torch.no_grad()
def evaluate(network: nn.Module, images: ImageSet, device: torch.device, shared: bool = False) -> dict[str, float]:
    """Evaluate a network that returns `Outputs`, in eval mode; its mode is restored. Every image counts once.

    `shared`: whether the processes that have met share the images; all must ask then.

    Returns:
        `top1` and `top5` in percent, `cross_entropy`, `calibrated_cross_entropy` (at the best temperature),
        `temperature` (that one), and `calibration_error` in percent; the same in all processes that share the images.

    Raises:
        DivergedError: If a logit is not finite, and all pixels are.
        BrokenInputError: If a pixel is not finite, or no image can be decoded.
    """
    own = torch.arange(len(images))
    if shared:
        copy_buffers_from_main(network)
        own = own[own_rank() :: count_processes()]
    rows, broken = [], [own[:0].to(device)]
    with explaining_exhaustion("evaluation", SMALLER_PARTS), evaluating(network):
        for batch in images.batches(own.split(images.at_once), device):
            logits = network(batch.images).logits
            rows.append((logits, batch.target))
            if not bool(logits.isfinite().all()):
                broken.append(batch.index[~batch.images.flatten(1).isfinite().all(1)])
    logits, target = (torch.cat(parts) for parts in zip(*rows, strict=True))
    unusable = torch.cat(broken)
    if shared:
        logits, target, unusable = gather_rows(logits), gather_rows(target), gather_rows(unusable)
    logits = logits.float()
    if not len(logits):
        raise BrokenInputError(f"evaluation: none of the {len(images)} images can be decoded: replace them")
    check_answers(logits, unusable)
    ranked = (logits.topk(min(5, logits.shape[1]), 1).indices == target.unsqueeze(1)).cpu()  # MPS has no float64
    temperature = find_best_temperature(logits, target)
    return {
        "top1": 100 * ranked[:, 0].double().mean().item(),
        "top5": 100 * ranked.any(1).double().mean().item(),
        "cross_entropy": float(cross_entropy(logits, target)),
        "calibrated_cross_entropy": float(cross_entropy(logits / temperature, target)),
        "temperature": temperature,
        "calibration_error": 100 * expected_calibration_error(logits.softmax(1), target),
    }


def check_answers(logits: Tensor, unusable: Tensor) -> None:
    """Check that logits are finite.

    `unusable`: index of images whose pixels are not finite.

    Raises:
        BrokenInputError: If there are such images.
        DivergedError: If a logit is not finite all the same.
    """
    if len(unusable):
        named = ", ".join(map(str, unusable[:NAMED].tolist())) + (", ..." if len(unusable) > NAMED else "")
        raise BrokenInputError(f"evaluation: pixels of {len(unusable)} images are not finite (images {named})")
    wrong = int((~logits.isfinite().all(1)).sum())
    if wrong:
        raise DivergedError(
            f"evaluation: the logits of {wrong} of {len(logits)} images are not finite, their pixels are: the network "
            "has diverged (lower train.learning_rate), or its weights are damaged"
        )


def guess(images: ImageSet) -> dict[str, float]:
    """What `evaluate` would give of a network that finds all classes equally likely: all that a diverged one knows."""
    classes = images.num_classes
    entropy = math.log(classes)
    return {
        "top1": 100 / classes,
        "top5": 100 * min(5, classes) / classes,
        "cross_entropy": entropy,
        "calibrated_cross_entropy": entropy,
        "temperature": 1.0,
        "calibration_error": 0.0,
    }
