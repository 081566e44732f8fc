"""Evidence of ranking fidelity: run `lkd fidelity` on the embedded images, keep it in docs/evidence/fidelity.

python benchmarks/fidelity.py [RUN_DIR [--key value ...]] | --check

--check does one of the full trainings anew.

Goes on with an interrupted run in RUN_DIR. Further words are options of `lkd fidelity`.
"""

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from checking import SEED_NOISE, check
from rows import matching

from lkd.config import FidelityRecipe
from lkd.config.parse import parse_recipe
from lkd.core.files import read_json, write_json, write_text
from lkd.evaluation.comparison.trials import run_trial
from lkd.evaluation.fidelity import as_comparison, plan_trainings

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "fidelity"
RECIPE = ROOT / "configs" / "embedded" / "fidelity.yaml"
README = """# Ranking fidelity

Made by `{command}`,
which runs `lkd fidelity configs/embedded/fidelity.yaml` with these options: {losses} losses (cross-entropy and KD),
{seeds} full trainings of each, and {rollouts} rollouts of each from every age, length and annealing; embedded images
of Fashion-MNIST, one student (`small_cnn`), one teacher. Everything is measured on meta-validation; the test split is
not read. Does a rollout rank the losses as full trainings do?

```
{table}```

![Spearman's rho by age, length, annealing and objective](fidelity.png)

What it does not show: other losses (these differ in weight and temperature only, and do not change during the
training: a loss that conditions on progress can also go wrong where rollouts that start young do not see it), other
students, teachers, data sets, learning rates. The intervals are of draws and seeds, with these losses. Choosing the
best of several settings on one measurement favours the lucky one.

`result.json`: the figures; `rows.csv`: every correlation; `trainings.csv`, `rollouts.csv`: every training and every
rollout.
"""


def main() -> int:
    if "--check" in sys.argv:
        return check_training("KD(0.5, 2)")
    folder, options = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/fidelity-evidence"), sys.argv[2:]
    words = ["fidelity", str(RECIPE), "--run_dir", str(folder), "--resume", "auto", *options]
    if status := subprocess.run([sys.executable, "-m", "lkd.cli", *words], check=False).returncode:
        return status
    keep_evidence(folder, options)
    return 0


def check_training(label: str) -> int:
    """Train with a loss and the first seed anew."""
    recipe: FidelityRecipe = parse_recipe("fidelity", [str(RECIPE)])
    trial = next(each for each in plan_trainings(recipe) if each.method == label)
    with tempfile.TemporaryDirectory() as folder:
        found = run_trial(as_comparison(recipe), trial, Path(folder) / "row.json")["meta_validation"]
    committed = matching(EVIDENCE / "trainings.csv", loss=label, seed=trial.seed)[0]
    return check(committed, {"top1": found["top1"]}, noise=SEED_NOISE)


def keep_evidence(folder: Path, options: list[str]) -> None:
    """Copy a finished run's results into the evidence folder, with a README."""
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    result, recipe = read_json(folder / "result.json"), read_json(folder / "fidelity.json")["recipe"]
    command = " ".join(["python benchmarks/fidelity.py", *(["RUN_DIR", shlex.join(options)] if options else [])])
    write_json(EVIDENCE / "result.json", result | {"command": command})
    for name in ("table.txt", "rows.csv", "trainings.csv", "rollouts.csv", "fidelity.png"):
        shutil.copyfile(folder / name, EVIDENCE / name)
    text = README.format(
        command=command,
        losses=len(recipe["losses"]),
        seeds=recipe["full_seeds"],
        rollouts=recipe["rollouts"],
        table=(folder / "table.txt").read_text(),
    )
    write_text(EVIDENCE / "README.md", text)


if __name__ == "__main__":
    sys.exit(main())
