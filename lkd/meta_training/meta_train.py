"""Learn a loss: draw students from the pool, roll them out with it, differentiate meta-validation, update it.

*Our reconstruction* of LKD's outer loop (Ran, Huang, Yang, PLOS ONE 2025; neither text nor code is public). Measured
choices of ours: the learning rate is annealed to zero within each rollout, and the loss sees progress run from the
student's age to 1 meanwhile, so that K steps stand for a whole training; the outer loss is
cross-entropy at the best temperature. The paper's axes (how students are sampled, which images the outer loss sees, how
the trainings of loss and student are interleaved) are options of the recipe.
"""

from pathlib import Path
from typing import Any

from tqdm import tqdm

from lkd.config.meta_training import MetaTrainRecipe
from lkd.core.distributed import any_process, gather_objects, is_main, share_from_main
from lkd.core.errors import UserError
from lkd.core.files import refusing_malformed
from lkd.core.interrupt import Interrupted, deferred_interrupts
from lkd.core.tensor_files import digest
from lkd.losses.learned.file import SUFFIX, save_loss
from lkd.meta_training.checks import check_meta_validation, check_schedule, check_settings
from lkd.meta_training.log import (
    describe_reuse,
    describe_saturation,
    is_logged,
    is_pictured,
    log_row,
    measure_training_seconds,
    show_loss,
    summarize_cost,
)
from lkd.meta_training.online_student import assemble_loss
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.reuse import FIGURES, Reuse
from lkd.models.files import save_network
from lkd.pool.pool import (
    build_pools,
    count_pool_trainings,
    drop_superseded_pools,
    open_pools,
    renew_pools,
)
from lkd.tracking.run import Run
from lkd.training.build import (
    NOTHING,
    LossBuilder,
    Objects,
    OpenedTeacher,
    choose_student,
    introduce_network,
    introduce_teacher,
    open_teacher,
    prepare_images,
    prepare_learned_loss,
    prepare_teacher,
)
from lkd.training.checkpoints import Checkpoints
from lkd.training.evaluate import evaluate


