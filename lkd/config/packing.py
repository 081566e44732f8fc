"""The recipe of packed images."""

from dataclasses import dataclass, field

from lkd.config.parts import DataRecipe


@dataclass
class PackRecipe:
    """Decode all images once and keep them scaled down, for trainings with the same `data.packed`.

    Args:
        data: The images, and in `packed` the folder that they go to.
        shorter_side: Pixels of the shorter side; 256 is right for crops of 224.
    """

    data: DataRecipe = field(default_factory=DataRecipe)
    shorter_side: int = 256
