"""Learned losses that lie elsewhere: a stand-in of the Hub's API on this host, wandb's module with no network."""

import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants

import lkd
from lkd.cli import main
from lkd.core.errors import UserError
from lkd.core.files import PACKAGE, hash_file
from lkd.evaluation.comparison.trials import was_method_learned
from lkd.evaluation.plan import is_missing
from lkd.export.share import describe_training, write_card
from lkd.losses.learned.file import read_provenance, save_loss
from lkd.tracking.remote import HubReference, WandbReference, parse_reference
from tests.lkd.hub_server import StandIn
from tests.lkd.meta_recipes import build_loss_networks, tiny_recipe
from tests.lkd.test_cli import TINY

LOSS = Path("loss.lkd.safetensors")


@pytest.fixture
def loss(tmp_path) -> Path:
    save_loss(LOSS, build_loss_networks(tiny_recipe()), {"recipe": {"data": {"name": "a`|\n# b"}}, "seed": 0})
    return LOSS


@pytest.fixture
def hub(monkeypatch, tmp_path) -> StandIn:
    server = StandIn()
    monkeypatch.setenv("HF_ENDPOINT", server.address)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return server


def is_private(asked: dict[str, Any]) -> bool:
    """What the Hub was asked to make of a new repository."""
    return asked.get("private") is True or asked.get("visibility") == "private"


def test_names_are_taken_apart() -> None:
    assert parse_reference("hf://me/losses") == HubReference("me/losses", None, "loss.lkd.safetensors")
    assert parse_reference("hf://me/losses@v1/sub/a.lkd.safetensors") == HubReference(
        "me/losses", "v1", "sub/a.lkd.safetensors"
    )
    assert parse_reference("wandb://me/lkd/loss-a:v3") == WandbReference("me/lkd", "loss-a", "v3")
    assert parse_reference("wandb://me/lkd/loss-a").version == "latest"
    for bad in ("hf://me", "wandb://me/lkd", "s3://me/lkd/a", "hf://me/a b", "hf:///etc/passwd"):
        with pytest.raises(UserError, match="is not hf://OWNER"):
            parse_reference(bad)


def test_a_loss_goes_to_the_hub_and_comes_back_the_same(loss: Path, hub: StandIn, capsys) -> None:
    assert main(["push", str(loss), "--to", "hf://me/losses/noisy.lkd.safetensors"]) == 0
    assert capsys.readouterr().out.startswith(f"{hub.address}/me/losses/commit/")
    assert hub.files["me/losses"]["noisy.lkd.safetensors"] == loss.read_bytes()
    assert hub.tokens == {"Bearer hf_secret"}
    card = ModelCard(hub.files["me/losses"]["README.md"].decode())
    assert card.data.library_name == "lkd"
    assert hash_file(loss) in card.text
    assert main(["push", str(loss), "--to", "hf://me/losses"]) == 0
    assert not is_private(hub.created["losses"])
    assert main(["push", str(loss), "--to", "hf://me/hidden", "--private"]) == 0
    assert is_private(hub.created["hidden"])
    assert not is_missing("hf://me/losses/noisy.lkd.safetensors"), "a plan is of the loss that lies there"
    assert was_method_learned("hf://me/losses"), "it is no hand-made loss"
    assert main(["pull", "hf://me/losses/noisy.lkd.safetensors", "--out", "back.lkd.safetensors"]) == 0
    assert Path("back.lkd.safetensors").read_bytes() == loss.read_bytes()
    words = ["--run_dir", "r", *TINY, "--train.epochs", "1", "--loss", "hf://me/losses/noisy.lkd.safetensors"]
    assert main(["distill", *words]) == 0
    lineage = Path("r/lineage.json").read_text()
    assert hash_file(loss) in lineage
    assert "hf://me/losses" in lineage


def test_a_loss_that_was_learned_in_worlds_names_none_as_its_data() -> None:
    facts = describe_training(read_provenance(PACKAGE / "losses/pretrained/universal.lkd.safetensors"))
    assert facts["worlds"] == "35 listed, 8 drawn"
    assert not facts.keys() & {"data", "teacher", "students", "split", "imbalance"}
    assert not describe_training({})
    card = write_card(PACKAGE / "losses/pretrained/universal.lkd.safetensors", "hf://me/losses")
    assert 'load_loss("hf://me/losses", trust=lkd.measure_trust(' in card


def test_what_cannot_be_had_or_sent_is_one_line(loss: Path, hub: StandIn, monkeypatch, capsys) -> None:
    Path("notes.txt").write_text("no loss")
    assert main(["push", "notes.txt", "--to", "hf://me/losses"]) == 2
    assert not hub.files
    assert "notes.txt: " in capsys.readouterr().err
    main(["push", str(loss), "--to", "hf://me/losses"])
    for name, message in (
        ("hf://me/losses/other.lkd.safetensors", "has no file 'other.lkd.safetensors'"),
        ("hf://me/nothing", "no such repository"),
        ("hf://me/losses/README.md", "not a safetensors file"),
    ):
        capsys.readouterr()
        assert main(["pull", name]) == 2
        assert message in (error := capsys.readouterr().err.strip())
        assert "\n" not in error
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert main(["pull", "hf://me/losses/another.lkd.safetensors"]) == 2
    assert "cannot be reached" in capsys.readouterr().err


def test_a_card_is_written_without_sending(loss: Path) -> None:
    assert main(["push", str(loss), "--to", "hf://me/losses", "--card", "card.md"]) == 0
    card = Path("card.md").read_text()
    assert card == write_card(loss, "hf://me/losses")
    assert re.search(r"\| data +\| `a/ # b` +\|", card)  # what the header holds stays in its cell


def test_an_artifact_of_wandb_is_fetched_by_version(loss: Path, monkeypatch, tmp_path) -> None:
    import wandb

    asked: list[str] = []

    class Api:
        def artifact(self, name: str) -> Any:
            asked.append(name)
            if "missing" in name:
                raise wandb.errors.CommError("artifact not found")

            def download(root: str) -> None:
                Path(root).mkdir(parents=True)
                shutil.copy(loss, root)

            return types.SimpleNamespace(name="loss-a:v3", download=download)

    monkeypatch.setattr(wandb, "Api", Api)
    assert isinstance(lkd.load_loss("wandb://me/lkd/loss-a:latest"), torch.nn.Module)
    assert set(asked) == {"me/lkd/loss-a:latest"}
    assert (tmp_path / "cache/lkd/wandb/me/lkd/loss-a-v3/loss.lkd.safetensors").is_file()
    with pytest.raises(UserError, match="wandb://me/lkd/missing:latest: cannot be had: artifact not found"):
        lkd.load_loss("wandb://me/lkd/missing")
