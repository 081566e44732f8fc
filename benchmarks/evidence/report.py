"""Tables, pictures, `result.json` and the text of docs/evidence/learned_loss."""

import csv
from pathlib import Path

from figures import FORMER, HAND_MADE, LEARNED, NOT_LEARNED, Accuracies, find_best_hand_made, gain, read_accuracies
from pictures import draw_gains, draw_learned, draw_settings
from settings import (
    BOTH,
    BOTH_NOT_LEARNED,
    BUDGET,
    CLEAN,
    FEWER_SEEDS,
    SEEDS,
    SETTINGS,
    SIGN_CHANGES,
    STUDENT,
    UNSEEN,
)
from speed_report import OUT as SPEED
from speed_report import record
from text import README, tabulate_goals

from lkd.config import CompareRecipe, MetaTrainRecipe
from lkd.core.files import read_json, write_json, write_text
from lkd.core.statistics import mean_and_error
from lkd.evaluation.comparison.tables import format_figure
from lkd.losses.learned.file import SUFFIX, load_loss, read_provenance
from lkd.losses.learned.shares import balance_surface
from lkd.meta_training.reuse import SCORE
from lkd.tracking.run import evidence

EVIDENCE = Path(__file__).parents[2] / "docs" / "evidence" / "learned_loss"
COMMAND = "python benchmarks/evidence/run.py DATA_ROOT"
FIXED = "KD(0.5, 4)"


def write_report(folder: Path, comparisons: dict[str, CompareRecipe], learned: dict[str, MetaTrainRecipe]) -> None:
    """Write everything; only what the comparisons left is read."""
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    for name, recipe in comparisons.items():
        merge_rows(Path(recipe.run_dir) / "cells.csv", EVIDENCE / name / "cells.csv")
    accuracies = {name: read_accuracies(EVIDENCE / name, comparisons[name].students[0].name) for name in comparisons}
    unseen = read_accuracies(EVIDENCE / CLEAN, UNSEEN)
    provenance = {name: read_provenance(Path(recipe.run_dir) / f"loss{SUFFIX}") for name, recipe in learned.items()}
    figures = list_figures(accuracies, unseen, provenance[CLEAN]["cost_in_trainings"])
    environment = read_json(Path(learned[CLEAN].run_dir) / "environment.json")
    write_json(EVIDENCE / "result.json", evidence(COMMAND, environment, figures))
    record(SPEED, figures_of_speed(accuracies))
    draw_settings({name: accuracies[name] for name in (CLEAN, *SIGN_CHANGES)}, FIXED, EVIDENCE / "settings.png")
    draw_gains(accuracies | {"unseen_student": unseen}, EVIDENCE / "gains.png")
    for name in (CLEAN, *SIGN_CHANGES):
        draw_learned(Path(learned[name].run_dir) / f"loss{SUFFIX}", EVIDENCE / f"learned-{name}.png")
    tables = {
        "settings": tabulate_settings(accuracies),
        "transfer": tabulate_transfer(accuracies, unseen),
        "both": tabulate_both(accuracies),
        "costs": tabulate_costs(provenance),
    }
    text = README.format(
        command=COMMAND,
        budget=BUDGET,
        seeds=SEEDS,
        fewer=FEWER_SEEDS,
        goals=tabulate_goals(figures),
        learned=describe_learned(learned),
        initial=", ".join(f"`{name}`" for name, known in provenance.items() if best_step(known) == 0) or "none",
        **tables,
    )
    write_text(EVIDENCE / "README.md", text)
    print(text)


def merge_rows(made: Path, kept: Path) -> None:
    """Put a comparison's rows in the place of those of the same methods; others stay as they are."""
    rows: list[dict[str, str]] = []
    for path in (kept, made):
        if path.exists():
            with path.open(newline="") as file:
                new = list(csv.DictReader(file))
            rows = [row for row in rows if row["method"] not in {each["method"] for each in new}] + new
    kept.parent.mkdir(exist_ok=True)
    with kept.open("w", newline="") as file:
        names = list(dict.fromkeys(name for row in rows for name in row))  # older rows have fewer
        writer = csv.DictWriter(file, names, lineterminator="\n", restval="")
        writer.writeheader()
        writer.writerows(rows)


def list_figures(accuracies: dict[str, Accuracies], unseen: Accuracies, cost: float) -> dict[str, float]:
    """The figures; gain = learned − the best hand-made loss, each tuned, in points."""
    gaps = [gain(accuracies[name], LEARNED)[0] for name in SIGN_CHANGES]
    fixed = [gain(accuracies[name], LEARNED, FIXED)[0] for name in SIGN_CHANGES]
    initial = [gain(accuracies[name], LEARNED, NOT_LEARNED)[0] for name in SIGN_CHANGES]
    same, same_error = gain(accuracies[CLEAN], LEARNED)
    other, other_error = gain(unseen, LEARNED)
    figures = {
        "seeds": len(accuracies[CLEAN][LEARNED]),
        "worst_gap_over_settings": min(gaps),
        "mean_gain_over_settings": sum(gaps) / len(gaps),
        "mean_gain_over_fixed_default": sum(fixed) / len(fixed),
        "mean_gain_over_initial_loss": sum(initial) / len(initial),
        "gain_same_student": same,
        "gain_same_student_in_se": same / same_error,
        "gain_unseen_student": other,
        "gain_unseen_student_in_se": other / other_error,
        "gain_other_teacher": gain(accuracies["other_teacher"], LEARNED)[0],
        "gain_other_data": gain(accuracies["digits"], LEARNED)[0],
        "other_data_minus_kd": gain(accuracies["digits"], LEARNED, "KD")[0],
        "cost_in_trainings": cost,
        "bad_teacher_minus_ce": gain(accuracies["bad_teacher"], LEARNED, "CE")[0],
    }
    return {name: round(value, 4) for name, value in figures.items()}


