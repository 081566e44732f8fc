"""Mistakes that a user can mend: one line, exit code 2, no traceback."""

import difflib
import errno
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
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


def first_line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def explained(place: str) -> Iterator[None]:
    """Turn what the bi-level engine says of a problem, a `ValueError`, into the user's line.

    Args:
        place: Where it happened, say `"outer step 12"`.
    """
    try:
        yield
    except ValueError as error:
        raise UserError(f"{place}: {first_line(error)}") from error


def check_choice(kind: str, name: str, choices: Iterable[str]) -> None:
    """Check that a name is one of the known ones.

    `kind`: what is being named, say `"student"`.
    """
    known = sorted(choices)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5) or known[:12]
        raise UserError(f"{kind}: unknown name {name!r}; nearest: {', '.join(near)}")


CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError that names it


@contextmanager
def explaining_exhaustion(place: str, less: str) -> Iterator[None]:
    """Turn an error that says that memory ran out into a line for the user.

    Args:
        place: Where it may happen, say `"step 12"`.
        less: What would take less memory.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        import torch  # here: `lkd --help` reads this file, and must not wait for it

        if isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error):
            advice = f"go on with --resume auto where there is more, or anew with {less}"
            raise UserError(f"{place}: out of memory; {advice}") from error
        raise
