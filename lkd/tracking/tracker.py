"""Everything that is recorded of a run: on disk always, and in the services that were asked for."""

from pathlib import Path
from typing import Any

from lkd.config import RunRecipe
from lkd.tracking.lineage import Entry, find_used, identify, record
from lkd.tracking.record import Record
from lkd.tracking.service import Service, start_trackio, start_wandb


class Tracker:
    """A run's metrics, pictures and files.

    Metrics go to `log.jsonl` and to the services, pictures to the services, and files used and made to `lineage.json`
    and, as artifacts, to W&B. A service that fails after its start costs a warning.

    Args:
        path: The run directory.
        recipe: Names the services; None for none.
        config: The run's full config.

    Raises:
        UserError: If a service was asked for and cannot start.
    """

    def __init__(self, path: Path, recipe: RunRecipe | None, config: dict[str, Any]) -> None:
        self.path = path
        self.services: list[Service] = []
        used = find_used(config.get("recipe", {}))
        if recipe and recipe.wandb.mode != "disabled":
            described = config | {"used": [entry.describe() for entry in used]}
            self.services.append(start_wandb(recipe.wandb, path, described))
        if recipe and recipe.trackio:
            self.services.append(start_trackio(recipe.trackio, path, config))
        self.record = Record(path)
        for entry in used:
            self.use(entry)

    def log(self, step: int, **metrics: float) -> None:
        """Record metrics at a step."""
        self.record.log(step, metrics)
        for service in self.services:
            service.log(step, metrics)

    def show(self, step: int, name: str, picture: Path) -> None:
        """Record a picture at a step; its file stays where it is."""
        for service in self.services:
            service.show(step, name, picture)

    def use(self, entry: Entry) -> None:
        """Record a file that the run reads."""
        record(self.path, "used", entry)
        for service in self.services:
            service.use(entry)

    def keep(self, kind: str, path: Path, **metadata: Any) -> None:
        """Record a file or folder that the run made: of which kind, and facts about it."""
        entry = identify(kind, path)
        record(self.path, "made", entry)
        for service in self.services:
            service.keep(entry, metadata)

    def finish(self) -> None:
        """Close all records."""
        self.record.finish()
        for service in self.services:
            service.finish()
