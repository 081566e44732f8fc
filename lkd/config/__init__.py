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
    PredictRecipe,
    PullRecipe,
    PushRecipe,
    TrainTeacherRecipe,
    VarianceRecipe,
)

# Command → (recipe, what to do). The work is imported when it starts: `--help` must not wait for torch.
COMMANDS: dict[str, tuple[type, str]] = {
    "quickstart": (QuickstartRecipe, "the universal loss beside CE and tuned KD on embedded images: a page in minutes"),
    "plan": (PlanRecipe, "what a recipe of distill or meta-train will take: hours, memory, data"),
    "teacher": (TrainTeacherRecipe, "train a teacher"),
    "pool": (PoolRecipe, "keep students at many ages, to start rollouts from"),
    "fidelity": (FidelityRecipe, "do short rollouts rank losses as full trainings do? ask before meta-train"),
    "meta-train": (MetaTrainRecipe, "learn a distillation loss and save it as one file"),
    "inspect": (InspectRecipe, "what a learned or a hand-made loss does, without training: report and picture"),
    "distill": (DistillRecipe, "train a student with a learned or a hand-made loss"),
    "influence": (InfluenceRecipe, "which training images help a network, and which harm it"),
    "evaluate": (EvaluateRecipe, "measure a teacher's or a student's file"),
    "predict": (PredictRecipe, "what a trained network sees in pictures: classes and probabilities"),
    "cache": (CacheRecipe, "keep a teacher's answers, for trainings that do not ask it"),
    "pack": (PackRecipe, "decode all images of a data set once, for faster loading"),
    "variance": (VarianceRecipe, "how noisy a student's gradient is for each share of the teacher"),
    "export": (ExportRecipe, "write a student for timm, ONNX, torch.export; each file is read back"),
    "push": (PushRecipe, "put a learned loss on the Hugging Face Hub or into W&B's artifacts"),
    "pull": (PullRecipe, "fetch a learned loss from there"),
    "compare": (CompareRecipe, "losses × students × paired seeds: a table, CSV and a picture"),
    "report": (ReportRecipe, "one HTML page about runs: results, curves, learned losses, settings, lineage"),
    "dashboard": (DashboardRecipe, "a W&B workspace for a project's runs, or a report of a comparison"),
}

# Command → the field whose values are the words before the options: one, or a list. Elsewhere these are recipe files.
# Of two fields the first takes one word.
POSITIONAL = {
    "inspect": "loss",
    "evaluate": "checkpoint",
    "predict": "checkpoint pictures",
    "export": "checkpoint",
    "push": "loss",
    "pull": "loss",
    "report": "runs",
}
