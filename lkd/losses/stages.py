"""Which stage of the student learns from which stage of the teacher, and how their features are made comparable.

A stage is named as `Outputs.features` names it (for timm's models, as their `feature_info` does). Shapes come from a
dry run, never from the user.
"""

import math
from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

from lkd.losses.functions import widen

Stages = dict[str, tuple[int, ...]]  # stage name → shape of its feature for one image: (c, h, w), or tokens (n, c)
Pairs = list[tuple[str, str]]  # of a student's stage and a teacher's


def choose_pairs(
    chosen: list[list[str]] | None, student: Stages, teacher: Stages, default: Callable[[Stages, Stages], Pairs]
) -> Pairs:
    """The pairs that the user chose, else the default ones.

    Args:
        chosen: [[student stage, teacher stage], ...] or None.
        student: The student's stages.
        teacher: The teacher's stages.
        default: How a loss pairs stages if it is not told.

    Raises:
        ValueError: If a stage does not exist, a network has no features at all, or tokens do not form a square.
    """
    for role, stages in (("student", student), ("teacher", teacher)):
        if not stages:
            raise ValueError(f"the {role} gives no features; take a loss over logits, or another {role}")
    pairs = default(student, teacher) if chosen is None else []
    for pair in [] if chosen is None else chosen:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise ValueError(f"stages: {pair!r} is not a pair [student stage, teacher stage]")
        for role, name, stages in (("student", pair[0], student), ("teacher", pair[1], teacher)):
            if name not in stages:
                known = ", ".join(f"{stage} {list(shape)}" for stage, shape in stages.items())
                raise ValueError(f"stages: the {role} has no stage {name!r}; it has {known}")
        pairs.append((pair[0], pair[1]))
    if not pairs:
        raise ValueError("stages: [] pairs nothing; leave it out, or give [[student stage, teacher stage], ...]")
    for student_stage, teacher_stage in pairs:
        map_shape(student[student_stage]), map_shape(teacher[teacher_stage])
    return pairs


def pair_last(student: Stages, teacher: Stages) -> Pairs:
    """The last stage with the last."""
    return [(list(student)[-1], list(teacher)[-1])]


def pair_middle(student: Stages, teacher: Stages) -> Pairs:
    """The middle stage with the middle one."""
    return [(list(student)[len(student) // 2], list(teacher)[len(teacher) // 2])]


def pair_equal_sizes(student: Stages, teacher: Stages) -> Pairs:
    """The deepest stages of each spatial size that both networks have, in order of depth; else the last stages."""
    sizes = [{map_shape(shape)[1:]: name for name, shape in stages.items()} for stages in (student, teacher)]
    return [(name, sizes[1][size]) for size, name in sizes[0].items() if size in sizes[1]] or pair_last(
        student, teacher
    )


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(c, h, w) of a stage's feature for one image; n tokens count as a square grid.

    Raises:
        ValueError: If the tokens do not form a square, or the feature is neither map nor tokens.
    """
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return shape[1], math.isqrt(shape[0]), math.isqrt(shape[0])
    raise ValueError(f"stages: a feature of shape {list(shape)} is neither a map [c, h, w] nor a square grid of tokens")


def as_map(feature: Tensor) -> Tensor:
    """A feature map [B, c, h, w] from itself or from tokens [B, n, c], at least float32."""
    feature = widen(feature)
    if feature.ndim == 4:
        return feature
    side = math.isqrt(feature.shape[1])
    return feature.transpose(1, 2).unflatten(2, (side, side))


def shrink_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average both maps [B, c, h, w] adaptively down to the smaller of their heights and widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return adaptive_avg_pool2d(a, size), adaptive_avg_pool2d(b, size)


def pool(feature: Tensor) -> Tensor:
    """Global average, [B, c, h, w] or [B, n, c] → [B, c]."""
    return as_map(feature).mean((2, 3))


def build_adapter(student: tuple[int, ...], teacher: tuple[int, ...]) -> nn.Conv2d:
    """A 1×1 convolution from the student's channels to the teacher's: on tokens, a linear layer."""
    return nn.Conv2d(map_shape(student)[0], map_shape(teacher)[0], 1)
