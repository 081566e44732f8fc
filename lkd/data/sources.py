"""Image folders, tar files, WebDataset shards and Hugging Face data sets: images that are found one by one."""

import csv
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lkd.core.errors import UserError, first_line
from lkd.core.files import parse_json, read_mapping, refusing_malformed
from lkd.data.image_files import FileSource, ImageSource, LoadingOptions, as_bytes, is_hidden, open_source
from lkd.data.images import Dataset, ImageSet
from lkd.data.packed import open_packed
from lkd.data.tars import Label, Labelled, Member, TarSource, index_tar, keep_index

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, which torchvision's teachers expect
SUFFIXES = (".jpg", ".jpeg", ".jfif", ".png", ".ppm", ".pgm", ".webp", ".bmp", ".tif", ".tiff", ".gif")
FOLDERS = "train/CLASS/*.jpg and val/CLASS/*.jpg (or validation/, test/; or val/ with a list of files and classes)"
TARS = (
    "train.tar and val.tar (of CLASS/ folders, or of CLASS.tar files), or train/CLASS.tar and val/CLASS.tar (or "
    "validation, test)"
)
SHARDS = "*-train-*.tar and *-val-*.tar (or train/*.tar and val/*.tar, or an _info.json that names them)"
SHARD_SPLITS = {"train": ("train", "training"), "val": ("validation", "val", "valid")}  # as whole words of a name
TEST_SPLITS = ("validation", "val", "test")  # of Hugging Face's; the first that there is
TEST_FOLDERS = ("val", "validation", "valid", "test")  # the first that there is
MOST_DIGITS, MOST_NAME = 18, 200  # of a class index, and letters of a class's name, in a shard
SMALL = 1 << 16  # bytes of the largest member that is read while a tar is indexed: a label
MOST_NAMED = 1 << 20  # classes that are named before it is checked that each has images

# ----------------------------------------------------------------------------------------------------------------------
# From two sources with labels to a data set, checked.


class LabelledSource(NamedTuple):
    """A source, and the class of each of its images."""

    source: ImageSource
    labels: list[int]


