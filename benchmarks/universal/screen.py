"""Learn over whole trainings what rollouts are too short to show: a designed experiment.

python benchmarks/universal/screen.py DATA RUN_DIR START.lkd.safetensors [--pairs 150] [--workers 2] [--worth SCREENED]

In each pair of trainings, of one learning world and one seed, every factor of `FACTORS` is turned up or down at random
in the first and the other way in the second; so is the part of what START learned that counts, around half. Half
of their difference in accuracy on meta-validation is regressed on the signs, and on their products with what is told of
the world's teacher and labels (response surfaces: Box, Wilson, 1951). Coefficients have a normal prior, and the loss
takes a step along them: RUN_DIR/screened.lkd.safetensors, with the factors' table in its provenance. Worlds whose
teacher is so weak that nothing learned counts are left out. Goes on with what an earlier call left; the test split is
not read. With --worth nothing is trained: what the factors are worth is that of SCREENED, a loss that was made so.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from run import HERE, Arm, Planned, Record, build_recipe, measure, read_worlds
from ship import shrink
from tabulate import tabulate

from lkd.config.evaluation import CompareRecipe
from lkd.core.workers import start_workers
from lkd.evaluation.comparison.trials import Trial
from lkd.losses.learned.file import LossFile, build_loss_from, read_provenance, save_loss
from lkd.losses.learned.networks import name_sample_inputs, trust_inputs

WORTH = 0.3  # points that a factor must be worth for the whole step
PRIORS = (0.2, 0.1)  # standard deviation of a factor's worth, and of how it changes with what is told of a world
TOLD = ("images per class", "validation agreement", "agreement difference")


class Factor(NamedTuple):
    """What is turned up or down by `size`.

    Attributes:
        answer: Of the network: 0 for α, 1 for τ, 2 for β, 3 for κ; None for the length of the ramp.
        size: How far, before the sigmoid or tanh; of the ramp, a part of the training; of what was learned, a part.
        column: What of a sample or of the training it is proportional to; "" for nothing, `LEARNED` for what the
            network adds to its first answer.
        centre: The value of that at which it does nothing.
    """

    answer: int | None
    size: float
    column: str = ""
    centre: float = 0.0


LEARNED = "what was learned"
FACTORS = {
    "α": Factor(0, 0.6),
    "τ": Factor(1, 0.8),
    "β": Factor(2, 0.35),
    "κ": Factor(3, 1.5),
    "ramp": Factor(None, 0.25),
    "α as learned": Factor(0, 0.5, LEARNED),
    "τ as learned": Factor(1, 0.5, LEARNED),
    "β as learned": Factor(2, 0.5, LEARNED),
    "κ as learned": Factor(3, 0.5, LEARNED),
    "α by progress": Factor(0, 0.8, "progress", 0.5),
    "τ by progress": Factor(1, 0.8, "progress", 0.5),
    "β by progress": Factor(2, 0.5, "progress", 0.5),
    "α by teacher's lead": Factor(0, 1.5, "teacher's lead", 0.2),
    "β by teacher's lead": Factor(2, 0.9, "teacher's lead", 0.2),
    "α by calibrated target probability": Factor(0, 0.5, "calibrated target probability"),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("start", type=Path)
    parser.add_argument("--pairs", type=int, default=150)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worth", type=Path, metavar="SCREENED", help="take the step of this loss, without trainings")
    options = parser.parse_args()
    folder = options.run_dir.resolve()
    worlds, (rate,) = read_worlds(HERE / "learning_worlds.yaml", options.data)
    recipes = {name: build_recipe(folder / name, world, rate) for name, world in worlds.items()}
    start = LossFile.read(options.start).build().parts["logits"]
    told = {}
    for name, recipe in recipes.items():
        start.trust.copy_(torch.tensor(measure(recipe)))
        if float(start.find_learned_part(torch.zeros(1))) > 0:
            told[name] = describe_world(start)
    chance = np.random.default_rng(0)
    signs = chance.choice([-1, 1], size=(options.pairs, len(FACTORS)))
    places = [str(chance.choice(list(told))) for _ in range(options.pairs)]
    features, centre, spread = standardize([told[place] for place in places])
    if options.worth:
        worth, errors = read_worth(options.worth)
    else:
        plans = [
            plan_pair(folder, options.start, recipes[place], number, row)
            for number, (place, row) in enumerate(zip(places, signs, strict=True))
        ]
        record = Record(folder)
        with start_workers(options.workers) as workers:
            record.finish(workers, [each for pair in plans for each in pair])
        scores = np.array([[record.score([each]) for each in pair] for pair in plans])
        worth, errors = regress(signs, features, (scores[:, 0] - scores[:, 1]) / 2)
    print(format_worth(worth, errors))
    step = np.clip(worth / WORTH, -1, 1)
    step[list(FACTORS).index("ramp")] = 0  # it would stay moved under the weak teachers that were left out
    by_told = step[:, 1:] / spread  # of what is told, as it is
    moves = np.column_stack([step[:, 0] - by_told @ centre, by_told])
    provenance = read_provenance(options.start) | {
        "screened": {
            "pairs": options.pairs,
            "worth": dict(zip(FACTORS, worth.round(3).tolist(), strict=True)),
            "errors": dict(zip(FACTORS, errors.round(3).tolist(), strict=True)),
        },
        "learned": True,
    }
    save_moved(options.start, folder / "screened.lkd.safetensors", moves, provenance)
    return 0


def describe_world(form: Any) -> list[float]:
    """What a form is told of a world, as it sees it: `TOLD`."""
    names = [name for name in name_sample_inputs(form.conditioning) if not name.startswith("mean of ")]
    seen = trust_inputs(form.trust, form.conditioning).tolist()
    of_trust = dict(zip(names[-len(seen) :], seen, strict=True))
    return [of_trust[name] for name in TOLD]


def plan_pair(folder: Path, start: Path, recipe: CompareRecipe, number: int, signs: Any) -> Planned:
    """Two trainings, whose losses are moved in opposite directions."""
    planned = []
    for label, direction in (("up", signs), ("down", -signs)):
        path = folder / "candidates" / f"{number:03}-{label}.lkd.safetensors"
        moves = np.column_stack([direction, np.zeros((len(FACTORS), len(TOLD)))])
        save_moved(start, path, moves, {"learned": True})
        trial = Trial(f"pair {number:03} {label}", str(path), recipe.students[0], 1000 + number, False)
        planned.append((recipe, trial, Arm(str(path))))
    return planned


def save_moved(start: Path, path: Path, moves: Any, provenance: dict[str, Any]) -> None:
    """Write a loss whose factors are moved: by a constant, and in proportion to `TOLD`; [factors, 1 + told] sizes.

    But for an answer's own constant, factors do not depend on what is told: nothing in the form would make them.
    """
    file = LossFile.read(start)
    arguments = file.header["architecture"]["parts"]["logits"]["arguments"]
    constants = dict(zip(FACTORS, moves[:, 0].tolist(), strict=True))
    length = arguments["warmup"] + FACTORS["ramp"].size * constants["ramp"]
    arguments["warmup"] = min(max(length, 0.02), 1.0)
    loss = file.build()
    of_learned = [(each.size, constants[name]) for name, each in FACTORS.items() if each.column == LEARNED]
    shrink(loss, build_loss_from(file.header["architecture"]), [0.5 + size * move for size, move in of_learned])
    body = loss.parts["logits"].body
    names = name_sample_inputs(loss.parts["logits"].conditioning)
    with torch.no_grad():
        for factor, (constant, *by_told) in zip(FACTORS.values(), moves.tolist(), strict=True):
            if factor.answer is None or factor.column == LEARNED:
                continue
            if factor.column:
                body.linear.weight[factor.answer, names.index(factor.column)] += factor.size * constant
                body.head.bias[factor.answer] -= factor.size * constant * factor.centre
                continue
            body.head.bias[factor.answer] += factor.size * constant
            for name, move in zip(TOLD, by_told, strict=True):
                body.linear.weight[factor.answer, names.index(name)] += factor.size * move
    path.parent.mkdir(parents=True, exist_ok=True)
    save_loss(path, loss, provenance)


def read_worth(path: Path) -> tuple[Any, Any]:
    """What the factors of a screened loss were worth, and deviations; as `regress` returns them."""
    screened = read_provenance(path)["screened"]
    worth, errors = (np.array([screened[part][name] for name in FACTORS]) for part in ("worth", "errors"))
    return worth, errors


def standardize(rows: list[list[float]]) -> tuple[Any, Any, Any]:
    """What is told of each pair's world, with mean 0 and deviation 1 over the pairs; and both."""
    values = np.array(rows)
    centre, spread = values.mean(0), values.std(0)
    return (values - centre) / spread, centre, spread


