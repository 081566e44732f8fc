"""Plans: counts against hand computations, memory against a measured training, and the committed plans again."""

import ctypes
import multiprocessing
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lkd.cli import main
from lkd.config import (
    DataRecipe,
    DistillRecipe,
    MetaSettings,
    MetaTrainRecipe,
    ModelRecipe,
    PlanRecipe,
    TeacherRecipe,
    TrainRecipe,
)
from lkd.core.files import read_json
from lkd.data import Batches, ImageSet
from lkd.data.readers import load_embedded
from lkd.evaluation.comparison.trials import Cost
from lkd.evaluation.plan import (
    GPUS,
    LENGTHS,
    Counted,
    count_hypergradient,
    count_images,
    count_rollout,
    count_step,
    open_world,
)
from lkd.losses import KDLoss
from lkd.models.build import build
from lkd.models.teacher import Teacher
from lkd.training.throughput import OperationCounter
from lkd.training.training import Training
from tests.processes import FORK_SERVER

ROOT = Path(__file__).parents[2]
SMALL = ["--data.name", "cifar10", "--data.augmentation", "flip_and_crop", "--teacher.name", "small_resnet"]


def make_recipe(**fields) -> PlanRecipe:
    recipe = PlanRecipe(
        data=DataRecipe(name="cifar10", augmentation="flip_and_crop"),
        teacher=TeacherRecipe(name="small_resnet"),
        gpu="a100_sxm_80gb",
    )
    return replace(recipe, **fields)


def count(student: str, loss: str = "kd", image_size: int = 0, **train) -> Counted:
    recipe = make_recipe(train=TrainRecipe(**{"batch_size": 8, "precision": "float32"} | train))
    if image_size:
        recipe.data = DataRecipe(name="image_folder", image_size=image_size, augmentation="random_resized_crop")
    return count_step(open_world(replace(recipe, student=ModelRecipe(student), loss=loss), False))


def multiply_adds(network: nn.Module, images: torch.Tensor) -> list[int]:
    """Of every convolution and linear layer, by its definition: outputs × inputs of each."""
    found: list[int] = []

    def add(module: nn.Module, inputs, output) -> None:
        each = module.in_features if isinstance(module, nn.Linear) else module.weight[0].numel()
        found.append(output.numel() * each)

    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(add)
    network(images)
    return found


def test_flops_are_those_of_the_definition() -> None:
    """Forward, and twice that backward, but for the gradient of the images; convolutions by channel too."""
    student, images = "small_mobilenet", torch.zeros(8, 3, 32, 32)
    step = count(student)
    forward = multiply_adds(build(student, 10, 3), images)
    assert step.flops["student"] == 2 * (3 * sum(forward) - forward[0])
    assert step.flops["teacher"] == 2 * sum(multiply_adds(build("small_resnet", 10, 3), images))
    assert step.parameters["student"] == sum(p.numel() for p in build(student, 10, 3).parameters())
    assert 0 < step.seconds["loss"] < step.seconds["student"]


def test_parts_of_a_batch_take_the_work_of_the_whole() -> None:
    """The teacher is asked about all of it at once, and what is backward in each part is the student's."""
    whole, parts = (count("small_cnn", batch_size=32, accumulation=parts) for parts in (1, 4))
    assert parts.flops == whole.flops
    assert parts.seconds["teacher"] == whole.seconds["teacher"]


def test_a_known_network_has_its_known_flops_and_bfloat16_takes_half_the_memory() -> None:
    wide, narrow = (
        count("resnet18", "cross_entropy", 224, batch_size=64, precision=precision) for precision in ("float32", "auto")
    )
    assert wide.flops["student"] / 64 == pytest.approx(3 * 2 * 1.814e9, rel=0.03), "1.81 G multiply-adds"
    assert 0.5 < narrow.peak / wide.peak < 0.65
    assert narrow.seconds["student"] < 0.6 * wide.seconds["student"]


def measure_peak(pipe) -> None:
    """Peak memory of a training above what weights take before it starts, MiB; in a process of its own."""
    ctypes.CDLL(None).mallopt(-3, 2**18)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    torch.set_num_threads(1)
    pixels, labels = torch.zeros(96, 3, 64, 64, dtype=torch.uint8), torch.zeros(96).long()
    images = ImageSet(pixels, labels, torch.arange(96), tuple(map(str, range(1000))), (0.5,) * 3, (0.5,) * 3)

    def start(size: int) -> Training:
        teacher = Teacher(build("small_resnet", 1000, 3))
        train = TrainRecipe(3, size)
        return Training(build("resnet18", 1000, 3), KDLoss(), teacher, Batches(images, size, 0), train)

    start(2).run_step()
    training = start(24)
    cost = Cost(torch.device("cpu"))
    with cost.measured():
        for _ in range(2):
            training.run_step()
    pipe.send(cost.peak_mib)


@pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")
def test_the_planned_peak_is_the_measured_one() -> None:
    ours, theirs = multiprocessing.Pipe()
    process = FORK_SERVER.Process(target=measure_peak, args=(theirs,))
    process.start()
    step = count("resnet18", image_size=64, batch_size=24)
    there_before = 4 * (step.parameters["student"] + step.parameters["teacher"])
    assert (step.peak - there_before) / 2**20 == pytest.approx(ours.recv(), rel=0.15)
    process.join()


def test_long_rollouts_lie_on_the_line_of_short_ones() -> None:
    estimator, length = "unrolled", 5
    recipe = make_recipe(student=ModelRecipe("small_cnn"), train=TrainRecipe(batch_size=16))
    recipe.meta = MetaSettings(rollout_steps=length, outer_batch_size=16)
    recipe.teacher.name = "tiny_cnn"
    world = open_world(recipe, True)
    found = count_hypergradient(world, estimator)
    flops, seconds, *peaks = count_rollout(world, estimator, length)
    assert max(LENGTHS) < length
    assert found.flops[estimator] == pytest.approx(flops, rel=0.01)
    assert found.seconds[estimator] == pytest.approx(seconds, rel=0.05)
    assert found.peak == pytest.approx(max(peaks), rel=0.1)


def test_a_committed_plan_is_what_the_command_says() -> None:
    """One of those that docs/plan.md makes."""
    folder = ROOT / "configs" / "imagenet"
    words = [str(folder / "resnet50-mobilenetv1.yaml"), str(folder / "methods" / "lkd.yaml")]
    assert main(["plan", *words, "--out", "out"]) == 0
    committed = ROOT / "docs" / "plans" / "resnet50-mobilenetv1" / "lkd"
    assert equal(read_json(Path("out/plan.json")), read_json(committed / "plan.json"))
    assert Path("out/plan.txt").read_text().splitlines()[0] == (committed / "plan.txt").read_text().splitlines()[0]


def equal(found, expected) -> bool:
    """Two plans, whose numbers may differ by what releases of torch do."""
    if isinstance(expected, dict):
        return found.keys() == expected.keys() and all(equal(found[key], expected[key]) for key in expected)
    if isinstance(expected, float | int):
        return found == pytest.approx(expected, rel=0.05)
    return found == expected


def plan(*words: str) -> dict:
    assert main(["plan", *SMALL, "--student.name", "small_cnn", *words, "--out", "out"]) == 0
    return read_json(Path("out/plan.json"))


def test_slow_loading_and_little_memory_are_warned_of(capsys) -> None:
    words = ["--data.name", "image_folder", "--train.batch_size", "40000", "--gpu", "rtx_4090", "--cores", "1"]
    loading, memory = sorted(plan(*words)["warnings"])
    assert loading.startswith("loading is the bottleneck: the cores decode 500 images/s")
    assert memory.startswith("memory: a step of training needs")
    assert "WARNING" in capsys.readouterr().out
    packed = plan(*words, "--data.packed", "there")
    assert [warning[:6] for warning in packed["warnings"]] == ["memory"], "what is packed is not decoded"


def test_networks_that_redraw_weights_are_planned() -> None:
    """As torch's truncated normal does, while any of them is out of bounds."""
    with FakeTensorMode(allow_non_fake_inputs=True), OperationCounter():
        build("googlenet", 10)


def test_products_of_float32_take_no_tensor_cores() -> None:
    seconds = {}
    for dtype in (torch.bfloat16, torch.float32):
        with FakeTensorMode(), GPUS["h100_sxm"].build_counter("float32") as counter:
            torch.nn.functional.linear(*(torch.empty(8192, 4096, dtype=dtype) for _ in range(2)))
        seconds[dtype] = counter.since_lap[1]
    assert seconds[torch.float32] / seconds[torch.bfloat16] == pytest.approx(494.7 / 66.9, rel=1e-3)


def test_mixed_images_are_planned_without_a_cache() -> None:
    assert "cache" not in plan("--loss", "kd", "--data.mixup", "0.8")


