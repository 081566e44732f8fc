"""The table and the picture of `benchmarks/hypergradient.py`."""

import statistics
from pathlib import Path

Row = dict[str, str]

GOALS = [
    ("time, ResNet-8, K = 5, ÷ higher", "time_vs_higher_resnet8_k5", "≤ 0.60"),
    ("time, ResNet-8, K = 20, ÷ higher", "time_vs_higher_resnet8_k20", "≤ 0.60"),
    ("time, ResNet-20, K = 5, ÷ higher", "time_vs_higher_resnet20_k5", "≤ 0.60"),
    ("time, ResNet-20, K = 20, ÷ higher", "time_vs_higher_resnet20_k20", "≤ 0.60"),
    ("time, ResNet-8, K = 20, ÷ TorchOpt", "time_vs_torchopt_resnet8_k20", "–"),
    ("time, ResNet-20, K = 20, ÷ TorchOpt", "time_vs_torchopt_resnet20_k20", "–"),
    ("time with the inner loss compiled, ResNet-8, K = 20, ÷ higher", "compiled_time_vs_higher_resnet8_k20", "≤ 0.35"),
    ("seconds to compile", "compile_seconds", "told apart"),
    ("time, ResNet-8, K = 5, ÷ K plain SGD steps (limit 2.0)", "time_vs_sgd_resnet8_k5", "≤ 2.2"),
    ("time, ResNet-8, K = 20, ÷ K plain SGD steps (limit 2.0)", "time_vs_sgd_resnet8_k20", "≤ 2.2"),
    ("peak memory, ResNet-8, K = 20, ÷ higher", "memory_vs_higher_resnet8_k20", "≤ 0.05"),
    ("peak memory, ResNet-8, K = 20, ÷ TorchOpt", "memory_vs_torchopt_resnet8_k20", "–"),
    ("peak memory, ResNet-8, K = 5, MiB", "peak_mib_resnet8_k5", "–"),
    ("peak memory, ResNet-8, K = 200, MiB", "peak_mib_resnet8_k200", "K × parameters more"),
    ("cosine to float64, learned loss, K = 5", "cosine_resnet8_k5", "≥ 0.9999"),
    ("cosine to float64, learned loss, K = 20", "cosine_resnet8_k20", "≥ 0.9995"),
    ("cosine to float64, KD + learned loss, K = 20", "cosine_kd_resnet8_k20", "≥ 0.99"),
    ("the same of the exact walk in float32", "exact_float32_cosine_kd_resnet8_k20", "–"),
    ("exact `adjoint`: time, ResNet-8, K = 20, ÷ higher", "adjoint_time_vs_higher_resnet8_k20", "≤ 1.3"),
    ("exact `adjoint`: peak memory, ResNet-8, K = 20, ÷ higher", "adjoint_memory_vs_higher_resnet8_k20", "≤ 0.167"),
]


def write_table(path: Path, figures: dict[str, float]) -> None:
    """Write what was done and the table of goals and measurements."""
    rows = "\n".join(f"| {text} | {goal} | {format_figure(figures.get(key))} |" for text, key, goal in GOALS)
    path.write_text(
        "# Hypergradient engines\n\n"
        "CIFAR ResNets with BatchNorm in train mode, batch 32 of 3×32×32 (random images), a loss network on the\n"
        "logits of student and teacher, inner SGD with momentum, outer cross-entropy. Written by\n"
        "`python benchmarks/hypergradient.py`, which says how each figure is taken; every row is in the CSV files.\n"
        "Unless said otherwise the figures are those of `first_order` with its defaults, and medians.\n\n"
        f"| | goal | measured |\n|---|---|---|\n{rows}\n\n"
        "![time and peak memory against K](hypergradient.png)\n\n"
        "Times are processor time on one thread of a shared machine: trust the ratios, which are interleaved, not the\n"
        "seconds. Peak memory is resident memory: it includes what the allocator does not give back, even for SGD.\n"
        "Where the adjoint grew more than tenfold (`adjoint_growth` in accuracy.csv) no float32 hypergradient can be\n"
        "relied upon.\n"
        "Nothing here was measured on a GPU.\n"
    )


def format_figure(figure: float | None) -> str:
    return "not measured" if figure is None else f"{figure:.5g}"


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
        mine = [row for row in peaks if row["engine"] == engine and row["depth"] == "8"]
        right.plot([int(row["steps"]) for row in mine], [float(row["peak_mib"]) for row in mine], marker="o")
    left.set(xlabel="inner steps K", ylabel="processor seconds", title="time, ResNet-8")
    right.set(xlabel="inner steps K", ylabel="MiB", title="peak memory, ResNet-8", xscale="log", yscale="log")
    left.legend()
    figure.savefig(path, dpi=120)
