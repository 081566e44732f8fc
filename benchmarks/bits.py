"""Do the commands leave the same bits as before? Record hashes of tensors and figures of tiny runs, and compare them.

python benchmarks/bits.py record FILE.json [--root CHECKOUT] [--only REGEX]
python benchmarks/bits.py compare OLD.json NEW.json

A record is of one machine: another CPU rounds otherwise. Only the public command line and the Python API are used, so
that the package may be rearranged between two records. All runs are children of one process that has imported the
package, on one thread.
"""

import argparse
import csv
import hashlib
import importlib
import json
import os
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

TINY = "--data.train_size 200 --data.meta_validation_size 100 --device cpu --threads 1"
TRAIN = f"{TINY} --train.epochs 2 --train.batch_size 20 --train.checkpoint_every 3"  # of 10 steps an epoch
POOL = "--pool.students 2 --pool.snapshots 3 --pool.max_age 0.8"
OUTER = "--meta.outer_steps 3 --meta.rollout_steps 3 --meta.rollout_epochs 1 --meta.outer_batch_size 50"
OUTER += " --meta.checkpoint_every 1 --meta.students_per_step 2"
REUSE = "--meta.reuse_every 2 --meta.reuse_students 1 --meta.reuse_epochs 1"
META = f"meta-train {TRAIN} {OUTER} --meta.reuse_every 0"
DRAWN = f"{META} --pool_dir @pool/pool"
METHODS = "{CE: {name: cross_entropy}, KD: {name: kd, grid: {weight: [0.5, 0.9]}}}"
RANKED = "{CE: {name: cross_entropy}, KD: {name: kd}, DKD: {name: dkd}}"
MIXED = "--data.augmentation flip_and_crop --data.mixup 0.2 --data.cutmix 1.0"
SEEDS = "--data.augmentation flip_and_crop --data.augmentation_seeds 2"
ESTIMATORS = ("higher", "unrolled", "adjoint", "first_order", "truncated", "last_step", "implicit", "evolution")

# Case → commands, one after another. @CASE is the folder that a case fills, @SELF the case's own.
CASES: dict[str, tuple[str, ...]] = {
    "pool": (f"pool {TRAIN} {POOL}",),
    "teacher": (f"teacher {TRAIN}",),
    "cache": (f"cache {TRAIN} --teacher.cache @SELF",),
    "cache-of-crops": (f"cache {TRAIN} {SEEDS} --teacher.cache @SELF --top_k 3 --shard_size 90",),
    **{f"meta-{name}": (f"{DRAWN} --meta.estimator {name}",) for name in (*ESTIMATORS, "audited")},
    "meta-before": (f"meta-train {TRAIN} {POOL} {OUTER} {REUSE}",),
    "meta-alternate": (f"{META} --meta.interleaving alternate",),
    "meta-both": (f"{META} {POOL} --meta.interleaving both",),
    "meta-over-features": (f"{DRAWN} --meta.kind features",),
    "meta-over-both": (f"{DRAWN} --meta.kind both",),
    "meta-generic": (f"{DRAWN} --meta.loss '{{form: generic}}'",),
    "distill-cross-entropy": (f"distill {TRAIN} --loss cross_entropy",),
    "distill-kd": (f"distill {TRAIN} --loss kd",),
    "distill-kd-cached": (f"distill {TRAIN} --loss kd --teacher.cache @cache",),
    "distill-dkd": (f"distill {TRAIN} --loss dkd",),
    "distill-learned": (f"distill {TRAIN} --loss @meta-audited/loss.lkd.safetensors",),
    "distill-learned-cached": (f"distill {TRAIN} --loss @meta-audited/loss.lkd.safetensors --teacher.cache @cache",),
    "distill-learned-over-both": (f"distill {TRAIN} --loss @meta-over-both/loss.lkd.safetensors",),
    "compare": (f"compare {TRAIN} --seeds 2 --workers 1 --methods '{METHODS}'",),
}
# Case → the file at whose writing, for the n-th time, a run of it is killed. It goes on as CASE-resumed.
KILLED = {
    "distill-kd": (r"checkpoints/\d", 3),
    "pool": (r"pool/.*\.safetensors", 3),
    "meta-before": (r"checkpoints/\d", 2),
}
SKIPPED_FOLDERS = {"checkpoints", "wandb", "pictures"}  # what a run goes on from is no result: its layout may change
SKIPPED_FILES = {"config.json", "environment.json", "lineage.json"}
# Figures that no two runs have in common.
UNSTEADY = re.compile(r"(^|[/_ ])(time|time_share|seconds|hours|per_second|cost|memory|mib|bytes)($|[/_ ])")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("file", type=Path)
    recording.add_argument("--root", type=Path, default=Path(__file__).parents[1], help="checkout whose package runs")
    recording.add_argument("--only", default="", help="regular expression of the cases that run, and what they need")
    recording.add_argument("--keep", type=Path, help="folder for the runs, which are deleted otherwise")
    comparing = commands.add_parser("compare")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    words = parser.parse_args()
    if words.command == "compare":
        return compare(*(json.loads(path.read_text()) for path in (words.old, words.new)))
    import_package(words.root.resolve())
    with tempfile.TemporaryDirectory() as folder:
        found, failed = record(words.only, (words.keep or Path(folder)).resolve())
    words.file.write_text(json.dumps(found, indent=1) + "\n")
    return int(failed)


