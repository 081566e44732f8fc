"""What a student is given that is not finite: a damaged image, a broken teacher."""

import torch
from torch import Tensor

from lkd.data import Batch
from lkd.errors import UserError
from lkd.outputs import Outputs
from lkd.processes import any_process

NAMED = 5  # images in a message


class BrokenInputError(UserError):
    """An image or a teacher's answer that is not finite: no fault of the training."""


def sum_inputs(batch: Batch, teacher: Outputs | None) -> Tensor:
    """A scalar that is finite if and only if the batch and the teacher's answers are; asks no device to wait."""
    return torch.stack([tensor.sum() for tensor in name_inputs(batch, teacher).values()]).sum()


def name_inputs(batch: Batch, teacher: Outputs | None) -> dict[str, Tensor]:
    """What a student is given, by what it is called in messages."""
    inputs = {"pixels": batch.images}
    if teacher:
        inputs |= {"the teacher's logits": teacher.logits}
        inputs |= {f"the teacher's features {name}": tensor for name, tensor in teacher.features.items()}
    return inputs


def check_inputs(place: str, batch: Batch, teacher: Outputs | None, shared: bool = False) -> None:
    """Check that a batch and the teacher's answers to it are finite.

    Args:
        place: Where they are used, say `"step 12"`.
        batch: The batch.
        teacher: The answers, if the loss needs any.
        shared: Whether the processes that have met each have a part of the batch; all must ask then, and all raise.

    Raises:
        BrokenInputError: If not; names the images by their index in the data set.
    """
    inputs = name_inputs(batch, teacher)
    anywhere = any(len(find_broken(tensor)) for tensor in inputs.values())
    if not (any_process(anywhere, batch.images.device) if shared else anywhere):
        return
    for what, tensor in inputs.items():
        broken = find_broken(tensor)
        if len(broken):
            named = ", ".join(str(index) for index in batch.index[broken][:NAMED].tolist())
            more = ", ..." if len(broken) > NAMED else ""
            raise BrokenInputError(
                f"{place}: {what} of {len(broken)} of {len(tensor)} images are not finite (images {named}{more}); "
                "check the data and the teacher, and go on with --resume auto"
            )
    raise BrokenInputError(f"{place}: what another process was given is not finite; its message says more")


def find_broken(tensor: Tensor) -> Tensor:
    """Positions of the rows that are not finite, [B, ...] → [N]."""
    return (~torch.isfinite(tensor).flatten(1).all(1)).nonzero().flatten()
