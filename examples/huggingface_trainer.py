"""A learned loss in Hugging Face's Trainer: `python examples/huggingface_trainer.py LOSS.lkd.safetensors`."""

import argparse
import tempfile
from typing import Any

import torch
from fashion import NUM_CLASSES, Teacher, load_images
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import lkd


class DistillationTrainer(Trainer):
    """A Trainer of an image classifier whose loss is learned.

    Args:
        teacher: From `pixel_values` to logits, or to an output that has `logits`.
        loss_file: The learned loss.
        arguments: Trainer's own.
    """

    def __init__(self, *, teacher: nn.Module, loss_file: str, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.learned = lkd.load_loss(loss_file).to(self.args.device)
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


def run(loss_file: str, images: int = 4000, epochs: int = 3, accumulation: int = 1) -> DistillationTrainer:
    shape = {"num_channels": 1, "embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}
    student = ResNetForImageClassification(ResNetConfig(layer_type="basic", num_labels=NUM_CLASSES, **shape))
    test: TensorDataset = load_images("test", 2000)
    with tempfile.TemporaryDirectory() as folder:
        trainer = DistillationTrainer(
            teacher=Teacher(),
            loss_file=loss_file,
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
            train_dataset=load_images("train", images),
            eval_dataset=test,
            data_collator=collate,
            compute_metrics=measure,
        )
        trainer.train()
    return trainer


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("loss", help="a learned loss (*.lkd.safetensors)")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    print(f"test accuracy: {run(arguments.loss, epochs=arguments.epochs).evaluate()['eval_accuracy']:.1f} %")
