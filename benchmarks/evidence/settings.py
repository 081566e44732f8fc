"""What is measured: the settings, the losses that are learned, and the comparisons."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lkd.config import CompareRecipe, DataRecipe, MetaTrainRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.losses.learned.file import SUFFIX

STUDENT, UNSEEN, TINY = "small_cnn", "small_mobilenet", "tiny_cnn"
RATES = [0.2, 0.1, 0.3]
BUDGET = 20  # trainings that each hand-made loss with options is tuned with
SEEDS, FEWER_SEEDS = 10, 4
META_RATE = 0.2  # learning rate of the students that losses are learned with

CE = {"name": "cross_entropy", "grid": {"train.learning_rate": RATES}}
FIXED_KD = {"name": "kd", "weight": 0.5, "temperature": 4.0, "grid": {"train.learning_rate": RATES}}
KD = {
    "name": "kd",
    "grid": {"weight": [0.9, 0.2, 0.5, 1.0], "temperature": [2.0, 1.0, 4.0], "train.learning_rate": [0.2, 0.1, 0.3]},
}
DKD = {
    "name": "dkd",
    "grid": {"beta": [1.0, 0.5, 2.0, 4.0], "temperature": [2.0, 1.0, 4.0], "train.learning_rate": [0.2, 0.1, 0.3]},
}
DIST = {
    "name": "dist",
    "grid": {"beta": [1.0, 0.5, 2.0, 4.0], "temperature": [1.0, 2.0, 4.0], "train.learning_rate": [0.2, 0.1, 0.3]},
}

INITIAL = {
    "name": "dkd",
    "beta": 1.0,
    "temperature": 2.0,
    "warmup": 0.6,
    "grid": {"train.learning_rate": RATES},
}
"""What the decoupled form is before any meta-training."""


@dataclass(frozen=True)
class Setting:
    """Images, a teacher and a student.

    Attributes:
        title: In words.
        data: What differs from the data recipe.
        teacher: What differs from the embedded teacher.
        train: What differs from the training.
        student: The student.
    """

    title: str
    data: dict[str, Any] = field(default_factory=dict)
    teacher: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    student: str = STUDENT

    def images(self, root: str) -> DataRecipe:
        """The data recipe."""
        default = DataRecipe("fashion_mnist_unseen", root, train_size=4000, meta_validation_size=8000)
        return replace(default, **self.data)

    def training(self, learning_rate: float = META_RATE) -> TrainRecipe:
        """The training."""
        return replace(TrainRecipe(learning_rate=learning_rate), **self.train)


CLEAN = "clean"
SETTINGS = {
    CLEAN: Setting("clean labels"),
    "tiny_student": Setting("clean labels, a tiny student", student=TINY),
    "few_labels": Setting("1,000 clean labels", {"train_size": 1000}, train={"epochs": 26}),
    "noisy_labels": Setting("40 % of the labels flipped", {"label_noise": 0.4}),
    "bad_teacher": Setting("a teacher that answers at random on 60 %", teacher={"random_answers": 0.6}),
    "some_noise": Setting("20 % of the labels flipped", {"label_noise": 0.2}),
    "small_meta_validation": Setting("800 meta-validation images", {"meta_validation_size": 800}),
}
SIGN_CHANGES = ("tiny_student", "few_labels", "noisy_labels", "bad_teacher")
"""The settings in which the best hand-made weight changes sign: the first question."""
ROBUSTNESS = ("some_noise", "small_meta_validation")

# Within the meta-validation images of `clean`, so that no image of its students is seen.
OTHER_HALF = Setting("another data half", {"train_size": 4000, "meta_validation_size": 4000})

BOTH, BOTH_NOT_LEARNED = "learned both", "both, not learned"


def learn_recipe(name: str, setting: Setting, root: str, folder: Path, kind: str = "logits") -> MetaTrainRecipe:
    """The recipe that learns one loss: the default."""
    recipe = MetaTrainRecipe(
        run_dir=str(folder / "learn" / name),
        resume="auto",
        device="cpu",
        data=setting.images(root),
        teacher=replace(TeacherRecipe(), **setting.teacher),
        student=ModelRecipe(setting.student),
        train=setting.training(),
    )
    recipe.meta.kind = kind
    return recipe


def list_learned(root: str, folder: Path) -> dict[str, MetaTrainRecipe]:
    """Every loss that is learned, by name."""
    recipes = {name: learn_recipe(name, setting, root, folder) for name, setting in SETTINGS.items()}
    recipes["other_half"] = learn_recipe("other_half", OTHER_HALF, root, folder)
    return recipes | {"both": learn_recipe("both", SETTINGS[CLEAN], root, folder, "both")}


def locate_loss(name: str, folder: Path) -> Path:
    """Where a learned loss is."""
    return folder / "learn" / name / f"loss{SUFFIX}"


def locate_unlearned(folder: Path) -> Path:
    """Where the loss over both is, as it was before it learned anything."""
    return folder / "learn" / f"both-not-learned{SUFFIX}"


def tune_rate(path: Path) -> dict[str, Any]:
    """A learned loss in a comparison: tuned by its learning rate alone."""
    return {"name": str(path), "grid": {"train.learning_rate": RATES}}


def compare_recipe(name: str, setting: Setting, root: str, folder: Path, methods: dict[str, Any]) -> CompareRecipe:
    """The recipe of one comparison."""
    return CompareRecipe(
        run_dir=str(folder / "compare" / name),
        resume="auto",
        device="cpu",
        data=setting.images(root),
        teacher=replace(TeacherRecipe(), **setting.teacher),
        train=setting.training(),
        methods=methods,
        students=[ModelRecipe(setting.student)],
        seeds=SEEDS,
        baseline="KD",
        tuning_trainings=BUDGET,
        evaluate_every=setting.training().epochs,
    )


def list_comparisons(
    root: str, folder: Path, other_teacher: Path, digits: tuple[Path, Path]
) -> dict[str, CompareRecipe]:
    """Every comparison, by name, in the order in which they are run."""
    hand_made = {"CE": CE, "KD(0.5, 4)": FIXED_KD, "KD": KD, "DKD": DKD, "not learned": INITIAL}
    learned = {"learned": tune_rate(locate_loss(CLEAN, folder))}
    half = {"learned on other data": tune_rate(locate_loss("other_half", folder))}
    clean = SETTINGS[CLEAN]
    comparisons = {CLEAN: compare_recipe(CLEAN, clean, root, folder, hand_made | {"DIST": DIST} | learned | half)}
    comparisons[CLEAN].students = [ModelRecipe(STUDENT), ModelRecipe(UNSEEN)]

    def add_setting(name: str, rivals: dict[str, Any]) -> None:
        methods = rivals | {"learned": tune_rate(locate_loss(name, folder))}
        comparisons[name] = compare_recipe(name, SETTINGS[name], root, folder, methods)

    for name in SIGN_CHANGES:
        add_setting(name, hand_made)
    taught = replace(clean, teacher={"path": str(other_teacher)})
    comparisons["other_teacher"] = compare_recipe("other_teacher", taught, root, folder, hand_made | learned)
    root_of_digits, digits_teacher = digits
    small = {"name": "image_folder", "root": str(root_of_digits), "image_size": 28}
    read = Setting(
        "digits",
        small | {"train_size": 200, "meta_validation_size": 400},
        {"path": str(digits_teacher)},
        {"epochs": 60, "batch_size": 32},
    )
    comparisons["digits"] = compare_recipe("digits", read, root, folder, hand_made | learned)
    both = {
        BOTH: tune_rate(locate_loss("both", folder)),
        BOTH_NOT_LEARNED: tune_rate(locate_unlearned(folder)),
    }
    comparisons["both"] = compare_recipe("both", clean, root, folder, both)
    comparisons["both"].baseline = BOTH_NOT_LEARNED
    for name in ROBUSTNESS:
        add_setting(name, {"CE": CE, "KD": KD})
        comparisons[name].seeds = FEWER_SEEDS
    return comparisons