def test_hours_are_of_the_part_of_the_datasheet_s_rates_that_is_reached() -> None:
    half, all_of_it = (plan("--loss", "kd", "--efficiency", part)["hours"]["training"] for part in ("0.5", "1"))
    assert all_of_it == pytest.approx(half / 2)


def test_gpus_share_batch_and_hours_and_a_cache_saves_the_teacher() -> None:
    one, four = (plan("--train.batch_size", "32768", "--loss", "kd", "--gpus", gpus) for gpus in ("1", "4"))
    assert four["hours"]["training"] == pytest.approx(one["hours"]["training"] / 4, rel=0.3)
    assert four["memory_gigabytes"]["a step of training"] < one["memory_gigabytes"]["a step of training"] / 3
    assert one["cache"]["gigabytes"] == pytest.approx(45_000 * 8 * 10 * 2 / 1e9)
    cached = plan("--train.batch_size", "32768", "--loss", "kd", "--teacher.cache", "answers")
    assert "teacher" not in cached["step"]
    saved = one["cache"]["saved_hours_of_another_training"]
    assert cached["hours"]["training"] == pytest.approx(one["hours"]["training"] - saved, rel=0.02)


def test_cross_entropy_asks_no_teacher_and_a_cache_is_of_the_recipes_augmentations() -> None:
    assert "teacher" not in plan("--train.batch_size", "512", "--loss", "cross_entropy")["step"]
    own = plan("--train.batch_size", "512", "--loss", "kd", "--data.augmentation_seeds", "4")
    assert own["cache"]["augmentation_seeds"] == 4


def test_a_teacher_that_is_asked_about_each_image_once_works_in_no_step(capsys) -> None:
    plain, words = ("--data.augmentation", "none", "--train.batch_size", "512"), ("--teacher.cache", "answers")
    cached = plan("--train.batch_size", "512", "--loss", "kd", *words)
    tabulated = plan(*plain, "--loss", "kd")
    assert "cache" not in tabulated, "there is nothing to save"
    assert tabulated["step"] == cached["step"]
    features = (*plain, "--loss", "sp", "--data.train_size")
    assert "teacher" in plan(*features, "40000")["step"], "their features are too large to be kept"
    assert plan(*features, "1000")["step"].keys() == {"student", "loss"}
    meta = ("--meta.rollout_steps", "2", "--meta.estimator", "first_order")
    rollouts = [plan(*own, *meta)["rollout"] for own in (plain, ("--train.batch_size", "512", *words))]
    assert rollouts[0] == rollouts[1]
    assert main(["plan", *SMALL, *words, "--loss", "fitnet"]) == 2
    assert "teacher.cache: holds logits alone" in capsys.readouterr().err


def test_worlds_take_what_they_take_whatever_their_order() -> None:
    worlds = {"still": "{data: {augmentation: none}}", "moving": "{data: {augmentation: flip_and_crop}}"}
    found = [
        plan("--worlds", f"{{{', '.join(f'{name}: {worlds[name]}' for name in order)}}}", "--meta.outer_steps", "1")
        for order in (("still", "moving"), ("moving", "still"))
    ]
    assert found[0]["hours_of_one_training"] == pytest.approx(found[1]["hours_of_one_training"])
    alone = plan("--worlds", f"{{moving: {worlds['moving']}}}", "--meta.outer_steps", "1")["hours_of_one_training"]
    assert found[0]["hours_of_one_training"] < alone, "the teacher's answers are kept of images that stay the same"