def build_dataset(
    name: str, parts: Sequence[LabelledSource], classes: tuple[str, ...], loading: LoadingOptions, place: str
) -> Dataset:
    """Build a data set of training and test images, which lie in this place, as messages call it."""
    check_class_names(classes, "data.root")
    for part, labelled in zip(("training", "validation"), parts, strict=True):
        if not labelled.labels:
            raise UserError(f"data.root: {place} holds no {part} images")
    counts = torch.bincount(torch.tensor(parts[0].labels), minlength=len(classes))
    empty = [classes[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if empty:
        named = ", ".join(empty[:5]) + (", ..." if len(empty) > 5 else "")
        raise UserError(
            f"data.root: {len(empty)} of the {len(classes)} classes have no training images in {place} ({named}): "
            "add some, or remove the classes"
        )
    if len(classes) < 2:
        raise UserError(f"data.root: {place} holds {len(classes)} class ({', '.join(classes)}); at least 2 are needed")
    return Dataset(name, *(wrap_source(*part, classes, loading) for part in zip(("train", "val"), parts, strict=True)))


def check_class_names(classes: Sequence[str], place: str) -> None:
    """Check that no class is a folder of the system's, whose number shifts all labels behind it."""
    hidden = [name for name in classes if is_hidden(name)]
    if hidden:
        raise UserError(f"{place}: the class {hidden[0]!r} is a hidden folder, no class: remove it")


def wrap_source(part: str, labelled: LabelledSource, classes: tuple[str, ...], loading: LoadingOptions) -> ImageSet:
    """All images of a source as an image set."""
    source, labels = labelled.source, torch.tensor(labelled.labels)
    if loading.packed:
        source = open_packed(source, Path(loading.packed), part, loading)
    return ImageSet(open_source(source, loading), labels, torch.arange(len(labels)), classes, MEAN, STD)


def number_classes(names: Iterable[str], classes: tuple[str, ...], place: str) -> list[int]:
    """The label of each class name."""
    labels, names = {name: label for label, name in enumerate(classes)}, list(names)
    for name in names:
        if name not in labels:
            raise UserError(f"data.root: {place}: {name!r} is none of the {len(classes)} classes that are trained on")
    return [labels[name] for name in names]


def check_root(root: str | None, layout: str) -> Path:
    """The folder of a data set."""
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {layout}")
    if "://" in root or root.startswith("pipe:"):
        raise UserError(
            f"data.root: {root} is a stream, in which a training cannot be resumed to the bit; copy it to a disk, or "
            "mount it, and give the folder"
        )
    if not Path(root).is_dir():
        raise UserError(f"data.root: {root}: no such folder; give the one that holds {layout}")
    return Path(root)


# ----------------------------------------------------------------------------------------------------------------------
# Image folders of ImageNet's layout. Not by timm's reader, whose order of classes and files is another (10 after 9).


def load_image_folder(root: str | None, loading: LoadingOptions) -> Dataset:
    """Find the images of `root/train/CLASS/` and `root/val/CLASS/`, in folders in these too.

    The classes are those of `train`, sorted. `val` may be called `validation` or `test`, and may hold images beside a
    list of their classes in place of class folders, as Tiny-ImageNet's does.
    """
    folder = check_root(root, FOLDERS)
    classes = list_class_folders(folder, "train")
    part = next((name for name in TEST_FOLDERS if (folder / name).is_dir()), TEST_FOLDERS[0])
    in_folders = any((folder / part / name).is_dir() for name in classes)  # a list beside them may be anything
    tested = None if in_folders else read_annotations(folder / part, classes)
    if tested is None:
        number_classes(list_class_folders(folder, part), classes, f"{folder}/{part}")
        tested = find_images(folder / part, classes)
    parts = [find_images(folder / "train", classes), tested]
    return build_dataset("image_folder", parts, classes, loading, f"{folder} ({', '.join(SUFFIXES)})")


def read_annotations(folder: Path, classes: tuple[str, ...]) -> LabelledSource | None:
    """The images of a folder whose classes a list in it says, `FILE CLASS ...` a line; None if there is no list."""
    lists = sorted([*folder.glob("*annotations*.txt"), *folder.glob("*.csv")])
    if len(lists) != 1:
        return None
    try:
        lines = [line for line in lists[0].read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.root: {lists[0]}: cannot be read: {error}") from error
    rows = [split_row(line) for line in lines]
    of_images = [len(row) > 1 and row[0].lower().endswith(SUFFIXES) for row in rows]
    if not any(of_images):
        return None
    if not all(of_images[1:]):  # the first may be a header
        line = lines[of_images.index(False, 1)]
        raise UserError(f"data.root: {lists[0]}: {line[:100]!r} is not an image's file and its class: correct it")
    pairs = [row for row, of_image in zip(rows, of_images, strict=True) if of_image]
    outside = [row[0] for row in pairs if not is_within(row[0])]
    if outside:
        raise UserError(f"data.root: {lists[0]}: {outside[0]!r} is not a file in that folder: remove it")
    labels = number_classes((row[1] for row in pairs), classes, str(lists[0]))
    inner = "images/" if (folder / "images").is_dir() else ""
    return LabelledSource(FileSource(folder, [inner + row[0] for row in pairs]), labels)


def split_row(line: str) -> list[str]:
    """The columns of a line, divided by tabs, commas or semicolons, whichever there are first; else by spaces."""
    sign = next((sign for sign in "\t,;" if sign in line), None)
    return [cell.strip() for cell in next(csv.reader([line], delimiter=sign))] if sign else line.split()


def list_class_folders(root: Path, part: str) -> tuple[str, ...]:
    """Names of the folders in `root/part`, sorted."""
    folder = root / part
    entries = folder.iterdir() if folder.is_dir() else ()
    names = tuple(sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)))
    if not names:
        raise UserError(f"data.root: {str(root)!r} holds no {part}/CLASS/ folders; expected {FOLDERS}")
    return names


def find_images(folder: Path, classes: tuple[str, ...]) -> LabelledSource:
    """List the images of one part, class by class, those in folders of a class too."""
    found = [
        (f"{name}/{file}", label)
        for label, name in enumerate(classes)
        for file in sorted(list_files(folder / name))
        if file.lower().endswith(SUFFIXES) and not is_hidden(file)
    ]
    return LabelledSource(FileSource(folder, [name for name, _ in found]), [label for _, label in found])


def list_files(folder: Path) -> Iterator[str]:
    """Files in a folder and in folders in it, by their path in it."""
    seen = set()
    for path, folders, files in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(path)) in seen:  # a link leads in a circle
            folders.clear()
            continue
        seen.add(real)
        within = os.path.relpath(path, folder)
        yield from files if within == "." else (f"{within}/{file}" for file in files)


