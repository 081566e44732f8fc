"""Put a learned loss into the package: its weights, and how it came about without the curves that its run keeps.

python benchmarks/universal/ship.py RUN_DIR/loss.lkd.safetensors [universal]

The shipped loss fades (`DecoupledLoss.fades`): rollouts are too short to learn that, it is chosen over whole trainings.
Prints the line that `PRETRAINED` in lkd/losses/learned/file.py is to hold.
"""

import sys
from pathlib import Path

from lkd.core.files import PACKAGE, hash_file
from lkd.losses.learned.file import SUFFIX, LossFile, read_provenance, save_loss


def main() -> int:
    if len(sys.argv) not in (2, 3):
        print("usage: python benchmarks/universal/ship.py LOSS [NAME]", file=sys.stderr)
        return 2
    source, name = Path(sys.argv[1]), (sys.argv[2:] or ["universal"])[0]
    provenance = read_provenance(source)
    provenance["curve"] = provenance["curve"][-1:]
    folder = PACKAGE / "losses" / "pretrained"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}{SUFFIX}"
    file = LossFile.read(source)
    file.header["architecture"]["parts"]["logits"]["arguments"]["fades"] = True
    save_loss(path, file.build(), provenance)
    print(f'    "{name}": "{hash_file(path)}",  # {path.stat().st_size:,} bytes')
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
