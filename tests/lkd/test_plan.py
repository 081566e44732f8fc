"""Plans: counts against hand computations, memory against a measured training, and the committed plans again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lkd.cli import main
from lkd.config import DataRecipe, MetaSettings, MetaTrainRecipe, ModelRecipe, TeacherRecipe, TrainRecipe
from lkd.core.files import read_json
from lkd.evaluation import plan_steps as dry_rollout
from lkd.evaluation.plan import GPUS, plan_images, stand_in
from lkd.evaluation.plan_steps import extrapolate, plan_loss, run_dry_rollout, run_dry_step
from lkd.models import build

ROOT = Path(__file__).parents[2]
GPU = GPUS["a100_sxm_80gb"]
TEACHER = TeacherRecipe("random", "small_resnet")
IMAGES = stand_in("some", 10, (3, 32, 32))


def dry_step(student: str, loss: str = "kd", images=IMAGES, **changes):
    model = ModelRecipe(student)
    train = TrainRecipe(**{"batch_size": 8, "precision": "float32"} | changes)
    return run_dry_step(model, TEACHER, plan_loss(loss, model, TEACHER, images)[0], train, images, GPU)


def multiply_adds(network: nn.Module, images: torch.Tensor) -> list[int]:
    """Of every convolution and linear layer, by its definition: outputs × inputs of each."""
    found: list[int] = []

    def count(module: nn.Module, inputs, output) -> None:
        each = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        found.append(output.numel() * each)

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    network(images)
    return found


@pytest.mark.parametrize("student", ["small_mobilenet", "small_resnet"])
def test_flops_are_those_of_the_definition(student: str) -> None:
    """Forward, and twice that backward, but for the gradient of the images; convolutions by channel too."""
    step = dry_step(student)
    forward = multiply_adds(build(student, 10, 3), torch.zeros(8, 3, 32, 32))
    assert step.parts["student"].flops == 2 * (3 * sum(forward) - forward[0])
    assert step.parts["teacher"].flops == 2 * sum(
        multiply_adds(build("small_resnet", 10, 3), torch.zeros(8, 3, 32, 32))
    )
    assert step.parameters["student"] == sum(p.numel() for p in build(student, 10, 3).parameters())


def test_a_known_network_has_its_known_flops_and_bfloat16_halves_the_traffic() -> None:
    images = plan_images(DataRecipe(name="image_folder")).stand_in
    wide, narrow = (
        dry_step("resnet18", "cross_entropy", images, batch_size=64, precision=precision)
        for precision in ("float32", "auto")
    )
    assert wide.parts["student"].flops / 64 == pytest.approx(3 * 2 * 1.814e9, rel=0.03), "1.81 G multiply-adds"
    assert 0.5 < narrow.parts["student"].bytes / wide.parts["student"].bytes < 0.6
    assert 0.5 < (narrow.peak - narrow.weights) / (wide.peak - wide.weights) < 0.6


MEASURE = """
import torch
from lkd.evaluation.comparison.trials import Cost
from lkd.config import TrainRecipe
from lkd.data import Batches, ImageSet
from lkd.losses import KDLoss
from lkd.models import build
from lkd.models.teacher import Teacher
from lkd.training.training import Training
torch.set_num_threads(1)
pixels = torch.zeros(96, 3, 64, 64, dtype=torch.uint8)
images = ImageSet(pixels, torch.zeros(96).long(), torch.arange(96), tuple("0123456789"), (0.5,) * 3, (0.5,) * 3)
def start(size):
    train = TrainRecipe(3, size)
    teacher = Teacher(build("small_resnet", 10, 3))
    return Training(build("resnet18", 10, 3), KDLoss(), teacher, Batches(images, size, 0), train)
start(2).run_step()
training = start(32)
cost = Cost(torch.device("cpu"))
with cost.measured():
    for _ in range(3):
        training.run_step()
