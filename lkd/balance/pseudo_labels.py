"""Semi-supervised distillation: the teacher's labels for the images whose own are not known.

*Our reconstruction* of KD-AIF's semi-supervised form; its objective is not public.
"""

import torch

from lkd.data import ImageSet
from lkd.data.splits import interleave_classes
from lkd.errors import UserError
from lkd.teacher import TeacherFunction


def label_by_teacher(
    images: ImageSet, labelled_size: int, teacher: TeacherFunction, device: torch.device, seed: int
) -> ImageSet:
    """Keep the labels of some images and give the others the class that the teacher finds most probable.

    Args:
        images: The training images.
        labelled_size: How many keep theirs, as balanced over the classes as the images are; 0 for all.
        teacher: The teacher.
        device: Where it runs.
        seed: Of the choice.

    Raises:
        UserError: If there are not so many images.
    """
    if not 0 <= labelled_size <= len(images):
        raise UserError(f"labelled_size: {labelled_size} is not between 0 (all) and the {len(images)} training images")
    if not labelled_size:
        return images
    unlabelled = interleave_classes(images.labels, images.num_classes, seed)[labelled_size:]
    labels = images.labels.clone()
    positions = {int(index): place for place, index in zip(unlabelled, images.index[unlabelled], strict=True)}
    for batch in images.batches(unlabelled.split(500), device):
        found = [int(positions[int(index)]) for index in batch.index]
        labels[found] = teacher(batch).logits.argmax(1).cpu()
    return images.relabel(labels)
