"""Evidence of the comparison: learn a loss, compare it with hand-made ones, keep it in docs/evidence/compare.

python benchmarks/compare.py DATA_ROOT [RUN_DIR]

Goes on with an interrupted run in RUN_DIR.
"""

import json
import shutil
import sys
from pathlib import Path

import yaml
from commands import run_lkd

from lkd.core.files import read_json, write_json, write_text

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "compare"
RECIPE = ROOT / "configs" / "fashion_mnist" / "compare.yaml"
META_RECIPE = ROOT / "configs" / "embedded" / "meta-train.yaml"
README = """# Comparison

Made by `python benchmarks/compare.py DATA_ROOT`: `lkd meta-train` with the settings of
`configs/embedded/meta-train.yaml`, then `lkd compare configs/fashion_mnist/compare.yaml`, both on one split of
Fashion-MNIST: {train} labelled training images, {meta_validation} meta-validation images, the 10,000 test images. The
teacher was trained on the other 48,000 training images and saw none of these. Every method has {budget} trainings to
tune its main options and its learning rate on meta-validation; the test split is read for reported numbers only.

```
{table}```

![Accuracy and paired differences](comparison.png)

What it does not show: larger networks, other data sets, more labels. The loss was learned with `small_cnn` at learning
rate 0.1; learning it is not counted in the budget. Options were picked with one student and used for both. The test
images are the same for every seed, so that the intervals are those of seeds, not of images. Differences are not
corrected for their number.

`result.json`: the figures; `cells.csv`: every seed's row; `table.csv`, `table.tex`: the table.
"""


def main() -> int:
    if len(sys.argv) < 2:
        print("usage: python benchmarks/compare.py DATA_ROOT [RUN_DIR]", file=sys.stderr)
        return 2
    root, folder = sys.argv[1], Path(sys.argv[2] if len(sys.argv) > 2 else "runs/compare-evidence")
    recipe = yaml.safe_load(RECIPE.read_text())
    learned, run = folder / "meta-train", folder / "compare"
    loss = learned / "loss.lkd.safetensors"
    if not loss.exists():
        data = json.dumps(recipe["data"] | {"root": root})
        run_lkd("meta-train", str(META_RECIPE), "--run_dir", str(learned), "--data", data)
    method = json.dumps({"name": str(loss), "grid": recipe["methods"]["CE"]["grid"]})
    run_lkd("compare", str(RECIPE), "--run_dir", str(run), "--data.root", root, "--methods.LKD", method)
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    result = read_json(run / "result.json")
    write_json(EVIDENCE / "result.json", result | {"command": "python benchmarks/compare.py DATA_ROOT"})
    for name in ("table.txt", "table.csv", "table.tex", "cells.csv", "comparison.png"):
        shutil.copyfile(run / name, EVIDENCE / name)
    text = README.format(
        train=f"{recipe['data']['train_size']:,}",
        meta_validation=f"{recipe['data']['meta_validation_size']:,}",
        budget=recipe["tuning_trainings"],
        table=(run / "table.txt").read_text(),
    )
    write_text(EVIDENCE / "README.md", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
