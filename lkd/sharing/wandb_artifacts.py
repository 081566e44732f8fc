"""Files in artifacts of Weights & Biases."""

from pathlib import Path
from typing import Any

from lkd.errors import UserError
from lkd.sharing.references import WandbReference


def download_artifact(reference: WandbReference, cache: Path) -> Path:
    """Download the one safetensors file of an artifact.

    Args:
        reference: The artifact.
        cache: Folder that it is kept in, by its version: `latest` is asked for anew each time.

    Raises:
        UserError: If it is not there, holds no or several such files, or W&B does not answer.
    """
    import wandb

    try:
        artifact = wandb.Api().artifact(reference.name)
        folder = cache / "wandb" / reference.project / str(artifact.name).replace(":", "-")
        artifact.download(root=str(folder))
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(f"wandb://{reference.name}: cannot be had: {first_line(error)}") from error
    files = sorted(folder.rglob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"wandb://{reference.name}: holds {len(files)} safetensors files, not one")
    return files[0]


def upload_artifact(path: Path, reference: WandbReference, kind: str, metadata: dict[str, Any]) -> str:
    """Put a file into an artifact, as its newest version, by a run of its own.

    Returns:
        The artifact's name with its version.

    Raises:
        UserError: If nobody is logged in, or W&B does not answer.
    """
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


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0]
