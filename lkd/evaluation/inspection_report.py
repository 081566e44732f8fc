"""`lkd inspect`: from a loss to a report for the terminal, a JSON file and a picture."""

from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from tabulate import tabulate

from lkd.config.evaluation import InspectRecipe
from lkd.core.errors import UserError
from lkd.core.files import hash_file, write_json
from lkd.evaluation.inspection import STAGES, TEMPERATURES, inspect_loss
from lkd.evaluation.report.page import render
from lkd.export.share import describe_training
from lkd.losses.build import build_loss, is_learned
from lkd.losses.learned.file import SUFFIX, LossFile, mark_unlearned, was_learned
from lkd.losses.logits import KDLoss
from lkd.meta_training.log import EXTENT, find_kept_row, save_figure
from lkd.tracking.remote import fetch_named, is_remote


def inspect_recipe(recipe: InspectRecipe) -> tuple[str, Path]:
    """Inspect a loss; write inspection.json and inspection.png. Returns the report for the terminal, and the folder."""
    kd = KDLoss(recipe.kd_weight, recipe.kd_temperature)
    options = {"name": recipe.loss} if isinstance(recipe.loss, str) else dict(recipe.loss)
    asked = str(options.get("name"))
    if isinstance(options.get("name"), str):
        options["name"] = fetch_named(options["name"])
    loss = build_loss(options, STAGES, STAGES)  # losses over features are built for made-up stages
    name = options.pop("name")
    if loss.needs_index:
        raise UserError(f"loss {name!r} keeps a memory of every training image; it cannot be inspected without them")
    file = describe_file(name) if is_learned(name) else None
    described = f" ({', '.join(f'{key} {value}' for key, value in options.items())})" if options else ""
    title = mark_unlearned(Path(name).name, file["learned"]) if file else name + described
    plain = Path(name).name.removesuffix(SUFFIX)
    beside = Path(name).parent if file and not is_remote(asked) else Path()  # not in the Hub's cache
    folder = Path(recipe.out) if recipe.out else beside / f"{plain}-inspection"
    report = inspect_loss(loss, kd, recipe.num_classes, recipe.seed)
    write_json(folder / "inspection.json", {"loss": recipe.loss, "file": file, **report})
    draw_inspection(report, title, folder / "inspection.png")
    return format_inspection(report, file, title), folder


def describe_file(name: str) -> dict[str, Any]:
    """Size, hash and format of a learned loss's file, and what it says that it was trained with, if it does."""
    path, _, header = LossFile.read(name)
    provenance = header.get("provenance") or {}
    kept, reuse = find_kept_row(provenance.get("curve") or [], provenance.get("kept_step")), provenance.get("reuse")
    return {
        "path": str(path),
        "bytes": path.stat().st_size,
        "sha256": hash_file(path),
        "format_version": header["format_version"],
        "trained_with": describe_training(provenance) if "recipe" in provenance else None,
        "learned": was_learned(header),
        "fresh_students": min(reuse or [], key=lambda row: row["calibrated_cross_entropy"], default=None),
        "gradient_shares": {k.removeprefix("share/"): v for k, v in kept.items() if k.startswith("share/")},
    }


# ----------------------------------------------------------------------------------------------------------------------
# The picture: the gradient field, the balance that is implied, what is set in made-up worlds, how stages are paired.

COLORS = matplotlib.colormaps["viridis"]
STYLE: Any = {
    "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "legend.fontsize": 8, "figure.titlesize": 10.5, "lines.linewidth": 1.2, "lines.markersize": 4,
}  # fmt: skip


def draw_inspection(report: dict[str, Any], name: str, path: Path) -> None:
    """Draw what `inspect_loss` found of the loss of this name."""
    learned, choices = report["pairing"], report["choices"] or {}
    tables = {title: choices[key] for key, title in CHOICES.items() if choices}
    trust = choices.get("trust")
    rows = 2 * (report["field"] is not None) + len(tables) + (trust is not None) + (learned is not None)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(14.5, 0.5 + 3.5 * rows), layout="constrained")
        figure.suptitle(f"What {name} does to a student, found out without a training", fontsize=13)
        bands: Any = list(figure.subfigures(rows, 1, squeeze=False)[:, 0])
        if report["field"] is not None:
            draw_field(bands.pop(0), report)
            draw_balance(bands.pop(0), report)
        for title, table in tables.items():
            draw_choices(bands.pop(0), table, title)
        if trust is not None:
            draw_trust(bands.pop(0), trust)
        if learned is not None:
            draw_pairing(bands.pop(0), learned)
        save_figure(figure, path)


