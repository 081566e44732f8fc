"""What leaves a loss as it is: properties of every loss over logits, and of learned ones over features."""

import pytest
import torch
from torch import Tensor, nn

from lkd.core.outputs import Outputs
from lkd.losses import CrossEntropyLoss, FeatureLoss, KDLoss, LearnedLoss
from lkd.losses.build import build_loss
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.logits import LogitStandardizationLoss

BATCH, CLASSES, PROGRESS = 12, 7, (0.1, 1.0)
STAGES = {"stage1": (8, 6, 6), "stage2": (12, 3, 3)}


def wander(loss: nn.Module, size: float = 0.5, seed: int = 0) -> nn.Module:
    """A float64 loss network with weights away from its initial ones."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loss.double().parameters():
            parameter.add_(size * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return loss


LOSSES = {
    "cross_entropy": CrossEntropyLoss,
    "kd": lambda: KDLoss(0.7, 3.0),
    "logit_mse": lambda: build_loss("logit_mse"),
    "dkd": lambda: build_loss({"name": "dkd", "temperature": 2.0}),
    "dist": lambda: build_loss({"name": "dist", "temperature": 2.0}),
    "logit_standardization": lambda: build_loss("logit_standardization"),
    "standardized_dkd": lambda: build_loss({"name": "logit_standardization", "loss": "dkd"}),
    "learned": lambda: wander(build_learned_loss("logits", {})),
    "learned_generic": lambda: wander(build_learned_loss("logits", {"form": "generic"})),
    "learned_normalized": lambda: wander(build_learned_loss("logits", {"normalize_gradient": True})),
    "learned_features": lambda: wander(LearnedLoss({"features": FeatureLoss()})),
}
BATCH_WISE = {"dist", "learned_features"}  # compare the images of a batch


@pytest.fixture(params=LOSSES)
def loss(request) -> nn.Module:
    return LOSSES[request.param]().double()


def draw(classes: int = CLASSES, scale: float = 2.0) -> tuple[Outputs, Outputs, Tensor]:
    student, teacher = (
        Outputs(
            scale * torch.randn(BATCH, classes, dtype=torch.float64),
            {stage: torch.randn(BATCH, *shape, dtype=torch.float64).relu() for stage, shape in STAGES.items()},
        )
        for _ in range(2)
    )
    return student, teacher, torch.randint(classes, (BATCH,))


def ask(loss: nn.Module, student: Outputs, teacher: Outputs, target: Tensor, progress: float = 0.5) -> list[Tensor]:
    """Value, and gradient at the student's logits and features."""
    logits = student.logits.detach().requires_grad_()
    features = {stage: feature.detach().requires_grad_() for stage, feature in student.features.items()}
    value = sum(loss(Outputs(logits, features), teacher, target, progress).values())
    leaves = [logits, *features.values()]
    return [value.detach(), *torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)]


def take(outputs: Outputs, rows: Tensor) -> Outputs:
    return Outputs(outputs.logits[rows], {stage: feature[rows] for stage, feature in outputs.features.items()})


def test_relabelling_the_classes_and_shuffling_the_batch_change_nothing(loss) -> None:
    student, teacher, target = draw()
    classes, rows = torch.randperm(CLASSES), torch.randperm(BATCH)
    for progress in PROGRESS:
        value, logits, *features = ask(loss, student, teacher, target, progress)
        relabelled = [o._replace(logits=o.logits[:, classes]) for o in (student, teacher)]
        found = ask(loss, *relabelled, classes.argsort()[target], progress)
        torch.testing.assert_close(found, [value, logits[:, classes], *features])
        found = ask(loss, take(student, rows), take(teacher, rows), target[rows], progress)
        torch.testing.assert_close(found, [value, logits[rows], *(feature[rows] for feature in features)])


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"logit_mse"}))
def test_logits_are_read_up_to_a_constant(name: str) -> None:
    loss, (student, teacher, target) = LOSSES[name]().double(), draw()
    shifted = [o._replace(logits=o.logits + 10 * torch.randn(BATCH, 1)) for o in (student, teacher)]
    torch.testing.assert_close(ask(loss, *shifted, target), ask(loss, student, teacher, target))


@pytest.mark.parametrize("name", sorted(set(LOSSES) - BATCH_WISE))
def test_a_batch_twice_over_teaches_the_same(name: str) -> None:
    loss, (student, teacher, target) = LOSSES[name]().double(), draw()
    value, slope, *_ = ask(loss, student, teacher, target)
    twice = torch.arange(BATCH).repeat(2)
    found, slopes, *_ = ask(loss, take(student, twice), take(teacher, twice), target[twice])
    torch.testing.assert_close([found, slopes[:BATCH] + slopes[BATCH:]], [value, slope])


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_value_and_gradient_are_finite_and_float32_is_enough(loss, classes: int) -> None:
    """At any number of classes, and at logits of ±10,000, in agreement and against each other."""
    student, teacher, target = draw(classes)
    if classes == 2 and isinstance(loss, LogitStandardizationLoss):
        pytest.skip("two standardised logits say nothing, which is refused")
    exact = ask(loss, student, teacher, target)
    loss = loss.float()
    narrow = [
        Outputs(o.logits.float(), {stage: feature.float() for stage, feature in o.features.items()})
        for o in (student, teacher)
    ]
    for found, expected in zip(ask(loss, *narrow, target), exact, strict=True):
        worst = float((found - expected).abs().max() / expected.abs().max().clamp_min(1e-30))
        assert worst <= 1e-3
    for sign in (1, -1):
        extreme = [narrow[0], narrow[1]]
        for number, side in enumerate((1, sign)):
            extreme[number] = narrow[number]._replace(logits=1e4 * side * student.logits.float().sign())
        for progress in (0.0, 1.0):
            assert all(bool(tensor.isfinite().all()) for tensor in ask(loss, *extreme, target, progress))


def test_dense_one_hot_targets_equal_labels(loss) -> None:
    student, teacher, target = draw()
    dense = nn.functional.one_hot(target, CLASSES).double()
    torch.testing.assert_close(ask(loss, student, teacher, dense), ask(loss, student, teacher, target))


def test_the_gradient_equals_finite_differences(loss) -> None:
    """What the learned weights and temperatures do when the student moves is in the gradient too."""
    student, teacher, target = draw(3)
    few = torch.arange(4)
    ours, theirs = take(student, few), take(teacher, few)

    def value(logits: Tensor) -> Tensor:
        return sum(loss(ours._replace(logits=logits), theirs, target[few], 0.5).values())

    assert torch.autograd.gradcheck(value, ours.logits.requires_grad_())


def test_half_precision_is_computed_in_float32(loss) -> None:
    student, teacher, target = draw()
    half, exact = (
        [Outputs(o.logits.bfloat16().to(dtype), {s: f.bfloat16().to(dtype) for s, f in o.features.items()})
         for o in (student, teacher)]
        for dtype in (torch.bfloat16, torch.float32)
    )  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16):
        value = sum(loss.float()(*half, target, 0.5).values())
    assert value.dtype == torch.float32

    torch.testing.assert_close(value, sum(loss(*exact, target, 0.5).values()))
