"""Write a trained student in the formats that others read, each read back and compared."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lkd.config import ExportRecipe
from lkd.errors import UserError, check_choice
from lkd.export_formats import FORMATS, Logits
from lkd.files import write_json
from lkd.models.network_file import load_network

BATCH = 4


class Exported(NamedTuple):
    """One file and how far its outputs are from the network's own.

    Attributes:
        path: The file.
        difference: Largest difference of a logit, over the largest logit.
    """

    path: Path
    difference: float


def export(recipe: ExportRecipe) -> dict[str, Exported]:
    """Write every format, read it back, and compare its logits on random images with the network's.

    Returns:
        Format → what was written.

    Raises:
        UserError: If the checkpoint, a format or the size is not good, a format needs a package that is not installed,
            or what was read back differs by more than `tolerance`.
    """
    for name in recipe.formats:
        check_choice("formats", name, FORMATS)
    if not recipe.formats:
        raise UserError(f"formats: empty; take some of {', '.join(FORMATS)}")
    network, header = load_network(Path(recipe.checkpoint))
    images = draw_images(header, recipe)
    model = Logits(network).eval()
    with torch.no_grad():
        expected = model(images)
    folder = Path(recipe.out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    written = {}
    for name in recipe.formats:
        path, compute = FORMATS[name](model, header["architecture"], images, folder)
        difference = compare_logits(expected, compute(images))
        if not difference <= recipe.tolerance:
            raise UserError(
                f"{path}: its logits differ by {difference:.2g} of the largest logit from the network's, more than "
                f"tolerance {recipe.tolerance:g}; do not use this file"
            )
        written[name] = Exported(path, difference)
    rows = {name: {"file": each.path.name, "difference": each.difference} for name, each in written.items()}
    write_json(folder / "export.json", {"exported": rows, "shape": list(images.shape[1:]), **header})
    return written


def draw_images(header: dict[str, Any], recipe: ExportRecipe) -> Tensor:
    """Random images of the size that the network was trained on, [BATCH, C, H, W].

    Raises:
        UserError: If neither the file nor the recipe says which size.
    """
    channels = header["architecture"]["in_chans"]
    known = header["provenance"].get("image_shape", [channels, 0, 0])
    height, width = [recipe.image_size] * 2 if recipe.image_size else known[1:]
    if min(height, width) < 1:
        raise UserError(
            f"image_size: {recipe.checkpoint} does not say which images it was trained on; give their height and width"
        )
    return torch.randn(BATCH, channels, height, width, generator=torch.Generator().manual_seed(0))


def compare_logits(expected: Tensor, found: Tensor) -> float:
    """The largest difference, over the largest logit."""
    return float((expected - found).abs().max() / expected.abs().max().clamp_min(1e-12))
