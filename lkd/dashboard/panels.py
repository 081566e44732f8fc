"""Panels, as wandb-workspaces has them."""

from typing import Any

from lkd.dashboard.sections import STEP, Chart, Panel, Pictures

WIDTH, HEIGHT = 8, 6  # of a report's 24 columns


def build_panel(panel: Panel, place: int = 0) -> Any:
    """Build a panel; `place` is its number in a report, which has three in a row."""
    import wandb_workspaces.reports.v2 as reports

    layout = reports.Layout(x=place % 3 * WIDTH, y=place // 3 * HEIGHT, w=WIDTH, h=HEIGHT)
    if isinstance(panel, Pictures):
        return reports.MediaBrowser(
            title=panel.title, media_keys=list(panel.metrics), num_columns=1, gallery_axis="step", layout=layout
        )
    if not isinstance(panel, Chart):
        return reports.RunComparer(diff_only="split", layout=layout)
    return reports.LinePlot(
        title=panel.title,
        x=STEP,
        y=list(panel.metrics),
        metric_regex=panel.pattern,
        title_x=STEP,
        title_y=panel.unit,
        range_y=panel.bounds,
        log_y=panel.log_y or None,
        smoothing_type="exponential" if panel.smoothing else "none",
        smoothing_factor=panel.smoothing or None,
        smoothing_show_original=True if panel.smoothing else None,
        plot_type="stacked-area" if panel.stacked else "line",
        layout=layout,
    )
