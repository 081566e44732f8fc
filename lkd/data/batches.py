"""Training batches as a pure function of the step: nothing to save, so a resumed run sees the same ones to the bit."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor
from torch.nn.functional import one_hot

from lkd.core.errors import UserError, check_choice
from lkd.core.random import draw_uniform, mix_words, seeded_generator
from lkd.data.augment import AUGMENTATIONS, FILE_AUGMENTATIONS, NUMBERS, augmentations_of
from lkd.data.image_files import ImageFiles
from lkd.data.images import Batch, ImageSet, send
from lkd.data.loader import Loading, Prefetcher

CPU = torch.device("cpu")


@dataclass(eq=False)
class Batches:
    """Shuffled epochs over an image set; the last, incomplete batch of an epoch is dropped.

    What an image looks like is a function of its index and its augmentation seed, which is one for a whole epoch, but
    for repeats. Images in files are decoded ahead; one that cannot be decoded is replaced by the next of the epoch's
    order.

    Args:
        images: The training images.
        batch_size: Images a batch.
        seed: Of the order and of the augmentation.
        augmentation: A name in `augmentations_of` these images.
        device: Where batches go.
        part: Which part of every batch is given, of how many equal ones: (0, 1) is all of it. Several processes share
            one order of the images, so that their parts together are the batch of one process.
        augmentation_seeds, repeats, mixup, cutmix, random_erasing, label_smoothing: As in the recipe (`DataRecipe`,
            `TrainRecipe`). Of N augmentation seeds, 1 to N, all are the same for every `seed`; repeats (Hoffer et al.,
            2020) leave an epoch its steps; with mixup, CutMix or smoothing targets are distributions, [B, C]; with both
            of the former each batch has one, with probability 1/2.
        steps: Steps that will be asked for; none is loaded ahead of its use beyond them. None if they have no end.

    Attributes:
        wait_seconds: Time that `at` has waited for images to be decoded.
    """

    images: ImageSet
    batch_size: int
    seed: int
    augmentation: str = "none"
    device: torch.device = CPU
    part: tuple[int, int] = (0, 1)
    augmentation_seeds: int = 0
    repeats: int = 1
    mixup: float = 0.0
    cutmix: float = 0.0
    random_erasing: float = 0.0
    label_smoothing: float = 0.0
    steps: int | None = None

    def __post_init__(self) -> None:
        size, count, parts = self.batch_size, len(self.images), self.part[1]
        check_choice("data.augmentation", self.augmentation, augmentations_of(self.images.images))
        if not 1 <= size <= count:
            raise UserError(f"train.batch_size: {size} is not between 1 and the {count} training images")
        if size % parts:
            raise UserError(
                f"train.batch_size: {size} is the batch of all {parts} processes together and does not divide among "
                f"them; take a multiple of {parts}"
            )
        if 0 < self.augmentation_seeds < self.repeats:
            raise UserError(
                f"data.repeats: {self.repeats} times an image in a batch, of which data.augmentation_seeds, "
                f"{self.augmentation_seeds}, makes some alike; take more of these, or 0 for new ones"
            )
        if self.repeats > 1 and self.augmentation == "none":
            raise UserError(f"data.repeats: {self.repeats} would repeat images without augmentation; take 1")
        if (self.mixup or self.cutmix) and size // parts % 2:
            raise UserError(f"train.batch_size: mixup and CutMix need an even batch in every process, not {size}")
        self.steps_per_epoch = count // size
        self.wait_seconds = 0.0
        self.order = lru_cache(maxsize=2)(self.draw_order)  # the next epoch is loaded ahead
        self.files = lru_cache(maxsize=2)(self.order_files)
        self.prefetcher = Prefetcher(self.start, self.steps)

    def at(self, step: int) -> Batch:
        """The batch of this step, counted from 0 over all epochs."""
        epoch = step // self.steps_per_epoch
        if isinstance(self.images.images, ImageFiles):
            pixels, slots, seconds = self.prefetcher.take(step).wait()
            self.wait_seconds += seconds
        else:
            slots = self.slots_of(step)
            pixels = self.images.images[self.order(epoch)[slots]]
            if self.augmentation != "none":
                pixels = AUGMENTATIONS[self.augmentation](pixels, self.numbers_of(epoch, slots))
        positions = self.order(epoch)[slots]
        batch = Batch(
            self.images.normalize(pixels.to(self.device, non_blocking=True)),
            send(self.images.labels[positions], self.device),
            send(self.images.index[positions], self.device),
            send(self.augmentation_of(epoch, slots), self.device),
        )
        if self.random_erasing:
            batch = self.erase(step, batch)
        if self.mixup or self.cutmix:
            return self.mix(step, batch)
        if self.label_smoothing:
            classes = self.images.num_classes
            smoothed = self.label_smoothing / classes
            rest = one_hot(batch.target, classes).float() * (1 - self.label_smoothing)
            return batch._replace(target=rest + smoothed)
        return batch

    def erase(self, step: int, batch: Batch) -> Batch:
        """Overwrite a rectangle of some images with noise, by timm; a function of seed, step and part."""
        words = self.seed, 11, step, self.part[0]
        device, python_state = batch.images.device, random.getstate()
        eraser = RandomErasing(self.random_erasing, mode="pixel", device=device)
        random.seed(mix_words(*words))
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                torch.manual_seed(seeded_generator(*words).initial_seed())
                return batch._replace(images=eraser(batch.images.clone()))
        finally:
            random.setstate(python_state)

    def mix(self, step: int, batch: Batch) -> Batch:
        """Mix each image with its mirror in the batch: the first with the last, and so on.

        By timm's mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019); what is mixed how is a function of seed and
        step. Targets become distributions [B, C]; `index` and `augmentation` stay those of each image before.
        """
        state = np.random.get_state()  # noqa: NPY002 - timm draws from numpy's global generator
        np.random.seed(mix_words(self.seed, 10, step) & 0xFFFFFFFF)  # noqa: NPY002
        try:
            smoothing = self.label_smoothing
            mixer = Mixup(self.mixup, self.cutmix, label_smoothing=smoothing, num_classes=self.images.num_classes)
            images, target = mixer(batch.images, batch.target)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return batch._replace(images=images, target=target)

    def start(self, step: int) -> Loading:
        """Start to decode the batch of this step."""
        epoch = step // self.steps_per_epoch
        files, slots = self.files(epoch), self.slots_of(step)
        augment = FILE_AUGMENTATIONS[self.augmentation]
        numbers = dict(zip(slots.tolist(), self.numbers_of(epoch, slots), strict=True))

        def cut(image: Tensor, slot: int) -> Tensor:
            own = numbers[slot] if slot in numbers else self.numbers_of(epoch, torch.tensor([slot]))[0]
            return augment(image, files, own)

        return Loading(files, slots, cut, replace=True, pin=self.device.type == "cuda")

    def slots_of(self, step: int) -> Tensor:
        """The places of this process's images of a step in the order of their epoch."""
        first = step % self.steps_per_epoch * self.batch_size
        number, parts = self.part
        return torch.arange(first + number, first + self.batch_size, parts)

    def draw_order(self, epoch: int) -> Tensor:
        """The order of the images in an epoch: positions in the image set, [N]."""
        order = torch.randperm(len(self.images), generator=seeded_generator(self.seed, 0, epoch))
        return order.repeat_interleave(self.repeats)[: len(order)] if self.repeats > 1 else order

    def order_files(self, epoch: int) -> ImageFiles:
        """The images in files in the order of an epoch."""
        assert isinstance(self.images.images, ImageFiles)
        return self.images.images[self.order(epoch)]

    def numbers_of(self, epoch: int, slots: Tensor) -> Tensor:
        """The random numbers of the images in these places of an epoch's order, [B, NUMBERS]."""
        index = self.images.index[self.order(epoch)[slots]]
        return draw_uniform(self.augmentation_of(epoch, slots), index, NUMBERS)

    def augmentation_of(self, epoch: int, slots: Tensor) -> Tensor:
        """The augmentation seeds of these places in an epoch's order, int64, [B]; 0 where nothing is augmented."""
        if self.augmentation == "none":
            return torch.zeros_like(slots)
        numbers = range(epoch * self.repeats, (epoch + 1) * self.repeats)
        cycle = self.augmentation_seeds
        seeds = [1 + number % cycle if cycle else mix_words(self.seed, 1, number) >> 1 for number in numbers]
        return torch.tensor(seeds)[slots % self.repeats]


class OrderedBatches(Batches):
    """One pass over an image set, the last batch as small as it comes out; the pixels are those of `Batches`.

    As in training, a damaged image is replaced by the next one, which is then seen twice. The augmentation seed is 0
    where nothing is augmented.
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
        return map(self.at, range(self.steps_per_epoch))

    def draw_order(self, epoch: int) -> Tensor:
        return torch.arange(len(self.images))

    def slots_of(self, step: int) -> Tensor:
        first = step * self.batch_size
        return torch.arange(first, min(first + self.batch_size, len(self.images)))

    def augmentation_of(self, epoch: int, slots: Tensor) -> Tensor:
        return torch.full_like(slots, self.augmentation_seed)
