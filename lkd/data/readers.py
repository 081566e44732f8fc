"""Data sets by name, and the readers of those that torchvision knows or the package carries."""

import hashlib
import io
import math
import os
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets import CIFAR10, CIFAR100, DatasetFolder, FashionMNIST
from torchvision.datasets.folder import default_loader

from lkd.core.errors import UserError, check_choice, first_line
from lkd.core.files import MALFORMED, lock_folder
from lkd.data.embedded import ARCHIVE, ARCHIVE_HASH
from lkd.data.image_files import DamagedImageError, FileSource, ImageSource, LoadingOptions, to_rgb
from lkd.data.images import Dataset, ImageSet, measure
from lkd.data.sources import (
    MOST_NAMED,
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

    read: Any
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
    folder = Path(root) / known.folder
    if known.source and not folder.is_dir():
        raise UserError(f"data.root: {root!r} holds no {known.folder}/; unpack {known.source} there")
    try:
        Path(root).mkdir(parents=True, exist_ok=True)
        with lock_folder(Path(root)):  # one process downloads it
            parts = [known.read(root, train=train, download=not folder.is_dir()) for train in (True, False)]
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
    images, targets = channels_first(torch.as_tensor(pixels)), torch.as_tensor(labels).long()
    positions = torch.arange(len(targets)) if index is None else torch.from_numpy(index).long()
    return ImageSet(images, targets, positions, tuple(classes), known.mean, known.std)


def channels_first(images: Tensor) -> Tensor:
    """Turn images [N, H, W] or [N, H, W, C] into [N, C, H, W]."""
    return images.unsqueeze(1) if images.dim() == 3 else images.permute(0, 3, 1, 2).contiguous()


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
# In memory from an .npz file of MedMNIST's layout (Yang et al., 2023).

NPZ_SPLITS = ("train", "val", "test")
NPZ_LAYOUT = (
    "NAME.npz with train_images and test_images (uint8 [N, H, W] or [N, H, W, 3]), train_labels and test_labels "
    "(integers [N] or [N, 1])"
)
MOST_DEFLATED = 1100  # bytes that zlib can make of one
MOST_NPZ = 2**33  # bytes of an array in memory


def find_npz(name: str, root: str | None) -> Path:
    """The file `root/name.npz`."""
    path = check_root(root, NPZ_LAYOUT) / f"{name}.npz"
    if not os.path.isfile(path):  # never raises, as Path's does
        raise UserError(f"data.root: {path}: no such file; give the folder that holds {NPZ_LAYOUT}")
    return path


def load_npz(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Load `root/name.npz` into memory.

    The validation images, if there are any, are further training images, behind the others: meta-validation is drawn
    from all of them.

    Args:
        name: The file's name without its suffix.
        root: Its folder.
        loading: Not used: the images have their own size.

    Raises:
        UserError: If the file is missing or damaged, or an array is missing or of another shape or type.
    """
    path = find_npz(name, root)
    arrays = read_npz(path)
    splits = [split for split in NPZ_SPLITS if split != "val" or "val_images" in arrays]
    parts = {split: check_arrays(arrays, split, path) for split in splits}
    shapes = {split: list(images.shape[1:]) for split, (images, _) in parts.items()}
    if any(shape != shapes["train"] for shape in shapes.values()):
        raise UserError(f"data.root: {path}: the images, [C, H, W], are not all of one shape: {shapes}")
    test = parts.pop("test")
    images, labels = (torch.cat(kind) for kind in zip(*parts.values(), strict=True))
    classes = name_npz_classes(arrays, labels, test[1], path)
    mean, std = measure(images)
    if min(std) == 0:
        raise UserError(f"data.root: {path}: a channel of train_images has the same value everywhere")
    sets = (
        ImageSet(*part, torch.arange(len(part[1])), classes, tuple(mean), tuple(std))
        for part in ((images, labels), test)
    )
    return Dataset(f"npz/{name}", *sets)


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of a data set; of each the header is checked before memory is taken."""
    known = {f"{split}_{kind}" for split in NPZ_SPLITS for kind in ("images", "labels")} | {"class_names"}
    arrays = {}
    try:
        most = MOST_DEFLATED * path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if (key := member.filename.removesuffix(".npy")) in known:
                    with archive.open(member) as file:
                        check_npy_header(file, min(member.file_size, most))
                    with archive.open(member) as file:
                        arrays[key] = np.lib.format.read_array(file, allow_pickle=False)
    except Exception as error:  # of zipfile, zlib and numpy, which let out what their parsers raise
        raise UserError(
            f"data.root: {path}: cannot be read as .npz ({first_line(error)}); expected {NPZ_LAYOUT}"
        ) from error
    return arrays


def check_npy_header(file: IO[bytes], size: int) -> None:
    """Check that an array holds no objects and has as many bytes as its header says, of at most `size`."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    shape, _, dtype = readers[np.lib.format.read_magic(file)](file)
    if dtype.hasobject:
        raise ValueError(f"{file.name} holds pickled objects")
    needed = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or needed > min(size, MOST_NPZ):
        raise ValueError(f"{file.name} claims {dtype}, {list(shape)}: {needed:,} bytes")


def check_arrays(arrays: dict[str, np.ndarray], split: str, path: Path) -> tuple[Tensor, Tensor]:
    """Check the images and labels of a part; images [N, C, H, W], labels [N]."""
    missing = [key for key in (f"{split}_images", f"{split}_labels") if key not in arrays]
    if missing:
        raise UserError(f"data.root: {path}: holds no {missing[0]}, only {', '.join(sorted(arrays)) or 'other arrays'}")
    images, labels = arrays[f"{split}_images"], arrays[f"{split}_labels"]
    is_shape = images.ndim == 3 or (images.ndim == 4 and images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not is_shape or not images.size:
        raise UserError(
            f"data.root: {path}: {split}_images is {images.dtype}, {list(images.shape)}; needed is uint8, [N, H, W] or "
            "[N, H, W, 3]"
        )
    if labels.dtype.kind not in "iu" or labels.shape not in ((len(images),), (len(images), 1)):
        raise UserError(
            f"data.root: {path}: {split}_labels is {labels.dtype}, {list(labels.shape)}; needed is one class index an "
            f"image: integers, [{len(images)}] or [{len(images)}, 1] (several labels an image are not supported)"
        )
    outside = labels[(labels < 0) | (labels >= MOST_NAMED)]
    if outside.size:
        raise UserError(f"data.root: {path}: {split}_labels has {int(outside.flat[0])}; classes are counted from 0")
    pixels = torch.from_numpy(np.ascontiguousarray(images))
    return channels_first(pixels), torch.from_numpy(labels.reshape(-1).astype(np.int64))


def name_npz_classes(arrays: dict[str, np.ndarray], train: Tensor, test: Tensor, path: Path) -> tuple[str, ...]:
    """The classes' names, by default numbers; each of them, and each label, has a training image."""
    largest = int(train.max())
    names = arrays.get("class_names", np.arange(largest + 1).astype(str))
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UserError(
            f"data.root: {path}: class_names is {names.dtype}, {list(names.shape)}; needed are strings, [C]"
        )
    if len(names) < 2 or (largest := max(largest, int(test.max()))) >= len(names):
        raise UserError(f"data.root: {path}: label {largest} of {len(names)} classes; at least 2, counted from 0")
    empty = (torch.bincount(train, minlength=len(names)) == 0).nonzero().flatten().tolist()
    if empty:
        raise UserError(f"data.root: {path}: {len(empty)} of {len(names)} classes (first {empty[0]}) are not in train")
    return tuple(str(name) for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# torchvision's data sets, by timm's names (`torch/imagenet`, `torch/places365`, ...).


class TorchvisionSource(ImageSource):
    """Images that a torchvision data set holds in memory.

    Args:
        images: The data set; its items are (Pillow image, label).
        title: The data set's name and the split's.
    """

    names_tell = False

    def __init__(self, images: Any, title: str) -> None:
        self.images = images
        self.names = [f"{title}, image {position}" for position in range(len(images))]

    def read(self, position: int) -> Tensor:
        """The pixels of an image."""
        return self.load(position).flatten()

    def load(self, position: int) -> Tensor:
        """Take an image; see `ImageSource`."""
        try:
            return to_rgb(self.images[position][0])
        except (OSError, SyntaxError, ValueError) as error:  # it may open files itself
            raise DamagedImageError(f"{self.names[position]}: cannot be decoded ({first_line(error)})") from error


def load_torchvision(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Load one of torchvision's data sets.

    Args:
        name: timm's name of it, without `torch/`.
        root: torchvision's root folder of it.
        loading: How images are loaded.

    Raises:
        UserError: If the name is unknown, the files are missing, the data set has no list of labels, or its parts
            number their classes differently or are the same images.
    """
    from timm.data import create_dataset

    folder = str(check_root(root, f"torchvision's {name}"))
    title = f"torch/{name}"
    parts, names = [], []
    for split in ("train", "validation"):
        try:
            images = create_dataset(title, folder, split)
            parts.append(label_images(images, f"{title}/{split}"))
        except (AssertionError, RuntimeError, OSError, ValueError) as error:
            raise UserError(f"data.root: {title} cannot be read from {folder!r} ({first_line(error)})") from error
        names.append(tuple(map(str, getattr(images, "classes", range(1 + max(parts[0].labels, default=-1))))))
    if names[0] != names[1]:  # each part numbers the folders that it has
        other = min(set(names[0]) ^ set(names[1]), default="their order")
        raise UserError(
            f"data.root: {folder}: {title} has {len(names[0])} classes to train on and {len(names[1])} for validation "
            f"({other} is not in both): take data.name image_folder, or make them alike"
        )
    files = [part.source.names for part in parts if isinstance(part.source, FileSource)]
    if files and files[0] == files[1]:
        raise UserError(f"data.root: {folder} has no folders train and val: {title} would test on its training images")
    return build_dataset(title, parts, names[0], loading, folder)


def label_images(images: Any, title: str) -> LabelledSource:
    """The files and labels of a data set that is a list of files; else the data set, and its `targets`.

    Raises:
        ValueError: If it does not say its labels, one for each image, or they are not numbers.
    """
    in_folders = isinstance(images, DatasetFolder)  # of whose lists its items come from `samples` alone
    is_own = type(images).__getitem__ is not DatasetFolder.__getitem__
    if in_folders and is_own:
        raise ValueError(f"{title} has a __getitem__ of its own, which may give other images and labels than folders")
    files = images.samples if in_folders else getattr(images, "imgs", None)
    labels = [label for _, label in images.samples] if in_folders else getattr(images, "targets", None)
    if labels is None or len(labels) != len(images):
        raise ValueError(f"{title} has no `targets` that say the label of each image")
    source: ImageSource = TorchvisionSource(images, title)
    if files and getattr(images, "loader", default_loader) is default_loader:
        source = FileSource(Path("/"), [str(Path(path).absolute())[1:] for path, _ in files])
    return LabelledSource(source, [int(label) for label in labels])


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
    "npz": load_npz,
}
"""As `READER/NAME`; from the name and a root."""


def load_dataset(name: str, root: str | None = None, loading: LoadingOptions | None = None) -> Dataset:
    """Load a data set.

    Args:
        name: `embedded` (12,000 + 4,000 images of Fashion-MNIST, in the package); `fashion_mnist` (all of it, 60,000 +
            10,000); `fashion_mnist_unseen` (the training images of `embedded`, which its teacher never saw, with all
            10,000 test images); `fashion_mnist_rest` (the 48,000 training images that are not in `embedded`, with the
            embedded test images: what a teacher of embedded students may be trained on); `cifar10` or `cifar100`;
            `image_folder` or `tar` (ImageNet, or images of these layouts); `wds/NAME` (WebDataset shards on a disk);
            `hfds/NAME` (Hugging Face's); `torch/NAME` (torchvision's, by timm's name); `npz/NAME` (the
            arrays of NAME.npz, in memory).
        root: Folder of the data set. Fashion-MNIST is downloaded there if it is not and there is internet. Not used by
            `embedded`.
        loading: How images in files are loaded.

    Raises:
        UserError: If the name is unknown, or the files are missing, damaged or of another shape.
    """
    reader, _, rest = name.partition("/")
    loading = loading or LoadingOptions()
    if loading.packed and (name in DATASETS or reader == "npz"):
        raise UserError(f"data.packed: {name} is in memory as it is, and packed images would not be read: leave it out")
    if name in DATASETS:
        return DATASETS[name](root)
    if name in FILE_READERS:
        return FILE_READERS[name](root, loading)
    if not (rest and reader in NAMED_READERS):
        check_choice("data.name", name, [*DATASETS, *FILE_READERS, *(f"{known}/NAME" for known in NAMED_READERS)])
    return NAMED_READERS[reader](rest, root, loading)


# ----------------------------------------------------------------------------------------------------------------------
# The order of the classes, which decides what a teacher's logits mean.

MOST_LISTED = 1 << 24  # bytes of a class map


def apply_class_map(dataset: Dataset, path: Path) -> Dataset:
    """Number the classes as a file lists them: timm's `class_map`, a name a line, the first is class 0.

    Classes whose names are plain numbers because nothing names them (of shards and arrays) are named in their order.

    Raises:
        UserError: If the file is missing, or its names are not those of the classes, each once.
    """
    try:
        lines = path.read_bytes()[:MOST_LISTED].decode("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not text"
        raise UserError(f"data.class_map: {path}: {reason}; give a text file with a class name a line") from error
    names, classes = tuple(line.strip() for line in lines if line.strip()), dataset.train.class_names
    if classes == tuple(map(str, range(len(names)))) and set(names) != set(classes):
        place = dict(zip(classes, range(len(classes)), strict=True))
    else:
        place = {name: number for number, name in enumerate(names)}
        wrong = [*(set(classes) ^ place.keys()), *(name for name, count in Counter(names).items() if count > 1)]
        if wrong:
            raise UserError(
                f"data.class_map: {path}: lists {len(names)} classes, the data have {len(classes)}; {min(wrong)!r} is "
                "not once in both: list every class once"
            )
    number = torch.tensor([place[name] for name in classes])
    renumber = lambda part: replace(part, labels=number[part.labels], class_names=names)  # noqa: E731
    return replace(dataset, train=renumber(dataset.train), test=renumber(dataset.test))


def sort_as_timm(classes: Sequence[str]) -> list[str] | None:
    """The classes in timm's order, by numbers and without case; None if they are in it, or not sorted as text."""
    from timm.utils.misc import natural_key

    theirs = sorted(classes, key=natural_key)
    return theirs if list(classes) == sorted(classes) != theirs else None
