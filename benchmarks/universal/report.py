"""From the rows of `run.py` to tables, a picture and result.json.

python benchmarks/universal/report.py RUN_DIR OUT

The worlds of worlds.yaml first; then those of confirmation.yaml, where RUN_DIR has them, in a table of their own.
"""

import argparse
import csv
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import yaml
from tabulate import tabulate

from lkd.core.files import PACKAGE, environment, hash_file, write_json, write_text
from lkd.core.statistics import mean_and_error
from lkd.losses.learned.file import read_provenance
from lkd.losses.learned.trust import TrustFigures
from lkd.tracking.run import evidence

HERE = Path(__file__).parent
ARMS = yaml.safe_load((HERE / "arms.yaml").read_text())
ABLATIONS = [*yaml.safe_load((HERE / "ablations.yaml").read_text())["variants"]]
CE, TUNED, UNIVERSAL, UNKNOWN, RULE = "cross-entropy", "tuned", "universal", "trust unknown", "rule"
NOT_HELD_OUT, OWN = "no labels held out", "learned for the world"
UNTRAINED = "not learned"
FORMER = "universal, β from 1"
# What was shipped before it was learned anew; and before labels were judged.
SEEING, IN_FULL, UNTRAINED_FADING = "seeing the student's answers", "learned in full, fading", "not learned, fading"
OTHERS = (SEEING, IN_FULL, UNTRAINED_FADING)
# The shipped loss once more, with teachers of another CPU; and what was measured with these.
ANOTHER_CPU = "universal, on another CPU"
WITH_THESE = (
    FORMER,
    f"{UNIVERSAL}, meta seed",
    "features",
    "held-out images seen",
    "universal, 100",
    "universal, 400",
    "adapted",
)
EVERYTHING, NOTHING = "everything", "nothing learned"
ABLATED = (
    "Learned in six worlds with 40 steps and without the rules, less what it sees, how it acts, or where it learns "
    "(`nothing learned`: the same form, before):"
)
AGAIN = (
    "The shipped loss once more, on another CPU and under teachers that were trained there, and what was measured with "
    "these; the first column of differences is what CPU and teachers alone change:"
)
MORE = "Six more worlds, of two data sets that nobody had seen when the rules were made:"
HAND_MADE = (*ARMS["arms"], TUNED)
Worlds = dict[str, dict[str, dict[int, float]]]
"""World → arm → seed → test accuracy, percent."""


def list_worlds(name: str) -> list[str]:
    """The worlds of a list."""
    return [*yaml.safe_load((HERE / name).read_text())["worlds"]]


def choose_by_rule(trust: TrustFigures) -> str:
    """The hand-made rule: an arm by the same measured trust.

    Its thresholds take about the best arm in each of ten learning worlds (learning_worlds.yaml, meta-validation), and
    were set before any hand-made loss was measured in a held-out world.
    """
    wrong_labels = 1 - trust.training_agreement / max(trust.validation_agreement, 1e-3)
    if wrong_labels > 0.2:
        return "KD(1, 2)"
    return CE if trust.validation_agreement < 0.82 else "DKD(1, 2)"


def read_rows(folder: Path) -> Worlds:
    """The test accuracies of a run."""
    with (folder / "rows.csv").open(newline="") as file:
        return collect([row for row in csv.DictReader(file) if row["top1"]], "top1")  # not what meta-validation scored


def collect(rows: Iterable[dict[str, str]], figure: str) -> Worlds:
    """A figure of each row, by world, arm and seed, of which there may be one of each."""
    found: Worlds = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        seeds = found[row["world"]][row["arm"]]
        if int(row["seed"]) in seeds:
            raise SystemExit(f"{row['world']}: {row['arm']}, seed {row['seed']} has two rows")
        seeds[int(row["seed"])] = float(row[figure])
    return found


