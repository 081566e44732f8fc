"""Every recipe in configs/ and every command in the README runs, on tiny inputs."""

import dataclasses
import json
import os
import re
import shlex
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
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
from lkd.config import COMMANDS
from lkd.config.parse import make_recipe, merge, read_recipes
from lkd.losses import DecoupledLoss, LearnedLoss
from lkd.losses.learned.file import save_loss
from lkd.models.files import load_network
from tests.lkd.test_data import write_fashion_mnist
from tests.lkd.tiny_images import write_cifar, write_image_folder

ROOT = Path(__file__).parents[2]
LITERATURE = json.loads(Path(__file__).with_name("literature_recipes.json").read_text())
"""Data set → what all of its recipes hold, and the command line of each → what else it holds."""
META_TRAINED = {"cifar100": "resnet56-resnet20", "imagenet": "resnet50-mobilenetv1"}
DATA = "--data.train_size 200 --data.meta_validation_size 100"
TRAINING = f"{DATA} --train.epochs 1 --train.batch_size 50"
POOL = f"{TRAINING} --pool.students 1 --pool.snapshots 2"
META = "--meta.outer_steps 1 --meta.rollout_steps 2 --meta.students_per_step 1"
STEP = "--data.train_size 4 --data.meta_validation_size 4 --train.batch_size 4 --train.epochs 1"
RANDOM_TEACHER = "--teacher.path random --teacher.pretrained false"  # nobody's weights are at hand
FIDELITY = "--pool.max_age 0.5 --ages [0.0,0.5] --rollout_lengths [1,2] --workers 1 --rollouts 2 --full_seeds 2"
COMPARE = "--tuning_trainings 1 --tuning_seeds 1 --students '[{name: tiny_cnn}]' --seeds 1 --workers 1"
INFLUENCE = "--influence.parameters classifier --influence.iterations 2 --influence.curvature_examples 50"
SMALL = {  # what makes a command small; others are
    "teacher": TRAINING,
    "pool": POOL,
    "fidelity": f"{POOL} {FIDELITY} --losses '{{a: cross_entropy, b: kd, c: dkd}}'",
    "meta-train": f"{POOL} {META} --meta.reuse_students 1 --meta.reuse_epochs 1",
    "cache": TRAINING,
    "distill": TRAINING,
    "compare": f"{TRAINING} {COMPARE} --methods.KD '{{name: kd, grid: {{weight: [0.5, 1.0]}}}}'",
    "influence": f"{DATA} {INFLUENCE}",
    "variance": "--samples 4",
}


def run(*words: object) -> None:
    """Run a command line, given in parts."""
    line = " ".join(map(str, words))
    assert main(shlex.split(line)) == 0, line


