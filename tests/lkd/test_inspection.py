"""`lkd inspect`: balances known beforehand are found, planted violations are caught, real files are reported on."""

import json
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from torch import Tensor, nn

from lkd.cli import main
from lkd.config import InspectRecipe
from lkd.core.outputs import Outputs
from lkd.evaluation import inspection
from lkd.evaluation.inspection import States, draw_batch, draw_states, fit_balance, inspect_loss, logit_gradient
from lkd.evaluation.inspection_report import inspect_recipe
from lkd.losses import CrossEntropyLoss, DecoupledLoss, FeatureLoss, GenericLoss, KDLoss, LearnedLoss
from lkd.losses.build import build_loss
from lkd.losses.dkd import DKDLoss
from lkd.losses.functions import find_best_temperature
from lkd.losses.learned.file import load_loss, save_loss
from lkd.losses.learned.loss import ReplayedLoss, build_learned_loss
from lkd.losses.learned.trust import TrustFigures
from lkd.models import build
from lkd.models.small import StagedNetwork
from tests.gallery import LOSS
from tests.lkd.test_invariances import wander

STATES = draw_states(10, 0)


def fit(loss: nn.Module, states: States = STATES, progress: float = 0.5):
    return fit_balance(logit_gradient(loss, states, progress), states.student, states.teacher, states.target)


@settings(deadline=None, max_examples=10)
@given(weight=st.floats(0.2, 1.0), temperature=st.floats(0.7, 15.0))
def test_the_fit_finds_the_weight_and_temperature_of_kd(weight: float, temperature: float) -> None:
    found = fit(KDLoss(weight, temperature))
    assert found.task == pytest.approx(1 - weight, abs=1e-3)
    assert found.distillation == pytest.approx(weight, rel=1e-2)
    assert found.share == pytest.approx(weight, rel=1e-2)
    assert found.temperature == pytest.approx(temperature, rel=1e-3)
    for (low, high), truth in ((found.temperatures_as_good, temperature), (found.shares_as_good, weight)):
        assert low <= truth * 1.01
        assert high >= truth / 1.01
    assert found.explained == pytest.approx(1, abs=1e-7)


def test_cross_entropy_has_no_teacher_and_so_no_temperature() -> None:
    found = fit(CrossEntropyLoss())
    assert (found.task, found.share, found.temperature) == (pytest.approx(1), pytest.approx(0, abs=1e-9), None)


def test_a_decoupled_loss_that_is_kd_is_found_to_be_kd() -> None:
    """KD = TCKD + (1 − the teacher's probability of the label) · NCKD: with one teacher's answer for all, β is that."""
    temperature = 3.0
    one = STATES.teacher[100].roll(-int(STATES.target[100]))
    teacher = torch.stack([one.roll(int(label)) for label in STATES.target])
    rest = 1 - float((one / temperature).softmax(0)[0])
    states = STATES._replace(teacher=teacher)
    mixture = DKDLoss(task=0.4, alpha=1.5, beta=1.5 * rest, temperature=temperature, warmup=0.0)
    found = fit(mixture, states)
    assert (found.task, found.distillation) == (pytest.approx(0.4, abs=1e-3), pytest.approx(1.5, abs=1e-3))
    assert found.temperature == pytest.approx(temperature, rel=1e-3)
    assert found.explained == pytest.approx(1, abs=1e-9)
    other = fit(DKDLoss(task=0.4, alpha=1.5, beta=8.0, temperature=temperature, warmup=0.0), states)
    assert other.explained < 0.99, "with more of the other classes it is no KD, and the fit must say so"