def add_rule(found: Worlds, folder: Path) -> None:
    """The rows of the arm that the rule takes in each world."""
    for name, trust in json.loads((folder / "trust.json").read_text()).items():
        chosen = choose_by_rule(TrustFigures.from_json(trust))
        if chosen in found.get(name, {}):
            found[name][RULE] = found[name][chosen]


def select(found: Worlds, name: str) -> Worlds:
    """Those of a list, by name."""
    return {world: found[world] for world in sorted(list_worlds(name)) if world in found}


def compare(world: dict[str, dict[int, float]], arm: str, other: str) -> tuple[float, float]:
    """An arm less another, paired over the seeds that both have: mean and standard error."""
    seeds = sorted(world[arm].keys() & world[other].keys())
    return mean_and_error([world[arm][seed] - world[other][seed] for seed in seeds])


def mean(world: dict[str, dict[int, float]], arm: str) -> float:
    """An arm's mean accuracy in a world, over the seeds that all hand-made arms have, so that means can be compared."""
    common = set.intersection(*(set(world[each]) for each in HAND_MADE if each in world))
    return statistics.fmean(world[arm][seed] for seed in common & world[arm].keys() or world[arm])


def find_best(world: dict[str, dict[int, float]]) -> str:
    """The hand-made arm with the highest mean on the test split: chosen by what is reported, which favours it."""
    return max((arm for arm in HAND_MADE if arm in world), key=lambda arm: mean(world, arm))


def find_best_fixed(found: Worlds) -> str:
    """The one hand-made loss that is best over all worlds, with hindsight."""
    everywhere = [arm for arm in ARMS["arms"] if all(arm in world for world in found.values())]
    return max(everywhere, key=lambda arm: statistics.fmean(mean(world, arm) for world in found.values()))


def find_same(arm: str) -> str:
    """The arm of the shipped loss under the same teachers, to the bit."""
    return ANOTHER_CPU if arm.startswith(WITH_THESE) else UNIVERSAL


def list_with_same_teachers(found: Worlds) -> list[str]:
    """What is compared with the loss on another CPU."""
    return sorted({arm for world in found.values() for arm in world if arm.startswith(WITH_THESE)})


def summarize(found: Worlds, folder: Path) -> dict[str, Any]:
    """The figures of result.json."""
    gains = [compare(world, UNIVERSAL, find_best(world))[0] for world in found.values()]
    over_ce = {name: compare(world, UNIVERSAL, CE) for name, world in found.items()}

    def gain(other: str) -> float | None:
        """None where the other arm is not measured in every world."""
        if any(other not in world for world in found.values()):
            return None
        return statistics.fmean(compare(world, UNIVERSAL, other)[0] for world in found.values())

    others = sorted({arm for world in found.values() for arm in world if arm.startswith(f"{UNIVERSAL}, meta seed")})
    figures: dict[str, Any] = {
        "worlds_held_out": len(found),
        "data_sets_held_out": len({name.split("-")[0] for name in found}),
        "seeds": min(len(world[UNIVERSAL]) for world in found.values()),
        "meta_seeds": 1 + len(others),
        "file_sha256": hash_file(PACKAGE / "losses/pretrained/universal.lkd.safetensors"),
        "worst_gap": min(gains),
        "mean_gain": statistics.fmean(gains),
        "mean_gain_over_best_fixed": gain(find_best_fixed(found)),
        "mean_gain_over_tuned": gain(TUNED),
        "mean_gain_over_untrained": gain(UNTRAINED),
        "mean_gain_over_untrained_fading": gain(UNTRAINED_FADING),
        "mean_gain_over_learned_in_full_fading": gain(IN_FULL),
        "mean_gain_over_rule": gain(RULE),
        "minus_ce_worst": min(each + 2 * error for each, error in over_ce.values()),
        "minus_ce_lowest_mean": min(each for each, _ in over_ce.values()),
        "minus_ce_noisy_validation": min(
            each for name, (each, _) in over_ce.items() if name.endswith("noisy-validation")
        ),
        "cost_to_user_in_trainings": 0,
    }
    for arm in others:
        own = [compare(world, arm, find_best(world))[0] for world in found.values() if arm in world]
        figures[f"mean_gain_{arm.rsplit(maxsplit=1)[1]}"] = statistics.fmean(own)
    for arm, key in ((UNKNOWN, "trust_unknown"), (NOT_HELD_OUT, "no_labels_held_out")):
        if over := [compare(world, arm, CE) for world in found.values() if arm in world]:
            figures[f"minus_ce_worst_{key}"] = min(each + 2 * error for each, error in over)
    if all(TUNED in world for world in found.values()):
        gains = [compare(world, UNIVERSAL, TUNED)[0] for world in found.values()]
        _, figures["mean_gain_over_tuned_se"] = mean_and_error(gains)
    changed = [arm for arm in ARMS["changed"] if arm.endswith(" labels")]
    for arm in (*changed, *others, OWN, FORMER, SEEING):  # the mean over worlds, with its error
        if over := [compare(world, arm, find_same(arm))[0] for world in found.values() if arm in world]:
            key = f"{arm} minus universal"
            figures[key], figures[f"{key} se"] = mean_and_error(over)
    if adapted := [world for world in found.values() if "adapted" in world]:
        each = [compare(world, "adapted", ANOTHER_CPU)[0] for world in adapted]
        figures["adapted_gain"], figures["adapted_gain_se"] = mean_and_error(each)
        if kept := [read_provenance(path) for path in folder.glob("adapted/*/loss.lkd.safetensors")]:
            figures["adapted_cost_in_trainings"] = max(one["cost_in_trainings"] for one in kept)
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in figures.items()}


