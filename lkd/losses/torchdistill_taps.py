"""What torchdistill's losses read, computed from `Outputs`, through the small modules that the literature trains.

torchdistill names what a loss reads by module path and fills it by forward hooks; here a *tap* computes it.
Importing this module needs torchdistill.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss
from torchdistill.models.wrapper import AttentionBasedFusion, Paraphraser4FactorTransfer

from lkd.losses.functions import widen
from lkd.losses.stages import Pairs, Stages, as_map, map_shape, pool
from lkd.outputs import Outputs


class StagePair(NamedTuple):
    """A student's and a teacher's stage, their channels, and the smaller of their sizes (height, width)."""

    student: str
    teacher: str
    student_channels: int
    teacher_channels: int
    size: tuple[int, int]


class Tap(nn.Module):
    """Something that a loss reads from a network's outputs: `path` → `modules(read(outputs))`."""

    def __init__(self, path: str, read: Callable[[Outputs], Tensor], *modules: nn.Module) -> None:
        super().__init__()
        self.path = path
        self.read = read
        self.modules_between = nn.Sequential(*modules)

    def forward(self, outputs: Outputs) -> dict[str, Any]:
        """From a network's outputs to what the loss finds at the path."""
        return {self.path: self.modules_between(self.read(outputs))}


class Paraphrase(nn.Module):
    """The teacher's factor, for FT: an autoencoder, trained by its own term `reconstruction`."""

    def __init__(self, pair: StagePair, rate: float) -> None:
        super().__init__()
        self.read = read_map(pair.teacher, pair.size)
        self.paraphraser = Paraphraser4FactorTransfer(rate, pair.teacher_channels)

    def forward(self, outputs: Outputs) -> dict[str, Any]:
        """Compute the factor, without gradient, and the error of its reconstruction."""
        feature = self.read(outputs)
        factor = self.paraphraser.encoder(feature)
        return {
            "paraphraser": factor.detach(),
            "reconstruction": mse_loss(self.paraphraser.decoder(factor), feature),
        }


class Review(nn.Module):
    """The student's fused features, for knowledge review: from the deepest stage up, each with what came before."""

    def __init__(self, levels: list[StagePair]) -> None:
        super().__init__()
        self.sizes = [pair.size[0] for pair in levels]
        self.reads = [read_map(pair.student, pair.size) for pair in levels]
        middle = min(512, levels[-1].student_channels)
        self.fusions = nn.ModuleList(
            AttentionBasedFusion(pair.student_channels, middle, pair.teacher_channels, pair is not levels[-1])
            for pair in levels
        )

    def forward(self, outputs: Outputs) -> dict[str, Any]:
        """Compute `feature0`, `feature1`, …, each a pair as torchdistill's module returns it."""
        fused: dict[str, Any] = {}
        residual: Tensor | None = None
        for number in reversed(range(len(self.reads))):
            feature = self.reads[number](outputs)
            fused[f"feature{number}"] = self.fusions[number](feature, residual, self.sizes[number])
            residual = fused[f"feature{number}"][1]
        return fused


def shape_pairs(pairs: Pairs, student: Stages, teacher: Stages) -> list[StagePair]:
    """Add channels and common size to pairs of stages."""
    shaped = []
    for s, t in pairs:
        ours, theirs = map_shape(student[s]), map_shape(teacher[t])
        size = (min(ours[1], theirs[1]), min(ours[2], theirs[2]))
        shaped.append(StagePair(s, t, ours[0], theirs[0], size))
    return shaped


def read_logits(outputs: Outputs) -> Tensor:
    """The logits, [B, C]."""
    return widen(outputs.logits)


def read_map(stage: str, size: tuple[int, int]) -> Callable[[Outputs], Tensor]:
    """A reader of a stage's feature map, averaged down to a size."""
    return lambda outputs: adaptive_avg_pool2d(as_map(outputs.features[stage]), size)


def read_stage(stage: str) -> Callable[[Outputs], Tensor]:
    """A reader of a stage's feature map as it is."""
    return lambda outputs: as_map(outputs.features[stage])


def read_embedding(stage: str) -> Callable[[Outputs], Tensor]:
    """A reader of a stage's global average, [B, c]."""
    return lambda outputs: pool(outputs.features[stage])
