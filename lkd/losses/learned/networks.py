"""The small networks that learned losses are made of, and what they see of each sample and of each class of it.

Nothing seen depends on the order or the number of the classes, nor on a constant added to all logits.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, log_softmax, one_hot

from lkd.losses.functions import widen
from lkd.losses.loss import Progress, read_progress

# ----------------------------------------------------------------------------------------------------------------------
# What the networks see.

CONDITIONING = ("progress", "state")
TRUST_CONDITIONING = ("calibration", "agreement", "images_per_class", "own_accuracy")
KNOWN_CONDITIONING = (*CONDITIONING, "answer", "context", *TRUST_CONDITIONING)
# Input of a sample → the kind of conditioning that it belongs to; the teacher's are always seen.
SAMPLE_INPUTS: dict[str, str | None] = {
    "student target probability": "state",
    "teacher target probability": None,
    "student entropy": "state",
    "teacher entropy": None,
    "KL": "state",
    "student answer probability": "answer",
    "teacher answer probability": "answer",
    "inner product": "answer",
    "calibrated target probability": "calibration",
    "calibrated answer probability": "calibration",
}
BATCH_INPUTS: dict[str, str] = {
    "progress": "progress",
    "validation agreement": "agreement",
    "training agreement": "agreement",
    "agreement difference": "agreement",
    "agreement unknown": "agreement",
    "best temperature": "calibration",
    "calibration unknown": "calibration",
    "images per class": "images_per_class",
    "images per class unknown": "images_per_class",
    "own accuracy": "own_accuracy",
    "teacher's lead": "own_accuracy",
    "own accuracy unknown": "own_accuracy",
}
CLASS_INPUTS = 7  # of each class: see `class_inputs`


class LogProbabilities(NamedTuple):
    """Logits in log space, [B, C], at least float32; the target; and what is seen of the samples themselves."""

    student: Tensor
    teacher: Tensor
    target: Tensor  # class indices [B], or distributions [B, C]
    seen: Tensor  # of the samples themselves: see `see_samples`
    task: Tensor  # cross-entropy of the student with the target, [B]

    @property
    def dense_target(self) -> Tensor:
        """The target as distributions."""
        dense = self.target if self.target.is_floating_point() else one_hot(self.target, self.student.shape[1])
        return dense.to(self.student.dtype)


def read_logits(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, conditioning: Sequence[str]
) -> LogProbabilities:
    """Bring logits [B, C] to log space, and see what is asked for of samples; no gradient reaches the teacher's."""
    student, teacher = widen(student_logits).log_softmax(1), widen(teacher_logits.detach()).log_softmax(1)
    seen = see_samples(student, teacher, target, conditioning)
    return LogProbabilities(student, teacher, target, seen, -pick_target(student, target))


def see_samples(student: Tensor, teacher: Tensor, target: Tensor, conditioning: Sequence[str]) -> Tensor:
    """Those of `SAMPLE_INPUTS` that `conditioning` asks for, but for the calibrated ones, in [−1, 1], [B, inputs]."""
    theirs, log_classes = teacher.exp(), math.log(student.shape[1])
    entropy = -(theirs * teacher).sum(1)
    seen = {"teacher target probability": pick_target(theirs, target), "teacher entropy": entropy / log_classes}
    if not {"state", "answer"}.isdisjoint(conditioning):  # else no gradient comes this way, and no time is spent
        own = student.exp()
    if "state" in conditioning:
        divergence = -(theirs * student).sum(1) - entropy
        seen["student target probability"] = pick_target(own, target)
        seen["student entropy"] = -(own * student).sum(1) / log_classes
        seen["KL"] = divergence / (1 + divergence)
    if "answer" in conditioning:
        answer = teacher.argmax(1)
        seen["student answer probability"] = pick_target(own, answer)
        seen["teacher answer probability"] = pick_target(theirs, answer)
        seen["inner product"] = (own * theirs).sum(1)
    return 2 * torch.stack([seen[name] for name in SAMPLE_INPUTS if name in seen], 1) - 1


def pick_target(values: Tensor, target: Tensor) -> Tensor:
    """The value of each sample's target, [B], of [B, C]; of a dense target the mean over it."""
    if target.is_floating_point():
        return (target.to(values.dtype) * values).sum(1)
    return values.gather(1, target.unsqueeze(1)).squeeze(1)


def check_conditioning(conditioning: Sequence[str], known: Sequence[str] = KNOWN_CONDITIONING) -> list[str]:
    """The kinds of conditioning, in the order of `known`; a `ValueError` if one is not of these."""
    if isinstance(conditioning, str) or set(conditioning) - set(known):
        raise ValueError(f"conditioning: {conditioning!r} is not a list of some of {', '.join(known)}")
    return [kind for kind in known if kind in conditioning]


def name_sample_inputs(conditioning: Sequence[str]) -> list[str]:
    """Names of the columns of `sample_inputs`."""
    own = [name for name, kind in SAMPLE_INPUTS.items() if kind is None or kind in conditioning]
    batch = [name for name, kind in BATCH_INPUTS.items() if kind in conditioning]
    return own + batch + ([f"mean of {name}" for name in own] if "context" in conditioning else [])


