"""The forms of a learned loss over logits (our reconstruction)."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lkd.core.outputs import Outputs
from lkd.losses.dkd import decoupled_divergences
from lkd.losses.functions import check_batch, full_precision, label_of, widen
from lkd.losses.learned import networks
from lkd.losses.learned.networks import CONDITIONING, TRUST_CONDITIONING, LinearPerceptron, LogProbabilities, Perceptron
from lkd.losses.learned.trust import TrustFigures
from lkd.losses.loss import DistillationLoss, Progress, Terms

FADING, MARGIN = 60.0, 0.03  # how sharply the loss fades, and at which lead of the student by half
NOISE = 0.02  # of the part of wrong labels, as it is estimated
UNCALIBRATED = -2.0  # where κ starts, before its sigmoid
WEAK, GOOD = 0.75, 0.85  # agreement with held-out labels of a teacher under which nothing learned counts, and all
FEW, BEST = 50, 0.93  # images a class up to which β starts at `initial_factor`, under a teacher that agrees as much
NOTHING_LEFT = 1e-3  # of the held-out labels, where all contradict the teacher
FLOOR = 1e-30  # of a probability whose logarithm is taken: q log q is nothing there, and 1 / q is still a float32


class LogitForm(DistillationLoss):
    """What the forms share: a network that sees each sample and sets its α, the teacher's weight, and τ.

    A form's constructor hands on its `locals()`: its options are `architecture`, as its file keeps them. One that is
    out of range is a `ValueError`.
    """

    def __init__(self, scope: dict[str, Any]) -> None:
        super().__init__()
        options = networks.record_arguments(scope)
        self.conditioning = options["conditioning"] = networks.check_conditioning(options["conditioning"])
        self.log_factor = networks.log_of_factor(options["maximal_factor"])
        self.maximal_temperature: float = options["maximal_temperature"]
        self.architecture = options
        self.register_buffer("trust", torch.tensor(TrustFigures()), persistent=False)

    trust: Tensor

    @property
    def reads_trust(self) -> bool:  # type: ignore[override]
        """Whether the form sees any of the figures of `TrustFigures`."""
        return not set(TRUST_CONDITIONING).isdisjoint(self.conditioning)

    def read(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> LogProbabilities:
        """Logits [B, C] in log space, with what the networks see of the samples themselves."""
        return networks.read_logits(student_logits, teacher_logits, target, self.conditioning)

    def see(self, logs: LogProbabilities, progress: Progress) -> Tensor:
        """What the networks see of each sample, [B, inputs]."""
        return networks.sample_inputs(logs, progress, self.conditioning, self.trust)

    def build_sample_network(self, outputs: int, linear: bool = False) -> Perceptron | LinearPerceptron:
        """A network over what is seen of a sample whose first two outputs start at the initial α and τ."""
        options = self.architecture
        weight, temperature, highest = (
            options[name] for name in ("initial_weight", "initial_temperature", "maximal_temperature")
        )
        if not 0 < weight < 1:
            raise ValueError(f"initial_weight: {weight} is not in (0, 1)")
        if not 1 < temperature < highest:
            raise ValueError(f"initial_temperature: {temperature} is not between 1 and maximal_temperature {highest}")
        inputs = len(networks.name_sample_inputs(self.conditioning))
        if linear and options["lipschitz"]:
            raise ValueError(f"lipschitz: {options['lipschitz']} does not go with linear: true, which has no bound")
        network = (
            LinearPerceptron(inputs, options["hidden"], outputs)
            if linear
            else Perceptron(inputs, options["hidden"], outputs, options["lipschitz"])
        )
        network.head.bias.data[:2] = torch.logit(torch.tensor([weight, (temperature - 1) / (highest - 1)]))
        return network

    def bound_balance(self, free: Tensor) -> tuple[Tensor, Tensor]:
        """The α in (0, 1) and τ in (1, `maximal_temperature`) of each sample, [B], from free numbers, [B, 2]."""
        weight, share = free.sigmoid().unbind(-1)
        return weight, 1 + share * (self.maximal_temperature - 1)

    def set_balance(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, ...]:
        """The α and τ of each sample, and what else the form sets, all [B]."""
        raise NotImplementedError

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α in (0, 1) and τ in (1, `maximal_temperature`) of each sample, both [B], at a progress, or else at 1."""
        target = check_batch(Outputs(student_logits, {}), Outputs(teacher_logits, {}), target)
        weight, temperature, *_ = self.set_balance(self.read(student_logits, teacher_logits, target), progress)
        return weight, temperature


