"""The quickstart's page: one self-contained HTML file, no network."""

import base64
import dataclasses
import json
from html import escape
from pathlib import Path
from typing import Any

from lkd.comparison_table import format_figure
from lkd.config import QuickstartRecipe
from lkd.files import write_text
from lkd.run import Run

STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --paper: #ffffff; --soft: #f2f4f7; --line: #d5dae1; --mark: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ee; --paper: #14181e; --soft: #1e242c; --line: #39424e; --mark: #ff8a80; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 60rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .6rem; text-align: left; border-bottom: 1px solid var(--line); white-space: nowrap; }
tr.learned td { font-weight: 600; color: var(--mark); } img { max-width: 100%; background: white; border-radius: 4px; }
pre, code { background: var(--soft); border-radius: 4px; } code { padding: .1rem .3rem; overflow-wrap: anywhere; } pre { padding: .8rem; overflow-x: auto; }
pre code { padding: 0; overflow-wrap: normal; } .note { background: var(--soft); padding: .6rem 1rem; border-left: 4px solid var(--mark); }
"""
NAMES = {
    "clean": "Clean labels",
    "noisy": "40 % of the training labels flipped",
    "bad_teacher": "Teacher answers at random on 60 % of the images",
}


def write_quickstart_report(
    recipe: QuickstartRecipe,
    run: Run,
    networks: list[str],
    tables: dict[str, list[dict[str, Any]]],
    picks: dict[str, dict[str, Any]],
    phases: dict[str, float],
    regret: dict[str, float],
) -> Path:
    """Write RUN_DIR/report.html.

    Args:
        recipe: The quickstart's recipe.
        run: The run.
        networks: A line about each network.
        tables: Setting → table rows.
        picks: Setting → method → options that were used.
        phases: Seconds of each phase.
        regret: Largest gap over the settings to the best KD of each, by loss.
    """
    folder = run.path
    loss_file = f"{folder}/clean/meta-train/loss.lkd.safetensors"
    reuse = f'import lkd\nloss = lkd.load_loss("{loss_file}")\nsum(loss(student_outputs, teacher_outputs, target, progress).values()).backward()'
    short = (
        '<p class="note">This is the short form: it exercises every step and claims nothing.</p>'
        if recipe.short
        else ""
    )
    parts = [
        "<h1>LKD quickstart: a distillation loss, learned and reused</h1>",
        short,
        f"<p>{escape(verdict(tables))}</p>",
        f"<p>{escape(compare_regrets(regret))}</p>",
        picture(folder / "quickstart.png", "accuracy of every loss in the three settings"),
        "<h2>Test accuracy of fresh students</h2>",
        f"<p>Percent, mean ± standard error over {recipe.seeds} paired seeds. <code>small_cnn</code> is the student that the loss was learned with; "
        "<code>small_mobilenet</code> was never seen. KD's weight and temperature were picked on meta-validation, on the first seed of "
        "<code>small_cnn</code>; the learned loss was trained on the same meta-validation images. The best epoch is chosen on meta-validation. All losses "
        "train at one fixed learning rate.</p>",
        *(table_section(setting, table, picks[setting]) for setting, table in tables.items()),
        "<h2>Meta-training</h2>",
        picture(folder / "meta-training.png", "meta-validation loss, hypergradient norm, balance and temperature"),
        "<h2>What the losses learned</h2>",
        "<p>Halfway through training, for 10 classes: how the loss pushes the student's logit of the label (negative, blue: up), over the probability that "
        "student and teacher give to the label.</p>",
        *(
            f"<h3>{escape(NAMES[setting])}</h3>"
            + picture(folder / setting / "learned-loss.png", f"learned loss, {setting}")
            for setting in tables
        ),
        "<h2>Reuse it</h2>",
        f"<pre><code>{escape(reuse)}</code></pre>",
        f"<pre><code>{escape(f'lkd distill --loss {loss_file} --student.name small_mobilenet')}</code></pre>",
        "<h2>How it was made</h2>",
        "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in networks) + "</ul>",
        "<div class=wide><table><tr><th>phase</th><th>seconds</th></tr>"
        + "".join(
            f"<tr><td>{escape(name.replace('_', ' '))}</td><td>{value:.0f}</td></tr>" for name, value in phases.items()
        )
        + "</table></div>",
        f"<details><summary>Config and versions</summary><pre><code>{escape(json.dumps({'recipe': dataclasses.asdict(recipe), **run.provenance()['environment']}, indent=2))}</code></pre></details>",
    ]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><title>LKD quickstart</title>'
        f"<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )
    path = folder / "report.html"
    write_text(path, page)
    return path


def verdict(tables: dict[str, list[dict[str, Any]]]) -> str:
    """One sentence from the numbers, whichever way they fell."""
    gaps = [
        f"{format_figure(row['difference'], True)} ({NAMES[setting].lower()}, {row['student']})"
        for setting, table in tables.items()
        for row in table
        if row["method"] == "learned"
    ]
    return "Learned loss minus KD tuned anew for each setting, points of test accuracy: " + "; ".join(gaps) + "."


def compare_regrets(regret: dict[str, float]) -> str:
    """What a fixed choice costs at worst, from the numbers."""
    fixed = {label: value for label, value in regret.items() if label.startswith("KD")}
    steadiest = min(fixed, key=lambda label: fixed[label])
    return (
        f"Largest gap to the best KD of a setting (meta-validation, first seed): learned loss {regret['learned']:.1f} points, without tuning; the steadiest "
        f"of {len(fixed)} fixed KDs, {steadiest}, {fixed[steadiest]:.1f}; the worst, {max(fixed.values()):.1f}; cross-entropy {regret['CE']:.1f}."
    )


def table_section(setting: str, table: list[dict[str, Any]], picks: dict[str, Any]) -> str:
    """One setting's table."""
    rows = "".join(
        f'<tr class="{escape(row["method"])}"><td>{escape(row["student"])}</td><td>{escape(row["method"])}</td>'
        f"<td>{format_figure(row['last'])}</td><td>{format_figure(row['best'])}</td>"
        f"<td>{'' if row['method'] == 'KD' else format_figure(row['difference'], True)}</td></tr>"
        for row in table
    )
    pick = picks["KD"]
    return (
        f"<h3>{escape(NAMES[setting])}</h3><p>KD's pick: weight {pick['weight']:g}, temperature {pick['temperature']:g}.</p><div class=wide><table>"
        f"<tr><th>student</th><th>loss</th><th>last epoch</th><th>best epoch</th><th>last − KD</th></tr>{rows}</table></div>"
    )


def picture(path: Path, description: str) -> str:
    """A picture inside the page."""
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<p><img alt="{escape(description)}" src="data:image/png;base64,{data}"></p>'
