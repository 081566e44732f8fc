"""Is there a signal in the hypergradients, or only chaos? By world, length of rollout, and how often it sees an image.

python benchmarks/universal/hypergradient_noise.py DATA POOL_DIR [--worlds clean,few-500,...] [--repeats 8]

DATA holds the data sets and teachers (README.md), POOL_DIR the pools of `configs/universal.yaml` (its run's `pool`).
Each row: CPU-seconds of a rollout; the median and the largest norm of the hypergradient before learning; the mean
cosine between two of them, from other students and batches; and, of the outputs for α and β, the mean derivative of the
outer loss over its standard error, each hypergradient clipped to norm 1: above 0 less of it is better.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml
from tabulate import tabulate

from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parse import make_recipe
from lkd.meta_training.outer_loop import OuterLoop
from lkd.meta_training.worlds import build_loss_networks, open_given_pools, open_worlds, prepare_worlds
from lkd.tracking.run import open_run
from lkd.training.build import NOTHING

RECIPE = Path(__file__).parents[2] / "configs/universal.yaml"
ROLLOUTS = ((100, 13), (100, 5), (50, 5), (30, 5), (30, 2))
HEAD = "parts.logits.body.perceptron.4.bias"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("pool_dir", type=Path)
    parser.add_argument("--worlds", default="clean,few-500,flipped,random,weak,glyphs,glyphs-weak")
    parser.add_argument("--repeats", type=int, default=8)
    options = parser.parse_args()
    names = options.worlds.split(",")
    text = RECIPE.read_text().replace("DATA/", f"{options.data.resolve()}/")
    content = yaml.safe_load(text)
    needed = {*names, *(content["worlds"][name].get("of") for name in names)}
    content["worlds"] = {name: world for name, world in content["worlds"].items() if name in needed}
    del content["draw"]
    content["data"]["root"], content["pool_dir"] = str(options.data), str(options.pool_dir)
    content["meta"] |= {"students_per_step": 0, "hide_trust": 0.0}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        recipe = make_recipe(MetaTrainRecipe, content | {"run_dir": folder, "device": "cpu"})
        with open_run(recipe, "meta-train") as run:
            opened = open_worlds(recipe, run, NOTHING)
            loss = build_loss_networks(recipe, opened)
            for parameter in loss.parameters():  # the last layers are born zero: let all weights have a derivative
                parameter.data += 0.05 * torch.randn_like(parameter) * (parameter.ndim == 2 and not parameter.any())
            pools = open_given_pools(recipe, opened)
            loop = OuterLoop(prepare_worlds(opened, loss, run), pools, loss, recipe.meta, recipe.pool)
    rows = []
    for place, world in enumerate(loop.worlds):
        for steps, epochs in ROLLOUTS if world.name in names else ():
            loop.settings = replace(recipe.meta, rollout_steps=steps, rollout_epochs=epochs)
            rows.append([world.name, steps, epochs, *measure(loop, place, options.repeats)])
    heads = ["world", "K", "times each image", "s", "norm", "largest", "cosine", "α", "β"]
    print(tabulate(rows, heads, tablefmt="github", floatfmt=("", "", "", ".1f", ".2g", ".2g", ".2f", "+.1f", "+.1f")))
    return 0


def measure(loop: OuterLoop, place: int, repeats: int) -> list[float]:
    """Seconds, median and largest norm, mean cosine, and how many errors from 0 the derivatives by α and β are."""
    flat, norms, heads = [], [], []
    started = time.process_time()
    for loop.step in range(repeats):
        hypergradient = loop.estimator(loop.build_problem(place))
        norms.append(float(hypergradient.norm))
        flat.append(torch.cat([gradient.flatten() for gradient in hypergradient.grads.values()]).double() / norms[-1])
        heads.append(hypergradient.grads[HEAD].double() / max(norms[-1], 1.0))
    seconds = (time.process_time() - started) / repeats
    gram = torch.stack(flat) @ torch.stack(flat).T
    cosine = (gram.sum() - repeats) / (repeats * (repeats - 1))
    head = torch.stack(heads)
    errors = head.mean(0) / (head.std(0) / repeats**0.5)
    return [seconds, statistics.median(norms), max(norms), float(cosine), float(errors[0]), float(errors[2])]


if __name__ == "__main__":
    raise SystemExit(main())
