"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022, arXiv 2203.08679)."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import softplus

from lkd.core.outputs import Outputs
from lkd.losses.functions import check_batch, check_options, cross_entropies, label_of, widen
from lkd.losses.loss import DistillationLoss, Progress, Terms, read_progress

MASKED = -1e30  # its exponential is 0, and it is finite: no infinity less infinity


class DKDLoss(DistillationLoss):
    """task · CE + τ² · (alpha · TCKD + beta · NCKD).

    TCKD = KL(bᵀ ‖ bˢ), where b = (p_target, 1 − p_target); NCKD = KL(p̂ᵀ ‖ p̂ˢ), where p̂ is the softmax over the
    classes other than the target; both at temperature τ. (KD is TCKD + (1 − p_targetᵀ) · NCKD.) With two classes NCKD
    is 0. The authors' code takes the logarithm of a softmax, and masks the target with −1000, which overflow at logit
    gaps of about 100 τ; here the target is cut out and all is in log space. As in that code, the teacher's terms are
    ramped up linearly at the start of training: over 20 of 240 epochs on CIFAR-100 (the default), 1 of 100 on ImageNet;
    there in steps of an epoch, here of a batch.

    Args:
        task: Weight of cross-entropy.
        alpha: Weight of TCKD.
        beta: Weight of NCKD, tuned for each pair: 8 for many of CIFAR-100; 2, at τ = 1, for ResNet-50 → MobileNetV1 on
            ImageNet in the authors' recipes.
        temperature: τ.
        warmup: Part of the training over which the teacher's terms are ramped up from 0, in [0, 1]. Where `progress` is
            not given they have their full weight, as at 1.
    """

    def __init__(
        self, task: float = 1.0, alpha: float = 1.0, beta: float = 8.0, temperature: float = 4.0, warmup: float = 1 / 12
    ) -> None:
        super().__init__()
        check_options(temperature, task=task, alpha=alpha, beta=beta)
        if not 0 <= warmup <= 1:
            raise ValueError(f"warmup: {warmup} is not in [0, 1], a part of the training")
        self.task, self.alpha, self.beta, self.temperature, self.warmup = task, alpha, beta, temperature, warmup

    def ramp(self, progress: Progress) -> float | Tensor:
        """The part of the teacher's terms that counts at this progress, in [0, 1]."""
        part = read_progress(progress)
        if not self.warmup:
            return 1.0
        part = part / self.warmup
        return part.clamp(max=1) if isinstance(part, Tensor) else min(part, 1.0)

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms `task`, `target_class` (TCKD) and `other_classes` (NCKD).

        Raises:
            ValueError: If `progress` is not in [0, 1].
        """
        target = check_batch(student, teacher, target)
        label = label_of(target)
        logits = widen(student.logits), widen(teacher.logits)
        temperature = torch.full_like(label, self.temperature, dtype=logits[0].dtype)
        target_class, other_classes = decoupled_divergences(*logits, temperature, temperature, label)
        scale = self.ramp(progress) * self.temperature**2
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "target_class": scale * self.alpha * target_class.mean(),
            "other_classes": scale * self.beta * other_classes.mean(),
        }


class DecoupledDivergences(torch.autograd.Function):
    """TCKD and NCKD of each sample at temperatures of its own, with their derivatives in closed form.

    Autograd through the softmaxes takes about three times as long. `backward` is written in operators that have
    derivatives themselves, over inputs and outputs only, so that higher derivatives are right too.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, temperature_s: Tensor, temperature_t: Tensor, label: Tensor) -> Any:
        """Compute what `decoupled_divergences` says, and what its derivatives need.

        Returns:
            TCKD and NCKD; the log-odds of the target class against the rest, student's and teacher's; all [B]. And the
            log-softmaxes over the other classes, `MASKED` at the target, student's and teacher's, [B, C].
        """
        place, found = label.unsqueeze(1), []
        for logits, temperature in ((student, temperature_s), (teacher, temperature_t)):
            scaled = logits / temperature.unsqueeze(1)
            cut = scaled.scatter(1, place, MASKED)
            others = cut.log_softmax(1)
            # What log_softmax took off the largest other logit is their logsumexp: no exponentials for it again.
            found.append((scaled.gather(1, place).squeeze(1) - cut.amax(1) + others.amax(1), others))
        (odds_s, others_s), (odds_t, others_t) = found
        target_class = odds_t.sigmoid() * (odds_t - odds_s) + softplus(odds_s) - softplus(odds_t)
        other_classes = (others_t - others_s).mul_(others_t.exp()).sum(1)
        return target_class, other_classes, odds_s, odds_t, others_s, others_t

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, of_target: Any, of_others: Any, *also: Any) -> Any:
        """From slopes of the outputs to slopes of the inputs."""
        student, teacher, temperature_s, temperature_t, label, _, divergence, odds_s, odds_t, others_s, others_t = (
            ctx.saved_tensors
        )
        of_target, of_others = (torch.zeros_like(odds_s) if x is None else x for x in (of_target, of_others))
        of_odds_s, of_odds_t, of_others_s, of_others_t = also
        place, sure, rest_t = label.unsqueeze(1), odds_t.sigmoid(), others_t.exp()
        slopes: list[Tensor | None] = [None] * 5
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[2]:
            of_odds = of_target * (odds_s.sigmoid() - sure)
            of_odds = of_odds if of_odds_s is None else of_odds + of_odds_s
            rest_s = others_s.exp()
            inverse = temperature_s.reciprocal()
            slope = rest_s * ((of_others - of_odds) * inverse).unsqueeze(1)
            slope = slope - rest_t * (of_others * inverse).unsqueeze(1)
            if of_others_s is not None:
                direct = of_others_s.scatter(1, place, 0.0) * inverse.unsqueeze(1)
                slope = slope + direct - rest_s * direct.sum(1, keepdim=True)
            slopes[0] = slope.scatter_add(1, place, (of_odds * inverse).unsqueeze(1))
            slopes[2] = -(slopes[0] * student).sum(1) * inverse
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[3]:
            of_odds = of_target * (sure * (1 - sure) * (odds_t - odds_s))
            of_odds = of_odds if of_odds_t is None else of_odds + of_odds_t
            gap, inverse = others_t - others_s, temperature_t.reciprocal()
            if of_others_t is None and not ctx.needs_input_grad[1]:
                # The covariance of gap and logits under the teacher: without a slope for every class.
                weighed = rest_t * teacher
                mean = weighed.sum(1)
                covariance = (gap * weighed).sum(1) - divergence * mean
                lead = teacher.gather(1, place).squeeze(1) - mean
                slopes[3] = -(of_others * covariance + of_odds * lead) * inverse.square()
            else:
                slope = rest_t * ((gap - divergence.unsqueeze(1)) * of_others.unsqueeze(1) - of_odds.unsqueeze(1))
                if of_others_t is not None:
                    direct = of_others_t.scatter(1, place, 0.0)
                    slope = slope + direct - rest_t * direct.sum(1, keepdim=True)
                slope = slope.scatter_add(1, place, of_odds.unsqueeze(1))
                slopes[1] = slope * inverse.unsqueeze(1)
                slopes[3] = -(slopes[1] * teacher).sum(1) * inverse
        return tuple(slopes)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        """From tangents of the inputs to tangents of the outputs."""
        student, teacher, temperature_s, temperature_t, label, _, _, odds_s, odds_t, others_s, others_t = (
            ctx.saved_tensors
        )
        place, moved = label.unsqueeze(1), []
        for which, (logits, temperature, others) in enumerate(
            ((student, temperature_s, others_s), (teacher, temperature_t, others_t))
        ):
            along, stretch = tangents[which], tangents[2 + which]
            scaled = torch.zeros_like(others) if along is None else along / temperature.unsqueeze(1)
            if stretch is not None:
                scaled = scaled - logits * (stretch / temperature.square()).unsqueeze(1)
            mean = (others.exp() * scaled).sum(1, keepdim=True)
            moved.append(((scaled.gather(1, place) - mean).squeeze(1), (scaled - mean).scatter(1, place, 0.0)))
        (of_odds_s, of_others_s), (of_odds_t, of_others_t) = moved
        sure, rest_t = odds_t.sigmoid(), others_t.exp()
        target_class = (odds_s.sigmoid() - sure) * of_odds_s + sure * (1 - sure) * (odds_t - odds_s) * of_odds_t
        gap = others_t - others_s
        other_classes = (rest_t * (of_others_t * (1 + gap) - of_others_s)).sum(1)
        return target_class, other_classes, of_odds_s, of_odds_t, of_others_s, of_others_t


def decoupled_divergences(
    student: Tensor, teacher: Tensor, temperature_s: Tensor, temperature_t: Tensor, label: Tensor
) -> tuple[Tensor, Tensor]:
    """TCKD, of the target class against the rest, and NCKD, among the other classes, of each sample.

    Args:
        student: Logits, [B, C].
        teacher: The same of the teacher.
        temperature_s: What the student's logits are divided by, [B].
        temperature_t: The same of the teacher's.
        label: Class indices, [B].

    Returns:
        Both [B].
    """
    is_compiling = torch.compiler.is_compiling()  # it fuses what is written out, and finds the derivatives itself
    apply = DecoupledDivergences.forward if is_compiling else DecoupledDivergences.apply
    if not is_compiling:  # what was made in inference mode cannot be kept for a derivative
        teacher, label = (x.clone() if x.is_inference() else x for x in (teacher, label))
    target_class, other_classes, *_ = apply(student, teacher, temperature_s, temperature_t, label)
    return target_class, other_classes
