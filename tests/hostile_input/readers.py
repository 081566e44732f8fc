"""Every reader of files that may come from strangers: what a valid one looks like, who damages it, how it is read."""

import io
import json
import shutil
import struct
import sys
import tarfile
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

import lkd
from benchmarks.photographs import add_member
from lkd.config import DataRecipe, MetaSettings, MetaTrainRecipe, ModelRecipe, PoolSettings, TeacherRecipe, TrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.core.files import write_json
from lkd.core.outputs import Outputs
from lkd.core.tensor_files import write_tensors
from lkd.data import Batch, ImageSet, load_dataset
from lkd.data.augment import CROP_NUMBERS, cut_center, cut_random
from lkd.data.image_files import DamagedImageError, FileSource, LoadingOptions, as_bytes, decode, open_source
from lkd.data.packed import open_packed, pack
from lkd.influence.weighted_loss import load_weights, save_weights
from lkd.losses import LearnedLoss, ReplayedLoss
from lkd.losses.build import build_loss
from lkd.losses.learned.features import FeatureLoss
from lkd.losses.learned.file import read_provenance, save_loss
from lkd.losses.learned.forms import FORMS
from lkd.losses.learned.networks import KNOWN_CONDITIONING
from lkd.meta_training.log import describe_reuse
from lkd.meta_training.meta_train import learn
from lkd.meta_training.online_student import assemble_loss
from lkd.meta_training.reuse import Reuse
from lkd.models import build, teacher_cache
from lkd.models.files import load_network, save_network
from lkd.models.foreign_weights import load_foreign_network
from lkd.pool.pool import INDEX, open_pool, write_student
from lkd.pool.sampling import check_sampling
from lkd.tracking.run import Run, check_resumable
from lkd.tracking.tracker import Tracker, read_log
from lkd.training.build import choose_student, prepare_images
from lkd.training.checkpoints import Checkpoints
from lkd.training.distill import start_training
from tests.hostile_input import mutators
from tests.lkd.meta_recipes import make_loop, make_pool, open_world

CPU = torch.device("cpu")
TINY = {"name": "tiny_cnn", "num_classes": 10, "in_chans": 1, "pretrained": False, "options": {}}
STAGES = {"stage1": (4, 14, 14), "stage2": (8, 7, 7)}
SIZE = 16  # of crops

# ----------------------------------------------------------------------------------------------------------------------
# Losses, networks, trainings, pools: what is read is used once.


def write_losses(folder: Path) -> None:
    """A learned loss of every form, one that sees all there is, one over features, one that is replayed."""
    for name, form in FORMS.items():
        save_loss(folder / f"{name}.lkd.safetensors", LearnedLoss({"logits": form(hidden=3)}), {"seed": 1})
    told = LearnedLoss({"logits": FORMS["decoupled"](hidden=3, conditioning=KNOWN_CONDITIONING)})
    save_loss(folder / "told.lkd.safetensors", told, {})
    both = LearnedLoss({"logits": FORMS["decoupled"](hidden=3), "features": FeatureLoss(hidden=2)}, True)
    save_loss(folder / "both.lkd.safetensors", both, {"recipe": {"meta": {"kind": "both"}}, "curve": [{"step": 1}]})
    replayed = ReplayedLoss([LearnedLoss({"logits": FORMS["generic"](hidden=2)}) for _ in range(3)], [0.0, 0.3, 0.6])
    save_loss(folder / "replayed.lkd.safetensors", replayed, {})


def read_loss(path: Path) -> None:
    """Load a loss, attach it, compute it with its gradient."""
    read_provenance(path)
    build_loss(str(path), STAGES, STAGES)
    loss = lkd.load_loss(path)
    features = {name: torch.randn(2, *shape) for name, shape in STAGES.items()}
    student = Outputs(torch.randn(2, 3, requires_grad=True), features)
    terms = loss(student, Outputs(torch.randn(2, 3), features), torch.tensor([0, 2]), 0.3)
    torch.stack(list(terms.values())).sum().backward()


def write_networks(folder: Path) -> None:
    """Networks of the quickstart and of the literature, and one of timm's."""
    options = {"layers": [1, 1, 1, 1], "channels": [8, 8, 8, 8], "stem_width": 8}
    for name, own in (("tiny_cnn", {}), ("small_cnn", {}), ("resnet8", {}), ("resnet10t", {"options": options})):
        architecture = {"name": name, "num_classes": 10, "in_chans": 1, **own}
        save_network(folder / f"{name}.safetensors", build(**architecture), architecture, {"top1": 0.5})


