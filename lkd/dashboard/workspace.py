"""The workspace: a saved view of a project's runs."""

from collections.abc import Iterable
from typing import Any

from lkd.dashboard.panels import build_panel
from lkd.dashboard.sections import SECTIONS, STEP, Section


def build_workspace(entity: str, project: str, name: str, sections: Iterable[Section] = SECTIONS) -> Any:
    """Build the view; nothing is sent.

    Args:
        entity: User or team.
        project: Project name.
        name: The view's name.
        sections: What it shows.

    Returns:
        wandb-workspaces' `Workspace`.
    """
    import wandb_workspaces.workspaces as workspaces

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(
                name=section.title, panels=[build_panel(panel) for panel in section.panels], is_open=True
            )
            for section in sections
        ],
        settings=workspaces.WorkspaceSettings(x_axis=STEP),
    )
