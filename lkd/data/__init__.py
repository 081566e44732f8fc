"""Data sets, their splits and batches."""

from lkd.data.batches import Batches, draw_positions, seeded_generator
from lkd.data.dataset import Dataset
from lkd.data.datasets import DATASETS, load_dataset
from lkd.data.images import Batch, ImageSet
from lkd.data.splits import Splits, flip_labels, split_training_images

__all__ = [
    "DATASETS",
    "Batch",
    "Batches",
    "Dataset",
    "ImageSet",
    "Splits",
    "draw_positions",
    "flip_labels",
    "load_dataset",
    "seeded_generator",
    "split_training_images",
]
