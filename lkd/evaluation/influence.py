"""Influence of the training images on a network's meta-validation loss: a table, weights and a picture."""

import math
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.config.training import InfluenceRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json, write_text
from lkd.data.images import ImageSet
from lkd.evaluation.comparison.tables import format_csv
from lkd.influence.influence import Influence, measure_influence
from lkd.influence.weighted_loss import save_weights, weigh_examples
from lkd.losses.build import build_loss, reads_features
from lkd.meta_training.log import plt, save_figure
from lkd.models.files import fit_to_images
from lkd.models.teacher import load_teacher_network
from lkd.tracking.remote import fetch_named
from lkd.tracking.run import Run, evidence
from lkd.training.build import Images, check_network, open_teacher, prepare_images, prepare_teacher

SHEET_COLUMNS = 8


def plot_sheet(images: ImageSet, influence: Tensor, shown: int, path: Path) -> None:
    """Draw the N images that help a network most and those that harm it most; negative influence, [N], is helpful."""
    order = influence.argsort()
    shown = min(shown, len(order))
    rows = -(-shown // SHEET_COLUMNS)
    figure = plt.figure(figsize=(1.1 * 2 * SHEET_COLUMNS, 1.45 * rows + 0.5), layout="constrained")
    halves: Any = figure.subfigures(1, 2)
    for half, title, chosen in zip(halves, ("most helpful", "most harmful"), (order, order.flip(0)), strict=True):
        half.suptitle(title, fontsize=11)
        axes = half.subplots(rows, SHEET_COLUMNS, squeeze=False).flatten()
        for axis in axes:
            axis.axis("off")
        for axis, position in zip(axes, chosen[:shown].tolist(), strict=False):
            batch = images.batch(torch.tensor([position]), torch.device("cpu"))
            pixels = batch.images[0].permute(1, 2, 0)
            pixels = (pixels * torch.tensor(images.std) + torch.tensor(images.mean)).clamp(0, 1)
            axis.imshow(pixels.squeeze(2).numpy(), cmap="gray", vmin=0, vmax=1)
            axis.set_title(f"{images.class_names[int(batch.target)]}\n{influence[position]:.2g}", fontsize=7)
    save_figure(figure, path)


def measure_run(recipe: InfluenceRecipe, run: Run) -> Path:
    """Measure influence and write the run's files.

    Returns:
        The table, most helpful images first.

    Raises:
        UserError: If the network, the loss or a setting is not good.
    """
    specification = fetch_named(recipe.loss) if isinstance(recipe.loss, str) else recipe.loss
    if reads_features(specification):
        raise UserError(f"loss: {recipe.loss!r} reads features; influence takes losses over logits, such as kd")
    loss = build_loss(specification).to(run.device)
    images = prepare_images(recipe.data)
    network, header = load_teacher_network(recipe.checkpoint)
    check_network(recipe.checkpoint, header["architecture"], images.train)
    is_taught = recipe.loss not in ("cross_entropy", {"name": "cross_entropy"})
    teacher = None
    if is_taught:
        opened = open_teacher(recipe.teacher, images.train)
        opened.check_classes(images.train)
        teacher = prepare_teacher(opened, images, run.device)
    started = time.perf_counter()
    parts = images.train, images.meta_validation
    network = fit_to_images(recipe.checkpoint, network, header, images.train).to(run.device)
    found = measure_influence(network, loss, teacher, *parts, run.device, recipe.influence, seed=recipe.seed)
    seconds = time.perf_counter() - started
    weights = weigh_examples(found.scores, recipe.influence)
    say_how(recipe, found, seconds, run)
    path = run.path / "influence.csv"
    positions = find_positions(images, found.index)
    write_text(path, format_csv(list_rows(images.train, positions, found.scores, weights)))
    save_weights(run.path / "weights.safetensors", found.index, weights, found.scores, run.provenance())
    plot_sheet(images.train.select(positions), found.scores, recipe.shown, run.path / "influence.png")
    figures = {
        "examples": len(found.scores),
        "seconds": seconds,
        "helpful_fraction": float((found.scores < 0).double().mean()),
        "least_weight": float(weights.min()),
        "largest_weight": float(weights.max()),
    }
    solved = {"damping": found.damping, "least_curvature": found.least_curvature, "residual": found.residual}
    figures |= {name: value for name, value in solved.items() if not math.isnan(value)}
    write_json(run.path / "result.json", evidence("lkd influence", run.provenance()["environment"], figures))
    run.tracker.log(0, **figures)
    run.tracker.keep("weights", run.path / "weights.safetensors")
    run.tracker.show(0, "influence", run.path / "influence.png")
    return path


def say_how(recipe: InfluenceRecipe, found: Influence, seconds: float, run: Run) -> None:
    """Say what was measured, and what the solver met."""
    settings = recipe.influence
    run.say(f"influence of {len(found.scores):,} images by {settings.method} in {seconds:.1f} s")
    if found.residual == found.residual:
        run.say(f"relative residual {found.residual:.2g} after at most {settings.iterations} iterations")
    if found.least_curvature <= 0 and settings.curvature == "hessian":
        run.say(
            f"the Hessian is not positive definite: curvature {found.least_curvature:.3g} was met; "
            f"damping {found.damping:.3g} was taken, {settings.damping:g} was asked for"
        )
    elif found.damping == found.damping:
        run.say(f"damping {found.damping:.3g}, least curvature met {found.least_curvature:.3g}")


def find_positions(images: Images, index: Tensor) -> Tensor:
    """Positions of these images in the training set, [N]."""
    table = torch.zeros(int(images.train.index.max()) + 1, dtype=torch.int64)
    table[images.train.index] = torch.arange(len(images.train))
    return table[index]


def list_rows(images: ImageSet, positions: Tensor, influence: Tensor, weights: Tensor) -> list[dict[str, Any]]:
    """A row for each image, most helpful first."""
    rows = []
    for row in influence.argsort().tolist():
        place, label = int(positions[row]), int(images.labels[positions[row]])
        image = {
            "position": place,
            "index": int(images.index[place]),
            "label": label,
            "class": images.class_names[label],
        }
        rows.append(image | {"influence": f"{influence[row]:.6g}", "weight": f"{weights[row]:.6g}"})
    return rows
