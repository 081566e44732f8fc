"""What the examples of reuse train on, as plain PyTorch: embedded images of Fashion-MNIST, a teacher, a student."""

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from lkd.data import load_dataset
from lkd.models.teacher import load_teacher_network

NUM_CLASSES = 10
LOSS = "universal"  # what the examples train with if no file is given
LOOKS = 20  # how often a loss measures its student in a training


class Teacher(nn.Module):
    """The embedded teacher, frozen, as an ordinary network from images [B, 1, 28, 28] to logits [B, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.network = load_teacher_network("embedded")[0].requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images).logits


def load_images(split: str, count: int) -> TensorDataset:
    """Normalised images [N, 1, 28, 28] and labels [N]; `split` is train, validation (the last for training) or test."""
    images = getattr(load_dataset("embedded"), "test" if split == "test" else "train")
    part = slice(-count, None) if split == "validation" else slice(count)
    return TensorDataset(images.normalize(images.images[part]), images.labels[part])


def build_student() -> nn.Module:
    layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, NUM_CLASSES))


@torch.no_grad()
def measure_accuracy(network: nn.Module, count: int = 2000) -> float:
    """Accuracy on test images, in percent."""
    images, labels = load_images("test", count).tensors
    return 100 * (network.eval()(images).argmax(1) == labels).float().mean().item()
