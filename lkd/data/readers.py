"""Data sets by name, and the readers of those that torchvision knows or the package carries."""

import hashlib
import io
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, FashionMNIST
from torchvision.transforms.functional import pil_to_tensor

from lkd.core.errors import UserError, check_choice
from lkd.core.files import MALFORMED
from lkd.data.embedded import ARCHIVE, ARCHIVE_HASH
from lkd.data.image_files import FileSource, ImageSource, LoadingOptions
from lkd.data.images import Dataset, ImageSet
from lkd.data.sources import (
    LabelledSource,
    build_dataset,
    check_root,
    load_class_tars,
    load_hugging_face,
    load_image_folder,
    load_web_shards,
)

# ----------------------------------------------------------------------------------------------------------------------
# In memory: CIFAR (Krizhevsky, 2009), Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017) and the part of it that is embedded.

FASHION_SIZES = (60_000, 10_000)


class InMemory(NamedTuple):
    """A data set that torchvision reads into memory.

    Attributes:
        read: torchvision's class.
        folder: Its folder in the root.
        source: Where it is to be had; None if torchvision downloads it.
        mean: Of each channel, of the training images (for CIFAR-100 as RepDistiller rounds it).
        std: Standard deviation of each channel.
    """

    read: Callable[..., Any]
    folder: str
    source: str | None
    mean: tuple[float, ...]
    std: tuple[float, ...]


