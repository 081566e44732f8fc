"""What a network reaches on a set of images."""

import math

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lkd.core.distributed import copy_buffers_from_main, count_processes, gather_rows, own_rank
from lkd.data.images import ImageSet
from lkd.losses.functions import expected_calibration_error, find_best_temperature


@torch.no_grad()
def evaluate(
    network: nn.Module, images: ImageSet, device: torch.device, batch_size: int = 500, shared: bool = False
) -> dict[str, float]:
    """Evaluate a network that returns `Outputs`, in eval mode; its mode is restored. Every image counts once.

    `shared`: whether the processes that have met share the images; all must ask then.

    Returns:
        `top1` and `top5` in percent, `cross_entropy`, `calibrated_cross_entropy` (at the best temperature),
        `temperature` (that one), and `calibration_error` in percent; the same in all processes that share the images.
    """
    training = network.training
    network.eval()
    if shared:
        copy_buffers_from_main(network)
    own = torch.arange(own_rank(), len(images), count_processes()) if shared else torch.arange(len(images))
    answers = [(network(batch.images).logits, batch.target) for batch in images.batches(own.split(batch_size), device)]
    logits, target = (torch.cat(parts) for parts in zip(*answers, strict=True))
    if shared:
        logits, target = gather_rows(logits), gather_rows(target)
    logits = logits.float()
    network.train(training)
    ranked = logits.topk(min(5, logits.shape[1]), 1).indices == target.unsqueeze(1)
    temperature = find_best_temperature(logits, target)
    return {
        "top1": 100 * ranked[:, 0].double().mean().item(),
        "top5": 100 * ranked.any(1).double().mean().item(),
        "cross_entropy": float(cross_entropy(logits, target)),
        "calibrated_cross_entropy": float(cross_entropy(logits / temperature, target)),
        "temperature": temperature,
        "calibration_error": 100 * expected_calibration_error(logits.softmax(1), target),
    }


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
