"""`lkd.distill` and `lkd.meta_train`: the commands of the same name, for objects in the place of names and files.

Options are parsed as the command line parses them, and the work is the commands': equal settings give equal bits.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lkd.arguments import (
    Student,
    Teacher,
    build_recipe,
    choose_data,
    choose_loss,
    choose_student,
    choose_students,
    choose_teacher,
)
from lkd.artifact import load_loss, read_provenance
from lkd.config import RunRecipe
from lkd.distillation import distill as distill_student
from lkd.errors import UserError
from lkd.given import GivenModel
from lkd.meta_training import meta_train as learn_loss
from lkd.models.network_file import load_network
from lkd.processes import wait_for_all
from lkd.results import Distilled, MetaTrained
from lkd.run import Run, open_run
from lkd.tracking import read_log


def distill(
    student: Student,
    teacher: Teacher,
    train_set: Any,
    *,
    loss: str | Path | dict[str, Any] | nn.Module = "kd",
    meta_validation_set: Any = None,
    run_dir: str | Path = "runs/run",
    seed: int = 0,
    resume: str = "never",
    device: str | torch.device = "auto",
    wandb: str | dict[str, Any] = "disabled",
    quiet: bool = False,
    **options: Any,
) -> Distilled:
    """Train a student with a learned or a hand-made loss, as `lkd distill` does.

    Args:
        student: A network that maps images [B, C, H, W] to logits (or to an object that has them as `logits`, or to
            `lkd.Outputs`, whose features losses over features read); or a function without arguments that builds one,
            called under `seed`; or the name of a network ("resnet18"), or a dict as a recipe's `student`. A network
            that is given stays as it is: a copy is trained.
        teacher: A network like that; or the file of one (`lkd teacher` wrote it), a timm name with its tag
            ("resnet34.tv_in1k", pretrained), "embedded", or a dict as a recipe's `teacher`. One that is given is copied
            too, and sees images as the student does.
        train_set: Tensors (images, labels) or a map-style dataset of (image, label): what `lkd.read_images` takes, and
            its result; or a data set's name ("embedded"; "image_folder" with the option `root`).
        loss: The path of a learned loss, a loss's name, a dict {"name": ..., ...} (docs/losses.md), or a module
            `loss(student, teacher, target, progress) -> {term: scalar}`, of which a copy is used.
        meta_validation_set: What the student is scored on after every epoch, as `train_set`. By default a tenth of the
            given images is split off, by class and `split_seed`, or `meta_validation_size` of them.
        run_dir: Where config, log, checkpoints and the student's file go.
        seed: Of initial weights (of names and functions) and of the order of the batches.
        resume: "never", or "auto": go on with the run in `run_dir` if there is one, to the same bits. Give the same
            teacher, images and loss, and a student of the same shapes.
        device: "cpu", "cuda", or "auto".
        wandb: "offline" or "online" to send the log to Weights & Biases, or a dict of mode, project, name.
        quiet: No lines, no progress bars.
        **options: The recipe's: of the training (epochs, batch_size, learning_rate, ...: `lkd.config.TrainRecipe`), of
            the images (augmentation, train_size, label_noise, mixup, ...: `lkd.config.DataRecipe`), balance,
            labelled_size, threads.

    Returns:
        The trained student, and what it reached.

    Raises:
        UserError: If an argument is not good, in one line.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    fixed = {"run_dir": run_dir, "seed": seed, "resume": resume, "device": device, "wandb": wandb}
    recipe = build_recipe("distill", ("balance", "labelled_size"), fixed, options)
    recipe.student, recipe.teacher, recipe.loss = choose_student(student), choose_teacher(teacher), choose_loss(loss)
    recipe.data = choose_data(train_set, meta_validation_set, recipe.data, options)
    with open_library_run(recipe, "distill", quiet) as run:
        path = distill_student(recipe, run)
        wait_for_all()
        given = recipe.student
        trained = given.load(path) if isinstance(given, GivenModel) else load_network(path)[0]
        rows = [row for row in read_log(Path(recipe.run_dir) / "log.jsonl") if "meta_validation/top1" in row]
    prefix = "meta_validation/"
    history = [{key.removeprefix(prefix): row[key] for key in row if key == "step" or prefix in key} for row in rows]
    return Distilled(trained.to(run.device), path, history)


def meta_train(
    students: Student | Sequence[Student],
    teacher: Teacher,
    train_set: Any,
    *,
    meta: dict[str, Any] | None = None,
    pool: dict[str, Any] | None = None,
    meta_validation_set: Any = None,
    run_dir: str | Path = "runs/run",
    seed: int = 0,
    resume: str = "never",
    device: str | torch.device = "auto",
    wandb: str | dict[str, Any] = "disabled",
    quiet: bool = False,
    **options: Any,
) -> MetaTrained:
    """Learn a loss, as `lkd meta-train` does.

    Args:
        students: The students to learn with, one or several: names, dicts, or functions without arguments that build a
            network, since every student of the pool starts from weights of its own.
        teacher: As for `distill`.
        train_set: As for `distill`; `meta_validation_set`, which the outer loss sees, too.
        meta: The outer loop: fields of `lkd.config.MetaSettings`, such as {"outer_steps": 30} (docs/meta_training.md).
        pool: The pool: fields of `lkd.config.PoolSettings`.
        meta_validation_set: As for `distill`.
        run_dir: Where config, log, checkpoints, the pool and the loss's file go.
        seed: Of initial weights, batches and every draw.
        resume: As for `distill`.
        device: As for `distill`.
        wandb: As for `distill`.
        quiet: No lines, no progress bars.
        **options: The recipe's: of the students' training and of the images, as for `distill`; pool_dir, threads.

    Returns:
        The loss, frozen, and its file.

    Raises:
        UserError: If an argument is not good, in one line.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    models = choose_students(students)
    fixed = {"run_dir": run_dir, "seed": seed, "resume": resume, "device": device, "wandb": wandb}
    fixed |= {"meta": meta or {}, "pool": pool or {}}
    recipe = build_recipe("meta-train", ("pool_dir",), fixed, options)
    recipe.student, recipe.students = models[0], models if len(models) > 1 else []
    recipe.teacher = choose_teacher(teacher)
    recipe.data = choose_data(train_set, meta_validation_set, recipe.data, options)
    with open_library_run(recipe, "meta-train", quiet) as run:
        path = learn_loss(recipe, run)
        wait_for_all()
        return MetaTrained(load_loss(path).to(run.device), path, read_provenance(path)["curve"])


@contextmanager
def open_library_run(recipe: RunRecipe, command: str, quiet: bool) -> Iterator[Run]:
    """Open a run in a caller's process, whose random state it leaves alone.

    Raises:
        UserError: If this is not the main thread, or as `open_run`.
    """
    if threading.current_thread() is not threading.main_thread():
        raise UserError(f"lkd {command}: must be called from the main thread, which Ctrl-C and SIGTERM reach")
    with torch.random.fork_rng(range(torch.cuda.device_count())), open_run(recipe, command, quiet) as run:
        yield run
