"""Files from strangers: refused in one line, whatever is in them; nothing in them is run, fetched or written to."""

import contextlib
import io
import json
import pickle
import re
import signal
import struct
import sys
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import lkd
from benchmarks.hostile_input import worker
from benchmarks.hostile_input.archive_mutators import PICKLES, Payload
from benchmarks.hostile_input.image_mutators import SIDES
from benchmarks.hostile_input.read_data import add, draw_picture, write_shards
from benchmarks.hostile_input.read_tensors import CPU, TINY, tiny_training
from benchmarks.hostile_input.readers import READERS
from benchmarks.hostile_input.text_mutators import ALIAS_BOMB, MERGE_BOMB
from lkd.cli import main
from lkd.config import TrainRecipe
from lkd.config.parse import parse_recipe
from lkd.core.errors import UserError
from lkd.core.files import MOST_JSON, read_json, write_json
from lkd.core.tensor_files import MOST_HEADER, encode, load_checkpoint, save_checkpoint, write_tensors
from lkd.data import load_dataset
from lkd.data.image_files import MOST_PIXELS, DamagedImageError, as_bytes, decode
from lkd.data.sources import index_tar
from lkd.influence.weighted_loss import load_weights
from lkd.losses.learned.file import KIND, VERSION
from lkd.losses.learned.forms import FORMS
from lkd.models import build
from lkd.models.files import load_network, save_network
from lkd.models.published_weights import load_crd_checkpoint
from lkd.pool.pool import INDEX, open_pool, write_student
from lkd.training.checkpoints import Checkpoints

