"""What people hand to losses: logits of one class, confident networks, labels of the wrong kind, another batch."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses import DecoupledLoss, DistillationLoss, FeatureLoss, GenericLoss, LearnedLoss
from lkd.losses.build import FEATURE_LOSSES, LOSSES, TEACHER_LOGIT_LOSSES, build_loss

STAGES = {"deep": (6, 2, 2)}
READS_LOGITS = [*TEACHER_LOGIT_LOSSES, "logit_standardization", "decoupled", "generic", "learned features"]
ALL = [*LOSSES, *READS_LOGITS[-3:]]


def build(name: str) -> DistillationLoss:
    learned = {"decoupled": DecoupledLoss, "generic": GenericLoss}
    if name in learned:
        return LearnedLoss({"logits": learned[name]()}, normalize_gradient=True)
    if name == "learned features":
        return FeatureLoss().attach(STAGES, STAGES)
    return build_loss(name, STAGES, STAGES)


def draw(batch: int = 6, classes: int = 5, seed: int = 0) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, classes, generator=generator)
    return Outputs(logits, {"deep": torch.randn(batch, *STAGES["deep"], generator=generator)})


TARGET = torch.tensor([0, 1, 2, 3, 4, 0])


def differentiate(loss: DistillationLoss, student: Outputs, teacher: Outputs, target: Tensor = TARGET) -> Tensor:
    logits = student.logits.detach().requires_grad_()
    terms = loss(student._replace(logits=logits), teacher, target)
    return torch.autograd.grad(torch.stack([terms[n] for n in terms if n != "task"]).sum(), logits)[0]


@pytest.mark.outside(45)
@pytest.mark.parametrize("inner", TEACHER_LOGIT_LOSSES)
@pytest.mark.parametrize("constant", [0.1, 1000.1])
def test_standardized_equal_logits_have_no_gradient(inner: str, constant: float) -> None:
    loss = build_loss({"name": "logit_standardization", "loss": inner})
    zero_head = Outputs(torch.full((6, 5), constant), {})
    assert differentiate(loss, zero_head, draw()).abs().max() == 0
    assert differentiate(loss, draw(seed=1), draw()).norm() > 0


@pytest.mark.outside(46)
@pytest.mark.parametrize("confidence", [0.6, 0.99999])
def test_dist_has_its_authors_gradient_where_networks_are_confident(confidence: float) -> None:
    """1 − (a · b) / (‖a‖ ‖b‖ + 1e-8), on rows and columns less their means."""
    generator = torch.Generator().manual_seed(0)
    gap = torch.tensor(confidence / (1 - confidence)).log()
    student, teacher = (
        (gap * F.one_hot(torch.arange(6) % 2, 5) + 0.3 * torch.randn(6, 5, generator=generator)).double()
        for _ in range(2)
    )
    student.requires_grad_()
    p, q = student.softmax(1), teacher.softmax(1)

    def relation(a: Tensor, b: Tensor) -> Tensor:
        a, b = (x - x.mean(1, keepdim=True) for x in (a, b))
        return 1 - ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + 1e-8)).mean()

    expected = torch.autograd.grad(2 * relation(p, q) + 2 * relation(p.T, q.T), student)[0]
    found = differentiate(build_loss("dist"), Outputs(student, {}), Outputs(teacher, {}), torch.arange(6) % 2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.outside(46)
@pytest.mark.parametrize("name", ALL)
def test_one_class_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="two classes"):
        build(name)(draw(classes=1), draw(classes=1, seed=1), torch.zeros(6, dtype=torch.int64))


@pytest.mark.outside(48)
@pytest.mark.parametrize("name", READS_LOGITS)
@pytest.mark.parametrize("teacher", [draw(1), draw(classes=7), draw(classes=1), None])
def test_a_teacher_of_other_images_or_classes_is_refused(name: str, teacher: Outputs | None) -> None:
    with pytest.raises(UserError, match="teacher"):
        build(name)(draw(), teacher, TARGET)


@pytest.mark.outside(48)
@pytest.mark.parametrize("name", [*FEATURE_LOSSES, "learned features"])
def test_features_of_other_images_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="images"):
        build(name)(draw(), draw()._replace(features=draw(1).features), TARGET)


@pytest.mark.outside(38)
@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_losses_over_features_alone_take_a_teacher_of_other_classes(name: str) -> None:
    loss = build(name)
    expected = loss(draw(), draw(), TARGET)
    for classes in (7, 0, 1):
        torch.testing.assert_close(loss(draw(), draw()._replace(logits=torch.zeros(6, classes)), TARGET), expected)


WRONG_TARGETS = {
    "−100": torch.tensor([0, 1, 2, 3, -100, 0]),
    "a label too many": torch.tensor([0, 1, 2, 3, 5, 0]),
    "one-hot integers": F.one_hot(TARGET, 5),
    "one-hot booleans": F.one_hot(TARGET, 5).bool(),
    "labels that are floats": TARGET.float(),
    "labels of another batch": TARGET[:4],
    "distributions over other classes": F.one_hot(TARGET, 7).float(),
    "a column": TARGET.unsqueeze(1),
}


@pytest.mark.outside(48)
@pytest.mark.parametrize("case", WRONG_TARGETS)
def test_a_wrong_target_is_one_line(case: str) -> None:
    for name in ALL:
        with pytest.raises(UserError, match="target") as error:
            build(name)(draw(), draw(seed=1), WRONG_TARGETS[case])
        assert "\n" not in str(error.value)


@pytest.mark.outside(48)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_labels_of_any_integer_type_are_the_same_labels(dtype: torch.dtype) -> None:
    for name in ALL:
        loss = build(name)
        found, expected = (loss(draw(), draw(seed=1), target) for target in (TARGET.to(dtype), TARGET))
        torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.outside(48)
@pytest.mark.parametrize("name", [*READS_LOGITS, *FEATURE_LOSSES])
def test_a_teacher_may_have_answered_in_inference_mode(name: str) -> None:
    with torch.inference_mode():
        logits, features = draw(seed=1)
        teacher = Outputs(logits + 0, {stage: feature + 0 for stage, feature in features.items()})
    student = Outputs(draw().logits.requires_grad_(), {n: f.requires_grad_() for n, f in draw().features.items()})
    torch.stack(list(build(name)(student, teacher, TARGET).values())).sum().backward()
    assert torch.isfinite(student.logits.grad).all()
