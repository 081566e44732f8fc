"""Students of the distillation gradient g(x) − λ g(θ) in problems where it can be checked, side by side."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot


def softmax_gradients(images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Gradients of mean cross-entropy of linear classifiers that share their batch.

    Args:
        images: [S, B, D].
        labels: One-hot, [S, B, C].
        weights: [S, D, L, C].

    Returns:
        [S, D, L, C].
    """
    seeds, pixels, students, classes = weights.shape
    logits = (images @ weights.reshape(seeds, pixels, -1)).view(seeds, -1, students, classes)
    errors = (logits.softmax(3) - labels.unsqueeze(2)) / images.shape[1]
    return (images.transpose(1, 2) @ errors.flatten(2)).view_as(weights)


def mean_loss(images: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Mean cross-entropy of each classifier on all images, [S, L]; `images` [N, D], `labels` [N, C]."""
    logits = torch.einsum("nd,sdlc->slnc", images, weights)
    return -(logits.log_softmax(3) * labels).sum(3).mean(2)


def train_linear(
    data: tuple[Tensor, Tensor],
    teachers: Tensor,
    shares: Tensor,
    epochs: int,
    rate: float = 0.05,
    unbiased: Tensor | None = None,
    masks: Tensor | None = None,
    batch_size: int = 10,
    schedule: Callable[[int], float] = lambda epoch: 1.0,
) -> tuple[Tensor, Tensor]:
    """Train linear classifiers by the distillation gradient, without momentum, at a fixed rate.

    Args:
        data: Images [N, D] and one-hot labels [N, C].
        teachers: θ of each student, [S, D, L, C].
        shares: λ of each student, [L].
        epochs: Passes over the images; each seed has its own order.
        rate: Learning rate.
        unbiased: Which students get λ · (the teacher's gradient over all images) added, bool [L].
        masks: 1 for weights that a student has, [S, D, L, C]; none for all.
        batch_size: Images a step.
        schedule: Epoch → factor of all λ.

    Returns:
        The students, and their loss on all images in the mean over the last three epochs, [S, L].
    """
    images, labels = data
    weights = torch.zeros_like(teachers)
    share = shares.view(1, 1, -1, 1)
    offset = torch.zeros_like(teachers)
    if unbiased is not None:
        full = softmax_gradients(images.expand(len(teachers), -1, -1), labels.expand(len(teachers), -1, -1), teachers)
        offset = unbiased.view(1, 1, -1, 1) * full
    losses = []
    generator = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        orders = torch.stack([torch.randperm(len(images), generator=generator) for _ in range(len(teachers))])
        factor = share * schedule(epoch)
        for rows in orders.split(batch_size, 1):
            batch = images[rows], labels[rows]
            gradient = softmax_gradients(*batch, weights) - factor * (softmax_gradients(*batch, teachers) - offset)
            weights = weights - rate * (gradient if masks is None else gradient * masks)
        if epoch >= epochs - 3:
            losses.append(mean_loss(images, labels, weights))
    return weights, torch.stack(losses).mean(0)


def train_svrg(
    data: tuple[Tensor, Tensor], start: Tensor, batches: Sequence[Tensor], rate: float, every: int
) -> tuple[Tensor, Tensor]:
    """The distillation gradient with λ = 1, the unbiased form and a snapshot of the student as teacher, next to SVRG.

    SVRG (Johnson, Zhang, 2013) is computed on its own, by autograd.

    Args:
        data: Images [N, D] and one-hot labels [N, C].
        start: Initial weights [D, C].
        batches: The images of each step.
        rate: Learning rate.
        every: Steps between snapshots.

    Returns:
        The weights of either, [D, C].
    """
    images, labels = data

    def gradient(weights: Tensor, rows: Tensor | slice) -> Tensor:
        return softmax_gradients(images[rows][None], labels[rows][None], weights[None, :, None])[0, :, 0]

    def differentiate(weights: Tensor, rows: Tensor | slice) -> Tensor:
        leaf = weights.clone().requires_grad_(True)
        loss = torch.nn.functional.cross_entropy(images[rows] @ leaf, labels[rows].argmax(1))
        return torch.autograd.grad(loss, leaf)[0]

    ours, svrg = start.clone(), start.clone()
    for step, rows in enumerate(batches):
        if step % every == 0:
            teacher, full = ours, gradient(ours, slice(None))
            snapshot, mean = svrg, differentiate(svrg, slice(None))
        ours = ours - rate * (gradient(ours, rows) - 1.0 * gradient(teacher, rows) + 1.0 * full)
        svrg = svrg - rate * (differentiate(svrg, rows) - differentiate(snapshot, rows) + mean)
    return ours, svrg


class LeastSquares:
    """min over x of the mean of (a_i·x − b_i)² / 2, where SGD's stationary error is known in closed form.

    Args:
        seed: Of the 200 rows in 5 dimensions.
        distance: |θ − x*|.
    """

    def __init__(self, seed: int, distance: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.rows = torch.randn(200, 5, dtype=torch.float64, generator=generator)
        noise = torch.randn(200, dtype=torch.float64, generator=generator)
        target = self.rows @ torch.ones(5, dtype=torch.float64) + noise
        self.optimum = torch.linalg.lstsq(self.rows, target[:, None]).solution[:, 0]
        self.residuals = self.rows @ self.optimum - target
        direction = torch.randn(5, dtype=torch.float64, generator=generator)
        self.offset = distance * direction / direction.norm()

    def noise_gradients(self, share: float) -> Tensor:
        """g_i(x*) − λ g_i(θ), [200, 5]."""
        return self.rows * ((1 - share) * self.residuals - share * (self.rows @ self.offset))[:, None]

    def predict(self, share: float, rate: float) -> float:
        """The stationary E |x − x*|² of batches of one, by solving for the first two moments."""
        outer = torch.einsum("ni,nj->nij", self.rows, self.rows)
        noise = self.noise_gradients(share)
        mean = -torch.linalg.solve(outer.mean(0), noise.mean(0))
        moves = torch.eye(5, dtype=torch.float64) - rate * outer
        kron = torch.einsum("nij,nkl->ikjl", moves, moves).reshape(25, 25) / 200
        cross = -rate * torch.einsum("nij,j,nk->ik", moves, mean, noise) / 200
        constant = cross + cross.T + rate**2 * noise.T @ noise / 200
        second = torch.linalg.solve(torch.eye(25, dtype=torch.float64) - kron, constant.reshape(25))
        return float(second.view(5, 5).trace())

    def simulate(self, share: float, rate: float, chains: int = 4000, steps: int = 600, kept: int = 200) -> float:
        """The same by running SGD in many chains side by side."""
        generator = torch.Generator().manual_seed(1)
        noise, error, total = self.noise_gradients(share), torch.zeros(chains, 5, dtype=torch.float64), 0.0
        for step in range(steps):
            drawn = torch.randint(200, (chains,), generator=generator)
            rows = self.rows[drawn]
            error = error - rate * (rows * (rows * error).sum(1, keepdim=True) + noise[drawn])
            total += float(error.square().sum(1).mean()) if step >= steps - kept else 0.0
        return total / kept


def flat_labels(labels: Tensor, classes: int = 10) -> Tensor:
    """One-hot labels, [N, C]."""
    return one_hot(labels, classes).float()