def test_a_meta_training_is_the_sum_of_its_parts_in_every_world() -> None:
    worlds = "{few: {data: {train_size: 6000}, train: {epochs: 9}}, tiny: {student: {name: tiny_cnn}}}"
    words = "--meta.outer_steps 6 --meta.rollout_steps 2 --meta.reuse_every 4 --meta.reuse_epochs 2 --train.epochs 8 "
    words += "--meta.reuse_students 3 --meta.estimator first_order --pool.students 5 --pool.max_age 0.4"
    differences = ("--data.train_size 6000 --train.epochs 9", "--student.name tiny_cnn")
    words += " --teacher.name tiny_cnn"
    alone = [plan(*words.split(), "--meta.students_per_step", "3", *own.split()) for own in differences]
    for found, epochs in zip(alone, (9, 8), strict=True):
        training, hours = found["hours_of_one_training"], found["hours"]
        assert found["command"] == "meta-train"
        assert hours["pool"] == pytest.approx(5 * 0.4 * training)
        looks = 3  # before step 0 and 4, and after step 6
        assert hours["reuse"] == pytest.approx(looks * 3 * 2 / epochs * training), "three students in each"
        assert hours["outer steps"] == pytest.approx(6 * 3 * found["rollout"]["first_order"]["seconds"] / 3600)
        assert found["gpu_hours"] == pytest.approx(sum(hours.values()))
        assert "a hypergradient by first_order" in found["memory_gigabytes"]
    fresh = plan(*words.split(), "--pool.snapshots", "1", "--pool.sampling", "live", "--pool.refresh_every", "2")
    assert fresh["hours"]["pool"] == 0, "students of age 0 are not trained"
    words += " --meta.students_per_step 0 --meta.reference kd"
    found, sums = plan(*words.split(), "--worlds", worlds), {}
    for part in alone[0]["hours"]:
        sums[part] = sum(each["hours"][part] for each in alone)
    assert found["hours_of_one_training"] == pytest.approx(sum(each["hours_of_one_training"] for each in alone) / 2)
    assert found["steps"] == sum(each["steps"] for each in alone)
    assert found["hours"]["pool"] == pytest.approx(sums["pool"])
    assert found["hours"]["reuse"] == pytest.approx(sums["reuse"] * (looks + 1) / looks), "and the reference's"
    assert found["hours"]["outer steps"] == pytest.approx(sums["outer steps"] / 3), "one student in each world"
    assert main(["plan", *SMALL, "--worlds", "{far: {data: {name: npz/far}}}"]) == 2


def test_students_that_a_loss_alternates_with_are_in_float32() -> None:
    words = "--meta.outer_steps 2 --meta.rollout_steps 2 --meta.reuse_every 0 --train.batch_size 4096"
    kinds = (), ("--train.precision", "float32"), ("--train.accumulation", "4")
    alternating = ("--meta.interleaving", "alternate", "--meta.students_per_step", "3", "--loss", "kd")
    found = [plan(*words.split(), *alternating, *kind) for kind in kinds]
    expected = 3 * found[1]["hours_of_one_training"]
    assert [each["hours"]["own students"] for each in found] == pytest.approx([expected] * 3)
    assert expected > 3 * found[0]["hours_of_one_training"]
    assert found[0]["rollout"].keys() == {"first_order"}, "nothing else walks a tape back"


def test_any_recipe_of_both_commands_is_planned() -> None:
    ours, *theirs = ({field.name for field in fields(kind)} for kind in (PlanRecipe, DistillRecipe, MetaTrainRecipe))
    assert not set.union(*theirs) - ours
    plain = plan("--loss", "kd")
    assert plan("--loss", "kd", "--train.precision", "float16")["precision"] == "float16"
    weighted = plan(
        *("--loss", '{"name": "influence_weighted", "loss": {"name": "kd"}}'),
        *("--labelled_size", "4000", "--student.path", "no.pth", "--student.new_head", "true"),
    )
    assert weighted["step"] == plain["step"]
    scaled = plan("--loss", "kd", "--teacher.image_size", "64")["step"]
    assert scaled["teacher"]["gflops_an_image"] == pytest.approx(4 * plain["step"]["teacher"]["gflops_an_image"], 0.02)
    assert scaled["student"]["gflops_an_image"] == plain["step"]["student"]["gflops_an_image"]


def test_known_data_sets_are_of_the_size_that_they_are() -> None:
    for name, there in (("unseen", len(load_embedded().train)), ("rest", 60_000 - len(load_embedded().train))):
        _, count, _ = count_images(DataRecipe(f"fashion_mnist_{name}", meta_validation_size=100))
        assert count == there - 100
    tail = DataRecipe("cifar10", train_size=10_000, imbalance=100)
    assert count_images(tail)[1] == pytest.approx(10_000, abs=10), "of 45,000 there are enough of each class"
    long = 4500 * sum(100 ** -(label / 9) for label in range(10))
    assert count_images(replace(tail, train_size=0))[1] == pytest.approx(long, abs=10)


@pytest.mark.parametrize(
    ("words", "field"),
    [
        (["--gpus", "3"], "train.batch_size: 64 "),
        (["--gpu", "h900"], "gpu"),
        (["--train.batch_size", "60000"], "train.batch_size: 60000 "),
        (["--data.train_size", "60000"], "data.train_size + data.meta_validation_size: 60000 "),
    ],
)
def test_mistakes_are_one_line(words: list[str], field: str, capsys) -> None:
    assert main(["plan", *SMALL, *words]) == 2
    error = capsys.readouterr().err.strip()
    assert field in error
    assert "\n" not in error
