"""Training batches as a pure function of the step: nothing to save, so a resumed run sees the same ones to the bit."""

import torch
from torch import Generator, Tensor

from lkd.data.augmentation import augmentations_of
from lkd.data.images import Batch, ImageSet
from lkd.errors import UserError, check_choice


class Batches:
    """Shuffled epochs over an image set; the last, incomplete batch of an epoch is dropped.

    Args:
        images: The training images.
        batch_size: Images a batch.
        seed: Of the order and of the augmentation.
        augmentation: A name in `augmentations_of` these images.
        device: Where batches go.
        part: Which part of every batch is given, of how many equal ones: (0, 1) is all of it. Several processes share
            one order of the images, so that their parts together are the batch of one process.

    Raises:
        UserError: If the batch is larger than the set or does not divide, or the augmentation is unknown.
    """

    def __init__(
        self,
        images: ImageSet,
        batch_size: int,
        seed: int,
        augmentation: str = "none",
        device: str | torch.device = "cpu",
        part: tuple[int, int] = (0, 1),
    ) -> None:
        known = augmentations_of(images.images)
        check_choice("data.augmentation", augmentation, known)
        if not 1 <= batch_size <= len(images):
            raise UserError(f"train.batch_size: {batch_size} is not between 1 and the {len(images)} training images")
        if batch_size % part[1]:
            raise UserError(
                f"train.batch_size: {batch_size} is the batch of all {part[1]} processes together and does not divide "
                f"among them; take a multiple of {part[1]}"
            )
        self.images = images
        self.batch_size = batch_size
        self.part = part
        self.seed = seed
        self.augment = known[augmentation]
        self.device = torch.device(device)
        self.steps_per_epoch = len(images) // batch_size
        self._epoch = -1
        self._order = torch.empty(0, dtype=torch.int64)

    def at(self, step: int) -> Batch:
        """The batch of this step, counted from 0 over all epochs."""
        epoch, within = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = torch.randperm(len(self.images), generator=seeded_generator(self.seed, 0, epoch))
            self._epoch = epoch
        number, parts = self.part
        positions = self._order[within * self.batch_size : (within + 1) * self.batch_size][number::parts]
        words = (self.seed, 1, step, *([number] if number else []))
        pixels = self.augment(self.images.images[positions], seeded_generator(*words))
        return Batch(
            self.images.normalize(pixels.to(self.device)),
            self.images.labels[positions].to(self.device),
            self.images.index[positions].to(self.device),
        )


def seeded_generator(*words: int) -> Generator:
    """A CPU generator whose seed is mixed from several integers.

    By splitmix64, so that neighbouring seeds share nothing.
    """
    state = 0
    for word in words:
        state = (state ^ (word & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return Generator().manual_seed(state)


def draw_positions(count: int, batch_size: int, generator: Generator) -> Tensor:
    """Draw `batch_size` distinct positions out of `count`."""
    return torch.randperm(count, generator=generator)[:batch_size]
