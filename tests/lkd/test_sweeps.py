"""W&B's own agent turns every sweep into command lines that `lkd` understands, and a run keeps the agent's id."""

import dataclasses
import math
import os
import random
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from wandb.wandb_agent import Agent

from lkd.cli import main
from lkd.config.parse import parse_recipe
from lkd.core.files import flatten
from lkd.tracking.tracker import read_log
from tests.lkd.test_tracking import read_wandb

ROOT = Path(__file__).parents[2]
SWEEPS = sorted((ROOT / "configs/sweeps").glob("*.yaml"))
TINY = {"data.train_size": 200, "data.meta_validation_size": 100, "train.epochs": 1, "wandb.mode": "offline"}
TINY_META = {
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


def draw(parameter: dict[str, Any], generator: random.Random) -> Any:
    """A value, as W&B's server draws it."""
    if "values" in parameter:
        return generator.choice(parameter["values"])
    low, high = parameter["min"], parameter["max"]
    if parameter["distribution"] == "uniform":
        return generator.uniform(low, high)
    assert parameter["distribution"] == "log_uniform_values"
    return math.exp(generator.uniform(math.log(low), math.log(high)))


def start(agent: Agent, sweep: dict[str, Any], run_id: str, values: dict[str, Any]) -> list[str]:
    """Let the agent start a run; the arguments that `lkd` got."""
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
        drawn = {name: draw(parameter, generator) for name, parameter in sweep["parameters"].items()}
        command, *words = start(agent, sweep, run_id, drawn)
        recipe = parse_recipe(command, words)
        assert drawn.items() <= flatten(dataclasses.asdict(recipe)).items()
        assert (recipe.wandb.mode, recipe.resume) == ("online", "auto")
        assert recipe.run_dir == f"runs/sweeps/{run_id}"
    small = TINY | (TINY_META if path.name == "meta-train.yaml" else {})
    assert main(start(agent, sweep, "abc123", drawn | small)) == 0
    folder = Path("runs/sweeps/abc123")
    assert any(sweep["metric"]["name"] in row for row in read_log(folder / "log.jsonl"))
    run = next(record["run"] for record in read_wandb(folder) if record["type"] == "run")
    assert (run["run_id"], run["sweep_id"]) == ("abc123", "sweep123")
    assert (folder / "wandb_run_id").read_text() == "abc123"
