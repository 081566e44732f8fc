"""Does the universal loss hold on colour pictures in files, with a ResNet that AdamW trains in little time?

python -m benchmarks.shapes RUN_DIR [--not_learned FILE] [--seeds 8] [--workers 2] [--out docs/evidence/students/shapes]
python -m benchmarks.shapes --check

Draws pictures of six shapes (discs, rings, squares, triangles, stars, crosses; turned, noisy, some crossed by a line),
trains a teacher on 6,000 of them, and compares students that have 1,500 others, 300 of them for meta-validation, on a
test split of 2,000 (shapes.yaml). Goes on with what an earlier call left. FILE holds the universal loss before it
learned (benchmarks/universal/README.md), a control. --check trains the teacher and two students anew.
"""

import argparse
import json
import math
import shutil
import tempfile
from pathlib import Path

import numpy as np
import yaml
from PIL import Image, ImageDraw

from benchmarks.checking import check_trial
from lkd.cli import main as run_command
from lkd.config.parse import parse_recipe
from lkd.core.files import read_json, write_json

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "students" / "shapes"
SHAPES = ("cross", "disc", "ring", "square", "star", "triangle")
SIZE, FINER = 32, 4  # pixels of a picture; drawn so many times as large
COUNTS = {"students/train": 1500, "students/val": 2000, "teacher/train": 6000}
NOISE = 25.0  # points: three standard deviations over seeds of these short trainings
KEPT = ("table.txt", "cells.csv", "comparison.png")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path, nargs="?")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--not_learned", type=Path)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=EVIDENCE)
    options = parser.parse_args()
    if options.check or not options.run_dir:
        with tempfile.TemporaryDirectory() as made:
            recipe = parse_recipe("compare", [str(prepare(Path(made), None))])
            cells = EVIDENCE / "cells.csv"
            return max(check_trial(recipe, cells, method, NOISE) for method in ("KD(0.5, 4)", "universal"))
    folder = options.run_dir.resolve()
    words = ["--seeds", str(options.seeds), "--workers", str(options.workers), "--run_dir", str(folder / "run")]
    if status := run_command(["compare", str(prepare(folder, options.not_learned)), *words, "--resume", "auto"]):
        return status
    options.out.mkdir(parents=True, exist_ok=True)
    for name in KEPT:
        shutil.copy(folder / "run" / name, options.out / name)
    result = read_json(folder / "run" / "result.json")
    write_json(
        options.out / "result.json", result | {"command": "python -m benchmarks.shapes RUN_DIR --not_learned FILE"}
    )
    return 0


def prepare(folder: Path, not_learned: Path | None) -> Path:
    """Draw the pictures, train the teacher, and write the comparison's recipe, as far as they are not there."""
    for number, (part, count) in enumerate(COUNTS.items()):
        if not (folder / part).is_dir():
            write_pictures(folder / part, count, number)
    if not (folder / "teacher/val").exists():
        (folder / "teacher/val").symlink_to(folder / "students/val")
    if status := run_command(list_teacher_words(folder)):
        raise SystemExit(status)
    content = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
    content["data"]["root"] = str(folder / "students")
    content["teacher"]["path"] = str(folder / "run-teacher/teacher.safetensors")
    if not_learned:
        grid = content["methods"]["universal"]["grid"]
        content["methods"]["not learned"] = {"name": str(not_learned.resolve()), "grid": grid}
    path = folder / "shapes.yaml"
    path.write_text(json.dumps(content))  # YAML too, without aliases
    return path


def list_teacher_words(folder: Path) -> list[str]:
    """The command that trains the teacher."""
    data = f"--data.name image_folder --data.root {folder / 'teacher'} --data.image_size {SIZE} --data.crop_pct 1"
    train = "--train.optimizer adamw --train.learning_rate 0.002 --train.weight_decay 0.05 --train.epochs 20"
    where = f"--run_dir {folder / 'run-teacher'} --resume auto --device cpu --threads 1"
    return f"teacher {data} {train} {where} --model.name test_resnet --train.batch_size 64".split()


def write_pictures(folder: Path, count: int, seed: int) -> None:
    """Draw as many pictures of each shape, to FOLDER/SHAPE/NUMBER.png."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        shape = SHAPES[number % len(SHAPES)]
        (folder / shape).mkdir(parents=True, exist_ok=True)
        draw_shape(shape, generator).save(folder / shape / f"{number:05d}.png")


def draw_shape(shape: str, generator: np.random.Generator) -> Image.Image:
    """A shape of a colour on another, of any size, place and angle."""
    size = SIZE * FINER
    ground = generator.integers(0, 256, 3)
    ink = tuple(map(int, (ground + generator.integers(60, 197, 3)) % 256))
    picture = Image.new("RGB", (size, size), tuple(map(int, ground)))
    pen = ImageDraw.Draw(picture)
    if generator.random() < 0.5:
        ends = [tuple(map(int, generator.integers(0, size, 2))) for _ in range(2)]
        pen.line(ends, fill=tuple(map(int, generator.integers(0, 256, 3))), width=int(generator.integers(4, 12)))
    radius, angle = generator.uniform(0.15, 0.35) * size, generator.uniform(0, 2 * math.pi)
    x, y = generator.uniform(radius, size - radius, 2)
    box = [x - radius, y - radius, x + radius, y + radius]

    def corners(count: int, inner: float = 1.0) -> list[tuple[float, float]]:
        reach = [radius * (inner if number % 2 else 1.0) for number in range(count)]
        turns = [angle + 2 * math.pi * number / count for number in range(count)]
        return [(x + r * math.cos(turn), y + r * math.sin(turn)) for r, turn in zip(reach, turns, strict=True)]

    if shape == "disc":
        pen.ellipse(box, fill=ink)
    elif shape == "ring":
        pen.ellipse(box, outline=ink, width=max(6, int(radius / 4)))
    elif shape == "cross":
        ends = corners(4)
        for bar in (ends[::2], ends[1::2]):
            pen.line(bar, fill=ink, width=max(6, int(radius / 3)))
    else:
        pen.polygon({"square": corners(4), "triangle": corners(3), "star": corners(10, 0.4)}[shape], fill=ink)
    small = np.asarray(picture.resize((SIZE, SIZE), Image.Resampling.LANCZOS), float)
    noisy = small + generator.normal(0, 20, small.shape)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


if __name__ == "__main__":
    raise SystemExit(main())
