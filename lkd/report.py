"""The quickstart's page: one self-contained HTML file, no network."""

import dataclasses
import json
from html import escape
from pathlib import Path
from string import Template
from typing import Any

from lkd.comparison_table import format_figure
from lkd.config import QuickstartRecipe
from lkd.files import write_text
from lkd.reporting.html import embed_picture, html_table
from lkd.run import Run

TEMPLATE = Path(__file__).with_name("templates") / "quickstart.html"
NAMES = {
    "clean": "Clean labels",
    "noisy": "40 % of the training labels flipped",
    "bad_teacher": "Teacher answers at random on 60 % of the images",
}
NOTE = '<p class="note">This is the short form: it exercises every step and claims nothing.</p>'


def write_quickstart_report(
    recipe: QuickstartRecipe,
    run: Run,
    networks: list[str],
    tables: dict[str, list[dict[str, Any]]],
    picks: dict[str, dict[str, Any]],
    phases: dict[str, float],
    regret: str,
) -> Path:
    """Write RUN_DIR/report.html.

    Args:
        recipe: The quickstart's recipe.
        run: The run.
        networks: A line about each network.
        tables: Setting → table rows.
        picks: Setting → method → options that were used.
        phases: Seconds of each phase.
        regret: A sentence about the largest gaps.
    """
    seen, unseen = dict.fromkeys(row["student"] for row in tables["clean"])
    config = {"recipe": dataclasses.asdict(recipe), **run.provenance()["environment"]}
    fields = {
        "note": NOTE if recipe.short else "",
        "summary": summary_table(tables),
        "regret": escape(regret),
        "picture": embed_picture(run.path / "quickstart.png", "accuracy of every loss in the three settings"),
        "seeds": recipe.seeds,
        "seen": escape(seen),
        "unseen": escape(unseen),
        "tables": "".join(setting_section(setting, table, picks[setting]) for setting, table in tables.items()),
        "curves": embed_picture(run.path / "meta-training.png", "outer loss, hypergradient norm, balance, temperature"),
        "surfaces": "".join(
            f"<h3>{escape(NAMES[setting])}</h3>"
            + embed_picture(run.path / setting / "learned-loss.png", f"the loss learned with: {NAMES[setting]}")
            for setting in tables
        ),
        "reuse": escape(reuse_lines(f"{run.path}/clean/meta-train/loss.lkd.safetensors", unseen)),
        "networks": "".join(f"<li>{escape(line)}</li>" for line in networks),
        "phases": html_table(
            ["phase", "seconds"],
            [[key.replace("_", " "), f"{v:.0f}"] for key, v in (phases | {"total": sum(phases.values())}).items()],
        ),
        "config": escape(json.dumps(config, indent=2)),
    }
    path = run.path / "report.html"
    write_text(path, Template(TEMPLATE.read_text(encoding="utf-8")).substitute(fields))
    return path


def reuse_lines(path: str, student: str) -> str:
    """How a learned loss is used again."""
    return (
        f'import lkd\n\nloss = lkd.load_loss("{path}")\n'
        "sum(loss(student_outputs, teacher_outputs, target, progress).values()).backward()\n\n"
        f"$ lkd distill --loss {path} --student.name {student}"
    )


def summary_table(tables: dict[str, list[dict[str, Any]]]) -> str:
    """Learned loss minus tuned KD and minus CE, by setting and student, whichever way they fell."""
    rows = []
    for setting, table in tables.items():
        for learned in (row for row in table if row["method"] == "learned"):
            (ce,) = (row for row in table if row["method"] == "CE" and row["student"] == learned["student"])
            over_ce = f"{learned['last'][0] - ce['last'][0]:+.2f}"
            rows.append([NAMES[setting], learned["student"], format_figure(learned["difference"], True), over_ce])
    return html_table(["setting", "student", "learned − tuned KD", "learned − CE"], rows)


def compare_regrets(regret: dict[str, float]) -> str:
    """What a fixed choice costs at worst, from the numbers."""
    fixed = {label: value for label, value in regret.items() if label.startswith("KD")}
    steadiest = min(fixed, key=lambda label: fixed[label])
    return (
        "Largest gap, over the three settings, to the best KD of the setting (meta-validation, first seed): "
        f"the learned loss {regret['learned']:.1f} points, without tuning; "
        f"the steadiest of {len(fixed)} fixed KDs, {steadiest}, {fixed[steadiest]:.1f}; "
        f"the worst of them {max(fixed.values()):.1f}; cross-entropy {regret['CE']:.1f}."
    )


def setting_section(setting: str, table: list[dict[str, Any]], picks: dict[str, Any]) -> str:
    """One setting's table."""
    pick = picks["KD"]
    rows = [
        [
            row["student"],
            row["method"],
            format_figure(row["last"]),
            format_figure(row["best"]),
            "" if row["method"] == "KD" else format_figure(row["difference"], True),
        ]
        for row in table
    ]
    header = ["student", "loss", "last epoch", "best epoch", "last − KD"]
    return (
        f"<h3>{escape(NAMES[setting])}</h3>"
        f"<p>KD's pick: weight {pick['weight']:g}, temperature {pick['temperature']:g}.</p>"
        f'<div class="wide">{html_table(header, rows, [row["method"] for row in table])}</div>'
    )