SOURCES = [
    path
    for package in (Path(lkd.__file__).parent, Path(lkd.__file__).parents[1] / "meta")
    for path in package.rglob("*.py")
]
IMPORT = "{class_path: evil_module.Evil, init_args: {}}"


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
    """The short form of benchmarks.hostile_input.run."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    findings: list[dict] = []
    monkeypatch.setattr(worker, "say", lambda **row: findings.append(row))
    before = signal.signal(signal.SIGPROF, worker.stop)
    try:
        worker.fuzz(name, range(40 if name == "recipe" else 200), tmp_path / "files")
    finally:
        signal.signal(signal.SIGPROF, before)
    bad = [row for row in findings if row["outcome"] not in ("read", "refused")]
    assert not bad, bad[0]
    counts = read_json(Path("progress.json"))["counts"]
    assert counts["refused"] > 0
    assert sum(counts.values()) == (40 if name == "recipe" else 200)


@pytest.mark.parametrize("number", range(len(PICKLES)))
def test_a_pickle_is_refused_not_run(number: int, tmp_path, no_evil) -> None:
    path = tmp_path / "teacher.pth"
    path.write_bytes(PICKLES[number])
    with pytest.raises(UserError, match=r"cannot be read as a checkpoint of weights only|holds no state dict"):
        load_crd_checkpoint(path, "resnet8")


def test_a_pickle_in_torchs_own_archive_is_refused_not_run(tmp_path, no_evil) -> None:
    path = tmp_path / "teacher.pth"
    torch.save({"model": Payload()}, path)
    with pytest.raises(UserError, match="cannot be read as a checkpoint of weights only"):
        load_crd_checkpoint(path, "resnet8")


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path) -> None:
    path = tmp_path / "teacher.pth"
    torch.save({"model": {"w": torch.zeros(1000)}}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data/1", bytes(10**7))
    with pytest.raises(UserError, match=r"in memory, but torch\.save compresses nothing"):
        load_crd_checkpoint(path, "resnet8")


@pytest.mark.parametrize(
    "text",
    [
        "seed: !!python/object/apply:os.system ['touch EVIL']",
        "loss: !!python/object/new:evil_module.Evil []",
        f"data: {IMPORT}",
        "data: evil_module.Evil",
        f"data: '{IMPORT}'",
        f"loss: {{name: kd, weight: [{IMPORT}]}}",
        f"loss: {{name: {IMPORT}}}",
        f"student: {{options: {{a: {IMPORT}}}}}",
        f"student: {IMPORT}",
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


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ALIAS_BOMB, "line 2: aliases .* are not read"),
        (MERGE_BOMB, "line 2: aliases .* are not read"),
        ("a: &a [*a]", "line 1: aliases .* are not read"),
        ("a: " + "[" * 30 + "]" * 30, "nested more than 20 deep"),
        ("a: " + "[" * 100_000, "is not YAML"),
        ("a: " + "x" * 2_000_000, "longer than 1,048,576 characters"),
        ("a: !!timestamp 2001-", "is not YAML that is read"),
    ],
)
def test_yaml_that_swells_is_refused(text: str, message: str, tmp_path) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(UserError, match=message):
        parse_recipe("distill", [str(tmp_path / "r.yaml")])


def test_messages_steer_no_terminal(tmp_path, capsys) -> None:
    (tmp_path / "n.safetensors").write_bytes(b"")
    write_tensors(tmp_path / "n.safetensors", {}, "\x1b[2Jevil\n", 1, {})
    assert main(["evaluate", "--checkpoint", str(tmp_path / "n.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "\x1b" not in error
    assert r"\x1b[2Jevil" in error
    assert error.count("\n") == 1


def test_a_header_that_is_too_long_is_refused_before_it_is_read(tmp_path) -> None:
    path = tmp_path / "a.lkd.safetensors"
    with path.open("wb") as file:
        file.write(struct.pack("<Q", MOST_HEADER + 1))
        file.truncate(MOST_HEADER + 100)  # sparse: it is long enough
    with pytest.raises(UserError, match="its header would have 67,108,865 bytes, at most 67,108,864 are read"):
        lkd.load_loss(path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"hidden": 10**9}, "do not fit: logits|do not fit: parts.logits"),
        ({"hidden": "x"}, "do not fit"),
        ({"hidden": 3, "conditioning": 7}, "do not fit"),
    ],
)
def test_a_loss_of_any_size_is_refused_before_it_is_made(arguments, message, tmp_path) -> None:
    parts = {"logits": {"class": "DecoupledLoss", "arguments": arguments}}
    weights = lkd.losses.LearnedLoss({"logits": FORMS["decoupled"](hidden=3)}).state_dict()
    write_tensors(tmp_path / "l", weights, KIND, VERSION, {"architecture": {"parts": parts}, "provenance": {}})
    with pytest.raises(UserError, match=message):
        lkd.load_loss(tmp_path / "l")


def test_json_that_is_too_long_is_refused_before_it_is_read(tmp_path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(MOST_JSON + 1)  # sparse
    with pytest.raises(UserError, match="it has 67,108,865 bytes, at most 67,108,864 of JSON are read"):
        read_json(tmp_path / "a.json")


def test_json_that_is_nested_deeply_is_refused(tmp_path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match="nested too deeply"):
        read_json(tmp_path / "a.json")
    save_file({"x": torch.zeros(1)}, tmp_path / "l", {"lkd": "[" * 100_000})
    with pytest.raises(UserError, match="nested too deeply"):
        lkd.load_loss(tmp_path / "l")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pretrained": True}, None),  # nothing is fetched: the file has the weights
        ({"num_classes": 10**12}, "do not fit a tiny_cnn: classifier.weight"),
        ({"name": "vit_tiny_patch16_224", "options": {"depth": 10**7}}, "options has a number 1e.07"),
        ({"name": "vit_tiny_patch16_224", "options": {"depth": 1000}}, "far more parameters than the file has"),
        ({"name": "resnet10t", "options": {"checkpoint_path": "evil.pth"}}, "option checkpoint_path is not taken"),
        ({"name": "resnet10t", "options": {"pretrained": True}}, "option pretrained is not taken"),
        ({"name": "resnet10t", "options": {"pretrained_cfg": {"file": "evil.pth"}}}, "option pretrained_cfg is not"),
        ({"name": "hf-hub:someone/model"}, "unknown name 'hf-hub:someone/model'"),
        ({"name": 3}, "is not a good network"),
        ({"unknown": 1}, "is not a good network"),
    ],
)
def test_a_network_file_names_its_network_and_nothing_else(change, message, tmp_path, monkeypatch) -> None:
    path = tmp_path / "n.safetensors"
    write_tensors(path, build(**TINY).state_dict(), "network", 1, {"architecture": TINY | change, "provenance": {}})
    if message is None:
        assert load_network(path)[1]["architecture"]["pretrained"] is False
        return
    with pytest.raises(UserError, match=message):
        load_network(path)


def test_a_network_file_without_channels_has_three(tmp_path) -> None:
    save_network(tmp_path / "n", build("tiny_cnn", 10), {"name": "tiny_cnn", "num_classes": 10}, {})
    assert load_network(tmp_path / "n")[1]["architecture"]["in_chans"] == 3


@pytest.mark.parametrize("file", ["../student.safetensors", "/tmp/student.safetensors", "..", ""])
def test_a_pool_reads_its_own_folder_alone(file: str, tmp_path) -> None:
    (tmp_path / "pool").mkdir()
    write_student(tmp_path / "student.safetensors", tiny_training())
    students = [{"file": file, "training": 0, "progress": 0.5}]
    write_json(tmp_path / "pool" / INDEX, {"students": students, "architecture": TINY, "split": "x"})
    images = type("Images", (), {"fingerprint": "x"})
    with pytest.raises(UserError, match="is not a name of a file in the pool's folder"):
        open_pool(tmp_path / "pool", images, TINY)


def test_a_student_of_other_shapes_is_refused(tmp_path) -> None:
    write_student(tmp_path / "s", tiny_training())
    write_json(
        tmp_path / INDEX,
        {
            "students": [{"file": "s", "training": 0, "progress": 0.5}],
            "architecture": TINY | {"in_chans": 3},
            "split": "x",
        },
    )
    pool = open_pool(tmp_path, type("Images", (), {"fingerprint": "x"}), TINY | {"in_chans": 3})
    with pytest.raises(UserError, match=r"is not a good pool student .*stages.stage1.0.weight is"):
        pool.read(0, CPU)


def test_a_checkpoint_of_something_else_is_refused(tmp_path) -> None:
    checkpoints = Checkpoints(tmp_path / "c", TrainRecipe(), str)
    checkpoints.save(3, {"training": {"step": 3, "student": {"x": torch.zeros(1)}}})
    with pytest.raises(UserError, match="is not a good folder of checkpoints of this training"):
        checkpoints.resume_training(tiny_training())
    tree = {"a": torch.zeros(1)}
    header = {"tree": {"dict": [["a", {"tensor": "7"}]]}}
    tensors: dict[str, torch.Tensor] = {}
    encode(tree, tensors)
    write_tensors(tmp_path / "c" / "000000009.safetensors", tensors, "checkpoint", 2, header)
    assert checkpoints.load()["training"]["step"] == 3, "the one before takes its place"


@pytest.mark.parametrize("tree", [None, []])
def test_a_checkpoint_of_nothing_does_not_begin_a_training_anew_in_silence(tree, tmp_path) -> None:
    said: list[str] = []
    save_checkpoint(tmp_path / "000000003.safetensors", tree)
    assert Checkpoints(tmp_path, TrainRecipe(), said.append).resume_training(tiny_training()) == {}
    assert f"holds a {type(tree).__name__}, not what a training saves" in said[0]


def test_an_empty_checkpoint_is_refused(tmp_path) -> None:
    save_checkpoint(tmp_path / "000000003.safetensors", {})
    with pytest.raises(UserError, match="is not a good folder of checkpoints of this training"):
        Checkpoints(tmp_path, TrainRecipe(), str).resume_training(tiny_training())


META = "meta-training checkpoint"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda saved: saved.pop("loop"), "KeyError: 'loop'"),
        (lambda saved: saved["loop"].update(step=9), "outer step 9 of 2"),
        (lambda saved: saved["loop"].update(history=[{"step": "1"}]), "something else than numbers"),
        (lambda saved: saved["loop"].update(course=[(2.0, saved["loop"]["loss"])]), r"\[2.0\] do not ascend in"),
        (lambda saved: saved["loop"].update(course=[(0.0, {})]), "not those of the loss"),
        (lambda saved: saved["loop"]["guard"].update(report=1), "has the fields"),
        (lambda saved: saved["loop"]["guard"].update(rate="1"), "rate is a str, not a float"),
        (lambda saved: saved["loop"]["guard"].update(lost=-1), "counts are negative"),
        (lambda saved: saved["reuse"].update(rows=[{"step": 1}]), "a row lacks calibrated_cross_entropy, top1"),
        (lambda saved: saved["loop"]["optimizer"]["param_groups"][0].update(lr="1"), "options are not those"),
        (lambda saved: saved["loop"]["optimizer"]["state"][0].pop("exp_avg"), "differ in what is kept"),
        (
            lambda saved: saved["loop"]["optimizer"]["state"][0].update(step=torch.tensor(-1.0)),
            "optimiser's step is -1",
        ),
        (lambda saved: saved["loop"]["optimizer"]["state"][0].update(exp_avg=torch.tensor(0)), "exp_avg does not fit"),
        (lambda saved: saved["loop"]["optimizer"]["state"][0].update(step=torch.tensor(True)), "step is True, not"),
        (lambda saved: saved["loop"]["optimizer"]["state"][0].update(exp_avg="x"), "exp_avg does not fit"),
    ],
)
def test_a_meta_training_does_not_go_on_from_a_malformed_checkpoint(spoil, message: str, tmp_path) -> None:
    """Files whose hash fits: whoever means harm would see to that."""
    READERS[META].write(tmp_path)
    (path,) = tmp_path.glob("checkpoints/*")
    saved = load_checkpoint(path)
    spoil(saved)
    save_checkpoint(path, saved)
    with pytest.raises(UserError, match=f"is not a good folder of checkpoints of this meta-training .*{message}"):
        READERS[META].read(path)


@pytest.mark.parametrize("weight", [torch.tensor([1.0, float("nan")]), torch.tensor([-1.0, 1]), torch.ones(3)])
def test_weights_that_are_none_are_refused(weight: torch.Tensor, tmp_path) -> None:
    write_tensors(tmp_path / "w", {"index": torch.arange(2), "weight": weight}, "set of example weights", 1, {})
    with pytest.raises(UserError, match="has not one index"):
        load_weights(tmp_path / "w")


@pytest.mark.parametrize("name", ["../../evil.tar", "/tmp/evil.tar", "a/../../evil.tar", "evil\0.tar"])
def test_a_list_of_shards_does_not_lead_out_of_its_folder(name: str, tmp_path) -> None:
    write_shards(tmp_path)
    write_json(tmp_path / "_info.json", {"splits": {"train": {"filenames": [name]}}})
    with pytest.raises(UserError, match="is not a file in that folder"):
        load_dataset("wds/x", str(tmp_path))


def test_a_name_that_is_too_long_is_no_file(tmp_path, capsys) -> None:
    write_shards(tmp_path)
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
            add(tar, "c/0.jpg", draw_picture(0))
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


def patch_size(tar: bytes, size: bytes) -> bytes:
    """A tar whose first member claims a size; its checksum fits."""
    head = tar[:124] + size.ljust(12, b"\0") + b" " * 8 * 0 + tar[136:148] + b" " * 8 + tar[156:512]
    return head[:148] + f"{sum(head):06o}".encode() + b"\0 " + head[156:] + tar[512:]


@pytest.mark.parametrize("size", [(-1024 % 2**88), (-512 % 2**88), 2**40, 2**62])
def test_a_tar_member_of_an_impossible_size_is_refused(size: int, tmp_path) -> None:
    """A negative one would send Python's tarfile back to where it came from, for ever."""
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for number in range(3):
            add(tar, f"c/{number}.jpg", b"x" * 600)
    lead = b"\xff" if size > 2**80 else b"\x80"
    changed = patch_size((tmp_path / "a.tar").read_bytes(), lead + size.to_bytes(11, "big"))
    (tmp_path / "a.tar").write_bytes(changed)
    with pytest.raises(UserError, match="cannot be read as an uncompressed tar"):
        list(index_tar(tmp_path / "a.tar"))


