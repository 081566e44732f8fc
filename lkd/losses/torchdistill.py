"""torchdistill's losses (Matsubara, 2021, arXiv 2011.12913) under this project's contract, without its hooks.

torchdistill names what a loss reads by module path and fills it by forward hooks; here a *tap* computes it from
`Outputs`, through the small modules that the literature trains. Importing this module needs torchdistill.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, mse_loss
from torchdistill.losses import mid_level
from torchdistill.models import wrapper

from lkd.core.errors import UserError, check_choice
from lkd.core.outputs import Outputs
from lkd.losses.functions import (
    Chosen,
    Pairs,
    Stages,
    as_map,
    check_options,
    choose_pairs,
    cross_entropies,
    full_precision,
    label_of,
    map_shape,
    pair_equal_sizes,
    pair_last,
    pool,
    widen,
)
from lkd.losses.loss import DistillationLoss, Progress, Terms

# ----------------------------------------------------------------------------------------------------------------------
# What the losses read.

Reader = Callable[[Outputs], Tensor]


class StagePair(NamedTuple):
    """A student's and a teacher's stage, the channels of both, and the smaller of their sizes (height, width)."""

    student: str
    teacher: str
    channels: tuple[int, int]
    size: tuple[int, int]


class Tap(nn.Module):
    """Something that a loss reads from a network's outputs: `path` → `modules(read(outputs))`."""

    def __init__(self, path: str, read: Reader, *modules: nn.Module) -> None:
        super().__init__()
        self.path, self.read = path, read
        self.modules_between = nn.Sequential(*modules)

    def forward(self, outputs: Outputs) -> dict[str, Any]:
        """From a network's outputs to what the loss finds at the path."""
        return {self.path: self.modules_between(self.read(outputs))}


class Paraphrase(nn.Module):
    """The teacher's factor, for FT: an autoencoder, trained by its own term `reconstruction`."""

    def __init__(self, pair: StagePair, rate: float) -> None:
        super().__init__()
        self.read = read_map(pair.teacher, pair.size)
        self.paraphraser = wrapper.Paraphraser4FactorTransfer(rate, pair.channels[1])

    def forward(self, outputs: Outputs) -> dict[str, Any]:
        """Compute the factor, without gradient, and the error of its reconstruction."""
        feature = self.read(outputs)
        factor = self.paraphraser.encoder(feature)
        reconstruction = mse_loss(self.paraphraser.decoder(factor), feature)
        return {"paraphraser": factor.detach(), "reconstruction": reconstruction}


