"""A sheet of the images that help a network most, and of those that harm it most."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.data import ImageSet
from lkd.plots import plt, save_figure

COLUMNS = 8


def plot_sheet(images: ImageSet, influence: Tensor, shown: int, path: Path) -> None:
    """Draw it.

    Args:
        images: N images.
        influence: Of each, [N]; negative is helpful.
        shown: Images in each half, at most.
        path: The picture.
    """
    order = influence.argsort()
    shown = min(shown, len(order))
    rows = -(-shown // COLUMNS)
    figure = plt.figure(figsize=(1.1 * 2 * COLUMNS, 1.45 * rows + 0.5), layout="constrained")
    halves: Any = figure.subfigures(1, 2)
    for half, title, chosen in zip(
        halves, ("most helpful", "most harmful"), (order[:shown], order.flip(0)[:shown]), strict=True
    ):
        half.suptitle(title, fontsize=11)
        axes = half.subplots(rows, COLUMNS, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, position in zip(axes, chosen.tolist(), strict=False):
            batch = images.batch(torch.tensor([position]), torch.device("cpu"))
            pixels = batch.images[0].permute(1, 2, 0)
            pixels = (pixels * torch.tensor(images.std) + torch.tensor(images.mean)).clamp(0, 1)
            axis.imshow(pixels.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{images.class_names[int(batch.target)]}\n{influence[position]:.2g}", fontsize=7)
    save_figure(figure, path)