def format_gain(mean: float, error: float) -> str:
    """A paired difference, with its standard error where there is more than one seed."""
    return f"{mean:+.2f}" if error != error else f"{mean:+.2f} ± {error:.2f}"


def list_shown(found: Worlds) -> list[str]:
    """The arms of the first table, those that are measured in every world."""
    arms = [*HAND_MADE, RULE, UNTRAINED, UNIVERSAL]
    return [arm for arm in arms if all(arm in world for world in found.values())]


def tabulate_worlds(found: Worlds) -> str:
    """A row for each world: accuracies, and the universal loss's gains."""
    shown = list_shown(found)
    rows = []
    for name, world in found.items():
        best = find_best(world)
        cells = [f"{mean(world, arm):.1f}" if arm in world else "" for arm in shown]
        gains = [format_gain(*compare(world, UNIVERSAL, other)) for other in (best, CE)]
        rows.append([name, *cells, best, *gains])
    means = [statistics.fmean(mean(world, arm) for world in found.values()) for arm in shown]
    gaps = [
        statistics.fmean(compare(w, UNIVERSAL, o)[0] for w, o in pair)
        for pair in ([(world, find_best(world)) for world in found.values()], [(world, CE) for world in found.values()])
    ]
    rows.append(["mean", *(f"{each:.1f}" for each in means), "", *(f"{gap:+.2f}" for gap in gaps)])
    heads = ["world", *shown, "best hand-made", "universal − best", "universal − cross-entropy"]
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


def tabulate_arms(found: Worlds, arms: Sequence[str], other: str) -> str:
    """A row for each world that has any of these arms: each less another; and their means over the worlds."""
    shown = {name: world for name, world in found.items() if any(arm in world for arm in arms)}
    rows = [
        [name, f"{mean(world, other):.1f}"]
        + [format_gain(*compare(world, arm, other)) if arm in world else "" for arm in arms]
        for name, world in shown.items()
    ]
    over = [mean_and_error([compare(w, arm, other)[0] for w in shown.values() if arm in w]) for arm in arms]
    average = statistics.fmean(mean(world, other) for world in shown.values())
    rows.append(["mean", f"{average:.1f}", *(format_gain(*each) for each in over)])
    return tabulate(rows, ["world", other, *(f"{arm} −" for arm in arms)], tablefmt="github", disable_numparse=True)


