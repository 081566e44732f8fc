"""Labels flipped on purpose: to any class, to a partner of each class, or as a weak network errs."""

import math

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d

from lkd.core.errors import UserError
from lkd.core.random import seeded_generator
from lkd.data.image_files import ImageFiles
from lkd.data.images import ImageSet
from lkd.data.splits import interleave_classes

SIDE = 8  # pixels, height and width, that the weak network sees
SHRINKAGE = 0.1  # of the covariance, towards a multiple of the identity
MOST_DECODED = 10_000  # images in files that the weak network looks at, of each part
TRAIN, META_VALIDATION = 3, 13  # streams of random numbers


def add_label_noise(
    train: ImageSet, meta_validation: ImageSet, kind: str, fractions: tuple[float, float], seed: int
) -> tuple[ImageSet, ImageSet]:
    """Flip a fraction of the labels of both parts.

    Args:
        train: Training images, from which the weak network learns.
        meta_validation: Meta-validation images.
        kind: `symmetric`: to a class drawn evenly from the others. `pairs`: to the class that the weak network confuses
            theirs with most. `by_student`: each to the wrong class that the weak network finds most likely; which
            images is drawn, in proportion to the probability that it gives to wrong classes.
        fractions: Of the training and of the meta-validation labels.
        seed: Of the draw.
    """
    parts = (train, fractions[0], TRAIN), (meta_validation, fractions[1], META_VALIDATION)
    weak = WeakNetwork(train, seed) if kind != "symmetric" and any(fractions) else None
    noisy = []
    for images, fraction, stream in parts:
        if not round(fraction * len(images)):
            labels = images.labels
        elif weak is None:
            labels = flip_labels(images.labels, fraction, images.num_classes, seed, stream)
        elif kind == "pairs":
            labels = images.labels.clone()
            flipped = draw_flipped(len(labels), fraction, seed, stream)
            labels[flipped] = weak.partner[labels[flipped]]
        else:
            labels = flip_by_network(images, fraction, weak, seed, stream)
        noisy.append(images.relabel(labels))
    return noisy[0], noisy[1]


def flip_labels(labels: Tensor, fraction: float, num_classes: int, seed: int, stream: int = TRAIN) -> Tensor:
    """Give a fraction of the labels another class, drawn uniformly from the others; [N] → [N]."""
    generator = seeded_generator(seed, stream)
    flipped = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    shift = torch.randint(1, num_classes, (len(flipped),), generator=generator)
    noisy = labels.clone()
    noisy[flipped] = (labels[flipped] + shift) % num_classes
    return noisy


def draw_flipped(count: int, fraction: float, seed: int, stream: int) -> Tensor:
    """Positions of the labels to flip: those of `flip_labels`."""
    return torch.randperm(count, generator=seeded_generator(seed, stream))[: round(fraction * count)]


def flip_by_network(images: ImageSet, fraction: float, weak: "WeakNetwork", seed: int, stream: int) -> Tensor:
    """Flip labels to the class that the network errs to, on images drawn in proportion to its doubt; [N] → [N]."""
    wrong, doubt = weak.judge(images, seed)
    uniform = torch.rand(len(wrong), generator=seeded_generator(seed, stream), dtype=torch.float64)
    # The largest of logarithms with Gumbel noise are a draw without replacement.
    ranked = (doubt - (-uniform.log()).log()).argsort(descending=True, stable=True)
    flipped = ranked[: round(fraction * len(wrong))]
    labels = images.labels.clone()
    labels[flipped] = wrong[flipped]
    return labels


class WeakNetwork:
    """A linear softmax classifier of images scaled down to 8 × 8 pixels, in closed form.

    Linear discriminant analysis with a shrunk covariance. There are two, each of one half of the training images, and
    images of the one half are judged by the network of the other. Of images in files at most `MOST_DECODED` are looked
    at; to all others it says what it says of their class on average.

    Args:
        train: Training images.
        seed: Of the halves.

    Attributes:
        partner: Each class's most probable wrong class, in the mean over the class's images, [C].
        doubt: Logarithm of the probability of all wrong classes, in the mean over each class's images, [C].
    """

    def __init__(self, train: ImageSet, seed: int) -> None:
        self.train, classes = train, train.num_classes
        pixels, positions = scale_down(train, seed)
        labels, half = train.labels[positions], len(positions) // 2
        if not half:
            raise UserError(f"data.label_noise_kind: a weak network needs 2 training images, not {len(positions)}")
        parts = slice(half, None), slice(half)
        self.networks = [fit_linear(pixels[part], labels[part], classes) for part in parts]
        halves = zip(self.networks, reversed(parts), strict=True)
        rows = [
            (positions[part], exclude(pixels[part] @ weight + bias, labels[part])) for (weight, bias), part in halves
        ]
        self.looked, self.wrong = (torch.cat(column) for column in zip(*rows, strict=True))
        counts = torch.bincount(labels, minlength=classes).clamp(min=1)
        confusion = torch.zeros(classes, classes, dtype=torch.float64)
        confusion.index_add_(0, train.labels[self.looked], self.wrong.exp()).div_(counts.unsqueeze(1))
        confusion.fill_diagonal_(-1)
        self.partner = confusion.argmax(1)
        self.doubt = confusion.fill_diagonal_(0).sum(1).log()

    def judge(self, images: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
        """The most probable wrong class of images, and the logarithm of all wrong classes' probability; [N] each."""
        wrong, doubt = self.partner[images.labels], self.doubt[images.labels]
        if images is self.train:
            looked, judged = self.looked, self.wrong
        else:
            pixels, looked = scale_down(images, seed)
            answers = [exclude(pixels @ weight + bias, images.labels[looked]) for weight, bias in self.networks]
            judged = torch.logaddexp(*answers) - math.log(2)
        wrong[looked], doubt[looked] = judged.argmax(1), judged.logsumexp(1)
        return wrong, doubt


def scale_down(images: ImageSet, seed: int) -> tuple[Tensor, Tensor]:
    """Images as the weak network sees them, float64, [M, D], and their positions; damaged ones are left out.

    Any half of them has as many of each class as it goes.
    """
    order = interleave_classes(images.labels, images.num_classes, seed)
    if isinstance(images.images, ImageFiles):
        order = order[:MOST_DECODED]
    loaded = images.load(order.split(500), torch.device("cpu"))
    rows = [(adaptive_avg_pool2d(images.normalize(pixels), SIDE).flatten(1), kept) for pixels, kept in loaded]
    pixels, positions = (torch.cat(column) for column in zip(*rows, strict=True))
    return pixels.double(), positions


def fit_linear(pixels: Tensor, labels: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """Linear discriminant analysis, classes equally likely: weight [D, C] and bias [C] of the logits."""
    counts = torch.bincount(labels, minlength=num_classes).unsqueeze(1)
    sums = torch.zeros(num_classes, pixels.shape[1], dtype=pixels.dtype).index_add_(0, labels, pixels)
    means = torch.where(counts > 0, sums / counts.clamp(min=1), pixels.mean(0))  # an absent class is like all images
    deviations = pixels - means[labels]
    covariance = deviations.T @ deviations / len(pixels)
    covariance.diagonal().add_(SHRINKAGE * covariance.trace() / len(covariance) + 1e-6)
    weight = torch.linalg.solve(covariance, means.T)
    return weight, -(means.T * weight).sum(0) / 2


def exclude(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probabilities of the wrong classes, [N, C]; the label's own is −∞."""
    return logits.log_softmax(1).scatter(1, labels.unsqueeze(1), -math.inf)
