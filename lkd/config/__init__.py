"""The recipes: one dataclass a command. A recipe file is YAML with these fields; the command line overrides it.

Nothing here imports torch, so that `lkd --help` answers at once.
"""

from lkd.config.evaluation import (
    CompareRecipe,
    DashboardRecipe,
    FidelityRecipe,
    InspectRecipe,
    PlanRecipe,
    QuickstartRecipe,
    ReportRecipe,
)
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe, PoolContents, PoolRecipe, PoolSettings
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe, WandbRecipe
from lkd.config.training import (
    CacheRecipe,
    DistillRecipe,
    EvaluateRecipe,
    ExportRecipe,
    InfluenceRecipe,
    InfluenceSettings,
    InfluenceWeightedLossSettings,
    PackRecipe,
    PullRecipe,
    PushRecipe,
    TrainTeacherRecipe,
    VarianceRecipe,
)

__all__ = [
    "CacheRecipe",
    "CompareRecipe",
    "DashboardRecipe",
    "DataRecipe",
    "DistillRecipe",
    "EvaluateRecipe",
    "ExportRecipe",
    "FidelityRecipe",
    "InfluenceRecipe",
    "InfluenceSettings",
    "InfluenceWeightedLossSettings",
    "InspectRecipe",
    "MetaSettings",
    "MetaTrainRecipe",
    "ModelRecipe",
    "PackRecipe",
    "PlanRecipe",
    "PoolContents",
    "PoolRecipe",
    "PoolSettings",
    "PullRecipe",
    "PushRecipe",
    "QuickstartRecipe",
    "ReportRecipe",
    "RunRecipe",
    "TeacherRecipe",
    "TrainRecipe",
    "TrainTeacherRecipe",
    "VarianceRecipe",
    "WandbRecipe",
]