def flatten(recipe: Any, group: str = "") -> dict[str, Any]:
    """The values of a recipe by their dotted keys."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(recipe):
        key, value = group + field.name, getattr(recipe, field.name)
        flat |= flatten(value, f"{key}.") if dataclasses.is_dataclass(value) else {key: value}
    return flat


def list_stems(folder: str, pattern: str = "*.yaml") -> list[str]:
    return sorted(path.stem for path in (ROOT / "configs" / folder).glob(pattern))


def choose_runs(data: str) -> list[tuple[str, str, str]]:
    """Every pair and every method of a data set at least once."""
    pairs, methods = list_stems(data, "[!_]*-*.yaml"), list_stems(f"{data}/methods")
    methods.remove("meta-train")
    most = max(len(pairs), len(methods))
    runs = [(data, *run) for run in islice(zip(cycle(pairs), cycle(methods), strict=False), most)]
    return [*runs, (data, META_TRAINED[data], "meta-train")]


@pytest.mark.parametrize("data", LITERATURE)
def test_every_pair_with_every_method_is_what_was_written_down_from_the_literature(data: str) -> None:
    """Field by field; and none goes unmentioned."""
    for line, own in LITERATURE[data]["each"].items():
        command, *files = line.split()[1:]
        kind = COMMANDS[command][0]
        recipe = make_recipe(kind, reduce(merge, read_recipes([ROOT / file for file in files])))
        defaults = flatten(kind())
        shared = {key: value for key, value in LITERATURE[data]["all"].items() if key in defaults}
        assert flatten(recipe) == defaults | shared | own, line
    combined = {
        f"lkd {name_command(method)} configs/{data}/{pair}.yaml configs/{data}/methods/{method}.yaml"
        for pair in list_stems(data, "[!_]*-*.yaml")
        for method in list_stems(f"{data}/methods")
    }
    alone = {line for line in LITERATURE[data]["each"] if line.count(".yaml") == 1}
    assert combined == LITERATURE[data]["each"].keys() - alone


def name_command(method: str) -> str:
    return "meta-train" if method == "meta-train" else "distill"


@pytest.fixture(scope="module")
def literature_roots(tmp_path_factory):
    with pytest.MonkeyPatch.context() as monkeypatch:
        cifar = write_cifar(tmp_path_factory.mktemp("cifar"), "cifar100", monkeypatch, test=10)
        yield {"cifar100": cifar, "imagenet": write_image_folder(tmp_path_factory.mktemp("imagenet"))}


@pytest.mark.parametrize(("data", "pair", "method"), [run for data in LITERATURE for run in choose_runs(data)])
def test_recipes_of_the_literature_run(data: str, pair: str, method: str, literature_roots, tmp_path) -> None:
    folder = ROOT / "configs" / data
    words = [name_command(method), folder / f"{pair}.yaml", folder / f"methods/{method}.yaml", STEP, RANDOM_TEACHER]
    words += ["--data.root", literature_roots[data], "--data.image_size 32"]
    if method == "lkd":
        save_loss(tmp_path / "l.lkd.safetensors", LearnedLoss({"logits": DecoupledLoss()}), {})
        words += ["--loss", tmp_path / "l.lkd.safetensors"]
    if method == "meta-train":
        words += ["--pool.students 1 --pool.snapshots 2", META, "--meta.reuse_every 0"]
        words += ["--data.meta_validation_size", 100 if data == "cifar100" else 4]  # every class
    run(*words)


def test_the_recipe_of_the_literatures_teachers_runs(literature_roots) -> None:
    root = literature_roots["cifar100"]
    run("teacher", ROOT / "configs/cifar100/teacher.yaml", "--data.root", root, "--model.name resnet8", STEP)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/semi_supervised").iterdir()), ids=lambda path: path.stem)
def test_recipes_of_few_labels_run(recipe: Path, tmp_path, monkeypatch) -> None:
    generator = np.random.default_rng(0)
    arrays = {f"{part}_images": generator.integers(0, 256, (400, 32, 32, 3), np.uint8) for part in ("train", "test")}
    np.savez(tmp_path / "svhn.npz", **arrays, train_labels=np.arange(400) % 10, test_labels=np.arange(400) % 10)
    root = str(tmp_path) if "svhn" in recipe.stem else write_cifar(tmp_path, "cifar10", monkeypatch)
    influence = "--loss.first_epoch 0 --loss.influence.iterations 2 --loss.influence.curvature_examples 50"
    networks = "--teacher.path random --teacher.name resnet8 --student.name resnet8"
    run("distill", recipe, "--data.root", root, "--labelled_size 2", STEP, networks, influence)


@pytest.mark.parametrize("recipe", sorted((ROOT / "configs/imagenet_modern").glob("[!_]*.yaml")), ids=lambda p: p.stem)
def test_modern_recipes_are_planned_and_take_two_steps(recipe: Path, literature_roots, capsys) -> None:
    """With a small teacher; planned as they stand."""
    run("plan", recipe)
    assert "gpu hours" in capsys.readouterr().out
    words = ["--data.root", literature_roots["imagenet"], "--data.image_size 32 --data.repeats 3", STEP]
    words += ["--data.train_size 8 --train.warmup_epochs 0 --run_dir run", RANDOM_TEACHER, "--teacher.name resnet10t"]
    run("distill", recipe, *words)


def readme_commands() -> list[str]:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs/tour.md").read_text()
    blocks = re.findall(r"```(?:sh|bash)\n(.*?)```", text, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [part.removeprefix("lkd ") for part in parts if part.startswith("lkd ")]


RECIPES = {
    str(path.relative_to(ROOT))
    for name in ("embedded", "fashion_mnist")
    for path in (ROOT / "configs" / name).iterdir()
}


@pytest.fixture(scope="module")
def fashion_root(tmp_path_factory) -> str:
    return write_fashion_mnist(tmp_path_factory.mktemp("fashion"))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("recipe", sorted(RECIPES - set(" ".join(readme_commands()).split())))
def test_every_recipe_that_the_readme_does_not_run_runs(recipe: str, fashion_root: str) -> None:
    found = re.search(r"lkd ([\w-]+) configs/", (ROOT / recipe).read_text())
    assert found, f"{recipe} does not say which command runs it"
    root = f"--data.root {fashion_root}" if "fashion_mnist" in recipe else ""
    run(found[1], ROOT / recipe, root, SMALL[found[1]])


def test_every_command_in_the_readme_runs(fashion_root: str, monkeypatch) -> None:
    """And in docs/tour.md; in their own order, one after another: later commands use the files of earlier ones."""
    Path("configs").symlink_to(ROOT / "configs")
    Path("photos").mkdir()
    Image.new("L", (28, 28), 9).save("photos/dark.png")
    pictures = write_image_folder(Path("pictures").resolve())
    timm_network = timm.create_model("resnet18", num_classes=len(os.listdir(f"{pictures}/train")))
    torch.save({"state_dict": timm_network.state_dict()}, "teacher.pth")
    monkeypatch.setattr("lkd.evaluation.comparison.compare.start_workers", lambda *_, **__: ThreadPoolExecutor(1))
    commands = readme_commands()
    assert len(commands) >= 20
    for line in commands:
        if "PICTURES" in line:
            run(line.replace("PICTURES", pictures).replace("224", "32").replace("resnet50", "resnet18"), STEP)
        elif not line.startswith("quickstart"):  # tests/lkd/test_quickstart.py
            run(line.replace("DIR", fashion_root), SMALL.get(line.split()[0], ""))


def test_the_readmes_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


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
    small = "--data.image_size 32 --train.epochs 2 --train.batch_size 18 --threads 1"
    of_command = {"teacher": f"{small} --model.name resnet10t", "distill": f"{small} --student.pretrained false"}
    for line in commands:
        run(line.removeprefix("lkd "), of_command.get(line.split()[1], ""))
    folder = Path("runs/own-images")
    described = json.loads((folder / "export/config.json").read_text())
    assert described["pretrained_cfg"]["input_size"] == [3, 32, 32]
    assert len((folder / "predictions.csv").read_text().splitlines()) >= 13
    weights = str(folder / "export/student.pth")
    student = timm.create_model("mobilenetv3_small_100", num_classes=3, checkpoint_path=weights).eval()
    ours, _ = load_network(folder / "student/student.safetensors")
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(student(images), ours(images).logits, rtol=1e-4, atol=1e-5)
