"""Learned-loss files, network files and checkpoints: round trips, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import lkd
from lkd.config import TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import replaced_atomically
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import load_checkpoint, save_checkpoint, write_tensors
from lkd.losses import DecoupledLoss, LearnedLoss
from lkd.losses.learned.file import VERSION, read_provenance, save_loss
from lkd.models import build
from lkd.models.files import save_network
from lkd.training.checkpoints import Checkpoints


def make_loss() -> LearnedLoss:
    loss = LearnedLoss({"logits": DecoupledLoss(hidden=8, initial_weight=0.3)})
    for parameter in loss.parameters():
        torch.nn.init.normal_(parameter)
    return loss


def test_a_learned_loss_survives_its_file(tmp_path) -> None:
    loss, path = make_loss(), tmp_path / "a.lkd.safetensors"
    save_loss(path, loss, {"seed": 3})
    loaded = lkd.load_loss(path)
    outputs = Outputs(torch.randn(5, 7), {}), Outputs(torch.randn(5, 7), {})
    target = torch.randint(7, (5,))
    for name, value in loss(*outputs, target, 0.3).items():
        torch.testing.assert_close(loaded(*outputs, target, 0.3)[name], value, rtol=0, atol=0)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert read_provenance(path) == {"seed": 3}


def test_a_file_that_is_written_again_by_another_version_stays_as_it_is(tmp_path: Path) -> None:
    """What used it knows it by its hash, and the other version did none of its steps."""
    path, loss = tmp_path / "loss.safetensors", make_loss()

    def write(**provenance: object) -> bytes:
        save_loss(path, loss, provenance)
        return path.read_bytes()

    first = write(seed=3, test=90.0, environment={"commit": "a"}, recipe={"resume": "never"})
    assert write(seed=3, test=90.0, environment={"commit": "b"}, recipe={"resume": "auto"}) == first
    assert write(seed=3, environment={"commit": "b"}, recipe={"resume": "auto"}) == first, "what was read once is kept"
    assert write(environment={"commit": "b"}, recipe={"resume": "auto"}) != first
    assert write(seed=4, environment={"commit": "b"}) != first
    torch.nn.init.zeros_(next(loss.parameters()))
    assert write(seed=3, environment={"commit": "b"}) != first
    assert read_provenance(path)["environment"] == {"commit": "b"}


def write_header(path: Path, version: int = VERSION, network: str = "DecoupledLoss", hidden: int = 8) -> None:
    parts = {"logits": {"class": network, "arguments": {"hidden": hidden}}}
    header = {"architecture": {"parts": parts}, "provenance": {}}
    write_tensors(path, make_loss().state_dict(), "learned loss", version, header)


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_text("hello"), "not a safetensors file"),
        (lambda path: path.write_bytes(path.with_name("good").read_bytes()[:-1]), "damaged or not a safetensors file"),
        (lambda path: save_network(path, build("tiny_cnn", 10, 1), {}, {}), "holds a network; a learned loss"),
        (lambda path: save_file({"x": torch.zeros(1)}, path), "another program"),
        (lambda path: write_header(path, VERSION + 1), "is newer than"),
        (lambda path: write_header(path, hidden=4), "do not fit"),
        (lambda path: write_header(path, network="os.system"), "os.system"),
    ],
)
def test_other_files_than_learned_losses_are_refused_in_one_line(tmp_path, write, message: str) -> None:
    path = tmp_path / "a.lkd.safetensors"
    save_loss(tmp_path / "good", make_loss(), {})
    write(path)
    with pytest.raises(UserError, match=message) as caught:
        lkd.load_loss(path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_keeps_every_bit_and_type(tmp_path) -> None:
    parameter = torch.nn.Parameter(torch.randn(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()
    optimizer.step()
    tree = {
        "optimizer": optimizer.state_dict(),
        "random": torch.get_rng_state(),
        "history": [{"a": 0.1, "b": None, "c": "x", "d": True, "e": float("nan")}],
        3: (1, 2.5),
    }
    save_checkpoint(tmp_path / "c", tree)
    loaded = load_checkpoint(tmp_path / "c")
    assert loaded["optimizer"]["param_groups"] == tree["optimizer"]["param_groups"]
    assert torch.equal(loaded["optimizer"]["state"][0]["exp_avg"], tree["optimizer"]["state"][0]["exp_avg"])
    assert torch.equal(loaded["random"], tree["random"])
    assert loaded[3] == (1, 2.5)
    assert json.dumps(loaded["history"]) == json.dumps(tree["history"])
    with pytest.raises(TypeError, match="object"):
        save_checkpoint(tmp_path / "c", object())


def test_a_failed_write_leaves_the_old_file(tmp_path) -> None:
    path = tmp_path / "f"
    path.write_text("old")

    def write_half() -> None:
        with replaced_atomically(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="fire"):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_training_whose_first_checkpoint_is_damaged_begins_anew(tmp_path) -> None:
    """That costs no more than the steps up to it; from the second on there is a good one before."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", TrainRecipe(checkpoints_kept=2), said.append)
    checkpoints.save(3, {"weight": torch.zeros(1)})
    checkpoints.list()[3].write_bytes(b"")
    assert checkpoints.load() is None
    assert "it was the first: begun anew" in said[-1]
    kept_alone = Checkpoints(tmp_path / "checkpoints", TrainRecipe(checkpoints_kept=1), said.append)
    with pytest.raises(UserError, match="all 1 checkpoints are damaged"):  # it may be of any step
        kept_alone.load()


def test_the_newest_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path) -> None:
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", TrainRecipe(checkpoints_kept=2), said.append)
    assert checkpoints.load() is None
    for step in (8, 9, 10):
        checkpoints.save(step, {"weight": torch.full((1000,), float(step))})
    assert list(checkpoints.list()) == [9, 10]
    newest = checkpoints.list()[10]
    whole = newest.read_bytes()
    flipped = bytearray(whole)
    flipped[-100] ^= 1
    for damaged in (whole[: len(whole) // 2], bytes(flipped), b""):
        newest.write_bytes(damaged)
        assert checkpoints.load()["weight"][0] == 9
        assert "is damaged" in said[-1]
        assert "the checkpoint before step 10 takes its place" in said[-1]
    checkpoints.save(9, {"weight": torch.zeros(1)})
    assert list(checkpoints.list()) == [9], "the damaged one is of a future that is no more"
    checkpoints.save(10, {"weight": torch.zeros(1)})
    for path in checkpoints.list().values():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="all 2 checkpoints are damaged; delete the folder to start anew"):
        checkpoints.load()
