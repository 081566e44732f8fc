"""Do learned losses pay? Learn them, tune the hand-made ones, train fresh students, and keep all figures.

python benchmarks/evidence/run.py DATA_ROOT [RUN_DIR] [--learned | --check]

--learned learns and trains what is learned only, which is a sixth of the work: hand-made losses keep the rows that are
in docs/evidence. --check trains one cell of a hand-made loss anew; a learned one takes minutes. Goes on with an
interrupted run in RUN_DIR. Options are picked on meta-validation; the test split is read for reported numbers only.
"""

import argparse
import sys
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from checking import check_trial
from digits import write_digits
from figures import HAND_MADE, NOT_LEARNED
from report import EVIDENCE, write_report
from settings import (
    CLEAN,
    META_RATE,
    SETTINGS,
    compare_recipe,
    list_comparisons,
    list_learned,
    locate_loss,
    locate_unlearned,
)

from lkd.config import DataRecipe, ModelRecipe, RunRecipe, TrainRecipe, TrainTeacherRecipe
from lkd.core.errors import UserError
from lkd.core.workers import finish_all, start_workers
from lkd.evaluation.comparison.compare import compare
from lkd.losses.learned.file import LossFile, build_loss_from, save_loss
from lkd.meta_training.meta_train import meta_train
from lkd.tracking.run import Run, open_run
from lkd.training.build import choose_student, prepare_images
from lkd.training.distill import train_teacher


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data_root")
    parser.add_argument("run_dir", type=Path, nargs="?", default=Path("runs/learned-loss-evidence"))
    parser.add_argument("--learned", action="store_true", help="hand-made losses keep their committed rows")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    root, folder = options.data_root, options.run_dir.resolve()
    if options.check:
        recipe = compare_recipe(CLEAN, SETTINGS[CLEAN], root, folder, {})
        return check_trial(recipe, EVIDENCE / CLEAN / "cells.csv", "KD(0.5, 4)")
    digits = write_digits(folder / "digits")
    learned, teachers = list_learned(root, folder), list_teachers(root, folder, digits[0])
    files = {name: Path(recipe.run_dir) / "teacher.safetensors" for name, recipe in teachers.items()}
    comparisons = list_comparisons(root, folder, files["other"], (digits[1], files["digits"]))
    finish_jobs({name: partial(finish, recipe, learn_teacher, "teacher") for name, recipe in teachers.items()})
    finish_jobs({name: partial(finish, recipe, meta_train, "meta-train") for name, recipe in learned.items()})
    torch.manual_seed(0)
    unlearned = build_loss_from(LossFile.read(locate_loss("both", folder)).header["architecture"])
    save_loss(locate_unlearned(folder), unlearned, {"learned": False})
    for name, recipe in comparisons.items():
        print(f"== {name}", flush=True)
        if options.learned:
            hand_made = (*HAND_MADE, NOT_LEARNED)
            recipe.methods = {label: method for label, method in recipe.methods.items() if label not in hand_made}
            recipe.baseline = next(iter(recipe.methods))
        with open_run(recipe, "compare") as run:
            compare(recipe, run)
    write_report(folder, comparisons, learned)
    return 0


def finish_jobs(jobs: dict[str, Callable[[], Path]]) -> None:
    """Run jobs in worker processes."""
    with start_workers(0) as workers:
        futures: dict[Future[Any], str] = {workers.submit(job): name for name, job in jobs.items()}
        finish_all(futures, lambda name, path: f"{name}: {path}", "learn")


def list_teachers(root: str, folder: Path, digits: Path) -> dict[str, TrainTeacherRecipe]:
    """The teachers beside the embedded one; neither sees an image that a student is trained or scored on."""
    other = TrainTeacherRecipe(
        run_dir=str(folder / "teachers" / "other"),
        resume="auto",
        device="cpu",
        data=DataRecipe("fashion_mnist_rest", root, train_size=40_000, meta_validation_size=8000),
        model=ModelRecipe("small_mobilenet"),
        train=TrainRecipe(epochs=8, learning_rate=META_RATE),
    )
    small = DataRecipe("image_folder", str(digits), image_size=28, train_size=597, meta_validation_size=100)
    taught = TrainTeacherRecipe(
        run_dir=str(folder / "teachers" / "digits"),
        resume="auto",
        device="cpu",
        data=small,
        model=ModelRecipe("small_resnet"),
        train=TrainRecipe(epochs=30, batch_size=32),
    )
    return {"other": other, "digits": taught}


def learn_teacher(recipe: TrainTeacherRecipe, run: Run) -> Path:
    """Train a teacher, as `lkd teacher` does."""
    images = prepare_images(recipe.data, scored=False)
    return train_teacher(choose_student(recipe.model, images.train), images, recipe.train, recipe.seed, run)


def finish(recipe: RunRecipe, command: Callable[[Any, Run], Path], name: str) -> Path:
    """Run a command, unless it was run to its end."""
    output = Path(recipe.run_dir) / {"teacher": "teacher.safetensors", "meta-train": "loss.lkd.safetensors"}[name]
    if not output.exists():
        with open_run(recipe, name, quiet=True) as run:
            command(recipe, run)
    return output


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
