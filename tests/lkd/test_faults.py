"""What faults do: the fault bench in its short form, and each mend on its own."""

import json
import math
from pathlib import Path

import pytest
import torch

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import DamagedFileError, UserError, refuse_exhaustion
from lkd.core.interrupt import StopRequest
from lkd.core.tensor_files import drop_damaged, read_result, read_tensors, write_result, write_tensors
from lkd.data import Batches
from lkd.meta_training.guard import OuterGuard
from lkd.meta_training.log import describe_reuse, is_logged, is_pictured, measure_training_seconds
from lkd.meta_training.reuse import Reuse
from lkd.models.teacher_cache import KIND, VERSION
from lkd.pool.pool import build_pool
from lkd.tracking.run import Run, open_run
from lkd.training.build import prepare_images
from lkd.training.training import BrokenInputError, Training
from tests.faults.run import play_faults
from tests.lkd.meta_recipes import build_loss_networks, tiny_recipe
from tests.lkd.parts import list_pool_parts, list_students, prepare_loss, prepare_student, prepare_teacher
from tests.processes import FORK_SERVER

CPU = torch.device("cpu")
SHORT = (
    "^distill (kill|terminate|disk|truncated|decoder|image damaged|read|not finite: batch|memory|W&B|process)"
    "|^meta-train (not finite: hypergradient|memory: rollout)|^cache flipped|^compare worker|^pool truncated"
)
SMALL = DataRecipe(train_size=100, meta_validation_size=60)


