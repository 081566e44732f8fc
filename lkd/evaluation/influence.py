"""Influence of the training images on a network's meta-validation loss: tables, weights, a page with pictures."""

import base64
import io
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from lkd.config.training import InfluenceRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json, write_text
from lkd.core.statistics import area_under_curve
from lkd.data.images import ImageSet
from lkd.evaluation.comparison.tables import format_csv
from lkd.evaluation.report.page import render
from lkd.influence.influence import RESIDUAL_LIMIT, Influence, measure_influence
from lkd.influence.solvers import check_settings
from lkd.influence.weighted_loss import find_kurtosis, save_weights, weigh_examples
from lkd.losses.build import build_loss, reads_features
from lkd.losses.functions import cross_entropies
from lkd.models.files import fit_to_images
from lkd.models.teacher import TeacherFunction, load_teacher_network
from lkd.tracking.remote import fetch_named
from lkd.tracking.run import Run, evidence
from lkd.training.answers import measure_teacher, prepare_teacher
from lkd.training.build import Images, check_network, open_teacher, prepare_images

CURVE_POINTS = 100


def restore_pixels(images: ImageSet, normalized: Tensor) -> Tensor:
    """Pixels in [0, 1], [H, W, 3] or [H, W], of a normalised image, [C, H, W]; of other channels than 3 their mean."""
    pixels = (normalized.permute(1, 2, 0) * torch.tensor(images.std) + torch.tensor(images.mean)).clamp(0, 1)
    return pixels if pixels.shape[2] == 3 else pixels.mean(2)


def measure_run(recipe: InfluenceRecipe, run: Run) -> Path:
    """Measure influence and write the run's files.

    Returns:
        The table, most helpful images first.

    Raises:
        UserError: If the network, the loss or a setting is not good.
    """
    specification = {"name": recipe.loss} if isinstance(recipe.loss, str) else dict(recipe.loss)
    if isinstance(specification.get("name"), str):
        specification["name"] = fetch_named(specification["name"])
    if reads_features(specification):
        raise UserError(f"loss: {recipe.loss!r} reads features; influence takes losses over logits, such as kd")
    loss = build_loss(specification).to(run.device)
    images = prepare_images(recipe.data)
    network, header = load_teacher_network(recipe.checkpoint)
    check_network(recipe.checkpoint, header["architecture"], images.train)
    teacher = None
    if loss.needs_teacher:
        opened = open_teacher(recipe.teacher, images.train)
        opened.check_classes(images.train)
        teacher = prepare_teacher(opened, images, run.device)
    started = time.perf_counter()
    parts = images.train, images.meta_validation
    network = fit_to_images(recipe.checkpoint, network, header, images.train).to(run.device)
    check_settings(network, recipe.influence)
    if loss.reads_trust:
        loss.set_trust(measure_teacher(opened, images, run.device, teacher))
        loss.update_trust(network)
    found = measure_influence(network, loss, teacher, *parts, run.device, recipe.influence, seed=recipe.seed)
    seconds = time.perf_counter() - started
    weights = weigh_examples(found.scores, recipe.influence)
    if len(weights) and bool((weights == 1).all()):
        run.say("all weights are 1, as few images stand out: few labels are wrong, or this network cannot tell")
    say_how(recipe, found, seconds, run)
    path = run.path / "influence.csv"
    positions = find_positions(images, found.index)
    write_text(path, format_csv(list_rows(images.train, positions, found.scores, weights)))
    judged = Judged(images.train.select(positions), found.scores, weights)
    save_weights(run.path / "weights.safetensors", judged.images, weights, found.scores, run.provenance())
    asked = {"network": ask(lambda batch: network.eval()(batch.images), images, positions, run.device)}
    if teacher:
        asked["teacher"] = ask(teacher, images, positions, run.device)
    issues = find_issues(judged, asked["network"][0])
    quality = weights / weights.max() if recipe.influence.favour == "helpful" else weights.min() / weights
    quality = quality.nan_to_num(1.0)  # 0 / 0: nothing is better
    labels = list_issues(judged, positions, issues, asked["network"][0], quality)
    write_text(run.path / "label_issues.csv", format_csv(labels))
    wrong = find_wrong(recipe, judged, positions)
    write_text(run.path / "influence.html", draw_page(recipe, found, judged, asked, issues, wrong))
    figures = {
        "examples": len(found.scores),
        "seconds": seconds,
        "helpful_fraction": float((found.scores < 0).double().mean()),
        "least_weight": float(weights.min()),
        "largest_weight": float(weights.max()),
        "kurtosis": find_kurtosis(found.scores),
    }
    figures["labels_to_check"] = int(issues.sum())
    if wrong is not None:
        figures["auroc_of_wrong_labels"] = area_under_curve(found.scores.numpy(), wrong.numpy())
        figures["auroc_of_wrong_labels_by_loss"] = area_under_curve(asked["network"][1].numpy(), wrong.numpy())
    solved = {"damping": found.damping, "least_curvature": found.least_curvature, "residual": found.residual}
    figures |= {name: value for name, value in solved.items() if not math.isnan(value)}
    write_json(run.path / "result.json", evidence("lkd influence", run.provenance()["environment"], figures))
    run.tracker.log(0, **figures)
    run.tracker.keep("weights", run.path / "weights.safetensors")
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


# ----------------------------------------------------------------------------------------------------------------------
# Labels to check, and the page.


