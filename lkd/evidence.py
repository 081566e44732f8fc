"""The form of `result.json`, the figures that an evidence command leaves."""

from typing import Any


def evidence(command: str, environment: dict[str, Any], figures: dict[str, float]) -> dict[str, Any]:
    """What `result.json` holds.

    Args:
        command: The line that makes the evidence again.
        environment: What `lkd.environment.environment` saw: commit, versions, platform.
        figures: Key → number.
    """
    return {
        "command": command,
        "commit": environment["commit"],
        "versions": environment["versions"],
        "machine": environment["platform"],
        "figures": figures,
    }
