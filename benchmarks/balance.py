"""Evidence of the balances: learn a loss, compare it with weights set by rules, keep it in docs/evidence/balance.

python benchmarks/balance.py [RUN_DIR [--key value ...]] | --check

--check trains one cell anew.

Goes on with an interrupted run in RUN_DIR. Further words are options of `lkd compare`.
"""

import csv
import io
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib
import torch
from checking import check_trial
from commands import run_lkd
from scipy.special import stdtrit

from lkd.balance.balancing import build_balance, split_terms, take_gradient
from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.files import read_json, write_json, write_text
from lkd.evaluation.comparison.trials import balance_of, split_method
from lkd.training.answers import prepare_teacher
from lkd.training.build import LossBuilder, choose_student, open_teacher, prepare_images
from lkd.training.distill import start_training
from lkd.training.training import Training

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lkd.meta_training.log import save_figure

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "balance"
RECIPE = ROOT / "configs" / "embedded" / "compare-balances.yaml"
META_RECIPE = ROOT / "configs" / "embedded" / "meta-train.yaml"
COLUMNS = ["method", "step", "lambda", "task", "distillation", "task_gradient", "distillation_gradient", "cosine"]
README = """# Balances

Made by `{command}`: `lkd meta-train configs/embedded/meta-train.yaml`, then
`lkd compare configs/embedded/compare-balances.yaml` with that loss as one more method. Each balance has five trainings
for its main option; the learned loss has no grid, and learning it is not counted.

```
{table}```

![λ, losses, norms of their gradients and the angle between these, first seed](trajectories.png)

What it does not show: other data sets, students and learning rates; KD's temperature is 4 throughout. The test images
are the same for every seed, and the differences are not corrected for their number.

`result.json`: the figures; `cells.csv`: every seed's row; `trajectories.csv`: what the picture shows.
"""


def main() -> int:
    if "--check" in sys.argv:
        return check_trial(parse_recipe("compare", [str(RECIPE)]), EVIDENCE / "cells.csv", "constant")
    folder, options = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/balance-evidence"), sys.argv[2:]
    loss, run = folder / "meta-train" / "loss.lkd.safetensors", folder / "compare"
    if not loss.exists():
        run_lkd("meta-train", str(META_RECIPE), "--run_dir", str(loss.parent))
    learned = json.dumps({"name": str(loss)})
    run_lkd("compare", str(RECIPE), "--run_dir", str(run), "--methods.learned", learned, *options)
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    result, recipe = read_json(run / "result.json"), read_json(run / "config.json")["recipe"]
    command = " ".join(["python benchmarks/balance.py", *(["RUN_DIR", shlex.join(options)] if options else [])])
    write_json(EVIDENCE / "result.json", result | {"command": command, "figures": name_figures(result["figures"])})
    for name in ("table.txt", "cells.csv", "comparison.png"):
        shutil.copyfile(run / name, EVIDENCE / name)
    rows = [row for name, pick in read_json(run / "picks.json").items() for row in follow(name, pick, recipe)]
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([COLUMNS, *rows])
    write_text(EVIDENCE / "trajectories.csv", text.getvalue())
    plot(rows)
    write_text(EVIDENCE / "README.md", README.format(command=command, table=(run / "table.txt").read_text()))
    return 0


def name_figures(figures: dict[str, float]) -> dict[str, float]:
    """The comparison's figures, and the standard errors of the differences from their 95 % intervals."""
    quantile = stdtrit(int(figures["seeds"]) - 1, 0.975)  # of Student's t, 95 % two-sided
    errors = {
        f"{key.removesuffix('_high')}_se": round((high - figures[f"{key.removesuffix('_high')}_low"]) / 2 / quantile, 4)
        for key, high in figures.items()
        if key.endswith("_high")
    }
    return figures | errors


def follow(method: str, pick: Any, saved: dict[str, Any], every: int = 20) -> list[list[Any]]:
    """Train the first seed again, looking at terms and gradients every so many steps; the rows of `COLUMNS`."""
    recipe = CompareRecipe(seed=saved["seed"])
    data, model = DataRecipe(**saved["data"]), ModelRecipe(**saved["students"][0])
    taught = TeacherRecipe(**saved["teacher"])
    specification, train = split_method(pick, TrainRecipe(**saved["train"]))
    images, device = prepare_images(data), torch.device("cpu")
    student, opened = choose_student(model, images.train), open_teacher(taught, images.train)
    loss = LossBuilder(specification, opened, images).build(student, recipe.seed)
    teacher = prepare_teacher(opened, images, device)
    balance = balance_of(pick)
    weighed = build_balance(balance, loss)
    training = start_training(student, images, loss, teacher, train, recipe.seed, device, balance=weighed)
    rows = []
    while training.step < training.total_steps:
        looks = training.step % every == 0
        seen = look(training) if looks else []
        step = training.step
        training.run_step()
        if looks:
            rows.append([method, step, training.balance.weight if training.balance else "", *seen])
    return rows


def look(training: Training) -> list[float]:
    """Terms, norms of their gradients and the cosine between these, of the next step's batch."""
    batch = training.batches.at(training.step)
    assert training.teacher
    student = training.student.eval()
    identity = {"index": batch.index} if training.loss.needs_index else {}
    task, distillation = split_terms(
        training.loss(student(batch.images), training.teacher(batch), batch.target, training.progress, **identity)
    )
    first, second = (take_gradient(value, list(student.parameters())) for value in (task, distillation))
    student.train()
    cosine = torch.nn.functional.cosine_similarity(first, second, 0)
    return [round(value.item(), 5) for value in (task, distillation, first.norm(), second.norm(), cosine)]


def plot(rows: list[list[Any]]) -> None:
    """Draw every column over the steps, a line a method."""
    figure, axes = plt.subplots(2, 3, figsize=(13, 6), layout="constrained")
    for place, axis in enumerate(axes.flat, start=2):
        for method in dict.fromkeys(row[0] for row in rows):
            own = [row for row in rows if row[0] == method and row[place] != ""]
            axis.plot([row[1] for row in own], [row[place] for row in own], lw=1, label=method)
        axis.set_title(COLUMNS[place].replace("_", " "), fontsize=10)
        axis.set_xlabel("step")
    axes.flat[1].legend(frameon=False, fontsize=8)
    save_figure(figure, EVIDENCE / "trajectories.png")


if __name__ == "__main__":
    sys.exit(main())
