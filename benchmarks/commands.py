"""Commands that a benchmark runs."""

import subprocess
import sys


def run_lkd(*words: str) -> None:
    """Run a command, or go on with it; leave with its exit status if it fails."""
    status = subprocess.run([sys.executable, "-m", "lkd.cli", *words, "--resume", "auto"], check=False).returncode
    if status:
        sys.exit(status)
