"""The rules of the universal loss that nothing learned: fading, falling back, few images, labels that are wrong."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from lkd.core.errors import UserError
from lkd.losses.learned.forms import NOISE
from lkd.losses.learned.loss import LearnedLoss, build_learned_loss
from lkd.losses.learned.trust import TrustFigures
from tests.lkd.test_trust import SEEN, TRUST, total


def set_balance(loss: LearnedLoss, batch: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    form = loss.parts["logits"]
    return form.set_balance(form.read(*batch), 0.5)


def test_a_loss_that_fades_is_cross_entropy_once_the_student_is_ahead() -> None:
    torch.manual_seed(0)
    plain, fading = (build_learned_loss("logits", {"conditioning": SEEN, "fades": fades}) for fades in (False, True))
    fading.load_state_dict(plain.state_dict())
    student, teacher, target = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))

    def compare(figures: TrustFigures) -> tuple[float, float, float]:
        """What fades, less what does not; and less cross-entropy."""
        for loss in (plain, fading):
            loss.tell(figures)
        faded = total(fading, student, teacher, target).item()
        whole = total(plain, student, teacher, target).item()
        return faded, whole, cross_entropy(student, target).item()

    for figures in (
        TrustFigures(),
        TRUST._replace(own_accuracy=math.nan),
        TrustFigures(0.9, 0.9, own_accuracy=0.7),
        TrustFigures(0.8, 0.48, own_accuracy=0.9),  # ahead of the teacher, but two labels in five are wrong
    ):
        faded, whole, _ = compare(figures)
        assert faded == pytest.approx(whole, rel=1e-3)
    faded, _, labels = compare(TrustFigures(0.6, 0.6, own_accuracy=0.8))
    assert faded == pytest.approx(labels, rel=1e-3)
    faded, whole, labels = compare(TrustFigures(0.6, 0.6, own_accuracy=0.63))
    assert faded == pytest.approx((whole + labels) / 2, rel=1e-3)
    with pytest.raises(UserError, match="fades"):
        build_learned_loss("logits", {"fades": True})


def test_what_was_learned_does_not_count_under_a_weak_teacher() -> None:
    torch.manual_seed(0)
    options = {"conditioning": SEEN, "initial_weight": 0.3, "linear": True}
    fresh, learned = (build_learned_loss("logits", options | {"falls_back": falls}) for falls in (False, True))
    plain = build_learned_loss("logits", options)
    for parameter in learned.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    plain.load_state_dict(learned.state_dict())
    batch = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))

    def compare(figures: TrustFigures) -> list[tuple[torch.Tensor, ...]]:
        for loss in (fresh, learned, plain):
            loss.tell(figures)
        return [set_balance(loss, batch) for loss in (fresh, learned, plain)]

    for figures in (TrustFigures(), TrustFigures(0.9, 0.5), TrustFigures(0.5, 0.5, contradicted=0.45)):
        before, found, after = compare(figures)
        torch.testing.assert_close(found, after, rtol=0, atol=0)
        assert not torch.allclose(before[0], after[0])
    for figures in (TrustFigures(0.7, 1.0), TrustFigures(0.3, 0.3, contradicted=0.1)):
        before, found, _ = compare(figures)
        torch.testing.assert_close(found, before)
    before, found, after = (balance[0].logit() for balance in compare(TrustFigures(0.8, 0.8)))
    torch.testing.assert_close(found, (before + after) / 2)
    with pytest.raises(UserError, match="falls_back"):
        build_learned_loss("logits", {"falls_back": True})


def test_other_classes_count_more_where_images_are_few() -> None:
    options = {"conditioning": SEEN, "initial_factor": 4.0}
    loss, plain = build_learned_loss("logits", options), build_learned_loss("logits", {"conditioning": SEEN})
    batch = torch.randn(8, 5), torch.randn(8, 5), torch.randint(5, (8,))
    told = TrustFigures(0.95, images_per_class=50)
    cases: list[tuple[dict[str, float], float]] = [({"images_per_class": math.nan}, 1), ({"images_per_class": 200}, 1)]
    cases += [({"images_per_class": 100}, 2), ({}, 4), ({"images_per_class": 1}, 4)]
    cases += [({"validation_agreement": of}, 4**part) for of, part in ((math.nan, 0), (0.85, 0), (0.89, 0.5))]
    cases += [({"validation_agreement": 0.5, "contradicted": 0.47}, 4)]
    for changed, factor in cases:
        loss.tell(told._replace(**changed))
        weight, temperature, found, own = set_balance(loss, batch)
        torch.testing.assert_close(found, torch.full((8,), float(factor)))
        expected = set_balance(plain, batch)
        torch.testing.assert_close((weight, temperature, own), (expected[0], expected[1], expected[3]))
    for wrong in ({"initial_factor": 0.5}, {"initial_factor": 8.0}, {"initial_factor": 4.0, "conditioning": ["state"]}):
        with pytest.raises(UserError, match="initial_factor"):
            build_learned_loss("logits", options | wrong)


def test_a_label_counts_by_how_often_such_a_label_is_right() -> None:
    """Counted among many labels of two classes, of which three in ten are flipped."""
    torch.manual_seed(0)
    loss = build_learned_loss("logits", {"conditioning": SEEN, "judges_labels": True})
    form = loss.parts["logits"]
    first = torch.rand(300_000)
    true = (torch.rand(len(first)) > first).long()
    label = torch.where(torch.rand(len(first)) < 0.3, 1 - true, true)
    teacher = 2 * torch.stack([first, 1 - first], 1).log()  # calibrated at temperature 2
    logs = form.read(torch.zeros_like(teacher), teacher, label)

    def judge(figures: TrustFigures) -> torch.Tensor:
        loss.tell(figures)
        return form.judge_labels(form.see(logs, 0.8), 0.8)

    judged = judge(TrustFigures(1.0, 1 - 0.3 - NOISE, 2.0))
    for bin in judged.argsort().chunk(20):
        assert judged[bin].mean().item() == pytest.approx((label == true)[bin].double().mean().item(), abs=0.02)
    torch.testing.assert_close(
        judge(TrustFigures(0.7, 0.7 - NOISE, 2.0, contradicted=0.3)), judged, atol=0.01, rtol=0.0
    )
    for figures in (TrustFigures(), TrustFigures(0.8, 0.79, 2.0), TrustFigures(0.7, 1.0, 2.0)):
        assert (judge(figures) == 1).all()
    with pytest.raises(UserError, match="judges_labels"):
        build_learned_loss("logits", {"judges_labels": True})
