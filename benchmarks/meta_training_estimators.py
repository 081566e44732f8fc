"""Does a loss that was learned on cheaper hypergradients serve as well?

`python benchmarks/meta_training_estimators.py` meta-trains the quickstart's loss (clean labels, all defaults) with each
estimator and several meta seeds, and reuses every loss on the same fresh students. Everything is scored on
meta-validation; the test split is not read. Finished runs in RUN_DIR are kept: to go on, start it again.
"""

import argparse
import csv
from pathlib import Path
from typing import Any

import torch

from lkd.config import CompareRecipe, MetaSettings, MetaTrainRecipe, ModelRecipe
from lkd.core.files import read_json, write_json, write_text
from lkd.core.statistics import mean_and_error
from lkd.evaluation.comparison.tables import format_figure
from lkd.evaluation.comparison.trials import Trial, run_trial
from lkd.losses.learned.file import SUFFIX, read_provenance
from lkd.meta_training.meta_train import meta_train
from lkd.tracking.run import evidence, open_run

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "meta_training_estimators"
ESTIMATORS = {"unrolled": 2, "first_order": 2, "audited": 1}  # estimator: meta seeds
FRESH_SEEDS = (100, 101, 102)
MEASURED: dict[str, Any] = {
    "outer_steps": 40,
    "students_per_step": 3,
    "rollout_steps": 50,
    "rollout_epochs": 1,
    "learning_rate": 0.02,
    "reuse_every": 0,
}
"""What is measured: the recipe that was the default at the time."""
README = """# The estimator behind a learned loss

Made by `python benchmarks/meta_training_estimators.py`: the quickstart's loss (clean labels, small_cnn,
K = 50) learned with each estimator, then reused on {fresh} fresh students. Accuracy on meta-validation,
percent, mean over them; nothing here looks at the test split.

{table}

first_order − unrolled over paired meta seeds: {difference} points. Spread of `unrolled` over its own meta seeds
(standard deviation): {spread:.2f} points. The audit's cosine of `first_order` to the exact hypergradient in the
`audited` run: {audits}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path, nargs="?", default=Path("runs/meta-training-estimators"))
    folder: Path = parser.parse_args().run_dir
    torch.set_num_threads(1)
    rows = [
        learn_and_reuse(estimator, seed, folder)
        for seed in range(max(ESTIMATORS.values()))
        for estimator, n in ESTIMATORS.items()
        if seed < n
    ]
    report(rows, folder)


def learn_and_reuse(estimator: str, seed: int, folder: Path) -> dict[str, Any]:
    """Learn one loss and train fresh students with it."""
    run_dir = folder / f"{estimator}-seed{seed}"
    path = run_dir / f"loss{SUFFIX}"
    recipe = MetaTrainRecipe(
        run_dir=str(run_dir),
        resume="auto",
        seed=seed,
        device="cpu",
        threads=1,
        meta=MetaSettings(estimator=estimator, **MEASURED),
    )
    if not path.exists():
        with open_run(recipe, "meta-train", quiet=True) as run:
            meta_train(recipe, run)
    reuse = CompareRecipe(data=recipe.data, teacher=recipe.teacher, train=recipe.train, methods={"learned": str(path)})
    accuracies = []
    for fresh in FRESH_SEEDS:
        result = run_dir / f"reuse-seed{fresh}.json"
        if not result.exists():
            run_trial(reuse, Trial("learned", str(path), ModelRecipe("small_cnn"), fresh, reported=False), result)
        accuracies.append(read_json(result)["meta_validation"]["top1"])
    provenance = read_provenance(path)
    row = {
        "estimator": estimator,
        "meta_seed": seed,
        "accuracy": round(sum(accuracies) / len(accuracies), 4),
        "audit_cosines": sorted({round(entry["outer/audit_cosine"], 3) for entry in provenance["curve"]})
        if estimator == "audited"
        else "",
    }
    print(*row.values(), *accuracies, flush=True)
    return row


def report(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write the table, the rows and `result.json`."""
    by = {name: [row for row in rows if row["estimator"] == name] for name in ESTIMATORS}
    accuracy = {name: mean_and_error([row["accuracy"] for row in group]) for name, group in by.items()}
    pairs = zip(by["first_order"], by["unrolled"], strict=True)
    difference = mean_and_error([mine["accuracy"] - exact["accuracy"] for mine, exact in pairs])
    spread = accuracy["unrolled"][1] * len(by["unrolled"]) ** 0.5
    lines = ["| estimator | meta seeds | accuracy |", "|---|---|---|"]
    for name, group in by.items():
        lines.append(f"| `{name}` | {len(group)} | {format_figure(accuracy[name])} |")
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    text = README.format(
        fresh=len(FRESH_SEEDS),
        table="\n".join(lines),
        difference=format_figure(difference, signed=True),
        spread=spread,
        audits=", ".join(map(str, by["audited"][0]["audit_cosines"])),
    )
    write_text(EVIDENCE / "README.md", text)
    with (EVIDENCE / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    environment = read_json(folder / "unrolled-seed0" / "environment.json")
    figures = {f"{name}_accuracy": value[0] for name, value in accuracy.items()} | {
        "first_order_minus_unrolled": difference[0],
        "first_order_minus_unrolled_se": difference[1],
        "unrolled_spread_over_meta_seeds": spread,
        "audited_minus_unrolled_seed0": by["audited"][0]["accuracy"] - by["unrolled"][0]["accuracy"],
        "audit_cosine_lowest": min(by["audited"][0]["audit_cosines"]),
    }
    rounded = {name: round(value, 4) for name, value in figures.items()}
    result = evidence("python benchmarks/meta_training_estimators.py", environment, rounded)
    write_json(EVIDENCE / "result.json", result)


if __name__ == "__main__":
    main()
