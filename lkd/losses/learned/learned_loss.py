"""The sum of loss networks that is saved, loaded and trained with."""

from collections.abc import Mapping

from torch import Tensor, nn

from lkd.losses.learned.inputs import Progress
from lkd.losses.learned.normalization import gradient_scale
from lkd.outputs import Outputs


class LearnedLoss(nn.Module):
    """A learned loss: the sum of named parts, each a loss network with all weights inside.

    Args:
        parts: Part name → loss network; each part's terms are named `part/term`.
        normalize_gradient: Whether each part over logits is scaled so that the norm of its gradient at reference logits
            is cross-entropy's, at every progress: then no weights of it act as a learning rate (see `gradient_scale`).
    """

    def __init__(self, parts: Mapping[str, nn.Module], normalize_gradient: bool = False) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))
        self.normalize_gradient = normalize_gradient

    @property
    def teacher_stages(self) -> tuple[str, ...]:
        """The teacher's stages that the parts read."""
        stages = [stage for part in self.parts.values() for stage in getattr(part, "teacher_stages", ())]
        return tuple(dict.fromkeys(stages))

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute every part's terms.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].

        Raises:
            UserError: If a part reads features and a network gives none.
        """
        terms = {}
        for name, part in self.parts.items():
            scale = gradient_scale(part, progress) if self.normalize_gradient and has_own_scale(part) else 1.0
            for term, value in part(student, teacher, target, progress).items():
                terms[f"{name}/{term}"] = scale * value
        return terms


def has_own_scale(part: nn.Module) -> bool:
    """Whether a part is over logits and its weights could change the size of its gradient."""
    return not getattr(part, "reads_features", False) and any(True for _ in part.parameters())
