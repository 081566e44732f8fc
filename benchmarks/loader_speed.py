"""Where the loader's time goes, and its images a second beside timm's: `python benchmarks/loader_speed.py [OUT]`.

The JPEGs and loaders of loader.py, fewer of them: `create_loader` and ours in turn in one process, one thread,
processor time, host only (uint8), medians; then our parts one by one, and of decoding that of libjpeg-turbo alone. A
row of a CSV file in the output folder is not measured again; delete it to start over.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from loader import BATCH_SIZE, CLASSES, SIZE, measure, open_ours, open_timm
from photographs import write_folder
from rows import matching, median, write_row
from speed_report import OUT, record

from lkd.config import DataRecipe
from lkd.core.random import draw_uniform
from lkd.data.augment import NUMBERS, cut_random
from lkd.data.image_files import decode, decode_fast
from lkd.training.build import prepare_images

IMAGES, ROUNDS = 200, 5


def measure_loaders(path: Path, root: Path) -> None:
    if matching(path, round=ROUNDS - 1, loader="ours"):
        return
    loaders = {"timm": open_timm(root, False), "ours": open_ours("image_folder", root, None, False)}
    for row in measure(loaders, ROUNDS):
        columns = ["round", "loader", "images_per_core_second"]
        write_row(path, columns, [row[column] for column in columns])


def measure_parts(path: Path, root: Path) -> None:
    """Milliseconds an image of each part, medians over rounds."""
    if path.exists():
        return
    files = prepare_images(DataRecipe("image_folder", str(root), 0, CLASSES, workers=1)).train.images
    source, count = files.source, BATCH_SIZE
    read = [source.read(position) for position in range(count)]
    decoded = [decode(content, "") for content in read]
    numbers = draw_uniform(torch.ones(count, dtype=torch.int64), torch.arange(count), NUMBERS)
    crops = [cut_random(image, SIZE, row) for image, row in zip(decoded, numbers, strict=True)]
    batch = torch.empty(count, SIZE, SIZE, 3, dtype=torch.uint8)
    parts: dict[str, Callable[[int], object]] = {
        "read the file": source.read,
        "decode": lambda n: decode(read[n], ""),
        "of it libjpeg-turbo": lambda n: decode_fast(read[n]),
        "cut, scale, flip": lambda n: cut_random(decoded[n], SIZE, numbers[n]),
        "copy into the batch": lambda n: batch[n].copy_(crops[n].permute(1, 2, 0)),
    }
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(ROUNDS):
        for name, part in parts.items():
            started = time.process_time()
            for position in range(count):
                part(position)
            times[name].append(1e3 * (time.process_time() - started) / count)
    for name, values in times.items():
        write_row(path, ["part", "milliseconds"], [name, round(statistics.median(values), 4)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, nargs="?", default=OUT)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder, "images"), CLASSES, IMAGES // CLASSES, 2)
        measure_loaders(out / "loader_rates.csv", root)
        measure_parts(out / "loader_parts.csv", root)
    ours, timm = (median(out / "loader_rates.csv", "images_per_core_second", loader=name) for name in ("ours", "timm"))
    part = {
        row: median(out / "loader_parts.csv", "milliseconds", part=row)
        for row in ("decode", "of it libjpeg-turbo", "cut, scale, flip")
    }
    figures = {"loader_vs_timm": ours / timm, "timm_ms_an_image": 1e3 / timm, "loader_ms_an_image": 1e3 / ours}
    figures |= {"loader_decode_ms": part["decode"], "loader_cut_ms": part["cut, scale, flip"]}
    record(out, figures | {"loader_libjpeg_ms": part["of it libjpeg-turbo"]})


if __name__ == "__main__":
    main()
