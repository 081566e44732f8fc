"""RandAugment (Cubuk et al., 2020) of one uint8 image, a function of the numbers it is given.

torchvision's form and defaults: two operations of magnitude 9 out of 30. torchvision's own draws from the global
generator, which threads would share.
"""

import math
from collections.abc import Callable

from torch import Tensor
from torchvision.transforms.v2 import functional

OPERATIONS = 2
AUGMENT_NUMBERS = 2 * OPERATIONS
STRENGTH = 9 / 30


def move(image: Tensor, x: float = 0.0, y: float = 0.0, shear_x: float = 0.0, shear_y: float = 0.0) -> Tensor:
    """Translate by parts of torchvision's 150/331 of the size, or shear by tangents."""
    height, width = image.shape[1:]
    translate = [int(x * width * 150 / 331), int(y * height * 150 / 331)]
    shear = [math.degrees(math.atan(shear_x)), math.degrees(math.atan(shear_y))]
    center = [0.0, 0.0] if shear_x or shear_y else None
    return functional.affine(image, 0.0, translate, 1.0, shear, center=center)


CHANGES: dict[str, Callable[[Tensor, float], Tensor]] = {
    "Identity": lambda image, sign: image,
    "ShearX": lambda image, sign: move(image, shear_x=sign * 0.3 * STRENGTH),
    "ShearY": lambda image, sign: move(image, shear_y=sign * 0.3 * STRENGTH),
    "TranslateX": lambda image, sign: move(image, x=sign * STRENGTH),
    "TranslateY": lambda image, sign: move(image, y=sign * STRENGTH),
    "Rotate": lambda image, sign: functional.rotate(image, sign * 30 * STRENGTH),
    "Brightness": lambda image, sign: functional.adjust_brightness(image, 1 + sign * 0.9 * STRENGTH),
    "Color": lambda image, sign: functional.adjust_saturation(image, 1 + sign * 0.9 * STRENGTH),
    "Contrast": lambda image, sign: functional.adjust_contrast(image, 1 + sign * 0.9 * STRENGTH),
    "Sharpness": lambda image, sign: functional.adjust_sharpness(image, 1 + sign * 0.9 * STRENGTH),
    "Posterize": lambda image, sign: functional.posterize(image, 8 - round(4 * STRENGTH)),
    "Solarize": lambda image, sign: functional.solarize(image, 255 * (1 - STRENGTH)),
    "AutoContrast": lambda image, sign: functional.autocontrast(image),
    "Equalize": lambda image, sign: functional.equalize(image),
}
"""Operation → from an image [3, H, W] and a sign, 1 or -1, to an image."""


def augment_randomly(image: Tensor, numbers: Tensor) -> Tensor:
    """Apply random operations one after another.

    Args:
        image: uint8, [3, H, W].
        numbers: In [0, 1): for each operation which one, and its sign.
    """
    for which, sign in numbers[:AUGMENT_NUMBERS].view(OPERATIONS, 2).tolist():
        change = list(CHANGES.values())[int(which * len(CHANGES))]
        image = change(image, 1.0 if sign < 0.5 else -1.0)
    return image