def read_network(path: Path) -> None:
    """Load a network and ask it about an image."""
    network, header = load_network(path)
    with torch.no_grad():
        network(torch.zeros(1, header["architecture"].get("in_chans", 3), 32, 32))


def write_foreign(folder: Path) -> None:
    """A checkpoint as RepDistiller's, and one of another network."""
    state = build("resnet8", 10, 3).state_dict()
    torch.save({"epoch": 240, "model": state, "best_acc": torch.tensor(70.0)}, folder / "new.pth")
    torch.save({"model": {"a.weight": torch.zeros(3, 4)}}, folder / "small.pth")


@cache
def tiny_training() -> Any:
    """A training that a checkpoint is of."""
    images = prepare_images(DataRecipe(train_size=100, meta_validation_size=50))
    student = choose_student(ModelRecipe("tiny_cnn"), images.train)
    parts = student, images, build_loss("cross_entropy"), lambda batch: None
    training = start_training(*parts, TrainRecipe(epochs=1, batch_size=20), 0, CPU)
    training.run_step()
    return training


def write_checkpoint(folder: Path) -> None:
    Checkpoints(folder / "checkpoints", TrainRecipe(), str).save_training(tiny_training(), history=[{"loss": 0.5}])


def read_checkpoint(path: Path) -> None:
    """Go on from a checkpoint, for a step; one that is passed over with a warning, being the first, is refused too."""
    said: list[str] = []
    training = tiny_training()
    Checkpoints(path.parent, TrainRecipe(), said.append).resume_training(training)
    if said:
        raise UserError(said[-1])
    if training.step < training.total_steps:
        training.run_step()


class SilentRun(Run):
    """A run that prints nothing, and ends where a damaged first checkpoint would have it begin anew."""

    def say(self, *lines: str) -> None:
        if "begun anew" in lines[0]:
            raise UserError(lines[0])


def open_silent_run(folder: Path) -> Run:
    return SilentRun(folder, CPU, Tracker(folder, None, {}), "meta-train", quiet=True)


@cache
def prepare_meta_training() -> tuple[Any, ...]:
    """Recipe, world and pool."""
    recipe = MetaTrainRecipe(
        data=DataRecipe(train_size=60, meta_validation_size=60),
        teacher=TeacherRecipe(path="random", name="tiny_cnn"),
        student=ModelRecipe("tiny_cnn"),
        train=TrainRecipe(epochs=1, batch_size=20),
        pool=PoolSettings(students=1, snapshots=2, max_age=1.0),
        meta=MetaSettings(
            outer_steps=2, students_per_step=1, rollout_steps=1, rollout_epochs=1, outer_batch_size=30,
            reuse_every=2, reuse_students=1, reuse_epochs=1, estimator="first_order", checkpoint_every=1,
        ),
    )  # fmt: skip
    world = open_world(recipe)
    with tempfile.TemporaryDirectory() as folder:
        pool = make_pool(recipe, world, Path(folder) / "pool", open_silent_run(Path(folder)))
        read = {number: pool.read(number, world.student.make()) for number in range(len(pool))}
        object.__setattr__(pool, "read", lambda number, network: read[number])
    return recipe, world, pool


def go_on(folder: Path) -> None:
    """Go on with a meta-training from the newest checkpoint in a folder, to its end."""
    recipe, world, pool = prepare_meta_training()
    run = open_silent_run(folder)
    loop, reuse = make_loop(recipe, world, pool), Reuse([world], recipe.meta, run)
    try:
        learn(loop, reuse, run)
    finally:
        run.tracker.finish()
    assemble_loss(loop.loss, reuse.best or loop.points)
    loop.guard.report()
    describe_reuse(reuse.best_row, loop.step, {"": world.images.train.num_classes})


def write_meta_checkpoint(folder: Path) -> None:
    """The checkpoint after the first outer step."""
    (folder / "checkpoints").mkdir(parents=True)
    with tempfile.TemporaryDirectory() as work:
        go_on(Path(work))
        shutil.copy(Path(work) / "checkpoints" / "000000001.safetensors", folder / "checkpoints")


def read_meta_checkpoint(path: Path) -> None:
    with tempfile.TemporaryDirectory() as work:
        (Path(work) / "checkpoints").mkdir()
        shutil.copy(path, Path(work) / "checkpoints")
        go_on(Path(work))


