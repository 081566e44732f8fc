"""Everything that is recorded of a run: on disk always, and in the services that were asked for."""

import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lkd.config.parts import RunRecipe, WandbRecipe
from lkd.core.errors import UserError, first_line
from lkd.core.files import parse_json, write_text
from lkd.tracking.lineage import Entry, find_used, identify, record

LOG = "log.jsonl"
RUN_ID = "wandb_run_id"
START_TIMEOUT = 90  # seconds
LONGEST_TAG = 64
FINISH_TIMEOUT = 300  # seconds; what a dead network left behind stays in the run directory, for `wandb sync`
logger = logging.getLogger(__name__)


class Tracker:
    """A run's metrics, pictures and files.

    Metrics go to `log.jsonl` and to the services that the recipe names, pictures to the services, and files used and
    made to `lineage.json` and, as artifacts, to W&B. A service that fails after its start costs a warning.
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
        self.file = (path / LOG).open("a", buffering=1, encoding="utf-8")
        if (path / LOG).read_bytes()[-1:] not in (b"", b"\n"):  # cut off, as by a full disk
            self.file.write("\n")
        for entry in used:
            self.use(entry)

    def log(self, step: int, **metrics: float) -> None:
        """Record metrics at a step."""
        self.file.write(json.dumps({"step": step, "time": round(time.time(), 3), **metrics}) + "\n")
        for service in self.services:
            service.log(step, metrics)

    def show(self, step: int, name: str, picture: Path) -> None:
        """Record a picture at a step; its file stays where it is."""
        for service in self.services:
            service.log(step, {name: picture})

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
        self.file.close()
        for service in self.services:
            service.attempt(service.run.finish)  # what W&B has not uploaded in time stays on disk


def read_rows(path: Path) -> Iterator[dict[str, Any] | None]:
    """The rows of a run's record as they were written; None for a line that is damaged, as by a crash."""
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                row = parse_json(line)
            except ValueError:
                row = None
            yield row if isinstance(row, dict) and type(row.get("step")) is int else None


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a run's record, a row a step: what was logged of it at several times is put together.

    A metric that was logged again, as after a resume, counts as it was last written.
    """
    rows: dict[int, dict[str, Any]] = {}
    for row in filter(None, read_rows(path)):
        rows.setdefault(row["step"], {}).update(row)
    return [rows[step] for step in sorted(rows)]


class Service:
    """One run in a service. What fails there after the start is warned of once, and the service dropped."""

    def __init__(self, name: str, library: Any, run: Any) -> None:
        self.name, self.library, self.run = name, library, run
        self.broken = False

    def attempt(self, call: Callable[[], Any]) -> None:
        """Make a call that may fail without harm."""
        if self.broken:
            return
        try:
            call()
        except Exception as error:
            self.broken = True
            line = "warning: %s failed and is left out from here on: %s; log.jsonl has all"
            logger.warning(line, self.name, first_line(error))

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record metrics, and pictures by their files, at a step."""

        def send() -> None:
            sent = {key: self.library.Image(str(m)) if isinstance(m, Path) else m for key, m in metrics.items()}
            if self.name == "wandb":  # whose own counter refuses the steps that a resumed run repeats
                self.run.log({"step": step, **sent})
            else:
                self.run.log(sent, step=step)

        self.attempt(send)

    def use(self, entry: Entry) -> None:
        """Link a file that the run reads. Offline, W&B links nothing: the entry is in the run's config."""
        if self.name == "wandb" and not self.run.offline:
            _, ours, name = entry.name.partition("wandb://")
            self.attempt(lambda: self.run.use_artifact(name if ours else self.build_artifact(entry)))

    def keep(self, entry: Entry, metadata: dict[str, Any]) -> None:
        """Keep a file that the run made, with what it was made from."""
        if self.name == "wandb":
            self.attempt(lambda: self.run.log_artifact(self.build_artifact(entry, metadata)))

    def build_artifact(self, entry: Entry, metadata: dict[str, Any] | None = None) -> Any:
        """W&B's artifact of a file, or a reference to a folder, which stays where it is."""
        facts = {"sha256": entry.sha256, **(metadata or {})}
        artifact = self.library.Artifact(entry.artifact, entry.kind, metadata=facts)
        if entry.path is None:
            return artifact
        if entry.path.is_dir():
            artifact.add_reference(entry.path.absolute().as_uri(), checksum=False)
        else:
            artifact.add_file(str(entry.path))
        return artifact


def start_wandb(recipe: WandbRecipe, path: Path, config: dict[str, Any]) -> Service:
    """Start W&B, or go on in the run that the run directory had."""
    import wandb

    for tag in recipe.tags:
        if not 1 <= len(tag) <= LONGEST_TAG:
            raise UserError(f"wandb.tags: {tag!r} has {len(tag)} characters, W&B takes 1 to {LONGEST_TAG}: shorten it")
    try:
        run = wandb.init(
            project=recipe.project,
            entity=recipe.entity,
            group=recipe.group,
            tags=recipe.tags,
            name=recipe.name or path.name,
            mode=recipe.mode,
            dir=str(path.absolute()),  # its service may have been started in another folder
            config=config,
            job_type=config.get("command"),
            id=read_run_id(path),
            resume="allow" if recipe.mode == "online" else None,
            settings=wandb.Settings(init_timeout=START_TIMEOUT, finish_timeout=FINISH_TIMEOUT),
        )
        run.define_metric("*", step_metric="step")
    except ValueError as error:  # pydantic's, over several lines
        raise UserError(f"wandb: W&B does not take a setting: {' '.join(str(error).split())[:300]}") from error
    except (wandb.errors.Error, OSError) as error:
        raise UserError(
            f"wandb.mode: {recipe.mode} failed: {first_line(error)}; run `wandb login`, or take --wandb.mode offline"
        ) from error
    return Service("wandb", wandb, run)


def start_trackio(project: str, path: Path, config: dict[str, Any]) -> Service:
    """Start trackio's local record, which `trackio show` serves."""
    try:
        import trackio
    except ImportError as error:
        raise UserError("trackio: is not installed: pip install trackio") from error
    try:
        run = trackio.init(project=project, name=f"{path.name}-{read_run_id(path)}", config=config, resume="allow")
    except Exception as error:
        advice = "TRACKIO_DIR says where it is kept"
        raise UserError(f"trackio: {project!r} cannot be opened: {first_line(error)}; {advice}") from error
    return Service("trackio", trackio, run)


def read_run_id(path: Path) -> str:
    """A run id that stays with the run directory, so that a resumed run goes on in the same one.

    WANDB_RUN_ID, which the agent of a sweep sets, wins.
    """
    file = path / RUN_ID
    given = os.environ.get("WANDB_RUN_ID")
    if given or not file.exists():
        write_text(file, given or secrets.token_hex(4))
    return file.read_text().strip()
