"""Trust: what is measured of teacher, labels and student, so that a learned loss knows whom to believe (ours)."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax
from torch.utils.data import DataLoader, SubsetRandomSampler

from lkd.core.errors import UserError
from lkd.core.outputs import evaluating, take_logits
from lkd.core.random import draw_positions, seeded_generator
from lkd.data.images import Batch, ImageSet
from lkd.losses.functions import find_best_temperature, label_of

MEASURED = 10_000  # images of each part that the teacher is asked about, at most
LOOKED_AT = 1000  # meta-validation images of the student's own accuracy, at most
COLDEST, HOTTEST = 1 / 64, 64.0  # bounds of the teacher's best temperature
NOTICED = 0.05  # honest teachers of every kind stay under it (docs/evidence/universal/tried.md)
MIXED = 0.01  # what a second class has more than the others, where a label is not merely smoothed
TOLD_APART = 0.85  # of the part that labels without any relation to the answers contradict
TINY = 1e-30
FITTED_IMAGES, FITTED_NUMBERS = 1000, 4_000_000  # images and logits that are enough to see which part is contradicted
UNKNOWN = float("nan")

OF_MODE = (nn.modules.batchnorm._BatchNorm, nn.modules.dropout._DropoutNd)  # what train mode changes

Part = ImageSet | Iterable[tuple[Tensor, Tensor]]
"""Images and labels: an image set, or batches of (images, labels), such as a DataLoader."""


class TrustFigures(NamedTuple):
    """What a learned loss is told; NaN for what is not known.

    Attributes:
        validation_agreement: Part of the meta-validation images to which the teacher gives their label, in [0, 1].
        training_agreement: The same of the training images.
        temperature: That of the teacher's logits at which their cross-entropy on meta-validation is least; where no
            images are held out, on the training images, which then also stand in for them in the last two.
        images_per_class: Training images with a label, over the number of classes.
        own_accuracy: Part of some meta-validation images to which the student gives their label, now.
        contradicted: Part of the meta-validation labels that contradict the teacher however sure it is, as wrong labels
            do (and random answers); 0 if less than `NOTICED`. See `find_contradicted`.
    """

    validation_agreement: float = UNKNOWN
    training_agreement: float = UNKNOWN
    temperature: float = UNKNOWN
    images_per_class: float = UNKNOWN
    own_accuracy: float = UNKNOWN
    contradicted: float = UNKNOWN

    def to_json(self) -> dict[str, float | None]:
        """For a file; None for what is not known."""
        return {name: value if value == value else None for name, value in self._asdict().items()}

    @classmethod
    def from_json(cls, content: dict[str, float | None]) -> "TrustFigures":
        """What `to_json` returned."""
        return cls(*(UNKNOWN if (value := content.get(name)) is None else float(value) for name in cls._fields))


OWN_ACCURACY = TrustFigures._fields.index("own_accuracy")


@dataclass(frozen=True)
class Trust:
    """What is measured once, before a training, and what the student's own accuracy is measured on.

    Attributes:
        figures: Of the teacher and the labels.
        looks: Batches of (images, labels), at most `LOOKED_AT` images in all; none if they are not known.
        reason: Why the figures are unknown, if there is something to say.
    """

    figures: TrustFigures = field(default_factory=TrustFigures)
    looks: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False)
    reason: str = ""

    @classmethod
    def choose_looks(cls, validation: Part, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
        """What `looks` is to be: the first images, or random ones of an image set."""
        looks: list[tuple[Tensor, Tensor]] = []
        left = LOOKED_AT
        for batch in read_part(validation, device, LOOKED_AT):
            looks.append((batch.images[:left], batch.target[:left]))
            left -= len(looks[-1][0])
        return tuple(looks)

    def __str__(self) -> str:
        validation, training, temperature, images, _, contradicted = self.figures
        held_out = not math.isnan(validation)
        if not held_out and math.isnan(training):
            return (
                f"trust: unknown{self.reason and f', {self.reason}'}; the loss goes by what each batch shows, which "
                "under a weak teacher may be worse than none"
            )
        agreed = {"meta-validation": validation, "training": training}
        parts = [f"{share:.1%} of the {of} labels" for of, share in agreed.items() if not math.isnan(share)]
        seen = "so a teacher that was trained on these images looks too good"
        surely = f"{contradicted:.0%} of the {'meta-validation' if held_out else 'training'} labels"
        return (
            f"trust: the teacher agrees with {' and '.join(parts)}; its best temperature is {temperature:.2f}"
            f"{'' if math.isnan(images) else f'; {images:.0f} images a class'}"
            f"{f'; {surely} contradict it where it is sure' if contradicted > 0 else ''}"
            f"{'' if held_out else f'; no labels are held out, {seen}'}"
        )


@torch.no_grad()
def measure_trust(
    teacher: Callable[[Any], Any], train: Part | None, validation: Part | None, device: torch.device | None = None
) -> Trust:
    """Measure how far a teacher is to be trusted.

    Image sets are read without augmentation. So should a DataLoader be that is made for this: with augmented training
    images a teacher agrees less than with held-out ones, and the loss takes that for wrong labels.

    Args:
        teacher: What the training asks: a `TeacherFunction` where the parts are image sets, else a network, from
            images to logits or to `Outputs`. A network is asked in eval mode, where it lies; its mode is restored.
        train: The training images, with the labels that the student is trained on. Agreement with them is unknown if
            None.
        validation: Meta-validation images, disjoint from those. If None, or an image set without any, the training
            images stand in for them, where a teacher that was trained on them looks too good, and so does a student.
        device: Where image sets are put; by default the CPU.

    Returns:
        The figures, each over at most 10,000 images: of an image set drawn at random, of batches the first ones.

    Raises:
        UserError: If a part that is given has no labels, can be read only once, or comes class by class where only its
            first images are looked at; or the teacher has another number of classes, or logits that are not finite.
    """
    if isinstance(teacher, nn.Module) and any(m.training and isinstance(m, OF_MODE) for m in teacher.modules()):
        logging.getLogger("lkd").warning(
            "measure_trust: the teacher is in train mode, and is measured in eval mode: call teacher.eval() before the "
            "training, where it would answer otherwise"
        )
    place = device or torch.device("cpu")
    held_out = validation is not None and not (isinstance(validation, ImageSet) and not len(validation))
    part, name = (validation, "validation") if held_out else (train, "train")
    if part is None:
        return Trust()
    logits, target = ask(name, teacher, part, place)
    check_order(name, part, target, LOOKED_AT + 1)
    temperature = find_best_temperature(logits, target, COLDEST, HOTTEST, prior=True)
    agreement = agree(logits, target)
    if held_out:
        both = agreement, UNKNOWN if train is None else measure_agreement(teacher, train, place)
    else:
        both = UNKNOWN, agreement
    per_class = count_images(train) / logits.shape[1]
    contradicted = find_contradicted(logits, target, temperature)
    figures = TrustFigures(*both, temperature, per_class, contradicted=contradicted)
    looks = Trust.choose_looks(part, place)
    if not looks:
        raise UserError(f"measure_trust: {name} can be read only once; give a DataLoader, or a list of batches")
    return Trust(figures, looks)


@torch.no_grad()
def measure_agreement(teacher: Callable[[Any], Any], part: Part, device: torch.device) -> float:
    """Part of at most 10,000 training images to which the teacher gives their label; see `measure_trust`."""
    logits, target = ask("train", teacher, part, device)
    check_order("train", part, target, MEASURED)
    return agree(logits, target)


def count_images(part: Part | None) -> float:
    """How many images there are: of a DataLoader, in its dataset, or in what a `SubsetRandomSampler` draws of it.

    NaN where that is not known, as of a list, or of a dataset whose items are batches. Other samplers may leave images
    to other processes or other epochs.
    """
    if isinstance(part, DataLoader) and part.batch_sampler is None:
        return UNKNOWN
    whole: Any = part if isinstance(part, ImageSet) else getattr(part, "dataset", None)
    for owner in (part, getattr(part, "batch_sampler", None)):
        if isinstance(sampler := getattr(owner, "sampler", None), SubsetRandomSampler):
            whole = sampler
    try:
        return float(len(whole))
    except TypeError:
        return UNKNOWN


def read_part(part: Part, device: torch.device, count: int) -> Iterator[Batch]:
    """The first batches of a part, or random ones of an image set, until there are so many images."""
    if isinstance(part, ImageSet):
        positions = draw_positions(len(part), min(count, len(part)), seeded_generator(len(part), 11))
        yield from part.batches(positions.sort().values.split(part.at_once), device)
        return
    seen = 0
    for batch in part:
        if seen >= count:
            return
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) == 2 else None
        if not isinstance(labels, Tensor) or labels.ndim != 1 + labels.is_floating_point():
            raise UserError(
                f"measure_trust: a batch is a {type(batch).__name__}, not a pair (images, labels) with class indices "
                "[B] or distributions [B, C] of floats; give pairs, or None where there are no labels"
            )
        if labels.ndim == 2 and is_mixed(labels):
            raise UserError(
                "measure_trust: a batch has mixed labels, as of mixup, with which a teacher agrees less than with the "
                "images' own; give a loader without it, or class indices"
            )
        images = batch[0]
        seen += len(images)
        yield Batch(
            images, label_of(labels).long(), torch.arange(len(images)), torch.zeros(len(images), dtype=torch.int64)
        )


def is_mixed(labels: Tensor) -> bool:
    """Whether distributions [B, C] are more than smoothed: then all lesser classes have as much, in all rows."""
    if len(labels.T) < 2:
        return False
    second, least = labels.topk(2).values[:, 1], labels.amin(1)
    apart = second - least if len(labels.T) > 2 else second - second.min()
    return bool((apart > MIXED).any())


def ask(name: str, teacher: Callable[[Any], Any], part: Part, device: torch.device) -> tuple[Tensor, Tensor]:
    """The teacher's logits for a part, float32 [N, C], and the labels, [N]."""
    rows = []
    first = next(teacher.parameters(), None) if isinstance(teacher, nn.Module) else None
    with evaluating(teacher):
        for batch in read_part(part, device, MEASURED):
            images = batch.images if first is None else copy_for(first, batch.images)
            logits = take_logits(teacher(batch if isinstance(part, ImageSet) else images))
            rows.append((logits.float(), batch.target.to(logits.device)))
    if not rows:
        raise UserError(f"measure_trust: {name} has no images with labels; give some, or None where there are none")
    logits, target = (torch.cat(column)[:MEASURED] for column in zip(*rows, strict=True))
    if int(target.max()) >= logits.shape[1] or int(target.min()) < 0:
        found = f"{int(target.min())} to {int(target.max())}"
        raise UserError(f"measure_trust: {name} has labels {found}, the teacher has {logits.shape[1]} classes")
    if wrong := int((~logits.isfinite().all(1)).sum()):
        raise UserError(
            f"measure_trust: the teacher's logits of {wrong} of {len(logits)} images of {name} are not finite; check "
            "these images, and the teacher"
        )
    return logits, target


