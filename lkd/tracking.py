"""What a run measures, step by step: a local record always, Weights & Biases on request."""

import json
import time
from pathlib import Path
from typing import Any

from lkd.config import WandbRecipe
from lkd.errors import UserError
from lkd.files import write_text


class Tracker:
    """Append-only `log.jsonl` in the run directory; the same metrics to W&B unless its mode is disabled.

    Args:
        path: The run directory.
        wandb: W&B settings.
        config: The run's full config.

    Raises:
        UserError: If W&B was asked for and cannot start.
    """

    def __init__(self, path: Path, wandb: WandbRecipe, config: dict[str, Any]) -> None:
        self.file = (path / "log.jsonl").open("a", buffering=1, encoding="utf-8")
        self.wandb_run: Any = None
        if wandb.mode != "disabled":
            import wandb as library

            try:
                self.wandb_run = library.init(
                    project=wandb.project,
                    name=wandb.name or path.name,
                    mode=wandb.mode,
                    dir=str(path),
                    config=config,
                    id=run_id(path),
                    resume="allow" if wandb.mode == "online" else None,
                )
            except library.errors.Error as error:
                raise UserError(
                    f"wandb.mode: {wandb.mode} failed: {str(error).splitlines()[0]}; try offline"
                ) from error

    def log(self, step: int, **metrics: float) -> None:
        """Record metrics at a step."""
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        if self.wandb_run is not None:
            self.wandb_run.log(metrics, step=step)

    def finish(self) -> None:
        """Close both records."""
        self.file.close()
        if self.wandb_run is not None:
            self.wandb_run.finish()


def run_id(path: Path) -> str:
    """A W&B run id that stays with the run directory, so that a resumed run goes on in the same one."""
    file = path / "wandb_run_id"
    if not file.exists():
        import secrets

        write_text(file, secrets.token_hex(4))
    return file.read_text().strip()


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a run's record; a step that was repeated after a resume counts once, as it was last written."""
    rows: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue  # a line cut off by a crash
        rows[row["step"]] = row
    return [rows[step] for step in sorted(rows)]
