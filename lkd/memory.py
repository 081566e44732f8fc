"""Out of memory as one line that says what to lower."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lkd.errors import UserError

FOR_TRAININGS = "a smaller train.batch_size or more train.accumulation"
FOR_ROLLOUTS = "a smaller meta.rollout_steps, meta.outer_batch_size or train.batch_size"
CPU_ALLOCATOR = "DefaultCPUAllocator"  # torch raises a plain RuntimeError that names it


@contextmanager
def explain_exhaustion(place: str, less: str) -> Iterator[None]:
    """Turn running out of memory within the block into a line for the user.

    Args:
        place: Where it happened, say `"step 12"`.
        less: What needs less.

    Raises:
        UserError: If a device or the host has no memory left.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or CPU_ALLOCATOR in str(error):
            advice = f"go on with --resume auto where there is more, or anew with {less}"
            raise UserError(f"{place}: out of memory; {advice}") from error
        raise