class Judged(NamedTuple):
    """The images whose influence is known, and it and their weights, [N] each."""

    images: ImageSet
    influence: Tensor
    weights: Tensor


@torch.no_grad()
def ask(network: TeacherFunction, images: Images, positions: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """The most probable class of the images at these positions, and the cross-entropy of their labels, [N] each."""
    answers, losses = torch.zeros(len(images.train), dtype=torch.int64), torch.zeros(len(images.train))
    for batch in images.train.batches(positions.split(images.train.at_once), device):
        logits, places = network(batch).logits, find_positions(images, batch.index.cpu())
        answers[places] = logits.argmax(1).cpu()
        losses[places] = cross_entropies(logits, batch.target).float().cpu()
    return answers[positions], losses[positions]


def find_issues(judged: Judged, answers: Tensor) -> Tensor:
    """Labels to check, [N]: the image harms, and the network's answer is another."""
    return (judged.influence > 0) & (answers != judged.images.labels)


def list_issues(
    judged: Judged, positions: Tensor, issues: Tensor, answers: Tensor, quality: Tensor
) -> list[dict[str, Any]]:
    """A row for each image in cleanlab's column names: those to check first, most harmful first."""
    order = judged.influence.argsort(descending=True)
    order = torch.cat([order[issues[order]], order[~issues[order]]])
    return [
        {
            "position": int(positions[row]),
            "index": int(judged.images.index[row]),
            "is_label_issue": bool(issues[row]),
            "label_quality": f"{float(quality[row]):.6g}",
            "given_label": int(judged.images.labels[row]),
            "predicted_label": int(answers[row]),
        }
        for row in order.tolist()
    ]


def find_wrong(recipe: InfluenceRecipe, judged: Judged, positions: Tensor) -> Tensor | None:
    """Which labels were flipped on purpose, [N]; None where none were, or all."""
    if not recipe.data.label_noise:
        return None
    true = prepare_images(replace(recipe.data, label_noise=0.0)).train.labels
    wrong = true[positions] != judged.images.labels
    return wrong if len(wrong.unique()) == 2 else None


def draw_page(
    recipe: InfluenceRecipe,
    found: Influence,
    judged: Judged,
    asked: dict[str, tuple[Tensor, Tensor]],
    issues: Tensor,
    wrong: Tensor | None,
) -> str:
    """The page of what was found."""
    order, names = judged.influence.argsort(descending=True), judged.images.class_names
    halves = ("The most harmful images", order), ("The most helpful images", order.flip(0))
    scores = judged.influence, asked["network"][1]
    of = [(name, judged.images.labels == label) for label, name in enumerate(names)]
    return render(
        "influence.html",
        count=f"{len(order):,}",
        objective=recipe.influence.objective.replace("_", "-" if "cross" in recipe.influence.objective else " "),
        suggested=f"{int(issues.sum()):,}",
        weighted=not bool((judged.weights == 1).all()),
        warnings=[
            f"The linear system is not solved: relative residual {found.residual:.2g}; raise influence.iterations "
            "or influence.damping."
        ]
        if found.residual > RESIDUAL_LIMIT
        else [],
        curves=[draw_precision(each, wrong) for each in scores] if wrong is not None else [],
        areas=[area_under_curve(each.numpy(), wrong.numpy()) for each in scores] if wrong is not None else [],
        wrong=f"{int(wrong.sum()):,}" if wrong is not None else "",
        parts=[
            (title, [draw_card(judged, row, asked, wrong) for row in rows[: recipe.shown].tolist()])
            for title, rows in halves
        ],
        classes=[
            [
                name,
                f"{int(own.sum()):,}",
                f"{100 * float((judged.influence[own] > 0).double().mean()):.0f} %",
                f"{float(judged.weights[own].mean()):.2f}",
                f"{int(issues[own].sum()):,}",
            ]
            for name, own in of
            if own.any()
        ],
    )


def draw_card(
    judged: Judged, row: int, asked: dict[str, tuple[Tensor, Tensor]], wrong: Tensor | None
) -> dict[str, Any]:
    """An image as the page shows it."""
    images, names = judged.images, judged.images.class_names
    normalized = images.batch(torch.tensor([row]), torch.device("cpu")).images[0]
    buffer = io.BytesIO()
    Image.fromarray((255 * restore_pixels(images, normalized)).round().byte().numpy()).save(buffer, "PNG")
    return {
        "picture": base64.b64encode(buffer.getvalue()).decode(),
        "label": names[int(images.labels[row])],
        "answers": {who: names[int(answers[row])] for who, (answers, _) in asked.items()},
        "flipped": wrong is not None and bool(wrong[row]),
        "influence": f"{float(judged.influence[row]):.2g}".replace("-", "\N{MINUS SIGN}"),
        "weight": f"{float(judged.weights[row]):.2f}",
        "index": int(images.index[row]),
    }


def draw_precision(scores: Tensor, wrong: Tensor) -> str:
    """Which part of the k labels of the highest scores is wrong, over k: the points of a line in the page's chart."""
    hits = wrong[scores.argsort(descending=True)].cumsum(0)
    counts = torch.linspace(1, len(scores), min(CURVE_POINTS, len(scores))).round().long()
    shares = hits[counts - 1] / counts
    return " ".join(
        f"{40 + 410 * int(count) / len(scores):.1f},{200 - 190 * float(share):.1f}"
        for count, share in zip(counts, shares, strict=True)
    )
