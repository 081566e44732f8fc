"""How each of torchdistill's losses is built, and which taps feed it. Importing this module needs torchdistill."""

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn
from torchdistill.models.wrapper import (
    ChannelSimilarityEmbed,
    Normalizer4CRD,
    Regressor4VID,
    Translator4FactorTransfer,
)

from lkd.losses.torchdistill_taps import (
    Paraphrase,
    Review,
    StagePair,
    Tap,
    read_embedding,
    read_logits,
    read_map,
    read_stage,
)


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
