"""Losses by hand: against torchdistill's classes, or a derivation in float64 from the paper's definition."""

import pytest
import torch
import torchdistill.losses.mid_level as oracle
from torch.nn import functional as F

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses import DistillationLoss, wrap_loss
from lkd.losses.build import FEATURE_LOSSES, build_loss
from lkd.losses.dkd import DKDLoss

STUDENT = {"shallow": (6, 8, 8), "middle": (8, 4, 4), "deep": (12, 2, 2)}
TEACHER = {"low": (10, 16, 16), "half": (9, 8, 8), "high": (7, 4, 4), "top": (20, 2, 2)}


def draw(dtype: torch.dtype = torch.float64, batch: int = 6, classes: int = 5, student=STUDENT, teacher=TEACHER):
    """Outputs of both networks, all of them leaves of the student's graph, and labels."""
    networks = [
        Outputs(
            3 * torch.randn(batch, classes, dtype=dtype),
            {n: torch.randn(batch, *s, dtype=dtype) for n, s in stages.items()},
        )
        for stages in (student, teacher)
    ]
    for tensor in (networks[0].logits, *networks[0].features.values()):
        tensor.requires_grad_()
    return *networks, torch.randint(classes, (batch,))


def io(outputs: Outputs) -> dict[str, dict[str, torch.Tensor]]:
    """What torchdistill's hooks would have collected."""
    pooled = {f"{name}.pooled": feature.mean((2, 3)) for name, feature in outputs.features.items()}
    return {path: {"output": value} for path, value in {"logits": outputs.logits, **outputs.features, **pooled}.items()}


def check_equal(ours: torch.Tensor, theirs: torch.Tensor, student: Outputs) -> None:
    """Equal values and equal gradients on every tensor of the student."""
    torch.testing.assert_close(ours, theirs)
    leaves = [student.logits, *student.features.values()]
    gradients = [
        torch.autograd.grad(value, leaves, retain_graph=True, allow_unused=True, materialize_grads=True)
        for value in (ours, theirs)
    ]
    assert any(gradient.abs().sum() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients)


LOGITS = {
    f"{who}_module_{what}": value
    for who in ("student", "teacher")
    for what, value in (("path", "logits"), ("io", "output"))
}
PAIRS = {
    n: {"student": {"path": s, "io": "output"}, "teacher": {"path": t, "io": "output"}}
    for n, s, t in (("first", "middle", "high"), ("second", "deep", "top"))
}
ORACLES = {
    "kd": ({"weight": 0.3, "temperature": 3.0}, lambda: oracle.KDLoss(**LOGITS, temperature=3.0, alpha=0.7, beta=0.3)),
    "dist": (
        {"task": 0.0, "beta": 1.5, "gamma": 0.7, "temperature": 2.0},
        lambda: oracle.DISTLoss(**LOGITS, beta=1.5, gamma=0.7, tau=2.0),
    ),
    "logit_standardization": ({}, lambda: oracle.LogitStdKDLoss(**LOGITS, temperature=2.0, alpha=0.1, beta=9.0)),
    "at": (
        {"task": 0.0, "distillation": 1.0, "stages": [["middle", "high"], ["deep", "top"]]},
        lambda: oracle.ATLoss(PAIRS),
    ),
    "rkd": (
        {"task": 0.0},
        lambda: oracle.RKDLoss("deep.pooled", "top.pooled", dist_factor=25.0, angle_factor=50.0, reduction="mean"),
    ),
}


@pytest.mark.parametrize("name", ORACLES)
def test_equals_torchdistill(name: str) -> None:
    options, build_oracle = ORACLES[name]
    student, teacher, target = draw()
    ours = sum(build_loss({"name": name, **options}, STUDENT, TEACHER)(student, teacher, target).values())
    check_equal(ours, build_oracle()(io(student), io(teacher), target), student)