def test_tars_in_tars_have_an_end(tmp_path) -> None:
    content = b""
    for _ in range(10):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            add(tar, "n.tar", content)
        content = buffer.getvalue()
    (tmp_path / "a.tar").write_bytes(content)
    with pytest.raises(UserError, match="lie in each other, more than 3 deep"):
        list(index_tar(tmp_path / "a.tar"))


def test_a_label_of_any_size_makes_no_list_of_classes(tmp_path) -> None:
    with tarfile.open(tmp_path / "train-0.tar", "w") as train, tarfile.open(tmp_path / "val-0.tar", "w") as val:
        for tar in (train, val):
            add(tar, "0.jpg", draw_picture(0))
            add(tar, "0.cls", b"99999999999")
    with pytest.raises(UserError, match="label 99,999,999,999 of a training image"):
        load_dataset("wds/x", str(tmp_path))


def claim_size(content: bytes, width: int, height: int) -> bytes:
    """A PNG that claims a size."""
    head = b"IHDR" + struct.pack(">II", width, height) + content[24:29]
    return content[:12] + head + struct.pack(">I", zlib.crc32(head)) + content[33:]


@pytest.mark.parametrize(("width", "height"), [(SIDES[-1], 1), (65_500, 65_500), (8193, 8193), (2**31 - 1, 2**31 - 1)])
def test_an_image_that_claims_to_be_huge_is_refused_unread(width: int, height: int) -> None:
    bomb = claim_size(draw_picture(0, "PNG"), width, height)
    with pytest.raises(DamagedImageError, match=f"cannot be decoded .*{width} × {height} pixels, |cannot be decoded"):
        decode(as_bytes(bomb), "bomb.png")
    start = draw_picture(0).index(b"\xff\xc0")
    jpeg = bytearray(draw_picture(0))
    jpeg[start + 5 : start + 9] = struct.pack(">HH", min(height, 65_500), min(width, 65_500))
    with pytest.raises(DamagedImageError, match=f"at most {MOST_PIXELS:,} are decoded|times the other|bomb"):
        decode(as_bytes(bytes(jpeg)), "bomb.jpg")


