"""A learned loss in Hugging Face's Trainer: `python examples/huggingface_trainer.py [LOSS.lkd.safetensors]`."""

import argparse
import tempfile
from typing import Any

import torch
from fashion import LOOKS, LOSS, NUM_CLASSES, Teacher, load_images
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import lkd


class TrustCallback(TrainerCallback):
    """Lets a loss measure the student's own accuracy, twenty times a training."""

    def __init__(self, loss: nn.Module) -> None:
        self.loss = loss

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **rest: Any) -> None:
        if state.global_step % max(1, state.max_steps // LOOKS) == 0:
            self.loss.update_trust(model)


class DistillationTrainer(Trainer):
    """A Trainer of an image classifier whose loss is learned.

    Args:
        teacher: From `pixel_values` to logits, or to an output that has `logits`.
        loss_name: The learned loss.
        trust: What was measured of teacher and labels.
        arguments: Trainer's own.
    """

    def __init__(self, *, teacher: nn.Module, loss_name: str, trust: Any = None, **arguments: Any) -> None:
        super().__init__(**arguments)
        if self.args.label_smoothing_factor:
            raise ValueError("label_smoothing_factor: this loss computes from plain labels; leave it out")
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.learned = lkd.load_loss(loss_name, trust).to(self.args.device)
        self.add_callback(TrustCallback(self.learned))
        self.model_accepts_loss_kwargs = False  # the loss is a mean over its batch: Trainer averages accumulated ones

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(pixel_values=inputs["pixel_values"])
        with torch.no_grad():
            answer = self.teacher(inputs["pixel_values"])
        teacher_outputs = lkd.Outputs(getattr(answer, "logits", answer), {})
        progress = self.state.global_step / max(self.state.max_steps, 1)
        terms = self.learned(lkd.Outputs(outputs.logits, {}), teacher_outputs, inputs["labels"], progress)
        loss = sum(terms.values())
        return (loss, outputs) if return_outputs else loss


def collate(rows: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    images, labels = zip(*rows, strict=True)
    return {"pixel_values": torch.stack(images), "labels": torch.stack(labels)}


def measure(prediction: Any) -> dict[str, float]:
    return {"accuracy": 100 * float((prediction.predictions.argmax(1) == prediction.label_ids).mean())}


def run(loss_name: str = LOSS, images: int = 4000, epochs: int = 3, accumulation: int = 1) -> DistillationTrainer:
    shape = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    student = ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=NUM_CLASSES, **shape))
    train, validation, test = load_images("train", images), load_images("validation", 1000), load_images("test", 2000)
    teacher = Teacher()
    trust = lkd.measure_trust(teacher, *(DataLoader(part, batch_size=500) for part in (train, validation)))
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            teacher=teacher,
            loss_name=loss_name,
            trust=trust,
            model=student,
            args=TrainingArguments(
                output_dir=folder,
                num_train_epochs=epochs,
                per_device_train_batch_size=64 // accumulation,
                gradient_accumulation_steps=accumulation,
                per_device_eval_batch_size=500,
                learning_rate=5e-3,
                lr_scheduler_type="cosine",
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=True,
            ),
            train_dataset=train,
            eval_dataset=test,
            data_collator=collate,
            compute_metrics=measure,
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", nargs="?", default=LOSS, help="a learned loss: a *.lkd.safetensors file or a name")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"test accuracy: {run(arguments.loss, epochs=arguments.epochs).evaluate()['eval_accuracy']:.1f} %")
