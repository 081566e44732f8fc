"""What each command does with its recipe: open the run, do the work, say where the result is."""

import dataclasses
import sys
from functools import partial
from pathlib import Path
from typing import Any

from lkd import config
from lkd.config.parse import make_recipe
from lkd.core.errors import UserError
from lkd.core.files import MALFORMED, read_json, replaced_atomically
from lkd.data.image_files import ImageFiles
from lkd.data.images import ImageSet
from lkd.evaluation.comparison.compare import compare as compare_methods
from lkd.evaluation.dashboard import make_dashboard
from lkd.evaluation.fidelity import measure_fidelity
from lkd.evaluation.influence import measure_run
from lkd.evaluation.inspection_report import inspect_recipe
from lkd.evaluation.plan import format_plan
from lkd.evaluation.plan import plan as plan_run
from lkd.evaluation.quickstart import SETTINGS
from lkd.evaluation.quickstart import quickstart as run_quickstart
from lkd.evaluation.report.page import write_report
from lkd.evaluation.variance import measure_variance
from lkd.export.cache import cache_answers
from lkd.export.export import export as export_network
from lkd.export.export import pack_dataset
from lkd.export.share import pull_loss, push_loss
from lkd.losses.learned.trust import Trust
from lkd.meta_training.meta_train import keep_pool
from lkd.meta_training.meta_train import meta_train as learn_loss
from lkd.models.build import GIVEN, try_black_image
from lkd.models.files import fit_to_images
from lkd.models.teacher import load_teacher_network
from lkd.pool.pool import World, build_pool
from lkd.tracking.run import choose_device, open_run
from lkd.training.answers import check_same_images, measure_teacher, prepare_teacher
from lkd.training.build import Images, LossBuilder, build, check_network, choose_student, open_teacher, prepare_images
from lkd.training.distill import distill as distill_student
from lkd.training.distill import train_teacher
from lkd.training.evaluate import evaluate as evaluate_network
from lkd.training.introduce import CHANCE, describe_crops, introduce_network, introduce_teacher, is_no_better_than
from lkd.training.optimizer import check_differentiable, check_names
from lkd.training.predict import format_prediction, write_csv
from lkd.training.predict import predict as predict_pictures


def teacher(recipe: config.TrainTeacherRecipe) -> None:
    """`lkd teacher`."""
    with open_run(recipe, "teacher") as run:
        check_names(recipe.train)
        images = prepare_images(recipe.data, scored=False)
        train_teacher(
            choose_student(recipe.model, images.train), images, recipe.train, recipe.seed, run, recipe.report_test
        )


def distill(recipe: config.DistillRecipe) -> None:
    """`lkd distill`."""
    with open_run(recipe, "distill") as run:
        distill_student(build(recipe), recipe.train, recipe.seed, run, recipe.labelled_size, recipe.report_test)


def influence(recipe: config.InfluenceRecipe) -> None:
    """`lkd influence`."""
    with open_run(recipe, "influence") as run:
        path = measure_run(recipe, run)
        run.say(f"{path}; beside it influence.html, label_issues.csv, weights.safetensors, result.json")


def evaluate(recipe: config.EvaluateRecipe) -> None:
    """`lkd evaluate`."""
    device = choose_device(recipe.device)
    network, header = load_teacher_network(recipe.checkpoint, recipe.name, recipe.options)
    data = choose_data(recipe, header["provenance"])
    images = prepare_images(data, scored=recipe.split != "test")
    check_network(recipe.checkpoint, header["architecture"], images.train)
    part = images.test if recipe.split == "test" else choose_held_out(recipe, images, header["provenance"])
    network = fit_to_images(recipe.checkpoint, network, header, images.train)
    try_black_image(network, recipe.checkpoint, images.train.image_shape)
    figures = evaluate_network(network.to(device), part, device)
    name = header["architecture"]["name"]
    said = "" if "input" in header else ", normalised as the data set says, since the file does not say how"
    lost = part.images.damage.damaged if isinstance(part.images, ImageFiles) else 0
    said += f", {lost} that cannot be decoded left out" if lost else ""
    seen = f"{len(part) - lost:,} {recipe.split} images of {images.name}{describe_crops(part)}"
    print(f"{name} ({recipe.checkpoint}) on {seen}{said}:")
    for name, value in figures.items():
        print(f"  {name:24} {value:.4f}")
    if is_no_better_than(figures["top1"], 1 / part.num_classes, len(part)):
        print(f"warning: {CHANCE} (data.image_size)?")