def write_pool(folder: Path, **changed: Any) -> None:
    """A pool of one student at one age."""
    write_student(folder / "pool" / "student.safetensors", tiny_training())
    student = {"file": "student.safetensors", "training": 0, "progress": 0.2}
    index = {"students": [student], "architecture": TINY, "split": "0123"}
    write_json(folder / "pool" / INDEX, index | changed)


def read_pool(path: Path, architecture: dict[str, Any] = TINY) -> None:
    """Open a pool and read its student."""
    images: Any = SimpleNamespace(fingerprint="0123")
    pool = open_pool(path.parent, images, architecture)
    assert bool(((pool.ages >= 0) & (pool.ages <= 1)).all())
    assert pool.trainings >= 0
    network = build(**architecture)
    for position in range(min(len(pool), 3)):
        student = pool.read(position, network)
        assert 0 <= student.progress <= 1
        state = {**student.state.parameters, **student.state.buffers}
        torch.func.functional_call(network, state, torch.zeros(2, 1, 28, 28))


def write_weights(folder: Path) -> None:
    pixels = torch.zeros(9, 1, 2, 2, dtype=torch.uint8)
    images = ImageSet(pixels, torch.arange(9), torch.arange(9), tuple("abcdefghi"), (0.0,), (1.0,))
    save_weights(folder / "weights.safetensors", images, torch.ones(9), torch.zeros(9), {"seed": 0})


def read_weights(path: Path) -> None:
    index, weight, _ = load_weights(path)
    assert index.dtype == torch.int64
    assert index.shape == weight.shape
    assert bool((weight >= 0).all())


def write_cache(folder: Path) -> None:
    """A teacher cache of two files, of the largest logits alone."""
    index = torch.arange(3, 9)
    header = {"made_with": {"teacher": {"name": "x"}}, "top_k": 2, "shard_size": 4, "num_classes": 10, "teacher": "x"}
    kind, version = teacher_cache.INDEX_KIND, teacher_cache.VERSION
    write_tensors(folder / "cache" / teacher_cache.INDEX, {"index": index}, kind, version, header)
    cached = teacher_cache.read_cache(folder / "cache")
    for shard, rows in enumerate(index.split(4)):
        kept = teacher_cache.compress_logits(torch.randn(len(rows), 10), 2)
        write_tensors(cached.path(1, shard), kept, teacher_cache.KIND, version, {"cache": cached.fingerprint})


def read_cache(path: Path) -> None:
    """Open a cache and look all of it up."""
    cached = teacher_cache.read_cache(path.parent)
    teacher = teacher_cache.CachedTeacher(cached, range(1, 2), CPU)
    batch = Batch(torch.zeros(len(cached.index), 0), cached.index, cached.index, torch.ones_like(cached.index))
    assert teacher(batch).logits.shape == (len(cached.index), cached.header["num_classes"])


# ----------------------------------------------------------------------------------------------------------------------
# Images and data sets of them.


