"""Where a learned-loss file comes from: the file itself, and what it says it was trained with."""

import hashlib
from pathlib import Path
from typing import Any

from lkd.artifact import KIND, VERSION
from lkd.tensor_files import read_tensors


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
