"""Copies of a learned loss that ramp the teacher up over other parts of the training, for a search over trainings.

python benchmarks/universal/ramp.py LOSS OUT_DIR WARMUP ...

Rollouts are too short to show what a ramp is worth. `run.py` takes the files as `--loss`.
"""

import sys
from pathlib import Path

from lkd.losses.learned.file import SUFFIX, load_loss, read_provenance, save_loss


def main() -> int:
    if len(sys.argv) < 4:
        print("usage: python benchmarks/universal/ramp.py LOSS OUT_DIR WARMUP ...", file=sys.stderr)
        return 2
    source, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    for warmup in sys.argv[3:]:
        loss = load_loss(source)
        form = loss.forms()[0]
        form.warmup = form.architecture["warmup"] = float(warmup)
        save_loss(folder / f"{warmup}{SUFFIX}", loss, read_provenance(source))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
