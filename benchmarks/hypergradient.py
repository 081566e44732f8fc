"""Compare hypergradient engines: `python benchmarks/hypergradient.py` (needs the extra `bench`).

Time: all engines interleaved in one process, one thread, processor time, median. Memory: every engine in its own
process, peak resident memory above the idle one. Profile: share of each operation in the eager and the compiled run.
Accuracy: cosine to the exact hypergradient in float64. Every
measurement is a row of a CSV file in the output folder and is not taken again while it stands there; delete the files
to start over. --check takes one row of the accuracies anew; times and memory are not checked.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from checking import check
from hypergradient_problem import ENGINES, Benchmark, compile_problem
from hypergradient_report import write_picture, write_table
from rows import matching, median, read_rows, write_row

from lkd.core.files import environment, write_json
from lkd.tracking.run import evidence
from meta.estimators import adjoint, first_order
from meta.tensors import cosine_similarity, global_norm

TIME_CASES = [(8, 5), (8, 20), (20, 5), (20, 20)]
REPEATS = 5
MEMORY_CASES = [
    *[(engine, 8, steps, "returned") for steps in (1, 5, 20) for engine in ENGINES],
    *[(engine, 20, 20, "returned") for engine in ("sgd", "higher", "adjoint", "first_order", "central")],
    *[(engine, 8, 200, "returned") for engine in ("sgd", "first_order")],
    *[(engine, 8, 20, "default") for engine in ("sgd", "higher", "adjoint", "first_order", "central")],
]
# glibc gives blocks of this size back to the system as soon as they are free; by default it keeps them and splits them.
ALLOCATORS = {"returned": {"MALLOC_MMAP_THRESHOLD_": str(256 * 1024)}, "default": {}}
ACCURACY_CASES = [(False, 5, 3), (False, 20, 3), (True, 20, 5)]
TIME_COLUMNS = ["engine", "depth", "steps", "repeat", "cpu_seconds", "wall_seconds"]
MEMORY_COLUMNS = ["engine", "depth", "steps", "allocator", "peak_mib"]
PROFILE_COLUMNS = ["run", "operation", "calls", "share"]
ACCURACY_COLUMNS = ["engine", "distill", "steps", "seed", "cosine", "norm_ratio", "adjoint_growth"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/hypergradient"))
    parser.add_argument("--peak", nargs=3, metavar=("ENGINE", "DEPTH", "K"), help="measure one peak, print it, stop")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.check:
        return check_accuracy(options.out / "accuracy.csv")
    if options.peak:
        engine, depth, steps = options.peak
        print(measure_peak(engine, int(depth), int(steps)))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    for depth, steps in TIME_CASES:
        measure_times(options.out / "time.csv", depth, steps)
    measure_memory(options.out / "memory.csv")
    measure_accuracy(options.out / "accuracy.csv")
    measure_compiled(options.out / "time_compiled.csv", options.out / "compile.csv")
    profile_runs(options.out / "profile.csv")
    report(options.out)
    return 0


def check_accuracy(committed: Path) -> int:
    """Compare the cosines of the first case and seed."""
    with tempfile.TemporaryDirectory() as folder:
        measure_accuracy(made := Path(folder) / "accuracy.csv", ACCURACY_CASES[:1], seeds=1)
        rows = {row["engine"]: row for row in read_rows(made)}
    before = {engine: matching(committed, engine=engine, distill=False, steps=5, seed=0)[0] for engine in rows}
    return check(*({name: row["cosine"] for name, row in each.items()} for each in (before, rows)), tolerance=2e-5)


def measure_times(path: Path, depth: int, steps: int) -> None:
    """Time the engines in turn, after a round that is thrown away."""
    benchmarks = {engine: Benchmark(depth, steps) for engine in ENGINES}
    for repeat in range(-1, REPEATS):
        if matching(path, depth=depth, steps=steps, repeat=max(repeat, 0), engine=list(ENGINES)[-1]):
            continue
        for engine, benchmark in benchmarks.items():
            row = take_time(engine, benchmark)
            if repeat >= 0:
                write_row(path, TIME_COLUMNS, [engine, depth, steps, repeat, *row])


def measure_compiled(path: Path, compile_path: Path) -> None:
    """Time `first_order` on a compiled inner loss beside higher, and the compilation apart."""
    depth, steps = 8, 20
    if matching(path, repeat=REPEATS - 1, engine="first_order"):
        return
    compiled, plain = Benchmark(depth, steps), Benchmark(depth, steps)
    write_row(compile_path, ["depth", "seconds"], [depth, round(compile_problem(compiled), 1)])
    for repeat in range(REPEATS):
        for engine, benchmark in (("higher", plain), ("first_order", compiled)):
            write_row(path, TIME_COLUMNS, [engine, depth, steps, repeat, *take_time(engine, benchmark)])


def take_time(engine: str, benchmark: Benchmark) -> tuple[float, float]:
    """Return processor and wall seconds of one hypergradient."""
    cpu, wall = time.process_time(), time.perf_counter()
    ENGINES[engine](benchmark)
    return round(time.process_time() - cpu, 4), round(time.perf_counter() - wall, 4)


def profile_runs(path: Path) -> None:
    """Say where the time of `first_order` goes, eager and with the inner loss compiled: the ten largest shares."""
    if path.exists():
        return
    benchmarks = {"eager": Benchmark(8, 20), "compiled": Benchmark(8, 20)}
    compile_problem(benchmarks["compiled"])
    for run, benchmark in benchmarks.items():
        first_order(benchmark.problem)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
            first_order(benchmark.problem)
        events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
        total = sum(event.self_cpu_time_total for event in events)
        for event in events[:10]:
            share = round(event.self_cpu_time_total / total, 4)
            write_row(path, PROFILE_COLUMNS, [run, event.key, event.count, share])


def measure_memory(path: Path) -> None:
    """Measure every engine's peak in a process of its own."""
    for engine, depth, steps, allocator in MEMORY_CASES:
        if not matching(path, engine=engine, depth=depth, steps=steps, allocator=allocator):
            command = [sys.executable, __file__, "--peak", engine, str(depth), str(steps)]
            environment = os.environ | ALLOCATORS[allocator]
            run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            write_row(path, MEMORY_COLUMNS, [engine, depth, steps, allocator, float(run.stdout)])


