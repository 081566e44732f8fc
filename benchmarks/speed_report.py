"""The figures of docs/evidence/speed: every script of it records its own, and the page is written from all of them."""

import math
from pathlib import Path

from lkd.core.files import environment, read_mapping, write_json, write_text
from lkd.tracking.run import evidence

OUT = Path(__file__).parents[1] / "docs" / "evidence" / "speed"
ROWS: list[tuple[str, str, str, str]] = [  # what is measured, its goal, the figure, the script
    ("start of a run on 1.28 million images in shards, index kept, seconds", "≤ 5", "index_seconds_1m", "start_speed"),
    ("the first start, which makes the index, seconds", "–", "index_made_seconds_1m", "start_speed"),
    ("learned loss ÷ KD, eager, 1,000 classes", "≤ 2", "logit_loss_vs_kd_c1000", "loss_speed"),
    ("learned loss ÷ KD, eager, 10 classes", "≤ 2.5", "logit_loss_vs_kd_c10", "loss_speed"),
    ("operators of the learned loss, without views (KD: 34)", "≤ 80", "logit_loss_operators", "loss_speed"),
    ("learned loss ÷ KD, both compiled, 1,000 classes", "≤ 1.5", "logit_loss_compiled_vs_kd", "loss_speed"),
    ("recompilations over a training", "0", "recompilations", "loss_speed"),
    ("a step with `both` ÷ logits alone, small_cnn", "≤ 1.5", "both_vs_logits_small_cnn", "features_speed"),
    ("the same, ResNet-50 → MobileNet V1", "≤ 1.1", "both_vs_logits_resnet50_mobilenetv1", "features_speed"),
    ("exact `adjoint` ÷ higher, time, ResNet-8, K = 5", "≤ 0.75", "adjoint_time_vs_higher", "adjoint_speed"),
    ("the same, memory, K = 20", "≤ 0.1", "adjoint_memory_vs_higher", "adjoint_speed"),
    ("the same, FLOPs, K = 5", "–", "adjoint_flops_vs_higher", "adjoint_speed"),
    ("`first_order` compiled ÷ higher, K = 20", "≤ 0.38", "compiled_first_order_vs_higher", "hypergradient"),
    ("images a second and core ÷ timm's `create_loader`", "≥ 2", "loader_vs_timm", "loader_speed"),
    ("`lkd meta-train`, default, in trainings of a student", "≤ 15", "meta_train_trainings", "meta_train_speed"),
    ("its seconds on two cores, alone", "≤ 80", "meta_train_seconds", "meta_train_speed"),
    ("its processor seconds", "–", "meta_train_processor_seconds", "meta_train_speed"),
    ("a loss by it in five settings − one that took 41, the worst", "≥ 0", "reuse_minus_today_worst", "evidence/run"),
    ("the same + 2 standard errors", "≥ 0", "reuse_minus_today_worst_plus_2_se", "evidence/run"),
    ("`both` learned − logits learned, clean labels, points", "≥ 0.3", "both_gain", "evidence/run"),
    ("its standard error, 10 seeds", "–", "both_gain_se", "evidence/run"),
    (
        "universal loss over features too − over logits, six worlds, points",
        "≥ 0.2",
        "universal_features_gain",
        "features",
    ),
    ("the same before the features' part learned", "–", "universal_features_not_learned_gain", "features"),
]
PAGE = """# Speed, measured

`python benchmarks/SCRIPT.py` measures; what is compared is run in turn in one process. Medians.

| | goal | measured | script |
|---|---|---|---|
{table}

**Start.** Finding the images and splitting them, processor time on one thread; wall time is in `start_time.csv`, of a
machine with 15 other processes on two cores. Members are of a few bytes and nothing is decoded; the headers that are
read to make the index are as many as of real images. The split by class took 50 seconds of every start, a pass over all
labels for each class; it is one sort now, with the same result.

**The learned loss.** Forward and backward of the loss that ships, told trust: 256 images, one CPU thread, processor
time, medians of 25. With 1,000 classes, passes over all classes are most of the time; their derivatives are in closed
form. What is left are five log-softmaxes where KD takes three: both networks at τ = 1, the teacher also at its best
temperature, and both at the sample's τ without the target. With 10 classes the time is that of calling operators:
{loss_operator_us:.1f} µs each for the learned loss, {kd_operator_us:.1f} µs for KD. Most are over [images] or scalars:
the network and its inputs, α, τ, β, κ, what is told of trust. torch.compile fuses them. It makes one more graph at the
second value of a number of progress, and none after it; where progress is a tensor it makes one.

**Features.** Of {features_both_ms:.0f} ms that the loss of `both` takes in a step of small_cnn (64 images, 3 × 3 pairs
of stages; the step with logits alone takes {logits_step_ms:.0f} ms), the comparisons of stages take
{features_compare_ms:.1f}, the network over entries {features_entries_ms:.1f}, forward and backward; all in
{features_operators:.0f} operators (`features_parts.csv`). The comparisons were 334 operators, they are 178: what two
of them share is computed once, and stages are normalised together. At 1.5 all of the features would have to fit into
half a step of small_cnn, {logits_step_ms:.0f} ms / 2; the network over entries alone, with 8 hidden units over 55,000
entries, takes more than that. Where the networks are larger (4 images of 224 pixels at a time), the goal is met. One
loss for many worlds does not gain by them: learned over six worlds beside the universal loss over logits, they cost
{universal_features_cost:.1f} ± {universal_features_gain_se:.1f} points in six held-out worlds
([table](../universal/table.md), [how](../universal/tried.md)); so none ships.

**Learning.** Of {meta_train_trainings:.1f} trainings {meta_train_outer_steps_trainings:.1f} are rollouts,
{meta_train_reuse_trainings:.1f} looks at reuse, {meta_train_pool_trainings:.1f} the pool; on another machine it took
14.5 trainings and 86.7 seconds. The saving has a price: over
five settings ([all](../learned_loss)) the loss is {reuse_minus_today_mean:.2f} points beside that of 41 trainings, and
in one, with 40 % of the labels flipped, more than two standard errors under it. Over features too no look was better
than the start, which is kept, so that the {both_gain:.2f} ± {both_gain_se:.2f} points are of its form alone.

**Exact hypergradients.** A convolution has a forward pass and two backward passes; their double backward takes six.
So a step costs higher nine, and an adjoint that keeps no activations twelve, since it takes the gradient twice:
{adjoint_flops_vs_higher:.2f} times the FLOPs as counted (the last segment is taken once). Exact, flat memory and 0.75
of higher's time do not go together; `first_order`, with six, takes half of it. Forward over reverse (jvp of
the gradient) takes as many convolutions, {forward_over_reverse_flops_vs_higher:.2f} times higher's FLOPs, and its time
over higher's is {forward_over_reverse_time_vs_higher:.2f} on ResNet-8 (`adjoint` {adjoint_time_vs_higher:.2f}),
{forward_over_reverse_time_vs_higher_perceptron:.1f} on a perceptron with LayerNorm
({adjoint_time_vs_higher_perceptron:.2f}) and {forward_over_reverse_time_vs_higher_transformer:.1f} on a transformer
({adjoint_time_vs_higher_transformer:.2f}): torch's tangents of fused operators run unfused. It is nowhere faster, so
the package does not have it. Compiled, the convolutions of `first_order` alone take
{convolutions_compiled_vs_higher:.2f} of higher's time.

**Loading.** An image takes {loader_ms_an_image:.2f} ms of a core, timm's {timm_ms_an_image:.2f}: decoding
{loader_decode_ms:.2f}, of which libjpeg-turbo {loader_libjpeg_ms:.2f}; cutting, scaling and flipping
{loader_cut_ms:.2f}. At twice timm's rate it would take {loader_goal_ms:.2f}: what is left after decoding would have to
be done in {loader_left_ms:.2f}. Cutting, scaling and the copy are then all that could be gained; a decoder that skips
what is cut off, or scales while it decodes, gives other pixels. Measured on two cores with nothing else to do; earlier,
on another machine, the ratio was 1.76 ([loader](../imagenet/loader)).
"""


def record(out: Path, figures: dict[str, float]) -> None:
    """Add a script's figures to result.json, and write the page anew."""
    path = out / "result.json"
    known = read_mapping(path)["figures"] if path.exists() else {}
    known |= {key: round(value, 4) for key, value in figures.items()}
    write_json(path, evidence("python benchmarks/SCRIPT.py", environment(), known))
    timm, decode = known.get("timm_ms_an_image", math.nan), known.get("loader_decode_ms", math.nan)
    more = {
        "universal_features_cost": -known.get("universal_features_gain", math.nan),
        "loader_goal_ms": timm / 2,
        "loader_left_ms": timm / 2 - decode,
    }
    table = [f"| {what} | {goal} | {known[key]:.4g} | `{script}` |" for what, goal, key, script in ROWS if key in known]
    write_text(out / "README.md", PAGE.format_map(Known(known, table="\n".join(table), **more)))


class Known(dict[str, object]):
    """Figures, NaN for what is not measured."""

    def __missing__(self, key: str) -> float:
        return math.nan
