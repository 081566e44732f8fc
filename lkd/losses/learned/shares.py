"""How much of the gradient each part of a loss has: for the log, and to see a loss network that has saturated."""

from collections.abc import Callable

import torch
from torch.nn.functional import one_hot, softmax

from lkd.losses.functions import widen
from lkd.outputs import Outputs

SATURATED = 1e-4


def gradient_shares(
    loss: Callable[..., dict[str, torch.Tensor]],
    student: Outputs,
    teacher: Outputs | None,
    target: torch.Tensor,
    progress: float | None = None,
) -> dict[str, float]:
    """Share of each term in the gradient at the student's outputs.

    A term's share is the norm of its gradient with respect to the logits and all features together, each taken as a
    variable of its own, over the sum of the terms' norms, or over cross-entropy's norm if that is larger. So shares add
    up to 1 unless the whole loss is weaker than cross-entropy.

    Args:
        loss: Any loss.
        student: The student's outputs; their graph, if any, is not followed.
        teacher: The teacher's outputs for the same images; None where the loss needs none.
        target: Class indices [B] or distributions [B, C].
        progress: How far the training is, in [0, 1].

    Returns:
        Term name → share, in [0, 1].
    """
    with torch.enable_grad():
        logits = student.logits.detach().requires_grad_()
        features = {stage: feature.detach().requires_grad_() for stage, feature in student.features.items()}
        terms = loss(Outputs(logits, features), teacher, target, progress)
        norms = {name: measure_norm(term, [logits, *features.values()]) for name, term in terms.items()}
    probabilities = softmax(widen(logits.detach()), 1)
    dense = target if target.is_floating_point() else one_hot(target, probabilities.shape[1])
    plain = float((probabilities - dense).norm()) / len(dense)
    whole = max(sum(norms.values()), plain, torch.finfo(torch.float32).tiny)
    return {name: norm / whole for name, norm in norms.items()}


def measure_norm(term: torch.Tensor, variables: list[torch.Tensor]) -> float:
    """Norm of a term's gradient with respect to all variables together; 0 if it depends on none."""
    if not term.requires_grad:
        return 0.0
    gradients = torch.autograd.grad(term, variables, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.float().square().sum() for g in gradients if g is not None]).sum().sqrt())


def find_saturated(shares: dict[str, float], threshold: float = SATURATED) -> list[str]:
    """Names of the parts whose every term has a share under the threshold: loss networks that no longer teach.

    Args:
        shares: What `gradient_shares` returns for a `LearnedLoss`, whose terms are named `part/term`.
        threshold: Under this share a term counts as saturated.
    """
    largest: dict[str, float] = {}
    for name, share in shares.items():
        part = name.partition("/")[0]
        largest[part] = max(largest.get(part, 0.0), share)
    return [part for part, share in largest.items() if not share >= threshold]
