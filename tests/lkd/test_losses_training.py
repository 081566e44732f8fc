"""Every loss, ours and torchdistill's, trains real pairs of networks and is checkpointed with all it holds."""

from functools import partial

import pytest
import torch
from torch.nn.functional import one_hot

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import save_checkpoint
from lkd.data import Batches
from lkd.losses.build import LOSSES, build_loss
from lkd.losses.learned.file import save_loss
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.torchdistill import RECIPES, REFUSED, TorchdistillLoss
from lkd.models.teacher import TabulatedTeacher, Teacher
from lkd.training.build import prepare_images
from lkd.training.training import Training
from tests.lkd.parts import VIT, prepare_loss, prepare_teacher, start_training

CPU = torch.device("cpu")
CNN = ModelRecipe("small_cnn")
NAMES = [*LOSSES, *(f"torchdistill/{name}" for name in RECIPES)]
SMALL_MEMORY = {"torchdistill/CRDLoss": {"num_negative_samples": 64}}
STAGES = {"a": (8, 4, 4), "b": (12, 2, 2)}


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=120, meta_validation_size=50))


def specify(name: str) -> dict:
    return {"name": name, **SMALL_MEMORY.get(name, {})}


def start(images, name: str, student: ModelRecipe = CNN, augmentation: str = "none") -> Training:
    loss = prepare_loss(specify(name), student, TeacherRecipe(), images, 3)
    data = DataRecipe(augmentation=augmentation)
    teacher = prepare_teacher(TeacherRecipe(), data, images, CPU, loss.teacher_stages)
    recipe = TrainRecipe(epochs=2, batch_size=20, learning_rate=0.001)
    return start_training(student, images.train, loss, teacher, recipe, DataRecipe(augmentation=augmentation), 3, CPU)


OF_TOKENS = ("fitnet", "torchdistill/CRDLoss", "torchdistill/HierarchicalContextLoss")  # a map, a vector, pyramids


@pytest.mark.parametrize(
    ("name", "student"), [*((name, CNN) for name in NAMES), *((name, VIT) for name in OF_TOKENS)], ids=str
)
def test_every_loss_trains_a_student(images, tmp_path, name: str, student: ModelRecipe) -> None:
    training = start(images, name, student)
    save_checkpoint(tmp_path / "checkpoint", training.state_dict())
    batch = training.batches.at(0)
    outputs = training.student(batch.images), training.teacher(batch)
    identity = {"index": batch.index} if training.loss.needs_index else {}
    dense = training.loss(*outputs, one_hot(batch.target, 10).float(), 0.5, **identity)
    assert all(torch.isfinite(value) for value in dense.values())
    before = [p.detach().clone() for p in [*training.student.parameters(), *training.loss.parameters()]]
    terms = [training.run_step() for _ in range(2)]
    assert all(torch.isfinite(value) for step in terms for value in step.values())
    if name != "cross_entropy":
        assert any(value != 0 for term, value in terms[1].items() if term != "task")
    after = [*training.student.parameters(), *training.loss.parameters()]
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert all(moved[len(list(training.student.parameters())) :]), "an adapter that nothing trains"
    assert any(moved[: len(list(training.student.parameters()))])
    recipe = RECIPES.get(name.removeprefix("torchdistill/"))
    one = images.train.batch(images.train.index.new_zeros(1), CPU)
    ask = partial(training.loss, training.student(one.images), training.teacher(one), one.target, 0.5)
    identity = {"index": one.index} if identity else {}
    if recipe and recipe.several_images:
        with pytest.raises(UserError, match=f"{name}' needs at least 2 images a batch"):
            ask(**identity)
    elif recipe:
        assert all(torch.isfinite(value) for value in ask(**identity).values())


def test_fsp_is_refused_where_all_stages_have_one_size(images) -> None:
    with pytest.raises(UserError, match="FSP is about the flow between stages and needs two pairs, not 1"):
        start(images, "torchdistill/FSPLoss", VIT)


def test_crd_remembers_the_batch_and_contrasts_with_other_classes(images) -> None:
    training = start(images, "torchdistill/CRDLoss")
    loss = training.loss
    memory = loss.criteria[0].memory_v1
    before = memory.clone()
    batch = training.batches.at(0)
    training.run_step()
    changed = (memory != before).any(1)
    assert torch.equal(changed.nonzero()[:, 0], loss.row[batch.index].sort().values)
    torch.testing.assert_close(memory[changed].norm(dim=1), torch.ones(len(batch.index)))
    drawn = loss.draw_negatives(batch.index, batch.target)
    assert torch.equal(images.train.index[drawn["pos_idx"]], batch.index)
    assert torch.equal(drawn["contrast_idx"][:, 0], drawn["pos_idx"])
    negatives = drawn["contrast_idx"][:, 1:]
    assert (images.train.labels[negatives] != batch.target.unsqueeze(1)).all()


