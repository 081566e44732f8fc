"""Hand-made losses against torchdistill's classes, or against a derivation in float64 from the paper's definition."""

import math

import pytest
import torch
import torchdistill.losses.mid_level as oracle
from torch.nn import functional as F

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses.build import FEATURE_LOSSES, build_loss
from lkd.losses.features import RKDLoss

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
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other)


LOGITS = {
    "student_module_path": "logits",
    "student_module_io": "output",
    "teacher_module_path": "logits",
    "teacher_module_io": "output",
}
PAIRS = {
    n: {"student": {"path": s, "io": "output"}, "teacher": {"path": t, "io": "output"}}
    for n, s, t in (("first", "middle", "high"), ("second", "deep", "top"))
}
ORACLES = {
    "kd": (
        {"weight": 0.3, "temperature": 3.0},
        lambda: oracle.KDLoss(**LOGITS, temperature=3.0, alpha=0.7, beta=0.3),
    ),
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
    theirs = build_oracle()(io(student), io(teacher), target)
    check_equal(ours, theirs, student)


def test_sp_equals_torchdistill_but_for_the_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchdistill 1.1.5 scales the rows by their L1 norm; the paper, and RepDistiller, by L2."""
    monkeypatch.setattr(oracle, "normalize", lambda tensor, dim: tensor / tensor.norm(dim=dim, keepdim=True))
    student, teacher, target = draw()
    terms = build_loss({"name": "sp", "distillation": 1.0}, STUDENT, TEACHER)(student, teacher, target)
    theirs = oracle.SPKDLoss("deep", "top", "batchmean")(io(student), io(teacher), target)
    check_equal(terms["distillation"], theirs, student)


@pytest.mark.parametrize("classes", [2, 7])
def test_dkd_is_two_divergences_between_explicit_distributions(classes: int) -> None:
    student, teacher, target = draw(classes=classes)
    terms = build_loss({"name": "dkd", "task": 2.0, "alpha": 0.7, "beta": 3.0, "temperature": 2.5})(
        student, teacher, target
    )
    expected = {"task": 2 * F.cross_entropy(student.logits, target), "target_class": 0.0, "other_classes": 0.0}
    for z_s, z_t, label in zip(student.logits, teacher.logits, target, strict=True):
        p, q = (F.softmax(z / 2.5, 0) for z in (z_s, z_t))
        rest = [k for k in range(classes) if k != label]
        b_p, b_q = (torch.stack([x[label], x[rest].sum()]) for x in (p, q))
        o_p, o_q = (x[rest] / x[rest].sum() for x in (p, q))
        expected["target_class"] += 0.7 * 2.5**2 * (b_q * (b_q / b_p).log()).sum() / len(target)
        expected["other_classes"] += 3 * 2.5**2 * (o_q * (o_q / o_p).log()).sum() / len(target)
    check_equal(sum(terms.values()), sum(expected.values()), student)
    for name, value in expected.items():
        torch.testing.assert_close(terms[name], value)


def test_dkd_with_kd_s_own_weight_is_kd() -> None:
    """Eq. 6 of the paper: KD = TCKD + (1 − p_target of the teacher) · NCKD, one sample at a time."""
    student, teacher, target = draw(batch=1)
    rest = 1 - F.softmax(teacher.logits / 4, 1)[0, target].item()
    dkd = build_loss({"name": "dkd", "task": 0.0, "alpha": 1.0, "beta": rest})(student, teacher, target)
    kd = build_loss({"name": "kd", "weight": 1.0})(student, teacher, target)
    check_equal(sum(dkd.values()), kd["distillation"], student)


def test_dkd_ramps_the_teacher_up() -> None:
    student, teacher, target = draw()
    loss = build_loss({"name": "dkd", "warmup": 0.2})
    full, half = loss(student, teacher, target, 0.9), loss(student, teacher, target, 0.1)
    torch.testing.assert_close(half["other_classes"], full["other_classes"] / 2)
    torch.testing.assert_close(half["task"], full["task"])
    assert loss(student, teacher, target, 0.0)["target_class"] == 0


def test_dkd_takes_the_most_probable_class_of_dense_targets() -> None:
    student, teacher, target = draw()
    mixed = 0.7 * F.one_hot(target, 5).double() + 0.3 * F.one_hot((target + 1) % 5, 5).double()
    hard, soft = (build_loss("dkd")(student, teacher, form) for form in (target, mixed))
    torch.testing.assert_close(soft["target_class"], hard["target_class"])
    torch.testing.assert_close(soft["other_classes"], hard["other_classes"])
    torch.testing.assert_close(soft["task"], F.cross_entropy(student.logits, mixed))


def test_logit_mse_equals_torch() -> None:
    student, teacher, target = draw()
    terms = build_loss({"name": "logit_mse", "task": 0.5, "distillation": 2.0})(student, teacher, target)
    expected = 0.5 * F.cross_entropy(student.logits, target) + 2 * F.mse_loss(student.logits, teacher.logits)
    check_equal(sum(terms.values()), expected, student)


def test_fitnet_is_a_regression_of_each_place() -> None:
    student, teacher, target = draw()
    loss = build_loss(
        {"name": "fitnet", "distillation": 3.0, "stages": [["shallow", "low"]]}, STUDENT, TEACHER
    ).double()
    theirs = F.avg_pool2d(teacher.features["low"], 2)
    weight, bias = loss.regressors[0].weight[:, :, 0, 0], loss.regressors[0].bias
    ours = torch.einsum("oc,bchw->bohw", weight, student.features["shallow"]) + bias.view(1, -1, 1, 1)
    terms = loss(student, teacher, target)
    check_equal(terms["distillation"], 3 * F.mse_loss(ours, theirs), student)
    assert set(loss.state_dict()) == {"regressors.0.weight", "regressors.0.bias"}


def test_default_pairs() -> None:
    pairs = {name: build_loss(name, STUDENT, TEACHER).pairs for name in FEATURE_LOSSES}
    assert pairs["fitnet"] == [("middle", "high")]
    assert pairs["at"] == [("shallow", "half"), ("middle", "high"), ("deep", "top")]
    assert pairs["sp"] == pairs["rkd"] == [("deep", "top")]
    assert build_loss("at", {"a": (3, 5, 5)}, TEACHER).pairs == [("a", "top")], "no size in common: the last stages"


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_any_sizes_can_be_compared(name: str) -> None:
    """A teacher's map larger or smaller than the student's; tokens against a map."""
    for student_shape, teacher_shape in (((4, 6, 6), (5, 3, 4)), ((4, 3, 3), (5, 7, 7)), ((9, 4), (5, 6, 6))):
        student, teacher, target = draw(torch.float32, student={"a": student_shape}, teacher={"b": teacher_shape})
        loss = build_loss(name, {"a": student_shape}, {"b": teacher_shape})
        sum(loss(student, teacher, target).values()).backward()
        assert torch.isfinite(student.features["a"].grad).all()
        assert student.features["a"].grad.abs().sum() > 0


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_feature_losses_take_dense_targets_and_extreme_features(name: str) -> None:
    student, teacher, target = draw(torch.float32)
    loss = build_loss(name, STUDENT, TEACHER)
    dense = F.one_hot(target, 5).float()
    torch.testing.assert_close(
        sum(loss(student, teacher, dense).values()), sum(loss(student, teacher, target).values())
    )
    for scale in (0.0, 1e4):
        extreme = Outputs(
            student.logits, {n: (scale * f).detach().requires_grad_() for n, f in student.features.items()}
        )
        value = sum(loss(extreme, teacher, target).values())
        value.backward()
        assert torch.isfinite(value)
        assert all(f.grad is None or torch.isfinite(f.grad).all() for f in extreme.features.values())


@pytest.mark.parametrize("name", FEATURE_LOSSES)
def test_half_precision_features_are_computed_in_float32(name: str) -> None:
    student, teacher, target = draw(torch.float32)
    half = [Outputs(o.logits.bfloat16(), {n: f.bfloat16() for n, f in o.features.items()}) for o in (student, teacher)]
    exact = [Outputs(o.logits.float(), {n: f.float() for n, f in o.features.items()}) for o in half]
    loss = build_loss(name, STUDENT, TEACHER)
    with torch.autocast("cpu", torch.bfloat16):
        value = sum(loss(*half, target).values())
    torch.testing.assert_close(value, sum(loss(*exact, target).values()))


def test_rkd_refuses_a_batch_of_one() -> None:
    student, teacher, target = draw(batch=1)
    with pytest.raises(UserError, match=r"'rkd' compares images with each other: a batch of 1"):
        RKDLoss(STUDENT, TEACHER)(student, teacher, target)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        (
            {"name": "at", "stages": [["deep", "layer4"]]},
            r"'at': .*teacher has no stage 'layer4'; it has low \[10, 16, 16\]",
        ),
        (
            {"name": "sp", "stages": [["deeep", "top"]]},
            r"'sp': .*student has no stage 'deeep'; it has shallow \[6, 8, 8\]",
        ),
        ({"name": "fitnet", "stages": ["deep"]}, "'deep' is not a pair"),
        ({"name": "fitnet", "stages": []}, "pairs nothing"),
        ({"name": "dkd", "temperature": 0}, "temperature: 0 is not positive"),
        ({"name": "dist", "gamma": -1}, "gamma: -1 is negative"),
        ({"name": "rkd", "wide": 1}, "unexpected keyword argument 'wide'"),
        ({"name": "logit_standardization", "loss": "at"}, "'at' is not one of kd, logit_mse, dkd, dist"),
    ],
)
def test_bad_specifications_are_one_clear_line(specification, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_loss(specification, STUDENT, TEACHER)
    assert "\n" not in str(error.value)


def test_a_feature_loss_needs_stages() -> None:
    with pytest.raises(UserError, match="'at' reads features: give build_loss"):
        build_loss("at")
    with pytest.raises(UserError, match="the student gives no features"):
        build_loss("at", {}, TEACHER)
    with pytest.raises(UserError, match=r"shape \[5, 7\] is neither a map \[c, h, w\] nor a square grid of tokens"):
        build_loss("sp", {"tokens": (5, 7)}, TEACHER)


def test_two_equal_networks_have_nothing_to_learn_from_each_other() -> None:
    student, _, target = draw(student=TEACHER)
    for name in ("at", "sp", "rkd", "dist", "dkd", "logit_mse"):
        terms = build_loss(name, TEACHER, TEACHER)(student, student, target)
        assert math.isclose(sum(value.item() for term, value in terms.items() if term != "task"), 0, abs_tol=1e-9), name
