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
INFLUENCE = "{iterations: 3, curvature_examples: 100}"
CROPS = "--data.augmentation flip_and_crop"
SEEDS = f"{CROPS} --data.augmentation_seeds 2"
PARTS = "--data.train_size 200 --data.meta_validation_size 100"
IMAGES = "--data.name image_folder --data.root @images --data.meta_validation_size 12 --data.train_size 0"
FILES = f"{IMAGES} --data.image_size 32 --data.workers 1 --device cpu --threads 1 --train.epochs 2"
FILES += " --train.batch_size 16 --teacher.path random --teacher.name small_resnet"
RUNLESS = {"evaluate", "export", "inspect", "pack"}  # commands without a run directory

ESTIMATORS = ("higher", "unrolled", "adjoint", "first_order", "truncated", "last_step", "implicit", "evolution")
LOSSES = {  # ours; torchdistill's with a memory, of several stages; learned ones
    **{name: name for name in ("cross_entropy", "kd", "dkd", "logit_mse", "dist", "logit_standardization")},
    **{name: f"{{name: {name}, distillation: 1.0}}" for name in ("fitnet", "at", "sp")},
    "rkd": "{name: rkd, distance: 1.0, angle: 1.0}",
    "crd": "{name: torchdistill/CRDLoss, num_negative_samples: 64}",
    "review": "torchdistill/HierarchicalContextLoss",
    "kd-of-torchdistill": "torchdistill/KDLoss",
    "influence": f"{{name: influence_weighted, loss: kd, first_epoch: 1, influence: {INFLUENCE}}}",
    "influence-of-both": f"{{name: influence_weighted, first_epoch: 1, teacher_rate: 0.1, influence: {INFLUENCE}}}",
    "influence-from-file": "{name: influence_weighted, loss: fitnet, weights: @influence/weights.safetensors}",
    "learned": "@meta-audited/loss.lkd.safetensors",
    "learned-generic": "@meta-generic/loss.lkd.safetensors",
    "learned-over-features": "@meta-over-features/loss.lkd.safetensors",
    "learned-over-both": "@meta-over-both/loss.lkd.safetensors",
    "learned-with-adapters": "{name: @meta-over-both/loss.lkd.safetensors, adapters: true}",
    "replayed": "@meta-alternate/loss.lkd.safetensors",
}
BALANCES = ("constant", "linear", "cosine", "dynamic", "reversed", "dto_kd", "variance_optimal")
TRAININGS = {  # ways to train, with KD
    "flip-and-crop": CROPS,
    "mixed": f"{CROPS} --data.mixup 0.2 --data.cutmix 1.0",
    "repeated": f"{CROPS} --data.repeats 2",
    "noisy": "--data.label_noise 0.3 --teacher.random_answers 0.5",
    "half-labelled": "--labelled_size 100",
    "averaged": "--train.ema_decay 0.9 --train.accumulation 2 --train.nesterov true",
    "half-precision": "--train.precision bfloat16 --train.channels_last true",
    "multistep": "--train.schedule multistep --train.milestones [1] --train.warmup_epochs 1",
    "mobilenet": "--student.name small_mobilenet --seed 3",
    "cifar-network": "--student.name resnet8",
    "from-timm": "--student.name resnet10t --student.options '{stem_width: 8}' --data.train_size 60",
    "cached-crops": f"{SEEDS} --teacher.cache @cache-of-crops",
}
AXES = {  # of meta-training, beside estimator and interleaving
    **{name: f"--meta.objective {name}" for name in ("cross_entropy", "brier", "smoothed_error")},
    **{name: f"--pool.sampling {name}" for name in ("gaussian", "fixed_step", "latest")},
    "same-images": "--meta.batches same --meta.annealing constant --meta.rollout_epochs 3",
    "growing": "--meta.initial_rollout_steps 1 --meta.average 0.5 --pool.restore_momentum false",
    "scaled": "--meta.loss '{normalize_gradient: true, lipschitz: 2.0, conditioning: [progress]}'",
    "mixed": f"{CROPS} --data.mixup 0.2",
    "generic": "--meta.loss '{form: generic}'",
    "over-features": "--meta.kind features",
    "over-both": "--meta.kind both",
    "generic-over-both": "--meta.kind both --meta.loss '{form: generic, features: {deepest: 2}}'",
    "fidelity": "--pool.sampling fidelity --pool.fidelity_file @fidelity/fidelity.json",
}
BOTH = "--meta.interleaving both"