def test_crd_draws_every_other_image_equally_often() -> None:
    labels = torch.tensor([2, 0, 0, 1, 2, 0, 2])
    loss = TorchdistillLoss("CRDLoss", STAGES, STAGES)
    loss.enroll(torch.arange(7) + 30, labels)
    times = torch.zeros(3, 7)
    for _ in range(1000):
        negatives = loss.draw_negatives(torch.tensor([31, 33, 30]), torch.tensor([0, 1, 2]))["contrast_idx"][:, 1:]
        times.scatter_add_(1, negatives, torch.ones(negatives.shape))
    for label in range(3):
        assert (times[label][labels == label] == 0).all()
        others = times[label][labels != label]
        torch.testing.assert_close(others / others.mean(), torch.ones(len(others)), rtol=0.09, atol=0)


@pytest.mark.parametrize("name", ["torchdistill/SPKDLoss", "torchdistill/ATLoss", "torchdistill/DISTLoss"])
def test_the_adapter_adds_nothing_to_the_loss(name: str) -> None:
    """Against torchdistill's class called by hand."""
    student, teacher = (
        Outputs(torch.randn(6, 5), {stage: torch.randn(6, *shape) for stage, shape in STAGES.items()}) for _ in range(2)
    )
    loss = build_loss({"name": name, "task": 0.0, "distillation": 2.0}, STAGES, STAGES)
    taps = [
        {**{s: {"output": f} for s, f in o.features.items()}, ".": {"output": o.logits}} for o in (student, teacher)
    ]
    where = {side: {"path": "b", "io": "output"} for side in ("student", "teacher")}
    first = {side: {"path": "a", "io": "output"} for side in ("student", "teacher")}
    by_hand = {
        "torchdistill/SPKDLoss": lambda cls: cls("b", "b", "batchmean"),
        "torchdistill/ATLoss": lambda cls: cls({"1": first, "2": where}),
        "torchdistill/DISTLoss": lambda cls: cls(".", "output", ".", "output", beta=2.0, gamma=2.0),
    }[name](loss.criterion_class)
    terms = loss(student, teacher, torch.zeros(6, dtype=torch.int64))
    torch.testing.assert_close(terms, {"distillation": 2 * by_hand(*taps)})


def test_a_table_keeps_the_features_that_the_loss_reads(images, monkeypatch: pytest.MonkeyPatch) -> None:
    training = start(images, "at")
    table = training.teacher
    assert isinstance(table, TabulatedTeacher)
    assert set(table.features) == set(training.loss.teacher_stages) == {"stage1", "stage2", "stage3"}
    live = start(images, "at", augmentation="flip_and_crop").teacher
    assert isinstance(live, Teacher)
    batch = Batches(images.train, 30, seed=1).at(2)
    for stage, feature in table(batch).features.items():
        torch.testing.assert_close(feature, live(batch).features[stage])
    monkeypatch.setattr("lkd.training.answers.TABLE_BYTES", 1000)
    assert isinstance(start(images, "at").teacher, Teacher), "too large a table: the teacher is asked live"
    assert isinstance(start(images, "kd").teacher, TabulatedTeacher)