print(cost.peak_mib)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_the_planned_peak_is_the_measured_one() -> None:
    """Of a whole training on a CPU, above what weights take before it starts."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**18), "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True, env=environment)
    step = dry_step("resnet18", images=stand_in("some", 10, (3, 64, 64)), batch_size=32)
    there_before = 4 * (step.parameters["student"] + step.parameters["teacher"])
    assert (step.peak - there_before) / 2**20 == pytest.approx(float(run.stdout), rel=0.15)


@pytest.mark.parametrize("estimator", ["first_order", "unrolled"])
def test_long_rollouts_lie_on_the_line_of_short_ones(estimator: str) -> None:
    student, teacher = ModelRecipe("small_cnn"), TeacherRecipe("random", "tiny_cnn")
    settings = MetaSettings(rollout_steps=7, outer_batch_size=16)
    recipe = MetaTrainRecipe(train=TrainRecipe(batch_size=16), meta=settings)
    found = extrapolate(recipe, student, teacher, IMAGES, GPU, estimator)
    work, peaks = run_dry_rollout(recipe, student, teacher, IMAGES, GPU, estimator, 7)
    assert max(dry_rollout.LENGTHS) < 7
    assert found.work.flops == pytest.approx(work.flops, rel=0.01)
    assert found.work.seconds == pytest.approx(work.seconds, rel=0.05)
    assert found.peak == pytest.approx(max(peaks), rel=0.1)
    if estimator == "first_order":
        batch = 16 * 3 * 32 * 32 * 4
        stored = 2 * 4 * sum(p.numel() for p in build("small_cnn", 10, 3).parameters())
        assert found.growth == pytest.approx(batch + stored, rel=0.15), "a batch, the weights, their gradients"


@pytest.mark.parametrize(
    "recipe", ["resnet50-mobilenetv1/lkd", "resnet34-resnet18/lkd", "resnet34-resnet18/meta-train"]
)
def test_the_committed_plans_are_what_the_command_says(recipe: str) -> None:
    pair, method = recipe.split("/")
    files = [str(ROOT / "configs/imagenet" / name) for name in (f"{pair}.yaml", f"methods/{method}.yaml")]
    assert main(["plan", *files, "--out", "out"]) == 0
    committed = ROOT / "docs" / "plans" / recipe
    assert equal(read_json(Path("out/plan.json")), read_json(committed / "plan.json"))
    assert Path("out/plan.txt").read_text().splitlines()[0] == (committed / "plan.txt").read_text().splitlines()[0]


def equal(found, expected) -> bool:
    """Two plans, whose numbers may differ by what releases of torch do."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, float | int):
        return found == pytest.approx(expected, rel=0.05)
    return found == expected


SMALL = [
    "--data.name",
    "cifar10",
    "--data.train_size",
    "0",
    "--teacher.name",
    "small_resnet",
    "--student.name",
    "small_cnn",
]


def test_slow_loading_and_little_memory_are_warned_of(capsys) -> None:
    words = [*SMALL, "--data.name", "image_folder", "--train.batch_size", "40000", "--gpu", "rtx_4090", "--cores", "1"]
    assert main(["plan", *words]) == 0
    text = capsys.readouterr().out
    assert "WARNING" in text
    assert "loading is the bottleneck: 1 cores decode 500 images/s" in text
    assert "memory: a step of training needs" in text


def test_more_gpus_share_the_batch_and_the_hours(capsys) -> None:
    for gpus in ("1", "4"):
        assert main(["plan", *SMALL, "--train.batch_size", "32768", "--gpus", gpus, "--out", gpus]) == 0
    one, four = (json.loads(Path(name, "plan.json").read_text()) for name in ("1", "4"))
    assert four["hours"]["training"] == pytest.approx(one["hours"]["training"] / 4, rel=0.3)
    assert four["memory_gigabytes"]["a step of training"] < one["memory_gigabytes"]["a step of training"] / 3
    assert one["cache"]["gigabytes"] == pytest.approx(46_000 * 8 * 10 * 2 / 1e9)


def test_a_meta_training_is_the_sum_of_its_parts(capsys) -> None:
    words = [
        "--meta.outer_steps",
        "6",
        "--meta.rollout_steps",
        "2",
        "--meta.reuse_every",
        "4",
        "--meta.reuse_epochs",
        "2",
    ]
    words += ["--meta.students_per_step", "3", "--meta.estimator", "first_order", "--train.epochs", "8"]
    words += ["--pool.students", "5", "--pool.max_age", "0.4"]
    assert main(["plan", *SMALL, *words, "--out", "o"]) == 0
    plan = read_json(Path("o/plan.json"))
    assert plan["command"] == "meta-train"
    training = plan["hours_of_one_training"]
    assert plan["hours"]["pool"] == pytest.approx(5 * 0.4 * training)
    assert plan["hours"]["reuse"] == pytest.approx(3 * 2 / 8 * training), "looks before step 0 and 4, and after step 6"
    assert plan["hours"]["outer steps"] == pytest.approx(6 * 3 * plan["rollout"]["first_order"]["seconds"] / 3600)
    assert plan["gpu_hours"] == pytest.approx(sum(plan["hours"].values()))
    assert "hypergradient by first_order" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--balance", "dynamik"], "balance: unknown name 'dynamik'"),
        (["--efficiency", "1.5"], "efficiency: 1.5 is not"),
        (["--gpus", "3"], "train.batch_size: 64 does not divide among 3 gpus"),
        (["--decode_rate", "0"], "decode_rate: 0 cannot be measured without data.root"),
        (["--gpu", "h900"], "h900"),
        (["--train.batch_size", "60000"], "train.batch_size: 60000 is not between 1 and the 46000 training images"),
        (["--meta.estimator", "magic"], "meta.estimator: unknown name 'magic'"),
    ],
)
def test_mistakes_are_one_line(words: list[str], message: str, capsys) -> None:
    assert main(["plan", *SMALL, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
