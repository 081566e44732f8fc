"""Tiny data sets in the layouts of the real ones."""

import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100


def write_cifar(root: Path, name: str, monkeypatch: pytest.MonkeyPatch, train: int = 400, test: int = 100) -> str:
    """Random images in CIFAR's own pickles; torchvision is told their md5 and goes on checking it."""
    reader, classes, key = (CIFAR100, 100, "fine_labels") if name == "cifar100" else (CIFAR10, 10, "labels")
    folder = root / reader.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)

    def write(filename: str, content: dict) -> str:
        (folder / filename).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / filename).read_bytes()).hexdigest()

    for part, count in (("train_list", train), ("test_list", test)):
        files = [entry[0] for entry in getattr(reader, part)]
        size = count // len(files)
        labels = (np.arange(size) % classes).tolist()
        sums = [
            write(file, {"data": generator.integers(0, 256, (size, 3072), dtype=np.uint8), key: labels})
            for file in files
        ]
        monkeypatch.setattr(reader, part, [list(pair) for pair in zip(files, sums, strict=True)])
    names = {reader.meta["key"]: [f"class {number}" for number in range(classes)]}
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": write(reader.meta["filename"], names)})
    return str(root)


def write_image_folder(root: Path, classes: int = 4, train: int = 8, val: int = 2) -> str:
    """Random JPEGs of several shapes, one of them grey, laid out as ImageNet."""
    generator = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for number in range(count):
                shape = (40 + 7 * number, 60 - 5 * number) + (() if number == 1 else (3,))
                pixels = generator.integers(0, 256, shape, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.JPEG")
    return str(root)
