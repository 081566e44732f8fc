"""Hand-made and learned losses against independent derivations and properties."""

import pytest
import torch
from torch.nn import functional as F

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses import CrossEntropyLoss, DistillationLoss, KDLoss, LearnedLoss, LogitLoss, wrap_loss
from lkd.losses.build import build_loss
from lkd.losses.learned import build_learned_loss


def draw(batch: int = 16, classes: int = 10, dtype: torch.dtype = torch.float32, scale: float = 3.0):
    student, teacher = (scale * torch.randn(batch, classes, dtype=dtype) for _ in range(2))
    return Outputs(student.requires_grad_(), {}), Outputs(teacher, {}), torch.randint(classes, (batch,))


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return sum(terms.values())


def wander(loss: LearnedLoss) -> LearnedLoss:
    """A loss network with weights away from its initial ones."""
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return loss


LOSSES = {
    "cross_entropy": CrossEntropyLoss,
    "kd": lambda: KDLoss(0.7, 3.0),
    "logit_mse": lambda: build_loss("logit_mse"),
    "dkd": lambda: build_loss({"name": "dkd", "temperature": 2.0}),
    "dist": lambda: build_loss({"name": "dist", "temperature": 2.0}),
    "logit_standardization": lambda: build_loss("logit_standardization"),
    "standardized_dkd": lambda: build_loss({"name": "logit_standardization", "loss": "dkd"}),
    "learned": lambda: wander(LearnedLoss({"logits": LogitLoss()})),
    "learned_generic": lambda: wander(build_learned_loss("logits", {"form": "generic"})),
    "learned_residual": lambda: wander(build_learned_loss("logits", {"form": "residual"})),
    "learned_target": lambda: wander(build_learned_loss("logits", {"form": "target"})),
    "learned_normalized": lambda: wander(build_learned_loss("logits", {"normalize_gradient": True})),
}


@pytest.fixture(params=LOSSES)
def loss(request) -> torch.nn.Module:
    return LOSSES[request.param]()


def test_kd_equals_torch_kldivloss() -> None:
    student, teacher, target = draw()
    terms = KDLoss(weight=0.3, temperature=4.0)(student, teacher, target)
    kl = torch.nn.KLDivLoss(reduction="batchmean")(
        F.log_softmax(student.logits / 4, 1), F.softmax(teacher.logits / 4, 1)
    )
    torch.testing.assert_close(terms["distillation"], 0.3 * 16 * kl)
    torch.testing.assert_close(terms["task"], 0.7 * F.cross_entropy(student.logits, target))


def test_kd_gradient_tends_to_logit_matching_at_high_temperature() -> None:
    """Hinton et al., section 2.1: for zero-mean logits the gradient tends to (student − teacher) / C."""
    student, teacher, target = draw(dtype=torch.float64)
    total(KDLoss(1.0, 1e6)(student, teacher, target)).backward()
    gap = student.logits.detach() - teacher.logits
    expected = (gap - gap.mean(1, keepdim=True)) / gap.numel()
    torch.testing.assert_close(student.logits.grad, expected, rtol=1e-3, atol=1e-7)


def test_learned_loss_starts_as_kd() -> None:
    student, teacher, target = draw()
    learned = LearnedLoss({"logits": LogitLoss(initial_weight=0.3, initial_temperature=2.0)})
    torch.testing.assert_close(
        total(learned(student, teacher, target, 0.4)), total(KDLoss(0.3, 2.0)(student, teacher, target))
    )


def test_dense_one_hot_targets_equal_labels(loss) -> None:
    student, teacher, target = draw()
    dense = F.one_hot(target, 10).float()
    torch.testing.assert_close(total(loss(student, teacher, target, 0.5)), total(loss(student, teacher, dense, 0.5)))


def test_permuting_the_classes_permutes_the_gradient(loss) -> None:
    student, teacher, target = draw(dtype=torch.float64)
    loss = loss.double()
    order = torch.randperm(10)
    total(loss(student, teacher, target, 0.5)).backward()
    permuted = Outputs(student.logits.detach()[:, order].requires_grad_(), {})
    total(loss(permuted, Outputs(teacher.logits[:, order], {}), order.argsort()[target], 0.5)).backward()
    torch.testing.assert_close(permuted.logits.grad, student.logits.grad[:, order])


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"logit_mse"}))
def test_shifting_the_logits_changes_nothing(name: str) -> None:
    loss = LOSSES[name]()
    student, teacher, target = draw(dtype=torch.float64)
    loss = loss.double()
    shifted = Outputs(student.logits + 5 * torch.randn(16, 1), {}), Outputs(teacher.logits + torch.randn(16, 1), {})
    torch.testing.assert_close(total(loss(student, teacher, target, 0.5)), total(loss(*shifted, target, 0.5)))


