"""Mistakes that a user can mend: one line, exit code 2, no traceback."""

import difflib
import errno
from collections.abc import Iterable
from pathlib import Path

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BAD_PLACE = (  # a file's name, or where it lies: not what is in it
    errno.ENAMETOOLONG, errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.EIO, errno.ESTALE,
)  # fmt: skip


class UserError(Exception):
    """A file, field or value that cannot be used.

    The message names it, what was seen, what is accepted, and what to do.
    """


class DamagedFileError(UserError):
    """A file whose content is not what was written."""


def explain_failed_write(path: Path | str, error: OSError) -> str:
    """One line about a file that could not be written."""
    advice = "; free some space and go on with --resume auto" if error.errno in FULL_DISK else ""
    return f"{path}: cannot be written: {error.strerror or error}{advice}"


def check_choice(kind: str, name: str, choices: Iterable[str]) -> None:
    """Check that a name is one of the known ones.

    Args:
        kind: What is being named, say `"student"`.
        name: The name given.
        choices: The accepted names.

    Raises:
        UserError: If `name` is not among `choices`; the message gives the nearest ones.
    """
    known = sorted(choices)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:12]
        raise UserError(f"{kind}: unknown name {name!r}; nearest: {', '.join(near)}")
