"""What a result was made with: versions, platform, commit."""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

PACKAGES = ("lkd", "torch", "torchvision", "timm", "higher", "wandb", "safetensors", "numpy")


def environment() -> dict[str, Any]:
    """Versions, platform and the source's commit."""
    here = Path(__file__).parent
    git = subprocess.run(
        ["git", "-C", str(here), "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    return {
        "versions": {"python": platform.python_version(), **{name: version_of(name) for name in PACKAGES}},
        "platform": platform.platform(),
        "commit": git.stdout.strip() or None,
    }


def version_of(package: str) -> str | None:
    """Installed version of a package, if it is."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
