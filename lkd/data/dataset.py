"""What every data set is."""

from dataclasses import dataclass

from lkd.data.images import ImageSet


@dataclass(frozen=True)
class Dataset:
    """A named data set: its training part, to be split further, and its test part, for reported numbers only."""

    name: str
    train: ImageSet
    test: ImageSet
