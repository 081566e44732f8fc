"""What the losses here are made of: over logits, in float32 and log space; over features, pairs of stages; calibration.

A stage is named as `Outputs.features` names it (for timm's models, as their `feature_info` does). Shapes come from a
dry run, never from the user.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, cross_entropy, log_softmax

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs

Stages = dict[str, tuple[int, ...]]  # stage name → shape of its feature for one image: (c, h, w), or tokens (n, c)
Pairs = list[tuple[str, str]]  # of a student's stage and a teacher's
Pairing = Callable[[Stages, Stages], Pairs]  # how a loss pairs stages that the user does not choose
Chosen = list[list[str]] | None  # [[student stage, teacher stage], ...], or the loss's own choice

# ----------------------------------------------------------------------------------------------------------------------
# Over logits: float32, log space, one value a sample.


NO_LABEL = torch.iinfo(torch.int64).min  # torch passes over −100 unless told of another


def full_precision(like: Tensor) -> AbstractContextManager[Any]:
    """Within, nothing is cast to less than float32; devices without autocast, as meta, cast nothing anyway.

    Args:
        like: On the device that computes.
    """
    casts = torch.amp.is_autocast_available(like.device.type)
    return torch.autocast(like.device.type, enabled=False) if casts else nullcontext()


def widen(tensor: Tensor) -> Tensor:
    """At least float32, whatever the autocast state gave; float64 stays.

    Every loss widens its logits, so that all say the same of a batch of no images, whose mean is not a number: a
    `UserError`.
    """
    if tensor.shape[:1] == (0,):
        raise UserError("loss: the batch is empty, and the mean of nothing is no number; give at least one image")
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def is_hidden(tensor: Tensor) -> bool:
    """Whether a tensor's value is on an accelerator, or not there, as of a tensor that is mapped over or traced."""
    if tensor.device.type != "cpu":
        return True
    try:
        tensor.item()
    except RuntimeError:
        return True
    return False


def check_target(logits: Tensor, target: Tensor) -> Tensor:
    """Check a target against the student's logits, [B, C]; return class indices as int64, distributions as given.

    Labels on an accelerator are not looked at, which would wait for the device; there the loss fails on a wrong one.
    """
    batch, classes = logits.shape[:1], logits.shape[1] if logits.ndim > 1 else 0
    if classes < 2:
        raise UserError(
            f"loss: the student's logits are {list(logits.shape)}; a softmax needs [images, classes] with two classes "
            "or more: give a network of one logit two"
        )
    if target.is_floating_point():
        if target.shape != logits.shape:
            raise UserError(
                f"loss: the target is {target.dtype} of shape {list(target.shape)}; distributions are as the logits, "
                f"{list(logits.shape)}, and class indices are integers"
            )
        return target
    if target.shape != (*batch, *logits.shape[2:]) or target.is_complex() or target.dtype == torch.bool:
        raise UserError(
            f"loss: the target is {target.dtype} of shape {list(target.shape)}; give class indices {list(batch)}, or "
            f"distributions {list(logits.shape)} of floats, as of one-hot labels `target.float()`"
        )
    target = target.long()
    if target.numel() and not torch.compiler.is_compiling():
        lowest, highest = target.amin(), target.amax()
        if not is_hidden(lowest) and not 0 <= int(lowest) <= int(highest) < classes:
            raise UserError(
                f"loss: the target has labels from {int(lowest)} to {int(highest)}; those of {classes} classes go from "
                f"0 to {classes - 1}: leave out images without a label"
            )
    return target


def check_several(name: str, count: int, least: int = 2) -> None:
    """Check that there are images enough to compare: of fewer than `least` the loss is the same, whatever they show."""
    if 0 < count < least:  # one of none is refused alike by all losses
        raise UserError(
            f"loss {name!r} compares images with each other: a batch of {count} has too few, {least} are needed; raise "
            "train.batch_size"
        )


def check_batch(student: Outputs, teacher: Outputs | None, target: Tensor) -> Tensor:
    """Check that student, teacher and target speak of the same images and classes; return what `check_target` does.

    For losses that read the teacher's logits.
    """
    if teacher is None:
        raise UserError("loss: it reads the teacher's logits, and there is no teacher; give one, or take cross_entropy")
    if teacher.logits.shape != student.logits.shape:
        raise UserError(
            f"loss: the student's logits are {list(student.logits.shape)}, the teacher's {list(teacher.logits.shape)}; "
            "both have to see the same images and know the same classes (`teacher.classes` names the columns of a "
            "teacher's that are taken)"
        )
    return check_target(student.logits, target)