def measure_peak(engine: str, depth: int, steps: int) -> float:
    """Return the MiB by which an engine's peak exceeds what this process, with the problem built, holds when idle."""
    warm = Benchmark(depth, 1)
    small = [(images[:2], labels[:2], teacher[:2]) for images, labels, teacher in warm.problem.inner_batches]
    warm.problem = replace(warm.problem, inner_batches=small)
    ENGINES["sgd"](warm)
    benchmark = Benchmark(depth, steps)
    idle = read_status("VmRSS")
    ENGINES[engine](benchmark)
    return round((read_status("VmHWM") - idle) / 1024, 1)


def read_status(key: str) -> int:
    """Return an entry of this process's status in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def measure_accuracy(path: Path, cases: list[tuple[bool, int, int]] = ACCURACY_CASES, seeds: int = 99) -> None:
    """Compare hypergradients in float32 with the exact one in float64."""
    for distill, steps, own_seeds in cases:
        for seed in range(min(seeds, own_seeds)):
            if matching(path, distill=distill, steps=steps, seed=seed, engine="first_order"):
                continue
            exact = adjoint(Benchmark(8, steps, seed, distill, torch.float64).problem)
            assert exact.adjoint_norms is not None
            growth = (exact.adjoint_norms.max() / exact.adjoint_norms[0]).item()
            benchmark = Benchmark(8, steps, seed, distill)
            estimates = {
                "adjoint": adjoint(benchmark.problem).grads,
                "central": first_order(benchmark.problem, central=True).grads,
                "first_order": first_order(benchmark.problem).grads,
            }
            if "betty" in ENGINES:
                estimates["betty"] = ENGINES["betty"](benchmark)  # last: it moves the student
            for engine, grads in estimates.items():
                cosine, ratio = cosine_similarity(grads, exact.grads), (global_norm(grads) / exact.norm).item()
                figures = [round(cosine, 6), round(ratio, 4), round(growth, 2)]
                write_row(path, ACCURACY_COLUMNS, [engine, distill, steps, seed, *figures])


def report(out: Path) -> None:
    """Write result.json, the table and the picture from the rows."""
    times, compiled, memory, accuracy = (
        out / f"{name}.csv" for name in ("time", "time_compiled", "memory", "accuracy")
    )

    def time_ratio(engine: str, peer: str, depth: int, steps: int) -> float:
        seconds = (median(times, "cpu_seconds", engine=name, depth=depth, steps=steps) for name in (engine, peer))
        return next(seconds) / next(seconds)

    def peak(engine: str, steps: int, allocator: str = "returned") -> float:
        return median(memory, "peak_mib", engine=engine, depth=8, steps=steps, allocator=allocator)

    figures = {}
    for prefix, engine in (("", "first_order"), ("adjoint_", "adjoint"), ("central_", "central")):
        for depth, steps in TIME_CASES:
            for peer in ("higher", "torchopt", "betty", "sgd"):
                key = f"{prefix}time_vs_{peer}_resnet{depth}_k{steps}"
                figures[key] = time_ratio(engine, peer, depth, steps)
        for peer in ("higher", "torchopt", "betty"):
            figures[f"{prefix}memory_vs_{peer}_resnet8_k20"] = peak(engine, 20) / peak(peer, 20)
        figures[f"{prefix}memory_vs_higher_resnet8_k20_default_allocator"] = peak(engine, 20, "default") / peak(
            "higher", 20, "default"
        )
    figures["central_bfloat16_memory_vs_higher_resnet8_k20"] = peak("central_bfloat16", 20) / peak("higher", 20)
    figures["sgd_memory_vs_higher_resnet8_k20"] = peak("sgd", 20) / peak("higher", 20)
    compiled_seconds, higher_seconds = (
        median(compiled, "cpu_seconds", engine=engine) for engine in ("first_order", "higher")
    )
    figures["compiled_time_vs_higher_resnet8_k20"] = compiled_seconds / higher_seconds
    for run in ("eager", "compiled"):
        shares = [float(row["share"]) for row in matching(out / "profile.csv", run=run) if "conv" in row["operation"]]
        figures[f"convolution_share_{run}"] = sum(shares) or math.nan
    figures["compile_seconds"] = median(out / "compile.csv", "seconds", depth=8)
    for steps in (5, 200):
        figures[f"peak_mib_resnet8_k{steps}"] = peak("first_order", steps)
    stored = sum(tensor.nbytes for tensor in Benchmark(8, 1).problem.state.parameters.values()) * 2 / 2**20
    figures["stored_mib_resnet8_k200_k5"] = stored * 195
    for steps in (5, 20):
        figures[f"cosine_resnet8_k{steps}"] = median(
            accuracy, "cosine", engine="first_order", distill=False, steps=steps
        )
        figures[f"betty_cosine_resnet8_k{steps}"] = median(
            accuracy, "cosine", engine="betty", distill=False, steps=steps
        )
    figures["cosine_kd_resnet8_k20"] = median(accuracy, "cosine", engine="first_order", distill=True, steps=20)
    figures["exact_float32_cosine_kd_resnet8_k20"] = median(
        accuracy, "cosine", engine="adjoint", distill=True, steps=20
    )
    figures = {key: round(value, 6) for key, value in figures.items() if not math.isnan(value)}

    write_json(out / "result.json", evidence("python benchmarks/hypergradient.py", environment(), figures))
    write_table(out / "README.md", Path(__file__).with_name("README.md"), figures)
    write_picture(out / "hypergradient.png", read_rows(times), read_rows(memory))


if __name__ == "__main__":
    raise SystemExit(main())
