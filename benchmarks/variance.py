"""Evidence of partial variance reduction: each claim of the paper as one row, kept in docs/evidence/variance.

python benchmarks/variance.py [EPOCHS | --check]

--check does the exact parts anew.

The settings are those of the authors' code (batch 10, rate 0.05, no momentum), on 4,000 embedded images of
Fashion-MNIST at half their size, with five seeds side by side; the default number of epochs is theirs, 100.
"""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
import torch
from checking import check
from torch import Tensor
from torch.nn.functional import avg_pool2d, cosine_similarity

from benchmarks.variance_problems import LeastSquares, flat_labels, mean_loss, train_linear, train_svrg
from lkd.balance.balancing import take_gradient
from lkd.config import DataRecipe
from lkd.core.files import environment, read_json, write_json, write_text
from lkd.core.outputs import Outputs
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.tracking.run import evidence
from lkd.training.build import prepare_images

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from lkd.meta_training.log import save_figure

ROOT = Path(__file__).parents[1]
EVIDENCE = ROOT / "docs" / "evidence" / "variance"
SEEDS = 5
SHARES = [0.0, 0.3, 0.5, 0.7, 0.9, 1.0, 1.3]
RATE = 0.05
README = """# Partial variance reduction

Made by `{command}`: linear classification of {images:,} Fashion-MNIST training images, halved to 14 × 14
(with all pixels a linear network separates them, and a near-optimal teacher has no gradient), by SGD (batch 10,
learning rate 0.05, no momentum, {epochs} epochs), with the distillation gradient g(x) − λ g(θ); {seeds} paired seeds.
"Loss" is the training loss, mean of the last three epochs; differences are mean ± standard error over the paired
seeds, and a claim holds if its difference has the claimed sign by more than two standard errors. λ is picked on the
training loss itself, as the claims are about it.

| claim | measured | holds |
|---|---|---|
{rows}

![Training loss against λ](variance.png)

Exact parts: the gradient of KD in softmax regression is the distillation gradient to {identity:.1g}; with a snapshot
teacher, its full gradient and λ = 1 the training is SVRG's to {svrg:.1g}; on least squares, where the stationary error
is known in closed form, simulations are within {squares:.1%} of it.

SGD without a teacher ends at loss {plain:.3f}, the L-BFGS teacher has {optimum:.3f}: students that are still on their
way there show the descent, not yet the stationary noise that the theory bounds. The SGD teacher's best λ in (b) is
{best_other:g}.

What it does not show: other data sets, deep students, the paper's own figures (their numbers are not public to us).
In claim (d) the network and its teacher are trained for {net_epochs} epoch(s) only.

`result.json`: the figures; `losses.csv`: every seed's rows.
"""


