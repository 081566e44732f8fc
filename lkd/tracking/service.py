"""A run's metrics in a service with W&B's calls: W&B itself, or trackio's local dashboard."""

import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lkd.config import WandbRecipe
from lkd.errors import UserError
from lkd.files import write_text
from lkd.tracking.lineage import Entry

START_TIMEOUT = 90  # seconds
FINISH_TIMEOUT = 300  # seconds; what a dead network left behind stays in the run directory, for `wandb sync`
RUN_ID = "wandb_run_id"
logger = logging.getLogger(__name__)


class Service:
    """One run in a service. After the start nothing that fails there stops the run: it is warned of once and dropped.

    Args:
        name: What the user calls it.
        library: Its module.
        run: What its `init` returned.
    """

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
            first = (str(error).splitlines() or [type(error).__name__])[0]
            logger.warning("warning: %s failed and is left out from here on: %s; log.jsonl has all", self.name, first)

    def log(self, step: int, metrics: dict[str, Any]) -> None:
        """Record metrics at a step."""
        self.attempt(lambda: self.send(step, metrics))

    def show(self, step: int, name: str, path: Path) -> None:
        """Record a picture at a step."""
        self.attempt(lambda: self.send(step, {name: self.library.Image(str(path))}))

    def send(self, step: int, metrics: dict[str, Any]) -> None:
        """Send metrics; may fail."""
        if self.name == "wandb":  # whose own counter refuses the steps that a resumed run repeats
            self.run.log({"step": step, **metrics})
        else:
            self.run.log(metrics, step=step)

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

    def finish(self) -> None:
        """End the run; what W&B has not uploaded in time stays on disk."""
        self.attempt(self.run.finish)


def start_wandb(recipe: WandbRecipe, path: Path, config: dict[str, Any]) -> Service:
    """Start W&B, or go on in the run that the run directory had.

    Raises:
        UserError: If it cannot start: nobody is logged in, or its server does not answer.
    """
    import wandb

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
    except (wandb.errors.Error, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"wandb.mode: {recipe.mode} failed: {first}; run `wandb login`, or take --wandb.mode offline"
        ) from error
    return Service("wandb", wandb, run)


def start_trackio(project: str, path: Path, config: dict[str, Any]) -> Service:
    """Start trackio's local record, which `trackio show` serves.

    Raises:
        UserError: If it is not installed or cannot start.
    """
    try:
        import trackio
    except ImportError as error:
        raise UserError("trackio: is not installed: pip install 'lkd[trackio]'") from error
    try:
        run = trackio.init(project=project, name=f"{path.name}-{read_run_id(path)}", config=config, resume="allow")
    except Exception as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"trackio: {project!r} cannot be opened: {first}; TRACKIO_DIR says where it is kept") from error
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