# ----------------------------------------------------------------------------------------------------------------------
# A tar for each class, a tar of class folders, or a tar of tars.


def load_class_tars(root: str | None, loading: LoadingOptions) -> Dataset:
    """Find the images of a tar for each class, a tar of class folders, or a tar of tars."""
    folder = check_root(root, TARS)
    test = next((name for name in TEST_FOLDERS if any(folder.glob(f"{name}.tar")) or (folder / name).is_dir()), "val")
    (train, train_names), (val, val_names) = (find_class_images(folder, part) for part in ("train", test))
    classes = tuple(sorted(set(map(str, train_names))))
    parts = [
        LabelledSource(source, number_classes(map(str, names), classes, f"{folder}: {part}"))
        for part, source, names in (("train", train, train_names), ("val", val, val_names))
    ]
    return build_dataset("tar", parts, classes, loading, str(folder))


def find_class_images(root: Path, part: str) -> Labelled:
    """The images of one part and their classes' names, sorted by class and name."""
    whole = root / f"{part}.tar"
    found = sorted(path for path in (root / part).glob("*.tar") if not is_hidden(path.name))
    paths = [whole] if whole.is_file() else found
    if not paths:
        raise UserError(f"data.root: {str(root)!r} holds neither {part}.tar nor {part}/CLASS.tar; expected {TARS}")

    def build() -> Labelled:
        images: list[tuple[str, int, Member]] = []
        for number, path in enumerate(paths):
            first, place = "", None
            for member in index_tar(path):
                if member.name.lower().endswith(SUFFIXES):
                    parent = Path(member.name).parent
                    name = parent.name or ("" if path == whole else path.stem)
                    if not name:
                        raise UserError(f"data.root: {path}: {member.name} lies in no class folder; expected {TARS}")
                    lies_in = parent.parent.parent if parent.name == parent.parent.name else parent.parent
                    depth = (bool(parent.name), lies_in)
                    first, place = first or member.name, place or depth
                    if place != depth:
                        raise UserError(
                            f"data.root: {path}: the folders of {first} and {member.name} do not lie in one folder: "
                            "which are the classes? Put images right into their class's folder, or unpack the tar"
                        )
                    images.append((name, number, member))
        images.sort(key=lambda entry: (entry[0], entry[2].name))
        source = TarSource.of(paths, [(number, member) for _, number, member in images])
        return source, [name for name, _, _ in images]

    return keep_index(root, f"{part}.classes", paths, build)  # shards of the same files have other labels


# ----------------------------------------------------------------------------------------------------------------------
# WebDataset shards on a disk: tar files with `KEY.jpg` and its label, `KEY.cls` or `KEY.json`, side by side.


