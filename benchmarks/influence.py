"""Evidence of influence weights: which flipped labels they find, and what they are worth to students.

python benchmarks/influence.py [RUN_DIR]

Goes on with the rows of an interrupted run in RUN_DIR. Embedded images of Fashion-MNIST, one student (`small_cnn`).
"""

import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rows import matching, median, read_rows, write_row
from scipy.stats import rankdata
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lkd.config import (
    DataRecipe,
    InfluenceSettings,
    InfluenceWeightedLossSettings,
    ModelRecipe,
    TeacherRecipe,
    TrainRecipe,
)
from lkd.core.files import environment, write_json, write_text
from lkd.core.statistics import mean_and_error
from lkd.data import ImageSet, flip_labels, load_dataset
from lkd.influence.influence import measure_influence
from lkd.influence.solvers import InfluenceProblem
from lkd.influence.weighted_loss import InfluenceWeightedLoss, save_weights, weigh_examples
from lkd.losses import CrossEntropyLoss, KDLoss
from lkd.models.teacher import load_teacher
from lkd.tracking.run import evidence
from lkd.training.build import Images, choose_student, open_teacher, prepare_images, prepare_teacher
from lkd.training.distill import label_by_teacher, start_training
from lkd.training.evaluate import evaluate

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "influence"
CPU = torch.device("cpu")
SEEDS, LABELLED, NOISE = 5, 4000, 0.2
DATA = DataRecipe(train_size=11000, meta_validation_size=1000)
SETTINGS = InfluenceSettings(iterations=10, curvature_examples=500)
TRAIN = TrainRecipe(epochs=8)
FLIPPED = ["seed", "influence", "influence_plain", "loss", "gradient_similarity", "unweighted", "weighted"]
SEMI_SUPERVISED = ["seed", "unweighted", "weighted"]
MECHANISMS = {  # how else the weights come about, and what else they weigh
    "refreshed": {"first_epoch": 2, "refresh_epochs": 2},
    "together": {"first_epoch": 2, "refresh_epochs": 2, "teacher_rate": 0.1},
}
SPEED = ["examples", "seconds", "scoring_seconds", "loop_seconds"]
README = """# Influence weights

Made by `python benchmarks/influence.py`: {seeds} paired seeds, embedded images of Fashion-MNIST, `small_cnn`,
KD(0.5, 4) with the embedded teacher, 1,000 meta-validation images, one learning rate. Influence by conjugate
gradients with Gauss-Newton ({iterations} iterations over {curvature_examples:,} images, damping {damping:g}), measured
once on a student trained without weights; a fresh student with the same seed is then trained with weights (static,
sigmoid). `refreshed`: the student's own influence, measured before epochs 2, 4 and 6; `together`: the same, and the
teacher goes on with the labels under these weights at a tenth of the student's learning rate.

| | mean ± standard error |
|---|---|
{rows}

What it shows: influence is no detector of flipped labels here (an AUROC of 0.5 is chance), where the loss of each image
finds nearly all. With flipped labels students with weights are a little better than those without; in the
semi-supervised setting they are not. A teacher that is trained along learns the flipped labels, and takes the student
with it. One learning rate; the weights were chosen on meta-validation labels that the
unweighted students do not use.

Flipped labels: 4,000 images, {epochs} epochs, 20 % of the labels flipped; AUROC of finding the
flipped ones with the cross-entropy of each image, `influence_plain` without calibration of meta-validation (calibration
became the default after the first seed had shown 0.27 without it). Semi-supervised: 4,000 labels, 7,000 images that
get the teacher's; {epochs} epochs, {semi_seeds} seeds. These trainings are short.

Speed: seconds of processor time of one thread, other work beside it. The loop does a backward pass for each example;
it was timed on 100 examples and extrapolated to all.

What it does not show: other networks, losses and learning rates, larger data.
Settings of influence were not tuned. The teacher saw clean labels of other images.

`result.json`: the figures; `flipped.csv`, `semi_supervised.csv`, `mechanisms.csv`, `speed.csv`: every row.
"""


