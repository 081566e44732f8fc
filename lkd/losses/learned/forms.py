"""The forms of a learned loss over logits (our reconstruction)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import log_softmax

from lkd.core.outputs import Outputs
from lkd.losses.dkd import decouple
from lkd.losses.functions import cross_entropies, kl_divergences, label_of
from lkd.losses.learned.inputs import (
    CONDITIONING,
    LogProbabilities,
    as_progress,
    check_conditioning,
    name_sample_inputs,
    read_logits,
    sample_inputs,
)
from lkd.losses.learned.networks import (
    BalanceNetwork,
    ClassNetwork,
    Perceptron,
    bound_balance,
    class_divergences,
    log_of_factor,
    mix_target,
    negative_entropies,
    unbound_balance,
)
from lkd.losses.loss import DistillationLoss, Progress

# ----------------------------------------------------------------------------------------------------------------------
# The balance form of a learned loss over logits: α and τ of each sample (our reconstruction).


class BalanceLoss(DistillationLoss):
    """Distillation over logits whose balance and temperature a small network sets for each sample.

    For sample i, a network sees up to six numbers and sets α and τ; the loss is the mean of
    (1 − αᵢ) · CE(student, target) + αᵢ · τᵢ² · KL(teacher_τ ‖ student_τ).
    The six numbers are the student's and the teacher's probability of the target, both entropies over log C, the
    squashed KL divergence at τ = 1, and the training's progress. None depends on the order or the number of the
    classes. α and τ move with the student's logits, and the gradient says so: the loss is a function, its Hessian is
    symmetric, and every hypergradient estimator is exact on it or as near as it states.

    The paper learns "generic loss networks for logits" with the balancing weight folded in; this form of it is ours.
    α in (0, 1) and a bounded τ keep its value between those of cross-entropy and of KD. By itself nothing normalises
    its gradient (see `LearnedLoss`), so compare losses at learning rates of their own.

    Args:
        hidden: Width of the two hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        conditioning: What the network sees besides the teacher: some of progress, state.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 4.0,
        maximal_temperature: float = 10.0,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioning = check_conditioning(conditioning)
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        inputs = len(name_sample_inputs(self.conditioning))
        self.body = BalanceNetwork(inputs, hidden, initial_weight, initial_temperature, maximal_temperature, lipschitz)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α in (0, 1) and τ in (1, `maximal_temperature`) of each sample, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        logs = read_logits(student_logits, teacher_logits, target)
        return self.body.balance(sample_inputs(logs, progress, self.conditioning))

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            weight, temperature = self.weights_and_temperatures(student.logits, teacher.logits, target, progress)
            divergence = kl_divergences(student.logits, teacher.logits, temperature.unsqueeze(1))
            return {
                "task": ((1 - weight) * cross_entropies(student.logits, target)).mean(),
                "distillation": (weight * temperature.square() * divergence).mean(),
            }


# ----------------------------------------------------------------------------------------------------------------------
# The decoupled form of a learned loss over logits: α, τ and β of each sample (our reconstruction).


