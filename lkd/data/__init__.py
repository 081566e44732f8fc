"""Data sets, their splits and batches."""

from lkd.data.batches import Batches
from lkd.data.images import Batch, Dataset, ImageSet
from lkd.data.label_noise import flip_labels
from lkd.data.readers import DATASETS, load_dataset
from lkd.data.splits import split_training_images

__all__ = [
    "DATASETS",
    "Batch",
    "Batches",
    "Dataset",
    "ImageSet",
    "flip_labels",
    "load_dataset",
    "split_training_images",
]
