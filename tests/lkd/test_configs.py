"""Every recipe in configs/ and every command in the README runs, on tiny inputs."""

import dataclasses
import json
import os
import re
import shlex
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from benchmarks.photographs import cut_photograph, find_photographs
from lkd.cli import main
from lkd.config.parse import parse_recipe
from lkd.losses import DecoupledLoss, LearnedLoss
from lkd.losses.learned.file import save_loss
from lkd.models.files import load_network
from tests.lkd.test_data import write_fashion_mnist
from tests.lkd.tiny_images import write_cifar, write_image_folder

ROOT = Path(__file__).parents[2]
LITERATURE = json.loads(Path(__file__).with_name("literature_recipes.json").read_text())
"""Data set → what all of its recipes hold, and the command line of each → what else it holds."""
META_TRAINED = {"cifar100": "resnet56-resnet20", "imagenet": "resnet50-mobilenetv1"}
SMALL_DATA = ["--data.train_size", "200", "--data.meta_validation_size", "100"]
SMALL_STEP = ["--data.train_size", "4", "--data.meta_validation_size", "4", "--train.batch_size", "4"]
SMALL_STEP += ["--train.epochs", "1"]
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
        *("--tuning_trainings", "1", "--tuning_seeds", "1", "--students", "[{name: small_cnn}]"),
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
    "predict": [],
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


def flatten(recipe: Any, group: str = "") -> dict[str, Any]:
    """The values of a recipe by their dotted keys."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        key, value = group + field.name, getattr(recipe, field.name)
        flat |= flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return flat


@pytest.mark.parametrize("data", LITERATURE)
def test_every_pair_with_every_method_is_the_recipe_that_it_was_as_one_file(data: str, monkeypatch) -> None:
    """Field by field, as written down when each pair had a file for each method."""
    monkeypatch.chdir(ROOT)
    for line, own in LITERATURE[data]["each"].items():
        command, *files = line.split()[1:]
        recipe = parse_recipe(command, files)
        defaults = flatten(type(recipe)())
        shared = {key: value for key, value in LITERATURE[data]["all"].items() if key in defaults}
        assert flatten(recipe) == defaults | shared | own, line


def list_stems(folder: str, pattern: str = "*.yaml") -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / folder).glob(pattern))


def choose_runs(data: str) -> list[tuple[str, str, str]]:
    """Every pair and every method of a data set at least once."""
    pairs, methods = list_stems(data, "[!_]*-*.yaml"), list_stems(f"{data}/methods")
    methods.remove("meta-train")
    most = max(len(pairs), len(methods))
    runs = [(data, *run) for run in islice(zip(cycle(pairs), cycle(methods), strict=False), most)]
    return [*runs, (data, META_TRAINED[data], "meta-train")]


def name_command(method: str) -> str:
    return "meta-train" if method == "meta-train" else "distill"


@pytest.mark.parametrize("data", LITERATURE)
def test_no_pair_and_no_method_goes_unmentioned(data: str) -> None:
    combined = {
        f"lkd {name_command(method)} configs/{data}/{pair}.yaml configs/{data}/methods/{method}.yaml"
        for pair in list_stems(data, "[!_]*-*.yaml")
        for method in list_stems(f"{data}/methods")
    }
    alone = {line for line in LITERATURE[data]["each"] if line.count(".yaml") == 1}
    assert combined == LITERATURE[data]["each"].keys() - alone


@pytest.fixture(scope="module")
def literature_roots(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        cifar = write_cifar(tmp_path_factory.mktemp("cifar"), "cifar100", monkeypatch, test=10)
        yield {"cifar100": cifar, "imagenet": write_image_folder(tmp_path_factory.mktemp("imagenet"))}


@pytest.mark.parametrize(("data", "pair", "method"), [run for data in LITERATURE for run in choose_runs(data)])
def test_recipes_of_the_literature_run(data: str, pair: str, method: str, literature_roots, tmp_path) -> None:
    """With untrained teachers: nobody's weights are at hand."""
    folder = ROOT / "configs" / data
    words = [name_command(method), str(folder / f"{pair}.yaml"), str(folder / f"methods/{method}.yaml")]
    words += ["--data.root", literature_roots[data], "--data.image_size", "32", *SMALL_STEP]
    words += ["--teacher.path", "random", "--teacher.pretrained", "false"]
    if method == "lkd":
        save_loss(tmp_path / "l.lkd.safetensors", LearnedLoss({"logits": DecoupledLoss()}), {})
        words += ["--loss", str(tmp_path / "l.lkd.safetensors")]
    if method == "meta-train":
        words += [*SMALL["meta-train"][len(SMALL_TRAINING) :]]
        words += ["--data.meta_validation_size", "100" if data == "cifar100" else "4"]  # every class
    assert main(words) == 0


