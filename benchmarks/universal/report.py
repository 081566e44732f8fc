"""From the rows of `run.py` to tables, a picture and result.json.

python benchmarks/universal/report.py RUN_DIR OUT [--adapted CSV]
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from tabulate import tabulate

from lkd.core.files import environment, hash_file, write_json, write_text
from lkd.core.statistics import mean_and_error
from lkd.losses.learned.trust import TrustFigures
from lkd.tracking.run import evidence

HERE = Path(__file__).parent
CE, UNIVERSAL, UNTRAINED, UNKNOWN, RULE = "cross-entropy", "universal", "not learned", "trust unknown", "rule"
Accuracies = dict[str, dict[str, dict[int, float]]]
"""World → arm → seed → test accuracy, percent."""


def choose_by_rule(trust: TrustFigures) -> str:
    """The hand-made rule: an arm by the same measured trust. Its thresholds were chosen on the learning worlds."""
    wrong_labels = 1 - trust.training_agreement / max(trust.validation_agreement, 1e-3)
    if trust.validation_agreement < 0.75 and wrong_labels < 0.1:
        return CE
    if wrong_labels > 0.2:
        return "KD(1, 2)"
    if trust.images_per_class < 60:
        return "DKD(1, 2)"
    return "DKD ramp"


def read_rows(folder: Path) -> Accuracies:
    """The test accuracies of a run."""
    found: Accuracies = defaultdict(lambda: defaultdict(dict))
    with (folder / "rows.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            found[row["world"]][row["arm"]][int(row["seed"])] = float(row["top1"])
    return found


def add_rule(found: Accuracies, folder: Path) -> None:
    """The rows of the arm that the rule takes in each world."""
    for name, trust in json.loads((folder / "trust.json").read_text()).items():
        if name in found:
            found[name][RULE] = found[name][choose_by_rule(TrustFigures(*trust))]


def difference(world: dict[str, dict[int, float]], arm: str, other: str) -> tuple[float, float]:
    """Paired over the seeds that both have: mean and standard error."""
    seeds = world[arm].keys() & world[other].keys()
    return mean_and_error([world[arm][seed] - world[other][seed] for seed in sorted(seeds)])


def find_best(world: dict[str, dict[int, float]], arms: list[str]) -> str:
    """The arm with the highest mean on the test split: chosen by what is reported, which favours it."""
    return max((arm for arm in arms if arm in world), key=lambda arm: statistics.fmean(world[arm].values()))


def summarize(found: Accuracies, arms: dict[str, Any]) -> dict[str, float]:
    """The figures of result.json."""
    grid = [f"grid {json.dumps(arm)[1:-1]}" for arm in arms["grid"]]
    hand_made = [*arms["arms"], *grid]
    gains = {name: difference(world, UNIVERSAL, find_best(world, hand_made)) for name, world in found.items()}
    fixed = max(arms["fixed"], key=lambda arm: statistics.fmean(mean_of(world, arm) for world in found.values()))

    def mean_gain(other: str) -> float:
        return statistics.fmean(difference(w, UNIVERSAL, other)[0] for w in found.values() if other in w)

    over_ce = {name: difference(world, UNIVERSAL, CE) for name, world in found.items()}
    unknown = [difference(world, UNKNOWN, CE) for world in found.values() if UNKNOWN in world]
    figures = {
        "worlds_held_out": len(found),
        "seeds": min(len(world[UNIVERSAL]) for world in found.values()),
        "worst_gap": min(gain for gain, _ in gains.values()),
        "mean_gain": statistics.fmean(gain for gain, _ in gains.values()),
        "mean_gain_over_best_fixed": mean_gain(fixed),
        "mean_gain_over_untrained": mean_gain(UNTRAINED),
        "mean_gain_over_rule": mean_gain(RULE),
        "minus_ce_worst": min(mean + 2 * error for mean, error in over_ce.values()),
        "minus_ce_lowest_mean": min(mean for mean, _ in over_ce.values()),
        "cost_to_user_in_trainings": 0,
    }
    if unknown:
        figures["minus_ce_worst_trust_unknown"] = min(mean + 2 * error for mean, error in unknown)
    return figures


def mean_of(world: dict[str, dict[int, float]], arm: str) -> float:
    """An arm's mean accuracy in a world."""
    return statistics.fmean(world[arm].values())


def tabulate_worlds(found: Accuracies, arms: dict[str, Any]) -> str:
    """A row for each world: accuracies, and the universal loss's gains."""
    grid = [f"grid {json.dumps(arm)[1:-1]}" for arm in arms["grid"]]
    shown = [*arms["arms"], RULE, UNTRAINED, UNIVERSAL]
    rows = []
    for name, world in found.items():
        best = find_best(world, [*arms["arms"], *grid])
        cells = [f"{mean_of(world, arm):.1f}" if arm in world else "" for arm in shown]
        gains = ["{:+.2f} ± {:.2f}".format(*difference(world, UNIVERSAL, other)) for other in (best, CE)]
        rows.append([name, *cells, f"{best.removeprefix('grid ')} {mean_of(world, best):.1f}", *gains])
    heads = ["world", *shown, "best hand-made, with hindsight", "universal − best", "universal − cross-entropy"]
    return tabulate(rows, heads, tablefmt="github")


def draw_regrets(found: Accuracies, arms: dict[str, Any], path: Path) -> None:
    """A dot for each world and arm: accuracy less that of the best hand-made loss of the world."""
    grid = [f"grid {json.dumps(arm)[1:-1]}" for arm in arms["grid"]]
    shown = [*arms["arms"], RULE, UNTRAINED, UNIVERSAL]
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for place, arm in enumerate(shown):
        worlds = [world for world in found.values() if arm in world]
        gaps = [mean_of(world, arm) - mean_of(world, find_best(world, [*arms["arms"], *grid])) for world in worlds]
        spread = [place + 0.5 * (number / max(len(gaps) - 1, 1) - 0.5) for number in range(len(gaps))]
        axis.scatter(spread, gaps, s=18, color="tab:red" if arm == UNIVERSAL else "tab:blue", alpha=0.7)
        axis.hlines(statistics.fmean(gaps), place - 0.3, place + 0.3, color="black")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=2)
    axis.set_xticks(range(len(shown)), shown, rotation=20, ha="right")
    axis.set_ylabel("accuracy − best hand-made loss of the world, points")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    arms = yaml.safe_load((HERE / "arms.yaml").read_text())
    found = read_rows(options.run_dir)
    add_rule(found, options.run_dir)
    options.out.mkdir(parents=True, exist_ok=True)
    write_text(options.out / "table.md", tabulate_worlds(found, arms) + "\n")
    draw_regrets(found, arms, options.out / "regrets.png")
    command = "python benchmarks/universal/run.py DATA RUN_DIR && python benchmarks/universal/report.py RUN_DIR OUT"
    file = Path(__file__).parents[2] / "lkd/losses/pretrained/universal.lkd.safetensors"
    saved = evidence(command, environment(), summarize(found, arms))
    write_json(options.out / "result.json", saved | {"file_sha256": hash_file(file)})
    print((options.out / "table.md").read_text())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
