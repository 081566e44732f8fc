"""A learned loss in Lightning: `python examples/lightning_module.py [LOSS.lkd.safetensors]`.

A callback does what must not be forgotten around the loss: the teacher, a part of the module, is put into eval mode,
the loss measures the student now and then, and its terms are logged.
"""

import argparse
import math
from typing import Any

import lightning
import torch
from fashion import LOOKS, LOSS, Teacher, build_student, load_images, measure_accuracy
from lightning.pytorch.callbacks import Timer
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lkd


class Distillation(lightning.LightningModule):
    """A student trained by a learned loss, and the teacher that it imitates."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module, loss_name: str, trust: Any = None, learning_rate: float = 0.1
    ) -> None:
        super().__init__()
        self.student, self.teacher = student, teacher.requires_grad_(False)
        self.loss = lkd.load_loss(loss_name, trust)
        self.learning_rate = learning_rate

    def training_step(self, batch: tuple[Tensor, Tensor], batch_index: int) -> dict[str, Tensor]:
        images, target = batch
        progress = measure_progress(self.trainer)
        with torch.no_grad():
            teacher_outputs = lkd.Outputs(self.teacher(images), {})
        terms = self.loss(lkd.Outputs(self.student(images), {}), teacher_outputs, target, progress)
        return {"loss": sum(terms.values()), **{name: value.detach() for name, value in terms.items()}}

    def configure_optimizers(self) -> dict:
        optimizer = torch.optim.SGD(self.student.parameters(), self.learning_rate, momentum=0.9)
        half_cosine = lambda step: (1 + math.cos(math.pi * measure_progress(self.trainer))) / 2  # noqa: E731
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, half_cosine)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def measure_progress(trainer: lightning.Trainer) -> float:
    """How far a training is, in [0, 1]: by steps, or by time where `max_time` ends it."""
    steps = trainer.estimated_stepping_batches  # infinite, or -1 of a stream, where no number of steps ends it
    done = [trainer.global_step / steps if steps > 0 else 0.0]
    for timer in trainer.callbacks:
        if isinstance(timer, Timer) and (left := timer.time_remaining()) is not None:
            elapsed = timer.time_elapsed()
            done.append(elapsed / max(elapsed + left, 1e-9))
    return min(1.0, max(done))


class DistillationCallback(lightning.Callback):
    """Keeps the teacher in eval mode, lets the loss measure the student, and logs the loss's terms."""

    looks = 0

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        self.looks = 0

    def on_train_epoch_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        module.teacher.eval()
        module.loss.eval()

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        if measure_progress(trainer) * LOOKS >= self.looks:
            self.looks = int(measure_progress(trainer) * LOOKS) + 1
            module.loss.update_trust(module.student)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_index) -> None:
        terms = {name: value for name, value in outputs.items() if name != "loss"}  # "loss" is divided by accumulation
        logged = {f"loss/{name}": value for name, value in terms.items()} | {"loss": sum(terms.values())}
        module.log_dict(logged, on_step=False, on_epoch=True)


def run(loss_name: str = LOSS, images: int = 4000, epochs: int = 3, **options: Any) -> nn.Module:
    teacher, batches = Teacher(), DataLoader(load_images("train", images), batch_size=64, shuffle=True)
    trust = lkd.measure_trust(teacher, batches, DataLoader(load_images("validation", 1000), batch_size=500))
    module = Distillation(build_student(), teacher, loss_name, trust)
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[DistillationCallback()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    trainer.fit(module, batches)
    return module.student


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", nargs="?", default=LOSS, help="a learned loss: a *.lkd.safetensors file or a name")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"test accuracy: {measure_accuracy(run(arguments.loss, epochs=arguments.epochs)):.1f} %")