class DecoupledLoss(DistillationLoss):
    """Decoupled distillation (DKD, arXiv 2203.08679) whose three weights a small network sets for each sample.

    For sample i, a network sees what `BalanceLoss` does and sets α, τ and β; the loss is the mean of
    2 (1 − αᵢ) · CE(student, target) + 2 αᵢ · τᵢ² · (TCKD + βᵢ · NCKD), both divergences at temperature τᵢ: of the
    target class against the rest, and among the other classes. With α = 1/2 it is DKD as its authors weigh it, at home
    at DKD's learning rates. With β = 1 − the teacher's probability of the target at τ it is twice `BalanceLoss`; with
    β = 1 or more, what the teacher knows of the other classes counts on samples that it is sure of too. Of dense
    targets the most probable class is the target class.

    As DKD's, the teacher's terms are ramped up linearly from 0 at the start of training, here over most of it: fresh
    students trained on clean labels are better for it, and rollouts, which are shorter than trainings, do not find it.

    α, τ and β move with the student's logits, and the gradient says so.

    Args:
        hidden: Width of the two hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        maximal_factor: β starts at 1 and stays between 1 / `maximal_factor` and `maximal_factor`; greater than 1.
        warmup: Part of the training over which the teacher's terms are ramped up, in [0, 1]. Where `progress` is not
            given they have their full weight.
        conditioning: What the network sees besides the teacher: some of progress, state.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 4.0,
        maximal_factor: float = 8.0,
        warmup: float = 0.6,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        self.conditioning = check_conditioning(conditioning)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup: {warmup} is not in [0, 1]")
        self.maximal_temperature = maximal_temperature
        self.warmup = warmup
        self.log_factor = log_of_factor(maximal_factor)
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "maximal_factor": maximal_factor,
            "warmup": warmup,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        bias = unbound_balance(initial_weight, initial_temperature, maximal_temperature)
        self.body = Perceptron(len(name_sample_inputs(self.conditioning)), hidden, 3, lipschitz)
        self.body.head.bias.data[:2] = bias

    def set_weights(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """The α in (0, 1), τ in (1, `maximal_temperature`) and β of each sample, all [B]."""
        free = self.body(sample_inputs(logs, progress, self.conditioning))
        weight, temperature = bound_balance(free[:, :2], self.maximal_temperature)
        return weight, temperature, (self.log_factor * free[:, 2].tanh()).exp()

    def ramp(self, progress: Progress, like: Tensor) -> Tensor:
        """The part of the teacher's terms that counts at this progress, a scalar in [0, 1]."""
        if progress is None or not self.warmup:
            return torch.ones_like(like[0])
        return as_progress(progress, like).div(self.warmup).clamp(max=1)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α and τ of each sample, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        return self.set_weights(read_logits(student_logits, teacher_logits, target), progress)[:2]

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task`, `target_class` (TCKD) and `other_classes` (NCKD).

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            weight, temperature, factor = self.set_weights(logs, progress)
            label = label_of(target)
            (binary_s, other_s), (binary_t, other_t) = (
                decouple(logits / temperature.unsqueeze(1), label) for logits in (logs.student, logs.teacher)
            )
            scale = 2 * self.ramp(progress, weight) * weight * temperature.square()
            return {
                "task": (2 * (1 - weight) * cross_entropies(student.logits, target)).mean(),
                "target_class": (scale * (binary_t.exp() * (binary_t - binary_s)).sum(1)).mean(),
                "other_classes": (scale * factor * (other_t.exp() * (other_t - other_s)).sum(1)).mean(),
            }


# ----------------------------------------------------------------------------------------------------------------------
# The generic form of a learned loss over logits (our reconstruction).


class GenericLoss(DistillationLoss):
    """A free loss over logits: one network, shared by all classes, weighs how far each class is from its target.

    The loss is the mean over samples of Σ_c g(x_c) · [q_c log(q_c / p_c) − q_c + p_c], with p the student's
    probabilities and q = (1 − α) · label + α · softmax(teacher / τ) the target. A network over the student's and the
    teacher's logit of the class in several normalised forms, its label, and what is seen of the sample gives g, between
    1 / `maximal_factor` and `maximal_factor`; another gives α and τ of each sample. Both move with the student.

    The bracket and its gradient vanish where p = q, and only there; so do those of g times the bracket, for any g.
    The loss is therefore never negative and has zero gradient where the student equals its target, and any function of
    this kind that is separable over classes is such a product, up to the bound on g. The minimum is at q; elsewhere
    the loss need not be convex, and g can make other points stationary. It starts as KL(q ‖ p).

    The paper learns "generic loss networks for logits"; their inputs and layers are not public, this form is ours.

    Args:
        hidden: Width of the hidden layers of both networks.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        maximal_factor: Upper bound of g, greater than 1.
        conditioning: What is seen of a sample besides the teacher: some of progress, state. The class's own student
            logit is always seen.
        lipschitz: Bound of each network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
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
        super().__init__()
        self.conditioning = check_conditioning(conditioning)
        self.log_factor = log_of_factor(maximal_factor)
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "maximal_factor": maximal_factor,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        inputs = len(name_sample_inputs(self.conditioning))
        self.balance = BalanceNetwork(
            inputs, hidden, initial_weight, initial_temperature, maximal_temperature, lipschitz
        )
        self.classes = ClassNetwork(hidden, 1, self.conditioning, lipschitz)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """The α and τ of each sample's target, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        logs = read_logits(student_logits, teacher_logits, target)
        return self.balance.balance(sample_inputs(logs, progress, self.conditioning))

    def mix_target(self, logs: LogProbabilities, progress: Progress = None) -> Tensor:
        """The target q, [B, C]."""
        return mix_target(logs, *self.balance.balance(sample_inputs(logs, progress, self.conditioning)))

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the term `divergence`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            factor = (self.log_factor * self.classes.values(logs, progress).squeeze(2)).exp()
            divergence = class_divergences(self.mix_target(logs, progress), logs.student)
            return {"divergence": (factor * divergence).sum(1).mean()}


# ----------------------------------------------------------------------------------------------------------------------
# The residual form of a learned loss over logits: KD and a bounded residual (our reconstruction).


class ResidualLoss(DistillationLoss):
    """Classic KD plus a residual that is never larger than a fraction of it, class by class.

    KD is (1 − α) · KL(label ‖ student) + α · τ² · KL(teacher_τ ‖ student_τ), both divergences sums over classes of
    q log(q / p) − q + p ≥ 0, with one learned α and one learned τ. A network over the class and its sample gives ρ of
    each divergence in (−`bound`, `bound`), and each class's divergence counts 1 + ρ times. So the loss lies between
    1 − bound and 1 + bound times KD's, is never negative, and starts as KD (less the entropy of a dense target).

    Args:
        hidden: Width of the network's hidden layers.
        initial_weight: α before any meta-training, in (0, 1).
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        bound: Of the residual, relative to KD, in (0, 1).
        conditioning: What is seen of a sample besides the teacher: some of progress, state. The class's own student
            logit is always seen.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 4.0,
        maximal_temperature: float = 10.0,
        bound: float = 0.5,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 < bound < 1:
            raise ValueError(f"bound: {bound} is not in (0, 1)")
        self.conditioning = check_conditioning(conditioning)
        self.maximal_temperature = maximal_temperature
        self.bound = bound
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "bound": bound,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        self.base = nn.Parameter(unbound_balance(initial_weight, initial_temperature, maximal_temperature))
        self.classes = ClassNetwork(hidden, 2, self.conditioning, lipschitz)

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """KD's α and τ, the same for each sample, both [B]; the residual is not in them.

        Args:
            student_logits: [B, C].
            teacher_logits: Not read.
            target: Not read.
            progress: Not read.
        """
        weight, temperature = bound_balance(self.base, self.maximal_temperature)
        return weight.expand(student_logits.shape[0]), temperature.expand(student_logits.shape[0])

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the terms `task` and `distillation`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            weight, temperature = bound_balance(self.base, self.maximal_temperature)
            task, distillation = (1 + self.bound * self.classes.values(logs, progress)).unbind(2)
            task = task * class_divergences(logs.target, logs.student)
            distillation = distillation * class_divergences(
                (logs.teacher / temperature).softmax(1), log_softmax(logs.student / temperature, 1)
            )
            return {
                "task": (1 - weight) * task.sum(1).mean(),
                "distillation": weight * temperature.square() * distillation.sum(1).mean(),
            }


# ----------------------------------------------------------------------------------------------------------------------
# The target form of a learned loss over logits: cross-entropy to a learned target (our reconstruction).


class TargetLoss(DistillationLoss):
    """Cross-entropy to a learned mixture of label and tempered teacher, convex in the student's logits.

    The target is q = (1 − α) · label + α · softmax(teacher / τ), with α and τ set by a network that sees the teacher
    and the progress, and the loss is KL(q ‖ student): cross-entropy less the entropy of q, which the student cannot
    change. With a target that followed the student it would not be convex. The state comes in so: the network gives
    `targets` mixtures q_k and their shares π_k, and the loss is their soft maximum
    T · log Σ_k π_k exp(KL(q_k ‖ student) / T), with T learned. A soft maximum of convex functions is convex; its
    gradient is p − Σ_k w_k q_k, with the more weight w_k on a target the farther the student still is from it. Without
    `state` there is one target.

    The gradient at the logits is a difference of two distributions, as cross-entropy's is: this form cannot act as a
    learning rate in disguise, whatever its weights. The loss is never negative.

    Args:
        hidden: Width of the network's hidden layers.
        initial_weight: α before any meta-training, in (0, 1); several targets start around it.
        initial_temperature: τ before any meta-training, between 1 and `maximal_temperature`.
        maximal_temperature: Upper bound of τ.
        targets: Number of targets if conditioned on the state, at least 2.
        conditioning: Some of progress, state.
        lipschitz: Bound of the network's Lipschitz constant; 0 sets none.

    Raises:
        ValueError: If an option is out of range.
    """

    def __init__(
        self,
        hidden: int = 16,
        initial_weight: float = 0.5,
        initial_temperature: float = 2.0,
        maximal_temperature: float = 10.0,
        targets: int = 2,
        conditioning: Sequence[str] = CONDITIONING,
        lipschitz: float = 0.0,
    ) -> None:
        super().__init__()
        if targets < 2:
            raise ValueError(f"targets: {targets} is not at least 2; leave state out of conditioning for one target")
        self.conditioning = check_conditioning(conditioning)
        self.maximal_temperature = maximal_temperature
        self.architecture = {
            "hidden": hidden,
            "initial_weight": initial_weight,
            "initial_temperature": initial_temperature,
            "maximal_temperature": maximal_temperature,
            "targets": targets,
            "conditioning": self.conditioning,
            "lipschitz": lipschitz,
        }
        self.seen = [kind for kind in self.conditioning if kind != "state"]
        self.targets = targets if "state" in self.conditioning else 1
        free = unbound_balance(initial_weight, initial_temperature, maximal_temperature).repeat(self.targets, 1)
        free[:, 0] += torch.linspace(-0.5, 0.5, self.targets) if self.targets > 1 else 0
        self.body = Perceptron(len(name_sample_inputs(self.seen)), hidden, 3 * self.targets, lipschitz)
        self.body.head.bias.data.view(self.targets, 3)[:, :2] = free
        if self.targets > 1:
            self.sharpness = nn.Parameter(torch.zeros(()))

    def compare_targets(self, logs: LogProbabilities, progress: Progress) -> tuple[Tensor, Tensor, Tensor]:
        """The α and τ of every target, and log π_k + KL(q_k ‖ student) / T; all [targets, B]."""
        free = self.body(sample_inputs(logs, progress, self.seen)).view(-1, self.targets, 3).transpose(0, 1)
        weight, temperature = bound_balance(free[..., :2], self.maximal_temperature)
        divergences = []
        for each_weight, each_temperature in zip(weight, temperature, strict=True):
            target = mix_target(logs, each_weight, each_temperature)
            divergences.append((negative_entropies(target) - target * logs.student).sum(1))
        return weight, temperature, log_softmax(free[..., 2], 0) + torch.stack(divergences) / self.hardness()

    def hardness(self) -> Tensor | float:
        """T of the soft maximum, between e⁻² and e²; 1 where there is one target."""
        return (2 * self.sharpness.tanh()).exp() if self.targets > 1 else 1.0

    def weights_and_temperatures(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, progress: Progress = None
    ) -> tuple[Tensor, Tensor]:
        """α and τ of each sample, averaged over its targets as the gradient weighs them, both [B].

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1]; none is taken as 0.
        """
        weight, temperature, scores = self.compare_targets(
            read_logits(student_logits, teacher_logits, target), progress
        )
        share = scores.softmax(0)
        return (share * weight).sum(0), (share * temperature).sum(0)

    def forward(
        self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None
    ) -> dict[str, Tensor]:
        """Compute the term `divergence`.

        Args:
            student: The student's outputs.
            teacher: The teacher's outputs for the same images.
            target: Class indices [B] or distributions [B, C].
            progress: How far the training is, in [0, 1].
        """
        with torch.autocast(student.logits.device.type, enabled=False):
            logs = read_logits(student.logits, teacher.logits, target)
            scores = self.compare_targets(logs, progress)[2]
            return {"divergence": (self.hardness() * scores.logsumexp(0)).mean()}
