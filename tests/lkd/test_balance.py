"""Balances: the rules against what their papers prove, and trainings with them against plain ones."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from lkd.balance.balancing import BALANCES, Balancing, build_balance, split_terms, take_gradient
from lkd.balance.rules import DTOKDBalance, DynamicBalance, Moment, ReversedBalance
from lkd.config import CompareRecipe, DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.evaluation.comparison.compare import check_methods
from lkd.evaluation.comparison.trials import Trial, balance_of, expand_grid, open_inputs, split_method, trial_path
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.training.build import prepare_images
from lkd.training.training import Training
from tests.lkd.parts import prepare_teacher, start_training

CPU = torch.device("cpu")
DATA = DataRecipe(train_size=300, meta_validation_size=100)
OPTIONS = {"dto_kd": {"every": 3}, "variance_optimal": {"every": 5, "samples": 3}}


@pytest.fixture(scope="module")
def images():
    return prepare_images(DATA)


@pytest.fixture(scope="module")
def teacher(images):
    return prepare_teacher(TeacherRecipe(), DATA, images, CPU)


def start(images, teacher, balance, weight: float = 0.5, **changes) -> Training:
    recipe = TrainRecipe(**{"epochs": 2, "batch_size": 30, **changes})
    loss = KDLoss(weight)
    return start_training(ModelRecipe(), images.train, loss, teacher, recipe, DATA, 3, CPU, balance=balance)


def descend(growth: float, kind: type[DynamicBalance] = DynamicBalance) -> tuple[list[float], list[float]]:
    """Gradient descent on two quadratics whose minima differ; the totals and the weights, a step at a time."""
    point, curvature = torch.tensor([4.0, -3.0], dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    rule = kind(growth=growth, smoothing=0.0, maximum=1e6)
    totals, weights = [], []
    for step in range(200):
        point.requires_grad_(True)
        task = (point**2 * curvature).sum() / 2 + 1
        teacher = ((point - 1) ** 2).sum() / 2 + 0.5
        weight = rule.set_weight(Moment(step, step / 200, task.item(), teacher.item()))
        total = task + weight * teacher
        (gradient,) = torch.autograd.grad(total, point)
        point = (point - 0.5 / (3 + weight) * gradient).detach()
        totals.append(total.item())
        weights.append(weight)
    return totals, weights


def test_the_total_never_rises_within_the_admissible_increase_and_does_beyond() -> None:
    for growth in (0.3, 0.9, 0.999):
        totals, weights = descend(growth)
        assert all(later <= earlier + 1e-12 for earlier, later in pairwise(totals)), growth
        assert all(later >= earlier - 1e-12 for earlier, later in pairwise(weights))
        assert weights[-1] > 2
    totals, _ = descend(1.5)
    assert any(later > earlier + 1e-6 for earlier, later in pairwise(totals))
    _, weights = descend(0.5, ReversedBalance)
    assert weights[-1] == 0.0, "the control falls, to its bound"


def test_dto_kd_is_equally_aligned_with_both_logarithms() -> None:
    task_gradient, teacher_gradient = torch.randn(2, 50, dtype=torch.float64)
    for scale in (1.0, 7.0):
        weight = DTOKDBalance().set_weight(Moment(0, 0, 1.3, 0.4 * scale, (task_gradient, scale * teacher_gradient)))
        step = task_gradient + weight * scale * teacher_gradient
        assert float(step @ task_gradient / 1.3) == pytest.approx(float(step @ teacher_gradient / 0.4), rel=1e-9)
        assert 0 < weight < 10
    conflict = Moment(0, 0, 1.0, 1.0, (torch.tensor([1.0, 0.0]), torch.tensor([3.0, 0.0])))
    assert DTOKDBalance().set_weight(conflict) == 0.0, "the teacher's π is negative"
    equal = Moment(0, 0, 1.0, 1.0, (torch.ones(2), torch.ones(2)))
    assert DTOKDBalance(initial=2.0).set_weight(equal) == 2.0, "nothing to decide"


@pytest.mark.parametrize("name", BALANCES)
def test_the_weight_moves_during_a_training(images, teacher, name: str) -> None:
    training, weights = start(images, teacher, {"name": name, **OPTIONS.get(name, {})}), set()
    while training.step < 10:
        training.run_step()
        weights.add(training.balance.weight)
    assert (len(weights) > 1) == (name not in ("constant", "dto_kd")), "dto_kd stays at its bound here"


def test_a_constant_weight_is_that_of_the_loss_itself(images, teacher) -> None:
    """(1 − w) CE + λ w τ² KL, normalised, with w = 1/2 is KD of weight λ / (1 + λ)."""
    balance = {"name": "constant", "weight": 3.0, "normalize": True}
    ours, plain = start(images, teacher, balance), start(images, teacher, None, weight=0.75)
    same = start(images, teacher, "constant")
    unweighed = start(images, teacher, None)
    for training in (ours, plain, same, unweighed):
        for _ in range(5):
            terms = training.run_step()
    for a, b in ((ours, plain), (same, unweighed)):
        for x, y in zip(a.student.parameters(), b.student.parameters(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-5)
    assert set(terms) == {"task", "distillation"}


@pytest.mark.parametrize("name", ["dto_kd", "variance_optimal"])
def test_a_loss_without_a_share_for_the_labels_is_refused(images, teacher, name: str) -> None:
    with pytest.raises(UserError, match="the term `task` is 0"):
        start(images, teacher, name, weight=1.0).run_step()


def test_accumulated_parts_share_one_weight(images, teacher) -> None:
    training = start(images, teacher, {"name": "dynamic", "smoothing": 0.0}, accumulation=3)
    seen = []
    rule = training.balance.rule.set_weight
    training.balance.rule.set_weight = lambda moment: seen.append(moment.step) or rule(moment)
    for _ in range(4):
        training.run_step()
    assert seen == [0, 1, 2, 3]


def test_gradients_are_those_of_the_terms(images, teacher) -> None:
    """With λ held, the sum of the two gradients is what backward leaves."""
    training = start(images, teacher, "dto_kd")
    held: dict[str, tuple[Tensor, Tensor]] = {}

    class Spy:
        def wants_gradients(self, step: int) -> bool:
            return True

        def set_weight(self, moment: Moment) -> float:
            held["gradients"] = moment.gradients
            return 2.5

    training.balance = Balancing(Spy())
    training.run_step()
    left = torch.cat([p.grad.flatten() for p in training.student.parameters()])
    task, distillation = held["gradients"]
    torch.testing.assert_close(left, task + 2.5 * distillation, rtol=1e-4, atol=1e-5)


def test_terms_are_split_by_name() -> None:
    one = torch.ones((), requires_grad=True)
    task, others = split_terms({"logits/task": one, "logits/target_class": 2 * one, "features/f": 3 * one})
    assert (task.item(), others.item()) == (1, 5)
    assert float(take_gradient(torch.tensor(3.0), [one])) == 0.0
    for terms, missing in (({"task": one}, "the teacher's"), ({"logits/divergence": one}, "`task`")):
        with pytest.raises(UserError, match=rf"balance: the loss has the terms .*, none of them {missing}"):
            split_terms(terms)
    with pytest.raises(UserError, match="balance: with teacher_rate"):
        split_terms({"task": one, "distillation": one, "teacher/task": one})


def test_a_method_of_a_comparison_has_a_balance_of_its_own(tmp_path) -> None:
    method = {"name": "kd", "balance": "dynamic", "grid": {"balance.growth": [0.1, 1.0], "weight": [0.5]}}
    points = expand_grid(method)
    assert points[0] == {"name": "kd", "weight": 0.5, "balance": {"name": "dynamic", "growth": 0.1}}
    assert split_method(points[0], TrainRecipe())[0] == {"name": "kd", "weight": 0.5}
    assert balance_of(points[1]) == {"name": "dynamic", "growth": 1.0}
    (tmp_path / "loss.lkd.safetensors").write_bytes(b"x")
    learned = [
        {"name": str(tmp_path / "loss.lkd.safetensors"), "balance": {"name": "constant", "weight": w}} for w in (1, 2)
    ]
    trials = [Trial("a", loss, ModelRecipe(), 0, True) for loss in (*points, *learned)]
    assert len({trial_path(CompareRecipe(), trial, tmp_path) for trial in trials}) == 4
    wrong = {"name": "kd", "balance": {"name": "dynamic", "grwth": 1.0}}
    recipe = CompareRecipe(methods={"A": wrong}, baseline="A")
    with pytest.raises(UserError, match=r"methods\.A: balance 'dynamic': .*'grwth'"):
        check_methods(recipe, open_inputs(recipe), CPU)


@pytest.mark.parametrize(
    ("balance", "message"),
    [
        ("dynamik", "balance: unknown name 'dynamik'; nearest: dynamic"),
        ({"growth": 1.0}, "balance: .* has no `name`"),
        ({"name": "constant", "weight": -1.0}, r"balance 'constant': weight: -1.0 is not in \[0"),
        ({"name": "dynamic", "maximum": float("inf")}, "balance 'dynamic': minimum 0.0, maximum inf"),
        ({"name": "dynamic", "direction": -1}, "balance 'dynamic': .*'direction'"),
        ({"name": "dynamic", "normalize": 1}, "balance.normalize: 1 is neither"),
        ({"name": "dto_kd", "every": "two"}, "balance 'dto_kd': every: two is not a whole number"),
        ({"name": "variance_optimal", "samples": 3.5}, "samples: 3.5 is not a whole number of at least 2"),
    ],
)
def test_a_bad_balance_is_one_line(balance, message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_balance(balance, KDLoss())


def test_what_cannot_be_weighed_is_refused(images, teacher) -> None:
    with pytest.raises(UserError, match="constant has nothing to weigh: the loss is cross-entropy"):
        build_balance("constant", CrossEntropyLoss())
    with pytest.raises(UserError, match=r"train\.compile: .* leave it"):
        start(images, teacher, "dto_kd", compile=True)
    with pytest.raises(UserError, match=r"train\.precision: float16 loses small gradients"):
        start(images, teacher, "variance_optimal", precision="float16")
