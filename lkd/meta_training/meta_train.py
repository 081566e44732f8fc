"""Learn a loss: draw students from the pool, roll them out with it, differentiate meta-validation, update it.

*Our reconstruction* of LKD's outer loop (Ran, Huang, Yang, PLOS ONE 2025; we could not read its text). Measured choices
of ours: the learning rate is annealed to zero within each rollout, and the loss sees progress run from the student's
age to 1 meanwhile, so that K steps stand for a whole training; the outer loss is cross-entropy at the best temperature.
The paper's axes (how students are sampled, which images the outer loss sees, how the trainings of loss and student are
interleaved) are options of the recipe.
"""

import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm

from lkd.config.meta_training import MetaSettings, MetaTrainRecipe
from lkd.config.worlds import expand_worlds
from lkd.core.distributed import any_process, gather_objects, is_main, share_from_main, share_out
from lkd.core.errors import UserError, check_choice
from lkd.core.files import refusing_malformed
from lkd.core.interrupt import Interrupted, deferred_interrupts
from lkd.core.tensor_files import digest
from lkd.losses.learned.file import NOT_LEARNED, SUFFIX, LossFile, save_loss, was_learned
from lkd.meta_training.log import (
    describe_audit,
    describe_reuse,
    describe_saturation,
    find_kept_row,
    is_logged,
    is_pictured,
    log_row,
    measure_training_seconds,
    show_loss,
    summarize_cost,
)
from lkd.meta_training.online_student import assemble_loss
from lkd.meta_training.outer_loop import AUDITED, OuterLoop
from lkd.meta_training.reuse import Reuse, shorten
from lkd.meta_training.rollouts import OBJECTIVES
from lkd.meta_training.worlds import (
    OpenedWorld,
    build_loss_networks,
    describe_pool,
    doubt_learning,
    naming_world,
    open_given_pools,
    open_worlds,
    prepare_worlds,
)
from lkd.models.files import save_network
from lkd.pool.pool import Pool, build_pools, count_pool_trainings, drop_superseded_pools, list_snapshots, renew_pools
from lkd.pool.sampling import build_age_weights, check_sampling
from lkd.tracking.remote import fetch_named
from lkd.tracking.run import Run
from lkd.training.build import NOTHING, Images, Objects, build_batches
from lkd.training.checkpoints import Checkpoints
from lkd.training.evaluate import evaluate
from lkd.training.optimizer import ENDLESS, check_differentiable, check_milestones
from meta import ESTIMATORS


