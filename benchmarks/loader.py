"""Images a second and CPU core that loaders prepare for training: ours, timm's and torchvision's reference.

python benchmarks/loader.py [--images 400] [--rounds 7] [--out docs/evidence/imagenet/loader]

All in turn in one process on one thread, by processor time, on JPEGs made from real photographs.
"""

import argparse
import csv
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm.data
import torch
from checking import check
from photographs import SIZES, write_folder, write_web_shards
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from lkd.config import DataRecipe, PackRecipe
from lkd.core.files import environment, read_json, write_json, write_text
from lkd.data import Batches
from lkd.data.sources import MEAN, STD
from lkd.export.export import pack_dataset
from lkd.tracking.run import evidence
from lkd.training.build import prepare_images

CLASSES, BATCH_SIZE, SIZE = 10, 64, 224
OURS = {"files": "image_folder", "shards": "wds/photographs", "packed": "image_folder"}
README = """# Loaders

Made by `python benchmarks/loader.py`: images a second and CPU core, from a JPEG to a place in a normalised float batch,
with RandomResizedCrop 224 (bilinear, antialiased) and flip. {count} JPEGs, mean {pixels:.0f} thousand pixels and
{kilobytes:.0f} kB, made at run time from the photographs of scikit-image, scikit-learn and foolbox. All loaders in turn
in one process, one thread, no worker process, {rounds} rounds after one that is thrown away; processor time; medians,
of the ratios within a round too.

{table}

*Host only* leaves out the conversion to float and the normalisation, which ours and timm's prefetcher do on the device:
what a core does where there is a GPU. torchvision's reference normalises each image on the CPU.

What it does not show: a GPU, a disk (everything is in the page cache), many threads. The sizes are a mixture of our own
after what is reported of ImageNet, not ImageNet. Worker processes would add their copies to timm's and torchvision's
loaders, which is left out here in their favour. The machine was shared; rounds differ by up to a third.

`rows.csv`: every round; `result.json`: the figures.
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence/imagenet/loader"))
    parser.add_argument("--check", action="store_true", help="two ratios to timm anew, to a third; nothing is kept")
    words = parser.parse_args()
    if words.check:
        words.images, words.rounds = 200, 3
    torch.set_num_threads(1)
    machine = environment()
    with tempfile.TemporaryDirectory() as folder:
        root = write_folder(Path(folder, "images"), CLASSES, words.images // CLASSES, 2)
        shards = write_web_shards(root, Path(folder, "shards"))
        roots = {"files": root, "shards": shards, "packed": root}
        packed = DataRecipe("image_folder", str(root), packed=str(Path(folder, "packed")), workers=1)
        pack_dataset(PackRecipe(packed))
        loaders = {"timm": open_timm(root, True), "timm, host only": open_timm(root, False)}
        loaders["torchvision"] = open_torchvision(root)
        for name in OURS:
            place = packed.packed if name == "packed" else None
            loaders[name] = open_ours(OURS[name], roots[name], place, True)
            loaders[f"{name}, host only"] = open_ours(OURS[name], roots[name], place, False)
        rows = measure(loaders, words.rounds)
        sizes = [path.stat().st_size for path in root.glob("train/*/*")]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) if words.check else words.out
        write_evidence(out, rows, words, statistics.mean(sizes) / 1000, machine)
        if words.check:
            figures = read_json(out / "result.json")["figures"]
            made = {name: figures[name] for name in ("files_host_over_timm", "shards_host_over_timm")}
            return check(read_json(words.out / "result.json")["figures"], made, tolerance=0.34)
    return 0


def open_ours(name: str, root: Path, packed: str | None, whole: bool) -> Callable[[], Iterator[Tensor]]:
    """Our batches, a new epoch at every call; without `whole`, as uint8."""
    recipe = DataRecipe(name, str(root), 0, CLASSES, packed=packed, workers=1)
    images = prepare_images(recipe).train
    epochs = iter(range(10**6))

    def load() -> Iterator[Tensor]:
        batches = Batches(images, BATCH_SIZE, next(epochs), "random_resized_crop", steps=len(images) // BATCH_SIZE)
        for step in range(batches.steps_per_epoch):
            yield batches.at(step).images if whole else batches.prefetcher.take(step).wait()[0]

    return load


def open_timm(root: Path, whole: bool) -> Callable[[], Iterator[Tensor]]:
    """Timm's `create_loader`, without its colour jitter; without `whole`, its uint8 batches."""
    dataset = timm.data.create_dataset("", str(root), split="train", is_training=True)
    loader = timm.data.create_loader(
        dataset,
        (3, SIZE, SIZE),
        BATCH_SIZE,
        is_training=True,
        mean=MEAN,
        std=STD,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=True,
        device=torch.device("cpu"),
    )
    return lambda: (images for images, _ in (loader if whole else loader.loader))


