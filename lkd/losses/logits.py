"""Hand-made losses over logits: cross-entropy, KD, DIST, logit matching, logit standardisation."""

from torch import Tensor

from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.losses.functions import (
    centre,
    check_batch,
    check_options,
    check_several,
    check_target,
    cross_entropies,
    kl_divergences,
    pearson_correlations,
    widen,
)
from lkd.losses.loss import DistillationLoss, Progress, Terms

# ----------------------------------------------------------------------------------------------------------------------
# Cross-entropy with the target: the student without a teacher.


class CrossEntropyLoss(DistillationLoss):
    """Mean cross-entropy; the teacher is ignored."""

    reads_logits = False

    def forward(self, student: Outputs, teacher: Outputs | None, target: Tensor, progress: Progress = None) -> Terms:
        target = check_target(student.logits, target)
        return {"task": cross_entropies(student.logits, target).mean()}


# ----------------------------------------------------------------------------------------------------------------------
# DIST: distillation from a stronger teacher (Huang, You, Wang, Qian, Xu, NeurIPS 2022, arXiv 2205.10536).


class DISTLoss(DistillationLoss):
    """task · CE + beta · inter + gamma · intra.

    inter = τ² · mean over samples of (1 − ρ) between the rows of the two probability matrices at temperature τ, and
    intra = τ² · mean over classes of (1 − ρ) between their columns, ρ being Pearson's correlation. The factor τ² is
    that of the authors' code (hunto/image_classification_sota), and so is the ε = 1e-8 that is added to the product of
    norms in ρ: with confident networks, whose columns hardly vary, it bounds the gradient. A row or column that is
    constant has ρ = 0.

    Args:
        task: Weight of cross-entropy.
        beta: Weight of the relation between classes; 2 in the authors' recipes.
        gamma: Weight of the relation within a class; 2 in the authors' recipes.
        temperature: τ; the authors take 1 on ImageNet and 4 on CIFAR-100.
    """

    def __init__(self, task: float = 1.0, beta: float = 2.0, gamma: float = 2.0, temperature: float = 1.0) -> None:
        super().__init__()
        check_options(temperature, task=task, beta=beta, gamma=gamma)
        self.task, self.beta, self.gamma, self.temperature = task, beta, gamma, temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms `task`, `inter_class` and `intra_class`."""
        target = check_batch(student, teacher, target)
        check_several("dist", len(target), 3)  # the correlation of two points is 1 or −1
        p, q = ((widen(logits) / self.temperature).softmax(1) for logits in (student.logits, teacher.logits))
        scale = self.temperature**2
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "inter_class": self.beta * scale * (1 - pearson_correlations(p, q).mean()),
            "intra_class": self.gamma * scale * (1 - pearson_correlations(p.T, q.T).mean()),
        }


# ----------------------------------------------------------------------------------------------------------------------
# Classic knowledge distillation (Hinton, Vinyals, Dean, 2015, arXiv 1503.02531).


class KDLoss(DistillationLoss):
    """(1 − w) · CE(student, target) + w · τ² · KL(teacher_τ ‖ student_τ).

    Args:
        weight: w in [0, 1], the balance between task and teacher.
        temperature: τ > 0.
    """

    def __init__(self, weight: float = 0.5, temperature: float = 4.0) -> None:
        super().__init__()
        if not 0 <= weight <= 1:
            raise ValueError(f"weight: {weight} is not in [0, 1]")
        check_options(temperature)
        self.weight, self.temperature = weight, temperature

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms `task` and `distillation`."""
        target = check_batch(student, teacher, target)
        divergence = kl_divergences(student.logits, teacher.logits, self.temperature).mean()
        return {
            "task": (1 - self.weight) * cross_entropies(student.logits, target).mean(),
            "distillation": self.weight * self.temperature**2 * divergence,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Logit matching (Ba, Caruana, "Do Deep Nets Really Need to be Deep?", NeurIPS 2014, arXiv 1312.6184).


class LogitMSELoss(DistillationLoss):
    """task · CE(student, target) + distillation · mean over batch and classes of (student − teacher)².

    The paper regresses on the logits alone (`task: 0`), with ½ and a sum over the classes; the mean is that of
    `torch.nn.MSELoss`, so that one weight suits any number of classes.

    Args:
        task: Weight of cross-entropy.
        distillation: Weight of the squared error.
    """

    def __init__(self, task: float = 1.0, distillation: float = 1.0) -> None:
        super().__init__()
        check_options(task=task, distillation=distillation)
        self.task, self.distillation = task, distillation

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms `task` and `distillation`."""
        target = check_batch(student, teacher, target)
        error = (widen(student.logits) - widen(teacher.logits)).square().mean()
        return {
            "task": self.task * cross_entropies(student.logits, target).mean(),
            "distillation": self.distillation * error,
        }


# ----------------------------------------------------------------------------------------------------------------------
# Logit standardisation (Sun, Ren, Li, Wang, Cao, CVPR 2024, arXiv 2403.01427).


class LogitStandardizationLoss(DistillationLoss):
    """A logit loss whose teacher terms see Z(z) = (z − mean) / (ε + standard deviation) in place of the logits z.

    Mean and deviation are over the classes of each sample, of student and teacher alike; the term `task` sees the
    logits as they are. The defaults are those of the authors' code for KD: 0.1 · CE + 9 · τ² · KL at τ = 2, which is
    ten times the teacher's term of `{name: kd, weight: 0.9, temperature: 2}`. The paper divides by the deviation with
    1 / C; here it is the one with 1 / (C − 1), and ε = 1e-7, as in that code.

    Args:
        loss: The loss: a module with a term `task`.
        distillation: Factor of all its other terms.
    """

    def __init__(self, loss: DistillationLoss, distillation: float = 10.0) -> None:
        super().__init__()
        check_options(distillation=distillation)
        self.loss, self.distillation = loss, distillation

    def forward(self, student: Outputs, teacher: Outputs, target: Tensor, progress: Progress = None) -> Terms:
        """Compute the terms of the loss."""
        target = check_batch(student, teacher, target)
        if student.logits.shape[1] == 2:
            raise UserError(
                "loss 'logit_standardization': of two classes standardised logits are the same whatever a network "
                "says; take kd"
            )
        standard = (Outputs(standardize(outputs.logits), {}) for outputs in (student, teacher))
        terms = self.loss(*standard, target, progress)
        task = self.loss(student, teacher, target, progress)["task"]
        return {name: task if name == "task" else self.distillation * term for name, term in terms.items()}


def standardize(logits: Tensor, eps: float = 1e-7) -> Tensor:
    """Zero mean and unit deviation over the classes, [B, C] → [B, C]; equal logits give zeros, with zero gradient."""
    logits = widen(logits)
    variance = logits.var(1, keepdim=True).clamp_min(eps**2)
    return centre(logits) / (eps + variance.sqrt())
