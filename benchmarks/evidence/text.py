"""The text of docs/evidence/learned_loss, around tables that are computed."""

GOALS: dict[str, tuple[str, float, bool]] = {
    "worst_gap_over_settings": ("worst gap over four settings (not clean) to the best hand-made loss", -0.3, True),
    "mean_gain_over_settings": ("mean gain over the four settings", 0.0, True),
    "mean_gain_over_fixed_default": ("mean gain over KD(0.5, 4), one for all four", 2.0, True),
    "gain_same_student": ("gain, student and data as in meta-training", 0.5, True),
    "gain_same_student_in_se": ("the same in standard errors", 2.0, True),
    "gain_unseen_student": ("gain, student never seen", 0.3, True),
    "gain_other_teacher": ("gain, another teacher", 0.3, True),
    "other_data_minus_kd": ("digits, against tuned KD", 0.0, True),
    "bad_teacher_minus_ce": ("bad teacher, against cross-entropy", -0.1, True),
    "cost_in_trainings": ("cost of learning, in trainings of the student", 5.0, False),
}
"""Figure → in words, the goal, and whether the figure is to be at least (or at most) that."""

README = """# Do learned losses pay?

Made by `{command}`. Full Fashion-MNIST: 4,000 labelled training
images, 8,000 for meta-validation, the 10,000 test images; the teacher (93.4 % on meta-validation) was trained on the
other 48,000 images. Losses are learned with one recipe, the defaults of `lkd meta-train`, and then frozen. KD, DKD and
DIST have {budget} trainings each to pick their options and learning rate on meta-validation; cross-entropy,
KD(0.5, 4) and the learned losses only have their learning rate picked, out of three. Test accuracy of fresh students,
percent, last epoch, mean ± standard error over {seeds} paired seeds. *Gain* is the paired difference to the best
hand-made loss of the row, which is picked by the reported numbers themselves: that favours it. *Not learned* is the
loss that learning starts from: DKD(β = 1, τ = 2) with its teacher ramped up over 60 % of the training, a fixed loss of
our own that is not counted as a rival; *learned* − *not learned* is what learning did.
*Learned, K = 100* was made by the defaults of version 0.1, which cost 41 trainings (30 outer steps of rollouts of 100
steps, exact hypergradients, four looks at three students). Its rows and those of hand-made losses are older than those
of *learned*, and of a CPU of another kind; images, seeds and the embedded teacher are the same. The other teacher and
that of the digits were trained anew for *learned*, by the same recipes.

{goals}

## Settings in which the best hand-made weight changes sign

![Every loss in every setting](settings.png)

{settings}
The last two rows are of {fewer} seeds, against cross-entropy and KD only.

## Other students, teachers, data

![Gains over the best hand-made loss](gains.png)

{transfer}
*learned* is the loss over logits learned with small_cnn on clean labels; the columns to the right reuse the same file.
*learned on other data*: learned on 8,000 images of which no student here is trained on any. Digits: scikit-learn's,
scaled up, 200 labels, a teacher trained on 597 others; here the gain over KD is asked for, and the gain over all
hand-made losses is in `result.json`.

## Features too

A loss over logits and features (`--meta.kind both`), clean labels, the student that it was learned with.

{both}
## Cost

In units of one training of the same student with the same loss. A look at reuse trains two fresh students, and the loss
of the best look is saved; that was the one before learning with: {initial}.

{costs}
## What was learned

![Weight and temperature, clean labels](learned-clean.png)

Clean labels; the others: [noisy labels](learned-noisy_labels.png), [bad teacher](learned-bad_teacher.png),
[few labels](learned-few_labels.png), [tiny student](learned-tiny_student.png).

{learned}
What was tried on the way, with numbers, is in [tried.md](tried.md). What this does not show: larger images and
networks; more than one meta seed for each loss (the spread of a loss over meta seeds is part of every gain here, but is
not in its standard error); more than one draw of the labelled images. The test images are the same for every seed.

Folders: `cells.csv` of each comparison, every seed with the options that were picked.
"""


def tabulate_goals(figures: dict[str, float]) -> str:
    """Every goal, what was measured, and whether it is met."""
    lines = ["| | goal | measured | |", "|---|---|---|---|"]
    for name, (words, goal, at_least) in GOALS.items():
        value = figures[name]
        met = value >= goal if at_least else value <= goal
        sign = "≥" if at_least else "≤"
        cells = (words, f"{sign} {goal:g}".replace("-", "−"), f"{value:.2f}".replace("-", "−"))
        lines.append(f"| {' | '.join(cells)} | {'met' if met else '**missed**'} |")
    return "\n".join(lines)
