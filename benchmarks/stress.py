"""Meta-training with an inner learning rate 100 times too high. Kept in docs/evidence/faults.

python -m benchmarks.stress [RUN_DIR] [--steps 30]

The quickstart's recipe, but for `train.learning_rate` 10 (for 0.1) and rollouts of 100 steps. It must end with a loss
that can be used, no worse on meta-validation than the one it started from, and say what happened. That loss then trains
a student at the usual rate.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

from lkd.cli import main as run_lkd
from lkd.core.files import environment, write_json, write_text
from lkd.losses.learned.file import load_loss, read_provenance
from lkd.models.files import load_network
from lkd.tracking.run import evidence

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "faults"
RECIPE = Path(__file__).parents[1] / "configs" / "embedded" / "meta-train.yaml"
SMALL = ["--data.train_size", "1000", "--data.meta_validation_size", "1000", "--device", "cpu", "--threads", "1"]
README = """# Stress: an inner learning rate 100 times too high

Made by `python -m benchmarks.stress`: `lkd meta-train` of the embedded recipe with 1,000 images,
`train.learning_rate` 10 and rollouts of 100 steps, {steps} outer steps.

| | |
|---|---|
| exit code | {code} |
| hypergradients that counted, left out | {counted}, {left_out} |
| rollouts halved | {halved} times |
| outer learning rate, at the end over what was asked for | {rate:g} |
| students of looks at reuse, calibrated cross-entropy: initial loss, best loss | {initial:.4g}, {best:.4g} |
| all weights of the saved loss are finite | {finite} |
| a student trained with it at the usual rate of 0.1, top-1 on meta-validation | {top1:.2f} % |

What it said (without the introduction):

```
{said}
```
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_dir", nargs="?", default="runs/stress", type=Path)
    parser.add_argument("--steps", default=30, type=int, help="Outer steps.")
    given = parser.parse_args()
    words = ["meta-train", str(RECIPE), *SMALL, "--run_dir", str(given.run_dir / "learned"), "--resume", "auto"]
    words += ["--train.learning_rate", "10", "--meta.rollout_steps", "100", "--meta.outer_steps", str(given.steps)]
    code = run_lkd(words)
    path = given.run_dir / "learned" / "loss.lkd.safetensors"
    student = given.run_dir / "student"
    use = ["distill", *SMALL, "--loss", str(path), "--run_dir", str(student), "--resume", "auto"]
    if code or run_lkd(use):
        raise SystemExit(f"the stress run failed: exit {code}")
    outcome = describe(path, student / "student.safetensors")
    said = (given.run_dir / "learned" / "output.txt").read_text().splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("teacher:")) + 1
    figures = {f"stress_{key}": float(value) for key, value in outcome.items()}
    write_json(EVIDENCE / "stress.json", evidence("python -m benchmarks.stress", environment(), figures))
    lines = "\n".join(Path(line).name if line.startswith("/") else line for line in said[first:])
    write_text(EVIDENCE / "stress.md", README.format(steps=given.steps, code=code, said=lines, **outcome))


def describe(path: Path, student: Path) -> dict[str, Any]:
    """What came of it.

    Args:
        path: The learned loss.
        student: The student that it has trained at the usual rate.
    """
    provenance = read_provenance(path)
    scores = [row["calibrated_cross_entropy"] for row in provenance["reuse"]]
    kept = provenance["hypergradients"]
    return {
        "counted": kept["counted"],
        "left_out": kept["left_out"],
        "halved": kept["rollouts_halved"],
        "rate": kept["outer_rate"],
        "initial": scores[0],
        "best": min(scores),
        "improved": min(scores) <= scores[0] and not math.isnan(scores[0]),
        "finite": all(bool(torch.isfinite(tensor).all()) for tensor in load_loss(path).state_dict().values()),
        "top1": load_network(student)[1]["provenance"]["meta_validation"]["last"]["top1"],
    }


if __name__ == "__main__":
    main()
