"""From a file's bytes to pixels."""

import io

import torch
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.functional import pil_to_tensor


class DamagedImageError(Exception):
    """An image that cannot be decoded; the message names it and says why."""


def decode(content: Tensor, name: str) -> Tensor:
    """Decode an image file as RGB.

    torchvision decodes JPEG, PNG, WebP and GIF; Pillow everything else, if it can.

    Args:
        content: The file's bytes, uint8, [N].
        name: What the file is called in messages.

    Returns:
        uint8, [3, H, W].

    Raises:
        DamagedImageError: If it is no image, or half of one.
    """
    try:
        return decode_image(content, ImageReadMode.RGB)
    except RuntimeError:  # what Pillow says of the file is clearer, and it may know the format
        return decode_by_pillow(content, name)


def decode_by_pillow(content: Tensor, name: str) -> Tensor:
    """Decode an image file as RGB by Pillow; see `decode`."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content.numpy().tobytes())) as image:
            return pil_to_tensor(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split(" <")[0].split())  # without the address of an object
        raise DamagedImageError(f"{name}: cannot be decoded ({reason})") from error


def as_bytes(content: bytes) -> Tensor:
    """Bytes as a uint8 tensor."""
    return torch.frombuffer(bytearray(content), dtype=torch.uint8) if content else torch.empty(0, dtype=torch.uint8)
