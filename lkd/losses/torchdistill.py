"""torchdistill's losses (Matsubara, 2021, arXiv 2011.12913) under this project's contract, without its hooks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchdistill.losses.mid_level as mid_level
from torch import Tensor, nn

from lkd.core.errors import UserError, check_choice
from lkd.core.outputs import Outputs
from lkd.losses.functions import check_options, cross_entropies, label_of
from lkd.losses.loss import DistillationLoss, Progress
from lkd.losses.stages import Pairs, Stages, choose_pairs, pair_equal_sizes, pair_last
from lkd.losses.torchdistill_wiring import (
    StagePair,
    Wiring,
    connect,
    embed_channels,
    regress,
    shape_pairs,
    wire_contrast,
    wire_correlations,
    wire_embeddings,
    wire_factors,
    wire_flow,
    wire_logits,
    wire_maps,
    wire_projector,
    wire_review,
    wire_similarities,
    wire_variances,
)

# ----------------------------------------------------------------------------------------------------------------------
# Which of torchdistill's losses are run, with which defaults, and which are refused, and why.


@dataclass(frozen=True)
class Recipe:
    """How a torchdistill loss is used.

    Attributes:
        wire: Builds it and its taps.
        distillation: Default weight.
        options: The options that a user may set, with defaults; weights and options are those of RepDistiller's scripts
            or of torchdistill's sample recipes, but for AB's and FSP's weights, which are ours.
        pairing: Default pairs of stages; None for a loss over logits.
        task: Default weight of cross-entropy; 0 where the loss has its own.
        several_images: Whether it compares images, or normalises over them, and so needs two.
        several_pairs: Whether it takes more than one pair of stages.
    """

    wire: Callable[[type[nn.Module], list[StagePair], dict[str, Any]], Wiring]
    distillation: float = 1.0
    options: dict[str, Any] = field(default_factory=dict)
    pairing: Callable[[Stages, Stages], Pairs] | None = None
    task: float = 1.0
    several_images: bool = True
    several_pairs: bool = False


RECIPES: dict[str, Recipe] = {
    "KDLoss": Recipe(wire_logits, 1.0, {"temperature": 4.0, "alpha": 0.5, "beta": None}, task=0, several_images=False),
    "LogitStdKDLoss": Recipe(
        wire_logits, 1.0, {"temperature": 2.0, "alpha": 0.1, "beta": 9.0}, task=0, several_images=False
    ),
    "DISTLoss": Recipe(wire_logits, 1.0, {"beta": 2.0, "gamma": 2.0, "tau": 1.0}),
    "SKDInstanceLoss": Recipe(wire_logits, 1.0, {"temperature": 4.0, "mode": "paper"}, several_images=False),
    "SKDDirectionLoss": Recipe(wire_logits, 1.0, {"tikhonov": 0.1, "mode": "paper"}),
    "ATLoss": Recipe(
        wire_maps(lambda pair: [], "at_pairs"),
        1000.0,
        {"mode": "code"},
        pair_equal_sizes,
        several_images=False,
        several_pairs=True,
    ),
    "SPKDLoss": Recipe(wire_similarities, 3000.0, {"reduction": "batchmean"}, pair_last),
    "RKDLoss": Recipe(
        wire_embeddings, 1.0, {"dist_factor": 25.0, "angle_factor": 50.0, "reduction": "mean"}, pair_last
    ),
    "PKTLoss": Recipe(wire_embeddings, 30000.0, {"eps": 1e-7}, pair_last),
    "CCKDLoss": Recipe(wire_correlations, 0.003, {"gamma": 0.4, "max_p": 2, "feature_dimension": 128}, pair_last),
    "CRDLoss": Recipe(
        wire_contrast,
        0.8,
        {"feature_dimension": 128, "num_negative_samples": 16384, "temperature": 0.07, "momentum": 0.5, "eps": 1e-7},
        pair_last,
    ),
    "VIDLoss": Recipe(
        wire_maps(regress, "feature_pairs"), 1.0, {}, pair_equal_sizes, several_images=False, several_pairs=True
    ),
    "AltActTransferLoss": Recipe(
        wire_maps(connect, "feature_pairs"),
        0.001,
        {"margin": 1.0, "reduction": "mean"},
        pair_equal_sizes,
        several_pairs=True,
    ),
    "ChSimLoss": Recipe(wire_maps(embed_channels, "feature_pairs"), 500.0, {}, pair_last, several_pairs=True),
    "FSPLoss": Recipe(wire_flow, 0.01, {}, pair_equal_sizes, several_images=False, several_pairs=True),
    "FTLoss": Recipe(wire_factors, 1000.0, {"p": 1, "rate": 0.5}, pair_last),
    "HierarchicalContextLoss": Recipe(
        wire_review, 1.0, {"output_sizes": [4, 2, 1]}, pair_equal_sizes, several_pairs=True
    ),
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


# ----------------------------------------------------------------------------------------------------------------------
# torchdistill's losses (Matsubara, 2021, arXiv 2011.12913) under this project's contract, without its hooks.


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
        stages: list[list[str]] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        if name in REFUSED:
            raise UserError(f"loss: torchdistill/{name} cannot be run here: {REFUSED[name]}; take one of {known()}")
        check_choice("loss", f"torchdistill/{name}", [f"torchdistill/{known}" for known in RECIPES])
        self.name = name
        self.recipe = RECIPES[name]
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
        self.criterion_class: Any = getattr(mid_level, name)
        shaped = shape_pairs(pairs, student_stages, teacher_stages)
        wiring = self.recipe.wire(self.criterion_class, shaped, self.options)
        self.criteria, self.student_taps, self.teacher_taps = (nn.ModuleList(part) for part in wiring[:3])
        self.term_names = wiring.terms
        self.needs_index = name == "CRDLoss"

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        """Learn which images there are, and lay out the memory; only where `needs_index`.

        Args:
            index: Identity of each training image, [N].
            labels: Class of each, [N].

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
        options = {name: value for name, value in self.options.items() if name != "feature_dimension"}
        options["num_negative_samples"] = min(options["num_negative_samples"], len(index) - 1)
        sizes = {
            "input_size": self.options["feature_dimension"],
            "output_size": len(index),
            "num_samples": len(index),
        }
        paths = ("student_norm_module_path", "teacher_norm_module_path", "student_empty_module_path")
        named = dict(zip(paths, ("embedding", "embedding", "identity"), strict=True))
        self.criteria = nn.ModuleList([self.criterion_class(**named, **sizes, **options)])

    def forward(
        self,
        student: Outputs,
        teacher: Outputs,
        target: Tensor,
        progress: Progress = None,
        index: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Compute the terms `task`, if its weight is not 0, `distillation`, and for FT `reconstruction`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C], of which CRD takes the most probable class.
            progress: Ignored.
            index: Identity of each image, [B]; only where `needs_index`.

        Raises:
            UserError: If the batch is too small for the loss.
            ValueError: If `enroll` was not called, or `index` not given, where the loss needs it.
        """
        if self.recipe.several_images and len(student.logits) < 2:
            raise UserError(f"loss 'torchdistill/{self.name}' needs at least 2 images a batch; raise train.batch_size")
        with torch.autocast(student.logits.device.type, enabled=False):
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
        rows, size, start = (column.unsqueeze(1) for column in (self.row[index], *self.class_range(labels)))
        draws = torch.rand(len(rows), memory.num_negative_samples, device=rows.device, dtype=torch.float64)
        place = (draws * (len(self.by_class) - size)).long()
        negatives = self.by_class[place + size * (place >= start)]  # sorted by class, the image's own class skipped
        return {"pos_idx": rows.squeeze(1), "contrast_idx": torch.cat([rows, negatives], 1)}

    def class_range(self, labels: Tensor) -> tuple[Tensor, Tensor]:
        """How many images there are of each label, and where they start in `by_class`, [B] and [B]."""
        return self.class_size[labels], self.class_start[labels]


def known() -> str:
    """The losses that can be run."""
    return ", ".join(sorted(RECIPES))
