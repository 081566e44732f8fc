"""What can be wrong with a meta-training, found before any long work."""

import torch

from lkd.config.meta_training import MetaTrainRecipe
from lkd.core.distributed import share_out
from lkd.core.errors import UserError, check_choice
from lkd.meta_training.online_student import check_interleaving
from lkd.meta_training.rollouts import OBJECTIVES
from lkd.pool.pool import Pool, list_snapshots
from lkd.pool.sampling import build_age_weights, check_sampling, find_drawable_ages
from lkd.training.build import Images, build_batches
from meta import ESTIMATORS

AUDITED = "audited"


def check_settings(recipe: MetaTrainRecipe) -> None:
    """Check the outer loop's settings, as far as they can be without the images.

    Raises:
        UserError: If one is impossible.
    """
    settings = recipe.meta
    if settings.batches == "same" and (recipe.data.mixup or recipe.data.cutmix):
        raise UserError(
            "meta.batches: same would score students on mixed images, which have no label; leave out data.mixup and "
            "data.cutmix, or take meta.batches different"
        )
    build_age_weights(recipe.pool)
    check_choice("meta.estimator", settings.estimator, [*ESTIMATORS, AUDITED])
    check_choice("meta.objective", settings.objective, OBJECTIVES)
    share_out(settings.students_per_step, "meta.students_per_step")
    if settings.initial_rollout_steps > settings.rollout_steps:
        raise UserError(
            f"meta.initial_rollout_steps: {settings.initial_rollout_steps} is not between 0 (off) and "
            f"meta.rollout_steps {settings.rollout_steps}"
        )
    if settings.reuse_every and settings.reuse_epochs > recipe.train.epochs:
        raise UserError(
            f"meta.reuse_epochs: {settings.reuse_epochs} is not between 0 (as many as train.epochs) and train.epochs, "
            f"{recipe.train.epochs}"
        )
    if settings.reuse_patience and not settings.reuse_every:
        raise UserError(f"meta.reuse_patience: {settings.reuse_patience} needs looks at reuse; set meta.reuse_every")
    if settings.interleaving != "before" and settings.students_per_step < len(recipe.students):
        raise UserError(
            f"meta.students_per_step: {settings.students_per_step} leaves out some of the {len(recipe.students)} "
            f"students that meta.interleaving {settings.interleaving} trains side by side; take at least as many"
        )
    if not settings.alternation_start:
        if recipe.pool_dir:
            raise UserError(f"pool_dir: {recipe.pool_dir} is not used by meta.interleaving alternate; leave it out")
        if recipe.pool.sampling != "uniform":
            raise UserError(
                f"pool.sampling: {recipe.pool.sampling} is not used by meta.interleaving alternate, which has no pool; "
                "leave it out"
            )


def check_meta_validation(images: Images) -> None:
    """Check that the outer loss can see every class that students are trained on.

    Raises:
        UserError: If meta-validation lacks one.
    """
    part = images.meta_validation
    counts = torch.bincount(part.labels, minlength=part.num_classes)
    missing = [part.class_names[label] for label in (counts == 0).nonzero().flatten().tolist()]
    if missing:
        named = ", ".join(missing[:5]) + (", ..." if len(missing) > 5 else "")
        raise UserError(
            f"data.meta_validation_size: {len(part)} images have none of {len(missing)} of {part.num_classes} classes "
            f"({named}); take more"
        )


def check_schedule(recipe: MetaTrainRecipe, images: Images, opened: list[Pool]) -> None:
    """Check that pools can be drawn from, and that rollouts and outer steps fit into a student's training.

    Args:
        recipe: The recipe.
        images: The images.
        opened: The pools that are there already; without any, the recipe's is yet to be built.

    Raises:
        UserError: If not.
    """
    settings = recipe.meta
    batches = build_batches(images.train, recipe.train, images.settings, recipe.seed, torch.device("cpu"))
    total_steps = recipe.train.epochs * batches.steps_per_epoch
    check_interleaving(settings, total_steps)
    if not settings.alternation_start:
        return
    planned = torch.tensor(list_snapshots(recipe.pool, total_steps), dtype=torch.float64) / total_steps
    renewed = [planned] if not opened or recipe.pool.sampling == "live" else []
    for ages in [*(pool.ages for pool in opened), *renewed]:
        check_sampling(recipe.pool, ages)
        drawable = find_drawable_ages(build_age_weights(recipe.pool), ages)
        if drawable.min() >= 1:
            raise UserError("pool.max_age: rollouts would all start at the end of the training; let some start earlier")
        left = round((1 - float(drawable.max())) * total_steps)
        if settings.annealing == "constant" and settings.rollout_steps > left:
            raise UserError(
                f"meta.rollout_steps: {settings.rollout_steps} steps at a constant rate go beyond the training of "
                f"students of age {float(drawable.max()):g}, which has {left} of {total_steps} steps left; lower it or "
                "pool.max_age, or take meta.annealing cosine"
            )