def draw_picture(seed: int, format: str = "JPEG") -> bytes:
    """A small random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (20 + seed, 24, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def use_image(image: torch.Tensor) -> None:
    """Check that what was decoded is an image."""
    assert (image.dtype, image.dim(), image.shape[0]) == (torch.uint8, 3, 3)
    assert cut_center(image, SIZE, round(SIZE / 0.875)).shape == (3, SIZE, SIZE)
    assert cut_random(image, SIZE, torch.full((CROP_NUMBERS,), 0.4)).shape == (3, SIZE, SIZE)


def write_pictures(folder: Path) -> None:
    """A picture in every format, an animation and one of 16 bits."""
    for suffix, format in ((".png", "PNG"), (".jpg", "JPEG"), (".webp", "WEBP"), (".bmp", "BMP"), (".tif", "TIFF")):
        (folder / f"a{suffix}").write_bytes(draw_picture(1, format))
    frames = [Image.open(io.BytesIO(draw_picture(2))) for _ in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    frames[0].convert("CMYK").save(folder / "inks.jpg")
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(folder / "deep.png")
    frames[0].save(folder / "progressive.jpg", progressive=True)


def read_picture(path: Path) -> None:
    """Decode a picture and cut crops out of it; a damaged one is skipped."""
    try:
        use_image(decode(as_bytes(path.read_bytes()), path.name))
    except DamagedImageError as error:
        raise UserError("skipped") from error


def write_class_tars(folder: Path) -> None:
    """A tar of class folders, and one of tars."""
    with tarfile.open(folder / "train.tar", "w") as tar:
        for number in range(3):
            add_member(tar, f"{'cd'[number % 2]}/{number}.jpg", draw_picture(number))
    with tarfile.open(folder / "val.tar", "w") as tar:
        for name in "cd":
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as nested:
                add_member(nested, "0.jpg", draw_picture(3))
            add_member(tar, f"{name}.tar", inner.getvalue())


def write_shards(folder: Path) -> None:
    """WebDataset shards with labels of both kinds, and the file that lists them."""
    for part, count in (("train", 3), ("val", 2)):
        with tarfile.open(folder / f"{part}-0.tar", "w") as tar:
            for number in range(count):
                add_member(tar, f"{number:04d}.jpg", draw_picture(number))
                name, label = ("cls", number % 2) if number else ("json", {"label": 0})
                add_member(tar, f"{number:04d}.{name}", json.dumps(label).encode())
    splits = {name: {"filenames": [f"{part}-0.tar"]} for name, part in (("train", "train"), ("validation", "val"))}
    (folder / "_info.json").write_text(json.dumps({"splits": splits}))


def decode_all(name: str, root: Path) -> None:
    """Load a data set and decode its images; no name of a file may lead out of the root."""
    dataset = load_dataset(name, str(root), LoadingOptions(SIZE, workers=1, damaged_limit=1.0))
    for part in (dataset.train, dataset.test):
        for file in part.images.source.paths:
            assert Path(file).resolve().is_relative_to(root.resolve()), f"{file} is outside of {root}"
        part.batch(torch.arange(len(part)), CPU)


def write_packed(folder: Path) -> None:
    """Packed images, and the images that they were made of."""
    (folder / "images").mkdir()
    for number in range(3):
        (folder / "images" / f"{number}.jpg").write_bytes(draw_picture(number))
    pack(open_source(source_of(folder), LoadingOptions(workers=1)), folder / "packed", "train", 19, str)


def source_of(folder: Path) -> FileSource:
    return FileSource(folder / "images", [f"{number}.jpg" for number in range(3)])


def read_packed(path: Path) -> None:
    """Open packed images and look at each."""
    packed = open_packed(source_of(path.parents[1]), path.parent, "train", LoadingOptions(SIZE))
    for position in range(len(packed.names)):
        try:
            use_image(packed.load(position))
        except DamagedImageError:
            continue


def write_idx(folder: Path) -> None:
    """Files of the form of Fashion-MNIST's, with fewer images: those are refused, for their number."""
    raw = folder / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, count in (("train", 5), ("t10k", 3)):
        head = struct.pack(">4i", 0x803, count, 28, 28)
        (raw / f"{name}-images-idx3-ubyte").write_bytes(head + bytes(count * 28 * 28))
        (raw / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">2i", 0x801, count) + bytes(range(count)))


def write_npz(folder: Path) -> None:
    """Arrays of images, compressed and not, one file with names of classes."""
    arrays = {f"{part}_images": np.arange(192, dtype=np.uint8).reshape(3, 8, 8) for part in ("train", "val", "test")}
    arrays |= {f"{part}_labels": np.array([[0], [1], [1]]) for part in ("train", "val", "test")}
    np.savez(folder / "plain.npz", **arrays)
    np.savez_compressed(folder / "packed.npz", class_names=np.array(["a", "b"]), **arrays)


def read_npz(path: Path) -> None:
    """Load arrays and look at all images."""
    dataset = load_dataset(f"npz/{path.stem}", str(path.parent))
    for part in (dataset.train, dataset.test):
        batch = part.batch(torch.arange(len(part)), CPU)
        assert batch.images.isfinite().all()
        assert 0 <= int(batch.target.min()) <= int(batch.target.max()) < part.num_classes


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and files of run directories.

RUN = {"command": "distill", "recipe": {"seed": 0, "data": {"name": "embedded"}}}
EVIL = "import pathlib\npathlib.Path({path!r}).touch()\n\n\nclass Evil:\n    pass\n"