def test_an_animation_and_sixteen_bits_give_one_image_of_eight() -> None:
    from PIL import Image

    frames = [Image.open(io.BytesIO(draw_picture(number))).resize((20, 20)) for number in range(3)]
    moving, deep = io.BytesIO(), io.BytesIO()
    frames[0].save(moving, "GIF", save_all=True, append_images=frames[1:])
    Image.fromarray(np.arange(400, dtype=np.uint16).reshape(20, 20) * 100).save(deep, "PNG")
    for file in (moving, deep):
        pixels = decode(as_bytes(file.getvalue()), "x")
        assert pixels.shape == (3, 20, 20)
        assert pixels.dtype == torch.uint8


def test_no_shell_no_pickle_and_no_unpacking() -> None:
    """What the sources must not say; whoever needs it, thinks of SECURITY.md first."""
    forbidden = re.compile(
        r"shell=True|os\.system|os\.popen|pickle\.loads?\(|yaml\.(unsafe_|full_)?load\(|extractall\(|eval\(|exec\("
    )
    found = [
        f"{path}: {line.strip()}"
        for path in SOURCES
        for line in path.read_text().splitlines()
        if forbidden.search(line) and not re.search(r"\.eval\(|requires_grad", line)
    ]
    assert not found
    loads = [line for path in SOURCES for line in path.read_text().splitlines() if "torch.load(" in line]
    assert loads
    assert all("weights_only=True" in line for line in loads)
    archives = [line for path in SOURCES for line in path.read_text().splitlines() if "np.load(" in line]
    assert all("allow_pickle=False" in line for line in archives)
    assert pickle.dumps(Payload()), "what the other tests are about can be pickled"
    assert json.dumps({})
