"""Influence by the bi-level engine: example weights are outer parameters, and training steps are differentiated."""

import torch
from torch import Tensor

from lkd.balance.problem import Problem
from lkd.config import InfluenceSettings
from lkd.data import Batch, seeded_generator
from meta import State, Tensors
from meta.estimators import adjoint
from meta.optim import SGD


def measure_through_training(problem: Problem, settings: InfluenceSettings, seed: int) -> tuple[Tensor, Tensor]:
    """N · ∂(meta-validation loss)/∂w_i at w = 1, after `iterations` steps of SGD on weighted batches.

    At a stationary point, and with steps over all examples, this tends to I_i without damping as the steps increase;
    elsewhere it is the influence of these very steps. Examples in no batch have none.

    Returns:
        Index and influence of each example, [N] each.
    """
    rows = torch.full((int(problem.train.index.max()) + 1,), -1, device=problem.device)
    rows[problem.train.index.to(problem.device)] = torch.arange(len(problem.train), device=problem.device)

    def inner_loss(point: Tensors, buffers: Tensors, hyper: Tensors, batch: Batch) -> tuple[Tensor, Tensors]:
        logits = problem.compute_logits(point, batch.images)
        weight = hyper["weight"][rows[batch.index]].unsqueeze(1)
        # Value, gradient and curvature are the plain loss's at w = 1, and ∂²/∂w_i∂θ is example i's gradient.
        return problem.compute_loss(weight * logits + (1 - weight) * logits.detach(), batch), buffers

    def outer_loss(point: Tensors, buffers: Tensors, batch: None) -> Tensor:
        losses = [
            problem.score_validation(problem.compute_logits(point, part.images), part.target)
            for part in problem.load(problem.meta_validation)
        ]
        return torch.stack(losses).sum() / len(problem.meta_validation)

    size = min(settings.batch_size, len(problem.train))
    per_epoch = len(problem.train) // size
    batches = []
    for step in range(settings.iterations):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(problem.train), generator=seeded_generator(seed, 12, epoch))
        batches.append(problem.train.batch(order[place * size : (place + 1) * size], problem.device))
    weights = {"weight": torch.ones(len(problem.train), device=problem.device, requires_grad=True)}
    state = State(dict(problem.point), {}, {})
    found = adjoint(inner_loss, outer_loss, state, weights, batches, None, SGD(settings.step_size))
    return problem.train.index, len(problem.train) * found.grads["weight"].cpu()
