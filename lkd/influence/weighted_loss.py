"""Any loss with a weight for every training example, from a file or from the influence of the student in training."""

import hashlib
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lkd.config.training import InfluenceSettings, InfluenceWeightedLossSettings
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import read_tensors, write_tensors
from lkd.data.image_files import ImageFiles
from lkd.data.images import ImageSet
from lkd.influence.influence import measure_influence
from lkd.influence.solvers import check_settings
from lkd.losses.learned.trust import Trust
from lkd.losses.loss import DistillationLoss, Progress
from lkd.models.teacher import TeacherFunction

# ----------------------------------------------------------------------------------------------------------------------
# From influence to weights of the training examples, and the file that holds them.

KIND, VERSION = "set of example weights", 1
WEIGHTED, UNWEIGHTED = 6.0, 12.0  # kurtosis of the scores up to which sharpness is whole, and from which it is 0


def find_kurtosis(influence: Tensor) -> float:
    """Fourth moment of the standardised scores, [N]: 3 for a normal distribution, its inverse the share that stand out.

    Many wrong labels make two groups of scores, and a kurtosis of 2 to 6; right labels leave a few hard images far out,
    and one over 15.
    """
    centred = influence.double() - influence.double().mean()
    return float(centred.pow(4).mean() / centred.square().mean().square())


def weigh_examples(influence: Tensor, settings: InfluenceSettings) -> Tensor:
    """Weights of mean 1, so that they are no learning rate in disguise; all 1 where no example stands out, or few do.

    `sigmoid` is *our reconstruction* of the paper's "sigmoid-based mechanism", whose formula we could not read:
    sigmoid(−sharpness · (I − mean) / standard deviation). Sharpness falls from its whole to nothing as the kurtosis
    goes from `WEIGHTED` to `UNWEIGHTED`: on right labels what harms most are hard images, and dropping them costs.
    `exponential` is the official code's e^m with m the influence
    scaled to [−1, 1] by its minimum and maximum. That code gives *more* weight to positive influence, the harmful
    examples (`favour: harmful`), and outliers fix the scale, so that nearly all weights are alike.

    Args:
        influence: [N]; negative is helpful.
        settings: Form, sharpness and sign.

    Returns:
        Weights, [N].
    """
    benefit = -influence.double() if settings.favour == "helpful" else influence.double()
    spread = benefit.std(correction=0)
    if not spread > 0:
        return torch.ones_like(influence)
    if settings.weights == "sigmoid":
        part = (UNWEIGHTED - find_kurtosis(influence)) / (UNWEIGHTED - WEIGHTED)
        sharpness = settings.sharpness * min(1.0, max(0.0, part))
        weights = (sharpness * (benefit - benefit.mean()) / spread).sigmoid()
    else:
        low, high = benefit.min(), benefit.max()
        weights = (2 * (benefit - low) / (high - low) - 1).exp()
    return (weights / weights.mean()).to(influence.dtype)


def save_weights(path: Path, images: ImageSet, weights: Tensor, influence: Tensor, provenance: dict[str, Any]) -> None:
    """Write the weight and the influence of each example, [N] each, by its index, and a hash of its image."""
    tensors = {"index": images.index, "weight": weights, "influence": influence, "example": hash_examples(images)}
    write_tensors(path, tensors, KIND, VERSION, {"provenance": provenance})


def hash_examples(images: ImageSet) -> Tensor:
    """A hash of each image, int64, [N]: of those in memory of the pixels, of files of the name."""
    files = images.images

    def read(slot: int) -> bytes:
        return os.fsencode(files.name(slot)) if isinstance(files, ImageFiles) else files[slot].numpy().tobytes()

    found = (hashlib.blake2b(read(slot), digest_size=8).digest() for slot in range(len(images)))
    return torch.tensor([int.from_bytes(each, "little", signed=True) for each in found])


