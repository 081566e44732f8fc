"""The recipes: one dataclass a command. A recipe file is YAML with these fields; the command line overrides it.

Nothing here imports torch, so that `lkd --help` answers at once.
"""

from lkd.config.caching import CacheRecipe
from lkd.config.comparison import CompareRecipe, FidelityRecipe
from lkd.config.dashboard import DashboardRecipe
from lkd.config.influence import InfluenceRecipe, InfluenceSettings, InfluenceWeightedLossSettings
from lkd.config.inspection import InspectRecipe
from lkd.config.meta_training import MetaSettings, MetaTrainRecipe
from lkd.config.packing import PackRecipe
from lkd.config.parts import DataRecipe, ModelRecipe, RunRecipe, TeacherRecipe, TrainRecipe, WandbRecipe
from lkd.config.plan import PlanRecipe
from lkd.config.pool import PoolContents, PoolRecipe, PoolSettings
from lkd.config.quickstart import QuickstartRecipe
from lkd.config.report import ReportRecipe
from lkd.config.sharing import PullRecipe, PushRecipe
from lkd.config.trainings import DistillRecipe, EvaluateRecipe, ExportRecipe, TrainTeacherRecipe, VarianceRecipe

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
