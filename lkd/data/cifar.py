"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009), through torchvision, which checks their md5."""

from pathlib import Path

import numpy as np
import torch

from lkd.data.dataset import Dataset
from lkd.data.images import ImageSet
from lkd.errors import UserError

# Mean and standard deviation: for CIFAR-100 those of RepDistiller, for CIFAR-10 those of its training images.
STATISTICS = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
}
FOLDERS = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}


def load_cifar(name: str, root: str | None) -> Dataset:
    """Load `cifar10` or `cifar100`.

    Args:
        name: Which.
        root: The folder that holds torchvision's folder of it.

    Raises:
        UserError: If it is not there or damaged.
    """
    from torchvision.datasets import CIFAR10, CIFAR100

    source = f"https://www.cs.toronto.edu/~kriz/{name.replace('cifar', 'cifar-')}-python.tar.gz"
    if root is None:
        raise UserError(f"data.root: missing; give the folder that holds {FOLDERS[name]}/ (unpacked from {source})")
    if not (Path(root) / FOLDERS[name]).is_dir():
        raise UserError(f"data.root: {root!r} holds no {FOLDERS[name]}/; unpack {source} there")
    read = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        parts = [read(root, train=train) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"data.root: {FOLDERS[name]}/ in {root!r} is damaged ({reason}): unpack {source} anew"
        ) from error
    return Dataset(name, *(wrap(part.data, part.targets, tuple(part.classes), *STATISTICS[name]) for part in parts))


def wrap(
    pixels: np.ndarray, targets: list[int], classes: tuple[str, ...], mean: tuple[float, ...], std: tuple[float, ...]
) -> ImageSet:
    """Wrap what torchvision read ([N, 32, 32, 3], [N])."""
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return ImageSet(images, torch.tensor(targets), torch.arange(len(targets)), classes, mean, std)
