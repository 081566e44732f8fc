"""The picture of an inspection: its gradient field, the balance it implies, and how it pairs stages."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from lkd.plots import EXTENT, plt, save_figure

COLORS = plt.get_cmap("viridis")


def draw_inspection(report: dict[str, Any], name: str, path: Path) -> None:
    """Draw it.

    Args:
        report: What `inspect_loss` found.
        name: The loss's.
        path: The picture.
    """
    learned = (report["pairing"] or {}).get("learned")
    rows = 2 * (report["field"] is not None) + (learned is not None)
    figure = plt.figure(figsize=(14.5, 0.5 + 3.5 * rows), layout="constrained")
    figure.suptitle(f"What {name} does to a student, found out without a training", fontsize=13)
    bands: Any = list(figure.subfigures(rows, 1, squeeze=False)[:, 0])
    if report["field"] is not None:
        draw_field(bands.pop(0), report)
        draw_balance(bands.pop(0), report)
    if learned is not None:
        draw_pairing(bands.pop(0), learned)
    save_figure(figure, path)


def draw_field(band: Any, report: dict[str, Any]) -> None:
    """Five maps of one scale: the loss at three progresses, KD, cross-entropy."""
    field, kd = report["field"], report["kd"]
    panels = [(f"this loss, {describe_progress(row['progress'])}", row) for row in field["loss"]]
    panels += [
        (f"KD, weight {kd['weight']:g}, τ {kd['temperature']:g}", field["kd"]),
        ("cross-entropy", field["cross_entropy"]),
    ]
    surfaces = [torch.tensor(row["gradient"]) for _, row in panels]
    bound = max(float(surface.abs().max()) for surface in surfaces)
    band.suptitle(
        "Gradient at the student's logit of the label. Blue: the label's probability is pushed up, red: down; "
        "black line: where the student is left alone",
        fontsize=10.5,
    )
    axes = band.subplots(1, len(panels), sharey=True)
    for axis, (title, row), surface in zip(axes, panels, surfaces, strict=True):
        picture = axis.imshow(
            surface.numpy(), origin="lower", extent=EXTENT, aspect="auto", cmap="RdBu_r", vmin=-bound, vmax=bound
        )
        axis.plot(row["rest"], field["confidence"], color="black", lw=1.8)
        axis.set(title=title, xlabel="student's probability of the label", xlim=(0, 1), ylim=(0, 1))
        axis.title.set_fontsize(10)
    axes[0].set_ylabel("teacher's probability of the label")
    band.colorbar(picture, ax=axes, pad=0.01)


def draw_balance(band: Any, report: dict[str, Any]) -> None:
    """Share of the teacher and effective temperature over progress, and over confidence."""
    rows, own = report["balance"]["over_progress"], report["own_balance"]
    band.suptitle(
        "Implied balance: the w_ce · cross-entropy + w_kd · KD(τ) that this loss is most like (least squares), "
        "and how much of its gradient that explains",
        fontsize=10.5,
    )
    share, temperature, explained, confidence = band.subplots(1, 4)
    for axis, key, title in (
        (share, "share", "teacher's share, w_kd / (w_ce + w_kd)"),
        (temperature, "temperature", "effective temperature, τ"),
        (explained, "explained", "explained part of the gradient, R²"),
    ):
        draw_over_progress(axis, rows, key)
        axis.set_title(title, fontsize=10)
    if own:
        dashed = {"color": "tab:red", "ls": "--", "label": "its own α, with its ramp, and τ; means"}
        progress = [row["progress"] for row in own]
        share.plot(progress, [ramp_weight(row) for row in own], **dashed)
        temperature.plot(progress, [row["temperature"] for row in own], **dashed)
    share.set_ylim(-0.03, 1.03)
    explained.set_ylim(min(0.5, *explained.get_ylim()), 1.03)
    temperature.set_ylim(0, max(5.0, temperature.get_ylim()[1]))
    handles, labels = share.get_legend_handles_labels()
    band.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=9)
    for who, color in (("student", "tab:blue"), ("teacher", "tab:orange")):
        row = [fit for fit in report["balance"][f"over_{who}"] if fit["share"] is not None]
        places, values = [fit["confidence"] for fit in row], [fit["share"] for fit in row]
        confidence.plot(places, values, marker="o", ms=4, color=color, label=f"the {who}'s")
        bounds = list(zip(*(fit["shares_as_good"] for fit in row), strict=True))
        confidence.fill_between(places, *bounds, color=color, alpha=0.15, lw=0)
    confidence.set(xlabel="probability of the label", xlim=(0, 1), ylim=(-0.03, 1.03))
    confidence.set_title("teacher's share halfway (band: explains 1 % less)", fontsize=10)
    confidence.legend(frameon=False, fontsize=8)
    for axis in (share, temperature, explained, confidence):
        axis.spines[["top", "right"]].set_visible(False)


def ramp_weight(own: dict[str, float]) -> float:
    """A form's own α, with what its ramp leaves of the teacher."""
    taught = own["weight"] * own.get("ramp", 1.0)
    return taught / (1 - own["weight"] + taught)