class DecoupledLoss(LogitForm):
    """Decoupled distillation (DKD, arXiv 2203.08679) whose three weights a small network sets for each sample.

    For sample i, a network sees a few numbers and sets α, τ and β; the loss is the mean of
    2 (1 − αᵢ) · CE(student, target) + 2 αᵢ · τᵢ² · (TCKD + βᵢ · NCKD), both divergences at temperature τᵢ: of the
    target class against the rest, and among the other classes. The numbers are by default the student's and the
    teacher's probability of the target, both entropies over log C, the squashed KL divergence at τ = 1, and the
    training's progress; see `networks.sample_inputs` for the others. With α = 1/2 it is DKD as its authors weigh it, at
    home at DKD's learning rates. With `calibration` the network also sets a κᵢ in (0, 1): the teacher's logits are
    divided by Tᵏ, with T its best temperature on meta-validation, where that is known. With β = 1 − the
    teacher's probability of the target at τ it is twice (1 − α) · CE + α · KD; with β = 1 or more, what the teacher
    knows of the other classes counts on samples that it is sure of too. Of dense targets the most probable class is the
    target class.

    As DKD's, the teacher's terms are ramped up linearly from 0 at the start of training, here over most of it: fresh
    students trained on clean labels are better for it, and rollouts, which are shorter than trainings, do not find it.

    α, τ and β move with the student's logits, and the gradient says so: the loss is a function, its Hessian is
    symmetric, and every hypergradient estimator is exact on it or as near as it states. By itself nothing normalises
    its gradient (see `LearnedLoss`), so compare losses at learning rates of their own.

    Args:
        hidden: Width of the two hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        maximal_factor: β stays between 1 / `maximal_factor` and `maximal_factor`; greater than 1.
        initial_factor: β before any meta-training where there are few training images of a class and the teacher is
            good, from 1 to less than `maximal_factor`; else, or where either is not known, it is 1. See `start_factor`.
        warmup: Part of the training over which the teacher's terms are ramped up, in [0, 1]. Where `progress` is not
            given they have their full weight, as at 1.
        conditioning: What the network sees besides the teacher: some of progress, state, answer, context, and, of
            `Trust`, calibration, agreement, images_per_class, own_accuracy.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.
        linear: Whether a linear map of what is seen is added to the network (`networks.LinearPerceptron`).
        fades: Whether the loss turns into cross-entropy where the student has overtaken the teacher; see `stay`.
        judges_labels: Whether labels count by how likely they are right; see `judge_labels`.
        falls_back: Whether what was learned does not count under a weak teacher; see `fall_back`.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 4.0,
        maximal_factor: float = 8.0,
        initial_factor: float = 1.0,
        warmup: float = 0.6,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
        linear: bool = False,
        fades: bool = False,
        judges_labels: bool = False,
        falls_back: bool = False,
    ) -> None:
        super().__init__(locals())
        for name in ("linear", "fades", "judges_labels", "falls_back"):
            if not isinstance(self.architecture[name], bool):
                raise ValueError(f"{name}: {self.architecture[name]!r} is neither true nor false")
        if fades and not {"agreement", "own_accuracy"} <= set(self.conditioning):
            raise ValueError("fades: true needs agreement and own_accuracy in conditioning, to be told who is ahead")
        if judges_labels and not {"agreement", "calibration"} <= set(self.conditioning):
            raise ValueError("judges_labels: true needs agreement and calibration in conditioning")
        if falls_back and "agreement" not in self.conditioning:
            raise ValueError("falls_back: true needs agreement in conditioning")
        if not 1 <= initial_factor < maximal_factor:
            raise ValueError(f"initial_factor: {initial_factor} is not in [1, maximal_factor {maximal_factor})")
        if initial_factor > 1 and not {"agreement", "images_per_class"} <= set(self.conditioning):
            raise ValueError(f"initial_factor: {initial_factor} needs agreement and images_per_class in conditioning")
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup: {warmup} is not in [0, 1]")
        self.initial_factor = initial_factor
        self.warmup = warmup
        self.calibrates = "calibration" in self.conditioning
        self.judges_labels = judges_labels
        self.body = self.build_sample_network(3 + self.calibrates, linear)
        if self.calibrates:
            self.body.head.bias.data[3] = UNCALIBRATED

    def set_balance(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, ...]:
        """The α, τ, β and the temperature of the teacher alone of each sample, all [B]."""
        seen = self.see(logs, progress)
        free = self.body(seen)
        if self.initial_factor > 1:
            free = free + self.start_factor(seen)
        free = self.fall_back(free)
        weight, share, *rest = free.sigmoid().unbind(1)
        weight = 1 - (1 - weight) * self.judge_labels(seen, progress)
        factor = (self.log_factor * free.unbind(1)[2].tanh()).exp()
        own = (rest[1] * self.trust[2].log().nan_to_num(0.0)).exp() if self.calibrates else torch.ones_like(factor)
        return weight, 1 + share * (self.maximal_temperature - 1), factor, own

    def start_factor(self, like: Tensor) -> Tensor:
        """What is added to the network's answers, [outputs]: with an answer of 0, β starts where the images ask.

        The fewer images show a student what the classes have in common, the more it has to learn from what the teacher
        knows of it: with up to `FEW` training images of a class β is `initial_factor`, with n of them
        `initial_factor` · `FEW` / n, but at least 1. That is under a teacher of at least `BEST`; under one of `GOOD` or
        less, which a student should overtake, β is 1. Rollouts are too short to find this; it was chosen over whole
        trainings (docs/evidence/universal/tried.md).
        """
        images = self.trust[3].to(like).nan_to_num(math.inf)
        factor = (self.initial_factor * FEW / images).clamp(1, self.initial_factor)
        good = ((self.estimate_teacher_accuracy(like) - GOOD) / (BEST - GOOD)).clamp(0, 1).nan_to_num(0.0)
        return pad((good * factor.log() / self.log_factor).atanh().view(1), (2, int(self.calibrates)))

    def estimate_teacher_accuracy(self, like: Tensor) -> Tensor:
        """Its agreement with the held-out labels that do not contradict it however sure it is; NaN if not known."""
        validation, *_, contradicted = self.trust.to(like).unbind()
        return validation / (1 - contradicted.nan_to_num(0.0)).clamp_min(NOTHING_LEFT)

    def fall_back(self, free: Tensor) -> Tensor:
        """The network's answers, [B, outputs]; under a teacher that agrees little with held-out labels, its first ones.

        A weak teacher helps a student early and harms it late, one that was taught wrong labels too; rollouts end
        before. What they teach, to listen less from the start, costs what `stay` does at the right time
        (docs/evidence/universal/tried.md).
        """
        if not self.architecture["falls_back"]:
            return free
        first = torch.stack([free.new_full((), answer) for answer in self.first_answers()])
        return torch.lerp(first, free, self.find_learned_part(free))

    def find_learned_part(self, like: Tensor) -> Tensor:
        """How much of what was learned counts under the teacher that was told of, a scalar in [0, 1]."""
        if not self.architecture["falls_back"]:
            return torch.ones_like(like[0])
        return ((self.estimate_teacher_accuracy(like) - WEAK) / (GOOD - WEAK)).clamp(0, 1).nan_to_num(1.0)

    def first_answers(self) -> list[float]:
        """What the network says before it learned, whatever it sees."""
        weight, temperature = self.architecture["initial_weight"], self.architecture["initial_temperature"]
        share = (temperature - 1) / (self.maximal_temperature - 1)
        answers = [math.log(weight / (1 - weight)), math.log(share / (1 - share)), 0.0, UNCALIBRATED]
        return answers[: 3 + self.calibrates]

    def ramp(self, progress: Progress, like: Tensor) -> Tensor:
        """The part of the teacher's terms that counts at this progress, a scalar in [0, 1]."""
        if not self.warmup:
            return torch.ones_like(like[0])
        return networks.as_progress(progress, like).div(self.warmup).clamp(max=1)

    def judge_labels(self, seen: Tensor, progress: Progress) -> Tensor:
        """The probability that each label is right, [B], in whose measure it counts; 1 where that cannot be known.

        By Bayes' rule: before, a label is wrong as often as the teacher agrees less with the training labels than with
        held-out ones; then the teacher's calibrated probability of the label is seen. A wrong label is taken for the
        one that is most easily confused with the right one, whichever that is, as in the worst case.

        Held-out labels that contradict the teacher however sure it is are wrong, or its answers are random. If these
        are, the student soon overtakes it (`stay`); so the labels are suspected from the middle of the training on.
        """
        if not self.judges_labels:
            return torch.ones_like(seen[:, 0])
        validation, training, *_, contradicted = self.trust.to(seen).unbind()
        suspected = contradicted.nan_to_num(0.0) * (4 * networks.as_progress(progress, seen[:, 0]) - 2).clamp(0, 1)
        wrong = (1 - training / validation * (1 - suspected) - NOISE).clamp(0, 1).nan_to_num(0.0)
        column = networks.name_sample_inputs(self.conditioning).index("calibrated target probability")
        right = (1 + seen[:, column].detach()) / 2  # of the teacher alone
        joint = (1 - wrong) * right
        return torch.where(wrong > 0, joint / (joint + wrong * (1 - right)).clamp_min(FLOOR), 1.0)

    def stay(self, like: Tensor) -> Tensor:
        """The part of the loss that is not plain cross-entropy yet, a scalar in [0, 1]; 1 where it cannot be known.

        It falls as the student's own accuracy overtakes the teacher's agreement with held-out labels, by a margin that
        grows with the part of the training labels that seems wrong: they are then no better a guide than the teacher.
        Rollouts are too short to find this; the two constants were chosen over whole trainings
        (docs/evidence/universal/tried.md).
        """
        if not self.architecture["fades"]:
            return torch.ones_like(like[0])
        validation, training, _, _, own, _ = self.trust.to(like).unbind()
        wrong = (1 - training / validation).clamp(0, 1).nan_to_num(0.0)
        lead = validation - own + wrong
        return (FADING * (lead + MARGIN)).sigmoid().nan_to_num(1.0)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms `task`, `target_class` (TCKD) and `other_classes` (NCKD)."""
        target = check_batch(student, teacher, target)
        with full_precision(student.logits):
            logs = self.read(student.logits, teacher.logits, target)
            weight, temperature, factor, own = self.set_balance(logs, progress)
            divergences = decoupled_divergences(
                widen(student.logits), logs.teacher, temperature, temperature * own, label_of(target)
            )
            stays = self.stay(weight)
            scale = 2 * stays * self.ramp(progress, weight) * (weight * temperature.square())
            labels = 1 + stays - 2 * stays * weight  # 2 (1 − α), and 1 where the loss is plain cross-entropy
            terms = torch.stack([labels, scale, scale * factor], 1) * torch.stack([logs.task, *divergences], 1)
            return dict(zip(("task", "target_class", "other_classes"), terms.mean(0).unbind(), strict=True))


class GenericLoss(LogitForm):
    """A free loss over logits: one network, shared by all classes, weighs how far each class is from its target.

    The loss is the mean over samples of Σ_c g(x_c) · [q_c log(q_c / p_c) − q_c + p_c], with p the student's
    probabilities and q = (1 − α) · label + α · softmax(teacher / τ) the target. A network over the student's and the
    teacher's logit of the class in several normalised forms, its label, and what is seen of the sample gives g, between
    1 / `maximal_factor` and `maximal_factor`; another gives α and τ of each sample. Both move with the student.

    The bracket and its gradient vanish where p = q, and only there; so do those of g times the bracket, for any g.
    The loss is therefore never negative and has zero gradient where the student equals its target, and any function of
    this kind that is separable over classes is such a product, up to the bound on g. The minimum is at q; elsewhere
    the loss need not be convex, and g can make other points stationary. It starts as KL(q ‖ p).

    The paper learns "generic loss networks for logits"; we could not read their inputs and layers, this form is ours.

    Args:
        hidden: Width of the hidden layers of both networks.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        maximal_factor: Upper bound of g, greater than 1.
        conditioning: As of `DecoupledLoss`. The class's own student
            logit is always seen.
        lipschitz: Bound of each network's Lipschitz constant; 0 sets none.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 10.0,
        maximal_factor: float = 8.0,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__(locals())
        self.balance = self.build_sample_network(2)
        inputs = networks.CLASS_INPUTS + len(networks.name_sample_inputs(self.conditioning))
        self.classes = Perceptron(inputs, hidden, 1, lipschitz)

    def set_balance(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, ...]:
        """The α and τ of each sample's target, both [B]."""
        return self.bound_balance(self.balance(self.see(logs, progress)))

    def mix_target(self, logs: LogProbabilities, progress: Progress = None) -> Tensor:
        """The target q, [B, C]."""
        weight, temperature = (x.unsqueeze(-1) for x in self.set_balance(logs, progress))
        return (1 - weight) * logs.dense_target + weight * (logs.teacher / temperature).softmax(1)

    def weigh_classes(self, logs: LogProbabilities, progress: Progress) -> Tensor:
        """The g of every class, [B, C]."""
        classes = networks.class_inputs(logs)
        samples = self.see(logs, progress).unsqueeze(1).expand(-1, classes.shape[1], -1)
        return (self.log_factor * self.classes(torch.cat([classes, samples], 2)).tanh().squeeze(2)).exp()

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the term `divergence`."""
        target = check_batch(student, teacher, target)
        with full_precision(student.logits):
            logs = self.read(student.logits, teacher.logits, target)
            factor = self.weigh_classes(logs, progress)
            mixed = self.mix_target(logs, progress)
            entropy = torch.special.entr(mixed.clamp_min(FLOOR))  # derivatives are finite in float32, at q = 0 too
            divergence = -entropy - mixed * logs.student - mixed + logs.student.exp()
            return {"divergence": (factor * divergence).sum(1).mean()}


FORMS: dict[str, type[LogitForm]] = {"decoupled": DecoupledLoss, "generic": GenericLoss}
