"""Data sets, their splits and batches."""

from lkd.core.random import draw_positions, seeded_generator
from lkd.data.batches import Batches
from lkd.data.image_files import LoadingOptions
from lkd.data.images import Batch, Dataset, ImageSet
from lkd.data.readers import DATASETS, load_dataset
from lkd.data.splits import Splits, flip_labels, split_training_images

__all__ = [
    "DATASETS",
    "Batch",
    "Batches",
    "Dataset",
    "ImageSet",
    "LoadingOptions",
    "Splits",
    "draw_positions",
    "flip_labels",
    "load_dataset",
    "seeded_generator",
    "split_training_images",
]
