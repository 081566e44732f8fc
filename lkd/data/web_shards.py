"""WebDataset shards on a disk: tar files with `KEY.jpg` and its label, `KEY.cls` or `KEY.json`, side by side."""

import os
from pathlib import Path

from lkd.data.dataset import Dataset
from lkd.data.image_files import LoadingOptions
from lkd.data.image_folder import SUFFIXES
from lkd.data.labelled_sources import LabelledSource, build_dataset, check_root
from lkd.data.tar_files import Member, TarSource, index_tar, read_member
from lkd.errors import UserError
from lkd.files import parse_json, read_mapping, refusing_malformed

LAYOUT = "*train*.tar and *val*.tar (or train/*.tar and val/*.tar, or an _info.json that names them)"
MOST_NAMED = 1 << 20  # classes that are named before it is checked that each has images
PARTS = {"train": ("train",), "val": ("validation", "val")}


def load_web_shards(name: str, root: str | None, loading: LoadingOptions) -> Dataset:
    """Find the images; shards are indexed, not streamed, so that any image can be read at any time.

    Args:
        name: What the data set is called.
        root: The folder that holds `LAYOUT`.
        loading: How images are loaded.

    Raises:
        UserError: If the folder is missing or a stream, shards are missing or damaged, a sample has no label, or a
            class has no training images.
    """
    root = check_root(root, LAYOUT)
    train, val = (read_shards(find_shards(Path(root), part)) for part in PARTS)
    largest = max(train.labels, default=0)
    if largest >= max(len(train.labels), MOST_NAMED):
        raise UserError(
            f"data.root: {root}: label {largest:,} of a training image, but there are {len(train.labels):,} training "
            "images: not every class from 0 on has one"
        )
    classes = tuple(map(str, range(1 + largest)))
    unknown = [label for label in val.labels if label >= len(classes)]
    if unknown:
        raise UserError(f"data.root: {root}: label {unknown[0]} of a validation image is none of the training images'")
    return build_dataset(f"wds/{name}", (train, val), classes, loading, root)


def find_shards(root: Path, part: str) -> list[Path]:
    """The tar files of `train` or `val`.

    Raises:
        UserError: If there is none.
    """
    for info in (root / "_info.json", root / "info.json"):
        if info.is_file():
            with refusing_malformed(info, "list of shards"):
                splits = read_mapping(info).get("splits", {})
                named: list[str] = next((splits[name]["filenames"] for name in PARTS[part] if name in splits), [])
                outside = [name for name in named if not is_within(name)]
            if outside:
                raise UserError(f"data.root: {info}: {outside[0]!r} is not a file in that folder: remove it")
            missing = [name for name in named if not os.path.isfile(root / name)]  # never raises, as Path's does
            if missing:
                raise UserError(f"data.root: {root / missing[0]}: no such shard, but {info.name} names it")
            if named:
                return [root / name for name in named]
    paths = sorted(root.glob(f"*{part}*.tar")) or sorted(root.glob(f"{part}*/*.tar"))
    if not paths:
        raise UserError(f"data.root: {str(root)!r} holds no {part} shards; expected {LAYOUT}")
    return paths


def is_within(name: str) -> bool:
    """Whether a name is that of a file in a folder, or in a folder in it."""
    return not Path(name).is_absolute() and ".." not in Path(name).parts and "\0" not in name


def read_shards(paths: list[Path]) -> LabelledSource:
    """Index shards: where each image is, and its label.

    Raises:
        UserError: If a shard is damaged or a sample has no label.
    """
    members: list[tuple[int, Member]] = []
    labels: list[int] = []
    for number, path in enumerate(paths):
        images: dict[str, Member] = {}
        label_of: dict[str, int] = {}
        for member in index_tar(path):
            folder, _, base = member.name.rpartition("/")
            stem, _, extension = base.partition(".")
            key = f"{folder}/{stem}"
            if f".{extension.lower()}".endswith(SUFFIXES):
                if key in images:
                    raise UserError(f"data.root: {path}: {member.name} is the second image of one sample: rename it")
                images[key] = member
            elif extension in ("cls", "json"):
                label_of |= read_label(path, member, key)
        without = [member.name for key, member in images.items() if key not in label_of]
        if without:
            raise UserError(
                f"data.root: {path}: {without[0]} has no label, neither in a .cls file nor as `label` in a .json file "
                f"({len(without)} of its {len(images)} images): write the shards with labels"
            )
        members += [(number, member) for member in images.values()]
        labels += [label_of[key] for key in images]
    return LabelledSource(TarSource(paths, members), labels)


def read_label(path: Path, member: Member, key: str) -> dict[str, int]:
    """The label in a `.cls` or `.json` member, by the sample's key; nothing if a `.json` has none.

    Raises:
        UserError: If it is not a class index.
    """
    content = read_member(path, member)
    try:
        value = parse_json(content)
        if isinstance(value, dict):
            value = value.get("label")
        if value is None:
            return {}
        if type(value) is int and value >= 0:
            return {key: value}
    except ValueError:
        pass
    raise UserError(f"data.root: {path}: {member.name} holds {content[:40]!r}, not a class index (0, 1, ...)")
