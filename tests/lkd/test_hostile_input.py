"""Files from strangers: refused in one line, whatever is in them; nothing in them is run, fetched or written to."""

import contextlib
import io
import re
import signal
import struct
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import lkd
from benchmarks.photographs import add_member
from lkd.cli import main
from lkd.config import TrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.core.files import MOST_JSON, read_json, write_json
from lkd.core.tensor_files import MOST_HEADER, load_checkpoint, read_tensors, save_checkpoint, write_tensors
from lkd.data import load_dataset
from lkd.data.image_files import DamagedImageError, as_bytes, decode
from lkd.data.sources import index_tar
from lkd.influence.weighted_loss import load_weights
from lkd.losses.learned.file import KIND, VERSION
from lkd.models import build
from lkd.models.files import load_network, save_network
from lkd.models.foreign_weights import load_foreign_network
from lkd.pool.pool import INDEX
from lkd.training.checkpoints import Checkpoints
from tests.hostile_input import mutators, readers, worker
from tests.hostile_input.readers import READERS, TINY

SOURCES = [path for name in ("lkd", "meta") for path in (Path(lkd.__file__).parents[1] / name).rglob("*.py")]


@pytest.fixture
def no_evil(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported, and the same mark as hostile commands leave."""
    (tmp_path / "evil_module.py").write_text("open('EVIL', 'w')\n\n\nclass Evil:\n    pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    assert not Path("EVIL").exists(), "code was run"
    assert "evil_module" not in sys.modules


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused(name: str, tmp_path, monkeypatch) -> None:
    """The short form of tests.hostile_input.run."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    findings: list[dict] = []
    monkeypatch.setattr(worker, "say", lambda **row: findings.append(row))
    before = signal.signal(signal.SIGPROF, worker.stop)
    files = FEWER.get(name, FILES)
    try:
        counts = worker.fuzz(name, range(files), tmp_path / "files")
    finally:
        signal.signal(signal.SIGPROF, before)
    bad = [row for row in findings if row["outcome"] not in ("read", "refused") or row["mib"] >= 512]
    assert not bad, bad[0]
    assert counts["refused"] > 0
    assert sum(counts.values()) == files


FILES = 30
FEWER = {"recipe": 15, "foreign checkpoint": 15, "meta-training checkpoint": 20}  # a file of these takes long


def test_pickles_are_refused_not_run(tmp_path, no_evil) -> None:
    path = tmp_path / "teacher.pth"
    for content in mutators.PICKLES:
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"teacher\.pth"):
            load_foreign_network(path, "resnet8")
    torch.save({"model": mutators.Payload()}, path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint of weights only"):
        load_foreign_network(path, "resnet8")
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(10**7))
    with pytest.raises(UserError, match=r"in memory, but torch\.save compresses nothing"):
        load_foreign_network(path, "resnet8")


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch EVIL']",
        "loss: !!python/object/new:evil_module.Evil []",
        f"data: {mutators.IMPORT}",
        "data: evil_module.Evil",
        f"data: '{mutators.IMPORT}'",
        f"loss: {{name: kd, weight: [{mutators.IMPORT}]}}",
        f"loss: {{name: {mutators.IMPORT}}}",
        f"student: {{options: {{a: {mutators.IMPORT}}}}}",
        f"student: {mutators.IMPORT}",
        "loss: {name: kd, weight: [{class_path: subprocess.Popen, init_args: {args: [touch, EVIL]}}]}",
    ],
)
def test_no_recipe_imports_or_makes_anything(text: str, tmp_path, no_evil) -> None:
    (tmp_path / "r.yaml").write_text(text + "\n")
    try:
        recipe = parse_recipe("distill", [str(tmp_path / "r.yaml")])
    except UserError:
        return
    assert "object at" not in repr(recipe)
    assert "Popen" not in repr(recipe) or "class_path" in repr(recipe), "it stays what the text says"


