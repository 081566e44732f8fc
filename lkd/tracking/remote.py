"""Files that lie elsewhere: on the Hugging Face Hub and in artifacts of Weights & Biases."""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from lkd.core.errors import UserError, first_line
from lkd.core.files import find_cache

# ----------------------------------------------------------------------------------------------------------------------
# Names of files that lie elsewhere: `hf://owner/repository/file` and `wandb://entity/project/artifact:version`.

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
    """Take a remote file's name apart."""
    if found := HUB.fullmatch(name):
        return HubReference(found[1], found[2], found[3] or DEFAULT_FILE)
    if found := WANDB.fullmatch(name):
        return WandbReference(found[1], found[2], found[3] or "latest")
    raise UserError(f"{name}: is not {FORMS}")


def fetch(name: str) -> Path:
    """Download a remote file, unless it is in the cache already; the file on this machine."""
    reference = parse_reference(name)
    return download(reference) if isinstance(reference, HubReference) else download_artifact(reference)


def fetch_named(name: str) -> str:
    """The name of a file on this machine: itself, or that of what is downloaded where it lies elsewhere."""
    return str(fetch(name)) if is_remote(name) else name


# ----------------------------------------------------------------------------------------------------------------------
# Files on the Hugging Face Hub.


def download(reference: HubReference) -> Path:
    """Download a file into the Hub's cache."""
    from huggingface_hub import HfApi

    with explained(reference):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        return Path(api.hf_hub_download(reference.repository, reference.file, revision=reference.revision))


def upload(path: Path, reference: HubReference, card: str, private: bool) -> str:
    """Put a file and its model card into a repository, as one commit, whose address is returned.

    The repository is made if it is not there, `private` or not; a revision must be there already.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    with explained(reference):
        api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"))
        api.create_repo(reference.repository, private=private, exist_ok=True)
        commit = api.create_commit(
            reference.repository,
            [CommitOperationAdd(reference.file, path), CommitOperationAdd("README.md", card.encode())],
            commit_message=f"{reference.file}, by lkd push",
            revision=reference.revision,
        )
    return str(commit.commit_url)


@contextmanager
def explained(reference: HubReference) -> Iterator[None]:
    """Turn the Hub's errors into one line each."""
    from huggingface_hub import errors

    lines = {  # the first that fits
        errors.GatedRepoError: "no such repository, or it is not yours to see; log in by `hf auth login`",
        errors.RepositoryNotFoundError: "no such repository, or it is not yours to see; log in by `hf auth login`",
        errors.RevisionNotFoundError: f"has no revision {reference.revision!r}",
        errors.LocalEntryNotFoundError: "the Hub cannot be reached, and the file is not in its cache",
        errors.EntryNotFoundError: f"has no file {reference.file!r}",
        errors.LocalTokenNotFoundError: "nobody is logged in; run `hf auth login`",
    }
    try:
        yield
    except Exception as error:  # also of the client's own network library, which is not the same in all versions
        line = next((line for kind, line in lines.items() if isinstance(error, kind)), first_line(error))
        raise UserError(f"hf://{reference.repository}: {line}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Files in artifacts of Weights & Biases.


def download_artifact(reference: WandbReference) -> Path:
    """Download the one safetensors file of an artifact; `latest` is asked for anew each time.

    It is kept by its version in the user's cache folder. The Hub's files lie in its own.
    """
    import wandb

    try:
        artifact = wandb.Api().artifact(reference.name)
        folder = find_cache() / "wandb" / reference.project / str(artifact.name).replace(":", "-")
        artifact.download(root=str(folder))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"wandb://{reference.name}: cannot be had: {first_line(error)}") from error
    files = sorted(folder.rglob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"wandb://{reference.name}: holds {len(files)} safetensors files, not one")
    return files[0]


def upload_artifact(path: Path, reference: WandbReference, kind: str, metadata: dict[str, Any]) -> str:
    """Put a file into an artifact, as its newest version, by a run of its own; the artifact's name with its version."""
    import wandb

    entity, project = reference.project.split("/")
    aliases = [] if reference.version == "latest" else [reference.version]
    try:
        with wandb.init(entity=entity, project=project, job_type="push", mode="online") as run:
            artifact = wandb.Artifact(reference.artifact, kind, metadata=metadata)
            artifact.add_file(str(path))
            logged = run.log_artifact(artifact, aliases=["latest", *aliases])
            logged.wait()
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"wandb://{reference.name}: cannot be pushed: {first_line(error)}; `wandb login`?") from error
    return f"wandb://{reference.project}/{logged.name}"
