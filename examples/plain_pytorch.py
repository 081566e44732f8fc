"""A learned loss in a plain PyTorch loop: `python examples/plain_pytorch.py [LOSS.lkd.safetensors]`."""

import sys

import torch
from fashion import LOOKS, LOSS, Teacher, build_student, load_images, measure_accuracy
from torch import nn
from torch.utils.data import DataLoader

import lkd


def run(loss_name: str = LOSS, images: int = 4000, epochs: int = 3) -> nn.Module:
    teacher, student = Teacher().eval(), build_student()
    batches = DataLoader(load_images("train", images), batch_size=64, shuffle=True)
    validation = DataLoader(load_images("validation", 1000), batch_size=500)
    loss = lkd.load_loss(loss_name, trust=lkd.measure_trust(teacher, batches, validation))
    steps = epochs * len(batches)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(epochs):
        for step, (inputs, target) in enumerate(batches, epoch * len(batches)):
            if step % max(1, steps // LOOKS) == 0:
                loss.update_trust(student)
            student_outputs, teacher_outputs = lkd.Outputs(student(inputs), {}), lkd.Outputs(teacher(inputs), {})
            terms = loss(student_outputs, teacher_outputs, target, progress=step / steps)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            schedule.step()
    return student


if __name__ == "__main__":
    print(f"test accuracy: {measure_accuracy(run(*sys.argv[1:])):.1f} %")