def meta_train(recipe: MetaTrainRecipe, run: Run, given: Objects = NOTHING) -> Path:
    """Learn a loss and save it. Processes that have met share the work.

    Args:
        recipe: The recipe.
        run: The run.
        given: What a caller gives in the place of some of its names.

    Returns:
        The learned-loss file.

    Raises:
        UserError: If the recipe, the data, the teacher or the pool is not good, or the processes' losses differ.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    check_settings(recipe)
    images = prepare_images(recipe.data, given)
    check_meta_validation(images)
    students = [choose_student(m, images.train, given) for m in recipe.students or [recipe.student]]
    pools = open_pools(students, Path(recipe.pool_dir), images) if recipe.pool_dir else []
    check_schedule(recipe, images, pools)
    opened = open_teacher(recipe.teacher, images.train, given)
    loss = prepare_learned_loss(recipe.meta.kind, recipe.meta.loss, students, opened, images, recipe.seed)
    draws = bool(recipe.meta.alternation_start)
    losses = LossBuilder(recipe.pool.loss, opened, images)
    pool_losses = [losses.build(student, recipe.seed) for student in students] if draws else []
    for student in students:
        run.say(introduce_network("student", student, images, run.device))
    run.say(introduce_teacher(opened, images, run.device))
    stages = [stage for reader in (loss, *pool_losses) for stage in reader.teacher_stages]
    teacher = prepare_teacher(opened, images, run.device, tuple(dict.fromkeys(stages)))
    if draws and not pools:
        pools = build_pools(recipe, run.path / "pool", images, students, teacher, losses, run)
        keep_pool(run)
    run.say(f"learned loss: {sum(p.numel() for p in loss.parameters()):,} parameters")
    loop = OuterLoop(recipe, images, students, teacher, loss, pools, run.device)
    reuse = Reuse(recipe, students, images, teacher, run)
    training_seconds = learn(recipe, loop, reuse, opened, run)
    path = run.path / f"loss{SUFFIX}"
    if not is_main():
        return path
    if loop.own:
        save_online_student(students[0].architecture, loop, run)
    pool_trainings = count_pool_trainings(recipe, pools, loop.step)
    provenance = run.provenance() | {
        "split": images.fingerprint,
        "curve": loop.history,
        "reuse": reuse.rows,
        "hypergradients": loop.guard.summarize(),
        "seconds": round(loop.seconds, 1),
        **summarize_cost(pool_trainings, reuse.trainings, loop.work_seconds, training_seconds),
    }
    save_loss(path, assemble_loss(loop.loss, reuse.best or loop.points), provenance)
    run.tracker.keep("loss", path, **loop.history[-1])
    for line in loop.guard.report():
        run.say(line)
    if reuse.rows:
        run.say(*describe_reuse(reuse.best_row, loop.step, images.train.num_classes))
    run.say(f"cost: {provenance['cost_in_trainings']:.1f} student trainings of {training_seconds:.0f} s")
    run.say(f"{path}: reuse it with lkd.load_loss({str(path)!r})")
    return path


def keep_pool(run: Run) -> None:
    """Record the pool that the run has built."""
    if is_main():
        run.tracker.keep("pool", run.path / "pool")


def learn(recipe: MetaTrainRecipe, loop: OuterLoop, reuse: Reuse, opened: OpenedTeacher, run: Run) -> float:
    """Take all outer steps, or those that a resumed run has left.

    Returns:
        Seconds of one student training.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
        UserError: If the processes' losses differ.
    """
    checkpoints = Checkpoints(run.path / "checkpoints", recipe.train, run.say)
    settings, first_pools = recipe.meta, loop.pools
    images, teacher = loop.images, loop.teacher
    training_seconds = 0.0
    warned, saved = False, checkpoints.load()
    if saved is not None:
        with refusing_malformed(checkpoints.folder, "folder of checkpoints of this meta-training"):
            loop.load_state_dict(saved["loop"])
            reuse.load_state_dict(saved["reuse"], loop.loss)
            training_seconds = float(saved["training_seconds"])
            warned = any(describe_saturation(row) for row in loop.history)

    def save() -> None:
        check_identical(loop)
        state = {"loop": loop.state_dict(), "reuse": reuse.state_dict(), "training_seconds": training_seconds}
        checkpoints.save(loop.step, state)
        if is_main():
            drop_superseded_pools(recipe, min(checkpoints.list()), run)

    bar = tqdm(total=settings.outer_steps, initial=loop.step, desc="meta-train", unit="step", disable=run.hide_bars)
    with deferred_interrupts() as stop, bar:
        training_seconds = training_seconds or share_from_main(
            measure_training_seconds(recipe, images, reuse.students, teacher, loop.loss, run.device)
        )
        try:
            while True:
                if reuse.is_due(loop.step):
                    row = reuse.look(loop.step, loop.loss, loop.points, stop)
                    run.tracker.log(loop.step, **{f"reuse/{name}": row[name] for name in FIGURES})
                    save()
                    reuse.forget_checkpoints()
                if loop.step == settings.outer_steps or reuse.is_exhausted():
                    break
                if recipe.pool.sampling == "live" and not loop.alternates:
                    students = reuse.students
                    loop.pools = renew_pools(
                        recipe, loop.step, first_pools, images, students, opened, teacher, run, loop.loss
                    )
                row = log_row(loop.run_step(), loop.balances, loop.loss, loop.estimator)
                if is_logged(loop.step, settings.outer_steps):
                    loop.history.append({"step": loop.step, **row})
                    run.tracker.log(loop.step, **row)
                for line in loop.warnings:
                    run.say(line)
                if is_main() and is_pictured(loop.step, settings.outer_steps, settings.picture_every):
                    show_loss(loop.loss, loop.step, run)
                warning = describe_saturation(row)
                if warning and not warned:
                    run.say(f"outer step {loop.step}: {warning}")
                warned = warned or bool(warning)
                bar.update()
                shown = {"outer": "outer/value", "norm": "outer/hypergradient_norm"}
                bar.set_postfix({name: f"{row[key]:.3g}" for name, key in shown.items()})
                if any_process(bool(stop), run.device):
                    raise Interrupted(f"stopped at outer step {loop.step} of {settings.outer_steps}")
                if loop.step % settings.checkpoint_every == 0:
                    save()
        except Interrupted:
            save()
            raise
    save()
    return training_seconds


def check_identical(loop: OuterLoop) -> None:
    """Check that all processes have the same loss, to the bit.

    Raises:
        UserError: If one has another than the main process.
    """
    digests = gather_objects(digest([loop.loss.state_dict(), loop.optimizer.state_dict()]))
    strangers = [number for number, found in enumerate(digests) if found != digests[0]]
    if strangers:
        raise UserError(
            f"outer step {loop.step}: the loss of process {', '.join(map(str, strangers))} is not that of process 0: "
            "take hosts with the same software and devices, and go on from the last checkpoint by --resume auto"
        )


def save_online_student(architecture: dict[str, Any], loop: OuterLoop, run: Run) -> None:
    """Save the first student that was trained while the loss was learned: what the dynamic strategy itself gives."""
    student, path = loop.own[0].training.student, run.path / "student.safetensors"
    figures = evaluate(student, loop.images.meta_validation, run.device)
    provenance = run.provenance() | {"meta_validation": {"last": figures}}
    save_network(path, student, architecture, provenance)
    run.say(f"{path}: {figures['top1']:.2f} % on meta-validation")
