"""Data sets by name."""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from lkd.data.cifar import load_cifar
from lkd.data.dataset import Dataset
from lkd.data.embedded import ARCHIVE
from lkd.data.image_files import LoadingOptions
from lkd.data.image_folder import load_image_folder
from lkd.data.images import ImageSet
from lkd.errors import UserError, check_choice

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
FASHION_MEAN, FASHION_STD = (0.2860,), (0.3530,)  # of the 60,000 training images


def load_dataset(name: str, root: str | None = None, loading: LoadingOptions | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: `embedded` (12,000 + 4,000 images of Fashion-MNIST, in the package); `fashion_mnist` (all of it, 60,000 +
            10,000); `fashion_mnist_unseen` (the training images of `embedded`, which its teacher never saw, with all
            10,000 test images); `fashion_mnist_rest` (the 48,000 training images that are not in `embedded`, with the
            embedded test images: what a teacher of embedded students may be trained on); `cifar10` or `cifar100`;
            `image_folder` (ImageNet, or any images of that layout).
        root: Folder of the data set. Fashion-MNIST is downloaded there if it is not and there is internet. Not used by
            `embedded`.
        loading: How images in files are loaded.

    Raises:
        UserError: If the name is unknown, or the files are missing, damaged or of another shape.
    """
    check_choice("data.name", name, DATASETS)
    loading = loading or LoadingOptions()
    if loading.image_size < 8:
        raise UserError(f"data.image_size: {loading.image_size} is not at least 8 pixels")
    if loading.workers < 0:
        raise UserError(f"data.workers: {loading.workers} is negative; 0 takes a thread for each CPU core")
    if name == "image_folder":
        return load_image_folder(root, loading)
    return DATASETS[name](root)


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
    with np.load(path, allow_pickle=False) as archive:
        return dict(archive)


def load_fashion_mnist(root: str | None) -> Dataset:
    """Load the full Fashion-MNIST through torchvision."""
    from torchvision.datasets import FashionMNIST

    if root is None:
        raise UserError("data.root: missing; give the folder that holds FashionMNIST/raw/, or where to download it")
    parts = []
    for train in (True, False):
        try:
            full = FashionMNIST(root, train=train, download=not (Path(root) / "FashionMNIST" / "raw").is_dir())
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(f"data.root: Fashion-MNIST cannot be read from {root!r}: {error}") from error
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


DATASETS: dict[str, Callable[..., Dataset]] = {
    "embedded": load_embedded,
    "fashion_mnist": load_fashion_mnist,
    "fashion_mnist_rest": load_fashion_mnist_rest,
    "fashion_mnist_unseen": load_fashion_mnist_unseen,
    "cifar10": partial(load_cifar, "cifar10"),
    "cifar100": partial(load_cifar, "cifar100"),
    "image_folder": load_image_folder,
}
