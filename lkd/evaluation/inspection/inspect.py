"""`lkd inspect`: what a loss does, found out without a training."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lkd.config.evaluation import InspectRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json
from lkd.core.tensor_files import read_tensors
from lkd.evaluation.inspection.balance_fit import (
    STAGES,
    LogitView,
    States,
    add_features,
    draw_states,
    imply_balance,
    parts_at,
)
from lkd.evaluation.inspection.invariances import check_invariances
from lkd.evaluation.inspection.show import draw_inspection, format_inspection
from lkd.losses.build import build_loss, is_learned
from lkd.losses.learned.features import COMPARISONS, FeatureLoss
from lkd.losses.learned.file import KIND, SUFFIX, VERSION
from lkd.losses.learned.forms import DecoupledLoss
from lkd.losses.learned.inputs import read_logits
from lkd.losses.learned.networks import relative_depths
from lkd.losses.learned.shares import confidence_grid, gradient_shares, gradient_surface
from lkd.losses.logits import CrossEntropyLoss, KDLoss
from lkd.losses.loss import DistillationLoss

# ----------------------------------------------------------------------------------------------------------------------
# The gradient field of a loss over the confidence of teacher and student, beside those of KD and cross-entropy.

PROGRESS = (0.0, 0.5, 1.0)
POINTS = 33
DIGITS = 5  # after the point


def describe_field(loss: DistillationLoss, kd: KDLoss, num_classes: int) -> dict[str, Any]:
    """The gradient at the student's logit of the label; what is left of each probability is shared evenly.

    Args:
        loss: A loss over logits.
        kd: KD to compare with.
        num_classes: Number of classes.

    Returns:
        `confidence`: the grid. `loss`, at three progresses, `kd` and `cross_entropy`: each with its `gradient` (rows
        are the teacher's confidence, columns the student's) and its `rest`: for each of the teacher's confidences the
        student's probability at which the gradient is zero, where the loss would leave it.
    """
    surfaces = [gradient_surface(loss, progress, num_classes, POINTS) for progress in PROGRESS]
    references = {"kd": kd, "cross_entropy": CrossEntropyLoss()}
    return {
        "confidence": confidence_grid(POINTS).tolist(),
        "loss": [{"progress": p, **describe_surface(s)} for p, s in zip(PROGRESS, surfaces, strict=True)],
        **{
            name: describe_surface(gradient_surface(reference, 0.0, num_classes, POINTS))
            for name, reference in references.items()
        },
    }


def describe_surface(surface: Tensor) -> dict[str, Any]:
    """A gradient, [teacher, student], and where its rows rest."""
    return {
        "gradient": [[round(x, DIGITS) for x in row] for row in surface.tolist()],
        "rest": [find_rest(row) for row in surface],
    }


def find_rest(row: Tensor) -> float:
    """The student's probability at which the gradient changes from negative to positive; the last, if there are many.

    0 where it is positive throughout, 1 where it is negative throughout.
    """
    grid = confidence_grid(len(row)).tolist()
    rising = ((row[:-1] < 0) & (row[1:] >= 0)).nonzero().flatten().tolist()
    if not rising:
        return 1.0 if float(row[-1]) < 0 else 0.0
    low, high = row[rising[-1]].item(), row[rising[-1] + 1].item()
    start, end = grid[rising[-1]], grid[rising[-1] + 1]
    return start + (end - start) * -low / (high - low)


# ----------------------------------------------------------------------------------------------------------------------
# The weights and temperatures that a form of a learned loss has of its own.


@torch.no_grad()
def read_own_balance(loss: DistillationLoss, states: States, progress: float) -> dict[str, float]:
    """Their means over the states, by name; empty where the form has none.

    Args:
        loss: The loss.
        states: Where it is looked at.
        progress: How far the training is, in [0, 1].

    Returns:
        `weight` (α) and `temperature` (τ) as the form itself means them; of the decoupled form also `factor` (β of the
        other classes) and `ramp` (the part of the teacher's terms that counts at this progress).
    """
    part: Any = parts_at(loss, progress).get("logits")
    if not hasattr(part, "weights_and_temperatures"):
        return {}
    weight, temperature = part.weights_and_temperatures(states.student, states.teacher, states.target, progress)
    own = {"weight": float(weight.mean()), "temperature": float(temperature.mean())}
    if isinstance(part, DecoupledLoss):
        _, _, factor = part.set_weights(read_logits(states.student, states.teacher, states.target), progress)
        own |= {"factor": float(factor.mean()), "ramp": float(part.ramp(progress, weight))}
    return own


# ----------------------------------------------------------------------------------------------------------------------
# Which stages of a student learn from which of a teacher, and how much each part of a loss pulls.

PAIRING_PROGRESS = (0.0, 0.5, 1.0)
SPARSE = 5  # every so many states: features of all of them take long; no divisor of the number of confidences


def describe_pairing(loss: DistillationLoss) -> dict[str, Any] | None:
    """How a loss pairs stages; None if it reads no features.

    Returns:
        Of a learned loss, at three progresses: `student` and `teacher`, the stages' names and relative depths;
        `assignment`, [student stage, teacher stage], rows of sum 1; `weights`, each comparison's weight at each of the
        student's stages. They are those of networks of as many stages as `STAGES`. Of a hand-made loss: `pairs` of
        stages, each of the same weight, where it pairs any, and the teacher's stages that it reads.
    """
    if any(isinstance(part, FeatureLoss) for part in parts_at(loss, 0.0).values()):
        return {"learned": [describe_learned(loss, progress) for progress in PAIRING_PROGRESS]}
    stages = loss.teacher_stages
    return {"pairs": getattr(loss, "pairs", None), "teacher_stages": list(stages)} if stages else None


@torch.no_grad()
def describe_learned(loss: DistillationLoss, progress: float) -> dict[str, Any]:
    """The pairing of the network over features that is in charge at this progress."""
    (part,) = (part for part in parts_at(loss, progress).values() if isinstance(part, FeatureLoss))
    names = list(STAGES)
    chosen = names[-part.deepest :]
    depths = torch.tensor(relative_depths(names, chosen))
    weights = part.weigh_stages(depths, torch.tensor(progress))
    return {
        "progress": progress,
        "student": dict(zip(chosen, depths.tolist(), strict=True)),
        "teacher": dict(zip(chosen, depths.tolist(), strict=True)),
        "assignment": part.pairing.assign(depths, depths).tolist(),
        "weights": {name: weights[:, kind].tolist() for kind, name in enumerate(COMPARISONS)},
    }


def measure_shares(loss: DistillationLoss, states: States, seed: int) -> list[dict[str, Any]]:
    """Each term's share of the gradient at three progresses, with made-up features; see `gradient_shares`."""
    student, teacher, target = (x[::SPARSE] for x in (states.student, states.teacher, states.target))
    outputs = add_features(student, teacher, seed)
    return [
        {"progress": progress, "shares": gradient_shares(loss, *outputs, target, progress)}
        for progress in PAIRING_PROGRESS
    ]


# ----------------------------------------------------------------------------------------------------------------------
# All that is found out about a loss, as one tree of numbers and names.


def inspect_loss(
    loss: DistillationLoss, kd: KDLoss | None = None, num_classes: int = 10, seed: int = 0
) -> dict[str, Any]:
    """Find out what a loss does, without training anything.

    The loss is asked about made-up logits (of students and teachers of every confidence) and, if it reads features,
    made-up features of four stages; nothing is read, written or changed.

    Args:
        loss: `loss(student, teacher, target, progress) -> dict of terms`: a learned loss or any other. One that reads
            features must take those of `lkd.evaluation.inspection.balance_fit.STAGES`; a learned loss does.
        kd: KD to compare with; by default of weight 0.5 and temperature 4.
        num_classes: Number of classes, at least 2.
        seed: Of what is made up.

    Returns:
        A tree that JSON can hold: `parts`, `parameters`, `kd` and `num_classes`; `field` (see `describe_field`) and
        `balance` (`imply_balance`), each None for a loss that only reads features; `own_balance` (`read_own_balance`);
        `shares` and `pairing` of features (`measure_shares`, `describe_pairing`); and `invariances`
        (`check_invariances`).
    """
    kd = kd or KDLoss()
    loss = copy.deepcopy(loss).eval().requires_grad_(False)
    precise = copy.deepcopy(loss).double()
    states = draw_states(num_classes, seed)
    view = LogitView(loss, seed)
    over_logits = bool(parts_at(view.loss, 0.0)) or not parts_at(loss, 0.0)
    balance = imply_balance(LogitView(precise, seed), states) if over_logits else None
    return {
        "parts": {
            name: {"form": type(part).__name__, "options": getattr(part, "architecture", {})}
            for name, part in (parts_at(loss, 0.0) or {"loss": loss}).items()
        },
        "parameters": sum(parameter.numel() for parameter in loss.parameters()),
        "num_classes": num_classes,
        "kd": {"weight": kd.weight, "temperature": kd.temperature},
        "field": describe_field(view, kd, num_classes) if over_logits else None,
        "balance": balance,
        "own_balance": [
            {"progress": row["progress"], **own}
            for row in (balance or {"over_progress": []})["over_progress"]
            if (own := read_own_balance(precise, states, row["progress"]))
        ],
        "shares": measure_shares(precise, states, seed),
        "pairing": describe_pairing(loss),
        "invariances": check_invariances(loss, num_classes, seed),
    }


# ----------------------------------------------------------------------------------------------------------------------
# Where a learned-loss file comes from: the file itself, and what it says it was trained with.


def describe_file(path: Path) -> dict[str, Any]:
    """Size, hash, format and provenance of a learned-loss file.

    Raises:
        UserError: As `load_loss`.
    """
    header = read_tensors(path, KIND, VERSION)[1]
    content = path.read_bytes()
    return {
        "path": str(path),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
        "format_version": header["format_version"],
        "trained_with": summarize_provenance(header.get("provenance") or {}),
    }


def summarize_provenance(provenance: dict[str, Any]) -> dict[str, Any] | None:
    """What was learned from what, with which versions, to which figures; None if the file does not say."""
    if "recipe" not in provenance:
        return None
    recipe, reuse = provenance["recipe"], provenance.get("reuse") or []
    data, meta, environment = recipe["data"], recipe["meta"], provenance.get("environment", {})
    best = min(reuse, key=lambda row: row["calibrated_cross_entropy"]) if reuse else None
    curve = provenance.get("curve") or []
    return {
        "students": [model["name"] for model in recipe["students"] or [recipe["student"]]],
        "teacher": recipe["teacher"].get("name") or recipe["teacher"]["path"],
        "random_answers": recipe["teacher"].get("random_answers", 0.0),
        "data": data["name"],
        "train_size": data["train_size"],
        "meta_validation_size": data["meta_validation_size"],
        "label_noise": data["label_noise"],
        "split": provenance.get("split"),
        "split_seed": data["split_seed"],
        "seed": recipe["seed"],
        "outer_steps": meta["outer_steps"],
        "rollout_steps": meta["rollout_steps"],
        "estimator": meta["estimator"],
        "objective": meta["objective"],
        "meta_validation": best,
        "outer_value": [curve[0]["outer/value"], curve[-1]["outer/value"]] if curve else None,
        "gradient_shares": {k.removeprefix("share/"): v for k, v in curve[-1].items() if k.startswith("share/")}
        if curve
        else None,
        "cost_in_trainings": provenance.get("cost_in_trainings"),
        "versions": environment.get("versions"),
        "commit": environment.get("commit"),
    }


# ----------------------------------------------------------------------------------------------------------------------
# `lkd inspect`: from a recipe to a report, a JSON file and a picture.


def inspect_recipe(recipe: InspectRecipe) -> tuple[str, Path]:
    """Inspect a recipe's loss; write inspection.json and inspection.png.

    Returns:
        The report for the terminal, and the folder.

    Raises:
        UserError: If the loss, or a setting, is not good.
    """
    kd = KDLoss(recipe.kd_weight, recipe.kd_temperature)
    loss, name = open_loss(recipe.loss)
    file = describe_file(Path(name)) if is_learned(name) else None
    title = Path(name).name if file else describe_options(recipe.loss)
    plain = Path(name).name.removesuffix(SUFFIX)
    folder = Path(recipe.out) if recipe.out else (Path(name).parent if file else Path()) / f"{plain}-inspection"
    report = inspect_loss(loss, kd, recipe.num_classes, recipe.seed)
    write_json(folder / "inspection.json", {"loss": recipe.loss, "file": file, **report})
    draw_inspection(report, title, folder / "inspection.png")
    return format_inspection(report, file, title), folder


def open_loss(specification: dict[str, Any] | str) -> tuple[DistillationLoss, str]:
    """The loss, and its file's path or its name. Losses over features are built for made-up stages.

    Raises:
        UserError: As `build_loss`; or if the loss can only be used with a data set.
    """
    loss = build_loss(specification, STAGES, STAGES)
    name = specification if isinstance(specification, str) else specification["name"]
    if loss.needs_index:
        raise UserError(f"loss {name!r} keeps a memory of every training image; it cannot be inspected without them")
    return loss, name


def describe_options(specification: dict[str, Any] | str) -> str:
    """A hand-made loss's name with the options that were given."""
    if isinstance(specification, str):
        return specification
    options = [f"{key} {value}" for key, value in specification.items() if key != "name"]
    return f"{specification['name']} ({', '.join(options)})" if options else specification["name"]
