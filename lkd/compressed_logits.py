"""A teacher's logits in few bytes: all of them in float16, or the largest ones and what remains."""

import math

import torch
from torch import Tensor

from lkd.errors import UserError


def check_top_k(top_k: int, num_classes: int) -> None:
    """Check how many classes are kept.

    Raises:
        UserError: If it is more than there are, or saves nothing.
    """
    most = largest_top_k(num_classes)
    if not 0 <= top_k <= most:
        raise UserError(f"top_k: {top_k} of {num_classes} classes; 0 keeps them all, more than {most} save nothing")


def largest_top_k(num_classes: int) -> int:
    """The most classes of an answer that take less space than all of them; 0 where not even one does."""
    entry = bytes_of_answer(num_classes, 1) - 2
    return max(0, (2 * num_classes - 3) // entry)


def type_of_classes(num_classes: int) -> torch.dtype:
    """The integers that class indices are kept as."""
    return torch.int16 if num_classes <= 2**15 else torch.int32


def bytes_of_answer(num_classes: int, top_k: int) -> int:
    """Bytes that the answer to one image takes; `top_k` 0 keeps all classes."""
    return top_k * (2 + type_of_classes(num_classes).itemsize) + 2 if top_k else 2 * num_classes


def compress_logits(logits: Tensor, top_k: int) -> dict[str, Tensor]:
    """Keep logits in float16.

    Args:
        logits: [B, C].
        top_k: How many of the largest are kept; 0 for all.

    Returns:
        `logits`, [B, C]. With `top_k`: `logits` and `classes`, [B, top_k], and `remainder`, [B], the logarithm of the
        sum of the other logits' exponentials.

    Raises:
        UserError: If a logit is not finite in float16.
    """
    logits = logits.float()
    if not top_k:
        kept = {"logits": logits.half()}
    else:
        largest, classes = logits.topk(top_k, 1)
        remainder = logits.scatter(1, classes, -math.inf).logsumexp(1)
        classes = classes.to(type_of_classes(logits.shape[1]))
        kept = {"logits": largest.half(), "classes": classes, "remainder": remainder.half()}
    if not all(bool(tensor.isfinite().all()) for tensor in kept.values()):
        raise UserError(
            f"teacher: its logits reach {logits.abs().max():g}, float16 holds up to 65504; it cannot be cached"
        )
    return kept


def restore_logits(kept: dict[str, Tensor], num_classes: int) -> Tensor:
    """The logits that `compress_logits` kept, [B, C], float32; the remainder is shared evenly among its classes."""
    logits = kept["logits"].float()
    if "classes" not in kept:
        return logits
    even = kept["remainder"].float() - math.log(num_classes - logits.shape[1])
    return even.unsqueeze(1).repeat(1, num_classes).scatter_(1, kept["classes"].long(), logits)
