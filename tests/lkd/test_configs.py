"""Every recipe in configs/ and every command in the README runs, on tiny inputs."""

import re
import shlex
from pathlib import Path

import pytest

from lkd.cli import main
from tests.lkd.test_data import write_fashion_mnist

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").rglob("*.yaml"))
SMALL_DATA = ["--data.train_size", "200", "--data.meta_validation_size", "100"]
SMALL_TRAINING = [*SMALL_DATA, "--train.epochs", "1", "--train.batch_size", "50"]
SMALL_POOL = [*SMALL_TRAINING, "--pool.students", "1", "--pool.snapshots", "2"]
SMALL = {
    "teacher": SMALL_TRAINING,
    "pool": SMALL_POOL,
    "meta-train": [
        *SMALL_POOL,
        "--meta.outer_steps",
        "1",
        "--meta.rollout_steps",
        "2",
        "--meta.students_per_step",
        "1",
    ],
    "distill": SMALL_TRAINING,
    "compare": [
        *SMALL_TRAINING,
        *("--tuning_trainings", "2", "--tuning_seeds", "1"),
        *("--seeds", "1", "--workers", "1", "--methods.KD", "{name: kd, grid: {weight: [0.5, 1.0]}}"),
    ],
    "evaluate": [],
    "quickstart": ["--short"],
}


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory) -> str:
    return write_fashion_mnist(tmp_path_factory.mktemp("fashion"))


def command_of(recipe: Path) -> str:
    """The command that a recipe's first line names."""
    found = re.search(r"lkd ([\w-]+) configs/", recipe.read_text())
    assert found, f"{recipe} does not say which command runs it"
    return found[1]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_runs(recipe: Path, fashion_root: str) -> None:
    command = command_of(recipe)
    root = ["--data.root", fashion_root] if "fashion_mnist" in recipe.parent.name else []
    assert main([command, str(recipe), *root, *SMALL[command]]) == 0


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        part.strip() for line in lines for part in line.split("#")[0].split("&&") if part.strip().startswith("lkd ")
    ]


def test_every_command_in_the_readme_runs(fashion_root: str, monkeypatch) -> None:
    """In the README's own order, one after another: later commands use the files of earlier ones."""
    (Path.cwd() / "configs").symlink_to(ROOT / "configs")
    commands = readme_commands()
    assert len(commands) >= 6
    for line in commands:
        words = shlex.split(line.replace("DIR", fashion_root))[1:]
        if words[0] == "quickstart":
            continue  # tests/lkd/test_quickstart.py
        assert main([*words, *SMALL[words[0]]]) == 0, line


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