def test_adapters_are_a_function_of_the_seed(images) -> None:
    first, second, other = (prepare_loss("fitnet", CNN, TeacherRecipe(), images, seed) for seed in (3, 3, 4))
    weights = [loss.regressors[0].weight for loss in (first, second, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_every_loss_of_torchdistill_is_run_or_refused() -> None:
    import torchdistill.losses.mid_level as mid_level

    defined = {name for name, item in vars(mid_level).items() if getattr(item, "__module__", "") == mid_level.__name__}
    assert {name for name in defined if isinstance(getattr(mid_level, name), type)} == set(RECIPES) | set(REFUSED)


@pytest.mark.parametrize(
    ("specification", "message"),
    [
        ({"name": "torchdistill/DISTPlusLoss"}, r"DISTPlusLoss cannot be run here: its channel term .* ATLoss"),
        ({"name": "torchdistill/CRD"}, "unknown name 'torchdistill/CRD'; nearest: torchdistill/CRDLoss"),
        ({"name": "torchdistill/PKTLoss", "temperature": 2}, "option temperature; it takes task, distill.*, stages"),
        ({"name": "torchdistill/PKTLoss", "stages": [["a", "a"], ["b", "b"]]}, "takes one pair .* not 2"),
        ({"name": "torchdistill/ATLoss", "mode": "neither"}, "mode `neither`"),
        ({"name": "torchdistill/RKDLoss", "task": -1}, "task: -1 is negative"),
        ({"name": "torchdistill/KDLoss", "alpha": 0, "beta": 9.0}, "alpha: at 0 torchdistill leaves out beta"),
        ({"name": "torchdistill/LogitStdKDLoss", "alpha": None, "beta": 9.0}, "alpha: at None torchdistill"),
    ],
)
def test_bad_specifications_are_one_clear_line(specification, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        build_loss(specification, STAGES, STAGES)
    assert "\n" not in str(error.value)


def test_who_reads_the_teachers_logits_says_so() -> None:
    loss = TorchdistillLoss("SRDLoss", STAGES, STAGES)
    assert loss.reads_logits
    assert not TorchdistillLoss("PKTLoss", STAGES, STAGES).reads_logits
    features = {stage: torch.randn(4, *shape) for stage, shape in STAGES.items()}
    with pytest.raises(UserError, match=r"the teacher's \[4, 7\]"):
        loss(Outputs(torch.randn(4, 3), features), Outputs(torch.randn(4, 7), features), torch.arange(4) % 3)


def test_without_torchdistill_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lkd.losses.torchdistill", None)
    with pytest.raises(UserError, match="pip install torchdistill"):
        build_loss("torchdistill/PKTLoss", STAGES, STAGES)


def test_crd_must_be_told_the_images() -> None:
    loss = TorchdistillLoss("CRDLoss", STAGES, STAGES)
    outputs = Outputs(torch.randn(4, 3), {stage: torch.randn(4, *shape) for stage, shape in STAGES.items()})
    with pytest.raises(ValueError, match="call enroll"):
        loss(outputs, outputs, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(UserError, match="all training images are of one class"):
        loss.enroll(torch.arange(4), torch.zeros(4, dtype=torch.int64))


TINY = ["--data.train_size", "60", "--data.meta_validation_size", "40", "--train.epochs", "1"]
TINY += ["--train.batch_size", "20"]


def test_a_pool_is_trained_with_a_loss_over_features() -> None:
    assert main(["pool", *TINY, "--pool.loss", "fitnet", "--pool.students", "1", "--run_dir", "pool"]) == 0


@pytest.mark.parametrize("command", ["distill", "compare"])
def test_a_stage_that_is_not_there_stops_a_command_before_any_training(command: str, capsys) -> None:
    wrong = "{name: at, stages: [[stage9, stage3]]}"
    option = ["--loss", wrong] if command == "distill" else ["--methods", f"{{KD: {wrong}}}"]
    assert main([command, *TINY, *option]) == 2
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "the student has no stage 'stage9'; it has stage1 [8, 14, 14], stage2 [16, 7, 7]" in message


def test_a_run_says_which_loss_it_trains_with(tmp_path, capsys) -> None:
    words = ["--data.train_size", "50", "--data.meta_validation_size", "50", "--train.epochs", "1"]
    words += ["--train.batch_size", "25"]

    def distil(name: str, *more: str) -> list[str]:
        assert main(["distill", *words, *more, "--run_dir", str(tmp_path / name)]) == 0
        return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("loss: ", "warning: loss"))]

    assert distil("default") == ["loss: universal, learned"]
    assert distil("kd", "--loss", '{"name": "kd", "weight": 0.5}') == ["loss: kd weight=0.5"]
    weighted = '{"name": "influence_weighted", "loss": {"name": "dkd", "beta": 2.0}}'
    named, warned = distil("weighted", "--loss", weighted)
    assert named == "loss: influence_weighted loss=(dkd beta=2.0)"
    assert "first_epoch: 2 never comes" in warned
    save_loss(tmp_path / "first.lkd.safetensors", build_learned_loss("logits", {}), {"learned": False})
    (said,) = distil("first", "--loss", str(tmp_path / "first.lkd.safetensors"))
    assert said.endswith("first.lkd.safetensors, not learned")