def test_the_recipe_of_the_literatures_teachers_runs(literature_roots) -> None:
    words = ["teacher", str(ROOT / "configs/cifar100/teacher.yaml"), "--data.root", literature_roots["cifar100"]]
    assert main([*words, "--model.name", "resnet8", *SMALL_STEP]) == 0


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/semi_supervised").iterdir()), ids=lambda path: path.stem)
def test_recipes_of_few_labels_run(recipe: Path, tmp_path, monkeypatch) -> None:
    generator = np.random.default_rng(0)
    arrays = {f"{part}_images": generator.integers(0, 256, (400, 32, 32, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "svhn.npz", **arrays, train_labels=np.arange(400) % 10, test_labels=np.arange(400) % 10)
    root = str(tmp_path) if "svhn" in recipe.stem else write_cifar(tmp_path, "cifar10", monkeypatch)
    words = ["--data.root", root, "--teacher.path", "random", "--labelled_size", "2", *SMALL_STEP]
    words += ["--teacher.name", "resnet8", "--student.name", "resnet8"]
    words += [
        "--loss.first_epoch",
        "0",
        "--loss.influence.iterations",
        "2",
        "--loss.influence.curvature_examples",
        "50",
    ]
    assert main(["distill", str(recipe), *words]) == 0


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/tour.md").read_text()
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        part.strip() for line in lines for part in line.split("#")[0].split("&&") if part.strip().startswith("lkd ")
    ]


RECIPES = {
    str(path.relative_to(ROOT))
    for name in ("embedded", "fashion_mnist")
    for path in (ROOT / "configs" / name).iterdir()
}


@pytest.mark.parametrize("recipe", sorted(RECIPES - set(" ".join(readme_commands()).split())))
def test_every_recipe_that_the_readme_does_not_run_runs(recipe: str, fashion_root: str) -> None:
    command = command_of(ROOT / recipe)
    root = ["--data.root", fashion_root] if "fashion_mnist" in recipe else []
    assert main([command, str(ROOT / recipe), *root, *SMALL[command]]) == 0


def test_every_command_in_the_readme_runs(fashion_root: str, monkeypatch) -> None:
    """And in docs/tour.md; in their own order, one after another: later commands use the files of earlier ones."""
    (Path.cwd() / "configs").symlink_to(ROOT / "configs")
    Path("photos").mkdir()
    Image.new("L", (28, 28), 9).save("photos/dark.png")
    pictures = write_image_folder(Path("pictures").resolve())
    timm_network = timm.create_model("resnet18", num_classes=len(os.listdir(f"{pictures}/train")))
    torch.save({"state_dict": timm_network.state_dict()}, "teacher.pth")
    commands = readme_commands()
    assert len(commands) >= 20
    for line in commands:
        if "PICTURES" in line:
            line = line.replace("PICTURES", pictures).replace("224", "32").replace("resnet50", "resnet18")
            assert main([*shlex.split(line)[1:], *SMALL_STEP]) == 0
            continue
        words = shlex.split(line.replace("DIR", fashion_root))[1:]
        if words[0] == "quickstart":
            continue  # tests/lkd/test_quickstart.py
        assert main([*words, *SMALL[words[0]]]) == 0, line


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/imagenet_modern").glob("[!_]*.yaml")), ids=lambda p: p.stem)
def test_modern_recipes_are_planned_and_take_two_steps(recipe: Path, literature_roots, capsys) -> None:
    """With a small, untrained teacher: nobody's weights are at hand."""
    assert main(["plan", str(recipe)]) == 0
    assert "gpu hours" in capsys.readouterr().out
    words = ["--data.root", literature_roots["imagenet"], "--data.image_size", "32", *SMALL_STEP]
    words += ["--data.train_size", "24", "--train.warmup_epochs", "0", "--run_dir", "run"]
    assert main(["distill", str(recipe), *words, *RANDOM_TEACHER, "--data.repeats", "3"]) == 0


RANDOM_TEACHER = ["--teacher.path", "random", "--teacher.pretrained", "false", "--teacher.name", "resnet10t"]


def test_own_images_from_a_folder_to_an_exported_student_in_six_commands() -> None:
    """The page's own commands, one after another, on parts of photographs; its networks in small and not fetched."""
    page = (ROOT / "docs/own_images.md").read_text()
    commands = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[0].splitlines()
    assert len(commands) == 6
    Path("configs").symlink_to(ROOT / "configs")
    generator = np.random.default_rng(0)
    for part, count in (("train", 20), ("val", 4)):
        for photograph in find_photographs()[:3]:
            folder = Path("photos") / part / photograph.stem
            folder.mkdir(parents=True)
            with Image.open(photograph) as opened:
                image = opened.convert("RGB")
            for number in range(count):
                (folder / f"{number}.jpg").write_bytes(cut_photograph(image, (80, 60), generator))
    torch.save(timm.create_model("resnet10t").state_dict(), "resnet50.pth")
    small = ["--data.image_size", "32", "--train.epochs", "2", "--train.batch_size", "18", "--threads", "1"]
    of_command = {
        "teacher": [*small, "--model.name", "resnet10t"],
        "distill": [*small, "--student.pretrained", "false"],
    }
    for line in commands:
        words = shlex.split(line)[1:]
        assert main([*words, *of_command.get(words[0], [])]) == 0, line
    folder = Path("runs/own-images")
    described = json.loads((folder / "export/config.json").read_text())
    assert described["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert len((folder / "predictions.csv").read_text().splitlines()) >= 13
    weights = str(folder / "export/student.pth")
    student = timm.create_model("mobilenetv3_small_100", num_classes=3, checkpoint_path=weights).eval()
    ours, _ = load_network(folder / "student/student.safetensors")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images), ours(images).logits, rtol=1e-4, atol=1e-5)
