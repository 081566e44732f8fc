"""A learned loss in a plain PyTorch loop: `python examples/plain_pytorch.py LOSS.lkd.safetensors`."""

import sys

import torch
from fashion import Teacher, build_student, load_images, measure_accuracy
from torch import nn
from torch.utils.data import DataLoader

import lkd


def run(loss_file: str, images: int = 4000, epochs: int = 3) -> nn.Module:
    teacher, student, loss = Teacher().eval(), build_student(), lkd.load_loss(loss_file)
    batches = DataLoader(load_images("train", images), batch_size=64, shuffle=True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(batches))
    for epoch in range(epochs):
        for step, (inputs, target) in enumerate(batches):
            student_outputs, teacher_outputs = lkd.Outputs(student(inputs), {}), lkd.Outputs(teacher(inputs), {})
            terms = loss(student_outputs, teacher_outputs, target, progress=(epoch + step / len(batches)) / epochs)
            optimizer.zero_grad()
            sum(terms.values()).backward()
            optimizer.step()
            schedule.step()
    return student


if __name__ == "__main__":
    print(f"test accuracy: {measure_accuracy(run(sys.argv[1])):.1f} %")
