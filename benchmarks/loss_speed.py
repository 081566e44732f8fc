"""Compare the loss that ships with KD, forward and backward: `python benchmarks/loss_speed.py [OUT | --check]`.

256 images, 1,000 and 10 classes, eager and compiled, on one CPU thread: all in turn in one process, processor time,
medians; and how often a compiled loss is compiled anew as a number of progress goes up. Every measurement is a row of a
CSV file in the output folder and is not taken again while it stands there; delete the file to start over. A minute.
--check counts operators again, which are the same on every machine; times are not.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from checking import check
from rows import matching, median, write_row
from speed_report import OUT, record
from torch import Tensor, nn
from torch._inductor.compile_fx import compile_fx

import lkd
from lkd.losses import KDLoss
from lkd.losses.learned.trust import Trust, TrustFigures
from lkd.training.throughput import OperationCounter

BATCH, CLASSES, REPEATS, STEPS = 256, (1000, 10), 25, 12
COLUMNS = ["classes", "loss", "mode", "repeat", "cpu_seconds"]
COUNTS = ["classes", "loss", "operators", "compilations"]
TRUST = Trust(TrustFigures(0.9, 0.9, 1.5, 400.0, 0.5))


def differentiate(
    loss: Callable[..., dict[str, Tensor]], student: Tensor, teacher: Tensor, target: Tensor, progress: float
) -> None:
    """Forward and backward down to the student's logits."""
    leaf = student.clone().requires_grad_()
    terms = loss(lkd.Outputs(leaf, {}), lkd.Outputs(teacher, {}), target, progress)
    torch.stack(list(terms.values())).sum().backward()


def make_outputs(classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of student and teacher, [BATCH, classes] each, and labels, [BATCH]."""
    student, teacher = (3 * torch.randn(2, BATCH, classes, generator=torch.Generator().manual_seed(0))).unbind()
    return student, teacher, torch.arange(BATCH) % classes


def make_losses() -> dict[str, nn.Module]:
    return {"universal": lkd.load_loss("universal", TRUST).requires_grad_(False), "kd": KDLoss(0.5, 4.0)}


def count_operators(loss: nn.Module, student: Tensor, teacher: Tensor, target: Tensor) -> int:
    with OperationCounter() as count:
        differentiate(loss, student, teacher, target, 0.3)
    return count.operations


def compile_counted(loss: nn.Module, graphs: list[object]) -> Callable[..., dict[str, Tensor]]:
    """The loss by torch's own compiler, and a note of every graph."""

    def compile_graph(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return compile_fx(graph, inputs)

    compiled: Callable[..., dict[str, Tensor]] = torch.compile(loss, backend=compile_graph)
    return compiled


def time_call(call: Callable[[], None], calls: int) -> float:
    started = time.process_time()
    for _ in range(calls):
        call()
    return (time.process_time() - started) / calls


def measure(out: Path, classes: int) -> None:
    """Time and count both losses, in turn, after steps that are thrown away."""
    path = out / "loss_time.csv"
    if matching(path, classes=classes, repeat=REPEATS - 1, loss="kd", mode="compiled"):
        return
    student, teacher, target = make_outputs(classes)
    losses = make_losses()
    runs: dict[tuple[str, str], Callable[..., dict[str, Tensor]]] = {
        (name, "eager"): loss for name, loss in losses.items()
    }
    for name, loss in losses.items():
        operators = count_operators(loss, student, teacher, target)
        graphs: list[object] = []
        runs[name, "compiled"] = compile_counted(loss, graphs)
        for step in range(STEPS):
            differentiate(runs[name, "compiled"], student, teacher, target, step / STEPS)
        write_row(out / "loss_counts.csv", COUNTS, [classes, name, operators, len(graphs)])
    for repeat in range(REPEATS):
        for (name, mode), run in runs.items():
            call = partial(differentiate, run, student, teacher, target, repeat / REPEATS)
            write_row(path, COLUMNS, [classes, name, mode, repeat, time_call(call, 3 if classes > 100 else 20)])


def report(out: Path) -> None:
    def seconds(classes: int, loss: str, mode: str) -> float:
        return median(out / "loss_time.csv", "cpu_seconds", classes=classes, loss=loss, mode=mode)

    def ratio(classes: int, mode: str) -> float:
        return seconds(classes, "universal", mode) / seconds(classes, "kd", mode)

    def count(column: str, loss: str) -> float:  # of the first classes: later ones find the compiler warned
        return median(out / "loss_counts.csv", column, classes=CLASSES[0], loss=loss)

    figures = {
        "logit_loss_vs_kd_c1000": ratio(1000, "eager"),
        "logit_loss_vs_kd_c10": ratio(10, "eager"),
        "logit_loss_operators": count("operators", "universal"),
        "logit_loss_compiled_vs_kd": ratio(1000, "compiled"),
        "recompilations": count("compilations", "universal") - 1,
    }
    figures["loss_operator_us"] = 1e6 * seconds(10, "universal", "eager") / figures["logit_loss_operators"]
    figures["kd_operator_us"] = 1e6 * seconds(10, "kd", "eager") / count("operators", "kd")
    record(out, figures)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    out = options.out
    if options.check:
        made = {name: count_operators(loss, *make_outputs(CLASSES[0])) for name, loss in make_losses().items()}
        counts = {name: matching(OUT / "loss_counts.csv", classes=CLASSES[0], loss=name)[0] for name in made}
        return check({name: row["operators"] for name, row in counts.items()}, made)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    torch.empty(6_000_000).fill_(0)  # the allocator then keeps what is freed, as in a training of any network
    for classes in CLASSES:
        measure(out, classes)
    report(out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
