"""`lkd variance`: how noisy a finished student's gradient is for each share of the teacher, predicted and measured."""

import dataclasses
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lkd.balance.balancing import split_terms, take_gradient
from lkd.balance.rules import GradientMoments, optimal_share
from lkd.config.parse import make_recipe
from lkd.config.training import DistillRecipe, VarianceRecipe
from lkd.core.errors import UserError
from lkd.core.files import read_mapping, write_json
from lkd.meta_training.log import save_figure
from lkd.models.build import GIVEN
from lkd.models.files import fit_to_images, load_network
from lkd.models.stages import freeze_stages
from lkd.tracking.run import choose_device
from lkd.training.answers import measure_teacher, prepare_teacher
from lkd.training.build import build, build_batches, check_network
from lkd.training.distill import label_by_teacher, select_labelled

SHARES = [k / 20 for k in range(21)]


def measure_variance(recipe: VarianceRecipe) -> dict[str, Any]:
    """Predict the noise from one half of the mini-batches and measure it on the other; write a figure and the numbers.

    The noise at share λ is Var(∇[(1 − λ) · task + λ · distillation]) + λ² (1 + horizon) |E h|², over its value at 0,
    the loss's terms as it gives them: a parabola in λ, of moments that are streamed.

    Returns:
        What `variance.json` holds.
    """
    halves = collect_moments(recipe)
    share = min(max(optimal_share(halves[0], recipe.horizon)[0], 0.0), 1.0)  # the parabola's least in [0, 1]
    ratio = measure_noise(halves[0], share, recipe.horizon)
    result = {
        "optimal_share": share,
        "predicted_ratio": ratio,
        "horizon": recipe.horizon,
        "samples": recipe.samples,
        "shares": SHARES,
        "predicted": [measure_noise(halves[0], s, recipe.horizon) for s in SHARES],
        "measured": [measure_noise(halves[1], s, recipe.horizon) for s in SHARES],
    }
    folder = Path(recipe.run_dir) / "variance"
    write_json(folder / "variance.json", result)
    plot_variance(result, folder / "variance.png")
    return result


def collect_moments(recipe: VarianceRecipe) -> list[GradientMoments]:
    """The moments of g and h = g − ∇distillation of a finished run's student, over every other mini-batch each."""
    folder, device = Path(recipe.run_dir), choose_device(recipe.device)
    saved = read_mapping(folder / "config.json")
    if saved.get("command") != "distill":
        raise UserError(f"run_dir: {folder} holds a run of `lkd {saved.get('command')}`, not of `lkd distill`")
    distilled = make_recipe(DistillRecipe, saved["recipe"])
    if GIVEN in (distilled.data.name[: len(GIVEN)], distilled.teacher.path[: len(GIVEN)]):
        raise UserError(f"run_dir: {folder} was trained with objects that Python gave, which no file keeps")
    parts = build(distilled)
    student, header = load_network(folder / "student.safetensors")
    check_network(str(folder / "student.safetensors"), header["architecture"], parts.images.train)
    loss, images = parts.loss.to(device), parts.images
    if loss.needs_index or any(parameter.requires_grad for parameter in loss.parameters()):
        raise UserError(
            f"run_dir: {folder} was trained with a loss whose memory or adapters no file keeps; take a run without them"
        )
    teacher = prepare_teacher(parts.teacher, images, device, loss.teacher_stages)
    student = fit_to_images(str(folder / "student.safetensors"), student, header, images.train)
    student = freeze_stages(student.to(device).eval().requires_grad_(True), distilled.student.freeze).eval()
    if loss.reads_trust:
        known = select_labelled(images, distilled.labelled_size)
        loss.set_trust(measure_teacher(parts.teacher, known, device, teacher))
        loss.update_trust(student)
    images = label_by_teacher(images, distilled.labelled_size, teacher, device)
    train = dataclasses.replace(distilled.train, batch_size=recipe.batch_size)
    batches = build_batches(images.train, train, distilled.data, 1, device)
    parameters = [parameter for parameter in student.parameters() if parameter.requires_grad]
    halves = [GradientMoments(), GradientMoments()]
    for step in range(recipe.samples):
        batch = batches.at(step)
        terms = split_terms(loss(student(batch.images), teacher(batch), batch.target, 1.0))
        task, distillation = (take_gradient(term, parameters) for term in terms)
        halves[step % 2].add(task, task - distillation)
    return halves


def measure_noise(moments: GradientMoments, share: float, horizon: float) -> float:
    """N(λ) / N(0)."""
    noise, together, control = moments.covariances()
    bias = (1 + horizon) * moments.squared_bias()
    return (noise - 2 * share * together + share**2 * (control + bias)) / noise if noise else 1.0


def plot_variance(result: dict[str, Any], path: Path) -> None:
    """Draw predicted and measured noise against λ."""
    figure = Figure(figsize=(5.5, 3.6), layout="constrained")
    axis = figure.subplots()
    axis.plot(result["shares"], result["predicted"], label="predicted from one half of the mini-batches")
    axis.plot(result["shares"], result["measured"], "o", ms=4, label="measured on the other half")
    axis.axvline(min(max(result["optimal_share"], 0), 1), color="0.6", ls=":", label="λ*")
    axis.set_xlabel("share of the teacher, λ")
    axis.set_ylabel("noise of the gradient, N(λ) / N(0)")
    axis.legend(frameon=False, fontsize=8)
    save_figure(figure, path)
