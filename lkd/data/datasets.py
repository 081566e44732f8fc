"""Data sets by name."""

from collections.abc import Callable
from functools import partial

from lkd.data.cifar import load_cifar
from lkd.data.class_tars import load_class_tars
from lkd.data.dataset import Dataset
from lkd.data.fashion_mnist import (
    load_embedded,
    load_fashion_mnist,
    load_fashion_mnist_rest,
    load_fashion_mnist_unseen,
)
from lkd.data.hugging_face import load_hugging_face
from lkd.data.image_files import LoadingOptions
from lkd.data.image_folder import load_image_folder
from lkd.data.torchvision_datasets import load_torchvision
from lkd.data.web_shards import load_web_shards
from lkd.errors import UserError, check_choice

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
    if loading.image_size < 8:
        raise UserError(f"data.image_size: {loading.image_size} is not at least 8 pixels")
    if loading.workers < 0:
        raise UserError(f"data.workers: {loading.workers} is negative; 0 takes a thread for each CPU core")
    if name in DATASETS:
        return DATASETS[name](root)
    if name in FILE_READERS:
        return FILE_READERS[name](root, loading)
    return NAMED_READERS[reader](rest, root, loading)
