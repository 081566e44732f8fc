"""Compare exact adjoints with higher: `python benchmarks/adjoint_speed.py [OUT]` (needs the extra `bench`).

`adjoint`, which takes Hessian and mixed products by double backward, and the same walk with both by forward over
reverse (jvp of the gradient; Kemaev et al., ICML 2025, arXiv 2505.00793), which the package does not have since it is
nowhere faster. All in turn in one process, one thread, processor time, medians; FLOPs are counted; peaks are of
processes of their own, as in hypergradient.py. A row of a CSV file in the output folder is not measured again.
"""

import argparse
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hypergradient
import torch
from hypergradient_problem import CLASSES, ENGINES, Benchmark
from rows import matching, median, write_row
from speed_report import OUT, record
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from lkd.core.files import read_mapping
from meta import Hypergradient, Problem
from meta.estimators import adjoint, first_order, higher
from meta.randomness import replaying
from meta.rollout import drop_missing, take_inner_loss
from meta.tensors import Tensors, cosine_similarity
from meta.trajectory import Step

STEPS, REPEATS, LONG = 5, 5, 20
COLUMNS = ["network", "engine", "repeat", "cpu_seconds"]


def forward_over_reverse(problem: Problem) -> Hypergradient:
    """The walk of `first_order` with exact products in the place of differences."""
    module: Any = sys.modules["meta.estimators.first_order"]
    differences, module._difference = module._difference, take_products
    try:
        return first_order(problem)
    finally:
        module._difference = differences


def take_products(
    problem: Problem, step: Step, direction: Tensors, radius: float, central: bool, to_start: bool
) -> tuple[Tensors, Tensors]:
    """Hessian and mixed product along `direction`: tangents of the inner loss's gradients."""
    with replaying(step.generators), forward_ad.dual_level(), torch.enable_grad():
        inner = {name: tensor.detach().requires_grad_() for name, tensor in step.before.parameters.items()}
        moving = {name: forward_ad.make_dual(inner[name], tangent) for name, tangent in direction.items()}
        outer = {name: tensor.detach().requires_grad_() for name, tensor in problem.hyper.items()}
        loss, _ = take_inner_loss(problem, inner | moving, step.before.buffers, outer, step.batch)
        targets = ({} if to_start else inner | moving), outer
        gradients = torch.autograd.grad(loss, [*targets[0].values(), *outer.values()], allow_unused=True)
        tangents = [None if g is None else forward_ad.unpack_dual(g).tangent for g in gradients]
    return drop_missing(targets[0], tangents[: len(targets[0])]), drop_missing(outer, tangents[len(targets[0]) :])


RUNS: dict[str, Callable[[Problem], Hypergradient]] = {
    "higher": higher,
    "adjoint": adjoint,
    "forward_over_reverse": forward_over_reverse,
}


def build_perceptron() -> nn.Module:
    hidden: list[nn.Module] = [nn.Linear(3072, 256), nn.GELU()]
    for _ in range(4):
        hidden += [nn.Linear(256, 256), nn.LayerNorm(256), nn.GELU()]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(256, CLASSES))


def build_transformer() -> nn.Module:
    from timm.layers import set_fused_attn
    from timm.models import VisionTransformer

    set_fused_attn(False)
    return VisionTransformer(img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=96, depth=4, num_heads=3)


NETWORKS: dict[str, Callable[[], nn.Module] | None] = {
    "resnet8": None,  # the benchmark's own
    "perceptron": build_perceptron,
    "transformer": build_transformer,
}


def make_problem(network: str, dtype: torch.dtype = torch.float32) -> Problem:
    benchmark = Benchmark(8, STEPS, dtype=dtype)
    if build := NETWORKS[network]:
        torch.manual_seed(0)
        benchmark.net = build().to(dtype)
        parameters: dict[str, Tensor] = {name: p.detach() for name, p in benchmark.net.named_parameters()}
        state = benchmark.problem.state._replace(parameters=parameters, buffers=dict(benchmark.net.named_buffers()))
        benchmark.problem = replace(benchmark.problem, state=state)
    return benchmark.problem


def measure(out: Path, network: str) -> None:
    path, count_path = out / "adjoint_time.csv", out / "adjoint_counts.csv"
    if matching(path, network=network, repeat=REPEATS - 1, engine="forward_over_reverse"):
        return
    problem, exact = make_problem(network), make_problem(network, torch.float64)
    reference = higher(exact).grads
    for engine, run in RUNS.items():
        error = 1 - cosine_similarity(run(exact).grads, reference)
        assert error < 1e-10, f"{engine} is not exact on {network}: {error}"
        with FlopCounterMode(display=False) as counter:
            run(problem)
        write_row(count_path, ["network", "engine", "gflops"], [network, engine, counter.get_total_flops() / 1e9])
    for repeat in range(REPEATS):
        for engine, run in RUNS.items():
            started = time.process_time()
            run(problem)
            write_row(path, COLUMNS, [network, engine, repeat, round(time.process_time() - started, 4)])


def measure_memory(path: Path) -> None:
    for engine in RUNS:
        if not matching(path, engine=engine):
            surroundings = os.environ | hypergradient.ALLOCATORS["returned"]
            command = [sys.executable, __file__, "--peak", engine]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=surroundings)
            write_row(path, ["engine", "steps", "peak_mib"], [engine, LONG, float(run.stdout)])


def report(out: Path) -> None:
    figures: dict[str, float] = {}
    for engine in ("adjoint", "forward_over_reverse"):
        for network in NETWORKS:
            suffix = "" if network == "resnet8" else f"_{network}"
            for what, column in (("time", "cpu_seconds"), ("counts", "gflops")):
                values = [
                    median(out / f"adjoint_{what}.csv", column, network=network, engine=name)
                    for name in (engine, "higher")
                ]
                kind = "flops" if what == "counts" else what
                figures[f"{engine}_{kind}_vs_higher{suffix}"] = values[0] / values[1]
        peaks = [median(out / "adjoint_memory.csv", "peak_mib", engine=name) for name in (engine, "higher")]
        figures[f"{engine}_memory_vs_higher"] = peaks[0] / peaks[1]
    known = read_mapping(Path(hypergradient.__file__).parents[1] / "docs/evidence/hypergradient/result.json")["figures"]
    figures["compiled_first_order_vs_higher"] = known["compiled_time_vs_higher_resnet8_k20"]
    figures["convolutions_compiled_vs_higher"] = (
        known["convolution_share_compiled"] * figures["compiled_first_order_vs_higher"]
    )
    record(out, {key: value for key, value in figures.items() if not math.isnan(value)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--peak", help="measure one engine's peak, print it, stop")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.peak:
        ENGINES["forward_over_reverse"] = lambda benchmark: forward_over_reverse(benchmark.problem)
        print(hypergradient.measure_peak(options.peak, 8, LONG))
        return
    for network in NETWORKS:
        measure(options.out, network)
    measure_memory(options.out / "adjoint_memory.csv")
    report(options.out)


if __name__ == "__main__":
    main()