def choose_held_out(recipe: config.EvaluateRecipe, images: Images, provenance: dict[str, Any]) -> ImageSet:
    """The meta-validation images; of the data that the file was trained with they must be those held out there."""
    trained = ((provenance.get("recipe") or {}).get("data") or {}).get("name")
    if trained == images.settings.name and provenance.get("split", images.fingerprint) != images.fingerprint:
        raise UserError(
            f"split: {recipe.checkpoint} was trained on another part of {images.name} than these settings leave, so "
            "some of these meta-validation images may have been trained on; put the images and settings back, or take "
            "--split test"
        )
    return images.meta_validation


def choose_data(recipe: config.EvaluateRecipe, provenance: dict[str, Any]) -> config.DataRecipe:
    """The images to evaluate on: those that the file was trained with, but for what the recipe says."""
    trained = {} if recipe.checkpoint == "embedded" else (provenance.get("recipe") or {}).get("data") or {}
    if str(trained.get("name")).startswith(GIVEN) and "name" not in recipe.data:
        raise UserError(f"data.name: {recipe.checkpoint} was trained on images that Python gave: name others")
    known = {field.name for field in dataclasses.fields(config.DataRecipe)}
    saved = {key: value for key, value in trained.items() if key in known and value is not None}
    known_here = find_folders(Path(recipe.checkpoint))
    for place in ("root", "packed", "class_map"):  # the file says their last part only: it may go to another machine
        if place in saved:
            whole = known_here.get(place)
            saved[place] = whole if whole and Path(whole).name == Path(saved[place]).name else saved[place]
            if not Path(saved[place]).exists():
                del saved[place]
    if "name" in recipe.data and recipe.data["name"] != saved.get("name"):
        saved = {key: saved[key] for key in ("image_size", "crop_pct") if key in saved}  # the rest is of other images
    data = make_recipe(config.DataRecipe, saved | recipe.data, "data")
    if recipe.split != "test":
        return data
    clean: dict[str, Any] = {"label_noise": 0.0, "meta_validation_noise": 0.0, "imbalance": 1.0}
    return dataclasses.replace(data, train_size=0, meta_validation_size=0, **clean)


def find_folders(checkpoint: Path) -> dict[str, Any]:
    """Where the images of a run lie, by the config beside its network; empty if there is none."""
    try:
        return dict(read_json(checkpoint.parent / "config.json")["recipe"]["data"])
    except (UserError, OSError, *MALFORMED):
        return {}


def predict(recipe: config.PredictRecipe) -> None:
    """`lkd predict`."""
    found = predict_pictures(recipe, partial(print, file=sys.stderr))
    if recipe.out:
        with (
            replaced_atomically(Path(recipe.out)) as temporary,
            temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
        ):
            count = write_csv(found, file)
        print(f"{recipe.out}: {count:,} pictures")
    elif any(Path(name).is_dir() for name in recipe.pictures):
        write_csv(found, sys.stdout)
    else:
        for prediction in found:
            print(format_prediction(prediction))


def export(recipe: config.ExportRecipe) -> None:
    """`lkd export`."""
    for name, (path, difference) in export_network(recipe).items():
        print(f"{path}: {name}; largest difference of a logit {difference:.1g} of the largest")


def variance(recipe: config.VarianceRecipe) -> None:
    """`lkd variance`."""
    result = measure_variance(recipe)
    print(f"λ* = {result['optimal_share']:.3f}: {result['predicted_ratio']:.1%} of the noise without a teacher is left")
    print(f"{recipe.run_dir}/variance: variance.json, variance.png")


