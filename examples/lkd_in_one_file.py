"""LKD in one file: learn the distillation loss instead of making it by hand.

    python examples/lkd_in_one_file.py          # about two minutes on two cores
    python examples/lkd_in_one_file.py --tiny   # does it run? a few seconds, and figures that mean nothing

A big network, the teacher, is to train a small one, the student. The usual loss is made by hand: cross-entropy with the
labels, and the divergence from the teacher's softened answers, at a weight α and a temperature τ that somebody tuned.
LKD learns it. The inner loop trains students with the loss; the outer loop changes the loss so that the students come
out better, by differentiating a student's validation loss through the student's own training steps.

Here the loss is a network of a few hundred weights that sets α and τ for every sample. It learns in a world in which
40 % of the training labels are wrong, and nobody tells it so: it finds out that the teacher is to be trusted. A search
over α and τ can end at as good a loss; this one needs no search.

It is plain PyTorch and `meta`; of `lkd` it only takes the embedded images and the teacher's weights. What it leaves out
(features, other losses, checkpoints, more than one world) is what `lkd` is for.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import avg_pool2d, cross_entropy, kl_div, log_softmax, relu

import meta
from lkd.data.embedded import ARCHIVE, TEACHER

# ---- Settings --------------------------------------------------------------------------------------------------------


@dataclass
class Settings:
    """What is trained on what, and for how long."""

    train_size: int = 4000  # images that students are trained on, their labels as they come
    meta_validation_size: int = 1000  # images with clean labels, for the outer loss; no student is trained on them
    test_size: int = 4000  # looked at once, at the end
    label_noise: float = 0.4
    # A student's training.
    steps: int = 800
    batch_size: int = 100
    rate: float = 0.1
    momentum: float = 0.9
    # The pool.
    pool_trainings: int = 4
    ages: tuple[float, ...] = (0.0, 0.025, 0.05, 0.075, 0.1)  # parts of a training
    # The outer loop.
    outer_steps: int = 30
    rollouts: int = 2  # students that an outer step takes
    rollout_steps: int = 50  # K
    outer_rate: float = 0.05
    # The reuse.
    seeds: int = 3


TINY = Settings(100, 50, 100, steps=10, batch_size=20, ages=(0.0, 0.1), outer_steps=2, rollout_steps=3, seeds=2)
CLASSES = 10
Batch = tuple[Tensor, Tensor, Tensor]  # images, labels, the teacher's logits
Loss = Callable[[Tensor, Tensor, Tensor, float], Tensor]  # of the student's logits, the teacher's, labels, progress
Pool = list[tuple[float, meta.State]]  # ages and students


# ---- Networks: a teacher of 309,000 parameters, a student of 6,300 ---------------------------------------------------


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layer = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(outputs), nn.ReLU())


class Block(nn.Module):
    """Two convolutions and a shortcut (He et al., 2016)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        second = (nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs))
        self.body = nn.Sequential(*convolution(inputs, outputs, stride=2), *second)
        self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return relu(self.body(x) + self.shortcut(x))


