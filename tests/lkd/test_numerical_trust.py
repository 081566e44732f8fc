"""Every loss in float32 against itself in float64 where numbers are extreme; equal bits whoever computes them."""

import copy
import csv
from pathlib import Path

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from lkd.cli import main
from lkd.core.errors import UserError
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import digest
from lkd.losses import LearnedLoss
from lkd.losses.build import LOSSES, build_loss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.forms import FORMS

STAGES = {"a": (4, 6, 6), "b": (6, 3, 3)}
WITH_TEMPERATURE = ("kd", "dkd", "dist")
LEARNED = (*FORMS, "features")
MEASURED = {"seconds", "steps_per_second", "peak_mib", "cpu_seconds"}  # of the machine
LEAST = {"dist": 3, "rkd": 3, "sp": 2}  # images that these cannot do without, and say so


def build(name: str, temperature: float) -> nn.Module:
    """A loss by its name; the learned ones with weights away from where they start."""
    if name in LOSSES:
        options = {"temperature": temperature} if name in WITH_TEMPERATURE else {}
        if name == "logit_standardization":
            options = {"loss": {"name": "kd", "temperature": temperature}}
        return build_loss({"name": name, **options}, STAGES, STAGES)
    loss = LearnedLoss({"part": FeatureLoss(hidden=4) if name == "features" else FORMS[name](hidden=4)})
    generator = torch.Generator().manual_seed(0)
    for parameter in loss.parameters():
        parameter.data.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    return loss


def draw(scale: float, classes: int, batch: int, seed: int, dense: bool) -> tuple[Outputs, Outputs, Tensor]:
    """Logits whose largest is `scale` in float64, features, and a target."""
    generator = torch.Generator().manual_seed(seed)

    def outputs() -> Outputs:
        logits = torch.randn(batch, classes, generator=generator, dtype=torch.float64)
        logits = (scale * logits / logits.abs().max()).float().double()  # a float32 both can hold
        features = {n: torch.randn(batch, *shape, generator=generator).double() for n, shape in STAGES.items()}
        return Outputs(logits, features)

    target = torch.randint(classes, (batch,), generator=generator)
    if dense:
        target = torch.randn(batch, classes, generator=generator, dtype=torch.float64).softmax(1)
    return outputs(), outputs(), target


def compute(loss: nn.Module, student: Outputs, teacher: Outputs, target: Tensor, dtype: torch.dtype):
    """The loss's terms and its gradient at the logits, with everything in one dtype."""
    loss = copy.deepcopy(loss).to(dtype)
    ours, theirs = (
        Outputs(o.logits.to(dtype), {n: f.to(dtype) for n, f in o.features.items()}) for o in (student, teacher)
    )
    ours.logits.requires_grad_()
    target = target.to(dtype) if target.is_floating_point() else target
    terms = loss(ours, theirs, target, 0.5)
    (gradient,) = torch.autograd.grad(sum(terms.values()), ours.logits)
    return {name: term.detach().double() for name, term in terms.items()}, gradient.double()


@pytest.mark.parametrize("name", [*LOSSES, *LEARNED])
@settings(max_examples=8, deadline=None, derandomize=True, database=None, phases=[Phase.generate])
@given(
    scale=st.sampled_from([0.0, 1e-3, 1.0, 30.0, 1e3, 1e4]),
    temperature=st.sampled_from([0.05, 1.0, 4.0, 100.0]),
    classes=st.sampled_from([2, 3, 10, 1000, 21_841]),
    batch=st.sampled_from([1, 3]),
    seed=st.integers(0, 99),
    dense=st.booleans(),
)
def test_float32_is_float64_but_for_its_roundings(name, scale, temperature, classes, batch, seed, dense) -> None:
    loss = build(name, temperature)
    inputs = draw(scale, classes, batch, seed, dense)
    if classes == 2 and name == "logit_standardization":
        with pytest.raises(UserError, match="of two classes"):
            compute(loss, *inputs, torch.float32)
        return
    if batch < LEAST.get(name, 1):
        with pytest.raises(UserError, match=f"a batch of {batch} has too few"):
            compute(loss, *inputs, torch.float32)
        return
    (narrow, narrow_gradient), (wide, wide_gradient) = (
        compute(loss, *inputs, dtype) for dtype in (torch.float32, torch.float64)
    )
    # One rounding of a logit over τ, times the factors of the terms: τ² at most 10⁴, their weights at most 10.
    # DIST's correlations are of what is left of probabilities less their mean: nearly equal ones cancel.
    cancelled = temperature / scale if name == "dist" and scale else 1.0
    rounding = 2**-23 * max(scale / temperature, cancelled, 1.0) * max(temperature, 1.0) ** 2 * 100
    for term, value in wide.items():
        assert bool(value.isfinite()), term
        assert abs(narrow[term] - value) <= rounding + 1e-4 * abs(value), term
    assert bool(wide_gradient.isfinite().all())
    largest = wide_gradient.abs().max()
    assert (narrow_gradient - wide_gradient).abs().max() <= rounding + 1e-3 * largest


@pytest.mark.parametrize("name", [*LOSSES, *LEARNED])
def test_a_batch_of_no_images_is_refused_alike(name: str) -> None:
    inputs = draw(1.0, 10, 3, 0, False)
    student, teacher = (Outputs(o.logits[:0], {n: f[:0] for n, f in o.features.items()}) for o in inputs[:2])
    with pytest.raises(UserError, match="the batch is empty"):
        build(name, 4.0)(student, teacher, inputs[2][:0], 0.5)


TINY = ["--data.train_size", "200", "--data.meta_validation_size", "100", "--device", "cpu", "--threads", "1"]
TINY += ["--train.epochs", "1", "--train.batch_size", "20"]


def test_another_seed_gives_another_student() -> None:
    words = ["distill", *TINY, "--data.augmentation", "flip_and_crop"]
    for seed in ("3", "4"):
        assert main([*words, "--seed", seed, "--run_dir", seed]) == 0
    one, other = (digest(load_file(Path(seed, "student.safetensors"))) for seed in ("3", "4"))
    assert one != other


def test_one_and_two_workers_fill_the_same_cells() -> None:
    methods = ["--methods", "{CE: cross_entropy, KD: {name: kd, weight: 0.5}}", "--seeds", "2"]
    methods += ["--baseline", "CE", "--tuning_trainings", "1", "--students", "[{name: tiny_cnn}]"]
    for workers in ("1", "2"):
        assert main(["compare", *TINY, *methods, "--workers", workers, "--run_dir", f"w{workers}"]) == 0
    tables = [list(csv.DictReader(Path(f"w{workers}/cells.csv").read_text().splitlines())) for workers in "12"]
    assert len(tables[0]) == 4
    for one, two in zip(*tables, strict=True):
        assert {k: v for k, v in one.items() if k not in MEASURED} == {
            k: v for k, v in two.items() if k not in MEASURED
        }