def load_web_shards(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Find the images; shards are indexed, not streamed, so that any image can be read at any time."""
    folder = check_root(root, SHARDS)
    paths = {part: find_shards(folder, part) for part in SHARD_SPLITS}
    check_apart(folder, paths)
    read = [keep_index(folder, part, found, partial(read_shards, found)) for part, found in paths.items()]
    train, val, names = number_labels(read[0], read[1], folder)
    largest = max(train.labels, default=0)
    if largest >= max(len(train.labels), MOST_NAMED):
        raise UserError(
            f"data.root: {folder}: label {largest:,} of a training image, but there are {len(train.labels):,} training "
            "images: not every class from 0 on has one"
        )
    beyond = [label for label in val.labels if label > largest]
    if beyond:
        raise UserError(f"data.root: {folder}: label {beyond[0]} of a validation image is none of the training images'")
    classes = names or tuple(map(str, range(1 + largest)))
    return build_dataset(f"wds/{name}", (train, val), classes, loading, str(folder))


def number_labels(
    train: Labelled, val: Labelled, folder: Path
) -> tuple[LabelledSource, LabelledSource, tuple[str, ...]]:
    """Labels as numbers, and the classes' names where labels are names; these are numbered in their order."""
    kinds = {type(label) for _, labels in (train, val) for label in labels}
    if kinds == {int, str}:
        raise UserError(f"data.root: {folder}: some labels are numbers, others names: write all alike")
    names = tuple(sorted({str(label) for label in train[1]})) if str in kinds else ()
    parts = [
        LabelledSource(source, number_classes(map(str, labels), names, f"{folder}: {part}") if names else labels)  # type: ignore[arg-type]
        for part, (source, labels) in (("train", train), ("val", val))
    ]
    return parts[0], parts[1], names


def find_shards(root: Path, part: str) -> list[Path]:
    """The tar files of `train` or `val`."""
    for info in (root / "_info.json", root / "info.json"):
        if info.is_file():
            with refusing_malformed(info, "list of shards"):
                splits = read_mapping(info).get("splits", {})
                named: list[str] = next(
                    (splits[name]["filenames"] for name in SHARD_SPLITS[part] if name in splits), []
                )
                outside = [name for name in named if not is_within(name)]
            if outside:
                raise UserError(f"data.root: {info}: {outside[0]!r} is not a file in that folder: remove it")
            missing = [name for name in named if not os.path.isfile(root / name)]  # never raises, as Path's does
            if missing:
                raise UserError(f"data.root: {root / missing[0]}: no such shard, but {info.name} names it")
            if named:
                return [root / name for name in named]
    found = [path for pattern in ("*.tar", "*/*.tar") for path in root.glob(pattern)]
    found = [path for path in found if not is_hidden(path.relative_to(root).as_posix())]
    paths = sorted(path for path in found if path.parent == root and names_split(path.stem, part))
    paths = paths or sorted(path for path in found if path.parent != root and names_split(path.parent.name, part))
    if not paths:
        raise UserError(f"data.root: {str(root)!r} holds no {part} shards; expected {SHARDS}")
    return paths


def names_split(name: str, part: str) -> bool:
    """Whether a whole word of a name is one of a split's: `festival-train-0` is of train, not of val."""
    return not set(re.findall("[a-z]+", name.lower())).isdisjoint(SHARD_SPLITS[part])


def check_apart(root: Path, paths: dict[str, list[Path]]) -> None:
    """Check that no shard is in both splits, or twice in one: its images would be trained on and tested with."""
    seen: set[Path] = set()
    for path in (path.resolve() for each in paths.values() for path in each):
        if path in seen:
            raise UserError(
                f"data.root: {root}: the shard {path.name} is named twice, for training and validation or in one list: "
                "name each once, in _info.json or by one whole word of its name, train or val"
            )
        seen.add(path)


def is_within(name: str) -> bool:
    """Whether a name is that of a file in a folder, or in a folder in it."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


def read_shards(paths: list[Path]) -> Labelled:
    """Index shards: where each image is, and its label, a number or a class's name."""
    members: list[tuple[int, Member]] = []
    labels: list[Label] = []
    for number, path in enumerate(paths):
        images: dict[str, Member] = {}
        label_of: dict[str, Label] = {}
        for member in index_tar(path):
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}"
            if f".{extension.lower()}".endswith(SUFFIXES):
                if key in images:
                    raise UserError(f"data.root: {path}: {member.name} is the second image of one sample: rename it")
                images[key] = member
            elif extension.lower() not in ("cls", "json") or (label := read_label(path, member)) is None:
                continue
            elif label_of.setdefault(key, label) != label:
                raise UserError(
                    f"data.root: {path}: {member.name} says label {label!r}, another file of that sample "
                    f"{label_of[key]!r}: correct one"
                )
        without = [member.name for key, member in images.items() if key not in label_of]
        if without:
            raise UserError(
                f"data.root: {path}: {without[0]} has no label, neither in a .cls file nor as `label` in a .json file "
                f"({len(without)} of its {len(images)} images): write the shards with labels"
            )
        members += [(number, member) for member in images.values()]
        labels += [label_of[key] for key in images]
    return TarSource.of(paths, members), labels


