"""Every image once, in order, as one augmentation seed shows it."""

from collections.abc import Iterator

import torch
from torch import Tensor

from lkd.data.batches import Batches
from lkd.data.images import Batch, ImageSet


class OrderedBatches(Batches):
    """One pass over an image set, the last batch as small as it comes out; the pixels are those of `Batches`.

    As in training, a damaged image is replaced by the next one, which is then seen twice.

    Args:
        images: The images.
        batch_size: Images a batch.
        augmentation: A name in `augmentations_of` these images.
        augmentation_seed: The seed; 0 where nothing is augmented.
        device: Where batches go.

    Raises:
        UserError: If the augmentation is unknown.
    """

    def __init__(
        self, images: ImageSet, batch_size: int, augmentation: str, augmentation_seed: int, device: torch.device
    ) -> None:
        batch_size = min(batch_size, len(images))
        steps = -(-len(images) // batch_size)
        super().__init__(images, batch_size, 0, augmentation, device, steps=steps)
        self.steps_per_epoch = steps
        self.augmentation_seed = augmentation_seed

    def __iter__(self) -> Iterator[Batch]:
        """The batches."""
        return map(self.at, range(self.steps_per_epoch))

    def draw_order(self, epoch: int) -> Tensor:
        """The order of the set."""
        return torch.arange(len(self.images))

    def slots_of(self, step: int) -> Tensor:
        """The places of a step's images."""
        first = step * self.batch_size
        return torch.arange(first, min(first + self.batch_size, len(self.images)))

    def augmentation_of(self, epoch: int, slots: Tensor) -> Tensor:
        """The augmentation seed, for each of these places."""
        return torch.full_like(slots, self.augmentation_seed)
