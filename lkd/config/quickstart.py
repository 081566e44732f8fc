"""The recipe of the quickstart."""

from dataclasses import dataclass

from lkd.config.parts import RunRecipe


@dataclass
class QuickstartRecipe(RunRecipe):
    """Learn a loss on embedded images in three settings, reuse it, compare it with CE and KD (RUN_DIR/report.html).

    Args:
        short: A small form of everything, under 90 seconds, that claims nothing.
        workers: Processes that train side by side; 0 means one for every CPU core.
        seeds: Paired seeds of the comparison.
    """

    run_dir: str = "runs/quickstart"
    short: bool = False
    workers: int = 0
    seeds: int = 3
