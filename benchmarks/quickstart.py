"""Evidence of the quickstart: run it (or go on with it), keep figures, rows and pictures in docs/evidence/quickstart.

python benchmarks/quickstart.py [RUN_DIR]
"""

import shutil
import subprocess
import sys
from pathlib import Path

from lkd.core.files import read_json, write_json, write_text
from lkd.evaluation.quickstart import SETTINGS

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "quickstart"
README = """# Quickstart

Made by `python benchmarks/quickstart.py`, which runs `lkd quickstart`: three settings, one recipe, embedded images of
Fashion-MNIST, {seeds} paired seeds. Test accuracy, percent, mean ± standard error. `small_cnn` is the student that the
loss was learned with; `small_mobilenet` was never seen by it. KD's weight and temperature were picked on
meta-validation from a grid of 16, anew for each setting.

{tables}
{regret}

What it does not show: other learning rates (all losses train at one), other teachers, larger networks. The seeds are
few, and the 4,000 test images are the same for every seed.

`result.json`: the figures; `SETTING-cells.csv`: every training; the pictures are those of the page.
"""


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart-evidence")
    command = [sys.executable, "-m", "lkd.cli", "quickstart", "--run_dir", str(folder), "--resume", "auto"]
    if subprocess.run(command, check=False).returncode:
        return 1
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    result = read_json(folder / "result.json")
    write_json(EVIDENCE / "result.json", result | {"command": "python benchmarks/quickstart.py"})
    for name in ("quickstart.png", "meta-training.png"):
        shutil.copyfile(folder / name, EVIDENCE / name)
    tables = []
    for setting in SETTINGS:
        shutil.copyfile(folder / setting / "cells.csv", EVIDENCE / f"{setting}-cells.csv")
        shutil.copyfile(folder / setting / "learned-loss.png", EVIDENCE / f"{setting}-learned-loss.png")
        tables.append(f"{setting}:\n\n```\n{(folder / setting / 'table.txt').read_text()}```\n")
    seeds, regret = result["figures"]["seeds"], (folder / "regret.txt").read_text()
    write_text(EVIDENCE / "README.md", README.format(seeds=seeds, tables="\n".join(tables), regret=regret.strip()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