def push(recipe: config.PushRecipe) -> None:
    """`lkd push`."""
    print(push_loss(recipe))


def pull(recipe: config.PullRecipe) -> None:
    """`lkd pull`."""
    path = pull_loss(recipe)
    print(f"{path}: use it with lkd distill --loss {path}")


def pack(recipe: config.PackRecipe) -> None:
    """`lkd pack`."""
    for path in pack_dataset(recipe):
        print(f"{path}: use it with --data.packed {path.parent}")


def cache(recipe: config.CacheRecipe) -> None:
    """`lkd cache`."""
    made = cache_answers(recipe)
    print(f"{made.folder}: {made.header['teacher']}; use it with --teacher.cache {made.folder}")


def plan(recipe: config.PlanRecipe) -> None:
    """`lkd plan`."""
    print(format_plan(plan_run(recipe)))


def pool(recipe: config.PoolRecipe) -> None:
    """`lkd pool`."""
    check_differentiable(recipe.train)
    with open_run(recipe, "pool") as run:
        images = prepare_images(recipe.data)
        check_same_images(images, run)
        student = choose_student(recipe.student, images.train)
        taught_by = open_teacher(recipe.teacher, images.train)
        losses = LossBuilder(recipe.pool.loss, taught_by, images)
        pool_loss = losses.build(student, recipe.seed)
        run.say(introduce_network("student", student, images, run.device, recipe.train))
        run.say(introduce_teacher(taught_by, images, run.device))
        answers = prepare_teacher(taught_by, images, run.device, pool_loss.teacher_stages)
        trust = measure_teacher(taught_by, images, run.device) if pool_loss.reads_trust else Trust()
        world = World(images, answers, student, recipe.train, recipe.seed, run.device, trust=trust)
        built = build_pool(world, recipe.pool, losses.build, run.path / "pool", run)
        keep_pool(run)
        run.say(f"{built.folder}: {len(built)} students; use it with lkd meta-train --pool_dir {built.folder}")


def fidelity(recipe: config.FidelityRecipe) -> None:
    """`lkd fidelity`."""
    with open_run(recipe, "fidelity") as run:
        measure_fidelity(recipe, run)
        print((run.path / "table.txt").read_text())
        print(f"{run.path}: fidelity.json, fidelity.png, table.txt, rows.csv, trainings.csv, rollouts.csv, result.json")


def meta_train(recipe: config.MetaTrainRecipe) -> None:
    """`lkd meta-train`."""
    with open_run(recipe, "meta-train") as run:
        learn_loss(recipe, run)


def compare(recipe: config.CompareRecipe) -> None:
    """`lkd compare`."""
    with open_run(recipe, "compare") as run:
        compare_methods(recipe, run)
        print((run.path / "table.txt").read_text())
        print(f"{run.path}: table.txt, table.csv, table.tex, cells.csv, comparison.png, picks.json, result.json")


def dashboard(recipe: config.DashboardRecipe) -> None:
    """`lkd dashboard`."""
    print(make_dashboard(recipe))


def quickstart(recipe: config.QuickstartRecipe) -> None:
    """`lkd quickstart`."""
    with open_run(recipe, "quickstart") as run:
        page = run_quickstart(recipe, run)
        for setting in SETTINGS:
            print(f"\n{setting}\n{(run.path / setting / 'table.txt').read_text().rstrip()}")
        print(f"\npage: {page}\nuse it: lkd.load_loss('universal'), or lkd distill (docs/universal.md)")


def inspect(recipe: config.InspectRecipe) -> None:
    """`lkd inspect`."""
    report, folder = inspect_recipe(recipe)
    print(f"{report}\n\n{folder}: inspection.json, inspection.png")


def report(recipe: config.ReportRecipe) -> None:
    """`lkd report`."""
    page, count = write_report(recipe)
    print(f"{page}: {count} run{'s' * (count > 1)}, {page.stat().st_size / 1e6:.1f} MB; open it in a browser")
