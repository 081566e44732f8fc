"""Put a learned loss into the package: its weights, and how it came about without the curves that its run keeps.

python benchmarks/universal/ship.py LOSS.lkd.safetensors [--name universal] [--part 1] [--rules RULE ...] [--out FILE]

Rollouts are too short to learn some things, which are chosen over whole trainings (docs/evidence/universal/tried.md):
the shipped loss fades, judges labels, falls back, and starts from β = 4 with few images under a good teacher
(`DecoupledLoss`), and took a step of screen.py, which starts from what this script makes of rollouts. What the network
adds to its first answers is multiplied by `--part`. With 0 it is the loss as it was before it learned anything: the
control. `--rules` leaves out some, to see what they are worth.
Prints the line that `PRETRAINED` in lkd/losses/learned/file.py is to hold.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lkd.core.files import PACKAGE, hash_file
from lkd.losses.learned.file import SUFFIX, LossFile, build_loss_from, read_provenance, save_loss

RULES = {  # the value of each with and without it
    "fades": (True, False),
    "judges_labels": (True, False),
    "falls_back": (True, False),
    "initial_factor": (4.0, 1.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loss", type=Path)
    parser.add_argument("--name", default="universal")
    parser.add_argument("--part", type=float, default=1.0)
    parser.add_argument("--rules", nargs="*", choices=RULES, default=list(RULES))
    parser.add_argument("--out", type=Path, help="somewhere else than in the package")
    options = parser.parse_args()
    provenance = read_provenance(options.loss)
    provenance["curve"] = provenance["curve"][-1:]
    path = options.out or PACKAGE / "losses" / "pretrained" / f"{options.name}{SUFFIX}"
    path.parent.mkdir(parents=True, exist_ok=True)
    file = LossFile.read(options.loss)
    values = {rule: on if rule in options.rules else off for rule, (on, off) in RULES.items()}
    file.header["architecture"]["parts"]["logits"]["arguments"] |= values
    loss, start = file.build(), build_loss_from(file.header["architecture"])
    shrink(loss, start, options.part)
    provenance["part"] = options.part * provenance.get("part", 1)  # of a file that was shipped, a part of a part
    save_loss(path, loss, provenance if options.part else {"learned": False})
    print(f'    "{options.name}": "{hash_file(path)}",  # {path.stat().st_size:,} bytes')
    return 0


@torch.no_grad()
def shrink(loss: Any, start: Any, part: float | Sequence[float]) -> None:
    """Multiply what a loss's network adds to its first answers, or each; those do not depend on what it sees."""
    body, first = loss.parts["logits"].body, start.parts["logits"].body
    parts = torch.as_tensor(part).expand_as(first.head.bias)
    body.head.weight *= parts.unsqueeze(1)
    body.linear.weight *= parts.unsqueeze(1)
    body.head.bias.copy_(torch.lerp(first.head.bias, body.head.bias, parts))


if __name__ == "__main__":
    raise SystemExit(main())
