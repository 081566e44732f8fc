"""Valid recipes and files of run directories, and their readers."""

import json
import sys
from pathlib import Path

import torch

from lkd.config import PoolSettings
from lkd.config.parse import parse_recipe
from lkd.core.files import write_json
from lkd.pool.sampling import check_sampling
from lkd.tracking.run import check_resumable
from lkd.tracking.tracker import read_log

EVIL = "import pathlib\npathlib.Path({path!r}).touch()\n\n\nclass Evil:\n    pass\n"


def write_recipes(folder: Path) -> None:
    """A recipe with a base, and a module that must not be imported."""
    (folder / "evil_module.py").write_text(EVIL.format(path=str(folder / "EVIL")))
    sys.path.insert(0, str(folder))
    (folder / "base.yaml").write_text(
        "seed: 1\ndata:\n  name: embedded\n  train_size: 500\nrun_dir: runs/{pair}/x\npair: a-b\n"
        "with:\n  recipe.yaml:\n    loss: {weight: 0.4}\n"
    )
    (folder / "recipe.yaml").write_text(
        "base: base.yaml\ntrain:\n  epochs: 1\n  milestones: [1, 2]\n  learning_rate: 5e-2\n"
        "student:\n  name: resnet10t\n  options: {act_layer: relu}\nteacher:\n  path: embedded\n"
        "loss:\n  name: kd\n  weight: 0.5\n  temperature: 4\ndevice: cpu\n"
    )


def read_recipe_file(path: Path) -> None:
    """Parse a recipe as the command line does; nothing may be imported or run."""
    sys.modules.pop("evil_module", None)
    parse_recipe("distill", [str(path.with_name("recipe.yaml"))])


def write_fidelity(folder: Path) -> None:
    """A file of `lkd fidelity`."""
    write_json(folder / "fidelity.json", {"age_weights": [[0.0, 1.0], [0.5, 0.2], [1.0, 0.0]], "recipe": {}})


def read_fidelity_file(path: Path) -> None:
    """Sample a pool by it."""
    settings = PoolSettings(sampling="fidelity", fidelity_file=str(path))
    check_sampling(settings, torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))


def write_run(folder: Path) -> None:
    """What a run directory holds."""
    write_json(folder / "config.json", {"command": "distill", "recipe": {"seed": 0, "data": {"name": "embedded"}}})
    lines = [json.dumps({"step": step, "time": 1.0, "loss": 0.5}) for step in range(4)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def read_run(path: Path) -> None:
    """Read what is read when a run is gone on with."""
    read_log(path.with_name("log.jsonl"))
    config = {"command": "distill", "recipe": {"seed": 0, "data": {"name": "embedded"}}}
    check_resumable(path.parent, config, "auto")
