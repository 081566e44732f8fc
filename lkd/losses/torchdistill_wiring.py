"""How each of torchdistill's losses is built, and what it reads of `Outputs`; torchdistill is needed to import it."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss
from torchdistill.models.wrapper import (
    AttentionBasedFusion,
    ChannelSimilarityEmbed,
    Normalizer4CRD,
    Paraphraser4FactorTransfer,
    Regressor4VID,
    Translator4FactorTransfer,
)

from lkd.core.outputs import Outputs
from lkd.losses.functions import widen
from lkd.losses.stages import Pairs, Stages, as_map, map_shape, pool

# ----------------------------------------------------------------------------------------------------------------------
# What torchdistill's losses read, computed from `Outputs`, through the small modules that the literature trains.
# torchdistill names what a loss reads by module path and fills it by forward hooks; here a *tap* computes it.
# Importing this module needs torchdistill.


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


# ----------------------------------------------------------------------------------------------------------------------
# How each of torchdistill's losses is built, and which taps feed it. Importing this module needs torchdistill.


class Wiring(NamedTuple):
    """A torchdistill loss and its taps; `terms` are taps of the teacher that are terms of the loss themselves."""

    criteria: list[nn.Module]
    student: list[nn.Module]
    teacher: list[nn.Module]
    terms: tuple[str, ...] = ()


def name_paths(loss: type[nn.Module], path: str) -> dict[str, str]:
    """The arguments by which a torchdistill loss is told where to read, all of them the same path's output."""
    names = [name for name in inspect.signature(loss).parameters if name.startswith(("student_", "teacher_"))]
    return {name: path if name.endswith("_path") else "output" for name in names if name.endswith(("_path", "_io"))}


