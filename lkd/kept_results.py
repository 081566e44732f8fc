"""Results of trainings as JSON files that know what they hold: a damaged one is not read as another number."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lkd.errors import DamagedFileError, UserError
from lkd.files import read_json, write_json
from lkd.tensor_files import DIGEST_KEY, hash_content


def write_result(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file with a hash of its content, for `read_result`."""
    write_json(path, content | {DIGEST_KEY: hash_content(json.dumps(content), {})})


def read_result(path: Path) -> dict[str, Any]:
    """Read a JSON file that `write_result` wrote; one without a hash is taken as it is.

    Raises:
        UserError: If it cannot be read, or its content is not what was written.
    """
    content = read_json(path)
    digest = content.pop(DIGEST_KEY, None) if isinstance(content, dict) else ""
    if digest is not None and digest != hash_content(json.dumps(content), {}):
        raise DamagedFileError(f"{path}: is damaged: its content is not what was written")
    return content


def drop_damaged(paths: Iterable[Path], say: Callable[[str], None]) -> None:
    """Delete results that are not what was written, so that their trainings are done again."""
    for path in paths:
        try:
            if path.exists():
                read_result(path)
        except UserError as error:
            say(f"warning: {error}; it is done again")
            path.unlink(missing_ok=True)