def main() -> int:
    torch.set_num_threads(1)
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/influence-evidence")
    folder.mkdir(parents=True, exist_ok=True)
    images = prepare_images(DATA)
    teacher = prepare_teacher(open_teacher(TeacherRecipe(), images.train), images, CPU)
    few = images.train.select(torch.arange(LABELLED))  # the split interleaves the classes
    for seed in range(SEEDS):
        if not matching(folder / "flipped.csv", seed=seed):
            labels = flip_labels(few.labels, NOISE, few.num_classes, seed)
            network, unweighted = train(few.relabel(labels), images, teacher, TRAIN, seed)
            flipped = labels != few.labels
            found = rank_flipped(network, few.relabel(labels), images, flipped)
            weighted = train_weighted(network, few.relabel(labels), images, teacher, TRAIN, seed, folder)
            write_row(folder / "flipped.csv", FLIPPED, [seed, *found, unweighted, weighted])
    if not read_rows(folder / "speed.csv"):
        write_row(folder / "speed.csv", SPEED, measure_speed(network_of(few, images), images))
    keep_evidence(folder)
    for seed in range(SEEDS):
        if not matching(folder / "semi_supervised.csv", seed=seed):
            splits = replace(DATA, split_seed=seed)
            part = label_by_teacher(replace(images, settings=splits), LABELLED, teacher, CPU).train
            network, unweighted = train(part, images, teacher, TRAIN, seed)
            weighted = train_weighted(network, part, images, teacher, TRAIN, seed, folder)
            write_row(folder / "semi_supervised.csv", SEMI_SUPERVISED, [seed, unweighted, weighted])
        if not matching(folder / "mechanisms.csv", seed=seed):
            part = few.relabel(flip_labels(few.labels, NOISE, few.num_classes, seed))
            reached = [train_by(options, part, images, teacher, seed) for options in MECHANISMS.values()]
            write_row(folder / "mechanisms.csv", ["seed", *MECHANISMS], [seed, *reached])
    keep_evidence(folder)
    return 0


def network_of(part: ImageSet, images: Images) -> nn.Module:
    student = choose_student(ModelRecipe(), part)
    parts = student, replace(images, train=part), CrossEntropyLoss(), None
    return start_training(*parts, TRAIN, 0, CPU).student.train()


def train(part, images, teacher, recipe: TrainRecipe, seed: int, loss: nn.Module | None = None):
    """Train a student and return it with its test accuracy in percent."""
    student = choose_student(ModelRecipe(), part)
    parts = student, replace(images, train=part), loss or KDLoss(0.5, 4.0), teacher
    training = start_training(*parts, recipe, seed, CPU)
    while training.step < training.total_steps:
        training.run_step()
    return training.student, evaluate(training.student, images.test, CPU)["top1"]


def train_weighted(network, part, images, teacher, recipe: TrainRecipe, seed: int, folder: Path) -> float:
    """Train a fresh student with weights from the influence on `network`."""
    loss = KDLoss(0.5, 4.0)
    found = measure_influence(network, loss, teacher, part, images.meta_validation, CPU, SETTINGS)
    path = folder / "weights.safetensors"
    save_weights(path, found.index, weigh_examples(found.scores, SETTINGS), found.scores, {})
    settings = InfluenceWeightedLossSettings(weights=str(path))
    weighted = InfluenceWeightedLoss(loss, images.meta_validation, settings)
    return train(part, images, teacher, recipe, seed, weighted)[1]


def train_by(options: dict[str, Any], part, images, teacher, seed: int) -> float:
    """Train a student whose own influence weighs its images, and with them, perhaps, its teacher's."""
    settings = InfluenceWeightedLossSettings(influence=SETTINGS, **options)
    own = load_teacher(images.train)[0] if settings.teacher_rate else None
    loss = InfluenceWeightedLoss(KDLoss(0.5, 4.0), images.meta_validation, settings, own)
    return train(part, images, teacher, TRAIN, seed, loss)[1]


