"""Training images split into *train* and *meta-validation*."""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor

from lkd.core.errors import UserError
from lkd.core.random import seeded_generator
from lkd.data.images import ImageSet

META_VALIDATION_SHARE = 10  # one image in so many is meta-validation, unless a size is given


def choose_meta_validation_size(count: int) -> int:
    """Meta-validation images of so many training images, where nobody says how many."""
    return max(1, count // META_VALIDATION_SHARE)


class Splits(NamedTuple):
    """Two disjoint parts of the training images.

    Attributes:
        train: What students are trained on.
        meta_validation: What the outer loop, tuning and the choice of a checkpoint may look at.
        fingerprint: A hash of which images went where: equal fingerprints, equal splits.
    """

    train: ImageSet
    meta_validation: ImageSet
    fingerprint: str


def split_training_images(
    images: ImageSet, train_size: int, meta_validation_size: int, seed: int, imbalance: float = 1.0
) -> Splits:
    """Split stratified by class, disjoint, a function of the seed alone.

    Args:
        images: The data set's training part.
        train_size: Images for training; a multiple of the number of classes, or as even as it goes. 0 means all that
            meta-validation leaves.
        meta_validation_size: Images for meta-validation.
        seed: Of the draw.
        imbalance: Images of the first class over those of the last one, for training; see `draw_long_tail`.

    Raises:
        UserError: If the sizes are impossible.
    """
    train_size = train_size or len(images) - meta_validation_size
    if train_size < 1 or train_size + meta_validation_size > len(images):
        raise UserError(
            f"data.train_size + data.meta_validation_size: {train_size} + {meta_validation_size} do not fit "
            f"into the {len(images)} training images (at least 1 must be left to train on)"
        )
    order = interleave_classes(images.labels, images.num_classes, seed)
    # Interleaved classes: any contiguous piece is as balanced as the data are.
    validation, rest = order[:meta_validation_size], order[meta_validation_size:]
    if imbalance == 1:
        train = rest[:train_size]
    else:
        train = rest[draw_long_tail(images.labels[rest], images.num_classes, train_size, imbalance)]
    digest = hashlib.sha256()
    for part in (images.index[train], images.index[validation]):
        digest.update(part.sort().values.numpy().tobytes())
    return Splits(images.select(train), images.select(validation), digest.hexdigest()[:16])


def interleave_classes(labels: Tensor, num_classes: int, seed: int) -> Tensor:
    """Order positions so that every prefix holds each class in proportion; a permutation of [0, N)."""
    generator = seeded_generator(seed, 2)
    shuffled = torch.randperm(len(labels), generator=generator)
    drawn = labels[shuffled]
    by_class, counts = drawn.argsort(stable=True), torch.bincount(labels, minlength=num_classes)
    firsts = counts.cumsum(0) - counts
    rank = torch.empty(len(labels), dtype=torch.float64)
    rank[by_class] = torch.arange(len(labels), dtype=torch.float64) - firsts[drawn[by_class]] + 0.5
    return shuffled[(rank / counts[drawn]).argsort(stable=True)]


def draw_long_tail(labels: Tensor, num_classes: int, size: int, imbalance: float) -> Tensor:
    """Draw a long tail (Cui et al., CVPR 2019): from class to class the images fall exponentially.

    Args:
        labels: [N]; of each class the first are taken.
        num_classes: Number of classes.
        size: Images in all, up to rounding; fewer where a class has not so many as its share would be.
        imbalance: Images of the first class over those of the last.

    Returns:
        Positions, ascending.
    """
    shares = imbalance ** -torch.linspace(0, 1, num_classes, dtype=torch.float64)
    available = torch.bincount(labels, minlength=num_classes)
    there = available > 0
    scale = min(float((available / shares)[there].min()), size / float(shares[there].sum()))
    counts = (scale * shares).round().long().clamp(min=1)
    members = [(labels == label).nonzero().flatten()[:count] for label, count in enumerate(counts.tolist())]
    return torch.cat(members).sort().values