def sample_inputs(
    logs: LogProbabilities, progress: Progress, conditioning: Sequence[str], trust: Tensor | None = None
) -> Tensor:
    """What is seen of each sample, in [−1, 1], [B, inputs].

    Of the sample itself: the teacher's probability of the target and its entropy over log C; with `state` also the
    student's, and the squashed KL divergence between the two; with `answer` the student's and the teacher's probability
    of the teacher's answer, and the inner product of both distributions; with `calibration` the probabilities that the
    teacher gives to the target and to its answer at its best temperature. Of the batch: with `progress` how far the
    training is; with each kind of `TRUST_CONDITIONING` what `trust` says, 0 where that is unknown, and whether it is
    unknown; with `context` the means of all that is seen of the samples themselves.

    Args:
        logs: The logits, the teacher's as it is to be read.
        progress: How far the training is; 1 where it is not given.
        conditioning: What is seen.
        trust: `TrustFigures` as a tensor, [6]; all unknown if left out.
    """
    told = None if trust is None else trust.to(logs.seen)
    own = logs.seen
    if "calibration" in conditioning:
        calibrated = log_softmax(logs.teacher if told is None else logs.teacher / told[2].nan_to_num(1.0), 1)
        if logs.target.is_floating_point():
            of_target = pick_target(calibrated.exp(), logs.target)
        else:  # an exponential of one class, not of all
            of_target = pick_target(calibrated, logs.target).exp()
        own = torch.cat([own, 2 * torch.stack([of_target, calibrated.amax(1).exp()], 1) - 1], 1)
    shared = []
    if "progress" in conditioning:
        shared.append((2 * as_progress(progress, own) - 1).unsqueeze(0))
    if not set(TRUST_CONDITIONING).isdisjoint(conditioning):
        shared.append(trust_inputs(own.new_full((6,), math.nan) if told is None else told, conditioning))
    if "context" in conditioning:
        shared.append(own.mean(0))
    return torch.cat([own, torch.cat(shared).expand(own.shape[0], -1)], 1) if shared else own


def trust_inputs(told: Tensor, conditioning: Sequence[str]) -> Tensor:
    """What is seen of `TrustFigures` as a tensor, [6]: 0 for what is unknown, and whether it is; [inputs]."""
    validation, training, temperature, images, accuracy, _ = told.unbind()
    unknown = told.isnan().to(told).unbind()
    figures = {
        "agreement": [2 * validation - 1, 2 * training - 1, validation - training, unknown[0]],
        "calibration": [squash(temperature.log()), unknown[2]],
        "images_per_class": [squash((images / 100).log() / 2), unknown[3]],
        "own_accuracy": [2 * accuracy - 1, validation - accuracy, unknown[4]],
    }
    columns = [column for kind, seen in figures.items() if kind in conditioning for column in seen]
    return torch.stack(columns).nan_to_num(0.0)


def class_inputs(logs: LogProbabilities) -> Tensor:
    """What is seen of each class of each sample, in [−1, 1], [B, C, CLASS_INPUTS]."""
    student, teacher, target = logs.student, logs.teacher, logs.dense_target
    columns = [
        squash(standardize(student)),
        squash(standardize(teacher)),
        squash(student / 4),
        squash(teacher / 4),
        2 * student.exp() - 1,
        2 * teacher.exp() - 1,
        2 * target - 1,
    ]
    return torch.stack(columns, 2)


def as_progress(progress: Progress, like: Tensor) -> Tensor:
    """Progress as a scalar tensor, 1 where it is not given; a `ValueError` if it is not in [0, 1]."""
    part = read_progress(progress)
    # torch.compile makes an input of a number that is added to a tensor; for one in `as_tensor` it compiles anew.
    return part.to(like) if isinstance(part, Tensor) else like.new_zeros(()) + part


def squash(x: Tensor) -> Tensor:
    """Map x to x / √(1 + x²): smooth, in (−1, 1), and so flat far out that x times its slope vanishes there."""
    return x * (1 + x.square()).rsqrt()


def standardize(logits: Tensor) -> Tensor:
    """Logits of mean 0 over the classes, over √(1 + their variance), [B, C]."""
    centred = logits - logits.mean(1, keepdim=True)
    return centred * (1 + centred.square().mean(1, keepdim=True)).rsqrt()


# ----------------------------------------------------------------------------------------------------------------------
# The networks.


class BoundedLinear(nn.Linear):
    """A linear layer whose map has a 2-norm below a bound, whatever its weight.

    The weight W acts as W / √(1 + ‖W‖²_F / bound²), whose Frobenius norm, and so its 2-norm, is less than the bound.
    It is smooth in W, at W = 0 too, so that hypergradients pass through it.
    """

    def __init__(self, inputs: int, outputs: int, bound: float) -> None:
        super().__init__(inputs, outputs)
        self.bound = bound

    def forward(self, x: Tensor) -> Tensor:
        """Apply the bounded map."""
        return linear(x, effective_weight(self), self.bias)


