"""A learned loss in torchdistill, by YAML: `python examples/torchdistill_loss.py [LOSS.lkd.safetensors]`.

torchdistill keeps the loss outside of what it moves, saves and trains, which suits a frozen one; but it tells a loss
nothing of time, so a process after every step, which the YAML names too, tells it how far the training is, and lets it
measure the student now and then.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from fashion import LOOKS, LOSS, Teacher, build_student, load_images, measure_accuracy
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.core.interfaces.post_forward_proc import default_post_forward_process
from torchdistill.core.interfaces.registry import register_post_forward_proc_func
from torchdistill.losses.registry import register_mid_level_loss

import lkd

CONFIG = Path(__file__).with_suffix(".yaml")


@register_mid_level_loss
class LearnedLoss(nn.Module):
    """A learned loss over the logits of two modules.

    Args:
        path: The loss's file or name.
        student_module_path: Module of the student that gives logits; `.` is the student itself.
        student_module_io: input or output.
        teacher_module_path: Of the teacher.
        teacher_module_io: Of the teacher.

    Attributes:
        progress: How far the training is, in [0, 1].
    """

    def __init__(
        self,
        path: str,
        student_module_path: str = ".",
        student_module_io: str = "output",
        teacher_module_path: str = ".",
        teacher_module_io: str = "output",
    ) -> None:
        super().__init__()
        self.student_place = student_module_path, student_module_io
        self.teacher_place = teacher_module_path, teacher_module_io
        self.learned = lkd.load_loss(path)
        self.progress = 0.0

    def forward(
        self, student_io_dict: dict, teacher_io_dict: dict, targets: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        (path, io), (teacher_path, teacher_io) = self.student_place, self.teacher_place
        student, teacher = student_io_dict[path][io], teacher_io_dict[teacher_path][teacher_io]
        self.learned.to(student.device)
        terms = self.learned(lkd.Outputs(student, {}), lkd.Outputs(teacher, {}), targets, self.progress)
        return sum(terms.values())


@register_post_forward_proc_func
def step_and_tell_progress(self: Any, loss: Tensor, metrics: Any = None, **kwargs: Any) -> None:
    default_post_forward_process(self, loss, metrics, **kwargs)
    step, steps = self.stage_grad_count, self.num_epochs * len(self.train_data_loader)
    for criterion, _ in self.criterion.term_dict.values():
        criterion.progress = step / steps
        if step % max(1, steps // LOOKS) == 0:
            criterion.learned.update_trust(self.student_model)


def run(loss_name: str = LOSS, images: int = 4000, epochs: int = 3) -> nn.Module:
    config = load_yaml_file(str(CONFIG))["train"]
    config["num_epochs"] = config["scheduler"]["kwargs"]["total_iters"] = epochs
    config["criterion"]["kwargs"]["sub_terms"]["learned"]["criterion"]["kwargs"]["path"] = loss_name
    student, data = build_student(), {"fashion/train": load_images("train", images)}
    teacher, validation = Teacher().eval(), load_images("validation", 1000)
    box = get_distillation_box(teacher, student, data, config, torch.device("cpu"), None, False, 1)
    parts = (DataLoader(part, batch_size=500) for part in (data["fashion/train"], validation))
    trust = lkd.measure_trust(teacher, *parts)
    for criterion, _ in box.criterion.term_dict.values():
        criterion.learned.set_trust(trust)
        criterion.learned.update_trust(student)
    for epoch in range(box.num_epochs):
        box.pre_epoch_process(epoch=epoch)
        for inputs, targets, supplement in box.train_data_loader:
            box.post_forward_process(box.forward_process(inputs, targets, supplement))
        box.post_epoch_process()
    return student


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", nargs="?", default=LOSS, help="a learned loss: a *.lkd.safetensors file or a name")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"test accuracy: {measure_accuracy(run(arguments.loss, epochs=arguments.epochs)):.1f} %")