def write_recipes(folder: Path) -> None:
    """A recipe with a base, and a module that must not be imported."""
    (folder / "evil_module.py").write_text(EVIL.format(path=str(folder / "EVIL")))
    sys.path.insert(0, str(folder))
    (folder / "base.yaml").write_text(
        "seed: 1\ndata:\n  name: embedded\n  train_size: 500\nrun_dir: runs/{pair}/x\npair: a-b\n"
        "with:\n  recipe.yaml:\n    loss: {weight: 0.4}\n"
    )
    (folder / "recipe.yaml").write_text(
        "base: base.yaml\ntrain:\n  epochs: 1\n  milestones: [1, 2]\n  learning_rate: 5e-2\n"
        "student:\n  name: resnet10t\n  options: {act_layer: relu}\nteacher:\n  path: embedded\n"
        "loss:\n  name: kd\n  weight: 0.5\n  temperature: 4\ndevice: cpu\n"
    )


def read_recipe(path: Path) -> None:
    """Parse a recipe as the command line does; nothing may be imported or run."""
    sys.modules.pop("evil_module", None)
    parse_recipe("distill", [str(path.with_name("recipe.yaml"))])


def write_fidelity(folder: Path) -> None:
    write_json(folder / "fidelity.json", {"age_weights": [[0.0, 1.0], [0.5, 0.2], [1.0, 0.0]], "recipe": {}})


def read_fidelity(path: Path) -> None:
    """Sample a pool by a file of `lkd fidelity`."""
    settings = PoolSettings(sampling="fidelity", fidelity_file=str(path))
    check_sampling(settings, torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64))


def write_run(folder: Path) -> None:
    write_json(folder / "config.json", RUN)
    lines = [json.dumps({"step": step, "time": 1.0, "loss": 0.5}) for step in range(4)]
    (folder / "log.jsonl").write_text("\n".join(lines) + "\n")


def read_run(path: Path) -> None:
    """Read what is read when a run is gone on with."""
    read_log(path.with_name("log.jsonl"))
    check_resumable(path.parent, RUN, "auto")


# ----------------------------------------------------------------------------------------------------------------------
# By name.


class Reader(NamedTuple):
    """A reader.

    Attributes:
        write: Writes valid files into a folder.
        targets: Glob patterns of the files that are damaged, one at a time.
        read: Reads the file at a path, which lies among the other valid ones, and uses what was read.
    """

    write: Callable[[Path], None]
    targets: tuple[str, ...]
    read: Callable[[Path], object]


IMAGES = (".png", ".jpg", ".gif", ".webp", ".bmp", ".tif")
MUTATORS = {
    ".safetensors": mutators.mutate_safetensors,
    **dict.fromkeys((".json", ".jsonl"), mutators.mutate_json_file),
    **dict.fromkeys(IMAGES, mutators.mutate_image),
    **dict.fromkeys((".pth", ".npz"), mutators.mutate_zip),
    ".tar": mutators.mutate_tar,
    ".yaml": mutators.mutate_yaml,
    "": mutators.mutate_idx,
}
"""From a file's suffix to what damages it besides `mutate_bytes`."""

READERS = {
    "learned loss": Reader(write_losses, ("*.safetensors",), read_loss),
    "network": Reader(write_networks, ("*.safetensors",), read_network),
    "foreign checkpoint": Reader(write_foreign, ("*.pth",), lambda path: load_foreign_network(path, "resnet8")),
    "training checkpoint": Reader(write_checkpoint, ("checkpoints/*.safetensors",), read_checkpoint),
    "meta-training checkpoint": Reader(write_meta_checkpoint, ("checkpoints/*.safetensors",), read_meta_checkpoint),
    "pool": Reader(write_pool, ("pool/index.json", "pool/*.safetensors"), read_pool),
    "example weights": Reader(write_weights, ("*.safetensors",), read_weights),
    "teacher cache": Reader(write_cache, ("cache/*.safetensors",), read_cache),
    "packed images": Reader(write_packed, ("packed/*",), read_packed),
    "image": Reader(write_pictures, tuple(f"*{suffix}" for suffix in IMAGES), read_picture),
    "class tars": Reader(write_class_tars, ("*.tar",), lambda path: decode_all("tar", path.parent)),
    "WebDataset shards": Reader(write_shards, ("*.tar", "*.json"), lambda path: decode_all("wds/fuzz", path.parent)),
    "IDX": Reader(write_idx, ("FashionMNIST/raw/*",), lambda path: load_dataset("fashion_mnist", str(path.parents[2]))),
    ".npz": Reader(write_npz, ("*.npz",), read_npz),
    "recipe": Reader(write_recipes, ("*.yaml",), read_recipe),
    "fidelity.json": Reader(write_fidelity, ("*.json",), read_fidelity),
    "run directory": Reader(write_run, ("*.json", "*.jsonl"), read_run),
}
