"""The recipe of a dashboard."""

from dataclasses import dataclass, field


@dataclass
class DashboardRecipe:
    """Make a W&B workspace of sections and panels for a project's runs, or a report of a finished comparison.

    Every call makes a new one. Needs the `dashboard` extra.

    Args:
        entity: User or team; the one that is logged in if left out.
        project: Project name.
        name: The workspace's name.
        report: Run directory of a finished `lkd compare`: make its report instead of the workspace.
        runs: Run directories: say which panels would stay empty with only these runs.
        dry_run: Send nothing, write what would be sent as JSON.
        out: Folder for the workspace.json or report.json of a dry run.
    """

    entity: str | None = None
    project: str = "lkd"
    name: str = "LKD"
    report: str | None = None
    runs: list[str] = field(default_factory=list)
    dry_run: bool = False
    out: str = "runs/dashboard"
