"""What is recorded of a run: on disk whatever happens to the services, readable by their own readers; sweeps."""

import dataclasses
import importlib
import json
import logging
import math
import os
import random
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from safetensors.torch import load_file
from wandb.util import get_core_path
from wandb.wandb_agent import Agent

from lkd.cli import main
from lkd.config import DataRecipe, DistillRecipe, WandbRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.core.files import flatten, hash_file, read_json
from lkd.core.tensor_files import digest
from lkd.tracking import tracker as service
from lkd.tracking.lineage import (
    Entry,
    find_replaced,
    find_used,
    hash_folder,
    identify,
    list_sources,
    read_lineage,
    record,
)
from lkd.tracking.run import open_run
from lkd.tracking.tracker import Tracker, read_log
from lkd.training.training import Training
from tests.faults.wandb_server import StandIn
from tests.lkd.meta_recipes import run_recipe, tiny_recipe
from tests.lkd.test_cli import TINY
from tests.processes import Command

KEY = "a" * 40


def read_wandb(folder: Path) -> list[dict[str, Any]]:
    """The records of an offline run, by wandb's own reader."""
    (file,) = folder.glob("wandb/*run-*/*.wandb")
    command = [get_core_path(), "leet", "inspect", "--no-observability", "--json", "--run-file", file]  # `wandb leet`
    printed = subprocess.run([*command, folder / "wandb"], capture_output=True, text=True, check=True).stdout
    return [json.loads(line) for line in printed.splitlines()]


