"""torchdistill's losses (Matsubara, 2021, arXiv 2011.12913) under this project's contract, without its hooks.

torchdistill names what a loss reads by module path and fills it by forward hooks; here a *tap* computes it from
`Outputs`, through the small modules that the literature trains. Importing this module needs torchdistill.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
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
    Pairing,
    Stages,
    as_map,
    check_batch,
    check_options,
    check_target,
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
Modules = Sequence[nn.Module]


class StagePair(NamedTuple):
    """A student's and a teacher's stage, their channels, and the smaller of their sizes (height, width)."""

    student: str
    teacher: str
    channels: tuple[int, int]
    size: tuple[int, int]

    @classmethod
    def between(cls, student: str, teacher: str, ours: Sequence[int], theirs: Sequence[int]) -> "StagePair":
        """Of stages with these shapes, (c, h, w)."""
        height, width = (min(pair) for pair in zip(ours[1:], theirs[1:], strict=True))
        return cls(student, teacher, (ours[0], theirs[0]), (height, width))


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


def read_map(stage: str, size: tuple[int, int] | None = None) -> Reader:
    """A reader of a stage's feature map, averaged down to a size if one is given."""

    def read(outputs: Outputs) -> Tensor:
        feature = as_map(outputs.features[stage])
        return adaptive_avg_pool2d(feature, size) if size else feature

    return read


def read_embedding(stage: str) -> Reader:
    """A reader of a stage's global average, [B, c]."""
    return lambda outputs: pool(outputs.features[stage])


def tap_logits() -> Tap:
    """The logits."""
    return Tap("logits", lambda outputs: widen(outputs.logits))


def tap_both(
    path: str, pair: StagePair, read: Callable[[str], Reader], ours: Modules = (), theirs: Modules = ()
) -> tuple[list[nn.Module], list[nn.Module]]:
    """The student's and the teacher's stage, each through modules of its own."""
    return [Tap(path, read(pair.student), *ours)], [Tap(path, read(pair.teacher), *theirs)]


# ----------------------------------------------------------------------------------------------------------------------
# How each loss is built, and which taps feed it.


class Wiring(NamedTuple):
    """A torchdistill loss and its taps; `terms` are taps of the teacher that are terms of the loss themselves."""

    criteria: list[nn.Module]
    student: list[nn.Module]
    teacher: list[nn.Module]
    terms: tuple[str, ...] = ()


def name_paths(loss: Any, path: str) -> dict[str, str]:
    """The arguments by which a torchdistill loss is told where to read, all of them the same path's output."""
    names = [name for name in inspect.signature(loss).parameters if name.startswith(("student_", "teacher_"))]
    return {name: path if name.endswith("_path") else "output" for name in names if name.endswith(("_path", "_io"))}


