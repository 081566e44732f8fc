"""The examples of reuse, in short: each trains a student, and tells the loss how far it is."""

import ast
import re
import sys
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import timm
import torch
import yaml
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

import lkd
from lkd.losses.learned.file import load_loss, save_loss
from lkd.losses.learned.loss import build_learned_loss
from lkd.losses.learned.networks import KNOWN_CONDITIONING
from lkd.losses.learned.trust import OWN_ACCURACY, Trust, TrustFigures

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "examples"))

IMAGES, EPOCHS, BATCH = 640, 2, 64
STEPS = EPOCHS * -(-IMAGES // BATCH)
NAMES = ("student", "teacher", "target", "progress")  # what a loss is called with
NEEDS = {"lightning_module": "lightning", "huggingface_trainer": "transformers"}


@pytest.fixture(scope="module")
def loss_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("loss") / "small.lkd.safetensors"
    torch.manual_seed(0)
    save_loss(path, build_learned_loss("logits", {"conditioning": list(KNOWN_CONDITIONING)}), {})
    return str(path)


@pytest.fixture
def told(monkeypatch) -> list[tuple[float, Tensor]]:
    """What the examples' losses are told of progress and trust, while the teacher must be in eval mode."""
    import fashion

    seen: list[tuple[float, Tensor]] = []

    def load_watched(path, trust=None):
        loss = load_loss(path, trust)
        loss.register_forward_pre_hook(watch, with_kwargs=True)
        return loss

    def watch(loss, arguments, named) -> None:
        progress = {**named, **dict(zip(NAMES, arguments, strict=False))}["progress"]
        seen.append((progress, loss.parts["logits"].trust.clone()))

    answer = fashion.Teacher.forward

    def answer_in_eval_mode(teacher, images):
        assert not any(module.training for module in teacher.modules())
        assert not torch.is_grad_enabled() or not any(p.requires_grad for p in teacher.parameters())
        return answer(teacher, images)

    monkeypatch.setattr(lkd, "load_loss", load_watched, raising=False)
    monkeypatch.setattr(fashion.Teacher, "forward", answer_in_eval_mode)
    return seen


@pytest.mark.parametrize("name", ["plain_pytorch", "timm_task", "torchdistill_loss", *NEEDS])
def test_an_example_trains_a_student_with_the_loss(
    name: str, loss_file: str, told: list[tuple[float, Tensor]], monkeypatch
) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    from fashion import measure_accuracy

    torch.manual_seed(0)
    smaller = {}
    if name == "timm_task":  # its own student would take twenty seconds; normalised as that one
        normalized = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, pretrained_cfg_overlay=normalized))
        smaller = {"student": "test_resnet"}
    result = import_module(name).run(loss_file, images=IMAGES, epochs=EPOCHS, **smaller)
    expected = [step / STEPS for step in range(STEPS)]
    progress, trust = zip(*told, strict=True)
    assert progress == pytest.approx(expected)
    assert torch.stack(trust).isfinite().all()
    assert trust[0][0] > 0.85, "the teacher's agreement with meta-validation labels"
    renewed = sum(not torch.equal(before, now) for before, now in pairwise(trust))
    assert 10 <= renewed <= 20, "the student's own accuracy"
    accuracy = result.evaluate()["eval_accuracy"] if name == "huggingface_trainer" else measure_accuracy(result)
    assert accuracy > 25, "guessing has 10"


def test_trainer_averages_accumulated_losses_of_a_file_that_reads_no_trust() -> None:
    pytest.importorskip("transformers")
    from huggingface_trainer import run

    loss_file = "plain.lkd.safetensors"
    save_loss(loss_file, build_learned_loss("logits", {}), {})
    logged = []
    for accumulation in (1, 4):
        torch.manual_seed(0)
        trainer = run(loss_file, images=256, epochs=1, accumulation=accumulation)
        logged.append(trainer.state.log_history[-1]["train_loss"])
    assert logged[1] == pytest.approx(logged[0], rel=0.3), "four times it if the parts were added up"