def load_weights(path: Path) -> tuple[Tensor, Tensor, Tensor | None]:
    """Read index and weight of each example and its hash, if the file has it, [N] each; see `hash_examples`.

    Raises:
        UserError: If the file is missing, damaged or another one.
    """
    tensors, _ = read_tensors(path, KIND, VERSION)
    nothing = torch.empty(0)
    index, weight = tensors.get("index", nothing), tensors.get("weight", nothing)
    example = tensors.get("example")
    good = example is None or (example.dtype == torch.int64 and example.shape == index.shape)
    good &= index.dtype == torch.int64 and index.dim() == 1 and index.shape == weight.shape
    if not (good and weight.is_floating_point() and bool((weight >= 0).all() and weight.isfinite().all())):
        raise UserError(f"{path}: has not one index (int64) and one weight of at least 0 for each example: replace it")
    return index, weight, example


# ----------------------------------------------------------------------------------------------------------------------
# Any loss with a weight for every training example, from a file or from the influence of the student in training.


class InfluenceWeightedLoss(DistillationLoss):
    """A loss whose gradient at the student's outputs is multiplied, row by row, by a weight of each example.

    That is the gradient of Σ w_i L_i / B for every loss that is a mean over examples of functions of their own outputs
    (cross_entropy, kd, dkd, logit_mse, logit_standardization, fitnet, at, learned losses over logits). Losses that
    compare the examples of a batch (dist, sp, rkd) have no L_i; for them it is a heuristic. The loss's own parameters
    (adapters) see no weights, and the terms' values are those without weights.

    *Our reconstruction* of KD-AIF's update mechanisms: static weights of a file, or of the student itself, measured
    once or again and again; and teacher and student together, where the teacher goes on with the cross-entropy of the
    labels under the same weights, as the term `teacher/task`.

    Args:
        loss: The loss.
        meta_validation: What influence is measured on.
        settings: Where the weights come from.
        teacher: The network of a teacher that is trained along, whose BatchNorm stays as it is; None for a frozen one.

    Raises:
        UserError: If a setting is impossible or the file is not good.
    """

    needs_index = True
    row: Tensor
    weight: Tensor

    def __init__(
        self,
        loss: DistillationLoss,
        meta_validation: ImageSet,
        settings: InfluenceWeightedLossSettings,
        teacher: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if loss.needs_index:
            raise UserError("loss 'influence_weighted': its `loss` remembers images itself; take another")
        if loss.teacher_stages and not settings.weights:
            raise UserError(
                "loss 'influence_weighted': its `loss` reads features, of which no influence is measured; take one "
                "over logits, or give the `weights` of a file"
            )
        self.loss = loss
        self.meta_validation = meta_validation
        self.settings = settings
        self.teacher_stages, self.reads_trust = loss.teacher_stages, loss.reads_trust
        self.reads_logits = loss.reads_logits or teacher is not None
        self.teacher = teacher.requires_grad_(True) if teacher else None
        self.known = load_weights(Path(settings.weights)) if settings.weights else None

    @property
    def own_teacher(self) -> TeacherFunction | None:
        """The teacher that is trained along, if there is one: it is to be asked in the place of the frozen one."""
        network = self.teacher
        return None if network is None else lambda batch: network.eval()(batch.images.clone())

    @property
    def rates(self) -> dict[nn.Parameter, float]:
        """The teacher's; its gradient is whole, as optimisers such as Adam take a smaller one for the same."""
        return dict.fromkeys(self.teacher.parameters(), self.settings.teacher_rate) if self.teacher else {}

    def set_trust(self, trust: Trust) -> None:
        """Let the loss be told what was measured."""
        self.loss.set_trust(trust)

    def update_trust(self, student: nn.Module) -> None:
        """Let the loss measure the student's own accuracy anew."""
        self.loss.update_trust(student)

    def enroll(self, index: Tensor, labels: Tensor) -> None:
        """Lay out the weights of the training images, all 1 or the file's.

        Args:
            index: Identity of each training image, [N].
            labels: Not read.

        Raises:
            UserError: If the file has no weight for one of them.
        """
        self.register_buffer("row", torch.zeros(int(index.max()) + 1, dtype=torch.int64, device=index.device))
        self.row[index] = torch.arange(len(index), device=index.device)
        self.register_buffer("weight", torch.ones(len(index), device=index.device))
        if self.known:
            missing = ~torch.isin(index, self.known[0])
            if missing.any():
                raise UserError(
                    f"loss 'influence_weighted': {self.settings.weights} has no weight for {int(missing.sum()):,} of "
                    f"the {len(index):,} training images; make it with the same `data` as this training"
                )
            kept = torch.isin(self.known[0], index)
            self.set_weights(self.known[0][kept], self.known[1][kept])

    def set_weights(self, index: Tensor, weight: Tensor) -> None:
        """Give these images these weights, [N] each."""
        self.weight[self.row[index.to(self.row.device)]] = weight.to(self.weight)

    def begin_epoch(
        self, epoch: int, student: nn.Module, images: ImageSet, teacher: TeacherFunction | None, progress: float
    ) -> None:
        """Measure influence anew, if it is time.

        Args:
            epoch: From 0.
            student: As it is.
            images: The training images.
            teacher: The teacher.
            progress: How far the training is, in [0, 1].
        """
        if self.known:
            self.check_examples(images, *self.known)
        if not (epoch or self.settings.weights):  # before it takes an epoch to find out
            check_settings(student, self.settings.influence)
        first, every = self.settings.first_epoch, self.settings.refresh_epochs
        due = epoch == first or (every > 0 and epoch > first and (epoch - first) % every == 0)
        if self.settings.weights or not due:
            return
        device = self.weight.device
        frozen = teacher and (lambda batch: detach(teacher(batch)))
        found = measure_influence(
            student, self.loss, frozen, images, self.meta_validation, device, self.settings.influence, progress, epoch
        )
        self.set_weights(found.index, weigh_examples(found.scores, self.settings.influence))

    def check_examples(self, images: ImageSet, index: Tensor, weight: Tensor, example: Tensor | None) -> None:
        """Check that the file's weights are of these images; older files do not say."""
        if example is None:
            return
        known = dict(zip(index.tolist(), example.tolist(), strict=True))
        found = zip(images.index.tolist(), hash_examples(images).tolist(), strict=True)
        if others := sum(known[position] != each for position, each in found):
            raise UserError(
                f"loss 'influence_weighted': {self.settings.weights} has weights of other images than {others:,} of "
                f"the {len(images):,} training images; make it with the same `data` as this training"
            )
        self.known = None  # that was all that is asked of it

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None, index: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Compute the loss's terms.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
            index: Identity of each image, [B].
        """
        assert index is not None, "this loss needs_index"
        weight = self.weight[self.row[index]]
        weighted = {stage: weigh_rows(feature, weight) for stage, feature in student.features.items()}
        teacher_as_told = teacher and detach(teacher)  # a loss of labels alone is told of none
        terms = self.loss(Outputs(weigh_rows(student.logits, weight), weighted), teacher_as_told, target, progress)
        if self.settings.weigh == "task":
            terms = self.unweigh_others(terms, student, teacher_as_told, target, progress)
        if self.teacher is None:
            return terms
        own = weigh_rows(teacher.logits, weight)
        return terms | {"teacher/task": cross_entropy(own, target)}

    def unweigh_others(
        self, terms: dict[str, Tensor], student: Outputs, teacher: Outputs, target: Tensor, progress: Progress
    ) -> dict[str, Tensor]:
        """Take all terms but the labels' without weights."""
        own = [name for name in terms if name.rpartition("/")[2] == "task"]
        if not own:
            raise UserError(
                f"loss 'influence_weighted': weigh: 'task', but the loss's terms are {[*terms]}; a loss without the "
                "term `task` takes weigh: loss"
            )
        if len(own) == len(terms):
            return terms
        return self.loss(student, teacher, target, progress) | {name: terms[name] for name in own}


def detach(outputs: Outputs) -> Outputs:
    """The outputs without their graph."""
    return Outputs(outputs.logits.detach(), {stage: feature.detach() for stage, feature in outputs.features.items()})


def weigh_rows(tensor: Tensor, weight: Tensor) -> Tensor:
    """The same tensor; its gradient's rows are multiplied by the weights, [B]."""
    view = tensor.view_as(tensor)
    if view.requires_grad:
        view.register_hook(lambda gradient: gradient * weight.view(-1, *[1] * (gradient.dim() - 1)))
    return view
