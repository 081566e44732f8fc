"""Learn the universal loss without a part of it, for each variant of ablations.yaml.

python benchmarks/universal/ablate.py DATA RUN_DIR [--only VARIANTS] [--pool_dir DIR]

Goes on with what an earlier call left. DIR holds pools of `configs/universal.yaml`, which are built anew if left out.
Prints the call of `run.py` that trains students with the losses.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from lkd.config.meta_training import MetaTrainRecipe
from lkd.config.parse import make_recipe, merge
from lkd.core.workers import finish_all, start_workers
from lkd.meta_training.meta_train import meta_train
from lkd.tracking.run import open_run

HERE = Path(__file__).parent
RECIPE = HERE.parents[1] / "configs/universal.yaml"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--only", default=".*", help="variants whose whole names match")
    parser.add_argument("--pool_dir", type=Path)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    content = yaml.safe_load((HERE / "ablations.yaml").read_text())
    losses = {}
    with start_workers(options.workers) as workers:
        jobs = {}
        for name, variant in content["variants"].items():
            if re.fullmatch(options.only, name):
                folder = options.run_dir.resolve() / name.replace(" ", "-")
                recipe = build_recipe(content, variant, options.data.resolve(), folder, options.pool_dir)
                losses[name] = folder / "loss.lkd.safetensors"
                if not losses[name].exists():
                    jobs[workers.submit(learn, recipe)] = name
        finish_all(jobs, lambda name, _: f"  {name}", "meta-trainings")
    arms = " ".join(f"--loss '{name}={path}'" for name, path in losses.items())
    pattern = "|".join(map(re.escape, losses))
    script = "python benchmarks/universal/run.py"
    print(f"{script} {options.data} RUN_DIR --seeds 3 --only '{content['held_out']}' --arms '{pattern}' {arms}")
    return 0


def build_recipe(
    content: dict[str, Any], variant: dict[str, Any], data: Path, folder: Path, pool_dir: Path | None
) -> MetaTrainRecipe:
    """The recipe of a variant."""
    whole = yaml.safe_load(RECIPE.read_text().replace("DATA/", f"{data}/"))
    if names := variant.get("worlds", content["worlds"]):
        bases = {whole["worlds"][name].get("of") for name in names}
        whole["worlds"] = {name: world for name, world in whole["worlds"].items() if name in {*names, *bases}}
        del whole["draw"]
    changes = {"run_dir": str(folder), "resume": "auto", "device": "cpu", "threads": 1, "data": {"root": str(data)}}
    pool = {"pool_dir": str(pool_dir.resolve())} if pool_dir else {}
    own = merge({"meta": content["meta"]}, {"meta": variant.get("meta", {})})
    own["seed"] = variant.get("seed", 0)
    return make_recipe(MetaTrainRecipe, merge(whole, changes | pool | own))


def learn(recipe: MetaTrainRecipe) -> str:
    """A meta-training, in a process of its own."""
    with open_run(recipe, "meta-train", quiet=True) as run:
        return str(meta_train(recipe, run))


if __name__ == "__main__":
    raise SystemExit(main())
