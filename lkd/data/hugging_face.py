"""Data sets of the Hugging Face hub, or in its formats on a disk, through the package `datasets`."""

from typing import Any

from torch import Tensor

from lkd.data.dataset import Dataset
from lkd.data.decoding import DamagedImageError, as_bytes, decode
from lkd.data.image_files import LoadingOptions
from lkd.data.labelled_sources import LabelledSource, build_dataset
from lkd.errors import UserError

TEST_SPLITS = ("validation", "val", "test")  # the first that there is


class HuggingFaceSource:
    """Images in a column of an Arrow table.

    Args:
        table: The table, whose images are not decoded.
        column: The column's name.
        title: The data set's name and the split's.
    """

    def __init__(self, table: Any, column: str, title: str) -> None:
        self.table = table.select_columns([column])
        self.column = column
        self.title = title

    def __len__(self) -> int:
        return len(self.table)

    def load(self, position: int) -> Tensor:
        """Decode a row's image; see `ImageSource`."""
        entry = self.table[position][self.column]
        if not entry["bytes"]:
            raise DamagedImageError(f"{self.name(position)}: has no bytes in the table")
        return decode(as_bytes(entry["bytes"]), self.name(position))

    def name(self, position: int) -> str:
        """The table and the row."""
        return f"{self.title}, row {position}"

    def size(self, position: int) -> int:
        """Bytes of the row's image."""
        return len(self.table[position][self.column]["bytes"] or b"")


def load_hugging_face(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Load a data set whose tables hold an image and a class label.

    Args:
        name: What `datasets.load_dataset` takes: a name on the hub, or a folder.
        root: Where downloads are kept; None for that package's own place.
        loading: How images are loaded.

    Raises:
        UserError: If the package is not installed, the data set cannot be loaded, or it has no images, labels or test
            split.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError('data.name: hfds needs the package `datasets`; pip install "lkd[huggingface]"') from error
    try:
        tables = datasets.load_dataset(name, cache_dir=root)
    except Exception as error:  # of any of the package's readers
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"data.name: hfds/{name} cannot be loaded ({reason})") from error
    test = next((split for split in TEST_SPLITS if split in tables), None)
    if "train" not in tables or test is None:
        raise UserError(
            f"data.name: hfds/{name} has the splits {', '.join(tables)}; needed are train and one of "
            f"{', '.join(TEST_SPLITS)}"
        )
    features = tables["train"].features
    images, labels = (
        [column for column, kind in features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    if not images or not labels:
        raise UserError(f"data.name: hfds/{name} has no column of {'class labels' if images else 'images'}: {features}")
    parts = []
    for split in ("train", test):
        table = tables[split].cast_column(images[0], datasets.Image(decode=False))
        source = HuggingFaceSource(table, images[0], f"{name}/{split}")
        parts.append(LabelledSource(source, [int(label) for label in table[labels[0]]]))
        if min(parts[-1].labels, default=0) < 0:
            raise UserError(f"data.name: hfds/{name}: images of {split} have no label (-1)")
    return build_dataset(f"hfds/{name}", parts, tuple(features[labels[0]].names), loading, f"hfds/{name}")
