"""Mixup (Zhang et al., 2018) and CutMix (Yun et al., 2019) of whole batches, by timm, from a seed of their own."""

import numpy as np
from timm.data import Mixup

from lkd.data.images import Batch


def mix_batch(batch: Batch, num_classes: int, mixup: float, cutmix: float, seed: int) -> Batch:
    """Mix each image with its mirror in the batch: the first with the last, and so on.

    Args:
        batch: An even number of images, with class indices.
        num_classes: Number of classes.
        mixup: α of mixup's Beta(α, α); 0 for none.
        cutmix: α of CutMix's; 0 for none. If neither is 0 each batch has one of them, with probability 1/2.
        seed: What is mixed how is a function of it.

    Returns:
        The batch with mixed images and the target as distributions [B, C]; `index` and `augmentation` are those of each
        image before it was mixed.
    """
    state = np.random.get_state()  # noqa: NPY002 - timm draws from numpy's global generator
    np.random.seed(seed & 0xFFFFFFFF)  # noqa: NPY002
    try:
        mixer = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes)
        images, target = mixer(batch.images, batch.target)
    finally:
        np.random.set_state(state)  # noqa: NPY002
    return batch._replace(images=images, target=target)