# Case → commands, one after another. @CASE is the folder that a case fills, @SELF the case's own.
CASES: dict[str, tuple[str, ...]] = {
    "pool": (f"pool {TRAIN} {POOL}",),
    "pool-with-dkd": (f"pool {TRAIN} {POOL} --pool.loss '{{name: dkd}}' {CROPS}",),
    "pool-cached": (f"pool {TRAIN} {POOL} --teacher.cache @cache",),
    "teacher": (f"teacher {TRAIN} {CROPS} --data.mixup 0.2",),
    "evaluate": (f"evaluate {PARTS} --device cpu --split meta_validation --checkpoint @teacher/teacher.safetensors",),
    "cache": (f"cache {TRAIN} --teacher.cache @SELF",),
    "cache-of-crops": (f"cache {TRAIN} {SEEDS} --teacher.cache @SELF --top_k 3 --shard_size 90",),
    **{f"meta-{name}": (f"{DRAWN} --meta.estimator {name}",) for name in (*ESTIMATORS, "audited")},
    **{f"meta-{name}": (f"{DRAWN} {options}",) for name, options in AXES.items()},
    "meta-before": (f"meta-train {TRAIN} {POOL} {OUTER} {REUSE}",),
    "meta-alternate": (f"{META} --meta.interleaving alternate",),
    "meta-alternate-over-both": (f"{META} --meta.interleaving alternate --meta.kind both",),
    "meta-both": (f"{META} {POOL} {BOTH}",),
    "meta-live": (f"{META} {POOL} --pool.sampling live --pool.refresh_every 1",),
    "meta-two-students": (f"{META} {POOL} --students '[{{name: small_cnn}}, {{name: tiny_cnn}}]'",),
    "meta-cached": (f"{META} --pool_dir @pool-cached/pool --teacher.cache @cache",),
    "meta-noisy": (f"{META} {POOL} --data.label_noise 0.3 --teacher.random_answers 0.5",),
    **{f"distill-{name}": (f"distill {TRAIN} --loss '{loss}'",) for name, loss in LOSSES.items()},
    **{
        f"distill-{name}-cached": (f"distill {TRAIN} --loss '{LOSSES[name]}' --teacher.cache @cache",)
        for name in ("kd", "learned")
    },
    **{f"distill-{name}": (f"distill {TRAIN} --loss kd {options}",) for name, options in TRAININGS.items()},
    **{f"balance-{name}": (f"distill {TRAIN} --balance '{{name: {name}, normalize: true}}'",) for name in BALANCES},
    "distill-files": (f"distill {FILES} --data.augmentation random_resized_crop",),
    "distill-packed": (
        f"pack {IMAGES} --data.packed @SELF/packed --shorter_side 40",
        f"distill {FILES} --data.augmentation rand_augment --data.packed @SELF/packed",
    ),
    "variance": (f"distill {TRAIN} --balance constant", "variance --run_dir @SELF --samples 10 --device cpu"),
    "influence": (f"influence {TINY} --checkpoint @distill-kd/student.safetensors --influence '{INFLUENCE}'",),
    "inspect": ("inspect @meta-over-both/loss.lkd.safetensors --out @SELF",),
    "export": ("export --checkpoint @distill-kd/student.safetensors --out_dir @SELF --formats [safetensors]",),
    "compare": (f"compare {TRAIN} --seeds 2 --workers 1 --methods '{METHODS}'",),
    "fidelity": (
        f"fidelity {TRAIN} --pool.students 2 --pool.snapshots 2 --pool.max_age 0.8 --ages [0.0,0.8] --losses '{RANKED}'"
        " --rollout_lengths [2,3] --rollout_epochs 1 --full_seeds 2 --rollouts 2 --outer_batch_size 50 --workers 1",
    ),
}
# Case → the file at whose writing, for the n-th time, a run of it is killed. It goes on as CASE-resumed.
KILLED = {
    "pool": (r"pool/.*\.safetensors", 3),
    **{f"distill-{name}": (r"checkpoints/\d", 3) for name in ("kd", "crd", "averaged", "learned-over-both")},
    **{f"{name}": (r"checkpoints/\d", 6) for name in ("balance-dynamic", "distill-influence")},
    **{f"meta-{name}": (r"checkpoints/\d", 2) for name in ("before", "alternate", "both", "live", "over-both")},
    "compare": (r"picks\.json", 1),  # between tuning and the trainings that are reported
}
SKIPPED_FOLDERS = {"checkpoints", "wandb", "pictures"}  # what a run goes on from is no result: its layout may change
SKIPPED_TREES = {"file", "invariances"}  # of an inspection: where the loss comes from, and checks that are tests now
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
    comparing.add_argument("--only", default="", help="regular expression of the cases that are compared")
    words = parser.parse_args()
    if words.command == "compare":
        return compare(json.loads(words.old.read_text()), json.loads(words.new.read_text()), words.only)
    import_package(words.root.resolve())
    with tempfile.TemporaryDirectory() as folder:
        return record(words.file.absolute(), words.only, (words.keep or Path(folder)).resolve())


