"""From a file's bytes to pixels."""

import io

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor

MOST_PIXELS = 1 << 26  # of an image, 200 MB decoded: a file of a few bytes can claim thousands of millions
MOST_ELONGATED = 64  # longer side over the shorter: the crop's shorter side is scaled up, and the longer one with it
OF_TORCHVISION = ("JPEG", "MPO")  # MPO: a JPEG of several images; on damaged PNGs torchvision crashes
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # no others: Pillow has some start other programs


class DamagedImageError(Exception):
    """An image that cannot be decoded; the message names it and says why."""


def decode(content: Tensor, name: str) -> Tensor:
    """Decode an image file as RGB.

    Its size is read first. torchvision decodes JPEG; Pillow what is left of `FORMATS`, and what torchvision cannot.

    Args:
        content: The file's bytes, uint8, [N].
        name: What the file is called in messages.

    Returns:
        uint8, [3, H, W].

    Raises:
        DamagedImageError: If it is no image, half of one, or too large.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content.numpy().data), formats=FORMATS) as image:
            check_size(*image.size)
            pixels = decode_by_torchvision(content) if image.format in OF_TORCHVISION else None
            return pil_to_tensor(image.convert("RGB")) if pixels is None else pixels
    except Exception as error:  # Pillow's readers let out whatever their parsers raise
        reason = " ".join(str(error).split(" <")[0].split())  # without the address of an object
        raise DamagedImageError(f"{name}: cannot be decoded ({reason})") from error


def check_size(width: int, height: int) -> None:
    """Check an image's size before any memory is taken for it.

    Raises:
        ValueError: If it is out of bounds.
    """
    if width < 1 or height < 1 or width * height > MOST_PIXELS:
        raise ValueError(f"{width} × {height} pixels, at most {MOST_PIXELS:,} are decoded")
    if max(width, height) > MOST_ELONGATED * min(width, height):
        raise ValueError(f"{width} × {height} pixels, one side more than {MOST_ELONGATED} times the other")


def decode_by_torchvision(content: Tensor) -> Tensor | None:
    """Decode an image file as RGB; None if torchvision cannot, or gives no 8 bits."""
    try:
        pixels = decode_image(content, ImageReadMode.RGB)
    except RuntimeError:  # what Pillow says of the file is clearer, and it may know better
        return None
    return pixels if pixels.dtype == torch.uint8 and pixels.dim() == 3 else None


def as_bytes(content: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