def open_torchvision(root: Path) -> Callable[[], Iterator[Tensor]]:
    """The pipeline of torchvision's reference training of classifiers, with its Pillow backend."""
    steps = [
        transforms.RandomResizedCrop(SIZE, antialias=True),
        transforms.RandomHorizontalFlip(),
        transforms.PILToTensor(),
        transforms.ConvertImageDtype(torch.float),
        transforms.Normalize(MEAN, STD),
    ]
    loader = DataLoader(
        ImageFolder(root / "train", transforms.Compose(steps)), BATCH_SIZE, shuffle=True, drop_last=True, num_workers=0
    )
    return lambda: (images for images, _ in loader)


def measure(loaders: dict[str, Callable[[], Iterator[Tensor]]], rounds: int) -> list[dict[str, Any]]:
    """Images a second of processor time of every loader, in turn, after a round that is thrown away."""
    rows = []
    for number in range(-1, rounds):
        for name, load in loaders.items():
            started, images = time.process_time(), 0
            for batch in load():
                assert batch.shape[1:] == (3, SIZE, SIZE)
                images += len(batch)
            rate = images / (time.process_time() - started)
            print(f"round {number} {name:22} {rate:8.1f} images a second and core", flush=True)
            if number >= 0:
                rows.append(
                    {"round": number, "loader": name, "images": images, "images_per_core_second": round(rate, 2)}
                )
    return rows


def write_evidence(
    out: Path, rows: list[dict[str, Any]], words: argparse.Namespace, kilobytes: float, machine: dict[str, Any]
) -> None:
    """Write rows, figures and the text."""
    rates: dict[str, list[float]] = {}
    for row in rows:
        rates.setdefault(row["loader"], []).append(row["images_per_core_second"])
    figures: dict[str, float] = {}
    lines = ["| loader | images/s a core | ÷ timm | ÷ torchvision |", "|---|---|---|---|"]
    for name, own in rates.items():
        key = name.replace(", host only", "_host")
        figures[f"{key}_images_per_core_second"] = statistics.median(own)
        ratios = {}
        for peer, others in (("timm", "timm, host only" if "host" in name else "timm"), ("torchvision",) * 2):
            ratios[peer] = statistics.median(a / b for a, b in zip(own, rates[others], strict=True))
            if name.split(",")[0] in OURS:
                figures[f"{key}_over_{peer}"] = ratios[peer]
        lines.append(f"| {name} | {statistics.median(own):.0f} | {ratios['timm']:.2f} | {ratios['torchvision']:.2f} |")
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rows.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    pixels = statistics.mean(width * height for width, height in SIZES) / 1000
    facts = {"count": words.images, "pixels": pixels, "kilobytes": kilobytes, "rounds": words.rounds}
    write_text(out / "README.md", README.format(table="\n".join(lines), **facts))
    rounded = {name: round(value, 3) for name, value in figures.items()}
    write_json(out / "result.json", evidence("python benchmarks/loader.py", machine, rounded))


if __name__ == "__main__":
    raise SystemExit(main())