def cross_entropies(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each sample, [B], with class indices [B] or distributions [B, C]; no label is passed over."""
    logits = widen(logits)
    dense = target.to(logits.dtype) if target.is_floating_point() else target
    return cross_entropy(logits, dense, reduction="none", ignore_index=NO_LABEL)


def kl_divergences(student_logits: Tensor, teacher_logits: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(teacher ‖ student) of each sample at a temperature, or one for each, [B, 1]; without the factor τ²; [B]."""
    student = log_softmax(widen(student_logits) / temperature, 1)
    teacher = log_softmax(widen(teacher_logits) / temperature, 1)
    return (teacher.exp() * (teacher - student)).sum(1)


def label_of(target: Tensor) -> Tensor:
    """Class indices [B] of a target: itself, or the most probable class of distributions [B, C]."""
    return target.argmax(1) if target.is_floating_point() else target


def pearson_correlations(a: Tensor, b: Tensor, eps: float = 1e-8) -> Tensor:
    """Pearson's correlation of each row of `a` with that row of `b`, [N, M] → [N]; 0 where a row is constant.

    As in the code of DIST's authors ε is added to the product of the norms, so that rows of almost nothing have almost
    no correlation, and no gradient of 1 over their norm.
    """
    a, b = centre(a), centre(b)
    norms = [x.square().sum(1).clamp_min(torch.finfo(x.dtype).tiny).sqrt() for x in (a, b)]
    return (a * b).sum(1) / (norms[0] * norms[1] + eps)


def centre(rows: Tensor) -> Tensor:
    """Rows less their mean, [N, M]; exactly 0 where a row is constant, whatever its mean is rounded to."""
    centred = rows - rows.mean(1, keepdim=True)
    rounding = 4 * torch.finfo(rows.dtype).eps * rows.abs().amax(1, keepdim=True)
    return centred * (centred.abs().amax(1, keepdim=True) > rounding)


def check_options(temperature: float | None = None, **weights: float) -> None:
    """Check a loss's options; a `ValueError` if the temperature is not positive or a weight is negative."""
    if temperature is not None and not temperature > 0:
        raise ValueError(f"temperature: {temperature} is not positive")
    for name, weight in weights.items():
        if not weight >= 0:
            raise ValueError(f"{name}: {weight} is negative")


# ----------------------------------------------------------------------------------------------------------------------
# Over features: which stage learns from which, and how two are made comparable.


def choose_pairs(chosen: Chosen, student: Stages, teacher: Stages, default: Pairing) -> Pairs:
    """The pairs that the user chose, else the default ones.

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
    for ours, theirs in pairs:
        map_shape(student[ours]), map_shape(teacher[theirs])
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
    equal = [(name, sizes[1][size]) for size, name in sizes[0].items() if size in sizes[1]]
    return equal or pair_last(student, teacher)


def map_shape(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """(c, h, w) of a stage's feature for one image; n tokens are a square grid, else it is a `ValueError`."""
    if len(shape) == 3:
        return shape[0], shape[1], shape[2]
    if len(shape) == 2 and math.isqrt(shape[0]) ** 2 == shape[0]:
        return shape[1], math.isqrt(shape[0]), math.isqrt(shape[0])
    raise ValueError(f"stages: a feature of shape {list(shape)} is neither a map [c, h, w] nor a square grid of tokens")


def as_map(feature: Tensor) -> Tensor:
    """A feature map [B, c, h, w] from itself or from tokens [B, n, c], at least float32."""
    feature = widen(feature)
    side = math.isqrt(feature.shape[1])
    return feature if feature.ndim == 4 else feature.transpose(1, 2).unflatten(2, (side, side))


def shrink_to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Average both maps [B, c, h, w] adaptively down to the smaller of their heights and widths."""
    size = (min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3]))
    return adaptive_avg_pool2d(a, size), adaptive_avg_pool2d(b, size)


def pool(feature: Tensor) -> Tensor:
    """Global average, [B, c, h, w] or [B, n, c] → [B, c]."""
    return as_map(feature).mean((2, 3))


# ----------------------------------------------------------------------------------------------------------------------
# Temperature scaling and calibration (Guo et al., 2017).


@torch.no_grad()
def find_best_temperature(
    logits: Tensor, target: Tensor, lowest: float = 0.05, highest: float = 20.0, prior: bool = False
) -> float:
    """The temperature between two bounds at which cross-entropy is least.

    `prior`: whether log τ is taken for standard normal before: without an error among a few images the least
    cross-entropy is at τ = 0, which says nothing; over a thousand the prior changes nothing.
    """
    from scipy.optimize import minimize_scalar  # slow to import

    weight = 0.5 / len(logits) if prior else 0.0

    def value(log_temperature: float) -> float:
        return float(cross_entropy(logits / math.exp(log_temperature), target)) + weight * log_temperature**2

    bounds = math.log(lowest), math.log(highest)
    return math.exp(minimize_scalar(value, bounds=bounds, method="bounded", options={"xatol": 1e-6}).x)


def calibrated_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy at its best temperature: what a student knows, whatever its confidence.

    The temperature is a minimiser, so its own derivative is zero there and the gradient is exact (envelope theorem).
    """
    return cross_entropy(logits / find_best_temperature(logits.detach(), target), target)


def expected_calibration_error(probabilities: Tensor, target: Tensor, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal-width confidence bins (Guo et al., 2017), in [0, 1].

    Of probabilities [N, C] and class indices [N].
    """
    confidence, predicted = probabilities.max(1)
    bin_of = (confidence * bins).long().clamp(max=bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64)
    gaps.index_add_(0, bin_of.cpu(), confidence.cpu().double() - (predicted == target).cpu().double())
    return float(gaps.abs().sum() / len(target))
