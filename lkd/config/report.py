"""The recipe of a report."""

from dataclasses import dataclass, field


@dataclass
class ReportRecipe:
    """Write one HTML page about runs, finished or not: results, curves, learned losses, settings, lineage.

    The page needs no network. Nothing in the run directories is changed.

    Args:
        runs: Run directories; their names may come first on the line, as in `lkd report runs/a runs/b`.
        out: The page, a .html file; one that is there is replaced.
    """

    runs: list[str] = field(default_factory=list)
    out: str = "report.html"