def test_timms_task_gives_the_sum_of_the_terms(loss_file: str) -> None:
    from fashion import Teacher, load_images
    from timm_task import LearnedLossTask

    images, target = load_images("train", 16).tensors
    student = timm.create_model("test_resnet", num_classes=10, in_chans=1).eval()
    task = LearnedLossTask(student, Teacher(), loss_file, device=torch.device("cpu"), verbose=False).eval()
    task.progress = 0.7
    task.student_mean, task.student_std = task.teacher.mean_kd, task.teacher.std_kd
    found = task(images, target)
    loss, outputs = load_loss(loss_file), [lkd.Outputs(network(images), {}) for network in (student, Teacher())]
    torch.testing.assert_close(found["loss"], sum(loss(*outputs, target, 0.7).values()))
    assert not any(name.startswith("learned") for name in task.get_trainable_module().state_dict())


def test_a_loss_compiled_and_exported_is_the_same_loss(tmp_path) -> None:
    from compile_and_export import run

    torch.manual_seed(0)
    save_loss(tmp_path / "l.lkd.safetensors", build_learned_loss("logits", {"form": "generic"}), {})
    differences = run(str(tmp_path / "l.lkd.safetensors"), tmp_path / "l.pt2", classes=20, backend="aot_eager")
    assert differences.keys() == {"compiled", "exported"}
    assert max(differences.values()) < 1e-5
    assert (tmp_path / "l.pt2").stat().st_size > 1000


def test_trust_is_a_buffer_of_a_loss_compiled_or_exported_which_then_needs_no_lkd(
    universal: Path, tmp_path, monkeypatch
) -> None:
    from compile_and_export import LogitLoss, draw_inputs, export

    loss, graphs = LogitLoss(lkd.load_loss("universal", Trust(TrustFigures(0.7, 0.5, 3.0, 40.0, 0.2)))), []
    compiled = torch.compile(loss, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    export(loss, tmp_path / "l.pt2", classes=10)
    exported = torch.export.load(tmp_path / "l.pt2").module()
    buffers = [module.get_buffer("loss.parts.logits.trust") for module in (loss, exported)]
    inputs, seen = draw_inputs(5, 10), set()
    for own_accuracy in (0.2, 0.5, 0.9):
        for buffer in buffers:
            buffer[OWN_ACCURACY] = own_accuracy  # as `update_trust` does
        expected = loss(*inputs).detach()
        torch.testing.assert_close(torch.stack([compiled(*inputs), exported(*inputs)]), expected.expand(2))
        seen.add(float(expected))
    loss.loss.set_trust(Trust())
    torch.testing.assert_close(compiled(*inputs), loss(*inputs))
    assert (len(seen), len(graphs)) == (3, 1), "it sees the accuracy, and is compiled once"
    for name in [name for name in sys.modules if name.partition(".")[0] == "lkd"]:
        monkeypatch.setitem(sys.modules, name, None)
    alone = torch.export.load(tmp_path / "l.pt2").module()
    assert torch.autograd.grad(alone(*inputs), inputs[0])[0].abs().sum() > 0


def sections() -> list[tuple[str, str]]:
    """Each code block of docs/reuse.md that shows an example, with the file that its section links to last."""
    found = []
    for section in (ROOT / "docs" / "reuse.md").read_text().split("\n## ")[1:]:
        file = ""
        for link, code in re.findall(r"\]\(\.\./examples/([\w.]+)\)|```\w+\n(.*?)```", section, re.DOTALL):
            file = link or file
            found += [(file, code)] if code else []
    return found


def test_the_code_in_docs_reuse_is_the_examples() -> None:
    assert {file for file, _ in sections()} == {
        *("plain_pytorch.py", "timm_task.py", "lightning_module.py", "huggingface_trainer.py", "torchdistill_loss.py"),
        *("torchdistill_loss.yaml", "compile_and_export.py"),
    }
    for file, code in sections():
        assert code.strip("\n") in (ROOT / "examples" / file).read_text(), file
        if file.endswith(".py"):
            ast.parse("class _:\n" + code if code.startswith(" ") else code)
        else:
            yaml.safe_load(code)


@pytest.mark.parametrize("page", ["docs/reuse.md", "docs/python.md"])
def test_the_pages_own_code_runs(page: str) -> None:
    text = (ROOT / page).read_text().split("\n## Plain PyTorch")[0]
    names: dict = {}
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "docs/python.md":
        assert Path("runs/reused/student.safetensors").is_file()