def record_arguments(scope: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a constructor, from its `locals()`: what a file says of a network."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


def check_network_options(hidden: int, lipschitz: float) -> None:
    """Check the options that every loss network has; a `ValueError` if one is out of range."""
    if hidden < 1:
        raise ValueError(f"hidden: {hidden} is not at least 1")
    if not lipschitz >= 0:
        raise ValueError(f"lipschitz: {lipschitz} is negative; 0 sets no bound")


def build_linear(inputs: int, outputs: int, bound: float) -> nn.Linear:
    """A linear layer whose 2-norm is below a bound; 0 sets none."""
    return BoundedLinear(inputs, outputs, bound) if bound else nn.Linear(inputs, outputs)


def effective_weight(layer: nn.Linear) -> Tensor:
    """The weight with which a layer acts."""
    if not isinstance(layer, BoundedLinear):
        return layer.weight
    return layer.weight * (1 + layer.weight.square().sum() / layer.bound**2).rsqrt()


class Perceptron(nn.Sequential):
    """Two hidden layers of tanh and a linear head that starts at zero, along the last dimension.

    Args:
        inputs: Number of inputs.
        hidden: Width of the hidden layers.
        outputs: Number of outputs.
        lipschitz: Bound of the network's Lipschitz constant (2-norm to 2-norm); 0 sets none.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int, lipschitz: float = 0.0) -> None:
        check_network_options(hidden, lipschitz)
        bound = lipschitz ** (1 / 3)
        head = build_linear(hidden, outputs, bound)
        body = build_linear(inputs, hidden, bound), nn.Tanh(), build_linear(hidden, hidden, bound), nn.Tanh()
        super().__init__(*body, head)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        head: nn.Linear = self[-1]  # type: ignore[assignment]
        return head

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network, in the dtype of its weights."""
        return super().forward(x.to(self.head.weight.dtype))


class LinearPerceptron(nn.Module):
    """A perceptron with a linear map of its inputs added, which starts at zero.

    Many inputs are the same for all samples of a world. Under Adam, whose steps are of one size, they would soon drive
    the hidden layers where tanh is flat, and the network would answer the same in every world. So the linear map learns
    what is linear, and the hidden layer's weights act over the square root of the number of inputs: what an equal step
    of all of them changes does not grow with it as fast.

    Args:
        inputs: Number of inputs.
        hidden: Width of the hidden layers.
        outputs: Number of outputs.
    """

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.perceptron = Perceptron(inputs, hidden, outputs)
        self.scale = inputs**-0.5
        first: nn.Linear = self.perceptron[0]  # type: ignore[assignment]
        first.weight.data /= self.scale
        self.linear = nn.Linear(inputs, outputs, bias=False)
        nn.init.zeros_(self.linear.weight)

    @property
    def head(self) -> nn.Linear:
        """The last layer."""
        return self.perceptron.head

    def forward(self, x: Tensor) -> Tensor:
        """Apply the network, in the dtype of its weights."""
        x = x.to(self.head.weight.dtype)
        return self.perceptron(self.scale * x) + self.linear(x)


def log_of_factor(factor: float) -> float:
    """Its logarithm; a `ValueError` if it is not greater than 1."""
    if not factor > 1:
        raise ValueError(f"maximal_factor: {factor} is not greater than 1")
    return math.log(factor)


class EntryNetwork(nn.Module):
    """From a difference, the teacher's value there and where that is to a number in (−1, 1); 0 before meta-training.

    One hidden layer of tanh. What is shared by many entries enters the hidden layer as one addend, so that the inputs
    are never written out for every entry.

    Args:
        places: Number of inputs that say which two stages and which comparison.
        samples: Number of inputs that are seen of a sample.
        hidden: Width of the hidden layer.
        lipschitz: As of `Perceptron`.
    """

    def __init__(self, places: int, samples: int, hidden: int, lipschitz: float) -> None:
        super().__init__()
        self.places = places
        self.hidden = build_linear(2 + places + samples, hidden, lipschitz ** (1 / 2))
        self.head = build_linear(hidden, 1, lipschitz ** (1 / 2))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, difference: Tensor, theirs: Tensor, places: Tensor, samples: Tensor) -> Tensor:
        """Weigh every entry, [S, T, B, E].

        Args:
            difference: Student's less teacher's entries, [S, T, B, E].
            theirs: The teacher's entries, [T, B, E].
            places: [S, T, places].
            samples: [B, samples].
        """
        weight = effective_weight(self.hidden)
        differences, values, of_places, of_samples = weight.split([1, 1, self.places, len(samples.T)], 1)
        shared = (places.to(weight) @ of_places.T + self.hidden.bias)[:, :, None] + samples.to(weight) @ of_samples.T
        own = squash(theirs.to(weight)).unsqueeze(3) * values[:, 0]
        base = shared[:, :, :, None] + own
        seen = torch.addcmul(base, squash(difference.to(weight)).unsqueeze(4), differences[:, 0])
        return self.head(seen.tanh()).squeeze(4).tanh()