class Review(nn.Module):
    """The student's fused features, for knowledge review: from the deepest stage up, each with what came before."""

    def __init__(self, levels: list[StagePair]) -> None:
        super().__init__()
        self.sizes = [pair.size[0] for pair in levels]
        self.reads = [read_map(pair.student, pair.size) for pair in levels]
        middle = min(512, levels[-1].channels[0])
        self.fusions = nn.ModuleList(
            wrapper.AttentionBasedFusion(pair.channels[0], middle, pair.channels[1], pair is not levels[-1])
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


def read_map(stage: str, size: tuple[int, int]) -> Reader:
    """A reader of a stage's feature map, averaged down to a size."""
    return lambda outputs: adaptive_avg_pool2d(as_map(outputs.features[stage]), size)


def read_whole(stage: str) -> Reader:
    """A reader of a stage's feature map as it is."""
    return lambda outputs: as_map(outputs.features[stage])


def read_embedding(stage: str) -> Reader:
    """A reader of a stage's global average, [B, c]."""
    return lambda outputs: pool(outputs.features[stage])


def tap_logits() -> Tap:
    """The logits."""
    return Tap("logits", lambda outputs: widen(outputs.logits))


def tap_both(
    path: str,
    pair: StagePair,
    read: Callable[[str], Reader],
    adapt: Callable[[int], list[nn.Module]] = lambda channels: [],
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The student's and the teacher's stage, each through an adapter of its channels."""
    ours, theirs = pair.channels
    return [Tap(path, read(pair.student), *adapt(ours))], [Tap(path, read(pair.teacher), *adapt(theirs))]


# ----------------------------------------------------------------------------------------------------------------------
# How each loss is built, and which taps feed it.


class Wiring(NamedTuple):
    """A torchdistill loss and its taps; `terms` are taps of the teacher that are terms of the loss themselves."""

    criteria: list[nn.Module]
    student: list[nn.Module]
    teacher: list[nn.Module]
    terms: tuple[str, ...] = ()


Options = dict[str, Any]
Wire = Callable[[type[nn.Module], list[StagePair], Options], Wiring]


def name_paths(loss: type[nn.Module], path: str) -> dict[str, str]:
    """The arguments by which a torchdistill loss is told where to read, all of them the same path's output."""
    names = [name for name in inspect.signature(loss).parameters if name.startswith(("student_", "teacher_"))]
    return {name: path if name.endswith("_path") else "output" for name in names if name.endswith(("_path", "_io"))}


def wire_logits(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """KD, logit standardisation, DIST, SKD."""
    return Wiring([loss(**name_paths(loss, "logits"), **options)], [tap_logits()], [tap_logits()])


def wire_as_is(read: Callable[[str], Reader]) -> Wire:
    """RKD, PKT: averaged features; SP: whole maps, of whatever shapes."""

    def wire(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
        criterion = loss(**name_paths(loss, "feature"), **options)
        return Wiring([criterion], *tap_both("feature", pairs[0], read))

    return wire


def wire_correlations(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """CC: a trained linear embedding of each network's averaged features."""
    gaussian = {"type": "gaussian", "gamma": options["gamma"], "max_p": options["max_p"]}
    criterion = loss(**name_paths(loss, "embedding"), kernel_config=gaussian, reduction="batchmean")
    size = options["feature_dimension"]
    return Wiring([criterion], *tap_both("embedding", pairs[0], read_embedding, lambda c: [nn.Linear(c, size)]))


def wire_contrast(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """CRD: a trained embedding of unit length of each network's averaged features; the memory comes with the images."""
    size = options["feature_dimension"]
    return Wiring(
        [], *tap_both("embedding", pairs[0], read_embedding, lambda c: [wrapper.Normalizer4CRD(nn.Linear(c, size))])
    )


def wire_variances(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """PAD: averaged features, the student's through a linear layer, and a branch for their log-variances."""
    criterion = loss(**name_paths(loss, "embedding"), **options)
    pair, channels = pairs[0], pairs[0].channels[1]
    embed = nn.Linear(*pair.channels)
    branch = [embed, nn.Linear(channels, channels), nn.BatchNorm1d(channels)]
    read = read_embedding(pair.student)
    student: list[nn.Module] = [Tap("embedding", read, embed), Tap("var_estimator", read, *branch)]
    return Wiring([criterion], student, [Tap("embedding", read_embedding(pair.teacher))])


def wire_projector(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """SRD: a linear projector and BatchNorm without weights on averaged features, and the logits."""
    linear = {f"{side}_linear_module_path": "logits" for side in ("student", "teacher")}
    criterion = loss(**name_paths(loss, "embedding") | linear, **options)
    pair = pairs[0]
    student, teacher = (nn.BatchNorm1d(pair.channels[1], eps=1e-4, affine=False) for _ in range(2))
    project = nn.Linear(*pair.channels)
    return Wiring(
        [criterion],
        [Tap("embedding", read_embedding(pair.student), project, student), tap_logits()],
        [Tap("embedding", read_embedding(pair.teacher), teacher), tap_logits()],
    )


def wire_factors(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """FT: the teacher's factor and the student's translation of its feature."""
    pair, rate = pairs[0], options["rate"]
    translator = wrapper.Translator4FactorTransfer(pair.channels[0], int(pair.channels[1] * rate))
    student = Tap("translator", read_map(pair.student, pair.size), translator)
    return Wiring([loss(p=options["p"])], [student], [Paraphrase(pair, rate)], ("reconstruction",))


def wire_review(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """Knowledge review: every paired stage and, as in the paper, the global average of the last."""
    for pair in pairs:
        if pair.size[0] != pair.size[1]:
            raise ValueError(f"stages: torchdistill's fusion takes square maps, not {list(pair.size)} ({pair.student})")
    levels = [*pairs, pairs[-1]._replace(size=(1, 1))] if pairs[-1].size != (1, 1) else pairs
    named = {f"feature{number}": pair for number, pair in enumerate(levels)}
    teacher: list[nn.Module] = [Tap(path, read_map(pair.teacher, pair.size)) for path, pair in named.items()]
    return Wiring([loss(**name_paths(loss, path), **options) for path in named], [Review(levels)], teacher)


def wire_maps(adapt: Callable[[StagePair], list[nn.Module]], argument: str) -> Wire:
    """AT, VID, AB, ICKD: pairs of maps of one size, the student's through an adapter of its own."""

    def wire(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
        named = {f"feature{number}": pair for number, pair in enumerate(pairs)}
        at = {path: {side: {"path": path, "io": "output"} for side in ("student", "teacher")} for path in named}
        student: list[nn.Module] = []
        teacher: list[nn.Module] = []
        for path, pair in named.items():
            student.append(Tap(path, read_map(pair.student, pair.size), *adapt(pair)))
            teacher.append(Tap(path, read_map(pair.teacher, pair.size)))
        return Wiring([loss(**{argument: at}, **options)], student, teacher)

    return wire


def wire_flow(loss: type[nn.Module], pairs: list[StagePair], options: Options) -> Wiring:
    """FSP: each pair of stages with the next, the student's channels brought to the teacher's."""
    if len(pairs) < 2:
        raise ValueError(f"stages: FSP is about the flow between stages and needs two pairs, not {len(pairs)}")
    flow = {
        f"flow{number}": {
            f"{side}_{place}": {"path": f"feature{number + step}", "io": "output"}
            for side in ("student", "teacher")
            for step, place in enumerate(("first", "second"))
        }
        for number in range(len(pairs) - 1)
    }
    return wire_maps(equal_channels, "fsp_pairs")(loss, pairs, options)._replace(criteria=[loss(fsp_pairs=flow)])


def equal_channels(pair: StagePair) -> list[nn.Module]:
    """A 1×1 convolution of the student's feature where channels differ."""
    ours, theirs = pair.channels
    return [] if ours == theirs else [nn.Conv2d(ours, theirs, 1)]


def connect(pair: StagePair) -> list[nn.Module]:
    """AB's connector: a 1×1 convolution and BatchNorm."""
    ours, theirs = pair.channels
    return [nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs)]


# ----------------------------------------------------------------------------------------------------------------------
# Which losses are run, with which defaults, and which are refused, and why.


@dataclass(frozen=True)
class Recipe:
    """How a torchdistill loss is used.

    Weights and options are those of RepDistiller's scripts or of torchdistill's sample recipes; AB's and FSP's weights
    are ours.
    """

    wire: Wire  # builds it and its taps
    distillation: float = 1.0  # its default weight
    options: Options = field(default_factory=dict)  # that a user may set, with defaults
    pairing: Callable[[Stages, Stages], Pairs] | None = None  # default pairs of stages; None for a loss over logits
    task: float = 1.0  # default weight of cross-entropy; 0 where the loss has its own
    several_images: bool = True  # whether it compares images, or normalises over them, and so needs two
    several_pairs: bool = False  # whether it takes more than one pair of stages


SINGLE: dict[str, Any] = {"several_images": False}
PAIRED: dict[str, Any] = {"several_pairs": True}
CRD_OPTIONS = {
    "feature_dimension": 128, "num_negative_samples": 16384, "temperature": 0.07, "momentum": 0.5, "eps": 1e-7
}  # fmt: skip
WIRE_AT = wire_maps(lambda pair: [], "at_pairs")
WIRE_VID = wire_maps(lambda pair: [wrapper.Regressor4VID(*pair.channels, pair.channels[1], 1e-5, 5.0)], "feature_pairs")
WIRE_AB = wire_maps(connect, "feature_pairs")
WIRE_ICKD = wire_maps(lambda pair: [wrapper.ChannelSimilarityEmbed(*pair.channels)], "feature_pairs")
RECIPES = {
    "KDLoss": Recipe(wire_logits, 1.0, {"temperature": 4.0, "alpha": 0.5, "beta": None}, task=0, **SINGLE),
    "LogitStdKDLoss": Recipe(wire_logits, 1.0, {"temperature": 2.0, "alpha": 0.1, "beta": 9.0}, task=0, **SINGLE),
    "DISTLoss": Recipe(wire_logits, 1.0, {"beta": 2.0, "gamma": 2.0, "tau": 1.0}),
    "SKDInstanceLoss": Recipe(wire_logits, 1.0, {"temperature": 4.0, "mode": "paper"}, **SINGLE),
    "SKDDirectionLoss": Recipe(wire_logits, 1.0, {"tikhonov": 0.1, "mode": "paper"}),
    "ATLoss": Recipe(WIRE_AT, 1000.0, {"mode": "code"}, pair_equal_sizes, **SINGLE, **PAIRED),
    "SPKDLoss": Recipe(wire_as_is(read_whole), 3000.0, {"reduction": "batchmean"}, pair_last),
    "RKDLoss": Recipe(
        wire_as_is(read_embedding), 1.0, {"dist_factor": 25.0, "angle_factor": 50.0, "reduction": "mean"}, pair_last
    ),
    "PKTLoss": Recipe(wire_as_is(read_embedding), 30000.0, {"eps": 1e-7}, pair_last),
    "CCKDLoss": Recipe(wire_correlations, 0.003, {"gamma": 0.4, "max_p": 2, "feature_dimension": 128}, pair_last),
    "CRDLoss": Recipe(wire_contrast, 0.8, CRD_OPTIONS, pair_last),
    "VIDLoss": Recipe(WIRE_VID, 1.0, {}, pair_equal_sizes, **SINGLE, **PAIRED),
    "AltActTransferLoss": Recipe(WIRE_AB, 0.001, {"margin": 1.0, "reduction": "mean"}, pair_equal_sizes, **PAIRED),
    "ChSimLoss": Recipe(WIRE_ICKD, 500.0, {}, pair_last, **PAIRED),
    "FSPLoss": Recipe(wire_flow, 0.01, {}, pair_equal_sizes, **SINGLE, **PAIRED),
    "FTLoss": Recipe(wire_factors, 1000.0, {"p": 1, "rate": 0.5}, pair_last),
    "HierarchicalContextLoss": Recipe(wire_review, 1.0, {"output_sizes": [4, 2, 1]}, pair_equal_sizes, **PAIRED),
    "PADL2Loss": Recipe(wire_variances, 1.0, {"eps": 1e-6}, pair_last),
    "SRDLoss": Recipe(wire_projector, 1.0, {"exponent": 4.0, "temperature": 1.0}, pair_last),
}
REFUSED = {
    "DISTPlusLoss": "its channel term is a correlation that training would minimise, which drives features apart",
    "AuxSSKDLoss": "it trains a teacher's head on four rotations of every image",
    "SSKDLoss": "it needs four rotations of every image and a head trained on them",
    "KTALoss": "it needs a translator trained in an earlier stage, for dense prediction",
    "AffinityLoss": "it is one half of KTA, for dense prediction",
    "RegularizationLoss": "it compares nothing with a teacher",
    "SimpleLossWrapper": "it wraps any loss of torch and defines none",
    "DictLossWrapper": "it wraps any loss of torch and defines none",
}


class TorchdistillLoss(DistillationLoss):
    """task · CE(student, target) + distillation · one of torchdistill's losses.

    What the loss reads is computed from `Outputs`; adapters, embeddings and memory banks are parameters and buffers of
    this module, so that they are trained along with the student and lie in its checkpoints. Methods of two stages (AB,
    FT, PAD) run as one training. FT's autoencoder of the teacher's features is trained along, by a term of its own.

    CRD must know which image is which: `enroll` tells it the training images, and `forward` takes their `index`. Its
    negatives are drawn uniformly from the training images with another label.

    Args:
        name: The class's name in `torchdistill.losses.mid_level`.
        student_stages: The student's stages.
        teacher_stages: The teacher's stages.
        task: Weight of cross-entropy.
        distillation: Weight of the loss.
        stages: Pairs [student stage, teacher stage].
        options: The loss's own options.

    Raises:
        UserError: If there is no such loss or it cannot be run here.
        ValueError: If a stage does not exist, or an option is unknown.
    """

    row: Tensor
    by_class: Tensor
    class_start: Tensor
    class_size: Tensor

    def __init__(
        self,
        name: str,
        student_stages: Stages,
        teacher_stages: Stages,
        task: float | None = None,
        distillation: float | None = None,
        stages: Chosen = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if name in REFUSED:
            known = ", ".join(sorted(RECIPES))
            raise UserError(f"loss: torchdistill/{name} cannot be run here: {REFUSED[name]}; take one of {known}")
        check_choice("loss", f"torchdistill/{name}", [f"torchdistill/{known}" for known in RECIPES])
        self.name, self.recipe = name, RECIPES[name]
        unknown = set(options) - set(self.recipe.options)
        if unknown:
            accepted = ["task", "distillation", *(["stages"] if self.recipe.pairing else []), *self.recipe.options]
            raise ValueError(f"unknown option {', '.join(sorted(unknown))}; it takes {', '.join(accepted)}")
        self.task = self.recipe.task if task is None else task
        self.distillation = self.recipe.distillation if distillation is None else distillation
        check_options(task=self.task, distillation=self.distillation)
        self.options = self.recipe.options | options
        pairs = choose_pairs(stages, student_stages, teacher_stages, self.recipe.pairing) if self.recipe.pairing else []
        if len(pairs) > 1 and not self.recipe.several_pairs:
            raise ValueError(f"stages: it takes one pair [student stage, teacher stage], not {len(pairs)}")
        self.teacher_stages = tuple(dict.fromkeys(teacher for _, teacher in pairs))
        shaped = []
        for s, t in pairs:
            ours, theirs = map_shape(student_stages[s]), map_shape(teacher_stages[t])
            size = (min(ours[1], theirs[1]), min(ours[2], theirs[2]))
            shaped.append(StagePair(s, t, (ours[0], theirs[0]), size))
        self.criterion_class: Any = getattr(mid_level, name)
        wiring = self.recipe.wire(self.criterion_class, shaped, self.options)
        self.criteria, self.student_taps, self.teacher_taps = (nn.ModuleList(part) for part in wiring[:3])
        self.term_names = wiring.terms
        self.needs_index = name == "CRDLoss"

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        """Learn which images there are, and lay out CRD's memory.

        Raises:
            UserError: If all are of one class.
        """
        if len(labels.unique()) < 2:
            raise UserError("loss 'torchdistill/CRDLoss': all training images are of one class: there are no negatives")
        self.register_buffer("row", torch.zeros(int(index.max()) + 1, dtype=torch.int64))
        self.row[index] = torch.arange(len(index))
        self.register_buffer("by_class", labels.argsort())
        self.register_buffer("class_size", labels.bincount())
        self.register_buffer("class_start", self.class_size.cumsum(0) - self.class_size)
        options = dict(self.options)
        dimension = options.pop("feature_dimension")
        options["num_negative_samples"] = min(options["num_negative_samples"], len(index) - 1)
        paths = ("student_norm_module_path", "teacher_norm_module_path", "student_empty_module_path")
        named = dict(zip(paths, ("embedding", "embedding", "identity"), strict=True))
        sizes = {"input_size": dimension, "output_size": len(index), "num_samples": len(index)}
        self.criteria = nn.ModuleList([self.criterion_class(**named, **sizes, **options)])

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        target: Tensor,
        progress: Progress = None,
        index: Tensor | None = None,
    ) -> Terms:
        """Compute the terms `task`, if its weight is not 0, `distillation`, and for FT `reconstruction`.

        Raises:
            UserError: If the batch is too small for the loss.
            ValueError: If `enroll` was not called, or `index` (identity of each image, [B]) not given, where
                `needs_index`.
        """
        if self.recipe.several_images and len(student.logits) < 2:
            raise UserError(f"loss 'torchdistill/{self.name}' needs at least 2 images a batch; raise train.batch_size")
        with full_precision(student.logits):
            read: list[dict[str, dict[str, Any]]] = [
                {path: {"output": value} for tap in taps for path, value in tap(outputs).items()}
                for taps, outputs in ((self.student_taps, student), (self.teacher_taps, teacher))
            ]
            if self.needs_index:
                read[0]["identity"] = {"input": self.draw_negatives(index, label_of(target))}
            losses = [criterion(read[0], read[1], target) for criterion in self.criteria]
        terms = {"task": self.task * cross_entropies(student.logits, target).mean()} if self.task else {}
        terms["distillation"] = self.distillation * torch.stack(losses).sum()
        return terms | {name: read[1][name]["output"] for name in self.term_names}

    def draw_negatives(self, index: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
        """The rows of a batch's images in CRD's memory, [B], and of those each is contrasted with, [B, 1 + K]."""
        if index is None or not self.criteria:
            raise ValueError(
                "CRDLoss: call enroll(index, labels) with the training images, and give forward an `index`"
            )
        memory: Any = self.criteria[0]
        rows, size, start = (
            x.unsqueeze(1) for x in (self.row[index], self.class_size[labels], self.class_start[labels])
        )
        draws = torch.rand(len(rows), memory.num_negative_samples, device=rows.device, dtype=torch.float64)
        place = (draws * (len(self.by_class) - size)).long()
        negatives = self.by_class[place + size * (place >= start)]  # sorted by class, the image's own class skipped
        return {"pos_idx": rows.squeeze(1), "contrast_idx": torch.cat([rows, negatives], 1)}