def compare(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]], only: str) -> int:
    """Print what differs between two records; 1 if anything does."""
    cases = [case for case in {**old, **new} if re.search(only, case)]
    different = 0
    for case in cases:
        if case not in old or case not in new:
            print(f"{case}: only in the {'new' if case in new else 'old'} record")
            different += 1
            continue
        items = list_differences(old[case], new[case])
        different += bool(items)
        for key in items:
            how = "only in the new record" if key not in old[case] else "gone" if key not in new[case] else "differs"
            print(f"{case}: {key} {how}")
    print(f"{len(cases)} cases, {different} with differences")
    return int(different > 0)


def list_differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """The items that two records of a case do not have in common."""
    return [key for key in {**old, **new} if old.get(key) != new.get(key)]


def import_package(root: Path) -> None:
    """Import the package of a checkout, and what it needs, on one thread."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "CUDA_VISIBLE_DEVICES": ""}
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[os.getpid() % len(cores)]})  # one worker by default
    sys.path[0] = str(root)  # in the place of benchmarks/, also in a comparison's workers
    for name in ("torch", "torchvision", "timm", "safetensors.torch", "scipy.stats", "matplotlib.figure"):
        importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)
    package = importlib.import_module("lkd.cli")
    if not Path(package.__file__ or "").is_relative_to(root):
        raise SystemExit(f"{root} holds no package lkd; {package.__file__} was imported")


def record(file: Path, only: str, folder: Path) -> int:
    """Run the cases and write the hashes of each; 1 if one failed."""
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
        lines = CASES.get(origin, NEEDED.get(name, ()))
        for needed in re.findall(r"@([a-z][\w-]*)", " ".join(lines)):
            run(needed)
        started = sum(os.times()[:4])
        steps: list[Callable[[], None]]
        if name in PYTHON_CASES:
            (folder / name).mkdir(parents=True)
            steps = [partial(PYTHON_CASES[name], folder / name, folder)]
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
        found[name] = {} if problem else dict([*hash_printed(folder / f"{name}.txt"), *hash_folder(folder / name)])
        if not problem and origin != name:
            # The latest audit is not kept for a resumed run; the next one is taken when it is due.
            keys = [key for key in list_differences(found[origin], found[name]) if "audit" not in key]
            problem = f"does not leave what {origin} does: {', '.join(keys)}" if keys else None
        failed |= bool(problem)
        file.write_text(json.dumps(found, indent=1) + "\n")
        print(f"{name}: {problem or f'{len(found[name])} items'}, {sum(os.times()[:4]) - started:.1f} s", flush=True)

    for name in names:
        if re.search(only, name):
            run(name)
    print(f"{len(found)} cases, {sum(os.times()[:4]):.0f} s of CPU time")
    return int(failed)


def split(line: str, name: str, folder: Path) -> list[str]:
    """The words of a command line, with the folders of cases in the place of their names."""
    line = line.replace("@SELF", f"@{name}")
    words = shlex.split(re.sub(r"@([a-z][\w-]*)", lambda match: str(folder / match[1]), line))
    return words if "--run_dir" in words or words[0] in RUNLESS else [*words, "--run_dir", str(folder / name)]


def run_command(words: list[str]) -> None:
    """Run a command; leave the process if it fails."""
    code = sys.modules["lkd.cli"].main(words)
    if code:
        raise RuntimeError(f"lkd {' '.join(words)}: exit code {code}")


def kill_and_run(words: list[str], pattern: str, count: int) -> None:
    """Run a command that is killed, with its workers, when a file is put in its place for the n-th time."""
    left = count
    os.setsid()  # its workers are killed with it, and nobody else

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


def hash_printed(output: Path) -> Iterator[tuple[str, str]]:
    """Item → hash of figures that a command prints, a line each."""
    for name, value in re.findall(r"^  (\w+) +([\d.]+)$", output.read_text(), re.MULTILINE):
        yield f"printed {name}", hash_bytes(value.encode())


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
            steady = {key: value for key, value in row.items() if not UNSTEADY.search(key)}
            if not set(steady) <= {"step", "balance"}:  # rows of speed come every few seconds, whatever the step is
                rows.setdefault(row["step"], {}).update(steady)
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
            if name not in SKIPPED_TREES:
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


def save_trained(folder: Path, trained: Any) -> None:
    """Keep what `lkd.distill` or `lkd.meta_train` has returned, beside the run's own files."""
    network = trained.student if hasattr(trained, "student") else trained.loss
    state = {name: tensor.contiguous().clone() for name, tensor in network.state_dict().items()}
    sys.modules["safetensors.torch"].save_file(state, folder / "returned.safetensors")
    (folder / "returned.json").write_text(json.dumps(getattr(trained, "history", None) or trained.curve))


