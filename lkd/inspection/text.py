"""An inspection as a report for the terminal."""

from typing import Any

from lkd.inspection.balance_fit import TEMPERATURES
from lkd.inspection.picture import describe_progress

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