def check_order(name: str, part: Part, target: Tensor, many: int) -> None:
    """Check that of so many images, the first of which alone are looked at, these are not all of a few classes.

    `target`: labels of the first images, [N].
    """
    by_class = int((target.diff() != 0).sum()) < len(target.unique())
    if by_class and len(target) >= many and not isinstance(part, ImageSet):
        raise UserError(
            f"measure_trust: {name} comes class by class, and its first images alone are looked at; give it shuffled, "
            "as by DataLoader(..., shuffle=True)"
        )


def find_contradicted(logits: Tensor, target: Tensor, temperature: float) -> float:
    """Part of the labels that contradict the teacher however sure it is; 0 if less than `NOTICED`.

    The c of largest likelihood, together with τ, where a label is drawn from softmax(logits / τ) but in a part c of the
    images, where it is any other. A teacher that is merely weak, or too sure, is wrong where it is less sure than
    elsewhere, which τ explains. The likelihood may have several maxima, of which the highest is taken: wrong labels
    make the best τ hot, and hot answers leave nothing to contradict.

    Args:
        logits: The teacher's, [N, C].
        target: Labels, [N].
        temperature: The best one, where a search for τ starts; others start colder.

    Returns:
        The part; 0 too if it is nearly (C − 1) / C, that of labels that know nothing of the teacher's answers: who
        knows nothing is not contradicted, and what is left of the labels says too little.
    """
    classes = logits.shape[1]
    kept = max(FITTED_IMAGES, FITTED_NUMBERS // classes)
    with torch.inference_mode(False), torch.enable_grad():
        logits, target = logits[:kept].clone(), target[:kept].clone()  # made in inference mode it has no derivative
        few = slice(None, None, max(1, len(target) // FITTED_IMAGES))
        starts = [(math.log(max(temperature / colder, COLDEST)), part) for colder in (1, 8, 64) for part in (-3.0, 0.0)]
        tried = [fit_contradiction(logits[few], target[few], start) for start in starts]
        ends = [fit_contradiction(logits, target, start) for start in (starts[0], min(tried)[1])]
    part = 1 / (1 + math.exp(-min(ends)[1][1]))
    return part if NOTICED <= part <= TOLD_APART * (classes - 1) / classes else 0.0


def fit_contradiction(logits: Tensor, target: Tensor, start: tuple[float, float]) -> tuple[float, tuple[float, float]]:
    """Minimise the negative log-likelihood of `find_contradicted` from a log τ and a logit of c: it, and where."""
    others = logits.shape[1] - 1
    free = torch.tensor(start, device=logits.device, requires_grad=True)
    optimizer = torch.optim.LBFGS([free], max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        of_label = log_softmax(logits / free[0].exp(), 1).gather(1, target.unsqueeze(1)).exp()
        part = free[1].sigmoid()
        loss = -((1 - part) * of_label + part * (1 - of_label) / others).clamp_min(TINY).log().mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    temperature, part = free.tolist()
    return float(closure().detach()), (temperature, part)


def agree(logits: Tensor, target: Tensor) -> float:
    """Part of the rows whose largest logit is the target's."""
    return (logits.argmax(1) == target).cpu().double().mean().item()


def copy_for(parameter: Tensor, images: Tensor) -> Tensor:
    """A copy of images that a network with such parameters can read, and write into."""
    dtype = parameter.dtype if images.is_floating_point() and parameter.is_floating_point() else images.dtype
    return images.to(parameter.device, dtype, copy=True)


@torch.no_grad()
def measure_own_accuracy(student: nn.Module, looks: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Part of these images to which a student gives their label, in eval mode."""
    right = count = 0
    with evaluating(student), torch.compiler.set_stance("force_eager"):  # else sizes of looks make its steps dynamic
        for images, labels in looks:
            logits = take_logits(student(copy_for(next(student.parameters()), images)))
            right += int((logits.argmax(1) == labels.to(logits.device)).sum())
            count += len(labels)
    return right / count
