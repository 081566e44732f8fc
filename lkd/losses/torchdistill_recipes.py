"""Which of torchdistill's losses are run, with which defaults, and which are refused, and why."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from lkd.losses.stages import Pairs, Stages, pair_equal_sizes, pair_last
from lkd.losses.torchdistill_taps import StagePair
from lkd.losses.torchdistill_wiring import (
    Wiring,
    connect,
    embed_channels,
    regress,
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