def test_the_fit_is_the_least_of_all_squares() -> None:
    """Against a search by hand over temperatures and weights, on a loss that is no KD."""
    gradient = logit_gradient(build_loss("dist"), STATES, 0.5)
    found = fit(build_loss("dist"))

    def explained(task: float, taught: float, temperature: float) -> float:
        logits = STATES.student.clone().requires_grad_()
        terms = [
            task * nn.functional.cross_entropy(logits, STATES.target),
            taught
            * temperature**2
            * nn.functional.kl_div(
                (logits / temperature).log_softmax(1), (STATES.teacher / temperature).softmax(1), reduction="batchmean"
            ),
        ]
        (model,) = torch.autograd.grad(sum(terms), logits)
        return 1 - float((gradient - model * len(logits)).square().sum() / gradient.square().sum())

    best = explained(found.task, found.distillation, found.temperature)
    assert best == pytest.approx(found.explained, abs=1e-6)
    for factors in ((1.02, 1, 1), (0.98, 1, 1), (1, 1.02, 1), (1, 0.98, 1), (1, 1, 1.05), (1, 1, 0.95)):
        values = (found.task, found.distillation, found.temperature)
        assert explained(*(v * f for v, f in zip(values, factors, strict=True))) < best


def test_the_rest_is_where_the_gradient_turns() -> None:
    assert inspection.find_rest(torch.tensor([-3.0, -1.0, 1.0])) == pytest.approx((0.5 + 0.99) / 2)
    assert (inspection.find_rest(-torch.ones(5)), inspection.find_rest(torch.ones(5))) == (1.0, 0.0)
    field = inspection.describe_field(CrossEntropyLoss(), KDLoss(1.0, 1.0), 10)
    assert field["kd"]["rest"][3:-3] == pytest.approx(field["confidence"][3:-3], abs=0.02), "KD pulls to the teacher"
    assert set(field["loss"][0]["rest"]) == {1.0}, "cross-entropy pulls to the label"
    student = field["confidence"][5]
    assert field["cross_entropy"]["gradient"][0][5] == pytest.approx(student - 1, abs=1e-4)


def test_what_a_loss_over_features_matches() -> None:
    learned = LearnedLoss({"logits": DecoupledLoss(), "features": wander(FeatureLoss(deepest=2)).float()})
    before = {name: tensor.clone() for name, tensor in learned.state_dict().items()}
    report = inspect_loss(learned)
    assert all(torch.equal(tensor, before[name]) for name, tensor in learned.state_dict().items())
    assert all(parameter.requires_grad for parameter in learned.parameters()), "the loss that was given is left alone"
    first, _, last = report["pairing"]
    assert list(first["student"].items()) == [("stage3", 0.75), ("stage4", 1.0)]
    assert np.allclose(np.array(first["assignment"]).sum(1), 1)
    part, depths = learned.parts["features"], torch.tensor([0.75, 1.0])
    assert np.allclose(first["assignment"], part.assign_stages(depths, depths).detach())
    assert np.allclose(last["weights"]["images"], part.weigh_stages(depths, torch.tensor(1.0))[:, 1].detach())
    shares = report["shares"][1]["shares"]
    assert {"logits/task", "features/places", "features/channels"} < set(shares)
    assert sum(shares.values()) == pytest.approx(1)
    logits_alone = inspect_loss(LearnedLoss({"logits": learned.parts["logits"]}))
    assert report["balance"] == logits_alone["balance"], "the networks over features have no part in it"
    assert inspect_loss(LearnedLoss({"features": FeatureLoss()}))["balance"] is None


def test_a_form_s_own_balance_is_shown_over_progress() -> None:
    start = LearnedLoss({"logits": GenericLoss(initial_weight=0.2, initial_temperature=3.0)})
    end = LearnedLoss({"logits": GenericLoss(initial_weight=0.8, initial_temperature=6.0)})
    own = inspect_loss(ReplayedLoss([start, end], [0.0, 0.5]))["own_balance"]
    assert len(own) == 11
    for row in own:
        weight, temperature = (0.2, 3.0) if row["progress"] < 0.5 else (0.8, 6.0)
        assert (row["weight"], row["temperature"]) == (pytest.approx(weight), pytest.approx(temperature))
    decoupled = inspect_loss(LearnedLoss({"logits": DecoupledLoss(warmup=0.5)}))["own_balance"]
    assert [row["ramp"] for row in decoupled[:6]] == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert {row["factor"] for row in decoupled} == {1.0}


