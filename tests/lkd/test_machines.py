"""Other people's machines: disks, file names, containers, devices, services, and runs that go on elsewhere."""

import errno
import fcntl
import importlib.util
import io
import logging
import os
import shlex
import shutil
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torchvision.io
from PIL import Image

from lkd import commands
from lkd.cli import add_resume, main
from lkd.config import DistillRecipe, MetaTrainRecipe, TeacherRecipe
from lkd.config.parse import make_recipe, parse_recipe
from lkd.config.parts import DataRecipe, WandbRecipe
from lkd.core import files, workers
from lkd.core.errors import UserError
from lkd.core.interrupt import Interrupted
from lkd.core.tensor_files import random_state, set_random_state
from lkd.data import image_files
from lkd.data.image_files import FileSource, LoadingOptions, decode, open_source
from lkd.data.packed import hash_names, open_packed, pack
from lkd.tracking.lineage import hash_folder
from lkd.tracking.run import choose_device, open_run
from lkd.tracking.tracker import start_wandb
from meta.randomness import read_generators, replaying

# ----------------------------------------------------------------------------------------------------------------------
# Disks.


@pytest.mark.outside(30)
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_disk_without_locks_is_warned_of(number: int, monkeypatch, caplog) -> None:
    def refuse(*_) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with open_run(DistillRecipe(run_dir="run"), "distill", quiet=True) as run:
        assert (run.path / "config.json").exists()
    assert "without file locks" in caplog.text


