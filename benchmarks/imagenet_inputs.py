"""Good and bad inputs of ImageNet's shape, 1,000 classes of generated JPEGs, for `imagenet_commands.py`."""

import shutil
import tarfile
from pathlib import Path

from photographs import write_folder, write_web_shards

CLASSES, TRAIN, VAL = 1000, 2, 1  # images a class


def write_inputs(root: Path) -> None:
    """Write an image folder, shards of it, and what is wrong with neither but one thing; what is there is kept."""
    good, shards = root / "folder", root / "shards"
    finished = root / "finished"
    if finished.exists():
        return
    for folder in ("folder", "shards", "999", "empty", "unlabelled"):
        shutil.rmtree(root / folder, ignore_errors=True)
    write_folder(good, CLASSES, TRAIN, VAL)
    write_web_shards(good, shards, 500)
    link_classes(good, root / "999", CLASSES - 1)
    link_classes(good, root / "empty", CLASSES)
    empty = root / "empty" / "train" / "n00000007"
    empty.unlink()
    empty.mkdir()
    strip_labels(shards, root / "unlabelled")
    finished.touch()


def link_classes(good: Path, other: Path, count: int) -> None:
    """An image folder with the first classes of another one."""
    for part in ("train", "val"):
        (other / part).mkdir(parents=True)
        for folder in sorted((good / part).iterdir())[:count]:
            (other / part / folder.name).symlink_to(folder)


def strip_labels(shards: Path, other: Path) -> None:
    """The first shard of each part without its labels."""
    other.mkdir()
    for part in ("train", "val"):
        name = f"{part}-0000.tar"
        with tarfile.open(shards / name) as source, tarfile.open(other / name, "w") as target:
            for member in source:
                if member.name.endswith(".jpg"):
                    target.addfile(member, source.extractfile(member))
