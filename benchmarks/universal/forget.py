"""Write a learned loss as it was before it learned anything: the control for what learning adds to its form.

python benchmarks/universal/forget.py LOSS OUT [--plain]

LOSS is a file, or `universal`; with --plain the loss does not fade (`DecoupledLoss.fades`) either. Its last layer
begins at zero, so the seed of its weights decides nothing.
"""

import argparse
from pathlib import Path

from lkd.losses.learned.file import LossFile, build_loss_from, save_loss


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss")
    parser.add_argument("out", type=Path)
    parser.add_argument("--plain", action="store_true")
    options = parser.parse_args()
    architecture = LossFile.read(options.loss).header["architecture"]
    if options.plain:
        architecture["parts"]["logits"]["arguments"]["fades"] = False
    save_loss(options.out, build_loss_from(architecture), {"learned": False})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
