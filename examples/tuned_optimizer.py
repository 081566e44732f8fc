"""Tune learning rate and weight decay by hypergradient: `python examples/tuned_optimizer.py`.

The outer parameters are the logarithms of two settings of the inner optimiser; the outer loss is the cross-entropy on
images set aside, after a short training from a new start each time. Started at poor settings, both are descended along
the hypergradient.
"""

import argparse
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lkd.data import ImageSet, load_dataset, split_training_images
from meta import Problem, State, Tensors, call_module, outer_step, rollout
from meta.estimators import first_order
from meta.optim import SGD

BATCH_SIZE = 50


class Result(NamedTuple):
    """The settings before and after, and the mean validation loss that a training with them reaches."""

    start: tuple[float, float]
    tuned: tuple[float, float]
    loss_before: float
    loss_after: float


def make_optimizer(hyper: Tensors) -> SGD:
    return SGD(hyper["log_rate"].exp(), momentum=0.9, weight_decay=hyper["log_decay"].exp())


def build_network() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.Tanh(), nn.Linear(64, 10))


def draw_state() -> State:
    return State({name: parameter.detach() for name, parameter in build_network().named_parameters()}, {}, {})


def draw_batches(images: ImageSet, count: int) -> list[tuple[Tensor, Tensor]]:
    indices = [torch.randperm(len(images))[:BATCH_SIZE] for _ in range(count)]
    return [(images.normalize(images.images[index]), images.labels[index]) for index in indices]


def run(
    train_size: int = 500,
    inner_steps: int = 30,
    outer_steps: int = 60,
    start: tuple[float, float] = (0.002, 0.03),
    seed: int = 0,
) -> Result:
    torch.manual_seed(seed)
    splits = split_training_images(load_dataset("embedded").train, train_size, 1000, seed)
    train, validation = splits.train, splits.meta_validation
    network = build_network()
    outer_batch = (validation.normalize(validation.images), validation.labels)

    def outer_loss(parameters: Tensors, buffers: Tensors, batch: Any) -> Tensor:
        return F.cross_entropy(call_module(network, parameters, buffers, batch[0])[0], batch[1])

    def inner_loss(parameters: Tensors, buffers: Tensors, hyper: Tensors, batch: Any) -> tuple[Tensor, Tensors]:
        return outer_loss(parameters, buffers, batch), buffers

    hyper = {
        name: nn.Parameter(torch.tensor(value).log())
        for name, value in zip(("log_rate", "log_decay"), start, strict=True)
    }
    outer_optimizer = torch.optim.Adam(hyper.values(), lr=0.15)

    def draw_problem() -> Problem:
        batches = draw_batches(train, inner_steps)
        return Problem(inner_loss, outer_loss, draw_state(), hyper, batches, outer_batch, make_optimizer)

    def validate(repeats: int = 5) -> float:
        torch.manual_seed(seed + 1)
        problems = [draw_problem() for _ in range(repeats)]
        return sum(problem.evaluate(rollout(problem)).item() for problem in problems) / repeats

    before = validate()
    for _ in range(outer_steps):
        outer_step([first_order(draw_problem())], hyper, outer_optimizer, clip_norm=1.0)
    rate, decay = (hyper[name].detach().exp().item() for name in ("log_rate", "log_decay"))
    return Result(start, (rate, decay), before, validate())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    result = run(seed=parser.parse_args().seed)
    for text, (rate, decay), loss in (
        ("before", result.start, result.loss_before),
        ("after", result.tuned, result.loss_after),
    ):
        print(f"{text:7} learning rate {rate:.4f}, weight decay {decay:.5f}: validation loss {loss:.3f}")


if __name__ == "__main__":
    main()
