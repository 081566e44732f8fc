"""Whether a run may be gone on with: by the same command, with the same config but for what does not change results."""

from pathlib import Path
from typing import Any

from lkd.errors import UserError
from lkd.files import read_mapping

MAY_DIFFER_ON_RESUME = (
    *(
        "run_dir",
        "resume",
        "threads",
        "wandb",
        "trackio",
        "workers",
        "device",
        "join",
        "data.root",
        "data.workers",
        "data.read_timeout",
    ),
    *("train.checkpoint_every", "train.checkpoints_kept", "meta.checkpoint_every", "meta.picture_every"),
)


def check_resumable(path: Path, config: dict[str, Any], resume: str) -> None:
    """Check that a run directory that holds a run may be gone on with.

    Raises:
        UserError: If not.
    """
    saved = read_mapping(path / "config.json")
    if resume == "never":
        raise UserError(
            f"run_dir: {path} already holds a run of `lkd {saved.get('command')}`; "
            "go on with it by --resume auto, or choose another --run_dir"
        )
    if saved.get("command") != config["command"]:
        raise UserError(
            f"run_dir: {path} holds a run of `lkd {saved.get('command')}`, not of `lkd {config['command']}`"
        )
    before, now = flatten(saved.get("recipe")), flatten(config["recipe"])
    for key in sorted(before.keys() | now.keys()):
        if not {key, key.split(".")[0]} & set(MAY_DIFFER_ON_RESUME) and before.get(key) != now.get(key):
            raise UserError(
                f"{key}: is {now.get(key)!r}, but the run in {path} has {before.get(key)!r}; "
                "a resumed run keeps its config"
            )


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict with dotted keys."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        key: value
        for name, child in tree.items()
        for key, value in flatten(child, f"{prefix}.{name}".lstrip(".")).items()
    }
