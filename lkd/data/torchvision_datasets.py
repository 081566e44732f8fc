"""torchvision's data sets, by timm's names (`torch/imagenet`, `torch/places365`, ...)."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lkd.data.dataset import Dataset
from lkd.data.image_files import LoadingOptions
from lkd.data.labelled_sources import LabelledSource, build_dataset, check_root
from lkd.data.sources import FileSource, ImageSource
from lkd.errors import UserError


class TorchvisionSource:
    """Images that a torchvision data set holds in memory.

    Args:
        images: The data set; its items are (Pillow image, label).
        title: The data set's name and the split's.
    """

    def __init__(self, images: Any, title: str) -> None:
        self.images = images
        self.title = title

    def __len__(self) -> int:
        return len(self.images)

    def load(self, position: int) -> Tensor:
        """Take an image; see `ImageSource`."""
        return pil_to_tensor(self.images[position][0].convert("RGB"))

    def name(self, position: int) -> str:
        """The split and the position."""
        return f"{self.title}, image {position}"

    def size(self, position: int) -> int:
        """Bytes of its pixels."""
        return self.load(position).numel()


def load_torchvision(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Load one of torchvision's data sets.

    Args:
        name: timm's name of it, without `torch/`.
        root: torchvision's root folder of it.
        loading: How images are loaded.

    Raises:
        UserError: If the name is unknown, the files are missing, or the data set has no list of labels.
    """
    from timm.data import create_dataset

    root = check_root(root, f"torchvision's {name}")
    title = f"torch/{name}"
    parts = []
    for split in ("train", "validation"):
        try:
            images = create_dataset(title, root, split)
        except (AssertionError, RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"data.root: {title} cannot be read from {root!r} ({reason})") from error
        labels = getattr(images, "targets", None)
        if labels is None:
            raise UserError(f"data.name: {title} does not say its labels beforehand; take another form of it")
        parts.append(LabelledSource(wrap_images(images, f"{title}/{split}"), [int(label) for label in labels]))
    classes = tuple(str(entry) for entry in getattr(images, "classes", range(1 + max(parts[0].labels))))
    return build_dataset(title, parts, classes, loading, root)


def wrap_images(images: Any, title: str) -> ImageSource:
    """The images' files, if the data set is a list of files; else the data set."""
    files = getattr(images, "imgs", None)
    return (
        FileSource(Path("/"), [str(Path(path).absolute())[1:] for path, _ in files])
        if files
        else TorchvisionSource(images, title)
    )