def meta_train(recipe: MetaTrainRecipe, run: Run, given: Objects = NOTHING) -> Path:
    """Learn a loss and save it, with what a caller gives in the place of some names; the file.

    Processes that have met share the work.

    Raises:
        UserError: If the recipe, the data, the teacher or the pool is not good, or the processes' losses differ.
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    for name, own in (expand_worlds(recipe) or {"": recipe}).items():
        with naming_world(name):
            check_settings(replace(recipe, data=own.data, train=own.train))
    opened = open_worlds(recipe, run, given)
    share_out(recipe.meta.students_per_step or len(opened), "meta.students_per_step")  # before any long work
    pools = open_given_pools(recipe, opened)
    for line in describe_pool(recipe):
        run.say(line)
    for each in opened:
        check_meta_validation(each.images)
    run.say(*check_schedules(recipe, opened, pools))
    loss = build_loss_networks(recipe, opened)
    start = recipe.meta.start
    start_learned = start is not None and was_learned(LossFile.read(fetch_named(start)).header)
    worlds = prepare_worlds(opened, loss, run)
    run.say(*doubt_learning(worlds, loss))
    if recipe.meta.estimator in EXACT and recipe.meta.alternation_start:
        OuterLoop(
            worlds, [], copy.deepcopy(loss), replace(recipe.meta, interleaving="before"), recipe.pool
        ).try_estimator()
    if recipe.meta.alternation_start and not pools:
        pools = build_pools(worlds, recipe.pool, [each.pool_loss.build for each in opened], run.path / "pool", run)
        keep_pool(run)
    run.say(f"learned loss: {sum(p.numel() for p in loss.parameters()):,} parameters")
    loop, reuse = (
        OuterLoop(worlds, pools, loss, recipe.meta, recipe.pool),
        Reuse(worlds, recipe.meta, run, [each.reference for each in opened]),
    )
    training_seconds = learn(loop, reuse, run)
    path = run.path / f"loss{SUFFIX}"
    if is_main():
        save_results(path, loop, reuse, pools, training_seconds, start_learned, run)
    return path


EXACT = ("adjoint", "unrolled", "higher", "implicit", "last_step")  # need what some networks have not


def keep_pool(run: Run) -> None:
    """Record the pool that the run has built."""
    if is_main():
        run.tracker.keep("pool", run.path / "pool")


def learn(loop: OuterLoop, reuse: Reuse, run: Run) -> float:
    """Take all outer steps, or those that a resumed run has left.

    Returns:
        Seconds of one student training.

    Raises:
        Interrupted: On Ctrl-C or SIGTERM, after saving a checkpoint.
    """
    settings, worlds, first_pools = loop.settings, loop.worlds, loop.pools
    checkpoints = Checkpoints(run.path / "checkpoints", worlds[0].train, run.say)
    training_seconds, warned, saved = 0.0, False, checkpoints.load()
    if saved is not None:
        with refusing_malformed(checkpoints.folder, "folder of checkpoints of this meta-training"):
            loop.load_state_dict(saved["loop"])
            reuse.load_state_dict(saved["reuse"], loop.loss)
            training_seconds = float(saved["training_seconds"])
            warned = any(describe_saturation(row) for row in loop.history)
    audit_said = describe_audit(loop.estimator, loop.step, "")

    def save() -> None:
        check_identical(loop)
        state = {"loop": loop.state_dict(), "reuse": reuse.state_dict(), "training_seconds": training_seconds}
        checkpoints.save(loop.step, state)
        if is_main():
            drop_superseded_pools(loop.draws, min(checkpoints.list()), run)

    bar = tqdm(total=settings.outer_steps, initial=loop.step, desc="meta-train", unit="step", disable=run.hide_bars)
    with deferred_interrupts() as stop, bar:
        training_seconds = training_seconds or share_from_main(measure_training_seconds(worlds, loop.loss))
        try:
            while True:
                if reuse.is_due(loop.step):
                    row = reuse.look(loop.step, loop.loss, loop.points, stop)
                    run.tracker.log(loop.step, **{f"reuse/{name}": row[name] for name in row if name != "step"})
                    save()
                    reuse.forget_checkpoints()
                if loop.step == settings.outer_steps or reuse.is_exhausted():
                    break
                if loop.draws.sampling == "live" and not loop.alternates:
                    loop.pools = renew_pools(worlds, loop.draws, first_pools, loop.loss, loop.step, run)
                estimator = None if loop.alternates else loop.estimator
                row = log_row(loop.run_step(), loop.balances, loop.loss, estimator)
                if is_logged(loop.step, settings.outer_steps):
                    loop.history.append({"step": loop.step, **row})
                    run.tracker.log(loop.step, **row)
                for line in loop.warnings:
                    run.say(line)
                if audit := describe_audit(estimator, loop.step, audit_said):
                    run.say(audit_said := audit)
                if is_main() and is_pictured(loop.step, settings.outer_steps, settings.picture_every):
                    show_loss(loop.loss, loop.step, run)
                warning = describe_saturation(row)
                if warning and not warned:
                    run.say(f"outer step {loop.step}: {warning}")
                warned = warned or bool(warning)
                bar.update()
                bar.set_postfix(outer=f"{row['outer/value']:.3g}", norm=f"{row['outer/hypergradient_norm']:.3g}")
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
    """Check that all processes have the same loss, to the bit."""
    digests = gather_objects(digest([loop.loss.state_dict(), loop.optimizer.state_dict()]))
    strangers = [str(number) for number, found in enumerate(digests) if found != digests[0]]
    if strangers:
        raise UserError(
            f"outer step {loop.step}: the loss of process {', '.join(strangers)} is not that of process 0: "
            "take hosts with the same software and devices, and go on from the last checkpoint by --resume auto"
        )


def save_results(
    path: Path,
    loop: OuterLoop,
    reuse: Reuse,
    pools: list[Pool],
    training_seconds: float,
    start_learned: bool,
    run: Run,
) -> None:
    """Save the loss with all that was measured, and the first online student, which the dynamic strategy gives.

    `start_learned`: whether the loss that it began with was a learned one already.
    """
    images = loop.worlds[0].images
    if loop.own:
        student, place = loop.own[0].training.result, run.path / "student.safetensors"
        figures = evaluate(student, images.meta_validation, run.device)
        provenance = run.provenance() | {"meta_validation": {"last": figures}, "split": images.fingerprint}
        provenance |= {"image_shape": list(images.train.image_shape)}
        save_network(place, student, loop.worlds[0].student.architecture, provenance, images.train)
        run.say(f"{place}: {figures['top1']:.2f} % on meta-validation")
    pool_trainings = count_pool_trainings(loop.draws, pools, min(loop.step, loop.settings.alternation_start))
    cost = summarize_cost(pool_trainings, reuse.trainings, loop.work_seconds, training_seconds)
    kept = int(reuse.best_row["step"]) if reuse.rows else loop.step
    start = loop.settings.start
    moved = loop.guard.counted > loop.guard.vanished
    learned = (moved and (kept > 0 or not reuse.rows)) or start_learned
    provenance = run.provenance() | {
        "split": images.fingerprint,
        "learned": learned,
        "kept_step": kept,
        "curve": loop.history,
        "reuse": reuse.rows,
        "hypergradients": loop.guard.summarize(),
        "seconds": round(loop.seconds, 1),
        **cost,
    }
    loss = assemble_loss(loop.loss, reuse.best or loop.points)
    save_loss(path, loss, provenance)
    run.tracker.keep("loss", path, **find_kept_row(loop.history, kept), learned=learned)
    if reuse.rows and loop.settings.picture_every:
        show_loss(loss.at(0.5), loop.step, run, f"after outer step {kept}" if learned else NOT_LEARNED)
    for line in loop.guard.report():
        run.say(line)
    if reuse.rows:
        classes = {world.name: world.images.train.num_classes for world in loop.worlds}
        run.say(*describe_reuse(reuse.best_row, loop.step, classes, start))
    run.say(f"cost: {cost['cost_in_trainings']:.1f} student trainings of {training_seconds:.0f} s")
    run.say(f"{path}: reuse it with lkd.load_loss({str(path)!r})")


# ----------------------------------------------------------------------------------------------------------------------
# What can be wrong with a meta-training, found before any long work.


def check_settings(recipe: MetaTrainRecipe) -> None:
    """Check the outer loop's settings, as far as they can be without the images."""
    meta, trained = recipe.meta, f"meta.interleaving {recipe.meta.interleaving}"
    build_age_weights(recipe.pool)
    check_differentiable(recipe.train)
    check_choice("meta.estimator", meta.estimator, [*ESTIMATORS, AUDITED])
    check_choice("meta.objective", meta.objective, OBJECTIVES)
    if meta.batches == "same" and (recipe.data.mixup or recipe.data.cutmix or recipe.train.label_smoothing):
        raise UserError(
            "meta.batches: same would score students on labels that are mixed or smoothed; leave out data.mixup, "
            "data.cutmix and train.label_smoothing, or take meta.batches different"
        )
    if meta.initial_rollout_steps > meta.rollout_steps:
        raise UserError(
            f"meta.initial_rollout_steps: {meta.initial_rollout_steps} is not between 0 (off) and meta.rollout_steps "
            f"{meta.rollout_steps}"
        )
    if meta.reuse_every and meta.reuse_epochs > recipe.train.epochs:
        raise UserError(
            f"meta.reuse_epochs: {meta.reuse_epochs} is not between 0 (as many as train.epochs) and train.epochs, "
            f"{recipe.train.epochs}"
        )
    if meta.reuse_every and meta.reuse_epochs:
        check_milestones(shorten(recipe.train, meta.reuse_epochs))
    for name in ("reuse_patience", "reference"):
        if getattr(meta, name) and not meta.reuse_every:
            raise UserError(f"meta.{name}: {getattr(meta, name)} needs looks at reuse; set meta.reuse_every")
    if meta.interleaving != "before" and (recipe.worlds or recipe.draw.worlds):
        raise UserError(f"meta.interleaving: {meta.interleaving} trains in one world; leave out worlds and draw")
    if meta.interleaving != "before" and 0 < meta.students_per_step < len(recipe.students):
        raise UserError(
            f"meta.students_per_step: {meta.students_per_step} leaves out some of the {len(recipe.students)} students "
            f"that {trained} trains side by side; take at least as many"
        )
    unused = {"pool_dir": recipe.pool_dir, "pool.sampling": recipe.pool.sampling.replace("uniform", "")}
    for name, value in unused.items():
        if value and not meta.alternation_start:
            raise UserError(f"{name}: {value} is not used by {trained}, which has no pool; leave it out")