def rank_flipped(network, part, images, flipped: Tensor) -> list[float]:
    """AUROC of influence on the calibrated and on the plain cross-entropy, of the loss, and of gradient similarity."""
    loss, scores = CrossEntropyLoss(), []
    variants = ({}, {"objective": "cross_entropy"}, {"objective": "calibrated_cross_entropy"})
    for variant in variants:
        settings = InfluenceSettings(**vars(SETTINGS) | variant)
        scores.append(measure_influence(network, loss, None, part, images.meta_validation, CPU, settings).scores)
    network.eval()
    with torch.no_grad():
        logits = network(part.normalize(part.images)).logits
    losses = cross_entropy(logits, part.labels, reduction="none")
    return [area_under_curve(values, flipped) for values in (*scores[:2], losses, scores[2])]


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Probability that a positive scores higher than a negative."""
    wanted = int(positive.sum())
    ranks = rankdata(scores)[positive].sum()
    return float((ranks - wanted * (wanted + 1) / 2) / (wanted * (len(scores) - wanted)))


def measure_speed(network: nn.Module, images) -> list[float]:
    """Processor seconds: all of influence, its scores alone, and a loop of backward passes in their place."""
    everything = load_dataset("embedded").train
    loss, network = CrossEntropyLoss(), network.eval()
    started = time.process_time()
    measure_influence(network, loss, None, everything, images.meta_validation, CPU, SETTINGS)
    seconds = time.process_time() - started
    problem = InfluenceProblem(network, loss, None, everything, images.meta_validation, CPU, SETTINGS)
    direction = problem.differentiate_validation()
    started = time.process_time()
    problem.project_gradients(direction)
    scoring = time.process_time() - started
    parameters, timed = list(network.parameters()), 100
    started = time.process_time()
    for position in range(timed):
        batch = everything.batch(torch.tensor([position]), CPU)
        gradient = torch.autograd.grad(cross_entropy(network(batch.images).logits, batch.target), parameters)
        sum((left * right).sum() for left, right in zip(gradient, direction, strict=True))
    loop = (time.process_time() - started) * len(everything) / timed
    return [len(everything), seconds, scoring, loop]


def keep_evidence(folder: Path) -> None:
    """Write figures, rows and README."""
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    names = ("flipped", "semi_supervised", "mechanisms")
    flipped, semi, mechanisms = (read_rows(folder / f"{name}.csv") for name in names)
    means = {f"{name}: AUROC": mean_and_error([float(row[name]) for row in flipped]) for name in FLIPPED[1:5]}
    differences = {
        key: mean_and_error([float(row["weighted"]) - float(row["unweighted"]) for row in rows])
        for key, rows in (("noisy", flipped), ("semi_supervised", semi))
        if rows
    }
    plain = {row["seed"]: float(row["unweighted"]) for row in flipped}
    for name in MECHANISMS if mechanisms else ():
        differences[f"noisy_{name}"] = mean_and_error([float(row[name]) - plain[row["seed"]] for row in mechanisms])
    means |= {f"weighted − unweighted, {key}, points": value for key, value in differences.items()}
    speed = {name: median(folder / "speed.csv", name) for name in SPEED}
    figures = {
        "seeds": len(flipped),
        "semi_supervised_seeds": len(semi),
        "flipped_label_auroc": means["influence: AUROC"][0],
        "flipped_label_auroc_plain_cross_entropy": means["influence_plain: AUROC"][0],
        "loss_ranking_auroc": means["loss: AUROC"][0],
        "gradient_similarity_auroc": means["gradient_similarity: AUROC"][0],
        "speedup_vs_per_example_loop": speed["loop_seconds"] / speed["scoring_seconds"],
        "seconds_12000_examples": speed["seconds"],
    }
    for key, (mean, error) in differences.items():
        figures |= {f"weighted_minus_unweighted_{key}": mean, f"weighted_minus_unweighted_{key}_se": error}
    for name in (*names, "speed"):
        if (folder / f"{name}.csv").exists():
            shutil.copyfile(folder / f"{name}.csv", EVIDENCE / f"{name}.csv")
    write_json(EVIDENCE / "result.json", evidence("python benchmarks/influence.py", environment(), figures))
    rows = [f"| {name} | {mean:.3f} ± {error:.3f} |" for name, (mean, error) in means.items()]
    rows += [f"| speedup of the scores over a loop | {figures['speedup_vs_per_example_loop']:.1f} |"]
    rows += [f"| seconds for 12,000 examples, all in all | {figures['seconds_12000_examples']:.1f} |"]
    facts = vars(SETTINGS) | {"seeds": figures["seeds"], "semi_seeds": len(semi), "epochs": TRAIN.epochs}
    text = README.format(rows="\n".join(rows), **facts)
    write_text(EVIDENCE / "README.md", text)


if __name__ == "__main__":
    sys.exit(main())
