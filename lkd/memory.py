"""Out of memory as one line that says what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lkd.errors import UserError

CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError that names it


@contextmanager
def explain_exhaustion(place: str, advice: str) -> Iterator[None]:
    """Turn running out of memory within the block into a line for the user.

    Args:
        place: Where it happened, say `"step 12"`.
        advice: What to do.

    Raises:
        UserError: If a device or the host has no memory left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error):
            raise UserError(f"{place}: out of memory; {advice}") from error
        raise
