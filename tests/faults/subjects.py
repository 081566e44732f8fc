"""The commands under test, as small as they go: a run takes about a second."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError, safe_open

from lkd.core.tensor_files import DIGEST_KEY
from lkd.data.embedded import ARCHIVE

TRAIN = ["--train.batch_size", "10", "--train.checkpoint_every", "3", "--device", "cpu", "--threads", "1"]
EMBEDDED = ["--data.train_size", "100", "--data.meta_validation_size", "60", *TRAIN, "--train.epochs", "2"]
TEACHER = ["--teacher.path", "random", "--teacher.name", "tiny_cnn"]
FILES = ["--data.name", "image_folder", "--data.root", "images", "--data.image_size", "28", "--data.workers", "2"]
FILES += ["--data.damaged_limit", "0.01", "--data.read_timeout", "3", "--data.train_size", "100"]
FILES += ["--data.meta_validation_size", "60", *TRAIN, "--train.epochs", "2"]
CROPS = ["--data.augmentation", "random_resized_crop"]
STUDENT = ["--student.name", "tiny_cnn"]
POOL = ["--pool.students", "1", "--pool.snapshots", "3", "--pool.max_age", "0.8"]
META = ["--meta.outer_steps", "4", "--meta.rollout_steps", "2", "--meta.rollout_epochs", "1", "--meta.reuse_every", "2"]
META += ["--meta.reuse_epochs", "1", "--meta.estimator", "first_order"]
META += ["--meta.reuse_students", "1", "--meta.outer_batch_size", "50", "--meta.checkpoint_every", "1"]
COMPARE = ["--methods", "{CE: {name: cross_entropy}, KD: {name: kd}}", "--students", "[{name: tiny_cnn}]"]
COMPARE += ["--seeds", "2", "--workers", "2"]
CACHE = ["--data.augmentation_seeds", "3", "--shard_size", "20"]
TIMINGS = ("seconds", "steps_per_second", "peak_mib", DIGEST_KEY)  # of a cell: they differ from run to run


@dataclass(frozen=True)
class Subject:
    """A command under test.

    Attributes:
        words: Its command line, but for the folder.
        results: What it leaves, as patterns of files.
        interval: Steps that may be done again after any fault: those between two checkpoints. Of a comparison the
            trainings of both workers, of a cache the batches of one file.
    """

    words: tuple[str, ...]
    results: tuple[str, ...]
    interval: int = 3

    def line(self, folder: Path) -> list[str]:
        """The whole command line, which starts a run in this folder or goes on with it."""
        if self.words[0] == "cache":
            return [*self.words, "--teacher.cache", str(folder)]
        return [*self.words, "--run_dir", str(folder), "--resume", "auto"]


def list_commands(data: list[str], crops: list[str]) -> dict[str, Subject]:
    """The five commands on some images."""
    own = [*data, *TEACHER, *STUDENT]
    return {
        "pool": Subject(("pool", *own, *POOL), ("pool/student-*",)),
        "meta-train": Subject(("meta-train", *own, *POOL, *META), ("pool/student-*", "*.safetensors")),
        "distill": Subject(("distill", *own, *crops), ("*.safetensors",)),
        "compare": Subject(("compare", *data, *TEACHER, *COMPARE), ("cells/*.json",), interval=2 * 20),
        "cache": Subject(("cache", *own, *crops, *CACHE), ("*.safetensors",), interval=2),
    }


COMMANDS = list_commands(EMBEDDED, ["--data.augmentation", "flip_and_crop"])
FILE_COMMANDS = list_commands(FILES, CROPS)  # the same from files, which threads decode


def write_images(root: Path, classes: int = 5, train: int = 32, validation: int = 2) -> None:
    """Embedded images as files, laid out as ImageNet; made once."""
    if root.exists():
        return
    content = np.load(ARCHIVE)
    images, labels = content["train_images"], content["train_labels"]
    for label in range(classes):
        chosen = images[labels == label][: train + validation]
        for number, pixels in enumerate(chosen):
            folder = root / ("train" if number < train else "val") / f"class-{label}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.reshape(28, 28)).convert("RGB").resize((36, 40)).save(folder / f"{number:02d}.png")


def read_results(command: Subject, folder: Path) -> dict[str, str]:
    """What a run left: a hash of every tensor, and of every cell of a comparison without its timings."""
    found: dict[str, str] = {}
    for file in sorted(path for pattern in command.results for path in folder.glob(pattern)):
        if file.suffix == ".json":
            found[file.name] = hash_cell(json.loads(file.read_text()))
            continue
        try:
            with safe_open(file, framework="np") as opened:
                for name in opened.keys():  # noqa: SIM118 - not a dict
                    tensor = opened.get_tensor(name)
                    found[f"{file.name} {name}"] = hashlib.sha256(
                        tensor.tobytes() + str(tensor.shape).encode()
                    ).hexdigest()
        except (SafetensorError, OSError) as error:
            found[file.name] = f"unreadable: {error}"
    return found


def hash_cell(row: dict[str, Any]) -> str:
    """A hash of a cell's result."""
    kept = {key: value for key, value in row.items() if key not in TIMINGS}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
