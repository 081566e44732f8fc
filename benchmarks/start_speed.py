"""Time the start of a run on 1.28 million images in shards: `python benchmarks/start_speed.py FOLDER [OUT]`.

Writes 1,281 shards of 1,000 samples (members of a few bytes, which are not decoded here; 2.6 GB; kept), and loads the
data set and splits it: once without an index, and five times with the one that this left. Figures are processor time on
one thread, so that other work on the machine counts little. Rows of a CSV file in the output folder; a row that stands
there is not measured again. Four minutes the first time.
"""

import argparse
import io
import tarfile
import time
from pathlib import Path

import torch
from photographs import add_member
from rows import matching, median, write_row
from speed_report import OUT, record

from lkd.config.parts import DataRecipe
from lkd.training.build import prepare_images

SHARDS, SAMPLES, CLASSES, REPEATS = 1281, 1000, 1000, 5
COLUMNS = ["images", "index", "repeat", "wall_seconds", "cpu_seconds"]


def write_shards(root: Path) -> None:
    """All of the same bytes: a shard's name is part of its images'."""
    root.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for sample in range(SAMPLES):
            add_member(file, f"n{sample:08d}_{sample:05d}.jpg", b"\xff\xd8")
            add_member(file, f"n{sample:08d}_{sample:05d}.cls", str(sample % CLASSES).encode())
    for shard in range(SHARDS + 1):
        path = root / (f"imagenet-train-{shard:04d}.tar" if shard < SHARDS else "imagenet-val-0000.tar")
        if not path.exists():
            path.write_bytes(buffer.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    arguments = parser.parse_args()
    rows, images = arguments.out / "start_time.csv", SHARDS * SAMPLES
    torch.set_num_threads(1)
    write_shards(arguments.folder)
    recipe = DataRecipe(name="wds/synthetic", root=str(arguments.folder))
    for index in ("made", "kept"):
        for repeat in range(1 if index == "made" else REPEATS):
            if matching(rows, index=index, repeat=repeat):
                continue
            if index == "made":
                for path in arguments.folder.glob(".*.lkd-index"):
                    path.unlink()
            wall, used = time.perf_counter(), time.process_time()
            prepare_images(recipe)
            values = [images, index, repeat, time.perf_counter() - wall, time.process_time() - used]
            write_row(rows, COLUMNS, values)
    record(
        arguments.out,
        {
            "index_seconds_1m": median(rows, "cpu_seconds", index="kept"),
            "index_made_seconds_1m": median(rows, "cpu_seconds", index="made"),
        },
    )


if __name__ == "__main__":
    main()
