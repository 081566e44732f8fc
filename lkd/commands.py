"""What each command does with its recipe: open the run, do the work, say where the result is."""

from lkd.assembly import prepare_images
from lkd.config import (
    DistillRecipe,
    EvaluateRecipe,
    TrainTeacherRecipe,
)
from lkd.distillation import distill as distill_student
from lkd.distillation import train_teacher
from lkd.evaluation import evaluate as evaluate_network
from lkd.run import choose_device, open_run
from lkd.teacher import load_teacher_network


def teacher(recipe: TrainTeacherRecipe) -> None:
    """`lkd teacher`."""
    with open_run(recipe, "teacher") as run:
        train_teacher(recipe, run)


def distill(recipe: DistillRecipe) -> None:
    """`lkd distill`."""
    with open_run(recipe, "distill") as run:
        distill_student(recipe, run)


def evaluate(recipe: EvaluateRecipe) -> None:
    """`lkd evaluate`."""
    device = choose_device(recipe.device)
    network, header = load_teacher_network(recipe.checkpoint)
    images = prepare_images(recipe.data)
    part = images.test if recipe.split == "test" else images.meta_validation
    figures = evaluate_network(network.to(device), part, device)
    print(f"{header['architecture']['name']} ({recipe.checkpoint}) on {len(part):,} {recipe.split} images of {images.name}:")
    for name, value in figures.items():
        print(f"  {name:24} {value:.4f}")
