"""A learned loss compiled, and exported for programs without lkd: `python examples/compile_and_export.py LOSS OUT.pt2`.

The exported program takes any number of images (2 or more) and of classes.
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
    student, teacher = torch.randn(2, images, classes).unbind()
    return student.requires_grad_(), teacher, torch.randint(classes, (images,)), torch.tensor(0.3)


def differentiate(loss: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the loss and its gradient with respect to the student's logits."""
    value = loss(*inputs)
    return value.detach(), torch.autograd.grad(value, inputs[0])[0]


def export(loss: nn.Module, path: Path) -> None:
    images, classes = torch.export.Dim("images", min=2), torch.export.Dim("classes", min=2)
    logits = {0: images, 1: classes}
    shapes = {"student": logits, "teacher": logits, "target": {0: images}, "progress": {}}
    torch.export.save(torch.export.export(loss, draw_inputs(8, 10), dynamic_shapes=shapes), path)


def run(loss_file: str, out: Path, backend: str = "inductor") -> dict[str, float]:
    """Return the largest difference of loss and gradient to the plain loss's, for each of the two."""
    torch.manual_seed(0)
    loss = LogitLoss(lkd.load_loss(loss_file))
    export(loss, out)
    compiled = torch.compile(loss, backend=backend, dynamic=True)
    differences = {}
    for name, other in (("compiled", compiled), ("exported", torch.export.load(out).module())):
        largest = 0.0
        for shape in ((8, 10), (5, 100)):
            inputs = draw_inputs(*shape)
            pairs = zip(differentiate(loss, inputs), differentiate(other, inputs), strict=True)
            largest = max(largest, *((a - b).abs().max().item() for a, b in pairs))
        differences[name] = largest
    return differences


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", help="a learned loss (*.lkd.safetensors)")
    parser.add_argument("out", type=Path, help="the file to write (*.pt2)")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    arguments = parser.parse_args()
    for name, difference in run(arguments.loss, arguments.out, arguments.backend).items():
        print(f"{name}: largest difference {difference:.1g}")
