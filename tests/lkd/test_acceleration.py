"""Compiled networks and the channels-last layout: the same training, the same files."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.tensor_files import load_checkpoint, save_checkpoint
from lkd.losses import KDLoss
from lkd.losses.learned.trust import measure_own_accuracy
from lkd.models.build import build_forward
from lkd.models.files import load_network, save_network
from lkd.training.build import prepare_images
from lkd.training.throughput import PARTS
from lkd.training.training import Training
from tests.lkd.parts import prepare_teacher, start_training

CPU = torch.device("cpu")
ARCHITECTURE = {"name": "tiny_cnn", "num_classes": 10, "in_chans": 1}


@pytest.fixture(scope="module")
def images():
    return prepare_images(DataRecipe(train_size=200, meta_validation_size=100))


def start(images, **changes) -> Training:
    """A training with momentum and a moving average, whose teacher is asked for every batch."""
    train = TrainRecipe(**{"epochs": 2, "batch_size": 50, "ema_decay": 0.5, "learning_rate": 0.02} | changes)
    data = DataRecipe(augmentation="flip_and_crop")
    teacher = prepare_teacher(TeacherRecipe("random", "tiny_cnn"), data, images, CPU, train=train)
    student = ModelRecipe("tiny_cnn")
    return start_training(student, images.train, KDLoss(), teacher, train, data, 0, CPU)


def run(training: Training, steps: int) -> list[float]:
    return [float(sum(training.run_step().values())) for _ in range(steps)]


@pytest.mark.parametrize("changes", [{"compile": True}, {"channels_last": True}], ids=str)
def test_it_is_the_same_training_resumed_to_the_bit_and_saved_alike(
    images, changes: dict, tmp_path: Path, monkeypatch
) -> None:
    # All of torch.compile but the compiler, which takes a minute.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, fast = start(images), start(images, **changes)
    expected = run(plain, 8)
    found = run(fast, 4)
    save_checkpoint(tmp_path / "c", fast.state_dict())
    found += run(fast, 4)
    assert found == pytest.approx(expected, rel=1e-3)
    resumed = start(images, **changes)
    resumed.load_state_dict(load_checkpoint(tmp_path / "c"))
    run(resumed, 4)
    for mine, theirs in ((fast.student, resumed.student), (fast.result, resumed.result)):
        for name, tensor in mine.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name
    assert fast.state_dict()["student"].keys() == plain.state_dict()["student"].keys()
    save_network(tmp_path / "s.safetensors", fast.result, ARCHITECTURE, {})
    loaded, _ = load_network(tmp_path / "s.safetensors")
    batch = fast.batches.at(0).images
    torch.testing.assert_close(loaded(batch).logits, fast.result.eval()(batch).logits)


def test_channels_last_reaches_student_teacher_images_and_optimizer(images) -> None:
    training = start(images, channels_last=True)
    seen = []
    training.student.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    run(training, 1)
    weights = [p for network in (training.student, training.teacher.network) for p in network.parameters()]
    weights += [slots["momentum_buffer"] for slots in training.optimizer.state.values()]
    for tensor in [*seen, *(weight for weight in weights if weight.dim() == 4)]:
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_a_missing_compiler_is_one_line(monkeypatch) -> None:
    from torch._inductor import config

    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    torch._dynamo.reset()
    forward = build_forward(torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Tanh()), compiled=True)
    with pytest.raises(UserError, match=r"train\.compile: torch\.compile does not work here .*leave it out"):
        forward(torch.zeros(2, 3))


def test_the_checks_of_a_gpu_run_in_short_on_a_cpu(tmp_path: Path) -> None:
    assert gpu.main([str(tmp_path), "--short", "--device", "cpu"]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["wrong"] == {}
    assert result["figures"]["resumed_to_the_bit"] == 1
    assert result["figures"]["cosine_first_order"] > 0.98
    assert sum(result["figures"][f"share_{part}_decoded"] for part in PARTS) == pytest.approx(1, abs=1e-3)


def test_what_does_not_hold_on_a_gpu_is_written_and_the_other_checks_run(tmp_path: Path) -> None:
    def fail(bench: gpu.Bench) -> gpu.Figures:
        gpu.require(False, "a kernel is wrong")
        return {}

    checks: list[Callable[[gpu.Bench], gpu.Figures]] = [fail, lambda bench: {"x": 1.0}]
    wrong = gpu.run_checks(gpu.Bench(CPU, True), tmp_path, checks)
    assert wrong == {"fail": "AssertionError: a kernel is wrong"}
    assert json.loads((tmp_path / "result.json").read_text())["figures"] == {"x": 1.0}


def test_looks_at_a_compiled_student_leave_its_graph_as_it_is() -> None:
    """They have batches of other sizes, at which torch.compile would make the training's graph a dynamic one."""
    shapes = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        shapes.append([tuple(each.shape) for each in inputs if isinstance(each, torch.Tensor)])
        return graph

    student = torch.compile(torch.nn.Linear(4, 3), backend=count)
    for size in (7, 5, 9):
        looks = [(torch.randn(size, 4), torch.zeros(size, dtype=torch.int64))]
        assert 0 <= measure_own_accuracy(student, looks) <= 1
        student(torch.randn(6, 4)).sum().backward()
    assert len(shapes) == 1
    assert (6, 4) in shapes[0]
