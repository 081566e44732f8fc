"""A learned loss as a task of timm's (`timm.task`): `python examples/timm_task.py [LOSS.lkd.safetensors]`.

`LearnedLossTask` stands where `LogitDistillationTask` does, and inherits from it what is not the loss: the teacher by
name or module and its normalisation, DDP, torch.compile, EMA, checkpoints. The loop sets `progress`, and lets the
loss measure the student now and then.
"""

import argparse
from typing import Any

import timm
import torch
from fashion import LOOKS, LOSS, NUM_CLASSES, Teacher, load_images, measure_accuracy
from timm.task import LogitDistillationTask
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lkd


class LearnedLossTask(LogitDistillationTask):
    """Distillation by a learned loss; weights and temperature are inside the loss.

    Attributes:
        progress: How far the training is, in [0, 1]; the loop sets it before every step.
    """

    def __init__(
        self, student_model: nn.Module, teacher_model: nn.Module | str, loss_name: str, trust: Any = None, **options
    ) -> None:
        super().__init__(student_model, teacher_model, criterion=nn.CrossEntropyLoss(), **options)
        self.learned = lkd.load_loss(loss_name, trust).to(self.device)
        self.progress = 0.0

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        logits = self.trainable_module(input)
        with torch.no_grad():
            teacher_logits = self.teacher(self.teacher.normalize_input(input, self.student_mean, self.student_std))
        terms = self.learned(lkd.Outputs(logits, {}), lkd.Outputs(teacher_logits, {}), target, self.progress)
        return {"loss": sum(terms.values()), "output": logits, **terms}


def run(
    loss_name: str = LOSS, images: int = 4000, epochs: int = 3, student: str = "mobilenetv3_small_050"
) -> nn.Module:
    model, teacher = timm.create_model(student, num_classes=NUM_CLASSES, in_chans=1), Teacher()
    batches = DataLoader(load_images("train", images), batch_size=64, shuffle=True)
    trust = lkd.measure_trust(teacher, batches, DataLoader(load_images("validation", 1000), batch_size=500))
    task = LearnedLossTask(model, teacher, loss_name, trust, device=torch.device("cpu"), verbose=False)
    steps = epochs * len(batches)
    optimizer = torch.optim.AdamW(task.get_trainable_module().parameters(), lr=3e-3)
    task.train()
    for epoch in range(epochs):
        for step, (inputs, target) in enumerate(batches, epoch * len(batches)):
            if step % max(1, steps // LOOKS) == 0:
                task.learned.update_trust(model)
            task.progress = step / steps
            optimizer.zero_grad()
            task(inputs, target)["loss"].backward()
            optimizer.step()
    return task.get_eval_model()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", nargs="?", default=LOSS, help="a learned loss: a *.lkd.safetensors file or a name")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"test accuracy: {measure_accuracy(run(arguments.loss, epochs=arguments.epochs)):.1f} %")