def read_history(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = [record["history"] for record in records if record["type"] == "history"]
    return [row.get("item", row) for row in rows]


def test_a_wandb_run_is_read_back_by_wandb(monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = tiny_recipe(run_dir="m", picture_every=2)
    recipe.wandb = WandbRecipe("offline", entity="us", group="trials", tags=["a", "b"])
    run_recipe(recipe)
    records = read_wandb(Path("m"))
    logged = {key for row in read_history(records) for key in row}
    written = {key for row in read_log(Path("m/log.jsonl")) for key in row} - {"time"}
    assert written <= logged
    assert "learned_loss._type" in logged
    assert list(Path("m/wandb").rglob("media/images/learned_loss*.png"))
    run = next(record["run"] for record in records if record["type"] == "run")
    assert (run["run_group"], run["tags"], run["entity"]) == ("trials", ["a", "b"], "us")
    artifacts = [record["artifact"] for record in records if record["type"] == "artifact"]
    assert {artifact["type"] for artifact in artifacts} == {"pool", "loss"}


def test_a_resumed_run_keeps_its_id_and_wandb_its_folder_wherever_a_run_was_started(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    words = ["distill", "--run_dir", "r", *TINY, "--wandb.mode", "offline"]
    run_step = Training.run_step

    def stop_after_step(training: Training, *watch):
        signal.raise_signal(signal.SIGTERM)
        return run_step(training, *watch)

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        with monkeypatch.context() as patch:
            patch.setattr(Training, "run_step", stop_after_step)
            assert main(words) == 143
        assert list(Path("r").glob("wandb/offline-run-*/*.wandb"))
    assert main([*words, "--resume", "auto"]) == 0
    runs = list(Path("r").glob("wandb/offline-run-*"))
    assert len(runs) == 2
    # wandb adds "-1" to the name of a second folder of the same second.
    assert {run.name.split("-")[3] for run in runs} == {Path("r/wandb_run_id").read_text()}


def test_a_run_directory_serves_one_process_and_its_provenance_tells_no_folders(tmp_path) -> None:
    recipe = DistillRecipe(run_dir=str(tmp_path / "r"), data=DataRecipe(root=str(tmp_path)))
    with open_run(recipe, "distill", quiet=True) as run:
        assert str(tmp_path.parent) not in json.dumps(run.provenance())
        assert run.provenance()["recipe"]["run_dir"] == "r"
        recipe.resume = "auto"
        with pytest.raises(UserError, match="is in use by another process"), open_run(recipe, "distill", quiet=True):
            pass
    with open_run(recipe, "distill", quiet=True):
        pass


def test_a_log_that_a_crash_cut_off_is_still_read(tmp_path) -> None:
    rows = '{"step": 1, "a": 1}\n{"step": 2, "a": 2}\n{"step": 2, "a": 3}\n{"step": 3, "a"'
    (tmp_path / "log.jsonl").write_text(rows)
    assert [row["a"] for row in read_log(tmp_path / "log.jsonl")] == [1, 3]
    tracker = Tracker(tmp_path, None, {})
    tracker.log(3, a=4.0)
    tracker.finish()
    assert [row["a"] for row in read_log(tmp_path / "log.jsonl")] == [1, 3, 4], "the first row of a run that goes on"


def shorten_waits() -> None:
    for name in ("WANDB_API_KEY", "NETRC", "WANDB_SERVICE"):  # the last: of another test, whose service has ended
        os.environ.pop(name, None)
    os.environ |= {"HOME": os.getcwd(), "WANDB_SILENT": "true", **json.loads(os.environ.pop("ONLINE", "{}"))}
    service.START_TIMEOUT, service.FINISH_TIMEOUT = 30, 1


def test_a_network_that_dies_costs_no_more_than_a_warning() -> None:
    server, log = StandIn(), Path("online/log.jsonl")
    words = [*TINY, "--train.epochs", "4"]
    online = {"ONLINE": json.dumps({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": server.address})}
    command = Command(
        ["distill", "--run_dir", "online", *words, "--wandb.mode", "online"], environment=online, prepare=shorten_waits
    )
    command.wait_for(lambda: log.exists() and log.stat().st_size)
    server.die()
    assert command.wait(120) == 0, command.text
    assert any(content.get("operationName") == "UpsertBucket" for _, content in server.requests)
    assert main(["distill", "--run_dir", "alone", *words]) == 0
    assert hash_tensors("online/student.safetensors") == hash_tensors("alone/student.safetensors")
    rows = [[row for row in read_log(Path(name, "log.jsonl")) if "loss/task" in row] for name in ("online", "alone")]
    assert [row["loss/task"] for row in rows[0]] == [row["loss/task"] for row in rows[1]]


def test_a_service_that_fails_is_warned_of_once_and_left_out(tmp_path, caplog, monkeypatch) -> None:
    class Broken:
        offline = True
        calls = 0

        def log(self, metrics: dict[str, Any]) -> None:
            self.calls += 1
            raise ConnectionError("gone")

        def finish(self) -> None:
            raise AssertionError("a broken service was called again")

    broken = Broken()
    tracker = Tracker(tmp_path, None, {})
    tracker.services.append(service.Service("wandb", None, broken))
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            tracker.log(step, value=float(step))
        tracker.finish()
    assert broken.calls == 1
    assert [record.message for record in caplog.records] == [
        "warning: wandb failed and is left out from here on: gone; log.jsonl has all"
    ]
    assert [row["value"] for row in read_log(tmp_path / "log.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_a_picture_that_cannot_be_read_costs_no_more_than_a_warning(library: str, caplog) -> None:
    broken = service.Service(library, importlib.import_module(library), None)
    with caplog.at_level(logging.WARNING):
        broken.log(3, {"learned_loss": Path("vanished.png")})
    assert broken.broken
    assert f"warning: {library} failed and is left out from here on" in caplog.text


def test_wandb_asked_for_and_not_logged_in_is_a_line_and_no_run(unused_tcp_port: int) -> None:
    nobody = {"ONLINE": json.dumps({"WANDB_BASE_URL": f"http://127.0.0.1:{unused_tcp_port}"})}
    words = ["distill", "--run_dir", "r", *TINY]
    command = Command([*words, "--wandb.mode", "online"], environment=nobody, prepare=shorten_waits)
    assert command.wait(120) == 2, command.text
    assert command.text.strip().splitlines()[-1].startswith("lkd: error: wandb.mode: online failed")
    assert main(words) == 0  # the folder is still free


@pytest.mark.parametrize(("place", "bit"), [("used", 4), ('"sha256": "', 1), ("made", 128)])
def test_a_flipped_bit_in_the_lineage_costs_a_warning(place: str, bit: int, tmp_path, caplog) -> None:
    entry = Entry("loss", "learned", "00ff", None)
    record(tmp_path, "used", entry)
    whole = (tmp_path / "lineage.json").read_bytes()
    damaged = bytearray(whole)
    damaged[whole.index(place.encode()) + len(place) - 1] ^= bit
    (tmp_path / "lineage.json").write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        record(tmp_path, "used", entry)
    assert "it is begun anew" in caplog.text
    assert (tmp_path / "lineage.json").read_bytes() == whole


def test_lineage_links_a_student_to_its_loss_and_the_loss_to_its_teacher(gallery: Path) -> None:
    learned, student = (read_json(gallery / name / "lineage.json") for name in ("learned", "student"))
    made = {entry["kind"]: entry for entry in learned["made"]}
    used = {entry["kind"]: entry for entry in student["used"]}
    assert made["loss"] == used["loss"]
    assert made["loss"]["sha256"] == hash_file(gallery / "learned/loss.lkd.safetensors")
    assert made["pool"]["sha256"] == hash_folder(gallery / "learned/pool")
    assert {entry["kind"] for entry in learned["used"]} == {"images", "teacher"}
    assert [entry["name"] for entry in student["made"]] == ["student.safetensors"]


def test_files_of_one_name_are_told_apart(tmp_path: Path) -> None:
    worlds = {}
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "teacher.safetensors").write_text(name)
        worlds[name] = {"teacher": {"path": str(tmp_path / name / "teacher.safetensors")}}
    for entry in find_used({"worlds": worlds}):
        record(tmp_path, "used", entry)
    assert find_replaced(tmp_path, {"worlds": worlds}) is None
    (tmp_path / "b/teacher.safetensors").write_text("c")
    assert find_replaced(tmp_path, {"worlds": worlds}) == ("worlds.b.teacher.path", worlds["b"]["teacher"]["path"])
    for size in (1, 2):  # a cache grows, and is one
        (tmp_path / "cache").mkdir(exist_ok=True)
        (tmp_path / "cache" / str(size)).write_text("answers")
        record(tmp_path, "used", identify("cache", tmp_path / "cache"))
    assert sum(row["kind"] == "cache" for row in read_lineage(tmp_path)["used"]) == 1


def test_files_are_found_wherever_a_recipe_names_them(tmp_path) -> None:
    recipe = {
        "teacher": {"path": "embedded", "cache": str(tmp_path), "pretrained": False},
        "methods": {"learned": {"name": "a.lkd.safetensors"}, "other": "b.lkd.safetensors"},
        "pool_dir": None,
        "data": {"root": "elsewhere"},
    }
    found = {(entry.kind, entry.name) for entry in find_used(recipe)}
    losses = {("loss", "a.lkd.safetensors"), ("loss", "b.lkd.safetensors")}
    assert found == {("teacher", "embedded"), ("cache", tmp_path.name), *losses}
    pretrained = {"teacher": {"path": "embedded", "pretrained": True, "name": "resnet50.tv_in1k"}}
    assert find_used(pretrained)[0].sha256 is None
    other = {"teacher": {"pretrained": False, "path": "t.pth", "classes": "1-9"}, "student": {"path": "s.pth"}}
    several = {"students": [{"name": "small_cnn", "path": None}, {"path": "n.pth"}], "worlds": {"other": other}}
    several |= {"teacher": pretrained["teacher"] | {"classes": "classes.txt"}}
    assert {(entry.kind, entry.name) for entry in find_used(several)} == {
        ("teacher", "resnet50.tv_in1k"),
        ("teacher", "t.pth"),
        ("network", "s.pth"),
        ("network", "n.pth"),
        ("classes", "classes.txt"),
    }


def test_looking_at_a_batch_changes_nothing_nor_does_trackio_which_is_told_the_same(monkeypatch) -> None:
    words = ["distill", *TINY, "--loss", '{"name": "kd", "weight": 0.9}', "--balance", '{"name": "dynamic"}']
    words += ["--train.clip_norm", "0.01"]
    assert main([*words, "--run_dir", "looked"]) == 0
    rows = [row for row in read_log(Path("looked/log.jsonl")) if "meta_validation/top1" in row]
    assert len(rows) == 2
    for row in rows:
        shares = [value for name, value in row.items() if name.startswith("share/")]
        assert len(shares) == 2
        assert min(shares) > 0
        assert sum(shares) < 1.01
        assert 0 <= row["train/agreement"] <= 100
        assert 0.1 < row["gradient_norm"] < math.inf, "the norm before clipping was asked for"
    monkeypatch.setattr("lkd.training.distill.describe_batch", lambda *arguments: {})
    told: list[dict[str, Any]] = []

    class Run:
        def log(self, metrics: dict[str, Any], step: int) -> None:
            told.append({"step": step, **metrics})

        def finish(self) -> None:
            told.append({"finished": True})

    monkeypatch.setitem(sys.modules, "trackio", types.SimpleNamespace(init=lambda **settings: Run()))
    assert main([*words, "--run_dir", "alone", "--trackio", "trials"]) == 0
    assert hash_tensors("looked/student.safetensors") == hash_tensors("alone/student.safetensors")
    assert told.pop() == {"finished": True}
    assert [row | {"time": 0} for row in told] == [row | {"time": 0} for row in read_log(Path("alone/log.jsonl"))]


def hash_tensors(path: str) -> str:
    return digest([load_file(path)])


# ----------------------------------------------------------------------------------------------------------------------
# Sweeps: W&B's own agent turns each into command lines that `lkd` understands, and a run keeps the agent's id.

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
SMALL = {"data.train_size": 200, "data.meta_validation_size": 100, "train.epochs": 1, "wandb.mode": "offline"}
SMALL_META = {
    **{"pool.students": 1, "pool.snapshots": 2, "meta.outer_steps": 1, "meta.students_per_step": 1},
    **{"meta.rollout_steps": 2, "meta.reuse_students": 1, "meta.reuse_epochs": 1},
}
STAND_IN = "#!/bin/sh\nfor word; do printf '%s\\n' \"$word\"; done > line.txt\n"


@pytest.fixture
def agent(monkeypatch, tmp_path):
    """W&B's agent, in front of an `lkd` that writes down its arguments."""
    script = tmp_path / "bin" / "lkd"
    script.parent.mkdir()
    script.write_text(STAND_IN)
    script.chmod(0o755)
    wandb.teardown()  # it has read the environment of earlier tests
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):  # which the agent sets
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep123")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    yield Agent(None, None, sweep_id="sweep123")
    wandb.teardown()


def draw_value(parameter: dict[str, Any], generator: random.Random) -> Any:
    """A value, as W&B's server draws it."""
    if "values" in parameter:
        return generator.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "uniform":
        return generator.uniform(low, high)
    assert parameter["distribution"] == "log_uniform_values"
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def start_agent_run(agent: Agent, sweep: dict[str, Any], run_id: str, values: dict[str, Any]) -> list[str]:
    """Let the agent start_agent_run a run; the arguments that `lkd` got."""
    if not agent._sweep_command:
        agent._sweep_command = list(sweep["command"])  # kept between runs, as the agent does
    arguments = {name: {"value": value} for name, value in values.items()}
    agent._command_run({"run_id": run_id, "program": sweep["program"], "args": arguments})
    assert agent._run_processes[run_id].wait() == 0
    return Path("line.txt").read_text().splitlines()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.name)
def test_every_draw_of_a_sweep_is_a_run_of_its_own_that_logs_what_is_optimised(path: Path, agent) -> None:
    sweep, generator = yaml.safe_load(path.read_text()), random.Random(0)
    assert f"wandb sweep configs/sweeps/{path.name}" in path.read_text()
    for run_id in ("first", "second"):
        drawn = {name: draw_value(parameter, generator) for name, parameter in sweep["parameters"].items()}
        command, *words = start_agent_run(agent, sweep, run_id, drawn)
        recipe = parse_recipe(command, words)
        assert drawn.items() <= flatten(dataclasses.asdict(recipe)).items()
        assert (recipe.wandb.mode, recipe.resume) == ("online", "auto")
        assert recipe.run_dir == f"runs/sweeps/{run_id}"
    small = SMALL | (SMALL_META if path.name == "meta-train.yaml" else {})
    assert main(start_agent_run(agent, sweep, "abc123", drawn | small)) == 0
    folder = Path("runs/sweeps/abc123")
    assert any(sweep["metric"]["name"] in row for row in read_log(folder / "log.jsonl"))
    run = next(record["run"] for record in read_wandb(folder) if record["type"] == "run")
    assert (run["run_id"], run["sweep_id"]) == ("abc123", "sweep123")
    assert (folder / "wandb_run_id").read_text() == "abc123"


def test_how_influence_weighs_is_no_file() -> None:
    assert list_sources({"influence": {"weights": "sigmoid"}, "loss": {"weights": "w"}}) == {
        "loss.weights": ("weights", "w")
    }