def test_gradient_equals_finite_differences(loss) -> None:
    """The learned weight and temperature move with the student; that too is in the gradient."""
    student, teacher, target = draw(batch=4, classes=3, dtype=torch.float64)
    loss = loss.double()

    def value(logits: torch.Tensor) -> torch.Tensor:
        return total(loss(Outputs(logits, {}), teacher, target, 0.5))

    assert torch.autograd.gradcheck(value, student.logits)


@pytest.mark.parametrize("classes", [2, 1000])
@pytest.mark.parametrize("gap", [1e2, 1e4])
def test_extreme_logits_give_finite_gradients(loss, classes: int, gap: float) -> None:
    student, teacher, target = draw(classes=classes)
    student = Outputs((gap * student.logits).detach().requires_grad_(), {})
    value = total(loss(student, Outputs(-gap * teacher.logits, {}), target, 0.0))
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(student.logits.grad).all()


def test_half_precision_logits_are_computed_in_float32(loss) -> None:
    student, teacher, target = draw()
    half = Outputs(student.logits.bfloat16(), {}), Outputs(teacher.logits.bfloat16(), {})
    exact = Outputs(half[0].logits.float(), {}), Outputs(half[1].logits.float(), {})
    with torch.autocast("cpu", torch.bfloat16):
        value = total(loss(*half, target, 0.5))
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, total(loss(*exact, target, 0.5)))


def test_learned_weight_and_temperature_stay_in_bounds() -> None:
    student, teacher, target = draw(batch=200, scale=50)
    part = wander(LearnedLoss({"logits": LogitLoss(maximal_temperature=6.0, initial_temperature=2.0)})).parts["logits"]
    weight, temperature = part.weights_and_temperatures(student.logits, teacher.logits, target, 1.0)
    assert ((weight >= 0) & (weight <= 1)).all()
    assert ((temperature >= 1) & (temperature <= 6)).all()


def test_learned_loss_depends_on_progress_and_each_sample() -> None:
    student, teacher, target = draw()
    loss = LOSSES["learned"]()
    assert total(loss(student, teacher, target, 0.0)) != total(loss(student, teacher, target, 1.0))
    weight, _ = loss.parts["logits"].weights_and_temperatures(student.logits, teacher.logits, target, 0.5)
    assert weight.std() > 0


def test_learned_loss_is_a_sum_of_named_parts() -> None:
    student, teacher, target = draw()
    first, second = LogitLoss(), LogitLoss(initial_weight=0.9)
    both = LearnedLoss({"first": first, "second": second})
    terms = both(student, teacher, target, 0.0)
    assert set(terms) == {f"{part}/{term}" for part in ("first", "second") for term in ("task", "distillation")}
    torch.testing.assert_close(
        total(terms), total(first(student, teacher, target)) + total(second(student, teacher, target))
    )
    assert len(list(both.parameters())) == 2 * len(list(first.parameters()))


@pytest.mark.parametrize("options", [{"weight": 1.2}, {"temperature": 0.0}])
def test_kd_refuses_impossible_options(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        KDLoss(**options)


@pytest.mark.parametrize("options", [{"initial_weight": 1.0}, {"initial_temperature": 11.0}])
def test_logit_loss_refuses_impossible_options(options) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        LogitLoss(**options)


def test_a_user_s_function_or_module_becomes_a_loss() -> None:
    outputs, target = Outputs(torch.randn(4, 3), {}), torch.tensor([0, 1, 2, 0])
    by_lambda = wrap_loss(lambda student, teacher, target: (student.logits - teacher.logits).square().mean())
    assert set(by_lambda(outputs, outputs, target, 0.5)) == {"loss"}
    assert wrap_loss(lambda s, t, y, progress=None: {"a": torch.tensor(progress)})(outputs, outputs, target, 0.5) == {
        "a": 0.5
    }

    class Remembering(torch.nn.Module):
        teacher_stages, needs_index = ("stage1",), True

        def enroll(self, index, labels) -> None:
            self.index = index

        def forward(self, student, teacher, target, progress, index):
            return {"a": (index == self.index).float().mean()}

    loss = wrap_loss(Remembering())
    assert isinstance(loss, DistillationLoss)
    assert wrap_loss(loss) is loss
    assert loss.teacher_stages == ("stage1",)
    assert loss.needs_index
    loss.enroll(torch.arange(4), target)
    assert loss(outputs, outputs, target, 0.5, index=torch.arange(4)) == {"a": 1.0}
    with pytest.raises(UserError, match="float"):
        wrap_loss(lambda s, t, y: 1.0)(outputs, outputs, target)