def draw_regrets(found: Worlds, path: Path) -> None:
    """A dot for each world and arm: accuracy less that of the best hand-made loss of the world."""
    shown = list_shown(found)
    figure, axis = plt.subplots(figsize=(9, 4.2), layout="constrained")
    for place, arm in enumerate(shown):
        gaps = [mean(world, arm) - mean(world, find_best(world)) for world in found.values() if arm in world]
        spread = [place + 0.5 * (number / max(len(gaps) - 1, 1) - 0.5) for number in range(len(gaps))]
        axis.scatter(spread, gaps, s=18, color="tab:red" if arm == UNIVERSAL else "tab:blue", alpha=0.7)
        axis.hlines(statistics.fmean(gaps), place - 0.3, place + 0.3, color="black")
    axis.axhline(0, color="grey", linewidth=0.8)
    axis.set_yscale("symlog", linthresh=2)
    axis.set_yticks([-30, -10, -5, -2, -1, 0, 1], ["−30", "−10", "−5", "−2", "−1", "0", "1"], minor=False)
    axis.minorticks_off()
    axis.set_ylim(-40, 1.8)
    axis.set_xticks(range(len(shown)), shown, rotation=20, ha="right")
    axis.set_ylabel("points over the best hand-made loss")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    rows = read_rows(options.run_dir)
    add_rule(rows, options.run_dir)
    found, more = select(rows, "worlds.yaml"), select(rows, "confirmation.yaml")
    options.out.mkdir(parents=True, exist_ok=True)
    changed = [arm for arm in ARMS["changed"] if arm not in (UNIVERSAL, UNKNOWN, NOT_HELD_OUT)]
    changed = [arm for arm in changed if any(arm in world for world in found.values()) and find_same(arm) == UNIVERSAL]
    files = sorted({arm for world in found.values() for arm in world if arm.startswith("without ")})
    tables = [tabulate_worlds(found)]
    without = [arm for arm in (UNKNOWN, NOT_HELD_OUT) if any(arm in world for world in found.values())]
    if without:
        tables.append(tabulate_arms(found, without, CE))
    labels = [arm for arm in changed if arm.endswith(" labels")]
    others = [arm for arm in OTHERS if any(arm in world for world in found.values())]
    for arms in ([arm for arm in changed if arm not in labels] + files, labels, others):
        if arms:
            tables.append(tabulate_arms(found, arms, UNIVERSAL))
    if there := list_with_same_teachers(found):
        tables += [AGAIN, tabulate_arms(found, [UNIVERSAL, *there], ANOTHER_CPU)]
    if ablated := [arm for arm in (NOTHING, *ABLATIONS) if any(arm in world for world in found.values())]:
        learned = {name: world for name, world in found.items() if EVERYTHING in world}
        tables += [ABLATED, tabulate_arms(learned, [arm for arm in ablated if arm != EVERYTHING], EVERYTHING)]
    figures = summarize(found, options.run_dir)
    if more:
        tables += [MORE, tabulate_worlds(more)]
        tables.append(
            tabulate_arms(more, [arm for arm in OTHERS if any(arm in each for each in more.values())], UNIVERSAL)
        )
        if there := list_with_same_teachers(more):
            tables += [AGAIN, tabulate_arms(more, [UNIVERSAL, *there], ANOTHER_CPU)]
        figures["confirmation"] = {
            key: value for key, value in summarize(more, options.run_dir).items() if value is not None
        }
    write_text(options.out / "table.md", "\n\n".join(tables) + "\n")
    draw_regrets(found, options.out / "regrets.png")
    command = "python benchmarks/universal/run.py DATA RUN_DIR && python benchmarks/universal/report.py RUN_DIR OUT"
    write_json(options.out / "result.json", evidence(command, environment(), figures))
    print("\n\n".join(tables))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
