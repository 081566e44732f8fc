"""From a recipe to the things that train: images, teacher, student, loss.

Everything that can be wrong is found here, before any long work.
"""

from lkd.assembly.images import Images, build_batches, prepare_images
from lkd.assembly.introductions import introduce_network, introduce_teacher
from lkd.assembly.losses import prepare_learned_loss, prepare_loss, prepare_stages, read_teacher_stages
from lkd.assembly.networks import (
    architecture_of,
    build_network,
    check_network,
    open_teacher,
    prepare_student,
    prepare_teacher,
)

__all__ = [
    "Images",
    "architecture_of",
    "build_batches",
    "build_network",
    "check_network",
    "introduce_network",
    "introduce_teacher",
    "open_teacher",
    "prepare_images",
    "prepare_learned_loss",
    "prepare_loss",
    "prepare_stages",
    "prepare_student",
    "prepare_teacher",
    "read_teacher_stages",
]
