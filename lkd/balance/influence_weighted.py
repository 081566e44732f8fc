"""Any loss with a weight for every training example, from a file or from the influence of the student in training."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lkd.balance.example_weights import load_weights, weigh_examples
from lkd.balance.influence import measure_influence
from lkd.config import InfluenceWeightedLossSettings
from lkd.data import ImageSet
from lkd.errors import UserError
from lkd.outputs import Outputs
from lkd.teacher import TeacherFunction


class InfluenceWeightedLoss(nn.Module):
    """A loss whose gradient at the student's outputs is multiplied, row by row, by a weight of each example.

    That is the gradient of Σ w_i L_i / B for every loss that is a mean over examples of functions of their own outputs
    (cross_entropy, kd, dkd, logit_mse, logit_standardization, fitnet, at, learned losses over logits). Losses that
    compare the examples of a batch (dist, sp, rkd) have no L_i; for them it is a heuristic. The loss's own parameters
    (adapters) see no weights, and the terms' values are those without weights.

    *Our reconstruction* of KD-AIF's update mechanisms: static weights of a file, or of the student itself, measured
    once or again and again; and teacher and student together, where the teacher goes on with the cross-entropy of the
    labels under the same weights, as the term `teacher/task`.

    Args:
        loss: The loss.
        meta_validation: What influence is measured on.
        settings: Where the weights come from.
        teacher: The network of a teacher that is trained along, whose BatchNorm stays as it is; None for a frozen one.

    Raises:
        UserError: If a setting is impossible or the file is not good.
    """

    needs_index = True
    row: Tensor
    weight: Tensor

    def __init__(
        self,
        loss: nn.Module,
        meta_validation: ImageSet,
        settings: InfluenceWeightedLossSettings,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if settings.teacher_rate < 0:
            raise UserError(f"loss 'influence_weighted': teacher_rate: {settings.teacher_rate} is negative")
        if settings.first_epoch < 0 or settings.refresh_epochs < 0:
            raise UserError("loss 'influence_weighted': first_epoch and refresh_epochs must not be negative")
        if getattr(loss, "needs_index", False):
            raise UserError("loss 'influence_weighted': its `loss` remembers images itself; take another")
        self.loss = loss
        self.meta_validation = meta_validation
        self.settings = settings
        self.teacher_stages = getattr(loss, "teacher_stages", ())
        self.teacher = teacher.requires_grad_(True) if teacher else None
        self.known = load_weights(Path(settings.weights)) if settings.weights else None

    @property
    def own_teacher(self) -> TeacherFunction | None:
        """The teacher that is trained along, if there is one: it is to be asked in the place of the frozen one."""
        network = self.teacher
        return None if network is None else lambda batch: network.eval()(batch.images)

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        """Lay out the weights of the training images, all 1 or the file's.

        Args:
            index: Identity of each training image, [N].
            labels: Not read.

        Raises:
            UserError: If the file has no weight for one of them.
        """
        self.register_buffer("row", torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=index.device))
        self.row[index] = torch.arange(len(index), device=index.device)
        self.register_buffer("weight", torch.ones(len(index), device=index.device))
        if self.known:
            missing = ~torch.isin(index, self.known[0])
            if missing.any():
                raise UserError(
                    f"loss 'influence_weighted': {self.settings.weights} has no weight for {int(missing.sum()):,} of "
                    f"the {len(index):,} training images; make it with the same `data` as this training"
                )
            kept = torch.isin(self.known[0], index)
            self.set_weights(self.known[0][kept], self.known[1][kept])

    def set_weights(self, index: Tensor, weight: Tensor) -> None:
        """Give these images these weights, [N] each."""
        self.weight[self.row[index.to(self.row.device)]] = weight.to(self.weight)

    def begin_epoch(
        self, epoch: int, student: nn.Module, images: ImageSet, teacher: TeacherFunction | None, progress: float
    ) -> None:
        """Measure influence anew, if it is time.

        Args:
            epoch: From 0.
            student: As it is.
            images: The training images.
            teacher: The teacher.
            progress: How far the training is, in [0, 1].
        """
        first, every = self.settings.first_epoch, self.settings.refresh_epochs
        due = epoch == first or (every > 0 and epoch > first and (epoch - first) % every == 0)
        if self.settings.weights or not due:
            return
        device = self.weight.device
        frozen = teacher and (lambda batch: detach(teacher(batch)))
        found = measure_influence(
            student, self.loss, frozen, images, self.meta_validation, device, self.settings.influence, progress, epoch
        )
        self.set_weights(found.index, weigh_examples(found.scores, self.settings.influence))

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None, index: Tensor
    ) -> dict[str, Tensor]:
        """Compute the loss's terms.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
            index: Identity of each image, [B].
        """
        weight = self.weight[self.row[index]]
        weighted = {stage: weigh_rows(feature, weight) for stage, feature in student.features.items()}
        compute: Callable[..., dict[str, Tensor]] = self.loss
        terms = compute(Outputs(weigh_rows(student.logits, weight), weighted), detach(teacher), target, progress)
        if self.teacher is None:
            return terms
        own = weigh_rows(teacher.logits, weight * self.settings.teacher_rate)
        return terms | {"teacher/task": cross_entropy(own, target)}


def detach(outputs: Outputs) -> Outputs:
    """The outputs without their graph."""
    return Outputs(outputs.logits.detach(), {stage: feature.detach() for stage, feature in outputs.features.items()})


def weigh_rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """The same tensor; its gradient's rows are multiplied by the weights, [B]."""
    view = tensor.view_as(tensor)
    if view.requires_grad:
        view.register_hook(lambda gradient: gradient * weight.view(-1, *[1] * (gradient.dim() - 1)))
    return view
