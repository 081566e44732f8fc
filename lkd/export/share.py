"""`lkd push` and `lkd pull`: learned losses on the Hugging Face Hub and in Weights & Biases."""

import json
import shutil
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lkd.config.training import PullRecipe, PushRecipe
from lkd.core.files import hash_file, replaced_atomically, write_text
from lkd.core.tensor_files import read_tensors
from lkd.losses.learned.file import KIND, NOT_LEARNED, VERSION, load_loss, read_provenance, was_learned
from lkd.tracking.remote import HubReference, fetch, parse_reference, upload, upload_artifact

TEMPLATE = Path(__file__).with_name("model_card.md")


def write_card(path: Path, reference: str) -> str:
    """Make the model card of a learned-loss file that will lie at this reference.

    Returns:
        Markdown with the Hub's front matter. Of folders it names the last part only.
    """
    from huggingface_hub import ModelCard, ModelCardData

    tensors, header = read_tensors(path, KIND, VERSION)
    parts, provenance = header.get("architecture", {}).get("parts", {}), header.get("provenance", {})
    networks = ", ".join(f"{name}: {part.get('class')}" for name, part in parts.items())
    card = ModelCard.from_template(
        ModelCardData(library_name="lkd", tags=["knowledge-distillation", "learned-loss", "lkd"]),
        template_path=str(TEMPLATE),
        name=path.name.removesuffix(".lkd.safetensors"),
        parameters=f"{sum(tensor.numel() for tensor in tensors.values()):,}",
        size=f"{path.stat().st_size:,}",
        features="features" in parts,
        reference=reference,
        reads_trust=load_loss(path).reads_trust,
        table=list_facts({"loss networks": networks} | describe_training(provenance)),
        reached=describe_reuse(provenance),
        version=header["format_version"],
        sha256=hash_file(path),
    )
    return f"{card.content}\n"


def describe_training(provenance: dict[str, Any]) -> dict[str, Any]:
    """What the header says of the meta-training; what it does not say is left out."""
    recipe, environment = provenance.get("recipe", {}), provenance.get("environment", {})
    worlds, drawn = recipe.get("worlds") or {}, (recipe.get("draw") or {}).get("worlds", 0)
    own = {} if worlds or drawn else recipe  # else it says only what worlds have in common
    data, teacher = (own.get(name, {}) for name in ("data", "teacher"))
    meta = recipe.get("meta", {})
    students = own.get("students") or [own.get("student", {})]
    facts = {
        "learned": None if was_learned({"provenance": provenance}) else f"{NOT_LEARNED}: it is the initial one",
        "worlds": f"{len(worlds)} listed, {drawn} drawn" if worlds or drawn else None,
        "data": data.get("name"),
        "training images": data.get("train_size") or ("all" if data else None),
        "meta-validation images": data.get("meta_validation_size"),
        "label noise": data.get("label_noise"),
        "kind of label noise": data.get("label_noise_kind") if data.get("label_noise") else None,
        "label noise of meta-validation": data.get("meta_validation_noise") or None,
        "imbalance": data.get("imbalance"),
        "split": provenance.get("split") if own else None,
        "augmentation": data.get("augmentation"),
        "teacher": teacher.get("name") or (Path(str(teacher["path"])).name if teacher else None),
        "teacher's random answers": teacher.get("random_answers") or None,
        "factor of the teacher's logits": teacher.get("logit_scale"),
        "students": ", ".join(student["name"] for student in students if "name" in student) or None,
        "outer steps": meta.get("outer_steps"),
        "rollout steps": meta.get("rollout_steps"),
        "estimator": meta.get("estimator"),
        "objective": meta.get("objective"),
        "seed": recipe.get("seed"),
        "cost, in student trainings": provenance.get("cost_in_trainings"),
        "versions": json.dumps(environment["versions"]) if "versions" in environment else None,
        "commit": environment.get("commit"),
    }
    return {name: value for name, value in facts.items() if value is not None}


def describe_reuse(provenance: dict[str, Any]) -> str:
    """The looks at fresh students trained with the loss, if there were any."""
    rows = provenance.get("reuse") or []
    if not rows:
        return "No fresh student was trained with it while it was learned."
    first, best = rows[0], min(rows, key=lambda row: row["calibrated_cross_entropy"])
    return list_facts(
        {
            f"{when} (outer step {row['step']})": f"top-1 {row['top1']:.2f} %, calibrated cross-entropy "
            f"{row['calibrated_cross_entropy']:.4f}"
            for when, row in (("fresh students, before learning", first), ("fresh students, this loss", best))
        }
    )


def list_facts(facts: dict[str, Any]) -> str:
    """A Markdown table; whatever a value holds stays in its cell."""
    cells = ((name, " ".join(str(value).split()).replace("`", "").replace("|", "/")) for name, value in facts.items())
    return tabulate([(name, f"`{cell}`") for name, cell in cells], ["", ""], "github", disable_numparse=True)


def push_loss(recipe: PushRecipe) -> str:
    """Send a learned loss; where it is, or the file of its card."""
    path, reference = Path(recipe.loss), parse_reference(recipe.to)
    load_loss(path)  # what cannot be loaded is not sent
    card = write_card(path, recipe.to)
    if recipe.card:
        write_text(Path(recipe.card), card)
        return recipe.card
    if isinstance(reference, HubReference):
        return upload(path, reference, card, recipe.private)
    return upload_artifact(path, reference, "loss", describe_training(read_provenance(path)))


def pull_loss(recipe: PullRecipe) -> Path:
    """Fetch a learned loss and check it; the file."""
    found = fetch(recipe.loss)
    load_loss(found)
    with replaced_atomically(Path(recipe.out)) as temporary:
        shutil.copyfile(found, temporary)
    return Path(recipe.out)
