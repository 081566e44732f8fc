"""FitNets: hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015, arXiv 1412.6550, eq. 3)."""

import torch
from torch import Tensor, nn

from lkd.losses.functions import check_options, cross_entropies
from lkd.losses.stages import Stages, as_map, build_adapter, choose_pairs, pair_middle, shrink_to_smaller
from lkd.outputs import Outputs


class FitNetLoss(nn.Module):
    """task · CE + distillation · mean over pairs of the mean squared error of r(student feature) from the teacher's.

    The paper trains the student up to the guided stage with ½‖·‖² alone, then the whole network with KD; here, as in
    RepDistiller, it is one training, the mean is taken, and its weight is 100. The regressor r is a 1×1 convolution;
    where sizes differ, both features are averaged down to the smaller (the paper's r is a larger convolution instead).

    Args:
        student_stages: The student's stages.
        teacher_stages: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the squared error.
        stages: Pairs [student stage, teacher stage]; by default the middle stages, as in the paper.

    Raises:
        ValueError: If a stage does not exist or a weight is negative.
    """

    def __init__(
        self,
        student_stages: Stages,
        teacher_stages: Stages,
        task: float = 1.0,
        distillation: float = 100.0,
        stages: list[list[str]] | None = None,
    ) -> None:
        super().__init__()
        check_options(task=task, distillation=distillation)
        self.task = task
        self.distillation = distillation
        self.pairs = choose_pairs(stages, student_stages, teacher_stages, pair_middle)
        self.teacher_stages = tuple(name for _, name in self.pairs)
        self.regressors = nn.ModuleList(build_adapter(student_stages[s], teacher_stages[t]) for s, t in self.pairs)

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.
        """
        errors = []
        with torch.autocast(student.logits.device.type, enabled=False):
            for (s, t), regressor in zip(self.pairs, self.regressors, strict=True):
                ours, theirs = shrink_to_smaller(as_map(student.features[s]), as_map(teacher.features[t]))
                errors.append((regressor(ours) - theirs).square().mean())
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distillation": self.distillation * torch.stack(errors).mean(),
        }
