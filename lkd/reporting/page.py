"""One self-contained HTML page about runs."""

import base64
import dataclasses
import hashlib
from collections.abc import Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from string import Template

from lkd import __version__
from lkd.config import ReportRecipe
from lkd.errors import UserError
from lkd.files import write_text
from lkd.reporting.charts import list_charts
from lkd.reporting.contents import Album
from lkd.reporting.html import embed_data
from lkd.reporting.runs import RunRecord, read_runs
from lkd.reporting.sections import (
    COLORS,
    show_commands,
    show_lineage,
    show_results,
    show_settings,
    show_timing,
)
from lkd.reporting.settings import describe_data, group_by_data
from lkd.reporting.surfaces import POINTS, PROGRESS, draw_losses

TEMPLATES = Path(__file__).parents[1] / "templates"
SCRIPTS = ("report_charts.js", "report_surfaces.js", "report.js")
APART = (
    '<p class="warning"><b>These runs do not share their data.</b> Runs over different data sets, splits or label '
    "noise are shown apart; figures of one part say nothing about those of another.</p>"
)


def write_report(recipe: ReportRecipe) -> tuple[Path, int]:
    """Write the page.

    Returns:
        The page, and how many runs it shows.

    Raises:
        UserError: If a folder is not a run, or the page cannot be written.
    """
    out = Path(recipe.out)
    if out.suffix not in (".html", ".htm"):
        raise UserError(f"out: {out} does not end in .html")
    runs = read_runs(recipe.runs)
    write_text(out, build_page(runs))
    return out, len(runs)


def build_page(runs: Sequence[RunRecord]) -> str:
    """The page's HTML."""
    places = {run.label: place for place, run in enumerate(runs)}
    groups, album = group_by_data(runs), Album()
    sections = list_charts(groups, places)
    losses = draw_losses(runs)
    data = {
        "runs": [{"label": run.label, "command": run.command} for run in runs],
        "colors": COLORS,
        "sections": sections,
        "losses": [dataclasses.asdict(loss) for loss in losses],
        "points": POINTS,
        "progress": PROGRESS,
    }
    parts = []
    for number, group in enumerate(groups):
        charts = [
            f'<h3>Curves over {section["axis"]}s</h3><div class="curves" data-section="{place}"></div>'
            for place, section in enumerate(sections)
            if section["data"] == number
        ]
        title = describe_data(group[0]) if len(groups) == 1 else f"Data {number + 1}: {describe_data(group[0])}"
        pieces = [show_results(group, places, album), *charts, show_timing(group)]
        parts.append(f'<section id="data-{number + 1}"><h2>{escape(title)}</h2>{"".join(pieces)}</section>')
    script = "\n".join((TEMPLATES / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(f"\n{script}\n".encode()).digest()).decode()
    return Template((TEMPLATES / "report.html").read_text(encoding="utf-8")).substitute(
        title=escape(", ".join(run.label for run in runs[:3]) + (" …" if len(runs) > 3 else "")),
        count=f"{len(runs)} run{'s' * (len(runs) > 1)}",
        made=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        version=escape(__version__),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=(TEMPLATES / "report.css").read_text(encoding="utf-8"),
        warning=APART if len(groups) > 1 else "",
        parts="".join(parts),
        losses='<section id="losses"><h2>Losses</h2><div id="surfaces"></div></section>' if losses else "",
        settings=show_settings(runs),
        lineage=show_lineage(runs),
        commands=show_commands(runs),
        data=embed_data(data, "data"),
        script=script,
    )
