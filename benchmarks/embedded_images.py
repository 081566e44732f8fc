"""Make the embedded data set from the full Fashion-MNIST.

    python benchmarks/embedded_images.py --root DIR

`DIR/FashionMNIST/raw/` holds the four original IDX files (torchvision's layout). Draws 1,200 training and 400 test
images of each class with the seed below, in random order, writes `lkd/data/embedded/fashion_mnist.npz` and prints its
sha256, which is `ARCHIVE_HASH` beside it. `train_index` and `test_index` are positions in the full set, so that a
teacher can be trained on exactly the images that are *not* here.
"""

import argparse
import hashlib

import numpy as np
from torchvision.datasets import FashionMNIST

from lkd.data.embedded import ARCHIVE

SEED = 20250611
TRAIN_PER_CLASS = 1_200
TEST_PER_CLASS = 400


def draw_class_balanced(labels: np.ndarray, per_class: int, generator: np.random.Generator) -> np.ndarray:
    """Draw `per_class` indices of every class, shuffled; [num_classes · per_class]."""
    drawn = [generator.choice(np.flatnonzero(labels == label), per_class, replace=False) for label in np.unique(labels)]
    return generator.permutation(np.concatenate(drawn))


def main() -> None:
    """Write the archive."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=True, help="folder that holds FashionMNIST/raw/")
    root = parser.parse_args().root
    generator = np.random.default_rng(SEED)
    arrays: dict[str, np.ndarray] = {}
    for split, per_class in (("train", TRAIN_PER_CLASS), ("test", TEST_PER_CLASS)):
        full = FashionMNIST(root, train=split == "train", download=False)
        labels = full.targets.numpy()
        index = draw_class_balanced(labels, per_class, generator)
        arrays[f"{split}_images"] = full.data.numpy()[index]
        arrays[f"{split}_labels"] = labels[index].astype(np.uint8)
        arrays[f"{split}_index"] = index.astype(np.int32)
    np.savez_compressed(ARCHIVE, allow_pickle=False, **arrays)
    print(
        f"{ARCHIVE}: {ARCHIVE.stat().st_size / 1e6:.2f} MB, sha256 {hashlib.sha256(ARCHIVE.read_bytes()).hexdigest()}"
    )


if __name__ == "__main__":
    main()