def figures_of_speed(accuracies: dict[str, Accuracies]) -> dict[str, float]:
    """What the cheaper defaults lose, in the five settings, and what the loss over features too gains."""
    both = accuracies["both"] | {LEARNED: accuracies[CLEAN][LEARNED]}
    gain_of_both, error = gain(both, BOTH, LEARNED)
    losses = [gain(accuracies[name], LEARNED, FORMER) for name in (CLEAN, *SIGN_CHANGES)]
    return {
        "both_gain": gain_of_both,
        "both_gain_se": error,
        "both_gain_of_learning": gain(both, BOTH, BOTH_NOT_LEARNED)[0],
        "reuse_minus_today_worst": min(mean for mean, _ in losses),
        "reuse_minus_today_worst_plus_2_se": min(mean + 2 * each for mean, each in losses),
        "reuse_minus_today_mean": sum(mean for mean, _ in losses) / len(losses),
    }


def tabulate_settings(accuracies: dict[str, Accuracies]) -> str:
    """Every setting against every loss; the gain is over the best hand-made loss there."""
    methods = [*(m for m in HAND_MADE if m != "DIST"), NOT_LEARNED, FORMER, LEARNED]
    lines = [f"| setting | {' | '.join(methods)} | learned − best | best |", "|---" * (len(methods) + 3) + "|"]
    for name, setting in SETTINGS.items():
        found = accuracies[name]
        cells = [
            format_figure(mean_and_error(list(found[method].values()))) if method in found else "" for method in methods
        ]
        best = find_best_hand_made(found)
        lines.append(
            f"| {setting.title} | {' | '.join(cells)} | {format_figure(gain(found, LEARNED), True)} | {best} |"
        )
    return "\n".join(lines) + "\n"


def tabulate_transfer(accuracies: dict[str, Accuracies], unseen: Accuracies) -> str:
    """All arms on the student that losses were learned with, on one never seen, with another teacher, on other data."""
    columns = {
        f"{STUDENT} (seen)": accuracies[CLEAN],
        f"{UNSEEN} (unseen)": unseen,
        "another teacher": accuracies["other_teacher"],
        "digits": accuracies["digits"],
    }
    methods = [*HAND_MADE, NOT_LEARNED, LEARNED, FORMER, "learned on other data"]
    lines = [f"| loss | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for method in methods:
        cells = [
            format_figure(mean_and_error(list(found[method].values()))) if method in found else ""
            for found in columns.values()
        ]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    gains = [
        f"{format_figure(gain(found, LEARNED), True)} ({find_best_hand_made(found)})" for found in columns.values()
    ]
    return "\n".join([*lines, f"| learned − best hand-made | {' | '.join(gains)} |"]) + "\n"


def tabulate_both(accuracies: dict[str, Accuracies]) -> str:
    """The loss over features too, beside itself before learning and the one over logits alone; same student, clean."""
    found = {LEARNED: accuracies[CLEAN][LEARNED]} | accuracies["both"]
    lines = ["| loss | accuracy % | − learned over logits | seeds |", "|---|---|---|---|"]
    for method, seeds in found.items():
        difference = "" if method == LEARNED else format_figure(gain(found, method, LEARNED), True)
        figure = format_figure(mean_and_error(list(seeds.values())))
        lines.append(f"| {method} | {figure} | {difference} | {len(seeds)} |")
    return "\n".join(lines) + "\n"


def describe_learned(learned: dict[str, MetaTrainRecipe]) -> str:
    """Weight and temperature of the learned losses, averaged over confidences, early and late in a training."""
    columns = (
        "setting",
        "α, start",
        "α, end",
        "α, teacher sure of the label",
        "α, teacher against it",
        "τ, start",
        "τ, end",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name in (CLEAN, *SIGN_CHANGES):
        loss = load_loss(Path(learned[name].run_dir) / f"loss{SUFFIX}")
        (start, start_heat), (middle, _), (end, end_heat) = (balance_surface(loss, p) for p in (0.0, 0.5, 1.0))
        rows = len(middle)
        figures = (start.mean(), end.mean(), middle[-rows // 5 :].mean(), middle[: rows // 5].mean())
        heats = (start_heat.mean(), end_heat.mean())
        cells = [*(f"{float(figure):.2f}" for figure in figures), *(f"{float(heat):.1f}" for heat in heats)]
        lines.append(f"| {SETTINGS[name].title} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def best_step(provenance: dict) -> int:
    """The outer step after which the saved loss was the best by reuse."""
    return int(min(provenance["reuse"], key=lambda row: row[SCORE])["step"])


def tabulate_costs(provenance: dict[str, dict]) -> str:
    """What learning each loss cost, in units of one training of its student."""
    lines = ["| loss | pool | outer loop and reuse | in all, trainings | minutes |", "|---|---|---|---|---|"]
    for name, known in provenance.items():
        pool, whole = known["parts_in_trainings"]["pool"], known["cost_in_trainings"]
        lines.append(f"| {name} | {pool:.1f} | {whole - pool:.1f} | {whole:.1f} | {known['seconds'] / 60:.1f} |")
    return "\n".join(lines) + "\n"
