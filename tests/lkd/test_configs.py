"""Every recipe in configs/ and every command in the README runs, on tiny inputs."""

import os
import re
import shlex
from pathlib import Path

import pytest
import torch

from lkd.cli import main
from lkd.config import DistillRecipe
from lkd.config.parse import parse_recipe
from lkd.losses import LearnedLoss, LogitLoss
from lkd.losses.build import build_loss
from lkd.losses.learned.file import save_loss
from lkd.models import build
from tests.lkd.test_data import write_fashion_mnist
from tests.lkd.tiny_images import write_cifar, write_image_folder

ROOT = Path(__file__).parents[2]
FILES = sorted(set((ROOT / "configs").rglob("*.yaml")) - set((ROOT / "configs/sweeps").glob("*")))  # test_sweeps.py
RECIPES = [path for path in FILES if not path.name.startswith("_")]  # the others are their bases
LITERATURE = [path for path in RECIPES if path.relative_to(ROOT).parts[1] in ("cifar100", "imagenet")]
META_TRAINED = ("cifar100/resnet56-resnet20", "imagenet/resnet50-mobilenetv1")
CIFAR_PAIRS = {
    *("resnet56-resnet20", "resnet110-resnet20", "resnet110-resnet32", "resnet32x4-resnet8x4", "wrn40-2-wrn16-2"),
    *("wrn40-2-wrn40-1", "vgg13-vgg8", "vgg13-mobilenetv2", "resnet50-mobilenetv2", "resnet50-vgg8"),
    *("resnet32x4-shufflenetv1", "resnet32x4-shufflenetv2", "wrn40-2-shufflenetv1"),
}  # tables 1 and 2 of CRD (Tian et al., 2020)
SMALL_DATA = ["--data.train_size", "200", "--data.meta_validation_size", "100"]
SMALL_TRAINING = [*SMALL_DATA, "--train.epochs", "1", "--train.batch_size", "50"]
SMALL_POOL = [*SMALL_TRAINING, "--pool.students", "1", "--pool.snapshots", "2"]
SMALL = {
    "teacher": SMALL_TRAINING,
    "pool": SMALL_POOL,
    "fidelity": [
        *SMALL_POOL,
        *("--pool.max_age", "0.5", "--ages", "[0.0, 0.5]", "--rollout_lengths", "[1, 2]", "--workers", "1"),
        *("--rollouts", "2", "--full_seeds", "2", "--losses", "{a: cross_entropy, b: kd, c: dkd}"),
    ],
    "meta-train": [
        *SMALL_POOL,
        "--meta.outer_steps",
        "1",
        "--meta.rollout_steps",
        "2",
        "--meta.students_per_step",
        "1",
        "--meta.reuse_students",
        "1",
        "--meta.reuse_epochs",
        "1",
    ],
    "cache": SMALL_TRAINING,
    "distill": SMALL_TRAINING,
    "compare": [
        *SMALL_TRAINING,
        *("--tuning_trainings", "2", "--tuning_seeds", "1", "--students", "[{name: small_cnn}]"),
        *("--seeds", "1", "--workers", "1", "--methods.KD", "{name: kd, grid: {weight: [0.5, 1.0]}}"),
    ],
    "influence": [
        *SMALL_DATA,
        *(
            "--influence.parameters",
            "classifier",
            "--influence.iterations",
            "2",
            "--influence.curvature_examples",
            "50",
        ),
    ],
    "inspect": [],
    "evaluate": [],
    "variance": ["--samples", "4"],
    "export": [],
    "dashboard": [],
    "quickstart": ["--short"],
    "report": [],
}


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory) -> str:
    return write_fashion_mnist(tmp_path_factory.mktemp("fashion"))


def command_of(recipe: Path) -> str:
    """The command that a recipe's first line names."""
    found = re.search(r"lkd ([\w-]+) configs/", recipe.read_text())
    assert found, f"{recipe} does not say which command runs it"
    return found[1]


