"""scikit-learn's handwritten digits as image folders, scaled up to 28 × 28: one for the teacher, one for students."""

from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

SIZE = 28
TEACHER_IMAGES, STUDENT_IMAGES = 697, 600
"""The rest, 500, is the test part of both."""


def write_digits(folder: Path) -> tuple[Path, Path]:
    """Write the images, unless they are there.

    Returns:
        The teacher's folder and the students'; no image is in the training part of both.
    """
    roots = folder / "teacher", folder / "students"
    done = folder / "done"
    if done.exists():
        return roots
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    taught, rest = np.split(order, [TEACHER_IMAGES])
    learned, tested = np.split(rest, [STUDENT_IMAGES])
    for root, train in zip(roots, (taught, learned), strict=True):
        for part, positions in (("train", train), ("val", tested)):
            for position in positions:
                place = root / part / str(digits.target[position])
                place.mkdir(parents=True, exist_ok=True)
                pixels = Image.fromarray((digits.images[position] * (255 / 16)).astype(np.uint8))
                # A wider canvas: evaluation cuts the centre out of images scaled to 256/224 of the size.
                canvas = Image.new("L", (round(SIZE * 256 / 224),) * 2)
                canvas.paste(pixels.resize((SIZE, SIZE), Image.Resampling.BILINEAR), (2, 2))
                canvas.save(place / f"{position:04d}.png")
    done.touch()
    return roots
