"""What a meta-training with the defaults costs: `python benchmarks/meta_train_speed.py RUN_DIR [OUT]`.

Runs `lkd meta-train configs/embedded/meta-train.yaml` and records what the loss's provenance says: its cost in
trainings of the student, that of each part, and the processor seconds that so many trainings take; and the seconds from
the run's first file to its last, which mean something on a machine with nothing else to do. A run that is there is only
read.
"""

import argparse
from pathlib import Path

from rows import matching, median, write_row
from speed_report import OUT, record

from lkd.cli import main as run_command
from lkd.losses.learned.file import SUFFIX, read_provenance

RECIPE = Path(__file__).parents[1] / "configs" / "embedded" / "meta-train.yaml"
PARTS = ("pool", "outer_steps", "reuse")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    options = parser.parse_args()
    rows = options.out / "meta_train.csv"
    if not matching(rows):
        path = options.run_dir / f"loss{SUFFIX}"
        words = ["meta-train", str(RECIPE), "--run_dir", str(options.run_dir)]
        if not path.exists() and (status := run_command(words)):
            raise SystemExit(status)
        found = read_provenance(path)
        whole = found["cost_in_trainings"] * found["training_seconds"]
        first, last = (each.stat().st_mtime for each in (options.run_dir / "config.json", path))
        parts = [found["parts_in_trainings"][part] for part in PARTS]
        row = [found["cost_in_trainings"], *parts, round(whole, 1), round(last - first, 1)]
        write_row(rows, ["trainings", *PARTS, "processor_seconds", "seconds"], row)
    figures = {f"meta_train_{name}": median(rows, name) for name in ("trainings", "seconds", "processor_seconds")}
    figures |= {f"meta_train_{part}_trainings": median(rows, part) for part in PARTS}
    record(options.out, figures)


if __name__ == "__main__":
    main()
