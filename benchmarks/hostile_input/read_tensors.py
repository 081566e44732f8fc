"""Valid files of tensors, small, and their readers: what is read is also used once."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

import lkd
from lkd.config import DataRecipe, ModelRecipe, TrainRecipe
from lkd.core.errors import UserError
from lkd.core.files import write_json
from lkd.core.outputs import Outputs
from lkd.influence.weighted_loss import load_weights, save_weights
from lkd.losses import LearnedLoss, ReplayedLoss
from lkd.losses.build import build_loss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.file import read_provenance, save_loss
from lkd.losses.learned.forms import FORMS
from lkd.models import build
from lkd.models.files import load_network, save_network
from lkd.models.published_weights import load_crd_checkpoint
from lkd.pool.pool import INDEX, open_pool, write_student
from lkd.training.build import choose_student, prepare_images
from lkd.training.checkpoints import Checkpoints
from lkd.training.distill import start_training

CPU = torch.device("cpu")
FOREIGN = "resnet8"
TINY = {"name": "tiny_cnn", "num_classes": 10, "in_chans": 1, "pretrained": False, "options": {}}
STAGES = {"stage1": (4, 14, 14), "stage2": (8, 7, 7)}


def write_losses(folder: Path) -> None:
    """A learned loss of every form, one over features, one that is replayed."""
    for name, form in FORMS.items():
        save_loss(folder / f"{name}.lkd.safetensors", LearnedLoss({"logits": form(hidden=3)}), {"seed": 1})
    both = LearnedLoss({"logits": FORMS["decoupled"](hidden=3), "features": FeatureLoss(hidden=2)}, True)
    save_loss(folder / "both.lkd.safetensors", both, {"recipe": {"meta": {"kind": "both"}}, "curve": [{"step": 1}]})
    replayed = ReplayedLoss([LearnedLoss({"logits": FORMS["generic"](hidden=2)}) for _ in range(3)], [0.0, 0.3, 0.6])
    save_loss(folder / "replayed.lkd.safetensors", replayed, {})


def read_loss(path: Path) -> None:
    """Load a loss, attach it, compute it with its gradient."""
    read_provenance(path)
    build_loss(str(path), STAGES, STAGES)
    loss = lkd.load_loss(path)
    features = {name: torch.randn(2, *shape) for name, shape in STAGES.items()}
    student = Outputs(torch.randn(2, 3, requires_grad=True), features)
    terms = loss(student, Outputs(torch.randn(2, 3), features), torch.tensor([0, 2]), 0.3)
    torch.stack(list(terms.values())).sum().backward()


def write_networks(folder: Path) -> None:
    """Networks of the quickstart and of the literature, and one of timm's."""
    for name in ("tiny_cnn", "small_cnn", "resnet8"):
        architecture = {"name": name, "num_classes": 10, "in_chans": 1}
        save_network(folder / f"{name}.safetensors", build(**architecture), architecture, {"top1": 0.5})
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8}
    architecture = {"name": "resnet10t", "num_classes": 10, "in_chans": 1, "options": options}
    save_network(folder / "timm.safetensors", build(**architecture), architecture, {"top1": 0.5})


def read_network(path: Path) -> None:
    """Load a network and ask it about an image."""
    network, header = load_network(path)
    shape = 1, header["architecture"].get("in_chans", 3), 32, 32
    with torch.no_grad():
        network(torch.zeros(shape))


def write_foreign(folder: Path) -> None:
    """A checkpoint as RepDistiller's, and one in torch's older format."""
    state = build(FOREIGN, 10, 3).state_dict()
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(70.0)}, folder / "new.pth")
    small = {"model": {"a.weight": torch.zeros(3, 4)}}
    torch.save(small, folder / "small.pth")


def read_foreign(path: Path) -> None:
    """Load a checkpoint of another program."""
    load_crd_checkpoint(path, FOREIGN)


_training: list[Any] = []


def tiny_training() -> Any:
    """A training that a checkpoint is of; made once."""
    if not _training:
        images = prepare_images(DataRecipe(train_size=100, meta_validation_size=50))
        student = choose_student(ModelRecipe("tiny_cnn"), images.train)
        parts = student, images, build_loss("cross_entropy"), lambda batch: None
        _training.append(start_training(*parts, TrainRecipe(epochs=1, batch_size=20), 0, CPU))
        _training[0].run_step()
    return _training[0]


def write_checkpoint(folder: Path) -> None:
    """A checkpoint."""
    Checkpoints(folder / "checkpoints", TrainRecipe(), str).save_training(tiny_training(), history=[{"loss": 0.5}])


def read_checkpoint(path: Path) -> None:
    """Go on from a checkpoint, for a step; one that is passed over with a warning, being the first, is refused too."""
    said: list[str] = []
    Checkpoints(path.parent, TrainRecipe(), said.append).resume_training(tiny_training())
    if said:
        raise UserError(said[-1])
    if tiny_training().step < tiny_training().total_steps:
        tiny_training().run_step()


def write_pool(folder: Path) -> None:
    """A pool of one student at one age."""
    pool = folder / "pool"
    write_student(pool / "student.safetensors", tiny_training())
    students = [{"file": "student.safetensors", "training": 0, "progress": 0.2}]
    write_json(pool / INDEX, {"students": students, "architecture": TINY, "split": "0123"})


def read_pool(path: Path) -> None:
    """Open a pool and read its student."""
    images: Any = SimpleNamespace(fingerprint="0123")
    pool = open_pool(path.parent, images, TINY)
    assert bool(((pool.ages >= 0) & (pool.ages <= 1)).all())
    assert pool.trainings >= 0
    network = build(**TINY)
    for position in range(min(len(pool), 3)):
        student = pool.read(position, CPU)
        assert 0 <= student.progress <= 1
        state = {**student.state.parameters, **student.state.buffers}
        torch.func.functional_call(network, state, torch.zeros(2, 1, 28, 28))


def write_weights(folder: Path) -> None:
    """Example weights."""
    save_weights(folder / "weights.safetensors", torch.arange(9), torch.ones(9), torch.zeros(9), {"seed": 0})


def read_weights(path: Path) -> None:
    """Read example weights."""
    index, weight = load_weights(path)
    assert index.dtype == torch.int64
    assert index.shape == weight.shape
    assert bool((weight >= 0).all())