def test_sp_equals_torchdistill_but_for_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchdistill 1.1.5 scales the rows by their L1 norm; the paper, and RepDistiller, by L2."""
    monkeypatch.setattr(oracle, "normalize", lambda tensor, dim: tensor / tensor.norm(dim=dim, keepdim=True))
    student, teacher, target = draw()
    terms = build_loss({"name": "sp", "distillation": 1.0}, STUDENT, TEACHER)(student, teacher, target)
    check_equal(
        terms["distillation"], oracle.SPKDLoss("deep", "top", "batchmean")(io(student), io(teacher), target), student
    )


@pytest.mark.parametrize("classes", [2, 7])
def test_dkd_is_two_divergences_between_explicit_distributions(classes: int) -> None:
    student, teacher, target = draw(classes=classes)
    loss = build_loss({"name": "dkd", "task": 2.0, "alpha": 0.7, "beta": 3.0, "temperature": 2.5})
    terms = loss(student, teacher, target)
    expected = {"task": 2 * F.cross_entropy(student.logits, target), "target_class": 0.0, "other_classes": 0.0}
    for z_s, z_t, label in zip(student.logits, teacher.logits, target, strict=True):
        p, q = (F.softmax(z / 2.5, 0) for z in (z_s, z_t))
        rest = [k for k in range(classes) if k != label]
        b_p, b_q = (torch.stack([x[label], x[rest].sum()]) for x in (p, q))
        o_p, o_q = (x[rest] / x[rest].sum() for x in (p, q))
        expected["target_class"] += 0.7 * 2.5**2 * (b_q * (b_q / b_p).log()).sum() / len(target)
        expected["other_classes"] += 3 * 2.5**2 * (o_q * (o_q / o_p).log()).sum() / len(target)
    check_equal(sum(terms.values()), sum(expected.values()), student)
    torch.testing.assert_close(terms, expected)


@pytest.mark.parametrize("mask", [-65504.0, -1e6, -1e9, torch.finfo(torch.float32).min])
def test_dkd_of_masked_classes_is_that_of_the_others(mask: float) -> None:
    student, teacher, target = torch.randn(4, 6), torch.randn(4, 6), torch.full((4,), 5)
    padded = [torch.cat([logits, torch.full((4, 4), mask)], 1).requires_grad_() for logits in (student, teacher)]
    whole = DKDLoss(temperature=1.0, warmup=0.0)(*(Outputs(logits, {}) for logits in padded), target)
    part = DKDLoss(temperature=1.0, warmup=0.0)(Outputs(student, {}), Outputs(teacher, {}), target)
    for name, value in part.items():
        torch.testing.assert_close(whole[name], value)


def test_two_classes_cannot_be_standardised() -> None:
    outputs = Outputs(torch.randn(4, 2), {})
    with pytest.raises(UserError, match="of two classes standardised logits are the same"):
        build_loss("logit_standardization")(outputs, outputs, torch.tensor([0, 1, 0, 1]))


def test_dkd_ramps_the_teacher_up() -> None:
    student, teacher, target = draw()
    with pytest.raises(UserError, match=r"warmup: 20 is not in \[0, 1\]"):
        build_loss({"name": "dkd", "warmup": 20})
    loss = build_loss({"name": "dkd", "warmup": 0.2})
    full, half = loss(student, teacher, target, 0.9), loss(student, teacher, target, 0.1)
    torch.testing.assert_close(half["other_classes"], full["other_classes"] / 2)
    torch.testing.assert_close(half["task"], full["task"])
    assert loss(student, teacher, target, 0.0)["target_class"] == 0


def test_dkd_takes_the_most_probable_class_of_dense_targets() -> None:
    student, teacher, target = draw()
    mixed = 0.7 * F.one_hot(target, 5).double() + 0.3 * F.one_hot((target + 1) % 5, 5).double()
    hard, soft = (build_loss("dkd")(student, teacher, form) for form in (target, mixed))
    torch.testing.assert_close(soft, hard | {"task": F.cross_entropy(student.logits, mixed)})


def test_logit_mse_equals_torch() -> None:
    student, teacher, target = draw()
    terms = build_loss({"name": "logit_mse", "task": 0.5, "distillation": 2.0})(student, teacher, target)
    expected = 0.5 * F.cross_entropy(student.logits, target) + 2 * F.mse_loss(student.logits, teacher.logits)
    check_equal(sum(terms.values()), expected, student)


def test_fitnet_is_a_regression_of_each_place() -> None:
    student, teacher, target = draw()
    options = {"name": "fitnet", "distillation": 3.0, "stages": [["shallow", "low"]]}
    loss = build_loss(options, STUDENT, TEACHER).double()
    theirs = F.avg_pool2d(teacher.features["low"], 2)
    weight, bias = loss.regressors[0].weight[:, :, 0, 0], loss.regressors[0].bias
    ours = torch.einsum("oc,bchw->bohw", weight, student.features["shallow"]) + bias.view(1, -1, 1, 1)
    check_equal(loss(student, teacher, target)["distillation"], 3 * F.mse_loss(ours, theirs), student)
    assert set(loss.state_dict()) == {"regressors.0.weight", "regressors.0.bias"}


def test_default_pairs() -> None:
    pairs = {name: build_loss(name, STUDENT, TEACHER).pairs for name in FEATURE_LOSSES}
    assert pairs["fitnet"] == [("middle", "high")]
    assert pairs["at"] == [("shallow", "half"), ("middle", "high"), ("deep", "top")]
    assert pairs["sp"] == pairs["rkd"] == [("deep", "top")]
    assert build_loss("at", {"a": (3, 5, 5)}, TEACHER).pairs == [("a", "top")], "no size in common: the last stages"


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_features_of_any_size_scale_and_precision_are_compared(name: str) -> None:
    """A teacher's map larger or smaller than the student's; tokens against a map; zeros; bfloat16; dense targets."""
    for student_shape, teacher_shape in (((4, 6, 6), (5, 3, 4)), ((4, 3, 3), (5, 7, 7)), ((9, 4), (5, 6, 6))):
        student, teacher, target = draw(torch.float32, student={"a": student_shape}, teacher={"b": teacher_shape})
        loss = build_loss(name, {"a": student_shape}, {"b": teacher_shape})
        value = sum(loss(student, teacher, target).values())
        value.backward()
        assert torch.isfinite(student.features["a"].grad).all()
        assert student.features["a"].grad.abs().sum() > 0
        torch.testing.assert_close(sum(loss(student, teacher, F.one_hot(target, 5).float()).values()), value)
        for scale in (0.0, 1e4):
            feature = (scale * student.features["a"]).detach().requires_grad_()
            total = sum(loss(Outputs(student.logits, {"a": feature}), teacher, target).values())
            assert torch.isfinite(total)
            assert torch.isfinite(torch.autograd.grad(total, feature)[0]).all()
        half = [
            Outputs(o.logits.bfloat16(), {n: f.bfloat16() for n, f in o.features.items()}) for o in (student, teacher)
        ]
        exact = [Outputs(o.logits.float(), {n: f.float() for n, f in o.features.items()}) for o in half]
        with torch.autocast("cpu", torch.bfloat16):
            value = sum(loss(*half, target).values())
        torch.testing.assert_close(value, sum(loss(*exact, target).values()))


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ({"name": "at", "stages": [["deep", "layer4"]]}, r"teacher has no stage 'layer4'; it has low \[10, 16, 16\]"),
        ({"name": "sp", "stages": [["deeep", "top"]]}, r"student has no stage 'deeep'; it has shallow \[6, 8, 8\]"),
        ({"name": "fitnet", "stages": ["deep"]}, "'deep' is not a pair"),
        ({"name": "fitnet", "stages": []}, "pairs nothing"),
        ({"name": "kd", "weight": 1.2}, "weight: 1.2"),
        ({"name": "kd", "adapters": True}, "adapters"),
        ({"name": "dkd", "temperature": 0}, "temperature: 0"),
        ({"name": "dist", "gamma": -1}, "gamma: -1"),
        ({"name": "rkd", "wide": 1}, "'wide'"),
        ({"name": "logit_standardization", "loss": "at"}, "'at' is not one of kd, logit_mse, dkd, dist"),
    ],
)
def test_bad_specifications_are_one_clear_line(specification, message: str) -> None:
    with pytest.raises(UserError, match=f"'{specification['name']}'.*{message}") as error:
        build_loss(specification, STUDENT, TEACHER)
    assert "\n" not in str(error.value)


def test_a_feature_loss_needs_stages_and_some_two_images() -> None:
    with pytest.raises(UserError, match="'at' reads features: give build_loss"):
        build_loss("at")
    with pytest.raises(UserError, match="the student gives no features"):
        build_loss("at", {}, TEACHER)
    with pytest.raises(UserError, match=r"shape \[5, 7\] is neither a map \[c, h, w\] nor a square grid of tokens"):
        build_loss("sp", {"tokens": (5, 7)}, TEACHER)
    for name in ("rkd", "sp"):
        with pytest.raises(UserError, match=rf"'{name}' compares images with each other: a batch of 1"):
            build_loss(name, STUDENT, TEACHER)(*draw(batch=1))
    with pytest.raises(UserError, match="'dist' compares images"):
        build_loss("dist")(*draw(batch=1))


def test_a_user_s_function_or_module_becomes_a_loss() -> None:
    outputs, target = Outputs(torch.randn(4, 3), {}), torch.tensor([0, 1, 2, 0])
    by_lambda = wrap_loss(lambda student, teacher, target: (student.logits - teacher.logits).square().mean())
    assert set(by_lambda(outputs, outputs, target, 0.5)) == {"loss"}
    told = wrap_loss(lambda s, t, y, progress=None: {"a": torch.tensor(progress)})
    assert told(outputs, outputs, target, 0.5) == {"a": 0.5}
    weighted = wrap_loss(lambda s, t, y, weight=2.0, *, progress: {"a": torch.tensor(weight * progress)})
    assert weighted(outputs, outputs, target, 0.5) == {"a": 1.0}

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
    ones = wrap_loss(lambda s, t, y: {"task": s.logits.mean(), "other": s.logits.mean().view(1)})
    assert {term.shape for term in ones(outputs, outputs, target).values()} == {torch.Size([])}, "so they are added up"
    with pytest.raises(UserError, match="'a' as float"):
        wrap_loss(lambda s, t, y: {"a": 1.0})(outputs, outputs, target)
    for each in (F.cross_entropy, lambda *inputs, **options: {"task": F.cross_entropy(*inputs, **options)}):
        with pytest.raises(UserError, match=r"of shape \[4\], not a scalar"):
            wrap_loss(lambda s, t, y, each=each: each(s.logits, y, reduction="none"))(outputs, outputs, target)
