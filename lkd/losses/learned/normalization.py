"""A scale for a loss over logits that its own weights cannot change."""

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot, softmax

from lkd.losses.learned.inputs import Progress
from lkd.outputs import Outputs

CONFIDENCES = (0.05, 0.2, 0.5, 0.8, 0.95)
NUM_CLASSES = 10


def reference_logits() -> tuple[Tensor, Tensor, Tensor]:
    """A batch of student and teacher logits, [25, 10] each, and labels, [25], which covers five confidences of each.

    What is left of the label's probability falls off geometrically over the other classes, in another order for the
    student than for the teacher.
    """
    falling = 0.5 ** torch.arange(NUM_CLASSES - 1, dtype=torch.float64)
    rest = falling / falling.sum()
    rows = [
        (torch.cat([torch.tensor([s]), (1 - s) * rest.roll(3)]), torch.cat([torch.tensor([t]), (1 - t) * rest]))
        for s in CONFIDENCES
        for t in CONFIDENCES
    ]
    student, teacher = (torch.stack(column).log() for column in zip(*rows, strict=True))
    return student, teacher, torch.zeros(len(rows), dtype=torch.int64)


REFERENCE = reference_logits()


def gradient_scale(loss: nn.Module, progress: Progress) -> Tensor:
    """Norm of cross-entropy's gradient over that of the loss's, at the reference logits; a scalar.

    It depends on the loss's weights and on the progress, not on the student. So a loss times its scale is still a
    function of the student whose gradient is what autograd says and whose Hessian is symmetric, and it is
    differentiable in the weights. Dividing by the batch's own gradient norm would be neither (detached: the gradient of
    no function) nor cheap (attached: a third derivative of the student). What this costs: one gradient of the loss at
    25 × 10 logits a step; and it holds the norm on average over these states, so that a loss can still weigh some
    states more than others.

    Args:
        loss: A loss over logits.
        progress: In [0, 1].
    """
    like = next(loss.parameters())
    student, teacher, target = (tensor.to(like.device) for tensor in REFERENCE)
    student, teacher = student.to(like.dtype), teacher.to(like.dtype)

    def total(logits: Tensor) -> Tensor:
        terms = loss(Outputs(logits, {}), Outputs(teacher, {}), target, progress)
        return torch.stack(list(terms.values())).sum()

    with torch.autocast(like.device.type, enabled=False):
        gradient = torch.func.grad(total)(student)
    plain = (softmax(student, 1) - one_hot(target, NUM_CLASSES)) / len(target)
    return plain.norm() * (gradient.square().sum() + 1e-12).rsqrt()