def draw_over_progress(axis: Axes, rows: list[dict[str, Any]], key: str) -> None:
    """A figure of the fit over progress: of all states, with what is as good, and of students of some confidences."""
    progress = [row["progress"] for row in rows]
    students = rows[0]["students"]
    for position in (0, len(students) // 2, len(students) - 1):
        level = students[position]["confidence"]
        values = [number(row["students"][position][key]) for row in rows]
        axis.plot(
            progress, values, color=COLORS(0.1 + 0.8 * level), lw=1.2, label=f"students who give the label {level:g}"
        )
    spans = [row.get(f"{key}s_as_good") or (None, None) for row in rows]
    low, high = ([number(bound) for bound in bounds] for bounds in zip(*spans, strict=True))
    axis.fill_between(progress, low, high, color="0.5", alpha=0.2, lw=0, label="explains at most 1 % less")
    axis.plot(progress, [number(row[key]) for row in rows], color="black", lw=2.4, label="all students together")
    axis.set(xlabel="progress of the training", xlim=(0, 1))


def draw_pairing(band: Any, learned: list[dict[str, Any]]) -> None:
    """Which stages are matched, and each comparison's weight."""
    first, middle = learned[0], learned[len(learned) // 2]
    names = [f"{stage}\ndepth {depth:.2f}" for stage, depth in first["student"].items()]
    band.suptitle(
        "Features: whom each of the student's stages learns from (rows sum to 1), and how much each comparison counts "
        "there; shown for two networks of four stages",
        fontsize=10.5,
    )
    pairing, *weights = band.subplots(1, 1 + len(learned))
    table = torch.tensor(middle["assignment"])
    pairing.imshow(table.numpy(), cmap="Greys", vmin=0, vmax=1, aspect="auto")
    for place, share in enumerate(table.flatten().tolist()):
        row, column = divmod(place, len(names))
        pairing.text(column, row, f"{share:.2f}", ha="center", va="center", color="white" if share > 0.5 else "k")
    ticks = range(len(names))
    pairing.set_xticks(ticks, names, fontsize=8)
    pairing.set_yticks(ticks, names, fontsize=8)
    pairing.set(xlabel="teacher's stage", ylabel="student's stage")
    pairing.set_title("pairing", fontsize=10)
    top = max(max(values) for row in learned for values in row["weights"].values())
    for axis, at in zip(weights, learned, strict=True):
        for offset, (comparison, heights) in enumerate(at["weights"].items()):
            axis.bar([x + 0.27 * (offset - 1) for x in ticks], heights, 0.25, label=comparison)
        axis.set_xticks(ticks, names, fontsize=8)
        axis.set_ylim(0, 1.2 * top)
        axis.set_title(f"weights, {describe_progress(at['progress'])}", fontsize=10)
        axis.set_xlabel("student's stage")
        axis.spines[["top", "right"]].set_visible(False)
    weights[0].legend(frameon=False, fontsize=8, ncols=3, loc="upper center")


def describe_progress(progress: float) -> str:
    """Where in the training that is."""
    return {0.0: "at the start", 0.5: "halfway", 1.0: "at the end"}.get(progress, f"at progress {progress:g}")


def number(value: float | None) -> float:
    """A gap in the curve where there is none."""
    return float("nan") if value is None else value
