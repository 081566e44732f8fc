"""Pictures that users of other projects brought, without a word: each is right here, or one line says what is wrong."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.photographs import add_member
from lkd.core.errors import UserError
from lkd.data.arrays import read_images
from lkd.data.image_files import DamagedImageError, as_bytes, decode
from lkd.data.readers import load_dataset


def encode(image: Image.Image, form: str) -> torch.Tensor:
    """An image as a file's bytes."""
    image.save(file := io.BytesIO(), form)
    return as_bytes(file.getvalue())


RAMP = np.linspace(0, 65535, 256 * 4).astype(np.uint16).reshape(4, 256)


@pytest.mark.outside(1)
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_of_grey_are_scaled(form: str) -> None:
    pixels = decode(encode(Image.fromarray(RAMP), form), "ramp").float()
    assert pixels.shape == (3, 4, 256)
    torch.testing.assert_close(pixels[0], torch.from_numpy(RAMP / 257.0).float(), atol=0.51, rtol=0)


@pytest.mark.outside(1)
@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_range_are_refused(kind: type) -> None:
    with pytest.raises(DamagedImageError, match="black and white"):
        decode(encode(Image.fromarray(RAMP.astype(kind)), "TIFF"), "ramp")


@pytest.mark.outside(1)
@pytest.mark.parametrize(
    ("mode", "form"), [*((mode, "PNG") for mode in ("1", "LA", "P", "RGBA")), ("CMYK", "TIFF"), ("CMYK", "JPEG")]
)
def test_every_other_mode_keeps_what_is_seen(mode: str, form: str) -> None:
    grey = Image.fromarray((RAMP // 257).astype(np.uint8))
    image = grey.point(lambda value: 255 * (value > 127)).convert("1") if mode == "1" else grey.convert(mode)
    found = decode(encode(image, form), mode).float().mean(0)
    expected = torch.from_numpy(np.array(grey)).float()
    assert (found - (255.0 * (expected > 127) if mode == "1" else expected)).abs().max() < 9


@pytest.mark.outside(1)
def test_white_may_be_zero() -> None:
    file = io.BytesIO()
    Image.fromarray(RAMP).save(file, "TIFF", tiffinfo={262: 0})
    ramp = decode(as_bytes(file.getvalue()), "ramp").float()
    assert ramp[0, 0, 0] > 250 > 5 > ramp[0, -1, -1]


@pytest.mark.outside(1)
@pytest.mark.parametrize("mode", ["P", "I;16", "1"])
def test_pillow_images_from_python_are_what_is_seen(mode: str) -> None:
    seen = Image.fromarray((RAMP // 257).astype(np.uint8)).convert("RGB").quantize(256) if mode == "P" else None
    image = seen or (Image.fromarray(RAMP) if mode == "I;16" else Image.fromarray(RAMP > 32767))
    images = read_images([(image, 0), (image, 1)], mean=None, std=None).images
    assert images.dtype == torch.uint8
    assert images[0, 0, 0, 0] < 5 < 250 < images[0, 0, -1, -1]


@pytest.mark.outside(1)
def test_16_bits_of_a_torchvision_data_set() -> None:
    class Deep(torch.utils.data.Dataset):
        targets = (0, 1)

        def __len__(self) -> int:
            return 2

        def __getitem__(self, position: int) -> tuple:
            return Image.fromarray(RAMP.repeat(64, 0)), position

    files = read_images(Deep(), image_size=32).images
    assert 100 < files.load(0).float().mean() < 155


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            add_member(tar, name, content)


def draw(size: int = 8) -> bytes:
    Image.fromarray(np.zeros((size, size, 3), np.uint8)).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


def write_shard(path: Path, *labels: int) -> None:
    samples = [(f"{number}.png", draw()) for number in range(len(labels))]
    write_tar(path, dict(samples) | {f"{number}.cls": b"%d" % label for number, label in enumerate(labels)})


@pytest.mark.outside(2)
@pytest.mark.parametrize(
    ("train", "val"),
    [("festival-train-0", "festival-val-0"), ("constrained-train-0", "constrained-val-0"), ("a_TRAIN_0", "a_Val_0")],
)
def test_shards_are_of_a_split_by_whole_words(train: str, val: str, tmp_path) -> None:
    write_shard(tmp_path / f"{train}.tar", 0, 1, 0, 1)
    write_shard(tmp_path / f"{val}.tar", 1)
    dataset = load_dataset("wds/x", str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (4, 1)


@pytest.mark.outside(2)
def test_folders_of_shards_are_of_a_split_by_whole_words(tmp_path) -> None:
    write_shard(tmp_path / "train" / "valley-0.tar", 0, 1)
    write_shard(tmp_path / "val" / "0.tar", 1)
    write_shard(tmp_path / "valuable" / "0.tar", 0, 1, 1)
    dataset = load_dataset("wds/x", str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (2, 1)


@pytest.mark.outside(2)
@pytest.mark.parametrize("named", ["both splits", "twice", "by its name"])
def test_a_shard_is_in_one_split(named: str, tmp_path) -> None:
    for name in ("a", "b") if named != "by its name" else ("train-val-0", "train-1", "val-1"):
        write_shard(tmp_path / f"{name}.tar", 0, 1)
    if named != "by its name":
        splits = {"train": ["a.tar", "b.tar" if named == "both splits" else "a.tar"], "val": ["b.tar"]}
        info = {"splits": {part: {"filenames": files} for part, files in splits.items()}}
        (tmp_path / "_info.json").write_text(json.dumps(info))
    with pytest.raises(UserError, match=r"data\.root"):
        load_dataset("wds/x", str(tmp_path))


@pytest.mark.outside(3)
@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle"])
@pytest.mark.parametrize("kind", ["image_folder", "tar"])
def test_hidden_folders_are_no_classes(kind: str, hidden: str, tmp_path) -> None:
    names = [f"{part}/{folder}/1.png" for part in ("train", "val") for folder in (hidden, "ant", "bee")]
    names += ["train/ant/._1.png"]
    for name in names if kind == "image_folder" else ():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(draw())
    for part in ("train", "val") if kind == "tar" else ():
        members = {f"./{name.removeprefix(part + '/')}": draw() for name in names if name.startswith(part)}
        write_tar(tmp_path / f"{part}.tar", {**members, "__MACOSX/ant/._1.png": b"x"})
    dataset = load_dataset(kind, str(tmp_path))
    assert dataset.train.class_names == ("ant", "bee")
    assert dataset.train.labels.tolist() == dataset.test.labels.tolist() == [0, 1]


@pytest.mark.outside(3)
def test_hidden_tars_are_no_classes(tmp_path) -> None:
    for part, name in ((part, name) for part in ("train", "val") for name in ("ant", "bee")):
        write_tar(tmp_path / part / f"{name}.tar", {"1.png": draw()})
        (tmp_path / part / f"._{name}.tar").write_bytes(b"x")
    assert load_dataset("tar", str(tmp_path)).train.class_names == ("ant", "bee")


@pytest.mark.outside(3)
def test_hidden_files_of_shards_are_no_images(tmp_path) -> None:
    write_shard(tmp_path / "val-0.tar", 0)
    members = {"1.png": draw(), "1.cls": b"0", "2.png": draw(), "2.cls": b"1"}
    write_tar(tmp_path / "train-0.tar", members | {"__MACOSX/._1.png": b"x", "._2.png": b"x", "._2.cls": b"x"})
    assert load_dataset("wds/x", str(tmp_path)).train.labels.tolist() == [0, 1]


@pytest.mark.outside(3)
def test_hidden_folders_of_a_torchvision_data_set_are_refused() -> None:
    class Pictures(list):
        classes = (".ipynb_checkpoints", "ant", "bee")

    with pytest.raises(UserError, match="ipynb_checkpoints"):
        read_images(Pictures([(torch.zeros(1, 4, 4, dtype=torch.uint8), label) for label in (1, 2)]), mean=[0], std=[1])