def check_meta_validation(images: Images) -> None:
    """Check that the outer loss can see every class that students are trained on."""
    part = images.meta_validation
    counts = torch.bincount(part.labels, minlength=part.num_classes)
    missing = [part.class_names[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if missing:
        named = ", ".join([*missing[:5], "..."] if len(missing) > 5 else missing)
        classes = f"{len(missing)} of {part.num_classes} classes ({named})"
        raise UserError(f"data.meta_validation_size: {len(part)} images have none of {classes}; take more")


def check_schedules(recipe: MetaTrainRecipe, opened: Sequence[OpenedWorld], pools: list[Pool]) -> list[str]:
    """Check each world's own schedule, by `check_schedule`; a warning of students whose learning rate is 0."""
    at_the_end = False
    for number, each in enumerate(opened):
        train = each.recipe.train
        with naming_world(each.world.name):
            oldest = check_schedule(replace(recipe, train=train), each.images, pools[number : number + 1])
        at_the_end |= oldest == 1 and train.schedule not in ENDLESS and train.min_learning_rate == 0
    return [
        "warning: pool.max_age: students of age 1 are drawn, at the end of the schedule, where the learning rate is 0: "
        "outer steps from them learn nothing; take at most 0.9"
    ] * at_the_end


def check_schedule(recipe: MetaTrainRecipe, images: Images, opened: list[Pool]) -> float:
    """Check that pools can be drawn from, and that rollouts and outer steps fit into a student's training.

    `opened`: the pools that are there already; without any, the recipe's is yet to be built. Returns the oldest age
    that rollouts start at; 0 without a pool.
    """
    meta, oldest = recipe.meta, 0.0
    batches = build_batches(images.train, recipe.train, images.settings, recipe.seed, torch.device("cpu"))
    total_steps = recipe.train.epochs * batches.steps_per_epoch
    if meta.interleaving != "before":
        check_alternation(meta, total_steps)
    if not meta.alternation_start:
        return oldest
    planned = torch.tensor(list_snapshots(recipe.pool, total_steps), dtype=torch.float64) / total_steps
    renewed = [planned] if not opened or recipe.pool.sampling == "live" else []
    for ages in [*(pool.ages for pool in opened), *renewed]:
        oldest = max(oldest, check_sampling(recipe.pool, ages))
        left = round((1 - oldest) * total_steps)
        if meta.annealing == "constant" and meta.rollout_steps > left:
            raise UserError(
                f"meta.rollout_steps: {meta.rollout_steps} steps at a constant rate go beyond the training of students "
                f"of age {oldest:g}, which has {left} of {total_steps} steps left; lower it or pool.max_age, or take "
                "meta.annealing cosine"
            )
    return oldest


def check_alternation(meta: MetaSettings, total_steps: int) -> None:
    """Check that the outer steps fit into the training, of so many steps, that they alternate with."""
    kind = f"meta.interleaving {meta.interleaving}"
    if meta.interleaving == "both" and meta.outer_steps < 2:
        raise UserError(f"meta.outer_steps: {meta.outer_steps} cannot be halved; {kind} needs at least 2")
    updates = meta.outer_steps - meta.alternation_start
    if meta.rollout_steps > total_steps // updates:
        raise UserError(
            f"meta.rollout_steps: {meta.rollout_steps} steps do not fit between two of the {updates} updates of a "
            f"training of {total_steps} steps ({total_steps // updates} apart); lower it, or meta.outer_steps"
        )
    if meta.estimator not in (AUDITED, "first_order"):
        raise UserError(f"meta.estimator: {meta.estimator} cannot walk a tape back; {kind} takes first_order")
    if meta.reuse_patience:
        raise UserError(f"meta.reuse_patience: {meta.reuse_patience} would leave {kind}'s student half trained")
    for name in ("average", "initial_rollout_steps"):
        if getattr(meta, name) and not meta.alternation_start:
            raise UserError(f"meta.{name}: {getattr(meta, name)} is of rollouts from the pool; {kind} has none")
