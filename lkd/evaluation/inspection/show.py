"""An inspection as a report for the terminal, and as a picture."""

from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes

from lkd.evaluation.inspection.balance_fit import TEMPERATURES
from lkd.meta_training.log import EXTENT, plt, save_figure

# ----------------------------------------------------------------------------------------------------------------------
# The picture of an inspection: its gradient field, the balance it implies, and how it pairs stages.

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


# ----------------------------------------------------------------------------------------------------------------------
# An inspection as a report for the terminal.

SHOWN = (0.1, 0.5, 0.9)


def format_inspection(report: dict[str, Any], file: dict[str, Any] | None, name: str) -> str:
    """All of it.

    Args:
        report: What `inspect_loss` found.
        file: What `describe_file` found; None for a loss that has none.
        name: The loss's.
    """
    sections = [
        format_identity(report, file, name),
        *([format_field(report)] if report["field"] else []),
        *([format_balance(report)] if report["balance"] else []),
        format_shares(report, file),
        *([format_pairing(report["pairing"])] if report["pairing"] else []),
        format_invariances(report["invariances"]),
    ]
    return "\n\n".join(sections)


def format_identity(report: dict[str, Any], file: dict[str, Any] | None, name: str) -> str:
    """What it is and where it comes from."""
    parts = [f"{part}: {found['form']}" for part, found in report["parts"].items()]
    lines = [f"{name}: {', '.join(parts)}; {report['parameters']:,} parameters"]
    if file is None:
        return "\n".join([*lines, "  a hand-made loss: nothing was learned"])
    size = f"{file['bytes'] / 1e3:.1f} kB"
    lines.append(f"  file       {size}, format version {file['format_version']}, sha256 {file['sha256'][:12]}")
    origin = file["trained_with"]
    if origin is None:
        return "\n".join([*lines, "  origin     the file does not say what it was trained with"])
    flipped = f", {origin['label_noise']:.0%} of the labels flipped" if origin["label_noise"] else ""
    random = f", random answers on {origin['random_answers']:.0%}" if origin["random_answers"] else ""
    lines += [
        f"  students   {', '.join(origin['students'])}; teacher {origin['teacher']}{random}",
        f"  data       {origin['data']}: {origin['train_size']:,} training and {origin['meta_validation_size']:,} "
        f"meta-validation images{flipped}; split {origin['split']} (seed {origin['split_seed']})",
        f"  learning   {origin['outer_steps']} outer steps of {origin['rollout_steps']}-step rollouts, estimator "
        f"{origin['estimator']}, outer loss {origin['objective']}, seed {origin['seed']}",
    ]
    if origin["meta_validation"]:
        best = origin["meta_validation"]
        lines.append(
            f"  reached    {best['top1']:.2f} % top-1 and {best['calibrated_cross_entropy']:.4f} calibrated "
            f"cross-entropy on meta-validation, by fresh students, after outer step {best['step']}"
        )
    if origin["cost_in_trainings"] is not None:
        lines.append(f"  cost       {origin['cost_in_trainings']:.1f} trainings of a student")
    versions = origin["versions"] or {}
    made = ", ".join(f"{package} {versions[package]}" for package in ("lkd", "torch", "python") if package in versions)
    lines.append(f"  made with  {made}; commit {origin['commit'] or 'unknown'}")
    return "\n".join(lines)


def format_field(report: dict[str, Any]) -> str:
    """Where it leaves the student alone."""
    field, kd = report["field"], report["kd"]
    places = [min(range(len(field["confidence"])), key=lambda i: abs(field["confidence"][i] - c)) for c in SHOWN]
    named = [(f"this loss, {describe_progress(row['progress'])}", row) for row in field["loss"]]
    named += [(f"KD, weight {kd['weight']:g}, τ {kd['temperature']:g}", field["kd"])]
    named += [("cross-entropy", field["cross_entropy"])]
    head = "".join(f"{f'teacher {c:g}':>14}" for c in SHOWN)
    return "\n".join(
        [
            "Where it leaves the student alone: the label's probability to which it pulls, by the teacher's",
            f"  {'':28}{head}",
            *(f"  {label:28}" + "".join(f"{row['rest'][i]:14.2f}" for i in places) for label, row in named),
        ]
    )