def wire_logits(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """KD, logit standardisation, DIST, SKD."""
    criterion = loss(**name_paths(loss, "logits"), **options)
    return Wiring([criterion], [Tap("logits", read_logits)], [Tap("logits", read_logits)])


def wire_embeddings(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """RKD, PKT: averaged features as they are."""
    criterion = loss(**name_paths(loss, "embedding"), **options)
    student, teacher = (Tap("embedding", read_embedding(stage)) for stage in pairs[0][:2])
    return Wiring([criterion], [student], [teacher])


def wire_similarities(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """SP: whole feature maps, of whatever shapes."""
    criterion = loss(**name_paths(loss, "feature"), **options)
    pair = pairs[0]
    return Wiring([criterion], [Tap("feature", read_stage(pair.student))], [Tap("feature", read_stage(pair.teacher))])


def wire_correlations(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """CC: a trained linear embedding of each network's averaged features."""
    gaussian = {"type": "gaussian", "gamma": options["gamma"], "max_p": options["max_p"]}
    criterion = loss(**name_paths(loss, "embedding"), kernel_config=gaussian, reduction="batchmean")
    pair, dimension = pairs[0], options["feature_dimension"]
    student = Tap("embedding", read_embedding(pair.student), nn.Linear(pair.student_channels, dimension))
    teacher = Tap("embedding", read_embedding(pair.teacher), nn.Linear(pair.teacher_channels, dimension))
    return Wiring([criterion], [student], [teacher])


def wire_contrast(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """CRD: a trained embedding of unit length of each network's averaged features; the memory comes with the images."""
    pair, dimension = pairs[0], options["feature_dimension"]
    student = Normalizer4CRD(nn.Linear(pair.student_channels, dimension))
    teacher = Normalizer4CRD(nn.Linear(pair.teacher_channels, dimension))
    return Wiring(
        [],
        [Tap("embedding", read_embedding(pair.student), student)],
        [Tap("embedding", read_embedding(pair.teacher), teacher)],
    )


def wire_variances(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """PAD: averaged features, the student's through a linear layer, and a branch for their log-variances."""
    criterion = loss(**name_paths(loss, "embedding"), **options)
    pair = pairs[0]
    channels = pair.teacher_channels
    embed = nn.Linear(pair.student_channels, channels)
    branch = [embed, nn.Linear(channels, channels), nn.BatchNorm1d(channels)]
    read = read_embedding(pair.student)
    student: list[nn.Module] = [Tap("embedding", read, embed), Tap("var_estimator", read, *branch)]
    return Wiring([criterion], student, [Tap("embedding", read_embedding(pair.teacher))])


def wire_projector(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """SRD: a linear projector and BatchNorm without weights on averaged features, and the logits."""
    paths = name_paths(loss, "embedding") | {"student_linear_module_path": "logits"}
    criterion = loss(**paths | {"teacher_linear_module_path": "logits"}, **options)
    pair = pairs[0]
    student, teacher = (nn.BatchNorm1d(pair.teacher_channels, eps=1e-4, affine=False) for _ in range(2))
    project = nn.Linear(pair.student_channels, pair.teacher_channels)
    return Wiring(
        [criterion],
        [Tap("embedding", read_embedding(pair.student), project, student), Tap("logits", read_logits)],
        [Tap("embedding", read_embedding(pair.teacher), teacher), Tap("logits", read_logits)],
    )


def wire_factors(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """FT: the teacher's factor and the student's translation of its feature."""
    pair = pairs[0]
    channels = int(pair.teacher_channels * options["rate"])
    translator = Translator4FactorTransfer(pair.student_channels, channels)
    return Wiring(
        [loss(p=options["p"])],
        [Tap("translator", read_map(pair.student, pair.size), translator)],
        [Paraphrase(pair, options["rate"])],
        ("reconstruction",),
    )


def wire_review(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """Knowledge review: every paired stage and, as in the paper, the global average of the last."""
    levels = [*pairs, pairs[-1]._replace(size=(1, 1))] if pairs[-1].size != (1, 1) else pairs
    for pair in pairs:
        if pair.size[0] != pair.size[1]:
            raise ValueError(f"stages: torchdistill's fusion takes square maps, not {list(pair.size)} ({pair.student})")
    paths = [f"feature{number}" for number in range(len(levels))]
    teacher: list[nn.Module] = [
        Tap(path, read_map(pair.teacher, pair.size)) for path, pair in zip(paths, levels, strict=True)
    ]
    return Wiring([loss(**name_paths(loss, path), **options) for path in paths], [Review(levels)], teacher)


def wire_maps(adapt: Callable[[StagePair], list[nn.Module]], argument: str) -> Callable[..., Wiring]:
    """AT, VID, AB, ICKD: pairs of maps of one size, the student's through an adapter of its own."""

    def wire(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
        paths = [f"feature{number}" for number in range(len(pairs))]
        at = {path: {side: {"path": path, "io": "output"} for side in ("student", "teacher")} for path in paths}
        taps = [
            (Tap(path, read_map(pair.student, pair.size), *adapt(pair)), Tap(path, read_map(pair.teacher, pair.size)))
            for path, pair in zip(paths, pairs, strict=True)
        ]
        return Wiring([loss(**{argument: at}, **options)], [tap for tap, _ in taps], [tap for _, tap in taps])

    return wire


def wire_flow(loss: type[nn.Module], pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """FSP: each pair of stages with the next, the student's channels brought to the teacher's."""
    if len(pairs) < 2:
        raise ValueError(f"stages: FSP is about the flow between stages and needs two pairs, not {len(pairs)}")
    maps = wire_maps(to_teacher_channels, "fsp_pairs")(loss, pairs, options)
    flow = {
        f"flow{number}": {
            f"{side}_{place}": {"path": f"feature{number + step}", "io": "output"}
            for side in ("student", "teacher")
            for step, place in enumerate(("first", "second"))
        }
        for number in range(len(pairs) - 1)
    }
    return maps._replace(criteria=[loss(fsp_pairs=flow)])


def to_teacher_channels(pair: StagePair) -> list[nn.Module]:
    """A 1×1 convolution where channels differ."""
    if pair.student_channels == pair.teacher_channels:
        return []
    return [nn.Conv2d(pair.student_channels, pair.teacher_channels, 1)]


def connect(pair: StagePair) -> list[nn.Module]:
    """AB's connector: a 1×1 convolution and BatchNorm."""
    convolution = nn.Conv2d(pair.student_channels, pair.teacher_channels, 1, bias=False)
    return [convolution, nn.BatchNorm2d(pair.teacher_channels)]


def regress(pair: StagePair) -> list[nn.Module]:
    """VID's mean and variance."""
    return [Regressor4VID(pair.student_channels, pair.teacher_channels, pair.teacher_channels, 1e-5, 5.0)]


def embed_channels(pair: StagePair) -> list[nn.Module]:
    """ICKD's embedding."""
    return [ChannelSimilarityEmbed(pair.student_channels, pair.teacher_channels)]