def name_fields(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The gradient fields by what they are of: the loss at three progresses, KD, cross-entropy."""
    field, kd = report["field"], report["kd"]
    named = {f"this loss, {describe_progress(row['progress'])}": row for row in field["loss"]}
    named[f"KD, weight {kd['weight']:g}, τ {kd['temperature']:g}"] = field["kd"]
    return named | {"cross-entropy": field["cross_entropy"]}


def draw_field(band: Any, report: dict[str, Any]) -> None:
    """Five maps of one scale."""
    panels = name_fields(report)
    surfaces = [np.array(row["gradient"]) for row in panels.values()]
    bound = float(np.abs(surfaces).max())
    band.suptitle(
        "Gradient at the student's logit of the label. Blue: the label's probability is pushed up, red: down; "
        "black line: where the student is left alone"
    )
    axes = band.subplots(1, len(panels), sharey=True)
    style: dict[str, Any] = {"origin": "lower", "extent": EXTENT, "aspect": "auto", "cmap": "RdBu_r"}
    for axis, (title, row), surface in zip(axes, panels.items(), surfaces, strict=True):
        picture = axis.imshow(surface, vmin=-bound, vmax=bound, **style)
        axis.plot(row["rest"], report["field"]["confidence"], color="black", lw=1.8)
        axis.set(title=title, xlabel="student's probability of the label", xlim=(0, 1), ylim=(0, 1))
    axes[0].set_ylabel("teacher's probability of the label")
    band.colorbar(picture, ax=axes, pad=0.01)


def draw_balance(band: Any, report: dict[str, Any]) -> None:
    """Share of the teacher and effective temperature over progress, and over confidence."""
    rows, own = report["balance"]["over_progress"], report["own_balance"]
    band.suptitle(
        "Implied balance: the w_ce · cross-entropy + w_kd · KD(τ) that this loss is most like (least squares), "
        "and how much of its gradient that explains"
    )
    share, temperature, explained, confidence = band.subplots(1, 4)
    draw_over_progress(share, rows, "share", "teacher's share, w_kd / (w_ce + w_kd)")
    draw_over_progress(temperature, rows, "temperature", "effective temperature, τ")
    draw_over_progress(explained, rows, "explained", "explained part of the gradient, R²")
    if own:
        dashed = {"color": "tab:red", "ls": "--", "label": "its own α (ramped) and τ, means"}
        progress = [row["progress"] for row in own]
        taught = [row["weight"] * row.get("ramp", 1.0) for row in own]
        share.plot(progress, [w / (1 - row["weight"] + w) for w, row in zip(taught, own, strict=True)], **dashed)
        temperature.plot(progress, [row["temperature"] for row in own], **dashed)
    share.set_ylim(-0.03, 1.03)
    explained.set_ylim(min(0.5, *explained.get_ylim()), 1.03)
    temperature.set_ylim(0, max(5.0, temperature.get_ylim()[1]))
    handles, labels = share.get_legend_handles_labels()
    band.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9)
    for who, color in (("student", "tab:blue"), ("teacher", "tab:orange")):
        row = [fit for fit in report["balance"][f"over_{who}"] if fit["share"] is not None]
        places = [fit["confidence"] for fit in row]
        confidence.plot(places, [fit["share"] for fit in row], marker="o", color=color, label=f"the {who}'s")
        bounds = list(zip(*(fit["shares_as_good"] for fit in row), strict=True))
        confidence.fill_between(places, *bounds, color=color, alpha=0.15, lw=0)
    title = "teacher's share halfway (band: explains 1 % less)"
    confidence.set(title=title, xlabel="probability of the label", xlim=(0, 1), ylim=(-0.03, 1.03))
    confidence.legend()


def draw_over_progress(axis: Axes, rows: list[dict[str, Any]], key: str, title: str) -> None:
    """A figure of the fit over progress: of all states, with what is as good, and of students of some confidences."""
    progress, students = [row["progress"] for row in rows], rows[0]["students"]
    for place in (0, len(students) // 2, len(students) - 1):
        level = students[place]["confidence"]
        values = np.array([row["students"][place][key] for row in rows], float)  # where there is none, a gap
        axis.plot(progress, values, color=COLORS(0.1 + 0.8 * level), label=f"students who give the label {level:g}")
    spans = np.array([row.get(f"{key}s_as_good") or (None, None) for row in rows], float)
    axis.fill_between(progress, *spans.T, color="0.5", alpha=0.2, lw=0, label="explains at most 1 % less")
    values = np.array([row[key] for row in rows], float)
    axis.plot(progress, values, color="black", lw=2.4, label="all students together")
    axis.set(title=title, xlabel="progress of the training", xlim=(0, 1))


CHOICES = {
    "agreement": "What it sets of a sample by who agrees with whom, and when",
    "context": (
        "What it sets of a sample by the batch that it is in (40 % of the labels wrong; teacher wrong on half) and by "
        "what it is told, halfway"
    ),
}
SYMBOLS = {
    "weight": "α, the teacher's weight",
    "temperature": "τ, the temperature",
    "factor": "β, factor of the other classes",
    "calibration": "κ, the teacher is calibrated by Tᵏ",
}


def draw_choices(band: Any, table: dict[str, Any], title: str) -> None:
    """A map for each of α, τ, β and κ: rows are who agrees with whom."""
    columns = list(table.values())
    cases = list(columns[0])
    names = [name for name in SYMBOLS if any(name in rows["the whole batch"] for rows in columns)]
    band.suptitle(f"{title}. Means over samples of made-up worlds")
    axes = band.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        shown = np.array([[rows[case].get(name) for rows in columns] for case in cases], float)
        draw_map(axis, shown, cases, [column.replace(" ", "\n") for column in table], "viridis")
        axis.set_title(SYMBOLS[name])


def draw_map(axis: Axes, values: Any, rows: list[str], columns: list[str], colors: str) -> None:
    """A table of values as colours, and as numbers in them."""
    picture = axis.imshow(values, cmap=colors, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        text, color = "–" if np.isnan(value) else f"{value:.2f}", "w" if sum(picture.to_rgba(value)[:3]) < 1.5 else "k"
        axis.text(column, row, text, ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(columns)), columns, fontsize=8)
    axis.set_yticks(range(len(rows)), rows, fontsize=8)


def draw_trust(band: Any, trust: dict[str, Any]) -> None:
    """α, τ, β and κ over how often the teacher is right."""
    band.suptitle(
        "What it sets over trust, halfway; means over whole made-up batches. Lines: told what would be measured there, "
        "dotted: not told"
    )
    names = [name for name in SYMBOLS if any(name in line["means"][0] for line in trust["lines"])]
    axes = band.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names, strict=True):
        for number, line in enumerate(trust["lines"]):
            values = np.array([means.get(name) for means in line["means"]], float)
            right, own = 1 - line["wrong_labels"], line["own_accuracy"]
            label = f"{right:.0%} of the labels right, student at {own:.0%}" if line["told"] else None
            style = "-" if line["told"] else ":"
            axis.plot(trust["teacher_accuracies"], values, style, color=f"C{number // 2}", marker="o", label=label)
        axis.set(title=SYMBOLS[name], xlabel="teacher's agreement with meta-validation labels", xlim=(0, 1))
    handles, labels = axes[0].get_legend_handles_labels()
    band.legend(handles, labels, loc="outside lower left", ncols=len(labels), fontsize=9)


def draw_pairing(band: Any, learned: list[dict[str, Any]]) -> None:
    """Which stages are matched, and each comparison's weight."""
    names = [f"{stage}\ndepth {depth:.2f}" for stage, depth in learned[0]["student"].items()]
    band.suptitle(
        "Features: whom each of the student's stages learns from (rows sum to 1), and how much each comparison counts "
        "there; shown for two networks of four stages"
    )
    pairing, *weights = band.subplots(1, 1 + len(learned))
    draw_map(pairing, np.array(learned[len(learned) // 2]["assignment"]), names, names, "Greys")
    pairing.set(title="pairing", xlabel="teacher's stage", ylabel="student's stage")
    ticks, top = range(len(names)), max(max(values) for row in learned for values in row["weights"].values())
    for axis, at in zip(weights, learned, strict=True):
        for offset, (comparison, heights) in enumerate(at["weights"].items()):
            axis.bar([x + 0.27 * (offset - 1) for x in ticks], heights, 0.25, label=comparison)
        title = f"weights, {describe_progress(at['progress'])}"
        axis.set(title=title, xlabel="student's stage", ylim=(0, 1.2 * top))
        axis.set_xticks(ticks, names, fontsize=8)
    weights[0].legend(ncols=3, loc="upper center")


def describe_progress(progress: float) -> str:
    """Where in the training that is."""
    return {0.0: "at the start", 0.5: "halfway", 1.0: "at the end"}.get(progress, f"at progress {progress:g}")


# ----------------------------------------------------------------------------------------------------------------------
# The report for the terminal.

SHOWN = (0.1, 0.5, 0.9)
OWN = {"weight": "own α", "ramp": "ramp", "temperature": "own τ", "factor": "own β"}


def format_inspection(report: dict[str, Any], file: dict[str, Any] | None, name: str) -> str:
    """All of what `inspect_loss` found, and `describe_file`, of a loss of this name that has a file."""
    tables = {
        "field": tabulate_field(report) if report["field"] else "",
        "balance": tabulate_balance(report) if report["field"] else "",
        "choices": tabulate_choices(report["choices"]) if report["choices"] else {},
        "shares": tabulate_shares(report, file),
        "pairing": tabulate_pairing(report["pairing"]) if report["pairing"] else "",
    }
    return render("inspection.txt", report=report, file=file, name=name, **tables).rstrip("\n")


def format_table(rows: list[list[Any]], headers: list[str], decimals: str | tuple[str, ...]) -> str:
    """A table whose first column are names."""
    return tabulate(rows, ["", *headers], "plain", floatfmt=decimals, missingval="-", numalign="decimal")


def tabulate_field(report: dict[str, Any]) -> str:
    """Where it leaves the student alone."""
    confidence = report["field"]["confidence"]
    places = [min(range(len(confidence)), key=lambda i: abs(confidence[i] - shown)) for shown in SHOWN]
    rows = [[label, *(row["rest"][place] for place in places)] for label, row in name_fields(report).items()]
    return format_table(rows, [f"teacher {shown:g}" for shown in SHOWN], ".2f")


def tabulate_balance(report: dict[str, Any]) -> str:
    """The balance that it implies."""
    balance = report["balance"]
    own = {row["progress"]: row for row in report["own_balance"]}
    extra = [key for key in OWN if own and key in own[0.0]]
    rows = [
        [f"progress {row['progress']:g}", *list_fit(row), *(own[row["progress"]][key] for key in extra)]
        for row in balance["over_progress"][::2]
    ]
    for who in ("student", "teacher"):
        fits = balance[f"over_{who}"][::3]
        rows += [[f"{who} at {fit['confidence']:g}, halfway", *list_fit(fit)] for fit in fits]
    headers = ["w_ce", "w_kd", "share", "as good", "τ", "as good", "R²", *(OWN[key] for key in extra)]
    return format_table(rows, headers, ("", *[".2f"] * 4, ".1f", "", ".3f", *[".2f"] * len(extra)))


def list_fit(fit: dict[str, Any]) -> list[Any]:
    """One fit's columns."""

    def show(temperature: float) -> str:
        low, high = TEMPERATURES  # of the search, which may have run into a bound
        if temperature > 0.99 * high:
            return f"≥{high:g}"
        return f"≤{low:g}" if temperature < 1.01 * low else f"{temperature:.1f}"

    shares, temperature = fit["shares_as_good"], fit["temperature"]
    return [
        fit["task"],
        fit["distillation"],
        fit["share"],
        shares and "–".join(f"{share:.2f}" for share in shares),
        temperature and show(temperature),
        temperature and "–".join(show(each) for each in fit["temperatures_as_good"]),
        fit["explained"],
    ]


def tabulate_choices(choices: dict[str, Any]) -> dict[str, str]:
    """The α that it sets in made-up worlds."""
    tables = {}
    for key, title in CHOICES.items():
        cases = next(iter(choices[key].values()))
        rows = [[case, *(column[case]["weight"] for column in choices[key].values())] for case in cases]
        tables[title] = format_table(rows, list(choices[key]), ".2f")
    return tables


def tabulate_shares(report: dict[str, Any], file: dict[str, Any] | None) -> str:
    """How much each term pulls."""
    columns = {describe_progress(row["progress"]): row["shares"] for row in report["shares"]}
    if file and file["gradient_shares"]:
        columns["as logged*"] = file["gradient_shares"]
    rows = [[term, *(shares.get(term, 0.0) for shares in columns.values())] for term in report["shares"][0]["shares"]]
    return format_table(rows, list(columns), ".3f")


def tabulate_pairing(pairing: list[dict[str, Any]]) -> str:
    """Which stages are matched."""
    rows = []
    for at in pairing:
        for number, (stage, depth) in enumerate(at["student"].items()):
            weights = [values[number] for values in at["weights"].values()]
            rows.append([f"{describe_progress(at['progress'])}, {stage}", depth, *at["assignment"][number], *weights])
    return format_table(rows, ["depth", *(f"← {stage}" for stage in at["teacher"]), *at["weights"]], ".2f")