CIFAR = "https://www.cs.toronto.edu/~kriz/cifar-{}-python.tar.gz"
IN_MEMORY = {
    "cifar10": InMemory(
        CIFAR10, "cifar-10-batches-py", CIFAR.format(10), (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
    ),
    "cifar100": InMemory(
        CIFAR100, "cifar-100-python", CIFAR.format(100), (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
    ),
    "fashion_mnist": InMemory(FashionMNIST, "FashionMNIST/raw", None, (0.2860,), (0.3530,)),
}


def load_in_memory(name: str, root: str | None) -> Dataset:
    """Load `cifar10`, `cifar100` or `fashion_mnist`.

    Raises:
        UserError: If it is not there or damaged.
    """
    known = IN_MEMORY[name]
    how = f"unpacked from {known.source}" if known.source else "or where to download it"
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {known.folder}/ ({how})")
    is_there = (Path(root) / known.folder).is_dir()
    if known.source and not is_there:
        raise UserError(f"data.root: {root!r} holds no {known.folder}/; unpack {known.source} there")
    try:
        parts = [known.read(root, train=train, download=not is_there) for train in (True, False)]
    except (*MALFORMED, OSError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        again = f"unpack {known.source} anew" if known.source else "remove it, and it is downloaded anew"
        raise UserError(f"data.root: {known.folder}/ in {root!r} cannot be read ({reason}): {again}") from error
    if name == "fashion_mnist":
        for part, count in zip(parts, FASHION_SIZES, strict=True):
            if part.data.shape != (count, 28, 28) or len(part.targets) != count:
                raise UserError(
                    f"data.root: {root!r} holds images of shape {tuple(part.data.shape)} with {len(part.targets)} "
                    f"labels, not ({count}, 28, 28)"
                )
    return Dataset(name, *(wrap_pixels(part.data, part.targets, part.classes, known) for part in parts))


def wrap_pixels(
    pixels: Any, labels: Any, classes: Sequence[str], known: InMemory, index: np.ndarray | None = None
) -> ImageSet:
    """Wrap images [N, H, W] or [N, H, W, C] in memory, labels [N] and, if it is not 0, 1, ..., their index [N]."""
    images, targets = torch.as_tensor(pixels), torch.as_tensor(labels).long()
    images = images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()
    positions = torch.arange(len(targets)) if index is None else torch.from_numpy(index).long()
    return ImageSet(images, targets, positions, tuple(classes), known.mean, known.std)


def load_embedded(root: str | None = None) -> Dataset:
    """Load the embedded part of Fashion-MNIST, checked against its hash."""
    arrays, known = read_embedded_archive(ARCHIVE), IN_MEMORY["fashion_mnist"]
    parts = ([arrays[f"{part}_{kind}"] for kind in ("images", "labels", "index")] for part in ("train", "test"))
    return Dataset("embedded", *(wrap_pixels(p, t, FashionMNIST.classes, known, index) for p, t, index in parts))


def read_embedded_archive(path: Path) -> dict[str, np.ndarray]:
    """Read the embedded archive."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"embedded data: cannot read {path} ({error.strerror}): reinstall the package") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != ARCHIVE_HASH:
        raise UserError(
            f"embedded data: {path} is damaged (sha256 {digest[:12]}…, expected {ARCHIVE_HASH[:12]}…): reinstall"
        )
    with np.load(io.BytesIO(content), allow_pickle=False) as archive:
        return dict(archive)


def load_fashion_mnist_rest(root: str | None) -> Dataset:
    """Load the full training set without the embedded images; the test part is the embedded one."""
    full, embedded = load_in_memory("fashion_mnist", root).train, load_embedded()
    kept = torch.ones(len(full), dtype=torch.bool)
    kept[embedded.train.index] = False
    return Dataset("fashion_mnist_rest", full.select(kept.nonzero().flatten()), embedded.test)


def load_fashion_mnist_unseen(root: str | None) -> Dataset:
    """Load the embedded training images, which the embedded teacher never saw, with the full test part."""
    return Dataset("fashion_mnist_unseen", load_embedded().train, load_in_memory("fashion_mnist", root).test)


# ----------------------------------------------------------------------------------------------------------------------
# torchvision's data sets, by timm's names (`torch/imagenet`, `torch/places365`, ...).


class TorchvisionSource(ImageSource):
    """Images that a torchvision data set holds in memory.

    Args:
        images: The data set; its items are (Pillow image, label).
        title: The data set's name and the split's.
    """

    def __init__(self, images: Any, title: str) -> None:
        self.images = images
        self.names = [f"{title}, image {position}" for position in range(len(images))]

    def read(self, position: int) -> Tensor:
        """The pixels of an image."""
        return self.load(position).flatten()

    def load(self, position: int) -> Tensor:
        """Take an image; see `ImageSource`."""
        return pil_to_tensor(self.images[position][0].convert("RGB"))


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

    folder = str(check_root(root, f"torchvision's {name}"))
    title = f"torch/{name}"
    parts = []
    for split in ("train", "validation"):
        try:
            images = create_dataset(title, folder, split)
        except (AssertionError, RuntimeError, OSError, ValueError) as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"data.root: {title} cannot be read from {folder!r} ({reason})") from error
        labels = getattr(images, "targets", None)
        if labels is None:
            raise UserError(f"data.name: {title} does not say its labels beforehand; take another form of it")
        parts.append(LabelledSource(wrap_images(images, f"{title}/{split}"), [int(label) for label in labels]))
    classes = tuple(str(entry) for entry in getattr(images, "classes", range(1 + max(parts[0].labels))))
    return build_dataset(title, parts, classes, loading, folder)


def wrap_images(images: Any, title: str) -> ImageSource:
    """The images' files, if the data set is a list of files; else the data set."""
    files = getattr(images, "imgs", None)
    if not files:
        return TorchvisionSource(images, title)
    return FileSource(Path("/"), [str(Path(path).absolute())[1:] for path, _ in files])


# ----------------------------------------------------------------------------------------------------------------------
# Data sets by name.

DATASETS: dict[str, Callable[[str | None], Dataset]] = {
    "embedded": load_embedded,
    "fashion_mnist_rest": load_fashion_mnist_rest,
    "fashion_mnist_unseen": load_fashion_mnist_unseen,
    **{name: partial(load_in_memory, name) for name in IN_MEMORY},
}
"""In memory, by name; from a root."""

FILE_READERS: dict[str, Callable[[str | None, LoadingOptions], Dataset]] = {
    "image_folder": load_image_folder,
    "tar": load_class_tars,
}
"""In files, by name; from a root."""

NAMED_READERS: dict[str, Callable[[str, str | None, LoadingOptions], Dataset]] = {
    "wds": load_web_shards,
    "hfds": load_hugging_face,
    "torch": load_torchvision,
}
"""In files, as `READER/NAME`; from the name and a root."""


def load_dataset(name: str, root: str | None = None, loading: LoadingOptions | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: `embedded` (12,000 + 4,000 images of Fashion-MNIST, in the package); `fashion_mnist` (all of it, 60,000 +
            10,000); `fashion_mnist_unseen` (the training images of `embedded`, which its teacher never saw, with all
            10,000 test images); `fashion_mnist_rest` (the 48,000 training images that are not in `embedded`, with the
            embedded test images: what a teacher of embedded students may be trained on); `cifar10` or `cifar100`;
            `image_folder` or `tar` (ImageNet, or images of these layouts); `wds/NAME` (WebDataset shards on a disk);
            `hfds/NAME` (Hugging Face's); `torch/NAME` (torchvision's, by timm's name).
        root: Folder of the data set. Fashion-MNIST is downloaded there if it is not and there is internet. Not used by
            `embedded`.
        loading: How images in files are loaded.

    Raises:
        UserError: If the name is unknown, or the files are missing, damaged or of another shape.
    """
    reader, _, rest = name.partition("/")
    loading = loading or LoadingOptions()
    if name in DATASETS:
        return DATASETS[name](root)
    if name in FILE_READERS:
        return FILE_READERS[name](root, loading)
    if not (rest and reader in NAMED_READERS):
        check_choice("data.name", name, [*DATASETS, *FILE_READERS, *(f"{known}/NAME" for known in NAMED_READERS)])
    return NAMED_READERS[reader](rest, root, loading)