@pytest.fixture(scope="module")
def literature_roots(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        cifar = write_cifar(tmp_path_factory.mktemp("cifar"), "cifar100", monkeypatch)
        yield {"cifar100": cifar, "imagenet": write_image_folder(tmp_path_factory.mktemp("imagenet"))}


def spread_out(recipes: list[Path]) -> list[Path]:
    """Every pair, every base and every method; LKD_TEST_ALL_RECIPES=1 runs every recipe, which takes minutes."""
    if os.environ.get("LKD_TEST_ALL_RECIPES"):
        return recipes
    folders = sorted({path.parent for path in recipes})
    methods = ("ce.yaml", "kd.yaml", "dkd.yaml", "dist.yaml", "lkd.yaml")
    chosen = {
        folder / methods[(number + offset) % len(methods)] for number, folder in enumerate(folders) for offset in (0, 2)
    }
    learning = {ROOT / "configs" / pair / "meta-train.yaml" for pair in META_TRAINED}
    return [path for path in recipes if path in chosen | learning or path.name == "teacher.yaml"]


def name_of(recipe: Path) -> str:
    return str(recipe.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("recipe", spread_out(LITERATURE), ids=name_of)
def test_recipes_of_the_literature_do_two_steps(recipe: Path, literature_roots, tmp_path) -> None:
    """With untrained teachers: nobody's weights are at hand."""
    command, data = command_of(recipe), recipe.relative_to(ROOT / "configs").parts[0]
    words = [*("--data.root", literature_roots[data]), *("--data.train_size", "8", "--data.meta_validation_size", "4")]
    words += ["--train.batch_size", "4", "--train.epochs", "1"]
    if command != "teacher":
        words += ["--teacher.path", "random", "--teacher.pretrained", "false"]
    if data == "imagenet":
        words += ["--data.image_size", "32"]
    if recipe.name == "lkd.yaml":
        save_loss(tmp_path / "l.lkd.safetensors", LearnedLoss({"logits": LogitLoss()}), {})
        words += ["--loss", str(tmp_path / "l.lkd.safetensors")]
    if command == "meta-train":
        words += [*SMALL["meta-train"][len(SMALL_TRAINING) :]]
        words += ["--data.meta_validation_size", "100" if data == "cifar100" else "4"]  # every class
    assert main([command, str(recipe), *words]) == 0


@pytest.mark.parametrize("recipe", LITERATURE, ids=name_of)
def test_every_recipe_of_the_literature_says_what_its_place_says(recipe: Path) -> None:
    command, (data, *pair, _) = command_of(recipe), recipe.relative_to(ROOT / "configs").parts
    assert f"lkd {command} configs/{name_of(recipe)} --data.root DIR" in recipe.read_text()
    parsed = parse_recipe(command, [str(recipe)])
    assert parsed.run_dir == f"runs/{name_of(recipe).removesuffix('.yaml')}"
    train = parsed.train
    if data == "imagenet":
        assert (train.epochs, train.batch_size, train.learning_rate, train.weight_decay) == (100, 256, 0.1, 1e-4)
        assert train.milestones == [30, 60, 90]
    else:
        small = "mobilenet" in pair[-1] or "shufflenet" in pair[-1] if pair else False
        assert (train.epochs, train.batch_size, train.weight_decay) == (240, 64, 5e-4)
        assert train.learning_rate == (0.01 if small else 0.05)
        assert train.milestones == [150, 180, 210]
        assert parsed.data.augmentation == "flip_and_crop_4"
    assert (train.schedule, train.decay_rate, train.momentum, train.nesterov) == ("multistep", 0.1, 0.9, False)
    if pair:
        teacher, student = (
            model.name.split(".")[0].removeprefix("cifar_") for model in (parsed.teacher, parsed.student)
        )
        short = {"wrn_40_2": "wrn40-2", "wrn_40_1": "wrn40-1", "wrn_16_2": "wrn16-2"}
        short |= {"mobilenetv2_half": "mobilenetv2", "mobilenetv1_100": "mobilenetv1"}
        assert "-".join(short.get(name, name) for name in (teacher, student)) == pair[0]
        with torch.device("meta"):
            build(parsed.student.name, 10, options=parsed.student.options)
        if data == "imagenet":
            assert parsed.teacher.pretrained
            assert parsed.teacher.name.endswith(".tv_in1k")
    if isinstance(parsed, DistillRecipe):
        method = recipe.stem
        if method == "lkd":
            assert parsed.loss == f"runs/{data}/{pair[0]}/meta-train/loss.lkd.safetensors"
        else:
            assert parsed.loss["name"] == {"ce": "cross_entropy"}.get(method, method)
            build_loss(parsed.loss)


def test_every_pair_has_every_method() -> None:
    methods = {"ce.yaml", "kd.yaml", "dkd.yaml", "dist.yaml", "meta-train.yaml", "lkd.yaml"}
    pairs = {path for path in (ROOT / "configs").glob("*/*") if path.is_dir()}
    for pair in pairs:
        assert {path.name for path in pair.glob("[!_]*.yaml")} == methods
    assert {path.name for path in pairs if path.parent.name == "cifar100"} == CIFAR_PAIRS
    assert {path.name for path in pairs if path.parent.name == "imagenet"} == {
        "resnet34-resnet18",
        "resnet50-mobilenetv1",
    }


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - set(LITERATURE)), ids=name_of)
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
