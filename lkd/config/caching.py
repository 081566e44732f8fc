"""The recipe of a teacher cache."""

from dataclasses import dataclass

from lkd.config.trainings import DistillRecipe


@dataclass
class CacheRecipe(DistillRecipe):
    """Keep a teacher's answers to N augmentations of every training image, for trainings with the same `teacher.cache`.

    Takes the recipe of `lkd distill`, with `data.augmentation_seeds` N and the folder `teacher.cache`. Of the training
    it reads batch size, precision, compile and channels_last. What is there already is kept, and the rest is added.

    Args:
        top_k: Classes of each answer that are kept, with the sum of the others' probabilities; 0 for all classes.
        shard_size: Images a file; a killed command loses at most one file's answers.
    """

    top_k: int = 0
    shard_size: int = 50_000
