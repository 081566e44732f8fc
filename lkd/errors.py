"""Mistakes that a user can mend: one line, exit code 2, no traceback."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A file, field or value that cannot be used.

    The message names it, what was seen, what is accepted, and what to do.
    """


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
