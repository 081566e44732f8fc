"""From a recipe to the worlds that a loss is learned in."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from lkd.config.evaluation import FidelityRecipe
from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parts import StudentRecipe
from lkd.config.worlds import expand_worlds
from lkd.core.errors import UserError
from lkd.core.files import find_differences, read_mapping
from lkd.losses.learned.forms import WEAK, DecoupledLoss
from lkd.losses.learned.loss import LearnedLoss
from lkd.pool.pool import Pool, World, open_pools
from lkd.tracking.run import MAY_DIFFER_ON_RESUME, Run
from lkd.training.answers import ask_anew, check_same_images, measure_teacher, prepare_teacher
from lkd.training.build import (
    Images,
    LossBuilder,
    Objects,
    OpenedTeacher,
    choose_student,
    open_teacher,
    prepare_images,
    prepare_learned_loss,
    read_any_student,
)
from lkd.training.introduce import introduce_network, introduce_teacher


@dataclass(frozen=True)
class OpenedWorld:
    """A world whose files have been read, before any work; its teacher is asked anew.

    `pool_loss` builds the loss that its pool is trained with, `reference` the one that looks at reuse are compared to.
    """

    recipe: StudentRecipe
    world: World
    teacher: OpenedTeacher
    pool_loss: LossBuilder
    reference: LossBuilder | None

    @property
    def images(self) -> Images:
        return self.world.images

    @property
    def own_losses(self) -> list[LossBuilder]:
        """Those beside the learned one that its students are trained with."""
        return [self.pool_loss, *([self.reference] if self.reference else [])]


def open_worlds(recipe: MetaTrainRecipe, run: Run, given: Objects) -> list[OpenedWorld]:
    """Read the files of all worlds: of those that the recipe lists and draws, or one for each of its students.

    What is wrong with a world is said with its name.
    """
    listed = expand_worlds(recipe)
    opened: list[OpenedWorld] = []
    for name, each in (listed or {"": recipe}).items():
        with naming_world(name):
            images = prepare_images(each.data, given)
            teacher = open_teacher(each.teacher, images.train, given)
            teacher.check_classes(images.train)  # every loss network reads its logits
            pool_loss = LossBuilder(recipe.pool.loss, teacher, images)
            reference = LossBuilder(recipe.meta.reference, teacher, images) if recipe.meta.reference else None
            for model in recipe.students or [each.student]:
                student = choose_student(model, images.train, given)
                answers = ask_anew(teacher, images, run.device)
                world = World(images, answers, student, each.train, recipe.seed, run.device, name)
                opened.append(OpenedWorld(each, world, teacher, pool_loss, reference))
    return opened


@contextmanager
def naming_world(name: str) -> Iterator[None]:
    """Let what is wrong in here say of which world it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"worlds.{name}: {error}" if name else str(error)) from error


def build_loss_networks(recipe: MetaTrainRecipe, opened: Sequence[OpenedWorld]) -> LearnedLoss:
    """The loss that is to be learned: fresh networks, or those of a file."""
    first, students = opened[0], [each.world.student for each in opened]
    if recipe.meta.start is None:
        if recipe.meta.kind != "logits":
            check_stages(opened)
        return prepare_learned_loss(
            recipe.meta.kind, recipe.meta.loss, students, first.teacher, first.images, recipe.seed
        )
    loss = LossBuilder(recipe.meta.start, first.teacher, first.images).build(first.world.student, recipe.seed)
    if not isinstance(loss, LearnedLoss):
        raise UserError(f"meta.start: {recipe.meta.start} is a {type(loss).__name__}, not one learned loss")
    if loss.teacher_stages and len(students) > 1:
        check_stages(opened)
        read_any_student(loss)
    return loss.requires_grad_(True)


def check_stages(opened: Sequence[OpenedWorld]) -> None:
    """Check that the teachers' stages have the same names in all worlds: one loss reads them all."""
    first, *others = ([*each.teacher.find_stages(each.images.train.image_shape)] for each in opened)
    for each, stages in zip(opened[1:], others, strict=True):
        if stages != first:
            raise UserError(
                f"worlds.{each.world.name}.teacher: its stages are {', '.join(stages) or 'none'}, those of "
                f"{opened[0].world.name}'s teacher {', '.join(first) or 'none'}: a loss over features is learned with "
                "teachers of one kind; or take meta.kind logits"
            )


def prepare_worlds(opened: Sequence[OpenedWorld], loss: LearnedLoss, run: Run) -> list[World]:
    """The worlds with teachers as fast as they get, and with what is measured of them; says what they are."""
    prepared: list[World] = []
    for each in opened:
        world = each.world
        name = f"{world.name}: " if world.name else ""
        check_same_images(world.images, run, world.name)
        run.say(name + introduce_network("student", world.student, world.images, run.device, world.train))
        if name or not prepared:  # else only the students differ
            builders = [(one.world, loss) for one in ([each] if name else opened) for loss in one.own_losses]
            readers = [loss, *(builder.build(its.student, its.seed) for its, builder in builders)]
            reads_trust = any(reader.reads_trust for reader in readers)
            if not (name and reads_trust):  # else trust says more, and asks the teacher less
                run.say(name + introduce_teacher(each.teacher, world.images, run.device))
            stages = dict.fromkeys(stage for reader in readers for stage in reader.teacher_stages)
            answers = prepare_teacher(each.teacher, world.images, run.device, tuple(stages))
            trust = measure_teacher(each.teacher, world.images, run.device, answers) if reads_trust else world.trust
            if reads_trust:
                run.say(f"{name}{trust}")
        prepared.append(replace(world, teacher=answers, trust=trust))
    return prepared


def doubt_learning(worlds: Sequence[World], loss: LearnedLoss) -> list[str]:
    """A warning where the loss's rules let nothing count of what is to be learned, in any world."""
    told = copy.deepcopy(loss)
    for world in worlds:
        told.tell(world.trust.figures)
        for part in told.parts.values():
            if not isinstance(part, DecoupledLoss) or part.find_learned_part(part.trust):
                return []
    return [
        f"warning: meta.loss: under a teacher that agrees with {WEAK:.0%} of the held-out labels or less it falls "
        "back, so nothing that is learned here will count; take the loss as it is"
    ]


TRAINED_BY = ("data", "teacher", "train", "worlds", "draw")  # parts of a recipe


def describe_pool(recipe: MetaTrainRecipe | FidelityRecipe) -> list[str]:
    """A line if the run that left the pool that is named trained its students otherwise: they serve all the same."""
    config = Path(recipe.pool_dir or "").parent / "config.json"
    if not (recipe.pool_dir and config.is_file()):
        return []
    saved, own = read_mapping(config).get("recipe") or {}, asdict(recipe)
    known = [part for part in TRAINED_BY if part in saved and part in own]  # `lkd pool` has no worlds
    theirs, ours = ({part: whole[part] or {} for part in known} for whole in (saved, own))
    changes = [
        f"{key} {before!r} (here {now!r})"
        for key, before, now in find_differences(theirs, ours)
        if key not in MAY_DIFFER_ON_RESUME
    ]
    if not changes:
        return []
    return [
        f"pool_dir: its students were trained with {', '.join(changes)}; rollouts take their age from them, and "
        "optimiser and learning rate from here"
    ]


def open_given_pools(recipe: MetaTrainRecipe, opened: Sequence[OpenedWorld]) -> list[Pool]:
    """The pools that the recipe names; none if they are yet to be built."""
    return open_pools([each.world for each in opened], Path(recipe.pool_dir)) if recipe.pool_dir else []