@pytest.mark.outside(30)
def test_a_disk_without_hard_links_holds_what_processes_share(monkeypatch, tmp_path) -> None:
    def refuse(*_) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert [files.create_json(tmp_path / "a.json", {"a": n}) for n in (1, 2)] == [True, False]
    assert files.read_json(tmp_path / "a.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


# ----------------------------------------------------------------------------------------------------------------------
# File names that are not UTF-8.

NAME = os.fsdecode(b"caf\xe9.png")


@pytest.mark.outside(31)
def test_names_that_are_no_utf_8_are_packed_and_cached(tmp_path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("a.png", NAME):
        Image.fromarray(torch.randint(256, (40, 40, 3), dtype=torch.uint8).numpy()).save(io_file := io.BytesIO(), "PNG")
        (pictures / name).write_bytes(io_file.getvalue())
    source = FileSource(pictures, ["a.png", NAME])
    loading = LoadingOptions(image_size=28, workers=1)
    pack(open_source(source, loading), tmp_path, "train", 32, lambda count: None)
    packed = open_packed(source, tmp_path, "train", loading)
    assert packed.load(1).shape == (3, 32, 32)
    assert hash_names(source) != hash_names(FileSource(pictures, ["a.png", "caf.png"])), "which a cache is known by"
    assert hash_folder(pictures)


@pytest.mark.outside(31)
def test_names_that_are_no_utf_8_are_said(monkeypatch, capfd) -> None:
    monkeypatch.setattr(logging.getLogger("lkd"), "propagate", False)  # pytest's workers cannot report such names
    with open_run(DistillRecipe(run_dir="run"), "distill", quiet=True) as run:
        run.say(f"warning: {NAME} is damaged")
        files_damage = image_files.Damage(limit=1.0)
        files_damage.record(1, [(NAME, f"{NAME}: cannot be decoded")])
    text = (run.path / "output.txt").read_text()
    assert text.count("\\udce9") == 2
    assert "Traceback" not in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# Services, and what the user is told to type.


@pytest.mark.outside(33)
@pytest.mark.parametrize("tag", ["", "a" * 65])
def test_a_tag_that_wandb_does_not_take_is_one_line(tag: str, tmp_path) -> None:
    with pytest.raises(UserError, match=r"wandb\.tags"):
        start_wandb(WandbRecipe(mode="offline", tags=["good", tag]), tmp_path, {})


@pytest.mark.outside(35)
@pytest.mark.parametrize("resume", [[], ["--resume", "never"], ["--resume=never"], ["--resume", "auto"]])
def test_the_line_to_go_on_with_can_be_typed(resume: list[str], monkeypatch, capsys) -> None:
    words = ["--loss", "{name: kd, weight: 0.3}", *resume, "--run_dir", "my runs/it's one"]

    def stop(recipe) -> None:
        raise Interrupted("stopped")

    monkeypatch.setattr(commands, "distill", stop)
    assert main(["distill", *words]) in (130, 143)
    line = capsys.readouterr().err.split("go on with: lkd ")[1]
    command, *again = shlex.split(line)
    recipe = parse_recipe(command, again)
    assert (recipe.loss, recipe.run_dir, recipe.resume) == ({"name": "kd", "weight": 0.3}, "my runs/it's one", "auto")
    assert again.count("--resume") == 1
    assert add_resume("distill", words) == [command, *again]


# ----------------------------------------------------------------------------------------------------------------------
# A run that goes on in another place.

MOVED = {
    "teacher": lambda place: DistillRecipe(teacher=TeacherRecipe(path=f"{place}/teacher.safetensors")),
    "checkpoint": lambda place: DistillRecipe(teacher=TeacherRecipe(path=f"{place}/t.pth", name="resnet32x4")),
    "cache": lambda place: DistillRecipe(teacher=TeacherRecipe(cache=f"{place}/folder")),
    "loss": lambda place: DistillRecipe(loss=f"{place}/loss.lkd.safetensors"),
    "loss with options": lambda place: DistillRecipe(loss={"name": f"{place}/loss.lkd.safetensors", "adapters": True}),
    "packed": lambda place: DistillRecipe(data=DataRecipe("image_folder", packed=f"{place}/folder")),
    "class map": lambda place: DistillRecipe(data=DataRecipe("image_folder", class_map=f"{place}/classes.txt")),
    "pool": lambda place: MetaTrainRecipe(pool_dir=f"{place}/folder"),
}
NAMES = ("teacher.safetensors", "t.pth", "loss.lkd.safetensors", "classes.txt", "folder/index.json")


@pytest.mark.outside(34)
@pytest.mark.parametrize("case", MOVED)
def test_a_run_goes_on_with_files_of_the_same_content_elsewhere(case: str, tmp_path) -> None:
    first = tmp_path / "first"
    (first / "folder").mkdir(parents=True)
    for name in NAMES:
        (first / name).write_bytes(name.encode())
    shutil.copytree(first, tmp_path / "second")
    shutil.copytree(first, tmp_path / "third")
    for name in NAMES:
        (tmp_path / "third" / name).write_bytes(b"another")

    def open_with(place: str, resume: str) -> None:
        recipe = MOVED[case](str(tmp_path / place))
        recipe.run_dir, recipe.resume = "run", resume
        with open_run(recipe, "meta-train" if case == "pool" else "distill", quiet=True) as run:
            (run.path / "checkpoints").mkdir(exist_ok=True)

    open_with("first", "never")
    shutil.rmtree(first)
    open_with("second", "auto")
    with pytest.raises(UserError, match="a resumed run keeps its config"):
        open_with("third", "auto")
    for name in NAMES:
        (tmp_path / "second" / name).write_bytes(b"another")
    if case in ("cache", "packed"):  # folders: a cache grows
        open_with("second", "auto")
    else:
        with pytest.raises(UserError, match=r"\w+: .*second/.* is not the file that the run in run was begun with"):
            open_with("second", "auto")


# ----------------------------------------------------------------------------------------------------------------------
# Processors, devices, seeds.

GROUPS = {
    "two": ("0::/", {"cpu.max": "200000 100000"}, 2),
    "a half": ("0::/", {"cpu.max": "50000 100000"}, 1),
    "one and a half": ("0::/", {"cpu.max": "150000 100000"}, 2),
    "no limit": ("0::/", {"cpu.max": "max 100000"}, 64),
    "of the job above": ("0::/job/step", {"job/cpu.max": "400000 100000", "job/step/cpu.max": "max 100000"}, 4),
    "version 1": (
        "4:cpu,cpuacct:/x\n3:memory:/y",
        {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"},
        3,
    ),
    "version 1, no limit": ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
    "nothing to read": (None, {}, 64),
}


@pytest.mark.outside(39)
@pytest.mark.parametrize("case", GROUPS)
def test_cores_are_those_that_are_granted(case: str, monkeypatch, tmp_path) -> None:
    own, contents, cores = GROUPS[case]
    if own is not None:
        (tmp_path / "own").write_text(own)
    for name, content in contents.items():
        file = tmp_path / "groups" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    monkeypatch.setattr(workers, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(workers, "OWN_CGROUP", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert workers.count_cores() == image_files.count_own_cores() == cores
    torch.set_num_threads(8)
    with open_run(DistillRecipe(run_dir="run"), "distill", quiet=True):
        assert torch.get_num_threads() == min(cores, 8)


@pytest.mark.outside(36)
@pytest.mark.parametrize("name", ["mps", "cuda", "mps:1", "meta", "nonsense"])
def test_a_device_that_is_not_there_is_one_line(name: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(UserError, match="device: "):
        choose_device(name)


@pytest.mark.outside(36)
@pytest.mark.parametrize("kind", ["mps"])
def test_a_device_that_is_there_is_taken(kind: str, monkeypatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert choose_device(kind) == torch.device(kind)
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="device: "):
        choose_device(f"{kind}:1")


@pytest.mark.parametrize("kind", ["cuda", "mps", "xpu"])
def test_every_kind_of_device_goes_on_with_its_own_random_numbers(kind: str, monkeypatch) -> None:
    device, state = torch.device(kind, 0), torch.zeros(2, dtype=torch.uint8)
    places = 0 if kind == "mps" else 1  # torch 2.6's functions of MPS take no device

    def read(*place):
        assert len(place) == places
        return state.clone()

    def write(new: torch.Tensor, *place):
        assert len(place) == places
        state.copy_(new)

    monkeypatch.setattr(torch.get_device_module(kind), "get_rng_state", read)
    monkeypatch.setattr(torch.get_device_module(kind), "set_rng_state", write)
    kept, generators = random_state(device), read_generators({"weight": Mock(device=device)})
    state += 1
    with replaying(generators):
        assert state.tolist() == [0, 0]
    assert state.tolist() == [1, 1]
    set_random_state(kept, device)
    assert state.tolist() == [0, 0]


@pytest.mark.outside(36)
@pytest.mark.parametrize("seed", [-(2**64), 2**63])
def test_a_seed_beyond_64_bits_is_one_line(seed: int) -> None:
    for words in (["--seed", str(seed)], ["--data.split_seed", str(seed)]):
        with pytest.raises(UserError, match=r"seed.* is not a whole number"):
            parse_recipe("distill", words)
    with pytest.raises(UserError, match="seed"):
        make_recipe(DistillRecipe, {"seed": seed})
    assert parse_recipe("distill", ["--seed", str(2**62)]).seed == 2**62


# ----------------------------------------------------------------------------------------------------------------------
# Decoders of pictures.


def jpegs() -> list[torch.Tensor]:
    """A colour picture, a grey one, and one with a side that is no multiple of 16."""
    contents = []
    generator = torch.Generator().manual_seed(0)
    for mode, size in (("RGB", (48, 64)), ("L", (48, 64)), ("RGB", (37, 51))):
        pixels = torch.randint(256, (*size, 3), generator=generator, dtype=torch.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels.numpy()).convert(mode).resize(size).save(file, "JPEG", quality=90)
        contents.append(image_files.as_bytes(file.getvalue()))
    return contents


@pytest.mark.outside(40)
def test_every_decoder_gives_the_same_pixels(monkeypatch) -> None:
    image_files.find_decoder.cache_clear()
    fast = [decode(content, "a.jpg") for content in jpegs()]
    monkeypatch.setattr(image_files, "find_decoder", lambda: None)
    for content, pixels in zip(jpegs(), fast, strict=True):
        assert torch.equal(decode(content, "a.jpg"), pixels)


@pytest.mark.outside(40)
def test_torchcodec_comes_first_and_nothing_is_needed(monkeypatch) -> None:
    class Codec:
        @staticmethod
        def decode_image(content, mode):
            return torch.zeros(3, 2, 2, dtype=torch.uint8)

    content = jpegs()[0]
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", Codec)
    image_files.find_decoder.cache_clear()
    assert decode(content, "a.jpg").shape == (3, 2, 2)
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    monkeypatch.delattr(torchvision.io, "decode_image")
    image_files.find_decoder.cache_clear()
    assert decode(content, "a.jpg").shape == (3, 64, 48)
    image_files.find_decoder.cache_clear()


@pytest.mark.outside(40)
def test_the_readers_are_there_without_torchvision_s_decoder(monkeypatch) -> None:
    monkeypatch.delattr(torchvision.io, "decode_image")
    monkeypatch.delattr(torchvision.io, "ImageReadMode")
    found = importlib.util.spec_from_file_location("anew", Path(image_files.__file__))
    monkeypatch.setitem(sys.modules, "anew", anew := importlib.util.module_from_spec(found))
    found.loader.exec_module(anew)
    assert anew.decode(jpegs()[0], "a.jpg").shape == (3, 64, 48)
