"""What a distillation loss is, and how a user's own module or function becomes one."""

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses.functions import is_hidden

if TYPE_CHECKING:  # a loss in a loop of its own must not wait for the readers of images
    from lkd.data.images import ImageSet
    from lkd.losses.learned.trust import Trust

Progress = float | Tensor | None
Terms = dict[str, Tensor]
"""Name → scalar; their sum is the loss."""


def read_progress(progress: Progress) -> float | Tensor:
    """How far the training is; 1, its end, where that is not given.

    A tensor on an accelerator is not looked at, which would wait for the device, nor is anything that is traced.

    Raises:
        ValueError: If it is not in [0, 1].
    """
    if progress is None:
        return 1.0
    if torch.compiler.is_compiling() or (isinstance(progress, Tensor) and is_hidden(progress)):
        return progress
    if not 0 <= progress <= 1:
        raise ValueError(
            f"progress: {float(progress):g} is not in [0, 1]; give the steps done over those of the whole training"
        )
    return progress


class DistillationLoss(nn.Module):
    """Named scalar terms, whose sum is the loss. Every loss here derives from it, and so may a user's.

    Attributes:
        teacher_stages: The teacher's stages whose features the loss reads.
        needs_index: Whether it must know which image is which: then training calls `enroll` once and gives `forward`
            the batch's `index`.
        reads_logits: Whether it reads the teacher's logits: then the teacher has to know the data's classes.
        reads_trust: Whether it is told what is measured of teacher, labels and student (`Trust`): then training calls
            `set_trust` before the first step, and `update_trust` some twenty times.
    """

    teacher_stages: tuple[str, ...] = ()
    needs_index: bool = False
    reads_logits: bool = True

    @property
    def needs_teacher(self) -> bool:
        """Whether it reads anything of the teacher."""
        return bool(self.reads_logits or self.teacher_stages)

    reads_trust: bool = False

    @property
    def own_teacher(self) -> Callable[[Any], Outputs] | None:
        """From a batch to the outputs of a teacher that is asked in the place of the training's, if there is one."""
        return None

    @property
    def rates(self) -> dict[nn.Parameter, float]:
        """Factors of the learning rate of those of its own parameters that do not have the whole of it."""
        return {}

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms, in float32 or wider whatever the autocast state, in log space.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]: a number or a 0-dimensional tensor. A loss that reads it is as
                at 1 where it is not given.
        """
        raise NotImplementedError

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        """Learn identity and class of each training image, [N]; called once, where `needs_index`."""

    def set_trust(self, trust: "Trust") -> None:
        """Be told, before the first step, what was measured; where `reads_trust`."""

    def update_trust(self, student: nn.Module) -> None:
        """Measure the student's own accuracy anew; where `reads_trust`."""

    def begin_epoch(
        self,
        epoch: int,
        student: nn.Module,
        images: "ImageSet",
        teacher: Callable[[Any], Outputs] | None,
        progress: float,
    ) -> None:
        """Look at the student as it is before the first step of an epoch; these are counted from 0."""


ON_LABELS = (  # losses of torch and timm that take logits and labels
    "CrossEntropyLoss", "MultiMarginLoss", "LabelSmoothingCrossEntropy", "SoftTargetCrossEntropy"
)  # fmt: skip


class WrappedLoss(DistillationLoss):
    """A user's module or function, which may leave out `progress` and may return one tensor."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function: Any = function
        self.teacher_stages = tuple(getattr(function, "teacher_stages", ()))
        self.needs_index = bool(getattr(function, "needs_index", False))
        self.reads_trust = bool(getattr(function, "reads_trust", False))
        called = function.forward if isinstance(function, nn.Module) else function
        try:
            parameters = list(inspect.signature(called).parameters.values())
        except ValueError:  # of a function that is not written in Python
            parameters = []
        places = [
            p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) and p.default is p.empty
        ]
        takes_any = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        self.on_labels = type(function).__name__ in ON_LABELS and len(places) == 2
        self.reads_logits = bool(getattr(function, "reads_logits", not self.on_labels))
        if len(places) < 3 and not takes_any and not self.on_labels:
            takes = ", ".join(p.name for p in places) or "nothing"
            raise UserError(
                f"loss: {getattr(function, '__name__', type(function).__name__)} takes ({takes}); a loss takes "
                "(student, teacher, target) or (student, teacher, target, progress), where student.logits is [B, C]"
            )
        self.by_place = takes_any or len([p for p in places if p.name != "index"]) > 3
        self.by_name = not self.by_place and any(p.name == "progress" for p in parameters)

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        self.function.enroll(index, labels)

    def set_trust(self, trust: "Trust") -> None:
        self.function.set_trust(trust)

    def update_trust(self, student: nn.Module) -> None:
        self.function.update_trust(student)

    def begin_epoch(self, epoch: int, student: nn.Module, *rest: Any) -> None:
        if hasattr(self.function, "begin_epoch"):
            self.function.begin_epoch(epoch, student, *rest)

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None, **identity: Tensor
    ) -> Terms:
        """Compute the terms; one tensor is the term `loss`."""
        places = (progress,) if self.by_place else ()
        names = {"progress": progress} if self.by_name else {}
        inputs = (student.logits, target) if self.on_labels else (student, teacher, target, *places)
        terms = self.function(*inputs, **names, **identity)
        if isinstance(terms, Tensor):
            terms = {"loss": terms}
        if not isinstance(terms, dict):
            raise UserError(
                f"loss: the one given returns a {type(terms).__name__}; return a dict of scalar tensors, or one of them"
            )
        for name, term in terms.items():
            if not isinstance(term, Tensor) or term.numel() != 1:
                what = f"of shape {list(term.shape)}" if isinstance(term, Tensor) else f"as {type(term).__name__}"
                raise UserError(
                    f"loss: the one given returns {name!r} {what}, not a scalar tensor; take the batch's mean"
                )
        return {name: term.reshape(()) for name, term in terms.items()}


def wrap_loss(loss: Callable[..., Any]) -> DistillationLoss:
    """A loss of this project from a user's: one of ours is one, anything else is wrapped.

    Args:
        loss: `loss(student, teacher, target, progress) -> {term: scalar} or scalar`; `progress` may be left out.
    """
    is_ours = isinstance(loss, DistillationLoss) and type(loss).__module__.startswith("lkd.")
    return loss if isinstance(loss, DistillationLoss) and (is_ours or loss.own_teacher) else WrappedLoss(loss)