class Network(nn.Module):
    """Stages in sequence, global average pooling, a linear classifier."""

    def __init__(self, stages: dict[str, nn.Module], channels: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict(stages)
        self.classifier = nn.Linear(channels, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        for stage in self.stages.values():
            images = stage(images)
        return self.classifier(images.mean((2, 3)))


def load_teacher() -> nn.Module:
    """The embedded teacher; it was trained on images that are not among the embedded ones."""
    stages = {"stem": convolution(1, 32), "stage1": Block(32, 32), "stage2": Block(32, 64), "stage3": Block(64, 128)}
    teacher = Network(stages, 128).eval()
    teacher.load_state_dict(load_file(TEACHER))
    return teacher


def build_student(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    sizes = {"stage1": (1, 8), "stage2": (8, 16), "stage3": (16, 32)}
    return Network({name: convolution(*size, stride=2) for name, size in sizes.items()}, 32)


# ---- Data: students' images with noisy labels, meta-validation, test; the teacher answers once -----------------------


@dataclass
class Data:
    """Three sets of images."""

    train: Batch
    meta_validation: Batch
    test: Batch


@torch.no_grad()
def load_data(settings: Settings) -> Data:
    archive = np.load(ARCHIVE)
    teacher = load_teacher()
    generator = torch.Generator().manual_seed(0)

    def read(part: str, positions: Tensor) -> Batch:
        images = torch.from_numpy(archive[f"{part}_images"])[positions].unsqueeze(1).float()
        images = (images / 255 - 0.286) / 0.353
        labels = torch.from_numpy(archive[f"{part}_labels"])[positions].long()
        answers = torch.cat([teacher(some) for some in images.split(500)])
        return avg_pool2d(images, 2), labels, answers  # the student sees half the resolution

    order = torch.randperm(len(archive["train_labels"]), generator=generator)
    sizes = [settings.train_size, settings.meta_validation_size]
    train, meta_validation = (read("train", positions) for positions in order[: sum(sizes)].split(sizes))
    images, labels, answers = train
    flipped = torch.rand(len(labels), generator=generator) < settings.label_noise
    others = (labels + torch.randint(1, CLASSES, labels.shape, generator=generator)) % CLASSES
    noisy = torch.where(flipped, others, labels)
    return Data((images, noisy, answers), meta_validation, read("test", torch.arange(settings.test_size)))


def draw_batches(data: Batch, settings: Settings, steps: int, seed: int) -> list[Batch]:
    """Batches of whole epochs, one after another, shuffled anew each time."""
    generator = torch.Generator().manual_seed(seed)
    size, count = settings.batch_size, len(data[1])
    epochs = math.ceil(steps * size / (count - count % size))
    orders = [torch.randperm(count, generator=generator)[: count - count % size] for _ in range(epochs)]
    return [(data[0][index], data[1][index], data[2][index]) for index in torch.cat(orders)[: steps * size].split(size)]


# ---- Losses: by hand, and learned ------------------------------------------------------------------------------------


def divergence(student: Tensor, teacher: Tensor, temperature: Tensor | float) -> Tensor:
    """KL(teacher ‖ student) of each sample, both softened."""
    softened = log_softmax(student / temperature, 1), log_softmax(teacher / temperature, 1)
    return kl_div(*softened, log_target=True, reduction="none").sum(1)


def balance(student: Tensor, teacher: Tensor, labels: Tensor, weight: Tensor | float, temperature: Tensor) -> Tensor:
    """(1 − α) · CE + α · τ² · KL, the mean over samples."""
    distillation = temperature.square() * divergence(student, teacher, temperature.unsqueeze(-1))
    return ((1 - weight) * cross_entropy(student, labels, reduction="none") + weight * distillation).mean()


def by_hand(weight: float, temperature: float) -> Loss:
    """Knowledge distillation (Hinton et al., 2015); weight 0 is plain cross-entropy."""
    return lambda student, teacher, labels, _: balance(student, teacher, labels, weight, torch.tensor(temperature))


KD = by_hand(0.5, 4.0)


class LossNetwork(nn.Module):
    """The learned loss: a small network sees how the student, the teacher and the label stand, and sets α and τ.

    What it sees depends neither on the number nor on the order of the classes, so it can be reused elsewhere. Before
    it has learned anything it is KD with α = 0.5 and τ = 4.
    """

    def __init__(self, hidden: int = 16) -> None:
        super().__init__()
        last = nn.Linear(hidden, 2)
        nn.init.zeros_(last.weight)
        last.bias.data = torch.tensor([0.0, math.log((4 - 1) / (10 - 4))])
        self.layers = nn.Sequential(nn.Linear(6, hidden), nn.Tanh(), nn.Linear(hidden, hidden), nn.Tanh(), last)

    def weights_and_temperatures(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: float):
        apart = divergence(student, teacher, 1.0)
        columns = [apart / (1 + apart), torch.full(labels.shape, progress)]
        for logits in (student, teacher):
            log_probabilities = log_softmax(logits, 1)
            columns.append(log_probabilities.gather(1, labels.unsqueeze(1)).squeeze(1).exp())
            columns.append(-(log_probabilities.exp() * log_probabilities).sum(1) / math.log(logits.shape[1]))
        weight, temperature = self.layers(torch.stack(columns, 1)).sigmoid().unbind(1)
        return weight, 1 + 9 * temperature

    def forward(self, student: Tensor, teacher: Tensor, labels: Tensor, progress: float) -> Tensor:
        return balance(student, teacher, labels, *self.weights_and_temperatures(student, teacher, labels, progress))


# ---- A student's training, with any loss -----------------------------------------------------------------------------


def half_cosine(progress: float) -> float:
    """From 1 to 0."""
    return (1 + math.cos(math.pi * progress)) / 2


def train(
    loss: Loss, data: Batch, settings: Settings, seed: int, ages: tuple[float, ...] = ()
) -> tuple[nn.Module, Pool]:
    """Train a new student; return it, and how it was at these ages. Where there are ages, the last one is the end."""
    student = build_student(seed)
    optimizer = torch.optim.SGD(student.parameters(), settings.rate, settings.momentum)
    snapshots: Pool = []
    for step, (images, labels, answers) in enumerate(draw_batches(data, settings, settings.steps, seed)):
        progress = step / settings.steps
        if progress in ages:
            snapshots.append((progress, take_snapshot(student, optimizer)))
            if progress == max(ages):
                break
        optimizer.param_groups[0]["lr"] = settings.rate * half_cosine(progress)
        optimizer.zero_grad()
        loss(student(images), answers, labels, progress).backward()
        optimizer.step()
    return student.eval(), snapshots


# ---- The pool: students in the course of their training, where rollouts start ----------------------------------------


def take_snapshot(student: nn.Module, optimizer: torch.optim.Optimizer) -> meta.State:
    """A student as the inner loop takes it up again: its parameters, BatchNorm's statistics and the momentum."""
    slots = meta.optim.read_slots(optimizer, student)
    return meta.State(dict(student.named_parameters()), dict(student.named_buffers()), slots).detach()


def fill_pool(data: Data, settings: Settings) -> Pool:
    """Snapshots of a few trainings with KD, at young ages: short rollouts of old students say next to nothing."""
    seeds = range(100, 100 + settings.pool_trainings)
    return [entry for seed in seeds for entry in train(KD, data.train, settings, seed, settings.ages)[1]]


# ---- The outer loop: rollout, hypergradient, outer step --------------------------------------------------------------


def calibrated_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at the best temperature: a student is not to be praised for being as unsure as its teacher."""
    temperatures = torch.logspace(-0.7, 0.7, 57)
    with torch.no_grad():
        best = torch.stack([cross_entropy(logits / temperature, labels) for temperature in temperatures]).argmin()
    return cross_entropy(logits / temperatures[best], labels)


def draw_problem(
    pool: Pool, network: LossNetwork, student: nn.Module, data: Data, settings: Settings, seed: int
) -> meta.Problem:
    """A student of the pool, K batches, and the loss network's weights: what a hypergradient is asked of."""
    generator = torch.Generator().manual_seed(seed)
    age, state = pool[int(torch.randint(len(pool), (), generator=generator))]
    steps = settings.rollout_steps
    batches = draw_batches(data.train, settings, steps, seed)
    # The rollout stands for the rest of a training: progress runs to 1, and the learning rate to 0.
    inner_batches = [(batch, age + (1 - age) * step / steps) for step, batch in enumerate(batches)]
    rate = settings.rate * half_cosine(age)

    def inner_loss(parameters, buffers, hyper, batch):
        (images, labels, answers), progress = batch
        logits, buffers = meta.call_module(student, parameters, buffers, images)
        return functional_call(network, hyper, (logits, answers, labels, progress)), buffers

    def outer_loss(parameters, buffers, batch):
        logits, _ = meta.call_module(student, parameters, buffers, batch[0])
        return calibrated_cross_entropy(logits, batch[1])

    return meta.Problem(
        inner_loss,
        outer_loss,
        state,
        hyper={name: parameter.detach() for name, parameter in network.named_parameters()},
        inner_batches=inner_batches,
        outer_batch=data.meta_validation,
        optimizer=meta.optim.SGD(lambda step: rate * half_cosine(step / steps), momentum=settings.momentum),
    )


def learn_loss(pool: Pool, data: Data, settings: Settings) -> LossNetwork:
    torch.manual_seed(0)
    network, student = LossNetwork(), build_student(0)
    parameters = dict(network.named_parameters())
    optimizer = torch.optim.Adam(network.parameters())
    for step in range(settings.outer_steps):
        optimizer.param_groups[0]["lr"] = settings.outer_rate * half_cosine(step / settings.outer_steps)
        numbers = range(step * settings.rollouts, (step + 1) * settings.rollouts)
        problems = [draw_problem(pool, network, student, data, settings, number) for number in numbers]
        # d(outer loss at the end of the rollout) / d(weights of the loss), through all K steps. `adjoint` is exact;
        # `meta.Audited()` takes an estimator of half the cost as long as that agrees with it, which here it does not.
        hypergradients = [meta.ESTIMATORS["adjoint"](problem) for problem in problems]
        result = meta.outer_step(hypergradients, parameters, optimizer, clip_norm=1.0)
        if step % 10 == 0 or step == settings.outer_steps - 1:
            print(f"outer step {step:3}: outer loss {result.value:.3f}, {describe(network, student, problems[0])}")
    return network.requires_grad_(False)


@torch.no_grad()
def describe(network: LossNetwork, student: nn.Module, problem: meta.Problem) -> str:
    (images, labels, answers), progress = problem.inner_batches[0]
    logits, _ = meta.call_module(student, problem.state.parameters, problem.state.buffers, images)
    weight, temperature = network.weights_and_temperatures(logits, answers, labels, progress)
    agrees = answers.argmax(1) == labels
    split = (
        f"{weight[agrees].mean():.2f} where the teacher agrees with the label, {weight[~agrees].mean():.2f} where not"
    )
    return f"α {split}, τ {temperature.mean():.1f}"


# ---- Reuse: the frozen loss trains students that it never saw, from scratch ------------------------------------------


def run(settings: Settings) -> dict[str, list[float]]:
    """Test accuracies, in percent, by loss: one of each seed."""
    data = load_data(settings)
    print(f"teacher: {100 * (data.test[2].argmax(1) == data.test[1]).float().mean():.1f} % on test")
    network = learn_loss(fill_pool(data, settings), data, settings)
    losses: dict[str, Loss] = {
        "cross-entropy": by_hand(0.0, 1.0),
        "KD(0.5, 4)": KD,
        "KD(0.9, 4)": by_hand(0.9, 4.0),
        "learned": network,
    }

    @torch.no_grad()
    def measure(student: nn.Module) -> float:
        return 100 * (student(data.test[0]).argmax(1) == data.test[1]).float().mean().item()

    seeds = range(settings.seeds)
    return {name: [measure(train(loss, data.train, settings, s)[0]) for s in seeds] for name, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a few seconds, and figures that mean nothing")
    settings = TINY if parser.parse_args().tiny else Settings()
    for name, accuracies in run(settings).items():
        error = np.std(accuracies, ddof=1) / len(accuracies) ** 0.5
        print(f"{name:14} {np.mean(accuracies):5.1f} ± {error:.1f} % on test, mean of {len(accuracies)} students")


if __name__ == "__main__":
    main()