def compare(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> int:
    """Print what differs between two records; 1 if anything does."""
    different = 0
    for case in {**old, **new}:
        if case not in old or case not in new:
            print(f"{case}: only in the {'new' if case in new else 'old'} record")
            different += 1
            continue
        items = [key for key in {**old[case], **new[case]} if old[case].get(key) != new[case].get(key)]
        different += bool(items)
        for key in items:
            how = "only in the new record" if key not in old[case] else "gone" if key not in new[case] else "differs"
            print(f"{case}: {key} {how}")
    print(f"{len({**old, **new})} cases, {different} with differences")
    return int(different > 0)


def import_package(root: Path) -> None:
    """Import the package of a checkout, and what it needs, on one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    sys.path[0] = str(root)  # in the place of benchmarks/, also in a comparison's workers
    for name in ("torch", "torchvision", "timm", "safetensors.torch", "scipy.stats", "matplotlib.figure"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    package = importlib.import_module("lkd.cli")
    if not Path(package.__file__ or "").is_relative_to(root):
        raise SystemExit(f"{root} holds no package lkd; {package.__file__} was imported")


def record(only: str, folder: Path) -> tuple[dict[str, dict[str, str]], bool]:
    """Run the cases; the hashes of each, and whether one failed."""
    folder.mkdir(parents=True, exist_ok=True)
    run_command(split(f"distill {TRAIN}", "warm-up", folder))  # imports what its children need
    found: dict[str, dict[str, str]] = {}
    failed = False
    names = [*CASES, *PYTHON_CASES, *(f"{name}-resumed" for name in KILLED)]

    def run(name: str) -> None:
        nonlocal failed
        if name in found:
            return
        origin = name.removesuffix("-resumed") if name not in CASES else name
        lines = CASES.get(origin, ())
        for needed in re.findall(r"@([a-z][\w-]*)", " ".join(lines)):
            run(needed)
        started = time.perf_counter()
        steps: list[Callable[[], None]]
        if name in PYTHON_CASES:
            steps = [lambda: PYTHON_CASES[name](folder / name)]
        else:
            steps = [partial(run_command, split(line, name, folder)) for line in lines]
        if origin != name:
            run(origin)
            (whole,) = lines
            kill = KILLED[origin]
            steps = [
                lambda: kill_and_run(split(whole, name, folder), *kill),
                lambda: run_command([*split(whole, name, folder), "--resume", "auto"]),
            ]
        problem = run_forked(steps, folder, name, killed=origin != name)
        found[name] = {} if problem else dict(sorted(hash_folder(folder / name)))
        if not problem and origin != name and found[name] != found[origin]:
            problem = f"does not leave what {origin} does: " + ", ".join(
                key for key in {**found[name], **found[origin]} if found[name].get(key) != found[origin].get(key)
            )
        failed |= bool(problem)
        print(f"{name}: {problem or f'{len(found[name])} items'}, {time.perf_counter() - started:.1f} s", flush=True)

    for name in names:
        if re.search(only, name):
            run(name)
    spent = os.times()
    print(f"{len(found)} cases, {sum(spent[:4]):.0f} s of CPU time")
    return found, failed


def split(line: str, name: str, folder: Path) -> list[str]:
    """The words of a command line, with the folders of cases in the place of their names."""
    line = line.replace("@SELF", f"@{name}")
    words = shlex.split(re.sub(r"@([a-z][\w-]*)", lambda match: str(folder / match[1]), line))
    return words if "--run_dir" in words or words[0] == "evaluate" else [*words, "--run_dir", str(folder / name)]


def run_command(words: list[str]) -> None:
    """Run a command; leave the process if it fails."""
    code = sys.modules["lkd.cli"].main(words)
    if code:
        raise RuntimeError(f"lkd {' '.join(words)}: exit code {code}")


def kill_and_run(words: list[str], pattern: str, count: int) -> None:
    """Run a command that is killed, with its workers, when a file is put in its place for the n-th time."""
    left = count

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event == "os.rename" and re.search(pattern, str(arguments[1])):
            left -= 1
            if not left:
                os.killpg(0, signal.SIGKILL)

    sys.addaudithook(watch)
    run_command(words)


def run_forked(steps: list[Callable[[], None]], folder: Path, name: str, killed: bool = False) -> str | None:
    """Run steps in a child of their own each; what went wrong.

    Args:
        steps: What to do, one after another.
        folder: Of the runs.
        name: The case.
        killed: Whether the first must not come to its end.
    """
    output = folder / f"{name}.txt"
    for number, step in enumerate(steps):
        sys.stdout.flush()
        child = os.fork()
        if not child:
            run_child(step, output)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if killed and number == 0:
            if code != -signal.SIGKILL:
                return "was not killed: no such file was written"
        elif code:
            return "failed: " + "\n".join(output.read_text().splitlines()[-5:])
    return None


def run_child(step: Callable[[], None], output: Path) -> None:
    """Do something in a forked child, and end it."""
    code = 1
    try:
        os.setsid()
        with output.open("a") as file:
            for stream in (1, 2):
                os.dup2(file.fileno(), stream)
        importlib.import_module("torch").manual_seed(0)
        step()
        code = 0
    except BaseException as error:  # whatever it is, the parent must not be continued here
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def hash_folder(folder: Path) -> Iterator[tuple[str, str]]:
    """Item → hash of everything that a run has left: every tensor, every column of figures."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.name.startswith(".") or path.name in SKIPPED_FILES or SKIPPED_FOLDERS & set(place.parts):
            continue
        # A trial's name ends with a hash of its recipe, which may get a field.
        name = re.sub(r"-[0-9a-f]{12}(?=\.)", "", str(place))
        for key, digest in sorted(hash_file(path)):
            found.setdefault(f"{name} {key}", []).append(digest)
    for key, digests in found.items():
        yield key, digests[0] if len(digests) == 1 else hash_bytes("".join(sorted(digests)).encode())


def hash_file(path: Path) -> Iterator[tuple[str, str]]:
    """Item → hash of one file; nothing of a file of another kind."""
    if path.suffix == ".safetensors":
        # Not the header: it says where, when and of what version.
        for name, tensor in sys.modules["safetensors.torch"].load_file(path).items():
            content = tensor.reshape(-1).view(sys.modules["torch"].uint8).numpy().tobytes()
            yield name, hash_bytes(f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + content)
        return
    if path.suffix == ".jsonl":
        rows: dict[int, dict[str, Any]] = {}  # a step that a resumed run has taken anew has a second row
        for row in map(json.loads, path.read_text().splitlines()):
            rows.setdefault(row["step"], {}).update(row)
        tree: Any = list(rows.values())
    elif path.suffix == ".json":
        tree = json.loads(path.read_text())
        tree = tree.get("figures", tree) if isinstance(tree, dict) else tree
    elif path.suffix == ".csv":
        with path.open(newline="") as file:
            tree = list(csv.DictReader(file))
    else:
        return
    columns: dict[str, list[Any]] = {}
    for key, value in walk(tree, ""):
        columns.setdefault(key, []).append(value)
    for key, values in columns.items():
        if not UNSTEADY.search(key):
            yield key, hash_bytes(json.dumps(values).encode())


def walk(tree: Any, key: str) -> Iterator[tuple[str, Any]]:
    """The figures of a tree, each with the last name on the way to it."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield from walk(value, name)
    elif isinstance(tree, list):
        for value in tree:
            yield from walk(value, key)
    elif isinstance(tree, int | float):
        yield key, tree
    elif isinstance(tree, str):
        try:
            yield key, float(tree)
        except ValueError:
            return


def hash_bytes(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


PYTHON_CASES: dict[str, Callable[[Path], None]] = {}

if __name__ == "__main__":
    sys.exit(main())