def write_images(folder: Path, runs: Path) -> None:
    """A folder of images: three classes, told apart by their colour."""
    image, random = importlib.import_module("PIL.Image"), importlib.import_module("numpy").random.default_rng(0)
    for part, count in (("train", 24), ("val", 6)):
        for number in range(3 * count):
            path = folder / part / f"class{number % 3}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = random.integers(0, 128, (48, 56, 3), dtype="uint8")
            pixels[..., number % 3] += 100
            image.fromarray(pixels).save(path)


def draw_pictures() -> tuple[Any, Any]:
    """Images and labels of four classes."""
    torch = sys.modules["torch"]
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(240) % 4
    images = torch.randint(0, 200, (240, 3, 16, 16), generator=generator) + 10 * labels.view(-1, 1, 1, 1)
    return images.to(torch.uint8), labels


def build_network(width: int) -> Any:
    """A network of the caller's own."""
    nn = sys.modules["torch"].nn
    convolutions = (nn.Conv2d(3, width, 3, 2), nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
    return nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(4 * width, 4))


def make_loss() -> Any:
    """A loss of the caller's own."""
    torch: Any = sys.modules["torch"]

    class Loss(torch.nn.Module):
        """Cross-entropy, and the distance of the logits."""

        def forward(self, student: Any, teacher: Any, target: Any, progress: Any = None) -> dict[str, Any]:
            distance = (student.logits - teacher.logits).square().mean()
            return {"task": torch.nn.functional.cross_entropy(student.logits, target), "distance": distance}

    return Loss()