def main() -> int:
    check_only = "--check" in sys.argv
    epochs = int(sys.argv[1]) if sys.argv[1:] and not check_only else 100
    torch.set_default_dtype(torch.float32)
    train = prepare_images(DataRecipe(train_size=4000, meta_validation_size=4000)).train
    images = avg_pool2d(train.normalize(train.images), 2).flatten(1)  # with all pixels 4,000 images are separable
    images = torch.cat([images, torch.ones(len(images), 1)], 1)  # the bias
    data = images, flat_labels(train.labels)
    if check_only:
        predicted = {"least_squares_prediction_error": check_least_squares()}
        exact = max(check_identity(data), check_svrg(data)) < 1e-14
        return check(read_json(EVIDENCE / "result.json")["figures"], predicted, tolerance=1e-3) or not exact
    losses, optimum = train_students(data, epochs)
    net_epochs = max(1, epochs // 20)
    cosines = measure_cosines(data, net_epochs)
    claims = judge(losses, cosines)
    identity, svrg, squares = check_identity(data), check_svrg(data), check_least_squares()
    figures = {
        "seeds": SEEDS,
        "epochs": epochs,
        "identity_max_error": identity,
        "svrg_max_error": svrg,
        "least_squares_prediction_error": squares,
        "claims_tested": len(claims),
        "claims_held": sum(holds for _, _, holds in claims),
    }
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    command = " ".join(["python benchmarks/variance.py", *sys.argv[1:]])
    write_json(EVIDENCE / "result.json", evidence(command, environment(), figures))
    write_text(EVIDENCE / "losses.csv", format_losses(losses, cosines))
    plot(losses, optimum, EVIDENCE / "variance.png")
    rows = "\n".join(f"| {claim} | {measured} | {'yes' if holds else 'no'} |" for claim, measured, holds in claims)
    parts = {"identity": identity, "svrg": svrg, "squares": squares, "rows": rows, "seeds": SEEDS, "epochs": epochs}
    parts |= {"plain": float(losses["L-BFGS"][:, 0].mean()), "optimum": optimum}
    parts["best_other"] = SHARES[int(losses["SGD"].mean(0).argmin())]
    text = README.format(command=command, images=len(images), net_epochs=net_epochs, **parts)
    write_text(EVIDENCE / "README.md", text)
    print(text)
    return 0


def train_students(data: tuple[Tensor, Tensor], epochs: int) -> tuple[dict[str, Tensor], float]:
    """Train all students side by side; the loss of each kind, [S, len(SHARES)], and that of the near-optimum."""
    shares, seeds, pixels = torch.tensor(SHARES), SEEDS, data[0].shape[1]
    sgd = train_linear(data, torch.zeros(1, pixels, 1, 10), torch.zeros(1), max(3, epochs // 2), RATE)[0]
    best = find_optimum(data)
    print("teachers:", *(f"{float(mean_loss(*data, teacher)):.4f}" for teacher in (sgd, best)), flush=True)
    kept = best.abs() >= best.abs().flatten().median()
    kinds = {
        "L-BFGS": (best, False, False, constant),
        "SGD": (sgd, False, False, constant),
        "SGD, unbiased": (sgd, True, False, constant),
        "L-BFGS, sparse student": (best, False, True, constant),
        "L-BFGS, λ decays": (best, False, False, decay),
        "L-BFGS, λ rises": (best, False, False, rise),
    }
    losses = {}
    for name, (teacher, is_unbiased, is_sparse, schedule) in kinds.items():
        teachers = teacher.expand(seeds, -1, len(SHARES), -1).contiguous()
        unbiased = torch.full((len(SHARES),), is_unbiased) if is_unbiased else None
        masks = kept.expand_as(teachers).float() if is_sparse else None
        losses[name] = train_linear(data, teachers, shares, epochs, RATE, unbiased, masks, schedule=schedule)[1]
        print(name, *(f"{value:.4f}" for value in losses[name].mean(0)), flush=True)
    return losses, float(mean_loss(*data, best))


def constant(epoch: int) -> float:
    return 1.0


def decay(epoch: int) -> float:
    return 0.9**epoch


def rise(epoch: int) -> float:
    return min(1.047**epoch, 1.4)


def find_optimum(data: tuple[Tensor, Tensor]) -> Tensor:
    """The near-optimal teacher, by L-BFGS, [1, D, 1, C]."""
    weights = torch.zeros(data[0].shape[1], 10, requires_grad=True)
    optimizer = torch.optim.LBFGS([weights], max_iter=1000, history_size=30, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = -((data[0] @ weights).log_softmax(1) * data[1]).sum(1).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weights.detach()[None, :, None]


def measure_cosines(data: tuple[Tensor, Tensor], epochs: int) -> list[float]:
    """Mean cosine of KD's gradient and the distillation gradient in a 196-100-10 network, for each seed."""
    means = []
    for seed in range(SEEDS):
        torch.manual_seed(seed)
        teacher = [p for _, p in train_network(data, epochs, seed)][-1]
        torch.manual_seed(seed + 100)
        found = [
            float(cosine_similarity(compute_kd(data, rows, p, teacher), compute_distilled(data, rows, p, teacher), 0))
            for step, (rows, p) in enumerate(train_network(data, epochs, seed + 100, teacher))
            if step % 20 == 0
        ]
        means.append(fmean(found))
    print("cosines", means, flush=True)
    return means


def train_network(
    data: tuple[Tensor, Tensor], epochs: int, seed: int, teacher: list[Tensor] | None = None
) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Train a 196-100-10 network as the authors do, by cross-entropy or KD(0.7, 1); each step's images and weights."""
    layers = torch.nn.Linear(data[0].shape[1], 100), torch.nn.Linear(100, 10)
    parameters = [p.detach().clone().requires_grad_(True) for layer in layers for p in layer.parameters()]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(data[0]), generator=generator).split(10):
            yield rows, [p.detach() for p in parameters]
            loss = compute_network_loss(data, rows, parameters, teacher)
            with torch.no_grad():
                for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    parameter -= 0.01 * (gradient + 1e-4 * parameter)


def compute_network_loss(
    data: tuple[Tensor, Tensor], rows: Tensor, parameters: list[Tensor], teacher: list[Tensor] | None
) -> Tensor:
    logits = run_network(data[0][rows], parameters)
    taught = run_network(data[0][rows], teacher).detach() if teacher else logits.detach()
    loss = KDLoss(0.7, 1.0) if teacher else CrossEntropyLoss()
    return torch.stack(list(loss(Outputs(logits, {}), Outputs(taught, {}), data[1][rows].argmax(1)).values())).sum()


def run_network(images: Tensor, parameters: list[Tensor]) -> Tensor:
    hidden, bias, last, last_bias = parameters
    return (images @ hidden.T + bias).relu() @ last.T + last_bias


def compute_kd(data: tuple[Tensor, Tensor], rows: Tensor, student: list[Tensor], teacher: list[Tensor]) -> Tensor:
    leaves = [p.clone().requires_grad_(True) for p in student]
    return take_gradient(compute_network_loss(data, rows, leaves, teacher), leaves)


def compute_distilled(
    data: tuple[Tensor, Tensor], rows: Tensor, student: list[Tensor], teacher: list[Tensor]
) -> Tensor:
    gradients = []
    for parameters in (student, teacher):
        leaves = [p.clone().requires_grad_(True) for p in parameters]
        gradients.append(take_gradient(compute_network_loss(data, rows, leaves, None), leaves))
    return gradients[0] - 0.7 * gradients[1]


def judge(losses: dict[str, Tensor], cosines: list[float]) -> list[tuple[str, str, bool]]:
    """Each claim, what was measured, and whether it holds."""
    own, other = losses["L-BFGS"], losses["SGD"]
    best, last = int(own.mean(0).argmin()), SHARES.index(1.3)
    best_other = int(other.mean(0).argmin())
    large = SHARES.index(1.0)
    sparse = losses["L-BFGS, sparse student"]
    best_sparse = int(sparse.mean(0).argmin())
    lower, lower_holds = differ(own[:, best], own[:, 0])
    worse, worse_holds = differ(own[:, best], own[:, last])
    teachers, teachers_hold = differ(own[:, best], other[:, best_other])
    unbiased, unbiased_holds = differ(losses["SGD, unbiased"][:, large], other[:, large])
    sparser, sparser_holds = differ(sparse[:, best_sparse], sparse[:, 0])
    mean, error = fmean(cosines), stdev(cosines) / SEEDS**0.5
    return [
        (
            "(a) KD reaches a lower training loss than SGD at a well-chosen λ, and a too large λ is worse",
            f"λ = {SHARES[best]:g}: {lower} against SGD; {worse} against λ = 1.3",
            lower_holds and worse_holds,
        ),
        ("(b) a near-optimal (L-BFGS) teacher beats an SGD teacher", f"{teachers}, each at its best λ", teachers_hold),
        (
            "(c) the unbiased variant tolerates a larger λ",
            f"SGD teacher, λ = 1: {unbiased} against biased",
            unbiased_holds,
        ),
        (
            "(d) KD's gradient and the distillation gradient agree in a network with a hidden layer",
            f"cosine {mean:.3f} ± {error:.3f} (holds above 0.5)",
            mean - 2 * error > 0.5,
        ),
        (
            "(e) a sparse student (half of the weights, those where L-BFGS's are largest) benefits too",
            f"λ = {SHARES[best_sparse]:g}: {sparser}",
            sparser_holds,
        ),
    ]


def differ(ours: Tensor, theirs: Tensor) -> tuple[str, bool]:
    """The paired difference as words, and whether ours is lower by more than two standard errors."""
    differences = (ours - theirs).tolist()
    mean, error = fmean(differences), stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.5f} ± {error:.5f}".replace("-", "−"), mean + 2 * error < 0


def check_identity(data: tuple[Tensor, Tensor]) -> float:
    """The largest difference of KD's gradient from the distillation gradient, in float64."""
    torch.manual_seed(0)
    images, labels = data[0][:100].double(), data[1][:100].argmax(1)
    student, teacher = (torch.randn(images.shape[1], 10, dtype=torch.float64).div(30) for _ in range(2))

    def differentiate(loss: torch.nn.Module, weights: Tensor) -> Tensor:
        leaf = weights.clone().requires_grad_(True)
        terms = loss(Outputs(images @ leaf, {}), Outputs(images @ teacher, {}), labels)
        return take_gradient(torch.stack(list(terms.values())).sum(), [leaf])

    plain = CrossEntropyLoss()
    distilled = differentiate(plain, student) - 0.7 * differentiate(plain, teacher)
    return float((differentiate(KDLoss(0.7, 1.0), student) - distilled).abs().max())


def check_svrg(data: tuple[Tensor, Tensor]) -> float:
    """The largest difference of the two trainings' weights after 400 steps, in float64."""
    torch.manual_seed(0)
    few = data[0][:1000].double(), data[1][:1000].double()
    batches = [torch.randint(1000, (10,)) for _ in range(400)]
    ours, svrg = train_svrg(few, torch.zeros(few[0].shape[1], 10, dtype=torch.float64), batches, RATE, 100)
    return float((ours - svrg).abs().max())


def check_least_squares() -> float:
    """The largest relative error of the closed form against simulations."""
    errors = []
    for distance in (0.1, 0.5, 1.0):
        problem = LeastSquares(0, distance)
        for share in (0.0, 0.5, 1.0):
            predicted = problem.predict(share, 0.02)
            errors.append(abs(problem.simulate(share, 0.02) / predicted - 1))
    return max(errors)


def format_losses(losses: dict[str, Tensor], cosines: list[float]) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["kind", "seed", "lambda", "value"])
    for kind, table in losses.items():
        writer.writerows(
            [kind, s, SHARES[k], f"{float(table[s, k]):.6f}"] for s in range(SEEDS) for k in range(len(SHARES))
        )
    writer.writerows(["cosine", seed, 0.7, f"{value:.6f}"] for seed, value in enumerate(cosines))
    return text.getvalue()


def plot(losses: dict[str, Tensor], optimum: float, path: Path) -> None:
    """Draw the training loss against λ, for each kind."""
    figure, axis = plt.subplots(figsize=(6.5, 3.8), layout="constrained")
    for kind, table in losses.items():
        axis.errorbar(SHARES, table.mean(0), table.std(0) / SEEDS**0.5, marker="o", ms=3, capsize=2, label=kind)
    axis.axhline(optimum, color="0.6", ls=":", label="loss of the L-BFGS teacher")
    axis.set_xlabel("λ")
    axis.set_ylabel("training loss")
    axis.set_yscale("log")
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("{x:g}")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)


if __name__ == "__main__":
    sys.exit(main())
