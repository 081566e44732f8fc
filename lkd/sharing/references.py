"""Names of files that lie elsewhere: `hf://owner/repository/file` and `wandb://entity/project/artifact:version`."""

import os
import re
from pathlib import Path
from typing import NamedTuple

from lkd.errors import UserError

FORMS = "hf://OWNER/REPOSITORY[@REVISION][/FILE] or wandb://ENTITY/PROJECT/ARTIFACT[:VERSION]"
DEFAULT_FILE = "loss.lkd.safetensors"
HUB = re.compile(r"hf://([\w.-]+/[\w.-]+)(?:@([\w.-]+))?(?:/([\w./-]+))?")
WANDB = re.compile(r"wandb://([\w.-]+/[\w.-]+)/([\w.-]+)(?::([\w.-]+))?")


class HubReference(NamedTuple):
    """A file in a repository of the Hugging Face Hub, at a branch, tag or commit; None for the main branch."""

    repository: str
    revision: str | None
    file: str


class WandbReference(NamedTuple):
    """A version of an artifact in a project of W&B."""

    project: str
    artifact: str
    version: str

    @property
    def name(self) -> str:
        """What W&B calls it."""
        return f"{self.project}/{self.artifact}:{self.version}"


def is_remote(name: str) -> bool:
    """Whether a file's name says that it lies elsewhere."""
    return name.startswith(("hf://", "wandb://"))


def parse_reference(name: str) -> HubReference | WandbReference:
    """Take a remote file's name apart.

    Raises:
        UserError: If it has neither form.
    """
    if found := HUB.fullmatch(name):
        return HubReference(found[1], found[2], found[3] or DEFAULT_FILE)
    if found := WANDB.fullmatch(name):
        return WandbReference(found[1], found[2], found[3] or "latest")
    raise UserError(f"{name}: is not {FORMS}")


def fetch(name: str) -> Path:
    """Download a remote file, unless it is in the cache already.

    Returns:
        The file on this machine.

    Raises:
        UserError: If the name has no known form, or the file cannot be had.
    """
    reference = parse_reference(name)
    if isinstance(reference, HubReference):
        from lkd.sharing.hub import download

        return download(reference)
    from lkd.sharing.wandb_artifacts import download_artifact

    return download_artifact(reference, cache_folder())


def cache_folder() -> Path:
    """Where artifacts of W&B are kept: `$LKD_CACHE`, or `~/.cache/lkd`. The Hub's files lie in its own cache."""
    return Path(os.environ.get("LKD_CACHE") or Path.home() / ".cache" / "lkd")
