"""Does the universal loss gain by comparing features too, and by learning to? Makes the files of two arms.

python benchmarks/universal/features.py start RUN_DIR/features-not-learned.lkd.safetensors
lkd meta-train benchmarks/universal/features.yaml --data.root DATA --run_dir RUN_DIR/features \
    --meta.start RUN_DIR/features-not-learned.lkd.safetensors
python benchmarks/universal/features.py join RUN_DIR/features/loss.lkd.safetensors RUN_DIR/features.lkd.safetensors
python benchmarks/universal/run.py DATA RUN_DIR --arms 'universal|features.*' \
    --only 'cyrillic|cyrillic-few|cyrillic-flipped|digits|greek|greek-weak' \
    --loss 'features learned=RUN_DIR/features.lkd.safetensors' \
    --loss 'features not learned=RUN_DIR/features-not-learned.lkd.safetensors'

The six worlds were chosen before the first evaluation. `start` puts fresh comparisons of features beside the universal
loss over logits; `join` puts learned ones beside it in their place: over logits all arms are the same. Run meta-train
where `DATA` is a link to that folder.
"""

import argparse
from pathlib import Path

import torch

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
    options = parser.parse_args()
    torch.manual_seed(0)
    logits = load_loss("universal").parts["logits"]
    features = FeatureLoss() if options.command == "start" else load_loss(options.learned).parts["features"]
    save_loss(options.out, LearnedLoss({"logits": logits, "features": features}), {})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