def distill_in_python(folder: Path, runs: Path, loss: Any, **options: Any) -> None:
    """`lkd.distill` with modules and tensors."""
    settings = {"student": build_network(4), "train_set": draw_pictures()} | PYTHON | options
    save_trained(
        folder, sys.modules["lkd"].distill(teacher=build_network(16), loss=loss(runs), run_dir=folder, **settings)
    )


def distill_by_name(folder: Path, runs: Path) -> None:
    """`lkd.distill` with names: what the command line does."""
    settings = PYTHON | {"train_size": 200, "meta_validation_size": 100}
    save_trained(folder, sys.modules["lkd"].distill("small_cnn", "embedded", "embedded", run_dir=folder, **settings))


def distill_read_images(folder: Path, runs: Path) -> None:
    """`lkd.distill` with images that were read, and some to score on, a student that is built, and a balance."""
    read = sys.modules["lkd"].read_images
    images, labels = draw_pictures()
    options = {"num_classes": 4, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    train, scored = read((images[:200], labels[:200]), **options), read((images[200:], labels[200:]), **options)
    settings = {"train_set": train, "meta_validation_set": scored}
    settings |= {"student": lambda: build_network(4), "augmentation": "flip_and_crop", "balance": {"name": "dynamic"}}
    distill_in_python(folder, runs, lambda runs: "dkd", **settings)


def learn_in_python(folder: Path, runs: Path) -> None:
    """`lkd.meta_train` with functions, modules and tensors."""
    meta = {"outer_steps": 2, "rollout_steps": 3, "rollout_epochs": 1, "outer_batch_size": 40, "reuse_students": 1}
    settings = PYTHON | {"meta_validation_size": 40, "meta": meta, "pool": {"students": 1, "snapshots": 2}}
    students, teacher = [lambda: build_network(4), lambda: build_network(6)], build_network(16)
    save_trained(folder, sys.modules["lkd"].meta_train(students, teacher, draw_pictures(), run_dir=folder, **settings))


def apply_loss(folder: Path, runs: Path) -> None:
    """`lkd.load_loss` in a loop of the caller's own: terms and gradients."""
    torch, package = sys.modules["torch"], sys.modules["lkd"]
    loss = package.load_loss(runs / "meta-audited" / "loss.lkd.safetensors")
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(32, 7, generator=generator) for _ in range(2))
    target = torch.randint(7, (32,), generator=generator)
    student.requires_grad_()
    terms = loss(package.Outputs(student, {}), package.Outputs(teacher, {}), target, progress=0.25)
    sum(terms.values()).backward()
    found = {name: term.detach() for name, term in terms.items()} | {"gradient": student.grad}
    sys.modules["safetensors.torch"].save_file(found, folder / "terms.safetensors")


NEEDED = {"python-learned": ("@meta-audited",), "python-load-loss": ("@meta-audited",)}
PYTHON: dict[str, Any] = {"epochs": 2, "batch_size": 20, "device": "cpu", "threads": 1, "quiet": True}
PYTHON_CASES: dict[str, Callable[[Path, Path], None]] = {
    "images": write_images,
    "python-names": distill_by_name,
    "python-modules": partial(distill_in_python, loss=lambda runs: "kd", meta_validation_size=40),
    "python-own-loss": partial(distill_in_python, loss=lambda runs: make_loss()),
    "python-learned": partial(distill_in_python, loss=lambda runs: runs / "meta-audited" / "loss.lkd.safetensors"),
    "python-read-images": distill_read_images,
    "python-meta-train": learn_in_python,
    "python-load-loss": apply_loss,
}


if __name__ == "__main__":
    sys.exit(main())
