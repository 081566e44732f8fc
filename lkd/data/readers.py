"""Data sets by name, and the readers of those that are arrays, folders or torchvision's."""

import hashlib
import math
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from lkd.core.errors import UserError, check_choice
from lkd.core.files import MALFORMED
from lkd.data.embedded import ARCHIVE
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
# CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), through torchvision, which checks their md5.

# Mean and standard deviation: for CIFAR-100 those of RepDistiller, for CIFAR-10 those of its training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def load_cifar(name: str, root: str | None) -> Dataset:
    """Load `cifar10` or `cifar100`.

    Args:
        name: Which.
        root: The folder that holds torchvision's folder of it.

    Raises:
        UserError: If it is not there or damaged.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    source = f"https://www.cs.toronto.edu/~kriz/{name.replace('cifar', 'cifar-')}-python.tar.gz"
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {FOLDERS[name]}/ (unpacked from {source})")
    if not (Path(root) / FOLDERS[name]).is_dir():
        raise UserError(f"data.root: {root!r} holds no {FOLDERS[name]}/; unpack {source} there")
    read = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [read(root, train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root: {FOLDERS[name]}/ in {root!r} is damaged ({reason}): unpack {source} anew"
        ) from error
    return Dataset(name, *(wrap(part.data, part.targets, tuple(part.classes), *STATISTICS[name]) for part in parts))


def wrap(
    pixels: np.ndarray, targets: list[int], classes: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageSet:
    """Wrap what torchvision read ([N, 32, 32, 3], [N])."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(targets), torch.arange(len(targets)), classes, mean, std)


# ----------------------------------------------------------------------------------------------------------------------
# Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017): whole, and the part of it that the package carries.

FASHION_CLASSES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
MOST_BYTES = 1 << 26  # that an archive may unpack to
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)  # of the 60,000 training images


def load_embedded(root: str | None = None) -> Dataset:
    """Load the embedded data set, checking it against its sha256."""
    arrays = read_embedded_archive(ARCHIVE)
    return Dataset(
        "embedded", *(fashion_images(*(arrays[f"{split}_{part}"] for part in PARTS)) for split in ("train", "test"))
    )


PARTS = ("images", "labels", "index")


def read_embedded_archive(path: Path) -> dict[str, np.ndarray]:
    """Read the embedded archive.

    Raises:
        UserError: If it is missing, or its bytes are not those whose checksum lies beside it.
    """
    try:
        expected = path.with_suffix(".npz.sha256").read_text().split()[0]
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
    except (OSError, IndexError) as error:
        raise UserError(f"embedded data: cannot read {path} or its .sha256 ({error}): reinstall the package") from error
    if digest != expected:
        raise UserError(
            f"embedded data: {path} is damaged (sha256 {digest[:12]}…, expected {expected[:12]}…): reinstall"
        )
    try:
        check_archive_size(path)
        with np.load(path, allow_pickle=False) as archive:
            arrays = dict(archive)
            wrong = [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]
    except Exception as error:  # of zip, zlib, NumPy and its parser of headers
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"embedded data: {path} cannot be read ({type(error).__name__}: {reason})") from error
    if wrong:
        raise UserError(f"embedded data: {path}: {wrong[0]!r} is not an array")
    return arrays


def check_archive_size(path: Path) -> None:
    """Check what an archive unpacks to, before it is.

    Raises:
        ValueError: If it is over `MOST_BYTES`, or an array claims more than its member holds.
    """
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > MOST_BYTES:
            raise ValueError(f"it would unpack to {size:,} bytes, at most {MOST_BYTES:,} are read")
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, _, kind = read(file)
            if math.prod(shape) * kind.itemsize > member.file_size:
                raise ValueError(
                    f"{member.filename} claims the shape {shape}, which its {member.file_size:,} bytes lack"
                )


def load_fashion_mnist(root: str | None) -> Dataset:
    """Load the full Fashion-MNIST through torchvision."""
    from torchvision.datasets import FashionMNIST

    if root is None:
        raise UserError("data.root: missing; give the folder that holds FashionMNIST/raw/, or where to download it")
    parts = []
    for train in (True, False):
        try:
            full = FashionMNIST(root, train=train, download=not (Path(root) / "FashionMNIST" / "raw").is_dir())
        except (*MALFORMED, OSError) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"data.root: Fashion-MNIST cannot be read from {root!r}: {reason}") from error
        images, count = full.data.numpy(), 60_000 if train else 10_000
        if images.shape != (count, 28, 28) or len(full.targets) != count:
            raise UserError(
                f"data.root: {root!r} holds images of shape {images.shape} with {len(full.targets)} labels, "
                f"not ({count}, 28, 28)"
            )
        parts.append(fashion_images(images, full.targets.numpy(), np.arange(count)))
    return Dataset("fashion_mnist", *parts)


def load_fashion_mnist_rest(root: str | None) -> Dataset:
    """Load the full training set without the embedded images; the test part is the embedded one."""
    full, embedded = load_fashion_mnist(root).train, load_embedded()
    kept = torch.ones(len(full), dtype=torch.bool)
    kept[embedded.train.index] = False
    return Dataset("fashion_mnist_rest", full.select(kept.nonzero().flatten()), embedded.test)


def load_fashion_mnist_unseen(root: str | None) -> Dataset:
    """Load the embedded training images, which the embedded teacher never saw, with the full test part."""
    return Dataset("fashion_mnist_unseen", load_embedded().train, load_fashion_mnist(root).test)


def fashion_images(images: np.ndarray, labels: np.ndarray, index: np.ndarray) -> ImageSet:
    """Wrap arrays of Fashion-MNIST ([N, 28, 28], [N], [N])."""
    return ImageSet(
        torch.from_numpy(images).unsqueeze(1),
        torch.from_numpy(labels).long(),
        torch.from_numpy(index).long(),
        FASHION_CLASSES,
        FASHION_MEAN,
        FASHION_STD,
    )


# ----------------------------------------------------------------------------------------------------------------------
# torchvision's data sets, by timm's names (`torch/imagenet`, `torch/places365`, ...).


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


# ----------------------------------------------------------------------------------------------------------------------
# Data sets by name.

DATASETS: dict[str, Callable[[str | None], Dataset]] = {
    "embedded": load_embedded,
    "fashion_mnist": load_fashion_mnist,
    "fashion_mnist_rest": load_fashion_mnist_rest,
    "fashion_mnist_unseen": load_fashion_mnist_unseen,
    "cifar10": partial(load_cifar, "cifar10"),
    "cifar100": partial(load_cifar, "cifar100"),
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
    if name not in (*DATASETS, *FILE_READERS) and not (rest and reader in NAMED_READERS):
        check_choice("data.name", name, [*DATASETS, *FILE_READERS, *(f"{known}/NAME" for known in NAMED_READERS)])
    loading = loading or LoadingOptions()
    if name in DATASETS:
        return DATASETS[name](root)
    if name in FILE_READERS:
        return FILE_READERS[name](root, loading)
    return NAMED_READERS[reader](rest, root, loading)