def regress(signs: Any, features: Any, halves: Any) -> tuple[Any, Any]:
    """What each factor is worth, and how that changes with what is told; and deviations; [factors, 1 + told] each.

    Bayesian linear regression, with the noise that the residuals show. Only an answer's constant may change with what
    is told: another change could not be put into the form.
    """
    plain = [factor.answer is not None and not factor.column for factor in FACTORS.values()]
    changing = [index for index, is_plain in enumerate(plain) if is_plain]
    columns = [signs[:, index] for index in range(len(FACTORS))]
    columns += [signs[:, index] * feature for index in changing for feature in features.T]
    design = np.column_stack(columns).astype(float)
    prior = np.array([PRIORS[0]] * len(FACTORS) + [PRIORS[1]] * (len(columns) - len(FACTORS)))
    noise = float(np.var(halves))
    for _ in range(20):
        covariance = np.linalg.inv(design.T @ design / noise + np.diag(prior**-2.0))
        mean = covariance @ design.T @ halves / noise
        freedom = max(len(halves) - float(np.trace(design @ covariance @ design.T)) / noise, 1.0)
        noise = float(((halves - design @ mean) ** 2).sum()) / freedom
    worth, errors = (np.zeros((len(FACTORS), 1 + len(TOLD))) for _ in range(2))
    deviations = np.sqrt(np.diag(covariance))
    worth[:, 0], errors[:, 0] = mean[: len(FACTORS)], deviations[: len(FACTORS)]
    for number, index in enumerate(changing):
        place = slice(len(FACTORS) + number * len(TOLD), len(FACTORS) + (number + 1) * len(TOLD))
        worth[index, 1:], errors[index, 1:] = mean[place], deviations[place]
    return worth, errors


def format_worth(worth: Any, errors: Any) -> str:
    """A row for each factor."""
    rows = [
        [name, *(f"{value:+.2f} ± {error:.2f}" if error else "" for value, error in zip(*pair, strict=True))]
        for name, *pair in zip(FACTORS, worth, errors, strict=True)
    ]
    return tabulate(
        rows, ["factor", "points", *(f"by {name}" for name in TOLD)], tablefmt="github", disable_numparse=True
    )


if __name__ == "__main__":
    raise SystemExit(main())
