"""Make a data set of scikit-learn's handwritten digits: arrays for `data.name: npz/NAME`.

    pip install scikit-learn
    python benchmarks/universal/digits.py OUT.npz

1,797 images of 8 x 8 pixels (Alpaydin, Kaynak, 1998; UCI), scaled bilinearly to `--size`; 597 of them, in equal shares
of each class, are the test part.
"""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST_SIZE = 597


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT.npz")
    parser.add_argument("--size", type=int, default=28, help="pixels, height and width")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    images, labels = load_digits(return_X_y=True)
    small = (images.reshape(-1, 8, 8) * 255 / 16).round().astype(np.uint8)
    size = (options.size, options.size)
    large = np.array([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in small])
    parts = train_test_split(large, labels, test_size=TEST_SIZE, random_state=options.seed, stratify=labels)
    names = ("train_images", "test_images", "train_labels", "test_labels")
    np.savez_compressed(options.out, **dict(zip(names, parts, strict=True)))
    print(f"{options.out}: {len(parts[2]):,} + {len(parts[3]):,} images of 10 classes")


if __name__ == "__main__":
    main()