@pytest.fixture
def learned_file(tmp_path) -> Path:
    path = tmp_path / "both.lkd.safetensors"
    save_loss(path, build_learned_loss("both", {}, inspection.STAGES, inspection.STAGES), {})
    return path


def check_picture(path: Path, bands: int) -> None:
    picture = imread(path)[..., :3]
    assert picture.shape[0] > 150 * bands
    for band in np.array_split(picture, bands):
        assert (band < 0.5).any(2).mean() > 0.01, "something is drawn in every band"


def test_a_learned_file_is_reported_on(gallery: Path, capsys) -> None:
    path = Path(shutil.copy(gallery / LOSS, "loss.lkd.safetensors"))
    assert main(["inspect", str(path)]) == 0
    printed = capsys.readouterr().out
    report = json.loads(Path("loss-inspection/inspection.json").read_text())
    file = report["file"]
    assert file["sha256"][:12] in printed
    assert (file["bytes"], file["format_version"]) == (path.stat().st_size, 2)
    origin = file["trained_with"]
    assert (origin["students"], origin["teacher"], origin["outer steps"]) == ("small_cnn", "embedded", 3)
    assert (origin["training images"], origin["meta-validation images"]) == (200, 100)
    for words in ("meta-validation images", "estimator", "audited", "% top-1", "as logged"):
        assert words in printed
    assert report["parameters"] == sum(p.numel() for p in load_loss(path).parameters())


def test_a_named_loss_is_inspected_to_compare(capsys) -> None:
    assert main(["inspect", "--loss", "{name: kd, weight: 0.25, temperature: 2}", "--num_classes", "5"]) == 0
    printed = capsys.readouterr().out
    assert "kd (weight 0.25, temperature 2)" in printed
    report = json.loads(Path("kd-inspection/inspection.json").read_text())
    assert report["file"] is None
    assert report["balance"]["over_student"][0]["share"] == pytest.approx(0.25, abs=1e-3)
    assert Path("kd-inspection/inspection.png").exists()


def test_the_kd_that_a_loss_is_drawn_beside_can_be_chosen() -> None:
    drawn = []
    for words in ([], ["--kd_weight", "1", "--kd_temperature", "1"]):
        assert main(["inspect", "--loss", "kd", "--num_classes", "5", "--out", "o", *words]) == 0
        drawn.append(json.loads(Path("o/inspection.json").read_text())["field"]["kd"]["rest"])
    assert drawn[0] != drawn[1]


def test_a_file_over_features_that_says_nothing_of_itself_is_drawn(learned_file: Path) -> None:
    text, folder = inspect_recipe(InspectRecipe(str(learned_file), out="here"))
    assert "does not say what it was trained with" in text
    assert "Features" in text
    assert (folder, Path("here/inspection.json").exists()) == (Path("here"), True)
    check_picture(folder / "inspection.png", 3)  # field, balance and pairing


def test_a_made_up_batch_is_of_the_world_that_it_is_to_be_of() -> None:
    batch = draw_batch(0.3, 0.9, 0.6, 10, 0)
    figures = batch.figures
    assert (figures.validation_agreement, figures.own_accuracy) == (pytest.approx(0.9, abs=2e-3), pytest.approx(0.6))
    assert figures.training_agreement == pytest.approx(0.7 * 0.9 + 0.3 * 0.1 / 9, abs=0.03)
    clean = draw_batch(0.0, 0.9, 0.6, 10, 0)
    assert torch.equal(clean.teacher, batch.teacher)
    assert find_best_temperature(clean.teacher, clean.target, 0.1, 10.0) == pytest.approx(
        inspection.TYPICAL_TEMPERATURE, rel=0.1
    )
    assert len(draw_batch(0.3, 0.9, 0.6, 21_841, 0).target) == 200