def read_label(path: Path, member: Member) -> Label | None:
    """The label in a `.cls` or `.json` member, a number or a class's name; None if a `.json` has none."""
    content = np.fromfile(path, np.uint8, min(member.size, SMALL), offset=member.start).tobytes()
    with suppress(ValueError):
        text = content.decode().strip()
        is_name = member.name.lower().endswith(".cls") and text[:1] not in ("{", "[", '"')
        value = text if is_name else parse_json(text)
        label = value.get("label") if isinstance(value, dict) else value
        if isinstance(label, str) and label.isascii() and label.isdigit():
            label = int(label[:MOST_DIGITS])
        if label is None or (type(label) is int and label >= 0) or (isinstance(label, str) and is_class_name(label)):
            return label
    raise UserError(
        f"data.root: {path}: {member.name} holds {content[:40]!r}, neither a class index nor a class's name"
    )


def is_class_name(text: str) -> bool:
    """Whether a text is a name: one line of letters, and no number."""
    return 0 < len(text) <= MOST_NAME and text.isprintable() and any(letter.isalpha() for letter in text)


# ----------------------------------------------------------------------------------------------------------------------
# Data sets of the Hugging Face hub, or in its formats on a disk, through the package `datasets`.


class HuggingFaceSource(ImageSource):
    """Images, not decoded, in a column of an Arrow table; `title`: the names of data set and split."""

    names_tell = False

    def __init__(self, table: Any, column: str, title: str) -> None:
        self.table = table.select_columns([column])
        self.column = column
        self.names = [f"{title}, row {position}" for position in range(len(table))]

    def read(self, position: int) -> Tensor:
        """The bytes of a row's image, or of the file that it names; none if it has neither."""
        image = self.table[position][self.column]
        if image["bytes"] is None and image["path"]:
            return torch.from_numpy(np.fromfile(image["path"], np.uint8))
        return as_bytes(image["bytes"] or b"")


def load_hugging_face(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Load a data set whose tables hold an image and a class label, by what `datasets.load_dataset` takes.

    Downloads are kept in `root`; without it in that package's own place.
    """
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.name: hfds needs the package `datasets`: pip install datasets") from error
    title = f"data.name: hfds/{name}"
    try:
        tables = datasets.load_dataset(name, cache_dir=root)
    except Exception as error:  # of any of the package's readers
        raise UserError(f"{title} cannot be loaded ({first_line(error)})") from error
    test = next((split for split in TEST_SPLITS if split in tables), None)
    if "train" not in tables or test is None:
        raise UserError(
            f"{title} has the splits {', '.join(tables)}; needed are train and one of {', '.join(TEST_SPLITS)}"
        )
    features = tables["train"].features
    images, labels = (
        [column for column, kind in features.items() if isinstance(kind, wanted)]
        for wanted in (datasets.Image, datasets.ClassLabel)
    )
    if not images or not labels:
        raise UserError(f"{title} has no column of {'class labels' if images else 'images'}: {features}")
    parts = []
    for split in ("train", test):
        table = tables[split].cast_column(images[0], datasets.Image(decode=False))
        source = HuggingFaceSource(table, images[0], f"{name}/{split}")
        parts.append(LabelledSource(source, [int(label) for label in table[labels[0]]]))
        if min(parts[-1].labels, default=0) < 0:
            raise UserError(f"{title}: images of {split} have no label (-1)")
    return build_dataset(f"hfds/{name}", parts, tuple(features[labels[0]].names), loading, f"hfds/{name}")