def test_promises_are_kept_under_every_fault() -> None:
    bench = FORK_SERVER.Process(target=play_faults, args=(Path("bench").absolute(), 1, SHORT))
    bench.start()
    bench.join()
    assert bench.exitcode == 0
    rows = [json.loads(line) for line in Path("bench/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 16
    assert [row for row in rows if not row["kept"] or row["wrong"] or row["bitwise"] == 0] == []


def flip_bit(path: Path, place: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_file_of_tensors_is_found(tmp_path) -> None:
    path = tmp_path / "student.safetensors"
    write_tensors(path, {"weight": torch.arange(4.0)}, "pool student", 1, {"progress": 0.25})
    whole = path.read_bytes()
    places = [-1, *(whole.index(part) for part in (b"25", b"pool student", b"hash"))]  # of weight, number, kind, hash
    for place in places:
        flip_bit(path, place)
        with pytest.raises(DamagedFileError, match=r"its content is not what was written|it has no hash"):
            read_tensors(path, "pool student", 1)
        path.write_bytes(whole)
    assert read_tensors(path, "pool student", 1)[1]["progress"] == 0.25


def test_a_damaged_result_is_trained_again(tmp_path) -> None:
    path, said = tmp_path / "cell.json", []
    write_result(path, {"top1": 81.25, "figures": [1, math.inf], "student": "small_cnn"})
    drop_damaged([path], said.append)
    assert (read_result(path)["top1"], said) == (81.25, [])
    path.write_text(path.read_text().replace("81.25", "91.25"))
    with pytest.raises(DamagedFileError, match="is damaged"):
        read_result(path)
    drop_damaged([path], said.append)
    assert not path.exists()
    assert "it is done again" in said[0]


def test_damage_in_a_teacher_cache_is_found_and_mended(capsys) -> None:
    words = ["--data.train_size", "60", "--data.meta_validation_size", "60", "--teacher.cache", "cache"]
    words += ["--teacher.path", "random", "--teacher.name", "tiny_cnn", "--train.batch_size", "20"]
    assert main(["cache", *words, "--shard_size", "30"]) == 0
    file = sorted(Path("cache").glob("seed-*"))[1]
    intact = read_tensors(file, KIND, VERSION)[0]["logits"].clone()  # what is read is the file itself, mapped
    flip_bit(file)
    assert main(["distill", *words, "--train.epochs", "1", "--run_dir", "student"]) == 2
    assert f"{file}: is damaged: its content is not what was written: delete it" in capsys.readouterr().err
    flip_bit(Path("cache/index.safetensors"))
    assert main(["cache", *words, "--shard_size", "30"]) == 0
    assert capsys.readouterr().out.count("it is made anew") == 2
    assert torch.equal(read_tensors(file, KIND, VERSION)[0]["logits"], intact)
    assert main(["distill", *words, "--train.epochs", "1", "--run_dir", "student"]) == 0


@pytest.mark.parametrize(
    ("value", "where"), [(math.nan, "images"), (math.inf, "images"), (math.nan, "teacher"), (-math.inf, "teacher")]
)
def test_inputs_that_are_not_finite_stop_a_training_and_are_named(value: float, where: str) -> None:
    images = prepare_images(SMALL)
    taught = prepare_teacher(TeacherRecipe(), SMALL, images, CPU)
    batches, step = Batches(images.train, 10, 0), 2
    broken = batches.at(step).index[3].item()

    def spoil(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        tensor = tensor.clone()
        tensor[index == broken] = value
        return tensor

    def teacher(batch):
        outputs = taught(batch)
        return outputs._replace(logits=spoil(outputs.logits, batch.index)) if where == "teacher" else outputs

    if where == "images":
        at = batches.at
        batches.at = lambda number: at(number)._replace(images=spoil(at(number).images, at(number).index))
    loss = prepare_loss({"name": "logit_mse"}, ModelRecipe(), TeacherRecipe(), images, 0)
    training = Training(prepare_student(ModelRecipe(), images.train, 0, CPU), loss, teacher, batches, TrainRecipe())
    training.run_step()
    training.run_step()
    what = "pixels" if where == "images" else "the teacher's logits"
    with pytest.raises(BrokenInputError, match=rf"step 2: {what} of 1 of 10 images are not finite \(images {broken}\)"):
        training.run_step()


def test_no_memory_left_is_one_line() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    with pytest.raises(UserError, match=r"step 3: out of memory; .* anew with less"):
        refuse_exhaustion(caught.value, "step 3", "less")
    refuse_exhaustion(RuntimeError("sizes differ"), "step 3", "less")


def test_the_guard_leaves_out_what_is_far_above_the_median_and_shortens_rollouts() -> None:
    guard = OuterGuard(100.0)
    for step in range(1, 10):
        guard.record(step, [1.0], [], 100)
    assert guard.bound == math.inf, "nine norms are too few"
    guard.record(10, [2.0], [], 100)
    assert guard.bound == 100.0
    assert guard.shorten(100) == 100
    for step in (11, 12):
        assert guard.record(step, [], ["0: norm 1e+03 > 100"], 100) == [
            f"outer step {step}: hypergradient left out: student 0: norm 1e+03 > 100"
        ]
    assert guard.record(13, [], ["0: weight"], 100)[-1].endswith("rollouts are halved to 50 steps")
    assert (guard.shorten(100), guard.shorten(1), guard.bound) == (50, 1, math.inf)
    saved = OuterGuard(100.0)
    saved.load_state_dict(guard.state_dict())
    for step in (14, 15):
        saved.record(step, [], ["0: weight"], 1)
    assert "outer learning rate is halved to 0.5" in saved.record(16, [], ["0: weight"], 1)[-1]
    assert saved.rate == 0.5
    assert saved.report() == [
        "6 of 16 hypergradients were left out; rollouts were halved 1 times; the outer learning rate ended at 0.5 of "
        "what was asked for"
    ]
    saved.record(17, [1.0], [], 1)
    assert saved.record(18, [], ["0: weight"], 1)[-1].startswith("outer step 18"), "the count starts anew"


@pytest.fixture
def small_pool_problem():
    recipe = tiny_recipe({"students": 1})
    images = prepare_images(recipe.data)
    return recipe, images, prepare_teacher(recipe.teacher, recipe.data, images, CPU)


def test_a_diverging_student_of_the_pool_is_kept_up_to_its_divergence(small_pool_problem) -> None:
    recipe, images, teacher = small_pool_problem
    recipe.train.learning_rate = 1e20
    with open_run(recipe, "pool", quiet=True) as run:
        pool = build_pool(recipe, run.path / "pool", *list_pool_parts(recipe, images, teacher), run)
    assert pool.ages.tolist() == [0.0]
    assert all(torch.isfinite(tensor).all() for tensor in pool.read(0, CPU).state.parameters.values())
    assert "student 0 of the pool has no ages after this: step" in Path("run/output.txt").read_text()


def test_the_cost_of_a_training_that_diverges_is_measured(small_pool_problem) -> None:
    recipe, images, teacher = small_pool_problem
    recipe.train.learning_rate = 1e20
    assert (
        measure_training_seconds(
            recipe, images, list_students(recipe, images), teacher, build_loss_networks(recipe), CPU
        )
        > 0
    )


def test_a_look_whose_students_are_not_finite_is_the_worst(small_pool_problem, monkeypatch) -> None:
    """NaN is neither more nor less than anything: as the first score it would have stayed the best."""
    recipe, images, teacher = small_pool_problem
    scores = iter([float("nan"), 2.0])
    figures = {"top1": 10.0}
    monkeypatch.setattr(Reuse, "train_student", lambda *_: figures | {"calibrated_cross_entropy": next(scores)})
    run = Run(Path("run"), CPU, None, "meta-train", quiet=True)
    reuse, loss = Reuse(recipe, list_students(recipe, images), images, teacher, run), build_loss_networks(recipe)
    for step in (0, 1):
        reuse.look(step, loss, [(0.0, loss.state_dict())], StopRequest())
    assert reuse.best_row["step"] == 1


@pytest.mark.parametrize("steps", [1, 30, 1000, 1001, 10_000, 123_456])
def test_the_log_of_outer_steps_is_bounded(steps: int) -> None:
    logged = [step for step in range(1, steps + 1) if is_logged(step, steps)]
    assert logged[0] == 1
    assert logged[-1] == steps
    assert len(logged) == steps if steps <= 1000 else len(logged) <= 1001


@pytest.mark.parametrize(
    ("steps", "every", "drawn"), [(30, 10, 3), (1000, 10, 100), (1001, 10, 50), (10_000, 10, 100), (10_000, 3000, 3)]
)
def test_the_pictures_of_a_run_are_bounded(steps: int, every: int, drawn: int) -> None:
    assert sum(is_pictured(step, steps, every) for step in range(1, steps + 1)) == drawn
    assert not is_pictured(every, steps, 0)


@pytest.mark.parametrize(
    ("step", "score", "said"),
    [(20, 0.5, ["step 20 of 30"]), (0, 0.5, ["the initial one"]), (0, 2.302, ["the initial one", "more than a guess"])],
)
def test_a_saved_loss_that_is_worth_nothing_is_said_to_be(step: int, score: float, said: list[str]) -> None:
    lines = describe_reuse({"step": step, "calibrated_cross_entropy": score}, 30, 10)
    assert len(lines) == len(said)
    assert all(part in line for part, line in zip(said, lines, strict=True))
    assert "more than a guess" in describe_reuse({"step": 0, "calibrated_cross_entropy": math.inf}, 30, 10)[1]