def format_balance(report: dict[str, Any]) -> str:
    """The balance that it implies."""
    balance = report["balance"]
    own = {row["progress"]: row for row in report["own_balance"]}
    extra = [key for key in ("weight", "ramp", "temperature", "factor") if own and key in own[0.0]]
    titles = {"weight": "own α", "ramp": "ramp", "temperature": "own τ", "factor": "own β"}
    head = f"{'w_ce':>8}{'w_kd':>8}{'share':>7}{'as good':>11}{'τ':>6}{'as good':>11}{'R²':>7}"
    lines = [
        "Implied balance: its gradient at the logits as w_ce · cross-entropy + w_kd · KD(τ)",
        f"  {'':28}{head}" + "".join(f"{titles[key]:>8}" for key in extra),
    ]
    for row in balance["over_progress"][::2]:
        values = "".join(f"{own[row['progress']][key]:8.2f}" for key in extra)
        lines.append(f"  {'progress ' + format(row['progress'], 'g'):28}{format_fit(row)}{values}")
    for who in ("student", "teacher"):
        lines += [
            f"  {who + ' at ' + format(row['confidence'], 'g') + ', halfway':28}{format_fit(row)}"
            for row in balance[f"over_{who}"][::3]
        ]
    return "\n".join(lines)


def format_fit(fit: dict[str, Any]) -> str:
    """One fit's columns."""
    share, shares, temperature, temperatures = "-", "-", "-", "-"
    if fit["share"] is not None:
        share = f"{fit['share']:.2f}"
        shares = "–".join(f"{s:.2f}" for s in fit["shares_as_good"])
    if fit["temperature"] is not None:
        temperature = format_temperature(fit["temperature"])
        temperatures = "–".join(format_temperature(t) for t in fit["temperatures_as_good"])
    weights = f"{fit['task']:8.2f}{fit['distillation']:8.2f}"
    return f"{weights}{share:>7}{shares:>11}{temperature:>6}{temperatures:>11}{fit['explained']:7.3f}"


def format_temperature(temperature: float) -> str:
    """A temperature, or the bound of the search that it ran into."""
    low, high = TEMPERATURES
    if temperature > 0.99 * high:
        return f"≥{high:g}"
    return f"≤{low:g}" if temperature < 1.01 * low else f"{temperature:.1f}"


def format_shares(report: dict[str, Any], file: dict[str, Any] | None) -> str:
    """How much each term pulls."""
    rows = report["shares"]
    head = "".join(f"{describe_progress(row['progress']):>14}" for row in rows)
    logged = ((file or {}).get("trained_with") or {}).get("gradient_shares")
    lines = [
        "Share of each term in the gradient at the student's outputs (made-up ones)",
        f"  {'':28}{head}" + (f"{'last logged*':>14}" if logged else ""),
    ]
    for term in rows[0]["shares"]:
        values = "".join(f"{row['shares'].get(term, 0.0):14.3f}" for row in rows)
        lines.append(f"  {term:28}{values}" + (f"{logged.get(term, 0.0):14.3f}" if logged else ""))
    return "\n".join([*lines, *(["  * of real students, at the last outer step of meta-training"] if logged else [])])


def format_pairing(pairing: dict[str, Any]) -> str:
    """Which stages are matched."""
    if "learned" not in pairing:
        pairs = pairing["pairs"] or []
        return "\n".join(
            ["Features: pairs of stages, all of the same weight", *(f"  {s} ← {t}" for s, t in pairs)]
            if pairs
            else [f"Features: reads the teacher's {', '.join(pairing['teacher_stages'])}"]
        )
    lines = ["Features: whom each stage of the student learns from, and each comparison's weight there"]
    lines.append("  (it knows stages by their depth in the network, 1 the last; shown: two networks of four stages)")
    for row in pairing["learned"]:
        lines.append(f"  {describe_progress(row['progress'])}")
        for number, (stage, depth) in enumerate(row["student"].items()):
            taught = ", ".join(
                f"{value:.2f} {name}" for name, value in zip(row["teacher"], row["assignment"][number], strict=True)
            )
            weights = ", ".join(f"{name} {values[number]:.2f}" for name, values in row["weights"].items())
            lines.append(f"    {stage} (depth {depth:.2f}) ← {taught}; {weights}")
    return "\n".join(lines)


def format_invariances(checks: list[dict[str, Any]]) -> str:
    """What leaves it as it is."""
    lines = ["Invariances (largest relative difference of value or gradient)"]
    for check in checks:
        difference = "-" if check["difference"] is None else f"{check['difference']:.0e}"
        mark = "holds" if check["holds"] else "FAILS"
        lines.append(f"  {mark}  {check['name']:34}{difference:>7}  {check['statement']}")
    return "\n".join(lines)
