"""A learned loss compiled, and exported for programs without lkd: `python examples/compile_and_export.py LOSS OUT.pt2`.

The exported program takes any number of images, 2 or more, and the number of classes that it was exported for. A loss
with `normalize_gradient`, which no recipe here sets, compiles, but torch.export cannot follow the gradient inside it.
"""

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

import lkd


class LogitLoss(nn.Module):
    """A learned loss as a function of tensors alone: logits [B, C] of both, labels [B], progress [] → the loss []."""

    def __init__(self, loss: nn.Module) -> None:
        super().__init__()
        self.loss = loss

    def forward(self, student: Tensor, teacher: Tensor, target: Tensor, progress: Tensor) -> Tensor:
        terms = self.loss(lkd.Outputs(student, {}), lkd.Outputs(teacher, {}), target, progress)
        return torch.stack(list(terms.values())).sum()


def draw_inputs(images: int, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    student, teacher = torch.randn(images, classes, requires_grad=True), torch.randn(images, classes)
    return student, teacher, torch.randint(classes, (images,)), torch.tensor(0.3)


def differentiate(loss: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the student's logits."""
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs[0])[0]


def export(loss: nn.Module, path: Path, classes: int) -> None:
    images = {0: torch.export.Dim("images", min=2)}
    shapes = {"student": images, "teacher": images, "target": images, "progress": {}}
    torch.export.save(torch.export.export(loss, draw_inputs(8, classes), dynamic_shapes=shapes), path)


def run(loss_file: str, out: Path, classes: int = 100, backend: str = "inductor") -> dict[str, float]:
    """Return the largest difference of loss and gradient to the plain loss's, for each of the two."""
    torch.manual_seed(0)
    loss = LogitLoss(lkd.load_loss(loss_file))
    export(loss, out, classes)
    compiled, exported = torch.compile(loss, backend=backend), torch.export.load(out).module()
    differences = {"compiled": 0.0, "exported": 0.0}
    for images in (8, 5):
        inputs = draw_inputs(images, classes)
        expected = differentiate(loss, inputs)
        for name, other in (("compiled", compiled), ("exported", exported)):
            found = [float((a - b).abs().max()) for a, b in zip(differentiate(other, inputs), expected, strict=True)]
            differences[name] = max(differences[name], *found)
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", help="a learned loss: a *.lkd.safetensors file or a name")
    parser.add_argument("out", type=Path, help="the file to write (*.pt2)")
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    arguments = parser.parse_args()
    for name, difference in run(arguments.loss, arguments.out, arguments.classes, arguments.backend).items():
        print(f"{name}: largest difference {difference:.1g}")
