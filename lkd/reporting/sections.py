"""The sections of the page, as HTML."""

import itertools
from collections import Counter
from collections.abc import Sequence
from html import escape

from lkd.reporting.contents import Album, describe_contents
from lkd.reporting.html import html_table
from lkd.reporting.lineage import Ancestor, trace_run
from lkd.reporting.reproduction import command_line
from lkd.reporting.results import (
    TRAINED,
    format_duration,
    images_per_second,
    tabulate_learned,
    tabulate_trainings,
    time_shares,
)
from lkd.reporting.runs import RunRecord
from lkd.reporting.settings import ABSENT, find_differences, list_settings

COLORS = 8  # of the style sheet


def show_results(runs: Sequence[RunRecord], places: dict[str, int], album: Album) -> str:
    """Tables of what runs reached, and what those that do more than log have left."""
    pieces = []
    for commands, tabulate, title in (
        (TRAINED, tabulate_trainings, "Students and teachers, on meta-validation"),
        (("meta-train",), tabulate_learned, "Learned losses, reused on fresh students, on meta-validation"),
    ):
        chosen = [run for run in runs if run.command in commands]
        if chosen:
            header, *rows = tabulate(chosen)
            table = html_table(header, rows, [color_class(places[run.label]) for run in chosen])
            pieces.append(f'<h3>{title}</h3><div class="wide">{table}</div>')
    return "".join([*pieces, *(describe_contents(run, album) for run in runs)])


def color_class(place: int) -> str:
    """The class of what belongs to a run."""
    return f"run c{place % COLORS}"


def show_timing(runs: Sequence[RunRecord]) -> str:
    """Which parts of the steps took the time."""
    rows = []
    for run in runs:
        shares = time_shares(run)
        if not shares:
            continue
        parts = "".join(
            f'<span class="p{place % COLORS}" style="width:{100 * share:.1f}%" title="{escape(name)}"></span>'
            for place, (name, share) in enumerate(shares.items())
        )
        words = ", ".join(
            f'<i class="p{place % COLORS}"></i>{escape(name)} {share:.0%}'
            for place, (name, share) in enumerate(shares.items())
        )
        rows.append(
            f"<tr><td>{escape(run.label)}</td><td>{images_per_second(run)} images/s</td><td>{format_duration(run)}</td>"
            f'<td class="shares"><div class="bar">{parts}</div>{words}</td></tr>'
        )
    table = f'<div class="wide"><table>{"".join(rows)}</table></div>'
    return f"<h3>Where the steps' time went</h3>{table}" if rows else ""


def show_settings(runs: Sequence[RunRecord]) -> str:
    """What differs between the runs, then all settings of each."""
    rows, partial = find_differences(runs)
    differing = {row[0] for row in rows}
    header = ["setting", *(run.label for run in runs)]
    pieces = [
        f"<p>What differs; values that are not the most common one are bold.</p>{mark_unusual(header, rows)}"
        if rows
        else ""
    ]
    if not rows and len(runs) > 1:
        pieces.append("<p>All settings that the runs share are the same.</p>")
    if partial:
        table = f'<div class="wide">{html_table(header, partial)}</div>'
        pieces.append(f"<details><summary>{len(partial)} settings that not all have</summary>{table}</details>")
    for run in runs:
        settings = list_settings(run)
        marks = ["differs" if key in differing else "" for key in settings]
        every = html_table(["setting", "value"], [list(pair) for pair in settings.items()], marks)
        pieces.append(
            f'<details><summary>All settings of {escape(run.label)}</summary><div class="wide">{every}</div></details>'
        )
    return "".join(pieces)


def mark_unusual(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of settings in which the values that are not their row's most common one are marked."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = []
    for key, *values in rows:
        usual = Counter(value for value in values if value != ABSENT).most_common(1)[0][0]
        marks = ['<td class="unusual">' if value not in (usual, ABSENT) else "<td>" for value in values]
        cells = "".join(f"{mark}{escape(value)}</td>" for mark, value in zip(marks, values, strict=True))
        body.append(f"<tr><td>{escape(key)}</td>{cells}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(body)}</table></div>'


def show_lineage(runs: Sequence[RunRecord]) -> str:
    """What each run was made of."""
    items = [f"<li><b>{escape(run.label)}</b>{list_ancestors(trace_run(run, runs))}</li>" for run in runs]
    return f'<ul class="lineage">{"".join(items)}</ul>'


def list_ancestors(ancestors: Sequence[Ancestor]) -> str:
    """Ancestors, and theirs, as nested lists."""
    items = []
    for ancestor in ancestors:
        by = [f"made by {ancestor.run}"] if ancestor.run else []
        facts = escape("; ".join([*by, *ancestor.facts]))
        name = f"{escape(ancestor.role)}: <code>{escape(ancestor.name)}</code> {facts}"
        items.append(f"<li>{name}{list_ancestors(ancestor.ancestors)}</li>")
    return f"<ul>{''.join(items)}</ul>" if items else ""


def show_commands(runs: Sequence[RunRecord]) -> str:
    """How to make each run again."""
    pieces = []
    for run in runs:
        versions = run.environment.get("versions")
        known = versions.items() if isinstance(versions, dict) else ()
        software = ", ".join(
            itertools.chain(
                [f"commit {run.environment.get('commit')}"], (f"{name} {version}" for name, version in known)
            )
        )
        pieces.append(
            f"<h3>{escape(run.label)}</h3><pre><code>{escape(command_line(run))}</code></pre>"
            f'<p class="note">{escape(software)}</p>'
        )
    return "".join(pieces)