def test_a_recipe_names_no_file_that_is_run(tmp_path, no_evil) -> None:
    (tmp_path / "evil.py").write_text("open('EVIL', 'w')\n")
    (tmp_path / "base.yaml").write_text(f"plugins: {tmp_path / 'evil.py'}\n")
    (tmp_path / "r.yaml").write_text("base: base.yaml\n")
    with pytest.raises(UserError, match="plugins"):
        parse_recipe("distill", [str(tmp_path / "r.yaml")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (mutators.ALIAS_BOMB, "line 2: aliases"),
        (mutators.MERGE_BOMB, "line 2: aliases"),
        ("a: &a [*a]", "line 1: aliases"),
        ("a: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("a: " + "[" * 100_000, "is not YAML"),
        ("a: " + "x" * 2_000_000, "longer than 1,048,576 characters"),
        ("a: !!timestamp 2001-", "is not YAML"),
    ],
)
def test_yaml_that_swells_is_refused(text: str, message: str, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_recipe("distill", [str(tmp_path / "r.yaml")])


def test_messages_steer_no_terminal(tmp_path, capsys) -> None:
    write_tensors(tmp_path / "n.safetensors", {}, "\x1b[2Jevil\n", 1, {})
    assert main(["evaluate", "--checkpoint", str(tmp_path / "n.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert r"\x1b[2Jevil" in error
    assert error.count("\n") == 1


def test_what_is_too_long_or_nested_too_deeply_is_refused_before_it_is_read(tmp_path) -> None:
    path = tmp_path / "a.lkd.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MOST_HEADER + 1))
        file.truncate(MOST_HEADER + 100)  # sparse: it is long enough
    with pytest.raises(UserError, match="its header would have 67,108,865 bytes"):
        lkd.load_loss(path)
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(MOST_JSON + 1)  # sparse
    with pytest.raises(UserError, match="67,108,865 bytes"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
    save_file({"x": torch.zeros(1)}, tmp_path / "l", {"lkd": "[" * 100_000})
    with pytest.raises(UserError, match="nested too deeply"):
        lkd.load_loss(tmp_path / "l")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 10**9}, "do not fit"),
        ({"hidden": "x"}, "do not fit"),
        ({"hidden": 3, "conditioning": 7}, "do not fit"),
        ({"hidden": 3, "conditioning": [["state"]]}, "do not fit"),
        ({"hidden": 3, "conditioning": ["state", "mood"]}, "'mood'. is not a list of .*: if a newer lkd"),
        ({"hidden": 3, "mood": 1}, "unexpected keyword argument 'mood': if a newer lkd wrote it, update lkd"),
        ({"hidden": 3, "conditioning": ["progress", "state", "agreement"]}, "size mismatch for parts.logits.body"),
    ],
)
def test_a_loss_of_any_size_or_of_a_newer_package_is_refused_before_it_is_made(
    arguments: dict, message: str, tmp_path
) -> None:
    readers.write_losses(tmp_path)
    weights, header = read_tensors(tmp_path / "decoupled.lkd.safetensors", KIND, VERSION)
    header["architecture"]["parts"]["logits"]["arguments"] = arguments
    write_tensors(tmp_path / "l", weights, KIND, VERSION, {key: header[key] for key in ("architecture", "provenance")})
    with pytest.raises(UserError, match=message) as error:
        lkd.load_loss(tmp_path / "l")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_classes": 10**12}, "do not fit a tiny_cnn: classifier.weight"),
        ({"name": "vit_tiny_patch16_224", "options": {"depth": 10**7}}, "options has a number 1e.07"),
        ({"name": "vit_tiny_patch16_224", "options": {"depth": 1000}}, "far more parameters than the file has"),
        ({"name": "resnet10t", "options": {"checkpoint_path": "evil.pth"}}, "option checkpoint_path is not taken"),
        ({"name": "resnet10t", "options": {"pretrained": True}}, "option pretrained is not taken"),
        ({"name": "resnet10t", "options": {"pretrained_cfg": {"file": "evil.pth"}}}, "option pretrained_cfg is not"),
        ({"name": "hf-hub:someone/model"}, "'hf-hub:someone/model' is no name"),
        ({"name": 3}, "is not a good network"),
        ({"unknown": 1}, "is not a good network"),
    ],
)
def test_a_network_file_names_its_network_and_nothing_else(change: dict, message: str, tmp_path) -> None:
    path, weights = tmp_path / "n.safetensors", build(**TINY).state_dict()
    write_tensors(path, weights, "network", 1, {"architecture": TINY | change, "provenance": {}})
    with pytest.raises(UserError, match=message):
        load_network(path)


def test_a_network_file_has_its_weights_and_three_channels(tmp_path) -> None:
    write_tensors(
        tmp_path / "m", build(**TINY).state_dict(), "network", 1, {"architecture": TINY | {"pretrained": True}}
    )
    assert load_network(tmp_path / "m")[1]["architecture"]["pretrained"] is False, "nothing is fetched"
    save_network(tmp_path / "n", build("tiny_cnn", 10), {"name": "tiny_cnn", "num_classes": 10}, {})
    assert load_network(tmp_path / "n")[1]["architecture"]["in_chans"] == 3


def test_a_pool_reads_its_own_folder_alone_and_students_of_its_shapes(tmp_path) -> None:
    for file in ("../student.safetensors", "/tmp/student.safetensors", "..", ""):
        readers.write_pool(tmp_path, students=[{"file": file, "training": 0, "progress": 0.5}])
        with pytest.raises(UserError, match="is not a name of a file in the pool's folder"):
            readers.read_pool(tmp_path / "pool" / INDEX)
    readers.write_pool(tmp_path, architecture=TINY | {"in_chans": 3})
    with pytest.raises(UserError, match=r"is not a good pool student .*stages.stage1.0.weight is"):
        readers.read_pool(tmp_path / "pool" / INDEX, TINY | {"in_chans": 3})


def test_a_checkpoint_of_something_else_is_refused(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", TrainRecipe(), str)
    checkpoints.save(3, {"training": {"step": 3, "student": {"x": torch.zeros(1)}}})
    with pytest.raises(UserError, match="is not a good folder of checkpoints of this training"):
        checkpoints.resume_training(readers.tiny_training())
    header = {"tree": {"dict": [["a", {"tensor": "7"}]]}}
    write_tensors(tmp_path / "c" / "000000009.safetensors", {"0": torch.zeros(1)}, "checkpoint", 2, header)
    assert checkpoints.load()["training"]["step"] == 3, "the one before takes its place"
    save_checkpoint(tmp_path / "d" / "000000003.safetensors", {})
    with pytest.raises(UserError, match="is not a good folder of checkpoints of this training"):
        Checkpoints(tmp_path / "d", TrainRecipe(), str).resume_training(readers.tiny_training())


@pytest.mark.parametrize("tree", [None, []])
def test_a_checkpoint_of_nothing_does_not_begin_a_training_anew_in_silence(tree, tmp_path) -> None:
    said: list[str] = []
    save_checkpoint(tmp_path / "000000003.safetensors", tree)
    assert Checkpoints(tmp_path, TrainRecipe(), said.append).resume_training(readers.tiny_training()) == {}
    assert f"holds a {type(tree).__name__}, not what a training saves" in said[0]


def spoil_optimizer(**changed):
    return lambda saved: saved["loop"]["optimizer"]["state"][0].update(changed)


SPOILED = {
    "KeyError: 'loop'": lambda saved: saved.pop("loop"),
    "outer step 9 of 2": lambda saved: saved["loop"].update(step=9),
    "numbers alone": lambda saved: saved["loop"].update(history=[{"step": "1"}]),
    r"\[2.0\] do not ascend in": lambda saved: saved["loop"].update(course=[(2.0, saved["loop"]["loss"])]),
    "not those of the loss": lambda saved: saved["loop"].update(course=[(0.0, {})]),
    "KeyError: 'lost'": lambda saved: saved["loop"]["guard"].pop("lost"),
    "could not convert": lambda saved: saved["loop"]["guard"].update(norms=["x"]),
    "counts are negative": lambda saved: saved["loop"]["guard"].update(lost=-1),
    "a row of a log needs step, calibrated": lambda saved: saved["reuse"].update(rows=[{"step": 1}]),
    "options are not those": lambda saved: saved["loop"]["optimizer"]["param_groups"][0].update(lr="1"),
    "differ in what is kept": lambda saved: saved["loop"]["optimizer"]["state"][0].pop("exp_avg"),
    "optimiser's step is -1": spoil_optimizer(step=torch.tensor(-1.0)),
    "step is True, not": spoil_optimizer(step=torch.tensor(True)),
    "exp_avg does not fit": spoil_optimizer(exp_avg="x"),
}


def test_a_meta_training_does_not_go_on_from_a_malformed_checkpoint(tmp_path) -> None:
    """Files whose hash fits: whoever means harm would see to that."""
    reader = READERS["meta-training checkpoint"]
    reader.write(tmp_path)
    (path,) = tmp_path.glob("checkpoints/*")
    whole = path.read_bytes()
    for message, spoil in SPOILED.items():
        path.write_bytes(whole)
        saved = load_checkpoint(path)
        spoil(saved)
        save_checkpoint(path, saved)
        with pytest.raises(UserError, match=f"is not a good folder of checkpoints of this meta-training .*{message}"):
            reader.read(path)


@pytest.mark.parametrize("weight", [torch.tensor([1.0, float("nan")]), torch.tensor([-1.0, 1]), torch.ones(3)])
def test_weights_that_are_none_are_refused(weight: torch.Tensor, tmp_path) -> None:
    write_tensors(tmp_path / "w", {"index": torch.arange(2), "weight": weight}, "set of example weights", 1, {})
    with pytest.raises(UserError, match="has not one index"):
        load_weights(tmp_path / "w")


def test_a_list_of_shards_does_not_lead_out_of_its_folder(tmp_path) -> None:
    readers.write_shards(tmp_path)
    for name in ("../../evil.tar", "/tmp/evil.tar", "a/../../evil.tar", "evil\0.tar"):
        write_json(tmp_path / "_info.json", {"splits": {"train": {"filenames": [name]}}})
        with pytest.raises(UserError, match="is not a file in that folder"):
            load_dataset("wds/x", str(tmp_path))


def test_a_name_that_is_too_long_is_no_file(tmp_path, capsys) -> None:
    readers.write_shards(tmp_path)
    write_json(tmp_path / "_info.json", {"splits": {"train": {"filenames": ["x" * 300]}}})
    with pytest.raises(UserError, match=r"x: no such shard, but _info\.json names it"):
        load_dataset("wds/x", str(tmp_path))
    with pytest.raises(UserError, match="no such file"):
        lkd.load_loss("x" * 300 + ".safetensors")
    for words in (["report"], ["inspect"], ["meta-train", "--pool_dir"], ["distill", "--loss"]):
        assert main([*words, "x" * 300 + ".yaml"]) == 2
        assert "xxx" in capsys.readouterr().err


@pytest.mark.parametrize("kind", [tarfile.REGTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
@pytest.mark.parametrize("name", ["../../evil.jpg", "/evil/evil.jpg", "c/x.jpg"])
def test_members_of_a_tar_are_never_written_anywhere(name, kind, tmp_path) -> None:
    """They are read in place: a name, however it climbs, is no more than a name, and links are passed over."""
    folder = tmp_path / "a" / "b" / "data"
    folder.mkdir(parents=True)
    for part in ("train", "val"):
        with tarfile.open(folder / f"{part}.tar", "w") as tar:
            add_member(tar, "c/0.jpg", readers.draw_picture(0))
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"evil"))
    before = sorted(tmp_path.rglob("*"))
    with contextlib.suppress(UserError):  # its class is none, or not the one that is trained on
        load_dataset("tar", str(folder))
    assert sorted(tmp_path.rglob("*")) == before
    linked = [member.name for member in index_tar(folder / "train.tar") if member.name == name]
    assert bool(linked) == (kind == tarfile.REGTYPE)


@pytest.mark.parametrize("size", [-1024, -512, 2**40, 2**62])
def test_a_tar_member_of_an_impossible_size_is_refused(size: int, tmp_path) -> None:
    """A negative one would send Python's tarfile back to where it came from, for ever."""
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for number in range(3):
            add_member(tar, f"c/{number}.jpg", b"x" * 600)
    content, lead = path.read_bytes(), b"\xff" if size < 0 else b"\x80"
    header = content[:124] + lead + (size % 2**88).to_bytes(11, "big") + content[136:512]
    path.write_bytes(mutators.fit_checksum(header) + content[512:])
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        list(index_tar(path))


def test_tars_in_tars_and_classes_have_an_end(tmp_path) -> None:
    (tmp_path / "a.tar").write_bytes(mutators.nest_tars(10))
    with pytest.raises(UserError, match="lie in each other, more than 3 deep"):
        list(index_tar(tmp_path / "a.tar"))
    for part in ("train", "val"):
        with tarfile.open(tmp_path / f"{part}-0.tar", "w") as tar:
            add_member(tar, "0.jpg", readers.draw_picture(0))
            add_member(tar, "0.cls", b"99999999999")
    with pytest.raises(UserError, match="label 99,999,999,999 of a training image"):
        load_dataset("wds/x", str(tmp_path))


def test_arrays_claim_no_more_than_the_file_holds(tmp_path, no_evil) -> None:
    """A header may say any shape, a directory of an archive any size: nothing is allocated for them."""
    readers.write_npz(tmp_path)
    with zipfile.ZipFile(tmp_path / "plain.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    shape, claimed = b"(3, 8, 8), }", b"(3, 8, 800000000000), }"
    body = members["train_images.npy"]
    assert shape in body
    body = body.replace(shape + b" " * (len(claimed) - len(shape)), claimed)
    with zipfile.ZipFile(tmp_path / "evil.npz", "w") as archive:
        for name, content in (members | {"train_images.npy": body}).items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match=r"evil\.npz: cannot be read.*train_images\.npy claims uint8"):
        load_dataset("npz/evil", str(tmp_path))
    for content in mutators.PICKLES:
        with zipfile.ZipFile(tmp_path / "evil.npz", "w") as archive:
            archive.writestr("train_images.npy", content)
        with pytest.raises(UserError, match=r"evil\.npz: cannot be read"):
            load_dataset("npz/evil", str(tmp_path))


@pytest.mark.parametrize(("width", "height"), [(2**31 - 1, 1), (65_500, 65_500), (8193, 8193), (2**31 - 1, 2**31 - 1)])
@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_an_image_that_claims_to_be_huge_is_refused_unread(format: str, width: int, height: int) -> None:
    with pytest.raises(DamagedImageError, match=r"^bomb: cannot be decoded"):
        decode(as_bytes(mutators.claim_size(readers.draw_picture(0, format), width, height)), "bomb")


def test_an_animation_gives_one_image() -> None:
    frames = [Image.open(io.BytesIO(readers.draw_picture(number))).resize((20, 20)) for number in range(3)]
    moving = io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    pixels = decode(as_bytes(moving.getvalue()), "x")
    assert (pixels.shape, pixels.dtype) == ((3, 20, 20), torch.uint8)


def test_no_shell_no_pickle_and_no_unpacking() -> None:
    """What the sources must not say; whoever needs it, thinks of SECURITY.md first."""
    forbidden = re.compile(
        r"shell=True|os\.system|os\.popen|pickle\.loads?\(|yaml\.(unsafe_|full_)?load\(|extractall\(|eval\(|exec\("
    )
    lines = [line.strip() for path in SOURCES for line in path.read_text().splitlines()]
    assert not [line for line in lines if forbidden.search(line) and not re.search(r"\.eval\(|requires_grad", line)]
    loads = [line for line in lines if "torch.load(" in line]
    assert loads
    assert all("weights_only=True" in line for line in loads)
    assert all("allow_pickle=False" in line for line in lines if "np.load(" in line)
