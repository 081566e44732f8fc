"""Learn a weight for every training image by hypergradient: `python examples/example_weights.py`.

40 % of the training labels are wrong; a few hundred clean images are set aside. The outer parameters are one weight per
training image; the outer loss is the cross-entropy on the clean images after a few training steps. Wrongly labelled
images lose their weight, and a network trained with the weights beats one trained without.
"""

import argparse
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lkd.data import flip_labels, load_dataset, split_training_images
from meta import Problem, State, Tensors, call_module, outer_step
from meta.estimators import first_order
from meta.optim import SGD

NOISE, BATCH_SIZE, INNER_STEPS = 0.4, 100, 10
OPTIMIZER = SGD(0.1, momentum=0.9)


class Data(NamedTuple):
    """Images [N, 1, 28, 28] with noisy labels, which of them are wrong [N], and clean images to validate and test."""

    images: Tensor
    labels: Tensor
    wrong: Tensor
    clean_images: Tensor
    clean_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


class Result(NamedTuple):
    """Mean weight of rightly and of wrongly labelled images, and test accuracy in percent without and with weights."""

    weight_of_right: float
    weight_of_wrong: float
    accuracy_unweighted: float
    accuracy_weighted: float


def load_data(train_size: int, clean_size: int, test_size: int, seed: int) -> Data:
    dataset = load_dataset("embedded")
    splits = split_training_images(dataset.train, train_size, clean_size, seed)
    train, clean, test = splits.train, splits.meta_validation, dataset.test
    noisy = flip_labels(train.labels, NOISE, train.num_classes, seed)
    return Data(
        train.normalize(train.images),
        noisy,
        noisy != train.labels,
        clean.normalize(clean.images),
        clean.labels,
        test.normalize(test.images[:test_size]),
        test.labels[:test_size],
    )


def build_network() -> nn.Module:
    return nn.Sequential(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(196, 64), nn.ReLU(), nn.Linear(64, 10))


def learn_weights(data: Data, outer_steps: int, seed: int) -> Tensor:
    """Return the learned weights, [N], between 0 and 1; network and weights are trained together."""
    torch.manual_seed(seed)
    network = build_network()
    weight_logits = nn.Parameter(torch.zeros(len(data.labels)))
    outer_optimizer = torch.optim.Adam([weight_logits], lr=0.3)

    def inner_loss(parameters: Tensors, buffers: Tensors, hyper: Tensors, index: Tensor) -> tuple[Tensor, Tensors]:
        logits, buffers = call_module(network, parameters, buffers, data.images[index])
        losses = F.cross_entropy(logits, data.labels[index], reduction="none")
        return (hyper["weight_logits"][index].sigmoid() * losses).mean(), buffers

    def outer_loss(parameters: Tensors, buffers: Tensors, batch: None) -> Tensor:
        return F.cross_entropy(call_module(network, parameters, buffers, data.clean_images)[0], data.clean_labels)

    state = State({name: parameter.detach() for name, parameter in network.named_parameters()}, {}, {})
    outer_parameters = {"weight_logits": weight_logits}
    for _ in range(outer_steps):
        batches = [torch.randperm(len(data.labels))[:BATCH_SIZE] for _ in range(INNER_STEPS)]
        found = first_order(Problem(inner_loss, outer_loss, state, outer_parameters, batches, None, OPTIMIZER))
        outer_step([found], outer_parameters, outer_optimizer)
        state = found.final_state
    return weight_logits.detach().sigmoid()


def train_weighted(data: Data, weights: Tensor, steps: int, seed: int) -> float:
    """Train a new network on the weighted images and return its test accuracy in percent."""
    torch.manual_seed(seed)
    network = build_network()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(steps):
        index = torch.randperm(len(data.labels))[:BATCH_SIZE]
        losses = F.cross_entropy(network(data.images[index]), data.labels[index], reduction="none")
        optimizer.zero_grad()
        ((weights[index] * losses).sum() / weights[index].sum()).backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * (network(data.test_images).argmax(1) == data.test_labels).float().mean().item()


def run(train_size: int = 2000, outer_steps: int = 200, train_steps: int = 400, seed: int = 0) -> Result:
    data = load_data(train_size, clean_size=500, test_size=4000, seed=seed)
    weights = learn_weights(data, outer_steps, seed)
    return Result(
        weights[~data.wrong].mean().item(),
        weights[data.wrong].mean().item(),
        train_weighted(data, torch.ones_like(weights), train_steps, seed),
        train_weighted(data, weights, train_steps, seed),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    result = run(seed=parser.parse_args().seed)
    print(f"mean weight: {result.weight_of_right:.2f} of right labels, {result.weight_of_wrong:.2f} of wrong ones")
    print(f"test accuracy: {result.accuracy_unweighted:.1f} % unweighted, {result.accuracy_weighted:.1f} % weighted")


if __name__ == "__main__":
    main()
