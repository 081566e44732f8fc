"""JPEGs like ImageNet's, made at run time from the photographs that scikit-image, scikit-learn and foolbox carry.

Sizes are a mixture of our own after what is reported of ImageNet: most images are 500 pixels long, a few are much
larger. Nothing made here is committed.
"""

import io
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

SIZES = (
    *[(500, 375)] * 40,
    *[(500, 333)] * 16,
    *[(375, 500)] * 16,
    *[(333, 500)] * 8,
    *[(500, 500)] * 4,
    *[(400, 300)] * 5,
    *[(250, 200)] * 3,
    *[(640, 480)] * 4,
    *[(1024, 768)] * 2,
    *[(1600, 1200)] * 2,
)
"""Width and height, each as often as it occurs in 100 images."""
QUALITY = 95  # gives about as many bytes a pixel as ImageNet's files have
SCIKIT_IMAGE = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "retina.jpg")
SCIKIT_LEARN = ("china.jpg", "flower.jpg")


def find_photographs() -> list[Path]:
    """The photographs of the packages that are installed.

    Raises:
        SystemExit: If there is none.
    """
    places = {
        "skimage": [f"data/{name}" for name in SCIKIT_IMAGE],
        "sklearn": [f"datasets/images/{name}" for name in SCIKIT_LEARN],
        "foolbox": ["data/imagenet_*.jpg"],
    }
    found = []
    for package, patterns in places.items():
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        found += [
            path for folder in folders or () for pattern in patterns for path in sorted(Path(folder).glob(pattern))
        ]
    if not found:
        raise SystemExit("no photographs: pip install scikit-image scikit-learn foolbox")
    return found


def cut_photograph(photograph: Image.Image, size: tuple[int, int], generator: np.random.Generator) -> bytes:
    """A random part of a photograph, scaled to a size, as a JPEG."""
    width, height = size
    factor = max(width / photograph.width, height / photograph.height) * generator.uniform(1, 1.3)
    w, h = width / factor, height / factor
    left, top = generator.uniform(0, photograph.width - w), generator.uniform(0, photograph.height - h)
    part = photograph.resize(size, Image.Resampling.BICUBIC, (left, top, left + w, top + h))
    buffer = io.BytesIO()
    part.save(buffer, "JPEG", quality=QUALITY)
    return buffer.getvalue()


def write_folder(root: Path, classes: int, train: int, val: int, seed: int = 0) -> Path:
    """Write an image folder of ImageNet's layout, with so many training and validation images a class."""
    photographs = [Image.open(path).convert("RGB") for path in find_photographs()]
    generator = np.random.default_rng(seed)
    number = 0
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08d}"
            folder.mkdir(parents=True)
            for member in range(count):
                size = SIZES[generator.integers(len(SIZES))]
                content = cut_photograph(photographs[number % len(photographs)], size, generator)
                (folder / f"n{label:08d}_{member}.JPEG").write_bytes(content)
                number += 1
    return root


def write_web_shards(folder: Path, root: Path, images_per_shard: int = 100, seed: int = 0) -> Path:
    """Write the images of a folder as shuffled WebDataset shards, `train-0000.tar`, ... and `val-0000.tar`, ..."""
    root.mkdir(parents=True)
    generator = np.random.default_rng(seed)
    for part in ("train", "val"):
        paths = sorted((folder / part).glob("*/*"))
        labels = {name: label for label, name in enumerate(sorted({path.parent.name for path in paths}))}
        order = [paths[position] for position in generator.permutation(len(paths))]
        for shard, first in enumerate(range(0, len(order), images_per_shard)):
            with tarfile.open(root / f"{part}-{shard:04d}.tar", "w") as file:
                for path in order[first : first + images_per_shard]:
                    key = f"{path.parent.name}-{path.stem}"
                    add_member(file, f"{key}.jpg", path.read_bytes())
                    add_member(file, f"{key}.cls", str(labels[path.parent.name]).encode())
    return root


def add_member(file: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    file.addfile(member, io.BytesIO(content))
