"""Does the universal loss gain by comparing features too, and by learning to? Makes the files of two arms.

python benchmarks/universal/features.py start RUN_DIR/features-not-learned.lkd.safetensors
lkd meta-train benchmarks/universal/features.yaml --data.root DATA --run_dir RUN_DIR/features \
    --meta.start RUN_DIR/features-not-learned.lkd.safetensors
python benchmarks/universal/features.py join RUN_DIR/features/loss.lkd.safetensors RUN_DIR/features.lkd.safetensors
python benchmarks/universal/run.py DATA RUN_DIR --arms 'universal, on another CPU|features.*' \
    --only 'cyrillic|cyrillic-few|cyrillic-flipped|digits|greek|greek-weak' \
    --loss 'features learned=RUN_DIR/features.lkd.safetensors' \
    --loss 'features not learned=RUN_DIR/features-not-learned.lkd.safetensors' \
    --loss 'universal, on another CPU=lkd/losses/pretrained/universal.lkd.safetensors'
python benchmarks/universal/features.py record RUN_DIR

The six worlds were chosen before the first evaluation. `start` puts fresh comparisons of features beside the universal
loss over logits; `join` puts learned ones beside it in their place: over logits all arms are the same. `record` writes
what they gain into docs/evidence/speed. Run meta-train where `DATA` is a link to that folder.
"""

import argparse
import sys
from pathlib import Path

import torch
from report import ANOTHER_CPU, compare, read_rows

sys.path.insert(0, str(Path(__file__).parents[1]))

from speed_report import OUT, record

from lkd.core.statistics import mean_and_error
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.file import load_loss, save_loss
from lkd.losses.learned.loss import LearnedLoss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("start").add_argument("out", type=Path)
    join = commands.add_parser("join")
    join.add_argument("learned", type=Path)
    join.add_argument("out", type=Path)
    commands.add_parser("record").add_argument("run_dir", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record_gains(options.run_dir)
        return 0
    torch.manual_seed(0)
    logits = load_loss("universal").parts["logits"]
    features = FeatureLoss() if options.command == "start" else load_loss(options.learned).parts["features"]
    save_loss(options.out, LearnedLoss({"logits": logits, "features": features}), {})
    return 0


def record_gains(run_dir: Path) -> None:
    """Write the gains over the universal loss under the same teachers, means over the worlds."""
    figures = {}
    for arm, name in (("features learned", ""), ("features not learned", "_not_learned")):
        worlds = [world for world in read_rows(run_dir).values() if arm in world]
        key = f"universal_features{name}_gain"
        figures[key], figures[f"{key}_se"] = mean_and_error([compare(world, arm, ANOTHER_CPU)[0] for world in worlds])
    record(OUT, figures)


if __name__ == "__main__":
    raise SystemExit(main())
