"""DIST: distillation from a stronger teacher (Huang, You, Wang, Qian, Xu, NeurIPS 2022, arXiv 2205.10536)."""

from torch import Tensor, nn

from lkd.losses.functions import check_options, cross_entropies, pearson_correlations, widen
from lkd.outputs import Outputs


class DISTLoss(nn.Module):
    """task · CE + beta · inter + gamma · intra.

    inter = τ² · mean over samples of (1 − ρ) between the rows of the two probability matrices at temperature τ, and
    intra = τ² · mean over classes of (1 − ρ) between their columns, ρ being Pearson's correlation. The factor τ² is
    that of the authors' code (hunto/image_classification_sota). A row or column that is constant has ρ = 0.

    Args:
        task: Weight of cross-entropy.
        beta: Weight of the relation between classes; 2 in the authors' recipes.
        gamma: Weight of the relation within a class; 2 in the authors' recipes.
        temperature: τ; the authors take 1 on ImageNet and 4 on CIFAR-100.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(self, task: float = 1.0, beta: float = 2.0, gamma: float = 2.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_options(temperature, task=task, beta=beta, gamma=gamma)
        self.task = task
        self.beta = beta
        self.gamma = gamma
        self.temperature = temperature

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: float | None = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task`, `inter_class` and `intra_class`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: Ignored.
        """
        p, q = ((widen(logits) / self.temperature).softmax(1) for logits in (student.logits, teacher.logits))
        scale = self.temperature**2
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "inter_class": self.beta * scale * (1 - pearson_correlations(p, q).mean()),
            "intra_class": self.gamma * scale * (1 - pearson_correlations(p.T, q.T).mean()),
        }
