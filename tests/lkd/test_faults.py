"""What faults do: the fault bench in its short form, and each mend on its own."""

import errno
import json
import math
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from lkd.cli import main
from lkd.config import DataRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.errors import DamagedFileError, UserError, explaining_exhaustion
from lkd.core.tensor_files import drop_damaged, read_result, read_tensors, write_result, write_tensors
from lkd.data import Batches
from lkd.meta_training.outer_loop import OuterLoop
from lkd.models.teacher_cache import KIND, VERSION
from lkd.training.build import prepare_images
from lkd.training.checkpoints import Checkpoints
from lkd.training.training import BrokenInputError, Training
from tests.faults.run import play_faults
from tests.lkd.meta_recipes import SMALL as SMALL_POOL
from tests.lkd.meta_recipes import YOUNG, run_recipe, tiny_recipe
from tests.lkd.parts import prepare_loss, prepare_student, prepare_teacher
from tests.processes import FORK_SERVER

CPU = torch.device("cpu")
SHORT = "^distill (terminate|disk|decoder|read|process)|^cache flipped|^compare worker|^pool truncated"
"""What no other test brings about in a whole run; kills: test_resume.py."""
SMALL = DataRecipe(train_size=100, meta_validation_size=60)


def test_promises_are_kept_under_every_fault() -> None:
    bench = FORK_SERVER.Process(target=play_faults, args=(Path("bench").absolute(), 1, SHORT))
    bench.start()
    bench.join()
    assert bench.exitcode == 0
    rows = [json.loads(line) for line in Path("bench/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 8
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


def test_what_cannot_be_read_now_or_by_this_version_is_no_damage(tmp_path: Path, monkeypatch) -> None:
    checkpoints = Checkpoints(tmp_path / "c", TrainRecipe(), print)
    checkpoints.save(10, {"a": 1})
    assert checkpoints.load() == {"a": 1}
    (tmp_path / "c/.000000010.safetensors.killed").touch()
    checkpoints.save(20, {"a": 2})
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "000000010.safetensors",
        "000000020.safetensors",
    ]
    write_tensors(tmp_path / "c/000000030.safetensors", {}, "checkpoint", 99, {"tree": {"dict": []}})
    with pytest.raises(UserError, match="update lkd"):
        checkpoints.load()
    write_result(tmp_path / "row.json", {"a": 1})
    stale = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr("lkd.core.tensor_files.safe_open", Mock(side_effect=stale))
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=stale))
    with pytest.raises(UserError, match="cannot be read: Stale"):
        checkpoints.load()
    with pytest.raises(UserError, match="cannot be read: Stale"):
        drop_damaged([tmp_path / "row.json"], print)
    assert (tmp_path / "row.json").exists()


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


@pytest.mark.parametrize(("value", "where"), [(math.nan, "images"), (-math.inf, "teacher")])
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


def test_no_memory_left_is_one_line(monkeypatch) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    for error, kind, said in (
        (caught.value, UserError, r"step 3: out of memory; .* anew with less"),
        (RuntimeError("sizes differ"), RuntimeError, "sizes differ"),
    ):
        with pytest.raises(kind, match=said), explaining_exhaustion("step 3", "less"):
            raise error

    def exhaust(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(OuterLoop, "differentiate_pool_student", exhaust)
    with pytest.raises(UserError, match=r"outer step 0: out of memory; .*meta\.rollout_steps"):
        run_recipe(tiny_recipe(pool=YOUNG))
    monkeypatch.setattr(Training, "compute_gradients", exhaust)
    with pytest.raises(UserError, match=r"step 0: out of memory; .*train\.batch_size"):
        run_recipe(tiny_recipe(pool=SMALL_POOL, run_dir="r"))
