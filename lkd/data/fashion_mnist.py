"""Fashion-MNIST (Xiao, Rasul, Vollgraf, 2017): whole, and the part of it that the package carries."""

import hashlib
import math
import zipfile
from pathlib import Path

import numpy as np
import torch

from lkd.data.dataset import Dataset
from lkd.data.embedded import ARCHIVE
from lkd.data.images import ImageSet
from lkd.errors import UserError
from lkd.files import MALFORMED

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