def wire(name: str, loss: Any, pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """Build one of torchdistill's losses, a class, and what it reads."""
    if not pairs:  # KD, logit standardisation, DIST, SKD
        return Wiring([loss(**name_paths(loss, "logits"), **options)], [tap_logits()], [tap_logits()])
    pair = pairs[0]
    ours, theirs = pair.channels
    if name in ADAPTERS:  # every pair of maps, the student's through an adapter
        return wire_maps(name, loss, pairs, options)
    if name == "SPKDLoss":  # whole feature maps, of whatever shapes
        return Wiring([loss(**name_paths(loss, "feature"), **options)], *tap_both("feature", pair, read_map))
    if name == "FTLoss":  # the teacher's factor and the student's translation of its feature
        translator = wrapper.Translator4FactorTransfer(ours, int(theirs * options["rate"]))
        translated = Tap("translator", read_map(pair.student, pair.size), translator)
        return Wiring([loss(p=options["p"])], [translated], [Paraphrase(pair, options["rate"])], ("reconstruction",))
    if name == "HierarchicalContextLoss":
        return wire_review(loss, pairs, options)
    tap = partial(tap_both, "embedding", pair, read_embedding)  # the others read averaged features
    size = options.get("feature_dimension", 0)
    if name == "CRDLoss":  # through a trained embedding of unit length; the memory comes with the images
        return Wiring([], *tap(*([wrapper.Normalizer4CRD(nn.Linear(width, size))] for width in pair.channels)))
    paths = name_paths(loss, "embedding")
    if name == "CCKDLoss":  # through a trained linear embedding
        kernel = {"type": "gaussian", "gamma": options["gamma"], "max_p": options["max_p"]}
        criterion = loss(**paths, kernel_config=kernel, reduction="batchmean")
        return Wiring([criterion], *tap(*([nn.Linear(width, size)] for width in pair.channels)))
    if name == "SRDLoss":  # the student's through a projector, both through BatchNorm without weights; and logits
        paths |= {f"{side}_linear_module_path": "logits" for side in ("student", "teacher")}
        normalize = [nn.BatchNorm1d(theirs, eps=1e-4, affine=False) for _ in range(2)]
        student, teacher = tap([nn.Linear(ours, theirs), normalize[0]], [normalize[1]])
        return Wiring([loss(**paths, **options)], [*student, tap_logits()], [*teacher, tap_logits()])
    if name == "PADL2Loss":  # the student's through a linear layer, and a branch for their log-variances
        embed = nn.Linear(ours, theirs)
        branch = [embed, nn.Linear(theirs, theirs), nn.BatchNorm1d(theirs)]
        student, teacher = tap([embed])
        variances = Tap("var_estimator", read_embedding(pair.student), *branch)
        return Wiring([loss(**paths, **options)], [*student, variances], teacher)
    return Wiring([loss(**paths, **options)], *tap())  # RKD, PKT: as they are


def wire_review(loss: Any, pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """Knowledge review: every paired stage and, as in the paper, the global average of the last."""
    for pair in pairs:
        if pair.size[0] != pair.size[1]:
            raise ValueError(f"stages: torchdistill's fusion takes square maps, not {list(pair.size)} ({pair.student})")
    levels = [*pairs, pairs[-1]._replace(size=(1, 1))] if pairs[-1].size != (1, 1) else pairs
    named = {f"feature{number}": pair for number, pair in enumerate(levels)}
    teacher: list[nn.Module] = [Tap(path, read_map(pair.teacher, pair.size)) for path, pair in named.items()]
    return Wiring([loss(**name_paths(loss, path), **options) for path in named], [Review(levels)], teacher)


ADAPTERS: dict[str, Callable[[int, int], list[nn.Module]]] = {  # from the student's channels to the teacher's
    "ATLoss": lambda ours, theirs: [],
    "VIDLoss": lambda ours, theirs: [wrapper.Regressor4VID(ours, theirs, theirs, 1e-5, 5.0)],
    "AltActTransferLoss": lambda ours, theirs: [nn.Conv2d(ours, theirs, 1, bias=False), nn.BatchNorm2d(theirs)],
    "ChSimLoss": lambda ours, theirs: [wrapper.ChannelSimilarityEmbed(ours, theirs)],
    "FSPLoss": lambda ours, theirs: [] if ours == theirs else [nn.Conv2d(ours, theirs, 1)],
}


def wire_maps(name: str, loss: Any, pairs: list[StagePair], options: dict[str, Any]) -> Wiring:
    """AT, VID, AB, ICKD: pairs of maps of one size; FSP: each pair with the next."""
    student: list[nn.Module] = []
    teacher: list[nn.Module] = []
    for number, pair in enumerate(pairs):
        adapter = ADAPTERS[name](*pair.channels)
        student.append(Tap(f"feature{number}", read_map(pair.student, pair.size), *adapter))
        teacher.append(Tap(f"feature{number}", read_map(pair.teacher, pair.size)))
    if name != "FSPLoss":
        at = {f"feature{n}": {who: at_output(n) for who in ("student", "teacher")} for n in range(len(pairs))}
        return Wiring([loss(**{"at_pairs" if name == "ATLoss" else "feature_pairs": at}, **options)], student, teacher)
    if len(pairs) < 2:
        raise ValueError(f"stages: FSP is about the flow between stages and needs two pairs, not {len(pairs)}")
    flow = {
        f"flow{n}": {
            f"{who}_{place}": at_output(n + step)
            for who in ("student", "teacher")
            for step, place in enumerate(("first", "second"))
        }
        for n in range(len(pairs) - 1)
    }
    return Wiring([loss(fsp_pairs=flow)], student, teacher)


def at_output(number: int) -> dict[str, str]:
    """How torchdistill is told to read a pair's feature."""
    return {"path": f"feature{number}", "io": "output"}


# ----------------------------------------------------------------------------------------------------------------------
# Which losses are run, with which defaults, and which are refused, and why.


@dataclass(frozen=True)
class Recipe:
    """How a torchdistill loss is used.

    Weights and options are those of RepDistiller's scripts or of torchdistill's sample recipes; AB's and FSP's weights
    are ours.
    """

    distillation: float = 1.0  # its default weight
    options: dict[str, Any] = field(default_factory=dict)  # that a user may set, with defaults
    pairing: Pairing | None = None  # default pairs of stages; None for a loss over logits
    task: float = 1.0  # default weight of cross-entropy; 0 where the loss has its own
    several_images: bool = True  # whether it compares images, or normalises over them, and so needs two


SINGLE: dict[str, Any] = {"several_images": False}
CRD_OPTIONS = {
    "feature_dimension": 128, "num_negative_samples": 16384, "temperature": 0.07, "momentum": 0.5, "eps": 1e-7
}  # fmt: skip
RECIPES = {
    "KDLoss": Recipe(1.0, {"temperature": 4.0, "alpha": 0.5, "beta": None}, task=0, **SINGLE),
    "LogitStdKDLoss": Recipe(1.0, {"temperature": 2.0, "alpha": 0.1, "beta": 9.0}, task=0, **SINGLE),
    "DISTLoss": Recipe(1.0, {"beta": 2.0, "gamma": 2.0, "tau": 1.0}),
    "SKDInstanceLoss": Recipe(1.0, {"temperature": 4.0, "mode": "paper"}, **SINGLE),
    "SKDDirectionLoss": Recipe(1.0, {"tikhonov": 0.1, "mode": "paper"}),
    "ATLoss": Recipe(1000.0, {"mode": "code"}, pair_equal_sizes, **SINGLE),
    "SPKDLoss": Recipe(3000.0, {"reduction": "batchmean"}, pair_last),
    "RKDLoss": Recipe(1.0, {"dist_factor": 25.0, "angle_factor": 50.0, "reduction": "mean"}, pair_last),
    "PKTLoss": Recipe(30000.0, {"eps": 1e-7}, pair_last),
    "CCKDLoss": Recipe(0.003, {"gamma": 0.4, "max_p": 2, "feature_dimension": 128}, pair_last),
    "CRDLoss": Recipe(0.8, CRD_OPTIONS, pair_last),
    "VIDLoss": Recipe(1.0, {}, pair_equal_sizes, **SINGLE),
    "AltActTransferLoss": Recipe(0.001, {"margin": 1.0, "reduction": "mean"}, pair_equal_sizes),
    "ChSimLoss": Recipe(500.0, {}, pair_last),
    "FSPLoss": Recipe(0.01, {}, pair_equal_sizes, **SINGLE),
    "FTLoss": Recipe(1000.0, {"p": 1, "rate": 0.5}, pair_last),
    "HierarchicalContextLoss": Recipe(1.0, {"output_sizes": [4, 2, 1]}, pair_equal_sizes),
    "PADL2Loss": Recipe(1.0, {"eps": 1e-6}, pair_last),
    "SRDLoss": Recipe(1.0, {"exponent": 4.0, "temperature": 1.0}, pair_last),
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
        if not self.options.get("alpha", 1):
            raise ValueError(
                f"alpha: at {self.options['alpha']} torchdistill leaves out beta and temperature²; take more"
            )
        pairs = choose_pairs(stages, student_stages, teacher_stages, self.recipe.pairing) if self.recipe.pairing else []
        if len(pairs) > 1 and name not in (*ADAPTERS, "HierarchicalContextLoss"):
            raise ValueError(f"stages: it takes one pair [student stage, teacher stage], not {len(pairs)}")
        self.teacher_stages = tuple(dict.fromkeys(teacher for _, teacher in pairs))
        shaped = [StagePair.between(s, t, map_shape(student_stages[s]), map_shape(teacher_stages[t])) for s, t in pairs]
        self.criterion_class: Any = getattr(mid_level, name)
        wiring = wire(name, self.criterion_class, shaped, self.options)
        self.criteria, self.student_taps, self.teacher_taps = (nn.ModuleList(part) for part in wiring[:3])
        self.term_names = wiring.terms
        self.needs_index = name == "CRDLoss"
        self.reads_logits = any(isinstance(tap, Tap) and tap.path == "logits" for tap in self.teacher_taps)

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        """Learn which images there are, and lay out CRD's memory."""
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
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None, index: Tensor | None = None
    ) -> Terms:
        """Compute the terms `task`, if its weight is not 0, `distillation`, and for FT `reconstruction`.

        Raises:
            ValueError: If `enroll` was not called, or `index` (identity of each image, [B]) not given, where
                `needs_index`.
        """
        target = check_batch(student, teacher, target) if self.reads_logits else check_target(student.logits, target)
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
