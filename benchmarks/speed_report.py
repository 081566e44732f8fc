"""The figures of docs/evidence/speed: every script of it records its own, and the page is written from all of them."""

import math
from pathlib import Path

from lkd.core.files import environment, read_mapping, write_json, write_text
from lkd.tracking.run import evidence

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "speed"
ROWS: list[tuple[str, str, str, str]] = [  # what is measured, its goal, the figure, the script
    ("start of a run on 1.28 million images in shards, index kept, seconds", "≤ 5", "index_seconds_1m", "start_speed"),
    ("the first start, which makes the index, seconds", "–", "index_made_seconds_1m", "start_speed"),
    ("learned loss ÷ KD, eager, 1,000 classes", "≤ 2", "logit_loss_vs_kd_c1000", "loss_speed"),
    ("learned loss ÷ KD, eager, 10 classes", "≤ 2.5", "logit_loss_vs_kd_c10", "loss_speed"),
    ("operators of the learned loss, without views (KD: 34)", "≤ 80", "logit_loss_operators", "loss_speed"),
    ("learned loss ÷ KD, both compiled, 1,000 classes", "≤ 1.5", "logit_loss_compiled_vs_kd", "loss_speed"),
    ("recompilations over a training", "0", "recompilations", "loss_speed"),
]
PAGE = """# Speed, measured

`python benchmarks/SCRIPT.py` measures; what is compared is run in turn in one process. Medians.

| | goal | measured | script |
|---|---|---|---|
{table}

**Start.** Finding the images and splitting them, processor time on one thread; wall time is in `start_time.csv`, of a
machine with 15 other processes on two cores. Members are of a few bytes and nothing is decoded; the headers that are
read to make the index are as many as of real images. The split by class took 50 seconds of every start, a pass over all
labels for each class; it is one sort now, with the same result.

**The learned loss.** Forward and backward of the loss that ships, told trust: 256 images, one CPU thread, processor
time, medians of 25. With 1,000 classes, passes over all classes are most of the time; their derivatives are in closed
form. What is left are five log-softmaxes where KD takes three: both networks at τ = 1, the teacher also at its best
temperature, and both at the sample's τ without the target. With 10 classes the time is that of calling operators:
{loss_operator_us:.1f} µs each for the learned loss, {kd_operator_us:.1f} µs for KD. Most are over [images] or scalars:
the network and its inputs, α, τ, β, κ, what is told of trust. torch.compile fuses them. It makes one more graph at the
second value of a number of progress, and none after it; where progress is a tensor it makes one.
"""


def record(out: Path, command: str, figures: dict[str, float]) -> None:
    """Add a script's figures to result.json, and write the page anew."""
    path = out / "result.json"
    known = read_mapping(path)["figures"] if path.exists() else {}
    known |= {key: round(value, 4) for key, value in figures.items()}
    write_json(path, evidence(f"python benchmarks/{command}", environment(), known))
    table = [f"| {what} | {goal} | {known[key]:.4g} | `{script}` |" for what, goal, key, script in ROWS if key in known]
    write_text(out / "README.md", PAGE.format_map(Known(known, table="\n".join(table))))


class Known(dict[str, object]):
    """Figures, NaN for what is not measured."""

    def __missing__(self, key: str) -> float:
        return math.nan
