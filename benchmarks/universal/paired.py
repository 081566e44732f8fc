"""One arm less another over the worlds of a list of rows: paired by seed, mean ± standard error over worlds.

python benchmarks/universal/paired.py docs/evidence/universal/rows.csv universal 'not learned'
python benchmarks/universal/paired.py docs/evidence/universal/tried.csv 'half learned, judges' 'not learned, judges'
"""

import csv
import sys
from collections import defaultdict

from report import compare

from lkd.core.statistics import mean_and_error


def main() -> int:
    if len(sys.argv) != 4:
        print(__doc__, file=sys.stderr)
        return 2
    path, arm, other = sys.argv[1:]
    found: dict[str, dict[str, dict[int, float]]] = defaultdict(lambda: {arm: {}, other: {}})
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            if row["arm"] in (arm, other):
                figure = row.get("top1") or row["meta_validation_top1"]
                found[row["world"]][row["arm"]][int(row["seed"])] = float(figure)
    gains = {name: compare(world, arm, other)[0] for name, world in found.items() if world[arm].keys() & world[other]}
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
