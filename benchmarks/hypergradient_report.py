"""The table and the picture of `benchmarks/hypergradient.py`."""

import statistics
from pathlib import Path

Row = dict[str, str]

GOALS: list[tuple[str, str, float | None]] = [
    ("time ÷ higher, ResNet-8, K = 5", "time_vs_higher_resnet8_k5", 0.60),
    ("time ÷ higher, ResNet-8, K = 20", "time_vs_higher_resnet8_k20", 0.60),
    ("time ÷ higher, ResNet-20, K = 5", "time_vs_higher_resnet20_k5", 0.60),
    ("time ÷ higher, ResNet-20, K = 20", "time_vs_higher_resnet20_k20", 0.60),
    ("time with the inner loss compiled ÷ higher, ResNet-8, K = 20", "compiled_time_vs_higher_resnet8_k20", 0.35),
    ("seconds to compile it", "compile_seconds", None),
    ("time ÷ K plain SGD steps (limit 2.0), ResNet-8, K = 5", "time_vs_sgd_resnet8_k5", 2.2),
    ("time ÷ K plain SGD steps, ResNet-8, K = 20", "time_vs_sgd_resnet8_k20", 2.2),
    ("time ÷ K plain SGD steps, ResNet-20, K = 5", "time_vs_sgd_resnet20_k5", 2.2),
    ("time ÷ K plain SGD steps, ResNet-20, K = 20", "time_vs_sgd_resnet20_k20", 2.2),
    ("time ÷ TorchOpt, ResNet-8, K = 20", "time_vs_torchopt_resnet8_k20", None),
    ("time ÷ TorchOpt, ResNet-20, K = 20", "time_vs_torchopt_resnet20_k20", None),
    ("time ÷ betty (its last-step hypergradient), ResNet-8, K = 20", "time_vs_betty_resnet8_k20", None),
    ("peak memory ÷ higher, ResNet-8, K = 20", "memory_vs_higher_resnet8_k20", 0.05),
    ("the same of central differences", "central_memory_vs_higher_resnet8_k20", 0.05),
    (
        "the same of central differences, stored in bfloat16",
        "central_bfloat16_memory_vs_higher_resnet8_k20",
        0.05,
    ),
    ("the same of K plain SGD steps: the floor", "sgd_memory_vs_higher_resnet8_k20", None),
    ("peak memory ÷ higher, allocator as it comes", "memory_vs_higher_resnet8_k20_default_allocator", None),
    ("peak memory ÷ TorchOpt, ResNet-8, K = 20", "memory_vs_torchopt_resnet8_k20", None),
    ("peak memory at K = 5, MiB", "peak_mib_resnet8_k5", None),
    ("peak memory at K = 200, MiB", "peak_mib_resnet8_k200", None),
    ("of it, what a step stores, MiB × 195", "stored_mib_resnet8_k200_k5", None),
    ("cosine to float64, learned loss, K = 5", "cosine_resnet8_k5", 0.9999),
    ("cosine to float64, learned loss, K = 20", "cosine_resnet8_k20", 0.9995),
    ("cosine to float64, KD + learned loss, K = 20", "cosine_kd_resnet8_k20", 0.99),
    ("the same of the exact walk in float32", "exact_float32_cosine_kd_resnet8_k20", None),
    ("cosine of betty's hypergradient, K = 20", "betty_cosine_resnet8_k20", None),
    ("exact `adjoint`: time ÷ higher, ResNet-8, K = 20", "adjoint_time_vs_higher_resnet8_k20", 1.3),
    ("exact `adjoint`: peak memory ÷ higher, ResNet-8, K = 20", "adjoint_memory_vs_higher_resnet8_k20", 1 / 6),
]
"""What is measured, its key in `result.json`, and its goal: an upper bound, for cosines a lower one."""
EVIDENCE_TEXT = """# Hypergradient engines

Written by `python benchmarks/hypergradient.py`; `benchmarks/README.md` says how each figure is taken and what it shows;
every row is in the CSV files. Unless said otherwise the figures are those of `first_order` with its defaults, and
medians.

{table}

![time and peak memory against K](hypergradient.png)

Times are processor time on one thread of a shared machine: trust the ratios, which are interleaved, not the seconds.
Where the adjoint grew more than tenfold (`adjoint_growth` in accuracy.csv) no float32 hypergradient can be relied upon.
Nothing here was measured on a GPU.
"""
START, END = "<!-- goals: written by hypergradient.py -->", "<!-- end of goals -->"


def format_goals(figures: dict[str, float]) -> str:
    """The table of goals and measurements."""
    lines = ["| | goal | measured | |", "|---|---|---|---|"]
    for text, key, goal in GOALS:
        measured = figures.get(key)
        shown = "not measured" if measured is None else f"{measured:.4g}" if "cosine" not in key else f"{measured:.5f}"
        lines.append(f"| {text} | {format_goal(key, goal)} | {shown} | {judge(key, goal, measured)} |")
    return "\n".join(lines)


def format_goal(key: str, goal: float | None) -> str:
    return "–" if goal is None else f"≥ {goal:g}" if "cosine" in key else f"≤ {goal:.3g}"


def judge(key: str, goal: float | None, measured: float | None) -> str:
    """Say whether a goal is met, and by how much it is not."""
    if goal is None or measured is None:
        return ""
    if "cosine" in key:
        return "met" if measured >= goal else f"**missed by {goal - measured:.2g}**"
    return "met" if measured <= goal else f"**missed by {measured / goal - 1:.0%}**"


def write_table(evidence: Path, benchmarks: Path, figures: dict[str, float]) -> None:
    """Write what was done and the table of goals, beside the rows and into the README of the benchmarks."""
    table = format_goals(figures)
    evidence.write_text(EVIDENCE_TEXT.format(table=table))
    before, _, rest = benchmarks.read_text().partition(START)
    _, _, after = rest.partition(END)
    benchmarks.write_text(f"{before}{START}\n\n{table}\n\n{END}{after}")


def write_picture(path: Path, times: list[Row], peaks: list[Row]) -> None:
    """Draw time and peak memory against K on ResNet-8, one line for every engine."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for engine in dict.fromkeys(row["engine"] for row in peaks):
        seconds: dict[int, list[float]] = {}
        for row in times:
            if row["engine"] == engine and row["depth"] == "8":
                seconds.setdefault(int(row["steps"]), []).append(float(row["cpu_seconds"]))
        left.plot(list(seconds), [statistics.median(entry) for entry in seconds.values()], marker="o", label=engine)
        mine = [
            row for row in peaks if row["engine"] == engine and row["depth"] == "8" and row["allocator"] != "default"
        ]
        right.plot([int(row["steps"]) for row in mine], [float(row["peak_mib"]) for row in mine], marker="o")
    left.set(xlabel="inner steps K", ylabel="processor seconds", title="time, ResNet-8")
    right.set(xlabel="inner steps K", ylabel="MiB", title="peak memory, ResNet-8", xscale="log", yscale="log")
    left.legend()
    figure.savefig(path, dpi=120)
