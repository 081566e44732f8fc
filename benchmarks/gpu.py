"""Check and time on a GPU what was only run on a CPU: `python -m benchmarks.gpu OUT [--short]` (at most 8 minutes).

Checks are in the order of their use; each writes its figures, or what was wrong, as soon as it has them, and those
that find no time left say so. `--short` takes small networks and few steps, compiles nothing, runs on a CPU too, and
shows only that all checks run. Shares of a step's time are those of `StepClock`; times are medians, in turn where they
are compared.
"""

import argparse
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # earlier torch wants it for deterministic kernels

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))  # the other benchmarks import each other so

import lkd
from benchmarks.hypergradient_problem import Benchmark
from benchmarks.loss_speed import TRUST, differentiate
from benchmarks.photographs import write_folder
from lkd.config import DataRecipe, TeacherRecipe, TrainRecipe
from lkd.config.evaluation import PlanRecipe
from lkd.config.parts import ModelRecipe
from lkd.core.files import environment, write_json
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import digest, load_checkpoint, save_checkpoint
from lkd.data import Batches, ImageSet
from lkd.evaluation.plan import plan
from lkd.losses import KDLoss
from lkd.losses.loss import DistillationLoss
from lkd.models import build
from lkd.models.teacher import Teacher
from lkd.tracking.run import choose_device, evidence
from lkd.training.build import prepare_images
from lkd.training.throughput import PARTS
from lkd.training.training import Training
from meta import Problem, State, stack_students
from meta.estimators import adjoint, first_order, higher
from meta.tensors import cosine_similarity

SECONDS = 450.0  # of the eight minutes; the last check may go on a little
Figures = dict[str, float]


@dataclass(frozen=True)
class Bench:
    """Where checks run, and how large they are."""

    device: torch.device
    short: bool
    teacher: str = "resnet50"
    student: str = "mobilenetv1_100"
    pixels: int = 224
    batch_size: int = 256
    classes: int = 1000
    steps: int = 12

    @property
    def repeats(self) -> int:
        return 1 if self.short else 7

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def time_in_turn(self, calls: Mapping[str, Callable[[], object]]) -> Figures:
        """Median seconds of each call, after one that is thrown away."""
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        for repeat in range(0 if self.short else -1, self.repeats):
            for name, call in calls.items():
                self.synchronize()
                started = time.perf_counter()
                call()
                self.synchronize()
                if repeat >= 0:
                    seconds[name].append(time.perf_counter() - started)
        return {name: median(each) for name, each in seconds.items()}

    def make_images(self) -> ImageSet:
        """Random images in memory."""
        generator, count = torch.Generator().manual_seed(0), 2 * self.batch_size
        shape = (count, 3, self.pixels, self.pixels)
        pixels = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
        labels = torch.arange(count) % self.classes
        names = tuple(map(str, range(self.classes)))
        return ImageSet(pixels, labels, torch.arange(count), names, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))

    def start(
        self,
        loss: DistillationLoss,
        images: ImageSet | None = None,
        augmentation: str = "none",
        steps: int | None = None,
        **changes: Any,
    ) -> Training:
        """A training of the pair; in float32 unless `changes` of its recipe say otherwise."""
        torch.manual_seed(0)
        usual = {"epochs": 1000, "batch_size": self.batch_size, "learning_rate": 0.01, "precision": "float32"}
        recipe = TrainRecipe(**(usual | changes))
        images = images or self.make_images()
        networks = [build(name, images.num_classes).to(self.device) for name in (self.teacher, self.student)]
        batches = Batches(images, self.batch_size, 0, augmentation, self.device, steps=steps)
        return Training(networks[1], loss, Teacher(networks[0], recipe.compile, recipe.channels_last), batches, recipe)

    def load_universal(self) -> DistillationLoss:
        """The loss that ships, told trust."""
        loss: DistillationLoss = lkd.load_loss("universal", TRUST)
        return loss.requires_grad_(False).to(self.device)

    def draw_logits(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of student and teacher, and labels."""
        student, teacher = 3 * torch.randn(2, self.batch_size, self.classes, device=self.device)
        return student, teacher, torch.arange(self.batch_size, device=self.device) % self.classes


def require(holds: bool, what: str) -> None:
    if not holds:
        raise AssertionError(what)


def first_loss(training: Training) -> float:
    return float(sum(training.run_step().values()))


# ----------------------------------------------------------------------------------------------------------------------
# The checks. Each returns figures, and raises what does not hold.


def check_learned_loss(bench: Bench) -> Figures:
    """The loss on the device gives what it gives in float64 on a CPU; its time over KD's, eager and compiled."""
    student, teacher, target = bench.draw_logits()
    loss, kd = bench.load_universal(), KDLoss(0.5, 4.0)

    def gradient(device: str | torch.device, dtype: torch.dtype) -> Tensor:
        leaf = student.to(device, dtype).requires_grad_()
        module = lkd.load_loss("universal", TRUST).requires_grad_(False).to(device, dtype)
        terms = module(Outputs(leaf, {}), Outputs(teacher.to(device, dtype), {}), target.to(device), 0.3)
        return torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaf)[0].double().cpu()

    exact = gradient("cpu", torch.float64)
    error = float((gradient(bench.device, torch.float32) - exact).norm() / exact.norm())
    require(error < 1e-4, f"gradient of the learned loss is off by {error:.1e}")
    kinds: dict[str, Callable[..., Any]] = {"universal": loss, "kd": kd}
    kinds |= {"universal_compiled": torch.compile(loss), "kd_compiled": torch.compile(kd)}
    times = bench.time_in_turn(
        {name: partial(differentiate, f, student, teacher, target, 0.3) for name, f in kinds.items()}
    )
    found = {"logit_loss_error": error, "logit_loss_ms": 1e3 * times["universal"]}
    for kind in ("", "_compiled"):
        found[f"logit_loss_vs_kd{kind}"] = times[f"universal{kind}"] / times[f"kd{kind}"]
    return found