def test_what_is_set_in_made_up_worlds_is_what_the_form_sets() -> None:
    conditioning = ["state", "context", "agreement", "calibration"]
    loss = wander(build_learned_loss("logits", {"conditioning": conditioning}))
    choices = inspect_loss(loss.float())["choices"]
    part, batch = loss.double().parts["logits"], draw_batch(*inspection.WORLDS["wrong labels"], 10, 0)
    for column, figures in (("told", batch.figures), ("not told", TrustFigures())):
        loss.tell(figures)
        answers = [batch.student.argmax(1), batch.teacher.argmax(1)]
        weight = part.weights_and_temperatures(*batch[:3], 0.5)[0].detach()
        chosen = (answers[0] == batch.target) & (answers[1] != batch.target)
        found = choices["context"][f"wrong labels, {column}"]
        assert found["student = label, teacher not"]["weight"] == pytest.approx(float(weight[chosen].mean()))
        assert found["the whole batch"]["weight"] == pytest.approx(float(weight.mean()))
        assert ("calibration" in found["all differ"]) == (column == "told")
    lines = choices["trust"]["lines"]
    told, hidden = ([means["weight"] for means in line["means"]] for line in lines[:2])
    assert np.ptp(told) != pytest.approx(np.ptp(hidden)), "it was told how good the teacher is, and it was not"
    assert inspect_loss(build_learned_loss("logits", {}))["choices"] is None
    two = inspect_loss(build_learned_loss("logits", {"form": "generic", "conditioning": ["context"]}), num_classes=2)
    assert two["choices"]["agreement"]["progress 0"]["all differ"] == {"weight": None, "temperature": None}
    assert (two["choices"]["trust"], list(two["choices"]["context"])) == (None, list(inspection.WORLDS))


def test_a_loss_that_the_package_carries_is_inspected_by_its_name(universal: Path, capsys) -> None:
    assert main(["inspect", "universal", "--num_classes", "2"]) == 0
    assert "wrong teacher, not told" in capsys.readouterr().out
    report = json.loads(Path("universal-inspection/inspection.json").read_text())
    assert report["file"]["path"] == str(universal)
    check_picture(Path("universal-inspection/inspection.png"), 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--loss", "cut.lkd.safetensors"], "cut.lkd.safetensors: is damaged or not a safetensors file"),
        (["--loss", "kd", "--kd_weight", "2"], "kd_weight: 2 is not"),
        (["--loss", "kd", "--out", "/proc/nowhere"], "cannot be written"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, learned_file: Path, capsys) -> None:
    Path("cut.lkd.safetensors").write_bytes(learned_file.read_bytes()[:-100])
    assert main(["inspect", *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error


def test_a_student_without_stages_is_refused_before_training(learned_file: Path, monkeypatch, capsys) -> None:
    class Bare(StagedNetwork):
        def forward(self, images: Tensor) -> Outputs:
            return super().forward(images)._replace(features={})

    def bare(num_classes: int, in_chans: int) -> nn.Module:
        return Bare(OrderedDict(all=nn.Conv2d(in_chans, 4, 3)), 4, num_classes)

    monkeypatch.setitem(build.__globals__["OWN_NETWORKS"], "bare", bare)
    small = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--train.epochs", "1"]
    words = ["distill", "--run_dir", "r", "--student.name", "bare", *small]
    assert main([*words, "--loss", str(learned_file)]) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error
    assert str(learned_file) in error
    assert "the student gives none; it needs the last 3 stages of both networks" in error
    assert "(student: none; teacher: stage1, stage2, stage3)" in error
    assert not Path("r/log.jsonl").read_text(), "no step was taken"
    assert main([*words, "--loss", "kd"]) == 0, "the same student learns from logits"
