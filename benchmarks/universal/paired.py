"""One arm less another over the worlds of a list of rows: paired by seed, mean ± standard error over worlds.

python benchmarks/universal/paired.py docs/evidence/universal/rows.csv universal 'not learned'
python benchmarks/universal/paired.py docs/evidence/universal/rows.csv universal tuned --worlds confirmation.yaml
python benchmarks/universal/paired.py docs/evidence/universal/tried.csv 'half learned, judges' 'not learned, judges'

Of all worlds that have both arms, or of those of a list; by meta-validation where a row has no test accuracy.
"""

import argparse
import csv
import sys
from pathlib import Path

from report import collect, compare, list_worlds

from lkd.core.statistics import mean_and_error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", type=Path)
    parser.add_argument("arm")
    parser.add_argument("other")
    parser.add_argument("--worlds", help="a list beside this script, whose worlds alone count")
    options = parser.parse_args()
    path, arm, other = options.rows, options.arm, options.other
    worlds = list_worlds(options.worlds) if options.worlds else None
    with path.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] in (arm, other)]
    rows = [row for row in rows if worlds is None or row["world"] in worlds]
    figure = "top1" if all(row.get("top1") for row in rows) else "meta_validation_top1"  # of one split alone
    found = collect(rows, figure)
    both = {name: world for name, world in found.items() if world[arm].keys() & world[other].keys()}
    gains = {name: compare(world, arm, other)[0] for name, world in both.items()}
    if not gains:
        print(f"{path}: no world has both {arm!r} and {other!r}", file=sys.stderr)
        return 2
    for name, gain in gains.items():
        print(f"{name:24} {gain:+.2f}")
    mean, error = mean_and_error(list(gains.values()))
    print(f"{len(gains)} worlds: {mean:+.2f} ± {error:.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