def check_step(bench: Bench) -> Figures:
    """Shares of a step with the learned loss: synthetic images, and decoded ones; images a second."""
    found: Figures = {}
    with TemporaryDirectory() as folder:
        count = 8 if bench.short else 1024
        root = write_folder(Path(folder) / "images", 4, count // 4, 2)
        recipe = DataRecipe("image_folder", str(root), meta_validation_size=4, image_size=bench.pixels)
        kinds = {
            "synthetic": (bench.make_images(), "none"),
            "decoded": (prepare_images(recipe).train, "random_resized_crop"),
        }
        for kind, (images, augmentation) in kinds.items():
            changes: dict[str, Any] = {} if bench.short else {"precision": "bfloat16", "channels_last": True}
            training = bench.start(bench.load_universal(), images, augmentation, bench.steps, **changes)
            for step in range(bench.steps):
                if step == 3 or bench.short:
                    bench.synchronize()
                    training.clock.start()
                    before, started = dict(training.clock.seconds), time.perf_counter()
                training.run_step()
            bench.synchronize()
            training.clock.start()
            seconds = {part: training.clock.seconds[part] - before[part] for part in PARTS}
            found |= {f"share_{part}_{kind}": value / (sum(seconds.values()) or 1.0) for part, value in seconds.items()}
            steps = 1 if bench.short else bench.steps - 3
            found[f"images_per_second_{kind}"] = steps * bench.batch_size / (time.perf_counter() - started)
    return found


def check_memory(bench: Bench) -> Figures:
    """Peak memory of a step against that of `lkd plan`."""
    if bench.short or bench.device.type != "cuda":
        return {}
    data = DataRecipe("image_folder", image_size=bench.pixels, augmentation="random_resized_crop")
    train = TrainRecipe(1, bench.batch_size, precision="float32")
    networks = {"student": ModelRecipe(bench.student), "teacher": TeacherRecipe("random", bench.teacher)}
    planned = plan(PlanRecipe(data=data, train=train, **networks))["memory_gigabytes"]["a step of training"]  # type: ignore[arg-type]
    training = bench.start(bench.load_universal())
    training.run_step()
    torch.cuda.reset_peak_memory_stats(bench.device)
    training.run_step()
    peak = torch.cuda.max_memory_allocated(bench.device) / 1e9
    return {"peak_gigabytes": peak, "peak_vs_plan": peak / planned}


def check_precisions(bench: Bench) -> Figures:
    """A step in bfloat16 and float16, and with the channels last, has the loss of float32, and is timed beside it."""
    kinds: dict[str, dict[str, Any]] = {
        "float32": {},
        "channels_last": {"channels_last": True},
        "bfloat16": {"precision": "bfloat16", "channels_last": True},
    }
    if bench.device.type == "cuda":
        kinds["float16"] = {"precision": "float16", "channels_last": True}
    trainings = {name: bench.start(bench.load_universal(), **changes) for name, changes in kinds.items()}
    losses = {name: first_loss(training) for name, training in trainings.items()}
    for name, value in losses.items():
        allowed = 1e-3 if name == "channels_last" else 0.05
        difference = abs(value / losses["float32"] - 1)
        require(difference < allowed, f"the loss in {name} is off by {difference:.1%}")
    times = bench.time_in_turn({name: training.run_step for name, training in trainings.items()})
    return {f"step_{name}_vs_float32": times[name] / times["float32"] for name in kinds if name != "float32"}


def check_compiled(bench: Bench) -> Figures:
    """A training with student and teacher compiled has the losses of one without, and is timed beside it."""
    changes: dict[str, Any] = {} if bench.short else {"precision": "bfloat16", "channels_last": True}
    plain, compiled = (bench.start(bench.load_universal(), compile=each, **changes) for each in (False, True))
    started = time.perf_counter()
    pairs = [(first_loss(compiled), first_loss(plain)) for _ in range(3)]
    seconds = time.perf_counter() - started
    off = max(abs(ours / theirs - 1) for ours, theirs in pairs)
    require(off < (0.05 if changes else 1e-3), f"the loss of a compiled training is off by {off:.1%}")
    times = bench.time_in_turn({"plain": plain.run_step, "compiled": compiled.run_step})
    return {"step_compiled_vs_plain": times["compiled"] / times["plain"], "compile_seconds": seconds}


def check_prefetch(bench: Bench) -> Figures:
    """Batches that come through pinned memory are those of a CPU."""
    with TemporaryDirectory() as folder:
        root = write_folder(Path(folder) / "images", 4, 8, 2)
        images = prepare_images(DataRecipe("image_folder", str(root), meta_validation_size=4, image_size=64)).train
        ours, theirs = (
            Batches(images, 8, 0, "random_resized_crop", device, steps=6)
            for device in (bench.device, torch.device("cpu"))
        )
        off = 0.0
        for step in range(6):
            there, here = ours.at(step), theirs.at(step)
            require(torch.equal(there.index.cpu(), here.index), "a batch has other images")
            off = max(off, float((there.images.cpu() - here.images).abs().max()))
    require(off < 1e-5, f"pixels are off by {off:.1e}")
    return {"prefetch_error": off}


def check_resume(bench: Bench) -> Figures:
    """A training that is saved, and goes on from the file, has the bits of one that was not; deterministic kernels."""
    small = replace(bench, batch_size=min(bench.batch_size, 32), pixels=min(bench.pixels, 64))
    torch.use_deterministic_algorithms(True, warn_only=False)
    try:
        start = partial(small.start, small.load_universal(), precision="float32" if bench.short else "bfloat16")
        whole, first, second = start(), start(), start()
        for _ in range(4):
            whole.run_step()
        for _ in range(2):
            first.run_step()
        with TemporaryDirectory() as folder:
            save_checkpoint(Path(folder) / "x", first.state_dict())
            second.load_state_dict(load_checkpoint(Path(folder) / "x"))
        for _ in range(2):
            second.run_step()
        same = digest(whole.state_dict()) == digest(second.state_dict())
    finally:
        torch.use_deterministic_algorithms(False)
    require(same, "a training that went on from a checkpoint has other bits")
    return {"resumed_to_the_bit": 1.0}


def check_averages(bench: Bench) -> Figures:
    """The average over the last epochs is the mean of their weights, counts of BatchNorm included."""
    small = replace(bench, batch_size=min(bench.batch_size, 32), pixels=min(bench.pixels, 64))
    training = small.start(small.load_universal(), epochs=3, swa_epochs=2)
    kept = []
    for _ in range(3):
        for _ in range(training.batches.steps_per_epoch):
            training.run_step()
        kept.append({name: tensor.clone() for name, tensor in training.student.state_dict().items()})
    off = 0.0
    for name, tensor in training.result.state_dict().items():
        mean = torch.stack([each[name].double() for each in kept[1:]]).mean(0)
        off = max(off, float((tensor - mean).abs().max() / mean.abs().max().clamp_min(1)))
    require(off < (1e-5 if bench.short else 1e-4), f"the average over epochs is off by {off:.1e}")
    return {"average_error": off}


def check_hypergradients(bench: Bench) -> Figures:
    """`first_order`, `adjoint` and stacked rollouts: as near to float64 as `higher` is, and timed beside it."""
    steps, students = (1, 2) if bench.short else (20, 4)
    problems = [move(Benchmark(8, steps, seed).problem, bench.device) for seed in range(students)]
    exact = adjoint(move(Benchmark(8, steps, 0, dtype=torch.float64).problem, bench.device)).grads
    found = {}
    for name, estimate, least in (
        ("higher", higher, 0.99),
        ("adjoint", adjoint, 0.99),
        ("first_order", first_order, 0.98),
    ):
        found[f"cosine_{name}"] = cosine_similarity(estimate(problems[0]).grads, exact)
        require(found[f"cosine_{name}"] > least, f"{name} has a cosine of {found[f'cosine_{name}']:.3f} to float64")
    calls = {
        "higher": partial(higher, problems[0]),
        "adjoint": partial(adjoint, problems[0]),
        "first_order": partial(first_order, problems[0]),
        "stacked": partial(first_order, stack_students(problems)),
        "compiled": partial(first_order, replace(problems[0], inner_loss=torch.compile(problems[0].inner_loss))),
    }
    times = bench.time_in_turn(calls)
    times["stacked"] /= students
    return found | {f"{name}_vs_higher": times[name] / times["higher"] for name in times if name != "higher"}


def move(problem: Problem, device: torch.device) -> Problem:
    """The problem on a device, its student too (whose buffers the loss is given)."""

    def there(tree: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: tensor.to(device) for name, tensor in tree.items()}

    state = State(there(problem.state.parameters), there(problem.state.buffers), {})
    batches = [tuple(tensor.to(device) for tensor in batch) for batch in [*problem.inner_batches, problem.outer_batch]]
    return replace(
        problem, state=state, hyper=there(problem.hyper), inner_batches=batches[:-1], outer_batch=batches[-1]
    )


def check_graph(bench: Bench) -> Figures:
    """Forward and backward of the learned loss as one CUDA graph: the same gradient, and its time."""
    if bench.device.type != "cuda":
        return {}
    student, teacher, target = bench.draw_logits()
    loss, progress = bench.load_universal(), torch.tensor(0.3, device=bench.device)
    leaf = student.clone().requires_grad_()

    def compute() -> Tensor:
        terms = loss(Outputs(leaf, {}), Outputs(teacher, {}), target, progress)
        return torch.autograd.grad(torch.stack(list(terms.values())).sum(), leaf)[0]

    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            eager = compute()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = compute()
    graph.replay()
    bench.synchronize()
    off = float((captured - eager).norm() / eager.norm())
    require(off < 1e-5, f"the captured gradient is off by {off:.1e}")
    times = bench.time_in_turn({"eager": compute, "graph": graph.replay})
    return {"graph_vs_eager": times["graph"] / times["eager"], "graph_ms": 1e3 * times["graph"]}


CHECKS: list[Callable[[Bench], Figures]] = [
    check_learned_loss,
    check_step,
    check_precisions,
    check_resume,
    check_averages,
    check_memory,
    check_prefetch,
    check_graph,
    check_hypergradients,
    check_compiled,
]


def run_checks(bench: Bench, out: Path, checks: list[Callable[[Bench], Figures]] = CHECKS) -> dict[str, str]:
    """Run the checks; what was wrong, by check."""
    figures: Figures = {}
    wrong: dict[str, str] = {}
    started = time.perf_counter()
    for check in checks:
        name, before = check.__name__, time.perf_counter()
        try:
            if before - started > SECONDS:
                raise TimeoutError("no time left")
            figures |= check(bench)
        except Exception as error:  # the others are to run all the same
            wrong[name] = f"{type(error).__name__}: {error}"
            traceback.print_exc()
        print(f"{name}: {time.perf_counter() - before:.0f} s, {wrong.get(name, 'holds')}", flush=True)
        device = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else bench.device.type
        rounded = {key: float(f"{value:.4g}") for key, value in figures.items() if math.isfinite(value)}
        result = evidence("python -m benchmarks.gpu", environment(), rounded)
        write_json(out / "result.json", result | {"device": device, "wrong": wrong})
    return wrong


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--short", action="store_true", help="small networks and few steps")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args(words)
    device = choose_device(options.device)
    small = {"teacher": "small_resnet", "student": "tiny_cnn", "pixels": 32, "batch_size": 4, "classes": 10, "steps": 2}
    bench = Bench(device, options.short, **(small if options.short else {}))  # type: ignore[arg-type]
    options.out.mkdir(parents=True, exist_ok=True)
    with torch.compiler.set_stance("force_eager" if options.short else "default"):
        return int(bool(run_checks(bench, options.out)))


if __name__ == "__main__":
    sys.exit(main())
